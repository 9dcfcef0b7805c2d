package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/deadman"
	"blockferry/blockdev/dm"
	"blockferry/blockdev/volume"
)

const (
	// deadmanVar makes this test binary a dead-man.
	deadmanVar = "BLOCKFERRY_TEST_DEADMAN"
	// cutterVar makes it a process that cuts without end; the value is its
	// first number, a colon and the stall limit.
	cutterVar = "BLOCKFERRY_TEST_CUTTER"
)

func init() {
	var err error
	switch {
	case os.Getenv(deadmanVar) != "":
		err = deadman.Run(os.Stdin, "")
	case os.Getenv(cutterVar) != "":
		err = cutWithoutEnd(os.Getenv(cutterVar))
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// mapper opens device-mapper for the length of a test.
func mapper(t *testing.T) *dm.Control {
	t.Helper()
	ctl, err := dm.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ctl.Close() })
	return ctl
}

func newGuard() (*deadman.Guard, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return deadman.NewGuard(deadman.GuardOptions{Command: []string{"/usr/bin/env", "-u", cutterVar, deadmanVar + "=1", self}})
}

// guard starts a dead-man for the length of a test.
func guard(t *testing.T) *deadman.Guard {
	t.Helper()
	g, err := newGuard()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// format makes a volume of a disk.
func format(t *testing.T, o volume.FormatOptions) *volume.Label {
	t.Helper()
	label, err := volume.Format(o)
	if err != nil {
		t.Fatal(err)
	}
	return label
}

// up puts a volume up, with a dead-man of its own if the options name none; it
// is taken down when the test ends.
func up(t *testing.T, ctl *dm.Control, o volume.Options) *volume.Volume {
	t.Helper()
	v, err := tryUp(t, ctl, o)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func tryUp(t *testing.T, ctl *dm.Control, o volume.Options) (*volume.Volume, error) {
	t.Helper()
	if o.Name == "" {
		o.Name = "vol"
	}
	if o.Guard == nil {
		o.Guard = guard(t)
	}
	if o.StallLimit == 0 {
		o.StallLimit = 10 * time.Second // a guest on a busy machine
	}
	v, err := volume.Up(ctl, o)
	if err == nil {
		t.Cleanup(func() { v.Down() })
	}
	return v, err
}

func mustCut(t *testing.T, v *volume.Volume, number uint64, view bool) *volume.Cut {
	t.Helper()
	c, err := v.Cut(t.Context(), number, view)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func mustRelease(t *testing.T, c *volume.Cut) {
	t.Helper()
	if err := c.Release(); err != nil {
		t.Fatal(err)
	}
}

func mustChanged(t *testing.T, c *volume.Cut, since uint64) []blockdev.Extent {
	t.Helper()
	list, err := c.Changed(since)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// names says whether a list of extents names a byte.
func names(list []blockdev.Extent, offset int64) bool {
	for _, e := range list {
		if e.Offset <= offset && offset < e.End() {
			return true
		}
	}
	return false
}

// writeBlock writes 4 KiB of one value past the cache.
func writeBlock(path string, offset int64, value byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := alignedBuffer(4096)
	for i := range b {
		b[i] = value
	}
	_, err = f.WriteAt(b, offset)
	return err
}

func mustWriteBlock(t *testing.T, path string, offset int64, value byte) {
	t.Helper()
	if err := writeBlock(path, offset, value); err != nil {
		t.Fatal(err)
	}
}

func imageOf(t *testing.T, r interface {
	ReadAt([]byte, int64) (int, error)
}, size int64) []byte {
	t.Helper()
	b := alignedBuffer(int(size))
	if _, err := r.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// mustCover fails if two images differ anywhere outside the extents.
func mustCover(t *testing.T, what string, list []blockdev.Extent, before, after []byte) {
	t.Helper()
	missed := 0
	for at := 0; at < len(before); at += 4096 {
		if !bytes.Equal(before[at:at+4096], after[at:at+4096]) && !names(list, int64(at)) {
			missed++
		}
	}
	if missed > 0 {
		t.Errorf("%s: %d changed blocks are not named", what, missed)
	}
}

// testSize is no multiple of any grain but the smallest.
const testSize = 32<<20 + 4096

func TestStackUpDown(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		label := format(t, volume.FormatOptions{Device: ubd(0), State: []byte("first")})
		o := volume.Options{Device: ubd(0)}
		v := up(t, ctl, o)
		if string(v.State()) != "first" || v.UUID() != label.UUID || v.TrackingLost() != "" {
			t.Fatalf("state '%s', uuid %s, lost '%s'", v.State(), v.UUID(), v.TrackingLost())
		}
		if err := v.SetState([]byte("second")); err != nil {
			t.Fatal(err)
		}
		mustWriteBlock(t, v.Path(), 8192, 7)
		if _, err := tryUp(t, ctl, o); !errors.Is(err, unix.EBUSY) {
			t.Fatalf("a second owner: %v", err)
		}
		if err := volume.Down(ctl, "vol"); !errors.Is(err, unix.EBUSY) {
			t.Fatalf("down behind the owner's back: %v", err)
		}
		before := run(t, "dmsetup", "table")
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(v.Path()) // an application that stays
		if err != nil {
			t.Fatal(err)
		}
		v = up(t, ctl, o)
		if after := run(t, "dmsetup", "table"); after != before {
			t.Fatalf("adopted\n%s, was\n%s", after, before)
		}
		if err := v.Down(); !errors.Is(err, volume.ErrInUse) || !strings.Contains(err.Error(), fmt.Sprint("process ", os.Getpid())) {
			t.Fatalf("down in use: %v", err)
		}
		c := mustCut(t, v, 1, true) // the refusal did no harm
		mustRelease(t, c)
		f.Close()
		if err := v.Down(); err != nil {
			t.Fatal(err)
		}
		if err := volume.Down(ctl, "vol"); err != nil {
			t.Fatalf("down again: %v", err)
		}
		if left := run(t, "dmsetup", "ls"); !strings.Contains(left, "No devices") {
			t.Fatalf("left: %s", left)
		}
		v = up(t, ctl, o)
		b := alignedBuffer(4096)
		if _, err := v.ReadAt(b, 8192); err != nil || b[0] != 7 || string(v.State()) != "second" {
			t.Fatalf("after down and up: %d, '%s', %v", b[0], v.State(), err)
		}
		c = mustCut(t, v, 2, false)
		if list := mustChanged(t, c, 1); names(list, 8192) {
			t.Errorf("unchanged since cut 1, yet named: %v", list)
		}
		mustRelease(t, c)
	})
}

func TestStackRefusesWhatIsNotItsOwn(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}, {Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		refused := func(what string, err error, words ...string) {
			t.Helper()
			for _, word := range words {
				if err == nil || !strings.Contains(err.Error(), word) {
					t.Errorf("%s: got %v, want '%s'", what, err, word)
				}
			}
			if left := run(t, "dmsetup", "ls"); !strings.Contains(left, "No devices") {
				t.Fatalf("%s: left %s", what, left)
			}
		}
		_, err := tryUp(t, ctl, volume.Options{Device: ubd(0)})
		refused("blank", err, "no volume label", "zero")
		mkfs(t, "ext4", ubd(0))
		_, err = volume.Format(volume.FormatOptions{Device: ubd(0)})
		refused("foreign", err, "ext4")
		dir := mustMount(t, "ext4", ubd(0), "")
		_, err = volume.Format(volume.FormatOptions{Device: ubd(0), Overwrite: true})
		refused("mounted", err, "mounted on "+dir)
		mustUnmount(t, dir)
		label := format(t, volume.FormatOptions{Device: ubd(0), Overwrite: true})
		_, err = tryUp(t, ctl, volume.Options{Device: ubd(0), UUID: volume.NewUUID()})
		refused("another uuid", err, label.UUID.String())

		v := up(t, ctl, volume.Options{Device: ubd(0)})
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		other := format(t, volume.FormatOptions{Device: ubd(1)})
		if _, err := tryUp(t, ctl, volume.Options{Device: ubd(1)}); !errors.Is(err, volume.ErrOtherVolume) {
			t.Errorf("the name of another volume (%s): %v", other.UUID, err)
		}
		// A stack that somebody changed is not adopted.
		run(t, "dmsetup", "suspend", "vol-base")
		run(t, "dmsetup", "load", "vol-base", "--table", fmt.Sprintf("0 %d linear %s 8", v.Size()/512, ubd(1)))
		run(t, "dmsetup", "resume", "vol-base")
		if _, err := tryUp(t, ctl, volume.Options{Device: ubd(0)}); !errors.Is(err, volume.ErrOtherVolume) || !strings.Contains(err.Error(), "vol-base") {
			t.Errorf("a changed table: %v", err)
		}
		if err := volume.Down(ctl, "vol"); err != nil {
			t.Error(err)
		}
		// Somebody else's device of that name stays as it is.
		run(t, "dmsetup", "create", "vol-meta", "--notable", "--uuid", "LVM-1")
		if _, err := tryUp(t, ctl, volume.Options{Device: ubd(0)}); !errors.Is(err, volume.ErrOtherVolume) || !strings.Contains(err.Error(), "LVM-1") {
			t.Errorf("a foreign device: %v", err)
		}
		if err := volume.Down(ctl, "vol"); !errors.Is(err, volume.ErrOtherVolume) {
			t.Errorf("down of a foreign device: %v", err)
		}
		if left := run(t, "dmsetup", "ls"); strings.TrimSpace(left) != "vol-meta\t(254:0)" {
			t.Errorf("left: %q", left)
		}
	})
}
