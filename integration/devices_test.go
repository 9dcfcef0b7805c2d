package integration

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/uml"
)

// Helpers for use inside a guest.

// modprobe loads one module with its parameters (name=value).
func modprobe(t *testing.T, name string, parameters ...string) {
	t.Helper()
	if err := uml.ModprobeWith(name, parameters...); err != nil {
		t.Fatal(err)
	}
}

// ramDisks makes n disks in memory (brd) of the given size in bytes and
// returns their paths. It can be called once per guest.
func ramDisks(t *testing.T, n int, size int64) []string {
	t.Helper()
	modprobe(t, "brd", fmt.Sprintf("rd_nr=%d", n), fmt.Sprintf("rd_size=%d", size>>10))
	paths := make([]string, n)
	for i := range paths {
		paths[i] = fmt.Sprintf("/dev/ram%d", i)
		awaitFile(t, paths[i])
	}
	return paths
}

// ubd is the guest's i-th disk.
func ubd(i int) string { return "/dev/ubd" + string(rune('a'+i)) }

// vd is the same under qemu.
func vd(i int) string { return "/dev/vd" + string(rune('a'+i)) }

func awaitFile(t *testing.T, path string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s did not appear", path)
		}
	}
}

// dmCreate makes a mapped device and returns its path; it is removed when the
// test ends. For what stands below the code under test, such as a dm-flakey.
func dmCreate(t *testing.T, name, table string) string {
	t.Helper()
	run(t, "dmsetup", "create", name, "--table", table)
	path := "/dev/mapper/" + name
	awaitFile(t, path)
	t.Cleanup(func() { cleanup("dmsetup", "remove", "--retry", name) })
	return path
}

// dmSwap replaces a mapped device's table.
func dmSwap(t *testing.T, name, table string) {
	t.Helper()
	run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", name)
	run(t, "dmsetup", "load", name, "--table", table)
	run(t, "dmsetup", "resume", name)
}

// sectors is a device's size in sectors of 512 bytes.
func sectors(t *testing.T, path string) int64 {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		t.Fatal(err)
	}
	return size / 512
}

// mkfs makes an ext4 or xfs on a device, without its lazy initialisation.
func mkfs(t *testing.T, kind, device string) {
	t.Helper()
	switch kind {
	case "ext4":
		run(t, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", device)
	case "xfs":
		run(t, "mkfs.xfs", "-q", "-f", "-K", device)
	default:
		t.Fatalf("mkfs: no file system %q", kind)
	}
}

// mustMount mounts a device on a new folder, which it returns; it is unmounted
// when the test ends.
func mustMount(t *testing.T, kind, device, options string) string {
	t.Helper()
	dir, err := os.MkdirTemp("/mnt", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(device, dir, kind, 0, options); err != nil {
		t.Fatalf("mount %s (%s) on %s: %v", device, kind, dir, err)
	}
	t.Cleanup(func() { unix.Unmount(dir, 0) })
	return dir
}

// mustUnmount bears with an agent that holds an attached file system open while it freezes it.
func mustUnmount(t *testing.T, dir string) {
	t.Helper()
	err := unix.Unmount(dir, 0)
	for deadline := time.Now().Add(20 * time.Second); errors.Is(err, unix.EBUSY) && time.Now().Before(deadline); err = unix.Unmount(dir, 0) {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		t.Fatalf("unmount %s: %v", dir, err)
	}
}

// fsck checks that an image, once mounted so that its log is replayed, holds
// a consistent ext4 or xfs. It works on a copy: the device is only read.
func fsck(t *testing.T, kind, device string) {
	t.Helper()
	if out, err := checkCopy(t, kind, device, sectors(t, device)*sector); err != nil {
		t.Fatalf("%s on %s is damaged: %v\n%s", kind, device, err, out)
	}
}

// checkCopy checks a copy of the device's first size bytes.
func checkCopy(t *testing.T, kind, device string, size int64) (string, error) {
	t.Helper()
	return lookIntoCopy(t, kind, device, size, func(string) {})
}

// lookIntoCopy is checkCopy, and look is called while the copy is mounted.
func lookIntoCopy(t *testing.T, kind, device string, size int64, look func(dir string)) (string, error) {
	t.Helper()
	copyPath := filepath.Join(t.TempDir(), "image")
	defer os.Remove(copyPath) // it stands in the guest's memory
	copyDevice(t, device, copyPath, size)
	loop := strings.TrimSpace(run(t, "losetup", "--find", "--show", copyPath))
	defer cleanup("losetup", "--detach", loop)
	dir, err := os.MkdirTemp("/mnt", "")
	if err != nil {
		t.Fatal(err)
	}
	defer os.Remove(dir)
	options := ""
	if kind == "xfs" {
		options = "nouuid" // the original may be mounted
	}
	if err := unix.Mount(loop, dir, kind, 0, options); err != nil {
		return "", fmt.Errorf("mount the copy: %w", err)
	}
	func() {
		defer func() { err = unix.Unmount(dir, 0) }() // also when look ends the test
		look(dir)
	}()
	if err != nil {
		return "", fmt.Errorf("unmount the copy: %w", err)
	}
	if kind == "xfs" {
		return tryRun(t, "xfs_repair", "-n", loop)
	}
	return tryRun(t, "e2fsck", "-fn", loop)
}

// copyDevice copies a device's first size bytes, read with O_DIRECT, into a
// sparse file.
func copyDevice(t *testing.T, device, to string, size int64) {
	t.Helper()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if err := out.Truncate(size); err != nil {
		t.Fatal(err)
	}
	err = readDirectTo(device, size, func(offset int64, piece []byte) error {
		if allZero(piece) {
			return nil
		}
		_, err := out.WriteAt(piece, offset)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// cleanup runs a command whose failure is only worth a line.
func cleanup(name string, args ...string) {
	if out, err := tryCommand(name, args...); err != nil {
		fmt.Printf("cleanup: %s %s: %v: %s\n", name, strings.Join(args, " "), err, out)
	}
}
