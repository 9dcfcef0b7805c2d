package udev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

const (
	ebsModel   = "Amazon Elastic Block Store"
	storeModel = "Amazon EC2 NVMe Instance Storage"
)

// machine is one with disks of several kinds.
func machine() []blockdev.Identity {
	return []blockdev.Identity{
		{Path: "/dev/nvme0n1", Major: 259, Serial: "vol0123456789abcdef0", Model: ebsModel, SizeBytes: 8 << 30, Sequence: 1},
		{Path: "/dev/nvme0n1p1", Major: 259, Minor: 1, Serial: "vol0123456789abcdef0", Model: ebsModel, SizeBytes: 7 << 30, Partition: 1, Sequence: 1},
		{Path: "/dev/nvme0n1p12", Major: 259, Minor: 2, Serial: "vol0123456789abcdef0", Model: ebsModel, SizeBytes: 1 << 30, Partition: 12, Sequence: 1},
		{Path: "/dev/nvme1n1", Major: 259, Minor: 3, Serial: "AWS2A3B4C5D", Model: storeModel, SizeBytes: 100 << 30, Sequence: 2},
		{Path: "/dev/nvme2n1", Major: 259, Minor: 4, Serial: "vol0fedcba9876543210", Model: ebsModel, SizeBytes: 8 << 30, Sequence: 3},
		{Path: "/dev/vda", Major: 254, Serial: "disk 7", SizeBytes: 1 << 30, Sequence: 4},
		{Path: "/dev/sda", Major: 8, Serial: "ABC123", Model: "QEMU HARDDISK", SizeBytes: 1 << 30, Sequence: 5},
		{Path: "/dev/sdb", Major: 8, Minor: 16, Serial: "left-part1", Model: "QEMU HARDDISK", SizeBytes: 1 << 30, Sequence: 6},
		{Path: "/dev/loop0", Major: 7, SizeBytes: 1 << 30, Sequence: 7},
		{Path: "/dev/loop0p1", Major: 7, Minor: 1, SizeBytes: 1 << 30, Partition: 1, Sequence: 7},
	}
}

// finderOn is a finder on disks that may change.
func finderOn(disks *[]blockdev.Identity) *finder {
	return &finder{
		disks: func() ([]blockdev.Identity, error) { return *disks, nil },
		at: func(major, minor uint32) (blockdev.Identity, error) {
			for _, id := range *disks {
				if id.Major == major && id.Minor == minor {
					return id, nil
				}
			}
			return blockdev.Identity{}, fs.ErrNotExist
		},
		found: map[string]blockdev.Identity{},
	}
}

func TestFind(t *testing.T) {
	disks := machine()
	for name, want := range map[string]string{
		"serial:vol0123456789abcdef0":         "/dev/nvme0n1",
		"serial:vol-0123456789abcdef0":        "/dev/nvme0n1", // as EC2 writes it
		"serial:vol0123456789abcdef0-part1":   "/dev/nvme0n1p1",
		"serial:vol-0123456789abcdef0-part12": "/dev/nvme0n1p12",
		"model:" + storeModel:                 "/dev/nvme1n1",
		"serial:AWS2A3B4C5D":                  "/dev/nvme1n1",
		"serial:disk 7":                       "/dev/vda",
		"serial:ABC123":                       "/dev/sda",
		"serial:left-part1":                   "/dev/sdb", // a whole disk's
	} {
		if id, err := finderOn(&disks).find(name); err != nil || id.Path != want {
			t.Errorf("%s: %s, %v; want %s", name, id.Path, err, want)
		}
	}
	for _, name := range []string{"serial:vol0123456789abcdef", "serial:VOL0123456789abcdef0", "serial:vol0123456789abcdef0-part2", "serial:vol0123456789abcdef0-part01",
		"serial:-part1", "model:-part1", "model:Amazon", "serial:" + storeModel, "model:AWS2A3B4C5D", "serial:-0123456789abcdef0"} {
		id, err := finderOn(&disks).find(name)
		if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "/dev/nvme1n1 (serial:AWS2A3B4C5D, model:"+storeModel) {
			t.Errorf("%s: %+v, %v; want that it is not there, and what is", name, id, err)
		}
	}
}

// Of two disks neither is taken, and both are named.
func TestFindRefusesTwo(t *testing.T) {
	disks := machine()
	for name, both := range map[string][]string{
		"model:" + ebsModel:   {"/dev/nvme0n1 (", "/dev/nvme2n1 ("},
		"model:QEMU HARDDISK": {"/dev/sda (serial:ABC123", "/dev/sdb (serial:left-part1"},
	} {
		id, err := finderOn(&disks).find(name)
		if !errors.Is(err, ErrAmbiguous) || id.Path != "" || strings.Contains(err.Error(), "nvme0n1p1") {
			t.Fatalf("%s: %+v, %v", name, id, err)
		}
		for _, path := range both {
			if !strings.Contains(err.Error(), path) {
				t.Errorf("%s: %v; want %s named", name, err, path)
			}
		}
	}
	// The same serial number twice: two paths to one disk, or two namespaces of a controller.
	disks = append(disks, blockdev.Identity{Path: "/dev/sdc", Major: 8, Minor: 32, Serial: "ABC123", Sequence: 8})
	if id, err := finderOn(&disks).find("serial:ABC123"); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("a serial number twice: %+v, %v", id, err)
	}
}

// What was found stays with its name while it is there, and not longer.
func TestFindStays(t *testing.T) {
	disks := machine()
	f := finderOn(&disks)
	const name = "model:" + storeModel
	want := func(what, path string, kind error) {
		t.Helper()
		id, err := f.find(name)
		if id.Path != path || !errors.Is(err, kind) {
			t.Fatalf("%s: %s, %v; want %s, %v", what, id.Path, err, path, kind)
		}
	}
	want("at first", "/dev/nvme1n1", nil)
	twin := blockdev.Identity{Path: "/dev/nvme3n1", Major: 259, Minor: 9, Serial: "AWS9", Model: storeModel, SizeBytes: 100 << 30, Sequence: 9}
	disks = append(disks, twin)
	want("beside another", "/dev/nvme1n1", nil)
	disks[3].Sequence = 10 // it went, and one came under its number
	want("once it was exchanged", "", ErrAmbiguous)
	disks = append(disks[:3:3], disks[4:]...)
	want("once it is gone", "/dev/nvme3n1", nil)
	disks = disks[:len(disks)-1]
	want("with none", "", fs.ErrNotExist)
	disks = append(disks, twin)
	want("back again", "/dev/nvme3n1", nil)

	// A kernel that does not number disks can't tell a twin: it is asked anew.
	for i := range disks {
		disks[i].Sequence = 0
	}
	f = finderOn(&disks)
	want("without sequence", "/dev/nvme3n1", nil)
	disks = append(disks, blockdev.Identity{Path: "/dev/nvme4n1", Major: 259, Minor: 12, Serial: "AWS12", Model: storeModel, SizeBytes: 1})
	want("without sequence, beside another", "", ErrAmbiguous)
}

func TestThere(t *testing.T) {
	disks := machine()
	f := finderOn(&disks)
	seen := disks[3]
	if !f.there(seen) {
		t.Error("a disk that is there is not")
	}
	for what, change := range map[string]func(*blockdev.Identity){
		"another disk":             func(id *blockdev.Identity) { id.Sequence++ },
		"another number":           func(id *blockdev.Identity) { id.Minor = 77 },
		"without its medium":       func(id *blockdev.Identity) { id.SizeBytes = 0 },
		"a partition in its place": func(id *blockdev.Identity) { id.Partition = 1 },
	} {
		disks = machine()
		change(&disks[3])
		if f.there(seen) {
			t.Errorf("%s: is there", what)
		}
	}
	for what, change := range map[string]func(*blockdev.Identity){
		"without sequences, another serial": func(id *blockdev.Identity) { id.Serial = "other" },
		"without sequences, another WWID":   func(id *blockdev.Identity) { id.WWID = "other" },
	} {
		old := seen
		old.Sequence = 0
		disks = machine()
		disks[3].Sequence = 0
		if !f.there(old) {
			t.Errorf("%s: the same is gone", what)
		}
		if change(&disks[3]); f.there(old) {
			t.Errorf("%s: is there", what)
		}
	}
	mapped := blockdev.Identity{Disk: "dm-0", Major: 253, WWID: "LVM-1", Sequence: 3, SizeBytes: 1}
	disks = []blockdev.Identity{mapped}
	if disks[0].Sequence = 4; !f.there(mapped) {
		t.Error("a mapped device with another table is another")
	}
	if disks[0].WWID = "LVM-2"; f.there(mapped) {
		t.Error("a mapped device with another UUID is the same")
	}
	disks = machine()
	if disks[3].Serial = ""; !f.there(seen) {
		t.Error("a disk that does not say its serial number is gone")
	}
	disks = machine()
	disks[3].SizeBytes *= 2
	if !f.there(seen) {
		t.Error("a disk that grew is gone")
	}
	if !f.there(blockdev.Identity{Path: "/some/file"}) {
		t.Error("a file is gone")
	}
}

// What can't be looked at is not gone.
func TestThereWhenTheKernelCantSay(t *testing.T) {
	var failure error
	f := &finder{at: func(uint32, uint32) (blockdev.Identity, error) {
		return blockdev.Identity{}, fmt.Errorf("look: %w", failure)
	}}
	for err, want := range map[error]bool{unix.EMFILE: true, unix.ENFILE: true, unix.EIO: true, unix.ENOMEM: true, unix.ENOENT: false, unix.ENODEV: false, unix.ENXIO: false} {
		if failure = err; f.there(machine()[3]) != want {
			t.Errorf("%v: there %v, want %v", err, !want, want)
		}
	}
}

// A disk that does not answer keeps who looks for a name that is not known yet, and nobody else.
func TestFindBesideADiskThatHangs(t *testing.T) {
	disks := machine()
	f := finderOn(&disks)
	const name = "serial:ABC123"
	if _, err := f.find(name); err != nil {
		t.Fatal(err)
	}
	asked, answer := make(chan struct{}), make(chan struct{})
	f.disks = func() ([]blockdev.Identity, error) {
		close(asked)
		<-answer
		return disks, nil
	}
	var both sync.WaitGroup
	both.Go(func() {
		if id, err := f.find("serial:disk 7"); err != nil || id.Path != "/dev/vda" {
			t.Errorf("once it answers: %+v, %v", id, err)
		}
	})
	<-asked
	found := make(chan error, 1)
	both.Go(func() { _, err := f.find(name); found <- err })
	select {
	case err := <-found:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("a name that is known waits for a disk that hangs")
	}
	close(answer)
	both.Wait()
}

func TestCheckName(t *testing.T) {
	for _, ok := range []string{"/dev/sda", "serial:vol0", "model:Amazon EC2 NVMe Instance Storage", "serial:a:b"} {
		if err := CheckName(ok); err != nil {
			t.Errorf("%s: %v", ok, err)
		}
	}
	for _, bad := range []string{"", "sda", "serial:", "model: ", "serial: x", "serial:x ", "Serial:x", "wwid:1", "serial:a\nb", "serial:" + strings.Repeat("x", maxName)} {
		if err := CheckName(bad); err == nil {
			t.Errorf("'%s' is accepted", bad)
		}
	}
}

func TestOpenFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if _, err := Open(path, blockdev.OpenOptions{}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("none: %v", err)
	}
	if err := os.WriteFile(path, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Open(path, blockdev.OpenOptions{})
	if err != nil || f.Size() != 8192 {
		t.Fatalf("a file: %v", err)
	}
	f.Close()
	if id, err := Look(path); err != nil || id.SizeBytes != 8192 || !There(id) {
		t.Errorf("a file is seen as %+v, %v", id, err)
	}
	if _, err := Open(filepath.Dir(path), blockdev.OpenOptions{}); err == nil || !strings.Contains(err.Error(), "directory") {
		t.Errorf("a folder: %v", err)
	}
}
