package blockdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Backing is what a file stands on.
type Backing struct {
	// FileSystem is the type of its file system, MountPoint where that is.
	FileSystem, MountPoint string
	// Devices are the kernel's names of the block devices below it, all
	// layers: what is mounted, what that is built on, whole disks of partitions,
	// and what is below the file of a loop device. Empty when there are none.
	Devices []string
}

// BackingOf says what a file at path, which need not exist yet, would stand on.
func BackingOf(path string) (Backing, error) { return hostKernel.backing(path) }

// On says whether any of the devices is the disk, or the partition or other device, at path.
func (b Backing) On(path string) (bool, error) {
	major, minor, err := hostKernel.device(path)
	if err != nil {
		return false, err
	}
	n, err := hostKernel.node(major, minor)
	if err != nil {
		return false, err
	}
	return slices.Contains(b.Devices, n.name()) || slices.Contains(b.Devices, filepath.Base(n.disk)), nil
}

func (k kernel) backing(path string) (b Backing, err error) {
	fail := func(err error) (Backing, error) {
		return b, fmt.Errorf("what is below %s: %w", path, err)
	}
	// The file itself may be a link to elsewhere; if there is none its folder counts.
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		if real, err = filepath.EvalSymlinks(filepath.Dir(path)); err != nil {
			return fail(err)
		}
	}
	number, source := "", ""
	text, err := os.ReadFile(filepath.Join(k.proc, "self/mountinfo"))
	if err != nil {
		return fail(err)
	}
	for line := range strings.Lines(string(text)) {
		m, err := parseMount(line)
		if err != nil {
			return fail(err)
		}
		// Of two at one place the later one is seen.
		if within(real, m.point) && len(m.point) >= len(b.MountPoint) {
			b.MountPoint, source, number, b.FileSystem = m.point, m.source, m.number, m.fileSystem
		}
	}
	if b.MountPoint == "" {
		return fail(errors.New("no mount holds it"))
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(number, "%d:%d", &major, &minor); err != nil {
		return fail(err)
	}
	if major == 0 {
		// btrfs and others show a number that belongs to no device.
		if major, minor, err = k.device(source); err != nil {
			return b, nil // memory, or another machine's disk
		}
	}
	n, err := k.node(major, minor)
	if err == nil {
		err = k.below(n, &b)
	}
	if err != nil {
		return fail(err)
	}
	return b, nil
}

func within(path, folder string) bool {
	rest, found := strings.CutPrefix(path, folder)
	return found && (rest == "" || rest[0] == '/' || folder == "/")
}

// below adds a device and all it is built on.
func (k kernel) below(n sysNode, b *Backing) error {
	if slices.Contains(b.Devices, n.name()) {
		return nil
	}
	b.Devices = append(b.Devices, n.name())
	if n.dir != n.disk {
		if err := k.below(sysNode{n.disk, n.disk}, b); err != nil {
			return err
		}
	}
	slaves, err := filepath.Glob(filepath.Join(n.dir, "slaves/*/dev"))
	if err != nil {
		return err
	}
	for _, s := range slaves {
		var major, minor uint32
		if _, err := fmt.Sscanf(firstText(filepath.Dir(s), "dev"), "%d:%d", &major, &minor); err != nil {
			return err
		}
		on, err := k.node(major, minor)
		if err == nil {
			err = k.below(on, b)
		}
		if err != nil {
			return err
		}
	}
	if file := firstText(n.disk, "loop/backing_file"); file != "" {
		under, err := k.backing(file)
		if err != nil {
			return err
		}
		for _, d := range under.Devices {
			if !slices.Contains(b.Devices, d) {
				b.Devices = append(b.Devices, d)
			}
		}
		if Volatile(under.FileSystem) {
			b.FileSystem = under.FileSystem
		}
	}
	return nil
}

// Volatile says whether a type of file system is known to lose all it holds
// with a reboot, or to keep it nobody knows where.
func Volatile(fileSystem string) bool {
	return slices.Contains([]string{"tmpfs", "ramfs", "devtmpfs", "hugetlbfs", "overlay"}, fileSystem)
}

// Survives is nil if a file at path outlives the machine's memory and the disk
// at ssd, as far as can be told, and does not stand on a device built on it.
func Survives(path, ssd string) error {
	b, err := BackingOf(path)
	if err != nil {
		return err
	}
	if Volatile(b.FileSystem) {
		return fmt.Errorf("%s is on %s (%s), which does not survive the machine", path, b.MountPoint, b.FileSystem)
	}
	for _, d := range b.Devices {
		if strings.HasPrefix(d, "ram") || strings.HasPrefix(d, "zram") {
			return fmt.Errorf("%s is on %s, that on %s, which does not survive the machine", path, b.MountPoint, d)
		}
	}
	on, err := b.On(ssd)
	if errors.Is(err, unix.ENOENT) {
		return nil // a disk that is away carries nothing
	}
	if err != nil {
		return err
	}
	if on {
		return fmt.Errorf("%s is on %s, and that on %s itself, the disk of the volume: it would be lost with it, and wait for it", path, b.MountPoint, ssd)
	}
	return nil
}
