package attach

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// ErrUser says that something uses the device that can't be frozen. Nothing
// was changed.
var ErrUser = errors.New("can't be attached as it is used")

// freezable are the types of file systems that can be frozen and that keep all
// they are on one device.
var freezable = []string{"ext2", "ext3", "ext4", "xfs"}

// usage is blockdev.Usage; tests have other users than they can make.
var usage = blockdev.Usage

// fileSystem is a mounted file system on the device.
type fileSystem struct {
	number string // as stat(2) shows it, "major:minor"
	kind   string
	device string   // the kernel's name of what it is on
	points []string // where it is mounted, for people
	paths  []string // that lead to it from here
}

func (f fileSystem) String() string { return fmt.Sprintf("%s (%s)", f.points[0], f.kind) }

// open opens the file system. The mount may have gone, or something else may
// stand at its place.
func (f fileSystem) open() (*os.File, error) {
	var errs []error
	for _, path := range f.paths {
		file, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if errors.Is(err, unix.ENOTDIR) { // one file bound to a place of its own
			file, err = os.Open(path)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		var st unix.Stat_t
		if err = unix.Fstat(int(file.Fd()), &st); err == nil && fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)) == f.number {
			return file, nil
		}
		errs = append(errs, cmp.Or(err, fmt.Errorf("%s is not %s any more", path, f)))
		file.Close()
	}
	return nil, fmt.Errorf("%w: %w", errMounts, errors.Join(errs...))
}

// errMounts says that what is mounted changed since it was looked at.
var errMounts = errors.New("a file system was mounted or unmounted during the cut; the next one looks again")

// fileSystems lists the file systems to freeze, by number, or says which user
// of the device stands in the way.
func fileSystems(device string) ([]fileSystem, error) {
	refuse := func(format string, args ...any) ([]fileSystem, error) {
		return nil, fmt.Errorf("%s %w: %w", device, ErrUser, fmt.Errorf(format, args...))
	}
	mounts, others, err := usage(device)
	if err != nil {
		return nil, err
	}
	if len(others) > 0 {
		return refuse("%s: what writes by way of it can't be stopped", others[0])
	}
	var list []fileSystem
	for _, m := range mounts {
		switch {
		case !slices.Contains(freezable, m.Type):
			return refuse("%s is mounted on %s as %s; one of %s can be frozen", m.Device, m.Point, m.Type, strings.Join(freezable, ", "))
		case m.Point == "/" && (m.Process <= 1):
			return refuse("%s is the root file system: freezing it would stop this program too", m.Device)
		}
		for _, o := range m.Options {
			if key, value, _ := strings.Cut(o, "="); key == "logdev" || key == "rtdev" || key == "journal_path" || key == "journal_dev" {
				return refuse("%s, mounted on %s, keeps a part of itself on another device (%s=%s): a copy of one would not be whole", m.Device, m.Point, key, value)
			}
		}
		i := slices.IndexFunc(list, func(f fileSystem) bool { return f.number == m.Number })
		if i < 0 {
			i = len(list)
			list = append(list, fileSystem{number: m.Number, kind: m.Type, device: m.Device})
		}
		list[i].points = append(list[i].points, m.Point)
		list[i].paths = append(list[i].paths, m.Path())
	}
	for _, f := range list {
		if err := ownJournal(device, f); err != nil {
			return refuse("%w", err)
		}
	}
	slices.SortFunc(list, func(a, b fileSystem) int { return cmp.Compare(a.number, b.number) })
	return list, nil
}

// ownJournal refuses an ext3 or ext4 whose journal is on another device. Its
// superblock, from byte 1024: 92 features u32, of which 4 says that it has a
// journal; 224 the journal's inode u32, 0 if it is elsewhere.
func ownJournal(device string, f fileSystem) error {
	if !strings.HasPrefix(f.kind, "ext") {
		return nil
	}
	if name, err := kernelName(device); err != nil {
		return err
	} else if name != f.device {
		device = filepath.Join("/dev", f.device) // a partition of it, or its disk
	}
	d, err := blockdev.OpenFile(device, blockdev.OpenOptions{})
	if err != nil {
		return err
	}
	defer d.Close()
	b := blockdev.AlignedBuffer(blockdev.BlockSize)
	if _, err := d.ReadAt(b, 0); err != nil {
		return err
	}
	super := b[1024:]
	if binary.LittleEndian.Uint32(super[92:])&4 != 0 && binary.LittleEndian.Uint32(super[224:]) == 0 {
		return fmt.Errorf("%s has its journal on another device: a copy of one would not be whole", f)
	}
	return nil
}

// notHeld refuses a device that is not mounted and yet claimed: as the log of a
// file system elsewhere, or by a program. It claims it itself for a moment, in
// which nobody can mount it, and so is not for each cut.
func notHeld(device string) error {
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%s %w: it is not mounted, and yet somebody has claimed it: a program that opened it exclusively, or a file system elsewhere that keeps its log on it", device, ErrUser)
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// sameFileSystems says whether two looks found the same.
func sameFileSystems(a, b []fileSystem) bool {
	return slices.EqualFunc(a, b, func(x, y fileSystem) bool { return x.number == y.number && x.device == y.device })
}

// standsOn says whether a file at path, there or to be, needs the device, whose
// name is the kernel's.
func standsOn(path, name string) (string, error) {
	for { // the nearest folder that exists
		if _, err := os.Lstat(path); err == nil || filepath.Dir(path) == path {
			break
		}
		path = filepath.Dir(path)
	}
	b, err := blockdev.BackingOf(path)
	if err != nil {
		return "", err
	}
	if slices.Contains(b.Devices, name) {
		return b.MountPoint, nil
	}
	return "", nil
}
