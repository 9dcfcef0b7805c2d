package blocktest

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Loop makes a loop device over a sparse file of size bytes, held in memory.
// It goes away with the test. Tests that may not, or can't, are skipped.
func Loop(t testing.TB, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root makes loop devices")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no loop devices here")
	}
	file, err := os.CreateTemp("/dev/shm", "blockferry-test-*")
	if err == nil {
		err = errors.Join(file.Truncate(size), file.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	// The loop device keeps what it is over.
	defer os.Remove(file.Name())
	return LoopOver(t, file.Name())
}

// LoopOver makes a loop device over a file or a device; it goes away with the test.
func LoopOver(t testing.TB, file string) string {
	t.Helper()
	path := Command(t, "losetup", "--find", "--show", file)
	hold, err := os.Open(path)
	Command(t, "losetup", "--detach", path)
	if err != nil {
		t.Fatal(err)
	}
	// Detached while open, it goes when the last opener does, also if this process dies.
	t.Cleanup(func() { hold.Close() })
	return path
}

// Zram makes a disk in memory that has no requests: it takes bios as they come. It
// goes away with the test. Tests that may not, or can't, are skipped.
func Zram(t testing.TB, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root makes zram devices")
	}
	text, err := os.ReadFile("/sys/class/zram-control/hot_add")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("this kernel has no zram")
	}
	if err != nil {
		t.Fatal(err)
	}
	number := strings.TrimSpace(string(text))
	t.Cleanup(func() {
		if err := os.WriteFile("/sys/class/zram-control/hot_remove", []byte(number), 0); err != nil {
			t.Errorf("remove zram%s: %v", number, err)
		}
	})
	if err := os.WriteFile("/sys/block/zram"+number+"/disksize", []byte(strconv.FormatInt(size, 10)), 0); err != nil {
		t.Fatal(err)
	}
	return "/dev/zram" + number
}

// FileSystem makes a file system ("ext4" or "xfs") on a device and mounts it on
// a new folder, whose name holds a blank. It is thawed and unmounted with the test.
func FileSystem(t testing.TB, kind, device string) (dir string) {
	t.Helper()
	switch kind {
	case "ext4":
		Command(t, "mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
	case "xfs":
		Command(t, "mkfs.xfs", "-q", "-f", device)
	default:
		t.Fatalf("no file system '%s' here", kind)
	}
	return Mount(t, kind, device, 0)
}

// Mount mounts what is on a device; see FileSystem.
func Mount(t testing.TB, kind, device string, flags uintptr) (dir string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "blockferry test ")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	mount(t, dir, kind, device, flags)
	return dir
}

// MountOn makes a file system on a device and mounts it on a folder, over what
// is mounted there.
func MountOn(t testing.TB, dir, kind, device string) {
	t.Helper()
	Command(t, "mkfs."+kind, "-q", device)
	mount(t, dir, kind, device, 0)
}

func mount(t testing.TB, dir, kind, device string, flags uintptr) {
	t.Helper()
	if err := unix.Mount(device, dir, kind, flags, ""); err != nil {
		t.Fatalf("mount %s (%s): %v", device, kind, err)
	}
	t.Cleanup(func() {
		for Thaw(dir) == nil { // a test that failed; its writers would hang for good
		}
		err := unix.Unmount(dir, 0)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(dir, unix.MNT_DETACH)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) { // the test did it itself
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// Freeze freezes the file system that a folder is on, as anybody else may.
func Freeze(dir string) error { return fsIoctl(dir, 0xc0045877) }

// Thaw thaws it; EINVAL: it was not frozen.
func Thaw(dir string) error { return fsIoctl(dir, 0xc0045878) }

func fsIoctl(dir string, request uint) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.IoctlSetInt(int(f.Fd()), request, 0)
}

// Command runs a program and returns what it says; the test fails if it does.
func Command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// PinDir is a folder on a bpffs of the test's own. Tests are skipped where the
// kernel takes no tracing programs.
func PinDir(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root traces the kernel")
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		t.Skip("this kernel has no BTF")
	}
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Skipf("no bpffs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount the bpffs: %v", err)
		}
	})
	return dir
}
