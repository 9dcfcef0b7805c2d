package blockdev

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Identity is what the kernel says a block device is. Of a partition, Serial,
// Model, WWID and Disk are the whole disk's.
type Identity struct {
	// Serial is the disk's serial number, "" where it has none (loop, RAM).
	Serial string
	Model  string
	// WWID is the disk's worldwide name; of a device-mapper device its UUID.
	WWID string
	// Path is the path that was asked for.
	Path         string
	Major, Minor uint32
	SizeBytes    int64
	// Disk is the kernel's name of the whole disk, for example nvme0n1.
	Disk string
	// Partition is the number of the partition, 0 for a whole disk.
	Partition int
	// Sequence is the disk's number among all that this boot has seen: another
	// disk under the same name and number has another. 0 before Linux 5.15.
	Sequence uint64
}

// Identify says what the block device at path is.
func Identify(path string) (Identity, error) { return hostKernel.identify(path) }

// Glance is Identify without what the disk itself may be asked for, such as a virtio disk for
// its serial number, so it never waits for a disk: of Serial, Model and WWID only a
// device-mapper device's UUID is filled in. Where the kernel does not number disks (Sequence
// is 0) nothing else tells one from another, and it is Identify.
func Glance(path string) (Identity, error) { return hostKernel.identifyBy(path, hostKernel.glance) }

// GlanceNumber is Glance at the block device of that number; Path is the kernel's own node of it.
func GlanceNumber(major, minor uint32) (Identity, error) { return hostKernel.glance(major, minor) }

// Disks lists the disks and partitions that there are, by number. Path is the kernel's own
// node of each. What vanishes meanwhile, or can't be told apart (a disk that does not answer
// any more), is left out.
func Disks() ([]Identity, error) { return hostKernel.disks() }

// SameDisk says whether two block devices, or two regular files, share any
// byte by name: one device under two names, a partition and its disk, or
// partitions that overlap. It does not look through device-mapper or loop.
func SameDisk(a, b string) (bool, error) { return hostKernel.sameDisk(a, b) }

// kernel is where the kernel shows its devices; tests give it a tree of their
// own.
type kernel struct {
	sys, proc string
	// device is the number of the block device at path.
	device func(path string) (major, minor uint32, err error)
}

var hostKernel = kernel{sys: "/sys", proc: "/proc", device: deviceNumber}

func deviceNumber(path string) (major, minor uint32, err error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, 0, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, 0, fmt.Errorf("%s is no block device", path)
	}
	return unix.Major(st.Rdev), unix.Minor(st.Rdev), nil
}

// sysNode is where sysfs shows a block device.
type sysNode struct {
	dir  string // the device itself
	disk string // the whole disk, the same folder unless it is a partition
}

func (n sysNode) name() string { return filepath.Base(n.dir) }

func (k kernel) node(major, minor uint32) (sysNode, error) {
	dir, err := filepath.EvalSymlinks(filepath.Join(k.sys, "dev/block", fmt.Sprintf("%d:%d", major, minor)))
	if err != nil {
		return sysNode{}, fmt.Errorf("block device %d:%d: %w", major, minor, err)
	}
	n := sysNode{dir, dir}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
		n.disk = filepath.Dir(dir)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return sysNode{}, fmt.Errorf("block device %d:%d: %w", major, minor, err)
	}
	return n, nil
}

// ReadNumber reads a file of sysfs that holds one number. One beyond an int64 is
// math.MaxInt64.
func ReadNumber(path string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	word := strings.TrimSpace(string(text))
	n, err := strconv.ParseInt(word, 10, 64)
	if errors.Is(err, strconv.ErrRange) && word[0] != '-' {
		n, err = math.MaxInt64, nil // it may be as large as a u64
	}
	if err != nil {
		return 0, fmt.Errorf("%s holds '%s', want a number", path, word)
	}
	return n, nil
}

// firstText is the content of the first of the files that exists and holds
// anything.
func firstText(dir string, names ...string) string {
	for _, name := range names {
		if text, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			if s := strings.TrimSpace(strings.ToValidUTF8(string(text), "?")); s != "" {
				return s
			}
		}
	}
	return ""
}

// nodeAt is the node of the block device at path.
func (k kernel) nodeAt(path string) (sysNode, error) {
	major, minor, err := k.device(path)
	if err != nil {
		return sysNode{}, err
	}
	return k.node(major, minor)
}

func (k kernel) identify(path string) (Identity, error) { return k.identifyBy(path, k.identifyNumber) }

func (k kernel) identifyBy(path string, by func(major, minor uint32) (Identity, error)) (Identity, error) {
	major, minor, err := k.device(path)
	var id Identity
	if err == nil {
		id, err = by(major, minor)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("identify %s: %w", path, err)
	}
	id.Path = path
	return id, nil
}

func (k kernel) identifyNumber(major, minor uint32) (Identity, error) {
	id, n, err := k.known(major, minor)
	if err != nil {
		return Identity{}, err
	}
	// virtio has its serial beside the disk, NVMe at the controller, SCSI
	// in a page of its own.
	id.Serial = firstText(n.disk, "serial", "device/serial")
	id.Model = firstText(n.disk, "device/model")
	id.WWID = firstText(n.disk, "wwid", "device/wwid", "dm/uuid")
	if id.Serial == "" {
		if id.Serial, err = unitSerial(filepath.Join(n.disk, "device/vpd_pg80")); err != nil {
			return Identity{}, err
		}
	}
	return id, nil
}

func (k kernel) glance(major, minor uint32) (Identity, error) {
	id, n, err := k.known(major, minor)
	switch {
	case err != nil:
		return Identity{}, err
	case id.Sequence == 0:
		return k.identifyNumber(major, minor)
	}
	id.WWID = firstText(n.disk, "dm/uuid")
	return id, nil
}

// known is what the kernel knows of a device without asking it.
func (k kernel) known(major, minor uint32) (Identity, sysNode, error) {
	n, err := k.node(major, minor)
	if err != nil {
		return Identity{}, n, err
	}
	sectors, err := ReadNumber(filepath.Join(n.dir, "size"))
	if err != nil {
		return Identity{}, n, err
	}
	id := Identity{
		// Where a name has a folder the kernel shows a '!'.
		Path:  "/dev/" + strings.ReplaceAll(n.name(), "!", "/"),
		Major: major, Minor: minor, SizeBytes: sectors * SectorSize, Disk: filepath.Base(n.disk),
	}
	if id.Sequence, err = n.sequence(); err != nil {
		return Identity{}, n, err
	}
	if n.dir != n.disk {
		number, err := ReadNumber(filepath.Join(n.dir, "partition"))
		if err != nil {
			return Identity{}, n, err
		}
		id.Partition = int(number)
	}
	return id, n, nil
}

// sequence is the disk's, 0 where the kernel has none.
func (n sysNode) sequence() (uint64, error) {
	sequence, err := ReadNumber(filepath.Join(n.disk, "diskseq"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	return uint64(sequence), nil
}

func (k kernel) disks() ([]Identity, error) {
	entries, err := os.ReadDir(filepath.Join(k.sys, "dev/block"))
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	var all []Identity
	for _, e := range entries {
		var major, minor uint32
		if _, err := fmt.Sscanf(e.Name(), "%d:%d", &major, &minor); err != nil {
			return nil, fmt.Errorf("list block devices: number %q: %w", e.Name(), err)
		}
		if id, err := k.identifyNumber(major, minor); err == nil {
			all = append(all, id)
		}
	}
	slices.SortFunc(all, func(a, b Identity) int { return cmp.Or(cmp.Compare(a.Major, b.Major), cmp.Compare(a.Minor, b.Minor)) })
	return all, nil
}

// unitSerial reads SCSI's page of the unit serial number:
//
//	0 device type, 1 page code 0x80, 2 length of what follows u16 big-endian, 4 serial, padded with spaces
func unitSerial(path string) (string, error) {
	page, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	if len(page) < 4 || page[1] != 0x80 {
		return "", fmt.Errorf("%s is no page of a unit serial number", path)
	}
	n := int(page[2])<<8 | int(page[3])
	if n > len(page)-4 {
		return "", fmt.Errorf("%s has %d bytes, want %d", path, len(page), n+4)
	}
	return strings.Trim(strings.ToValidUTF8(string(page[4:4+n]), "?"), " \x00"), nil
}

func (k kernel) sameDisk(a, b string) (bool, error) {
	same, err := sameFile(a, b)
	if err != nil || same {
		return same, err
	}
	var disks [2]string
	var ranges [2]Extent
	for i, path := range []string{a, b} {
		major, minor, err := k.device(path)
		if err != nil {
			if info, statErr := os.Stat(path); statErr == nil && info.Mode().IsRegular() {
				return false, nil // the other is another file or a device
			}
			return false, fmt.Errorf("compare devices: %w", err)
		}
		n, err := k.node(major, minor)
		if err != nil {
			return false, fmt.Errorf("compare devices: %s: %w", path, err)
		}
		if disks[i] = n.disk; n.dir == n.disk {
			ranges[i] = Extent{0, 1<<63 - 1}
			continue
		}
		start, err := ReadNumber(filepath.Join(n.dir, "start"))
		if err != nil {
			return false, fmt.Errorf("compare devices: %w", err)
		}
		size, err := ReadNumber(filepath.Join(n.dir, "size"))
		if err != nil {
			return false, fmt.Errorf("compare devices: %w", err)
		}
		ranges[i] = Extent{start, size} // in sectors, which will do here
	}
	return disks[0] == disks[1] && len(Intersect(ranges[:1], ranges[1:])) > 0, nil
}

func sameFile(a, b string) (bool, error) {
	x, err := os.Stat(a)
	if err != nil {
		return false, fmt.Errorf("compare devices: %w", err)
	}
	y, err := os.Stat(b)
	if err != nil {
		return false, fmt.Errorf("compare devices: %w", err)
	}
	return os.SameFile(x, y), nil
}
