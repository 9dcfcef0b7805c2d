package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
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
		err = volume.RunDeadMan(os.Stdin, os.Stdout)
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

func newGuard() (*volume.Guard, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return volume.NewGuard("/bin/busybox", "env", "-u", cutterVar, deadmanVar+"=1", self)
}

// guard starts a dead-man for the length of a test.
func guard(t *testing.T) *volume.Guard {
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

const testSize = 32 << 20

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
	})
}

// Promise: a cut is one point in time. Under a writer, each frozen view holds
// all writes up to some k and none after, and stays so.
func TestStackFrozenView(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize, CowBytes: 64 << 20})
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		h := history{Seed: 1, Size: testSize, MaxBytes: 256 << 10}
		w := startWriter(t, v.Path(), h, 1)
		var images [][]byte
		for n := uint64(1); n <= 5; n++ {
			w.awaitWrites(t, 100)
			atLeast := w.acked()
			written, err := v.WrittenBytes()
			if err != nil {
				t.Fatal(err)
			}
			c := mustCut(t, v, n, true)
			atMost := w.issued()
			if c.WrittenBytes() < written {
				t.Errorf("cut %d: %d bytes written at the cut, %d before", n, c.WrittenBytes(), written)
			}
			first, err := judgeImage(c.View(), h)
			if err != nil || first.Latest < atLeast || first.K > atMost {
				t.Fatalf("cut %d: %+v, %v; want %d to %d", n, first, err, atLeast, atMost)
			}
			w.awaitWrites(t, 50)
			images = append(images, imageOf(t, c.View(), testSize))
			if again, err := judgeImage(bytes.NewReader(images[n-1]), h); err != nil || again != first {
				t.Fatalf("cut %d moved from %+v to %+v, %v", n, first, again, err)
			}
			if err := c.Valid(); err != nil {
				t.Fatal(err)
			}
			for since := uint64(1); since < n; since++ {
				list := mustChanged(t, c, since)
				mustCover(t, fmt.Sprint("changed since ", since, " at ", n), list, images[since-1], images[n-1])
			}
			if list, err := c.Changed(0); !errors.Is(err, volume.ErrTrackingLost) {
				t.Errorf("changed since before the first cut: %v, %v", list, err)
			}
			if err := c.FlushSource(); err != nil {
				t.Fatal(err)
			}
			mustRelease(t, c)
			if err := c.Valid(); err == nil {
				t.Error("a released view is valid")
			}
			t.Logf("cut %d at write %d, stalled %s", n, first.K, c.Stalled())
		}
		if _, err := v.Cut(t.Context(), 5, true); err == nil {
			t.Error("a number was used twice")
		}
		w.stop(t)
		t.Logf("%+v", v.Stats())
	})
}

// What changed between cuts is named, and what did not is not, also when
// there are cuts without a view and the volume goes down and up in between.
func TestStackChangedIsExact(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		o := volume.Options{Device: ubd(0)}
		v := up(t, ctl, o)
		const grain = 64 << 10
		for n := int64(1); n <= 8; n++ {
			c := mustCut(t, v, uint64(n), n%2 == 0)
			for since := int64(1); since < n; since++ {
				list := mustChanged(t, c, uint64(since))
				for b := int64(1); b <= 8; b++ {
					// Block b is written after cut b, and block 20 each time.
					if got, want := names(list, b*grain), b >= since && b < n; got != want {
						t.Errorf("changed from cut %d to %d: block %d named: %v", since, n, b, got)
					}
				}
				if !names(list, 20*grain) || names(list, 21*grain) {
					t.Errorf("changed from cut %d to %d: %v", since, n, list)
				}
			}
			mustRelease(t, c)
			mustWriteBlock(t, v.Path(), n*grain, byte(n))
			mustWriteBlock(t, v.Path(), 20*grain+4096, byte(n))
			if n == 4 {
				if err := v.Down(); err != nil {
					t.Fatal(err)
				}
				v = up(t, ctl, o)
			}
		}
	})
}

func TestStackFullCowLosesTheViewOnly(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: 64 << 20, CowBytes: 16 << 20})
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		c := mustCut(t, v, 1, true)
		for at := int64(0); at < 32<<20; at += 16 << 10 {
			mustWriteBlock(t, v.Path(), at, 1)
		}
		if err := c.Valid(); !errors.Is(err, volume.ErrViewLost) {
			t.Fatalf("a full COW area: %v", err)
		}
		mustRelease(t, c)
		c = mustCut(t, v, 2, true)
		if err := c.Valid(); err != nil {
			t.Fatal(err)
		}
		if list := mustChanged(t, c, 1); !names(list, 0) || !names(list, 32<<20-16<<10) || names(list, 40<<20) {
			t.Errorf("changed: %v", list)
		}
		mustRelease(t, c)
	})
}

// A frozen view of a mounted file system is that file system after a power
// cut; with FreezeFilesystem it needs no replay.
func TestStackCutsMountedFilesystems(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			inGuest(t, guest{Disks: []disk{{Size: 1 << 30}}, Modules: []string{"loop"}}, func(t *testing.T) {
				ctl := mapper(t)
				format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: 320 << 20, CowBytes: 200 << 20})
				v := up(t, ctl, volume.Options{Device: ubd(0), FreezeFilesystem: kind == "ext4"})
				mkfs(t, kind, v.Path())
				dir := mustMount(t, kind, v.Path(), "")
				stop := make(chan struct{})
				stopped := make(chan error, 1)
				go func() { stopped <- churn(dir, stop) }()
				for n := uint64(1); n <= 3; n++ {
					time.Sleep(500 * time.Millisecond)
					c := mustCut(t, v, n, true)
					if kind == "ext4" {
						b := alignedBuffer(4096)
						if _, err := c.View().ReadAt(b, 0); err != nil {
							t.Fatal(err)
						}
						if b[1024+96]&4 != 0 { // incompat feature: needs recovery
							t.Errorf("cut %d of a frozen ext4 needs a replay", n)
						}
					}
					fsck(t, kind, "/dev/mapper/vol-snap")
					if err := c.Valid(); err != nil {
						t.Fatal(err)
					}
					t.Logf("cut %d stalled %s", n, c.Stalled())
					mustRelease(t, c)
				}
				close(stop)
				if err := <-stopped; err != nil {
					t.Fatal(err)
				}
				mustUnmount(t, dir)
			})
		})
	}
}

// churn makes, renames and removes files until stopped.
func churn(dir string, stop chan struct{}) error {
	content := bytes.Repeat([]byte("churn"), 10000)
	for i := 0; ; i++ {
		select {
		case <-stop:
			return nil
		default:
		}
		name := fmt.Sprintf("%s/d%d/f%d", dir, i%7, i%50)
		if err := os.MkdirAll(fmt.Sprintf("%s/d%d", dir, i%7), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name+".new", content[:i*977%len(content)], 0o644); err != nil {
			return err
		}
		if err := os.Rename(name+".new", name); err != nil {
			return err
		}
		if i%10 == 9 {
			unix.Sync()
			os.Remove(name)
		}
	}
}

// A suspend that waits for a slow disk gives up within the stall limit, and
// what does not need the disk's slow part goes on.
func TestStackGivesUpOnSlowDisk(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}, Modules: []string{"dm-delay"}}, func(t *testing.T) {
		ctl := mapper(t)
		// Only the data is slow: a delay of the era metadata would be another test.
		n, label := sectors(t, ubd(0)), int64(2048)
		table := func(delayMS int) string {
			return fmt.Sprintf("0 %d linear %s 0\n%d 65536 delay %s %d 0 %s %d %d %s %d 0\n%d %d linear %s %d", label, ubd(0),
				label, ubd(0), label, ubd(0), label, delayMS, ubd(0), label, label+65536, n-label-65536, ubd(0), label+65536)
		}
		slow := dmCreate(t, "slow", table(0))
		format(t, volume.FormatOptions{Device: slow, SizeBytes: testSize})
		v := up(t, ctl, volume.Options{Device: slow, StallLimit: time.Second})
		mustWriteBlock(t, v.Path(), 0, 1) // its era mark is durable
		dmSwap(t, "slow", table(4000))
		written := make(chan error, 1)
		go func() { written <- writeBlock(v.Path(), 0, 2) }()
		time.Sleep(300 * time.Millisecond)
		start := time.Now()
		c, err := v.Cut(t.Context(), 1, false)
		took := time.Since(start)
		if !errors.Is(err, volume.ErrNoDrain) {
			t.Fatalf("a write was in flight for 4 s, the cut says %v, %v after %s", c, err, took)
		}
		if took > 2*time.Second {
			t.Errorf("it took %s", took)
		}
		if info, err := ctl.Info("vol"); err != nil || info.Suspended {
			t.Errorf("%+v, %v", info, err)
		}
		if err := <-written; err != nil {
			t.Error(err)
		}
		dmSwap(t, "slow", table(0))
		mustRelease(t, mustCut(t, v, 2, false))
	})
}

// cutWithoutEnd is the main of the child that is killed.
func cutWithoutEnd(spec string) error {
	first, limit, _ := strings.Cut(spec, ":")
	number, err := strconv.ParseUint(first, 10, 64)
	if err != nil {
		return err
	}
	o := volume.Options{Name: "vol", Device: "/dev/ubda"}
	if o.StallLimit, err = time.ParseDuration(limit); err != nil {
		return err
	}
	if _, err := os.Stat("/dev/mapper/disk"); err == nil {
		o.Device = "/dev/mapper/disk"
	}
	if o.Guard, err = newGuard(); err != nil {
		return err
	}
	ctl, err := dm.Open()
	if err != nil {
		return err
	}
	v, err := volume.Up(ctl, o)
	if err != nil {
		return err
	}
	for ; ; number++ {
		c, err := v.Cut(neverDone{}, number, true)
		if err != nil {
			fmt.Printf("void %d %v\n", number, err)
			continue
		}
		fmt.Println("cut", number)
		if err := c.Release(); err != nil {
			return err
		}
	}
}

// neverDone is a context that does not end: init has no better one to give.
type neverDone struct{}

func (neverDone) Deadline() (time.Time, bool) { return time.Time{}, false }
func (neverDone) Done() <-chan struct{}       { return nil }
func (neverDone) Err() error                  { return nil }
func (neverDone) Value(any) any               { return nil }

// startCutter starts a child that cuts without end.
func startCutter(t *testing.T, first uint64, limit string) (*exec.Cmd, *syncBuffer) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out := &syncBuffer{}
	child := exec.Command(self)
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%s", cutterVar, first, limit))
	child.Stdout, child.Stderr = out, os.Stderr
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Process.Kill() })
	return child, out
}

func TestStackAdoptsAfterKillAnywhere(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize, CowBytes: 64 << 20})
		o := volume.Options{Device: ubd(0), Guard: guard(t)}
		v := up(t, ctl, o)
		h := history{Seed: 3, Size: testSize, MaxBytes: 64 << 10}
		w := startWriter(t, v.Path(), h, 1)
		w.awaitWrites(t, 20)
		c := mustCut(t, v, 1, true)
		before := imageOf(t, c.View(), testSize)
		mustRelease(t, c)
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		number := uint64(1)
		left := map[string]int{}
		for i := range 12 {
			child, out := startCutter(t, number+1, "10s")
			out.await(t, "cut")
			time.Sleep(time.Duration(i*7%40) * time.Millisecond)
			if err := child.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			child.Wait()
			number += uint64(strings.Count(out.String(), "\n")) + 2
			w.awaitWrites(t, 5) // nothing stays suspended: before anybody adopts it
			for _, role := range []string{"snap", "base"} {
				if table, err := ctl.Table("vol-" + role); err == nil && len(table) == 1 {
					left[role+" "+table[0].Type]++
				}
			}
			v = up(t, ctl, o)
			if info, err := ctl.Info("vol-snap"); err != nil || info.Exists {
				t.Fatalf("left: %+v, %v", info, err)
			}
			if table, err := ctl.Table("vol-base"); err != nil || table[0].Type != "linear" {
				t.Fatalf("left: %v, %v", table, err)
			}
			number++
			atLeast := w.acked()
			c := mustCut(t, v, number, true)
			atMost := w.issued()
			after := imageOf(t, c.View(), testSize)
			if verdict, err := judgeImage(bytes.NewReader(after), h); err != nil || verdict.Latest < atLeast || verdict.K > atMost {
				t.Fatalf("cut %d: %+v, %v; want %d to %d", number, verdict, err, atLeast, atMost)
			}
			mustCover(t, fmt.Sprint("since cut 1 at ", number), mustChanged(t, c, 1), before, after)
			mustRelease(t, c)
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
		w.stop(t)
		t.Logf("what the kills left: %v", left)
	})
}

// slowMeta makes /dev/mapper/disk of the guest's disk, with whatever lies
// beyond the data area slow to write: so a cut's window lasts.
func slowMeta(t *testing.T, delayMS int) string {
	t.Helper()
	n := sectors(t, ubd(0))
	disk := dmCreate(t, "disk", fmt.Sprintf("0 %d linear %s 0", n, ubd(0)))
	label := format(t, volume.FormatOptions{Device: disk, SizeBytes: testSize, CowBytes: 64 << 20})
	meta := label.Areas.Meta.Offset / 512
	dmSwap(t, "disk", fmt.Sprintf("0 %d linear %s 0\n%d %d delay %s %d 0 %s %d %d", meta, ubd(0),
		meta, n-meta, ubd(0), meta, ubd(0), meta, delayMS))
	return disk
}

// Promise: an agent that is stopped or killed while the volume is suspended
// never leaves it so, and a cut it was stopped in is void.
func TestStackDeadManFreesWriters(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}, Modules: []string{"dm-delay"}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		ctl := mapper(t)
		disk := slowMeta(t, 200)
		o := volume.Options{Device: disk, Guard: guard(t)}
		v := up(t, ctl, o)
		mustWriteBlock(t, v.Path(), 0, 1)
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		awaitSuspended := func(want bool, within time.Duration) time.Duration {
			t.Helper()
			start := time.Now()
			for {
				info, err := ctl.Info("vol")
				if err != nil {
					t.Fatal(err)
				}
				if info.Suspended == want {
					return time.Since(start)
				}
				if time.Since(start) > within {
					t.Fatalf("after %s, suspended is not %v", within, want)
				}
				time.Sleep(time.Millisecond)
			}
		}
		child, out := startCutter(t, 100, "1500ms")
		for range 3 {
			out.await(t, "cut")
			awaitSuspended(true, 10*time.Second)
			if err := child.Process.Signal(unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			took := awaitSuspended(false, 10*time.Second)
			if took > 2500*time.Millisecond {
				t.Errorf("the dead-man resumed after %s, the limit is 1.5 s", took)
			}
			mustWriteBlock(t, v.Path(), 4096, 2)
			if err := child.Process.Signal(unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			out.await(t, "void")
			if !strings.Contains(out.String(), volume.ErrLate.Error()) {
				t.Errorf("the cut was void for another reason:\n%s", out)
			}
			out.Reset()
		}
		child.Process.Kill()
		child.Wait()
		v = up(t, ctl, o)
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		// Killed: long before the limit.
		for i := range 3 {
			child, out := startCutter(t, uint64(10000*(i+1)), "20s")
			out.await(t, "cut")
			awaitSuspended(true, 10*time.Second)
			child.Process.Kill()
			child.Wait()
			if took := awaitSuspended(false, 15*time.Second); took > 3*time.Second {
				t.Errorf("resumed %s after the kill", took)
			}
			mustWriteBlock(t, v.Path(), 4096, 3)
		}
	})
}

// A dead-man that was killed in the window: the agent resumes, the cut is
// void, the next has a new dead-man.
func TestStackSurvivesItsDeadMan(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}, Modules: []string{"dm-delay"}}, func(t *testing.T) {
		ctl := mapper(t)
		disk := slowMeta(t, 200)
		g := guard(t)
		v := up(t, ctl, volume.Options{Device: disk, Guard: g})
		first := g.Pid()
		killed := make(chan error, 1)
		go func() {
			for {
				info, err := ctl.Info("vol")
				if err != nil {
					killed <- err
					return
				}
				if info.Suspended {
					killed <- unix.Kill(first, unix.SIGKILL)
					return
				}
				time.Sleep(time.Millisecond)
			}
		}()
		_, err := v.Cut(t.Context(), 1, true)
		if !errors.Is(err, volume.ErrLate) {
			t.Fatalf("without a dead-man: %v", err)
		}
		if err := <-killed; err != nil {
			t.Fatal(err)
		}
		mustWriteBlock(t, v.Path(), 0, 1)
		mustRelease(t, mustCut(t, v, 2, true))
		if g.Pid() == first {
			t.Error("the same dead-man")
		}
	})
}

func TestStackNoticesSwappedMetadata(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}, {Size: 16 << 20}, {Size: 128 << 20}, {Size: 16 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), MetaDevice: ubd(1), SizeBytes: testSize})
		o := volume.Options{Device: ubd(0), MetaDevice: ubd(1), Guard: guard(t)}
		number := uint64(0)
		// round takes two cuts with a write between, and says what an Up after
		// change finds.
		round := func(what string, change func(), lost string) {
			t.Helper()
			v := up(t, ctl, o)
			number++
			before := number
			mustRelease(t, mustCut(t, v, number, false))
			mustWriteBlock(t, v.Path(), 1<<20, byte(number))
			if err := v.Down(); err != nil {
				t.Fatal(err)
			}
			change()
			v = up(t, ctl, o)
			number++
			c := mustCut(t, v, number, false)
			list, err := c.Changed(before)
			if lost == "" {
				if err != nil || v.TrackingLost() != "" || !names(list, 1<<20) {
					t.Errorf("%s: %v, %v, lost '%s'", what, list, err, v.TrackingLost())
				}
			} else if !errors.Is(err, volume.ErrTrackingLost) || !strings.Contains(v.TrackingLost(), lost) {
				t.Errorf("%s: %v, %v, lost '%s'; want '%s'", what, list, err, v.TrackingLost(), lost)
			}
			mustRelease(t, c)
			if err := v.Down(); err != nil {
				t.Fatal(err)
			}
		}
		dd := func(args ...string) {
			t.Helper()
			run(t, "dd", append([]string{"bs=4k", "conv=fsync", "status=none"}, args...)...)
		}
		round("nothing", func() {}, "")
		round("superblock zeroed", func() { dd("if=/dev/zero", "of="+ubd(1), "seek=1", "count=1") }, "emptied")
		round("all zeroed", func() { dd("if=/dev/zero", "of="+ubd(1), "count=4096") }, "no identity")
		round("damaged", func() { dd("if=/dev/urandom", "of="+ubd(1), "seek=1", "count=1") }, "damaged")
		round("nothing again", func() {}, "")
		// An older state of the right metadata: its marks end too early.
		dd("if="+ubd(1), "of=/run/old", "iflag=direct")
		round("nothing more", func() {}, "")
		round("went back in time", func() { dd("if=/run/old", "of="+ubd(1), "oflag=direct") }, "went back in time")
		// The SSD came back empty while its metadata survived.
		dd("if=/dev/zero", "of="+ubd(0), "count=512")
		if _, err := tryUp(t, ctl, o); !errors.Is(err, volume.ErrNoLabel) {
			t.Errorf("without a label: %v", err)
		}
		// And another volume's metadata is left alone.
		format(t, volume.FormatOptions{Device: ubd(2), MetaDevice: ubd(3), SizeBytes: testSize})
		o2 := o
		o2.Device = ubd(2)
		if _, err := tryUp(t, ctl, o2); !errors.Is(err, volume.ErrOtherVolume) {
			t.Errorf("another volume's metadata: %v", err)
		}
	})
}
