package blockdev_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
)

// image makes a sparse regular file.
func image(t *testing.T, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, o blockdev.OpenOptions) *blockdev.File {
	t.Helper()
	d, err := blockdev.OpenFile(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

var writable = blockdev.OpenOptions{Write: true}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice makes a loop device that goes away with the test, or with the
// process if that dies first.
func loopDevice(t *testing.T, size int64, sectorSize int) string {
	t.Helper()
	needRoot(t)
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no loop devices here")
	}
	path := command(t, "losetup", "--find", "--show", "--sector-size", fmt.Sprint(sectorSize), image(t, t.TempDir(), size))
	hold, err := os.Open(path)
	if out, detachErr := exec.Command("losetup", "--detach", path).CombinedOutput(); detachErr != nil {
		t.Errorf("losetup --detach %s: %v\n%s", path, detachErr, out)
	}
	if err != nil {
		t.Fatal(err)
	}
	// Detached while open, it goes when the last opener does.
	t.Cleanup(func() { hold.Close() })
	return path
}

func TestRegularFileIsDevice(t *testing.T) {
	blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
		d := open(t, image(t, t.TempDir(), 8<<20), writable)
		if !d.Direct() {
			t.Log("no O_DIRECT in", t.TempDir())
		}
		return d
	})
}

func TestLoopDeviceIsDevice(t *testing.T) {
	for _, sectorSize := range []int{512, 4096} {
		t.Run(fmt.Sprint(sectorSize), func(t *testing.T) {
			needRoot(t)
			blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
				d := open(t, loopDevice(t, 8<<20, sectorSize), writable)
				if !d.IsBlockDevice() || !d.Direct() {
					t.Fatalf("block device: %v, direct: %v", d.IsBlockDevice(), d.Direct())
				}
				return d
			})
		})
	}
}

// A file system with neither O_DIRECT nor holes.
func TestBufferedFileIsDevice(t *testing.T) {
	needRoot(t)
	blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
		dir := t.TempDir()
		if err := unix.Mount("none", dir, "ramfs", 0, ""); err != nil {
			t.Skip("no ramfs:", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		d := open(t, image(t, dir, 8<<20), writable)
		if d.Direct() {
			t.Fatal("direct I/O on ramfs")
		}
		return d
	})
}

func TestSizeIsRoundedDown(t *testing.T) {
	if d := open(t, image(t, t.TempDir(), 3*4096+4095), writable); d.Size() != 3*4096 {
		t.Errorf("size %d", d.Size())
	}
}

func TestOpenFileRefuses(t *testing.T) {
	dir := t.TempDir()
	for path, says := range map[string]string{
		dir: "directory", "/dev/null": "character device", filepath.Join(dir, "none"): "no such file",
	} {
		d, err := blockdev.OpenFile(path, writable)
		if err == nil {
			d.Close()
		}
		if err == nil || !strings.Contains(err.Error(), says) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v; want an error that names it and says %q", path, err, says)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "none")); err == nil {
		t.Error("a file was created")
	}
}

func TestReadOnlyFileRefusesWrites(t *testing.T) {
	path := image(t, t.TempDir(), 1<<20)
	d := open(t, path, blockdev.OpenOptions{})
	p := bytes.Repeat([]byte{1}, 4096)
	_, err := d.WriteAt(p, 8192)
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "8192") {
		t.Errorf("write: %v; want an error with path and offset", err)
	}
	if d.ZeroOut(0, 4096) == nil {
		t.Error("a zero-out went through")
	}
	if d.Discard(0, 4096) == nil {
		t.Error("a discard went through")
	}
}

func TestShrunkFileFails(t *testing.T) {
	path := image(t, t.TempDir(), 1<<20)
	d := open(t, path, writable)
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	p := blockdev.AlignedBuffer(8192)
	if _, err := d.ReadAt(p, 0); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("read beyond the end: %v; want an error", err)
	}
	if _, err := d.ReadAt(p[1:4097], 8192); err == nil {
		t.Error("a bounced read beyond the end: no error")
	}
}

func TestZeroOutKeepsFileSparse(t *testing.T) {
	path := image(t, t.TempDir(), 64<<20)
	d := open(t, path, writable)
	if _, err := d.WriteAt(bytes.Repeat([]byte{1}, 16<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := d.ZeroOut(0, d.Size()); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != 64<<20 || st.Blocks*512 > 1<<20 {
		t.Errorf("after a zero-out of all the file has %d bytes, %d allocated", st.Size, st.Blocks*512)
	}
}

func TestExclusive(t *testing.T) {
	exclusive := blockdev.OpenOptions{Write: true, Exclusive: true}
	for name, path := range map[string]func(t *testing.T) string{
		"regular file": func(t *testing.T) string { return image(t, t.TempDir(), 1<<20) },
		"loop device":  func(t *testing.T) string { return loopDevice(t, 1<<20, 512) },
	} {
		t.Run(name, func(t *testing.T) {
			path := path(t)
			first := open(t, path, exclusive)
			second, err := blockdev.OpenFile(path, exclusive)
			if err == nil {
				second.Close()
			}
			if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), path) {
				t.Fatalf("opened exclusively twice: %v; want EBUSY", err)
			}
			if name == "regular file" && !strings.Contains(err.Error(), fmt.Sprintf("process %d ", os.Getpid())) {
				t.Errorf("error %q does not name this process", err)
			}
			open(t, path, blockdev.OpenOptions{}) // others may look
			if err := first.Close(); err != nil {
				t.Fatal(err)
			}
			open(t, path, exclusive)
		})
	}
}

// Who has a device for a moment is waited for, up to a limit; a mount is not.
func TestExclusiveWaits(t *testing.T) {
	exclusive := func(wait time.Duration) blockdev.OpenOptions {
		return blockdev.OpenOptions{Write: true, Exclusive: true, Wait: wait}
	}
	for name, path := range map[string]func(t *testing.T) string{
		"regular file": func(t *testing.T) string { return image(t, t.TempDir(), 1<<20) },
		"loop device":  func(t *testing.T) string { return loopDevice(t, 1<<20, 512) },
	} {
		t.Run(name, func(t *testing.T) {
			path := path(t)
			holder, err := blockdev.OpenFile(path, exclusive(0))
			if err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if _, err := blockdev.OpenFile(path, exclusive(200*time.Millisecond)); !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "200ms") || time.Since(began) < 200*time.Millisecond {
				t.Errorf("after %s: %v; want EBUSY after 200ms", time.Since(began), err)
			}
			closed := make(chan error, 1)
			time.AfterFunc(200*time.Millisecond, func() { closed <- holder.Close() })
			open(t, path, exclusive(time.Minute))
			if err := <-closed; err != nil {
				t.Fatal(err)
			}
		})
	}
	path := loopDevice(t, 32<<20, 512)
	command(t, "mkfs.ext4", "-q", path)
	dir := t.TempDir()
	if err := unix.Mount(path, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	const long = 20 * time.Second
	began := time.Now()
	if _, err := blockdev.OpenFile(path, exclusive(long)); !errors.Is(err, unix.EBUSY) || time.Since(began) >= long {
		t.Errorf("a mounted device is refused after %s: %v", time.Since(began), err)
	}
}

func TestExclusiveSaysWhoMounts(t *testing.T) {
	path := loopDevice(t, 32<<20, 512)
	command(t, "mkfs.ext4", "-q", path)
	dir := filepath.Join(t.TempDir(), "with blank")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(path, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	d, err := blockdev.OpenFile(path, blockdev.OpenOptions{Write: true, Exclusive: true})
	if err == nil {
		d.Close()
	}
	if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), "mounted on "+dir) {
		t.Errorf("exclusive open of a mounted device: %v; want one that says it is mounted on %s", err, dir)
	}
}

func TestLock(t *testing.T) {
	for name, path := range map[string]func(t *testing.T) string{
		"regular file": func(t *testing.T) string { return image(t, t.TempDir(), 1<<20) },
		"loop device":  func(t *testing.T) string { return loopDevice(t, 1<<20, 512) },
	} {
		t.Run(name, func(t *testing.T) {
			path := path(t)
			lock, err := blockdev.Lock(path)
			if err != nil {
				t.Fatal(err)
			}
			alias := filepath.Join(t.TempDir(), "alias")
			if err := os.Symlink(path, alias); err != nil {
				t.Fatal(err)
			}
			second, err := blockdev.Lock(alias)
			if err == nil {
				second.Close()
			}
			if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), fmt.Sprintf("process %d ", os.Getpid())) {
				t.Errorf("locked twice: %v; want EBUSY and this process", err)
			}
			// The one who manages a device opens it, too.
			open(t, path, blockdev.OpenOptions{Write: true, Exclusive: true})
			if err := lock.Close(); err != nil {
				t.Fatal(err)
			}
			if lock, err = blockdev.Lock(path); err != nil {
				t.Fatal(err)
			}
			lock.Close()
		})
	}
}

func TestLoopDeviceFacts(t *testing.T) {
	path := loopDevice(t, 1<<20, 512)
	id, err := blockdev.Identify(path)
	if err != nil {
		t.Fatal(err)
	}
	if id.SizeBytes != 1<<20 || id.Major != 7 || "/dev/"+id.Disk != path || id.Path != path {
		t.Errorf("identity of %s: %+v", path, id)
	}
	before, err := blockdev.ReadTraffic(path)
	if err != nil {
		t.Fatal(err)
	}
	d := open(t, path, writable)
	if _, err := d.WriteAt(blockdev.AlignedBuffer(64<<10), 0); err != nil {
		t.Fatal(err)
	}
	after, err := blockdev.WrittenBytes(path)
	if err != nil {
		t.Fatal(err)
	}
	if after-before.WrittenBytes != 64<<10 {
		t.Errorf("%d bytes written, want 65536", after-before.WrittenBytes)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if same, err := blockdev.SameDisk(path, link); err != nil || !same {
		t.Errorf("%s and a link to it: %v, %v", path, same, err)
	}
	if same, err := blockdev.SameDisk(path, image(t, t.TempDir(), 4096)); err != nil || same {
		t.Errorf("%s and a file: %v, %v", path, same, err)
	}
}

func TestAlignedBuffer(t *testing.T) {
	for _, n := range []int{0, 1, 512, 4096, 4097, 12288, 32 << 10, 1 << 20} {
		for range 10 {
			b := blockdev.AlignedBuffer(n)
			if len(b) != n {
				t.Fatalf("a buffer of %d bytes for %d", len(b), n)
			}
			if n > 0 && reflect.ValueOf(b).Pointer()%4096 != 0 {
				t.Fatalf("a buffer of %d bytes at %p", n, b)
			}
			if !bytes.Equal(b, make([]byte, n)) {
				t.Fatalf("a buffer of %d bytes is not all zeros", n)
			}
			copy(b, bytes.Repeat([]byte{1}, n)) // the next one must not share it
		}
	}
}
