package blockdev

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Placement says where a block device's bytes stand on its whole disk.
type Placement struct {
	// Dir is the whole disk's folder in sysfs.
	Dir string
	// Major and Minor are the whole disk's number.
	Major, Minor uint32
	// StartBytes is where the device begins on the whole disk.
	StartBytes int64
	// Sequence is the disk's number among all that this boot has seen: another
	// disk under the same name and number has another. 0 before Linux 5.15.
	Sequence uint64
	// Requests says that the disk has a request queue. One without takes each
	// request as it was made: device-mapper, md, RAM disks.
	Requests bool
	// StatDir is the folder whose files 'stat' and 'inflight' tell of all that is
	// written to the device: its own, but for a partition of an NVMe namespace with
	// several paths that of the disk. The kernel counts what goes to one of those on
	// the disk alone; what is written to other partitions is then counted, too.
	StatDir string
}

// PlacementOf says where the block device at path, a whole disk or a partition,
// stands.
func PlacementOf(path string) (Placement, error) { return hostKernel.placement(path) }

func (k kernel) placement(path string) (Placement, error) {
	fail := func(err error) (Placement, error) { return Placement{}, fmt.Errorf("place of %s: %w", path, err) }
	n, err := k.nodeAt(path)
	if err != nil {
		return fail(err)
	}
	p := Placement{Dir: n.disk}
	text, err := os.ReadFile(filepath.Join(n.disk, "dev"))
	if err != nil {
		return fail(err)
	}
	if _, err := fmt.Sscanf(strings.TrimSpace(string(text)), "%d:%d", &p.Major, &p.Minor); err != nil {
		return fail(fmt.Errorf("number of its disk, %q: %w", text, err))
	}
	if n.dir != n.disk {
		start, err := ReadNumber(filepath.Join(n.dir, "start"))
		if err != nil {
			return fail(err)
		}
		p.StartBytes = start * SectorSize
	}
	if p.Sequence, err = n.sequence(); err != nil {
		return fail(err)
	}
	if p.Requests, err = n.requests(); err != nil {
		return fail(err)
	}
	p.StatDir, err = n.statDir()
	if err != nil {
		return fail(err)
	}
	return p, nil
}

// requests says whether the disk has a request queue.
func (n sysNode) requests() (bool, error) {
	entries, err := os.ReadDir(filepath.Join(n.disk, "mq"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return len(entries) > 0, nil
}

// statDir is Placement.StatDir. The disk that joins the paths of an NVMe namespace
// has no requests of its own.
func (n sysNode) statDir() (string, error) {
	if n.dir == n.disk || !strings.HasPrefix(filepath.Base(n.disk), "nvme") {
		return n.dir, nil
	}
	if requests, err := n.requests(); requests || err != nil {
		return n.dir, err
	}
	return n.disk, nil
}

// BootID is the random id of this boot.
func BootID() (id [16]byte, err error) {
	const path = "/proc/sys/kernel/random/boot_id"
	text, err := os.ReadFile(path)
	if err != nil {
		return id, err
	}
	b, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(text)), "-", ""))
	if err != nil || len(b) != len(id) {
		return id, fmt.Errorf("%s holds %q, want a UUID", path, text)
	}
	return [16]byte(b), nil
}

// Node is the kernel's own node, in /dev, of a block device given as "major:minor"; "": the
// kernel names none. fs.ErrNotExist: there is no such device.
func Node(number string) (path string, err error) {
	uevent, err := os.ReadFile("/sys/dev/block/" + number + "/uevent")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(uevent)) {
		if node, found := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); found {
			return "/dev/" + node, nil
		}
	}
	return "", nil
}
