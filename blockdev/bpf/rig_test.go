package bpf

import (
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// needKernel skips where programs in the kernel are not permitted; where guests
// are required this is too.
func needKernel(t testing.TB) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "not root"
	} else if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		why = "this kernel has no BTF"
	} else if dir := t.TempDir(); true {
		if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
			why = fmt.Sprintf("no bpffs: %v", err)
		} else if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
	}
	if why != "" && os.Getenv("BLOCKFERRY_REQUIRE_GUEST") == "" {
		t.Skipf("fine tracking: %s", why)
	}
}

func command(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// newPin is a folder on a bpffs of the test's own.
func newPin(t testing.TB) string {
	t.Helper()
	needKernel(t)
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Fatalf("mount a bpffs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount the bpffs: %v", err)
		}
	})
	return filepath.Join(dir, "volume")
}

// disk is a loop device of the test's own, or another device.
type disk struct {
	path string
	size int64
}

func (d disk) name() string { return filepath.Base(d.path) }

// newLoop stands on a file of the tests' folder, whose file system can most likely
// punch holes and zero ranges.
func newLoop(t testing.TB, size int64) disk { return newLoopIn(t, t.TempDir(), size) }

// newFastLoop stands on a file in memory.
func newFastLoop(t testing.TB, size int64) disk {
	t.Helper()
	folder, err := os.MkdirTemp("/dev/shm", "blockferry-bpf-")
	if err != nil {
		return newLoop(t, size)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	return newLoopIn(t, folder, size)
}

func newLoopIn(t testing.TB, folder string, size int64) disk {
	t.Helper()
	needKernel(t)
	file := filepath.Join(folder, "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, size); err != nil {
		t.Fatal(err)
	}
	d := disk{command(t, "losetup", "-f", "--show", file), size}
	t.Cleanup(func() { command(t, "losetup", "-d", d.path) })
	return d
}

// newPartition is a stretch of a loop device that begins at no grain's border.
func newPartition(t testing.TB, size int64) disk {
	t.Helper()
	whole := newLoop(t, size+1<<20)
	const first = 2048 - 63
	command(t, "addpart", whole.path, "1", strconv.Itoa(first), strconv.FormatInt(size/sectorSize, 10))
	t.Cleanup(func() { command(t, "delpart", whole.path, "1") })
	return disk{whole.path + "p1", size}
}

// newZram is a disk without requests: it takes bios as they come.
func newZram(t testing.TB, size int64) disk {
	t.Helper()
	needKernel(t)
	number, err := os.ReadFile("/sys/class/zram-control/hot_add")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("this kernel has no zram")
	}
	if err != nil {
		t.Fatal(err)
	}
	n := strings.TrimSpace(string(number))
	t.Cleanup(func() { put(t, "/sys/class/zram-control/hot_remove", n) })
	put(t, "/sys/block/zram"+n+"/disksize", strconv.FormatInt(size, 10))
	if _, err := blockdev.KeepStatistics("/dev/zram" + n); err != nil {
		t.Fatal(err)
	}
	return disk{"/dev/zram" + n, size}
}

func put(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

func (d disk) target(pin string) Target { return Target{Device: d.path, Length: d.size, Pin: pin} }

func open(t testing.TB, target Target) *Tracker {
	t.Helper()
	tracker, err := Open(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tracker.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return tracker
}

// sums are checksums of each grain, read past the page cache.
func (d disk) sums(t testing.TB) []uint64 {
	t.Helper()
	f, err := blockdev.OpenFile(d.path, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	buffer := blockdev.AlignedBuffer(1 << 20)
	var sums []uint64
	for at := int64(0); at < d.size; at += int64(len(buffer)) {
		part := buffer[:min(int64(len(buffer)), d.size-at)]
		if _, err := f.ReadAt(part, at); err != nil {
			t.Fatal(err)
		}
		for ; len(part) > 0; part = part[blockdev.BlockSize:] {
			sums = append(sums, maphash.Bytes(seed, part[:blockdev.BlockSize]))
		}
	}
	return sums
}

var seed = maphash.MakeSeed()

func differing(a, b []uint64) map[int64]bool {
	out := map[int64]bool{}
	for i := range a {
		if a[i] != b[i] {
			out[int64(i)] = true
		}
	}
	return out
}

// mustName compares what is named with what changed: nothing may be missing.
func mustName(t testing.TB, named []blockdev.Extent, changed map[int64]bool) {
	t.Helper()
	got := grainsOf(named)
	missing := 0
	for grain := range changed {
		if !got[grain] {
			if missing++; missing < 5 {
				t.Errorf("block %d changed and is not named", grain)
			}
		}
	}
	if missing > 0 {
		t.Fatalf("%d of %d changed blocks are not named; %d are", missing, len(changed), len(got))
	}
	if len(changed) == 0 {
		t.Fatal("nothing changed: this test checks nothing")
	}
}

func (d disk) open(t testing.TB, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(d.path, os.O_RDWR|flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// noise is n bytes of an aligned buffer that no other call returns.
func noise(rng *rand.Rand, n int) []byte {
	b := blockdev.AlignedBuffer(n)
	for i := 0; i+8 <= n; i += 64 {
		for j, v := 0, rng.Uint64(); j < 8; j++ {
			b[i+j] = byte(v >> (8 * j))
		}
	}
	return b
}

// unit is the smallest write past the page cache, in bytes.
func (d disk) unit(t testing.TB) int64 {
	t.Helper()
	f := d.open(t, 0)
	defer f.Close()
	size, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
	if err != nil {
		t.Fatal(err)
	}
	return int64(size)
}

// writes are count writes of random sizes at random places, in multiples of
// unit; it returns the grains they touch.
func (d disk) writes(t testing.TB, rng *rand.Rand, flags, count int, unit, most int64) map[int64]bool {
	t.Helper()
	f := d.open(t, flags)
	defer f.Close()
	touched := map[int64]bool{}
	for range count {
		length := (rng.Int64N(most/unit) + 1) * unit
		offset := rng.Int64N((d.size-length)/unit) * unit
		if _, err := f.WriteAt(noise(rng, int(length)), offset); err != nil {
			t.Fatal(err)
		}
		for at := offset &^ (blockdev.BlockSize - 1); at < offset+length; at += blockdev.BlockSize {
			touched[at/blockdev.BlockSize] = true
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return touched
}

// allocates runs fallocate on random ranges.
func (d disk) allocates(t testing.TB, rng *rand.Rand, count int, mode uint32) {
	t.Helper()
	f := d.open(t, 0)
	defer f.Close()
	for range count {
		length := (rng.Int64N(256) + 1) * blockdev.BlockSize
		offset := rng.Int64N((d.size-length)/blockdev.BlockSize) * blockdev.BlockSize
		if err := unix.Fallocate(int(f.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, offset, length); errors.Is(err, unix.EOPNOTSUPP) {
			t.Logf("fallocate with mode %d: not possible on this disk", mode)
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// commands runs a device's command on random ranges.
func (d disk) commands(t testing.TB, rng *rand.Rand, count int, do func(f *blockdev.File, offset, length int64) error) {
	t.Helper()
	f, err := blockdev.OpenFile(d.path, blockdev.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range count {
		length := (rng.Int64N(512) + 1) * blockdev.BlockSize
		offset := rng.Int64N((d.size-length)/blockdev.BlockSize) * blockdev.BlockSize
		if err := do(f, offset, length); errors.Is(err, unix.EOPNOTSUPP) {
			t.Logf("%v", err)
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// mapped writes through a shared mapping.
func (d disk) mapped(t testing.TB, rng *rand.Rand, count int) {
	t.Helper()
	f := d.open(t, 0)
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, int(d.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	for range count {
		m[rng.Int64N(d.size)] ^= byte(rng.IntN(255) + 1)
	}
	if err := errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m), f.Sync()); err != nil {
		t.Fatal(err)
	}
}

// fio writes at random; options are added to the job.
func (d disk) fio(t testing.TB, options ...string) {
	t.Helper()
	if err := d.fioCommand(options...).Run(); err != nil {
		t.Fatalf("fio: %v", err)
	}
}

func (d disk) fioCommand(options ...string) *exec.Cmd {
	args := append([]string{"--name=load", "--filename=" + d.path, "--rw=randwrite", "--bs=4k", "--refill_buffers",
		"--randrepeat=0", "--size=" + strconv.FormatInt(d.size, 10), "--output=/dev/null", "--end_fsync=1", "--allow_mounted_write=1"}, options...)
	c := exec.Command("fio", args...)
	c.Stderr = os.Stderr
	return c
}

// seal seals, with writers stopped, and says whether it was told of a loss, which
// is right at times.
func seal(t testing.TB, tracker *Tracker, number uint64) (ok bool) {
	t.Helper()
	tracker.ExchangeStopped()
	err := tracker.Seal(number)
	if errors.Is(err, ErrUncovered) {
		t.Logf("cut %d: %v", number, err)
		return false
	}
	if err != nil {
		t.Fatal(err)
	}
	return true
}

// covered seals cuts until one begins or goes on with a coverage.
func covered(t testing.TB, tracker *Tracker, number uint64) uint64 {
	t.Helper()
	for range 10 {
		if seal(t, tracker, number) {
			return number
		}
		number++
	}
	t.Fatal("no cut in a row of 10 was covered")
	return 0
}

func changed(t testing.TB, tracker *Tracker, since, upTo uint64) []blockdev.Extent {
	t.Helper()
	list, err := tracker.Changed(since, upTo)
	if err != nil {
		t.Fatal(err)
	}
	return list
}
