package blockdev

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestCreateAndEmptyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	head := bytes.Repeat([]byte{7}, BlockSize)
	if err := CreateFile(path, []byte("first"), 1<<20, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := CreateFile(path, head, 1<<20, 0o640); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("where there is one: %v", err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o640 {
		t.Fatalf("mode %v, want 0640 (%v)", info.Mode(), err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b[:5]) != "first" {
		t.Fatalf("the first was touched: %q, %v", b[:5], err)
	}
	if err := ReplaceFile(path, head, 1<<20, 0o600); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("replaced, mode %v, want 0600 (%v)", info.Mode(), err)
	}
	f, err := OpenFile(path, OpenOptions{Write: true, Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(head, 512<<10); err != nil || f.Size() != 1<<20 {
		t.Fatal(f.Size(), err)
	}
	if err := f.Empty(BlockSize, 2<<20); err != nil || f.Size() != 2<<20 {
		t.Fatal(f.Size(), err)
	}
	all := make([]byte, 2<<20)
	if _, err := f.ReadAt(all, 0); err != nil || !bytes.Equal(all[:BlockSize], head) || firstByte(all[BlockSize:]) >= 0 {
		t.Errorf("the emptied file: %v, byte %d", err, firstByte(all[BlockSize:]))
	}
	if names, _ := filepath.Glob(filepath.Dir(path) + "/.*"); len(names) != 0 {
		t.Errorf("left over: %v", names)
	}
	if err := f.InPlace(); err != nil {
		t.Error(err)
	}
	if err := ReplaceFile(path, head, 1<<20, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.InPlace(); err == nil || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("replaced: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := f.InPlace(); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
		t.Errorf("removed: %v", err)
	}
	if err := CreateFile(filepath.Join(filepath.Dir(path), "none", "file"), head, 1<<20, 0o640); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a folder that is not there: %v", err)
	}
}

func firstByte(b []byte) int {
	for i, v := range b {
		if v != 0 {
			return i
		}
	}
	return -1
}

// What a file stands on is told through partitions, mapped devices and loop
// devices.
func TestBacking(t *testing.T) {
	root := t.TempDir()
	k := kernel{sys: root + "/sys", proc: root + "/proc", device: func(path string) (uint32, uint32, error) {
		if path == "/dev/fs" {
			return 9, 1, nil
		}
		return 0, 0, errors.New("no block device")
	}}
	put := func(path, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(root+path), 0o755), os.WriteFile(root+path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	link := func(to, path string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(filepath.Dir(root+path), 0o755), os.Symlink(root+to, root+path)); err != nil {
			t.Fatal(err)
		}
	}
	device := func(dir, number string) {
		put("/sys/devices/"+dir+"/dev", number+"\n")
		link("/sys/devices/"+dir, "/sys/dev/block/"+number)
	}
	device("disk", "8:0")
	device("disk/disk1", "8:1")
	put("/sys/devices/disk/disk1/partition", "1\n")
	device("dm-0", "253:0")
	link("/sys/devices/disk/disk1", "/sys/devices/dm-0/slaves/disk1")
	device("loop0", "7:0")
	for _, folder := range []string{"/mnt/mapped", "/mnt/loop", "/mnt/memory", "/mnt/btrfs"} {
		put(folder+"/file", "")
	}
	put("/sys/devices/loop0/loop/backing_file", root+"/mnt/mapped/file\n")
	device("other", "9:1")
	put("/proc/self/mountinfo", strings.ReplaceAll(`1 1 0:20 / / rw - hostfs none rw
2 1 253:0 / ROOT/mnt/mapped rw - ext4 /dev/mapper/x rw
3 1 7:0 / ROOT/mnt/loop rw - xfs /dev/loop0 rw
4 1 0:33 / ROOT/mnt/memory rw - tmpfs none rw
5 1 0:34 / ROOT/mnt/btrfs rw - btrfs /dev/fs rw
`, "ROOT", root))
	for path, want := range map[string]Backing{
		"/mnt/mapped/file": {"ext4", root + "/mnt/mapped", []string{"dm-0", "disk1", "disk"}},
		"/mnt/loop/new":    {"xfs", root + "/mnt/loop", []string{"loop0", "dm-0", "disk1", "disk"}},
		"/mnt/memory/new":  {"tmpfs", root + "/mnt/memory", nil},
		"/mnt/btrfs/new":   {"btrfs", root + "/mnt/btrfs", []string{"other"}},
		"/elsewhere":       {"hostfs", "/", nil},
	} {
		if got, err := k.backing(root + path); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v; want %+v", path, got, err, want)
		}
	}
	if _, err := k.backing(root + "/none/file"); err == nil {
		t.Error("a file in no folder stands on something")
	}
}
