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

	"blockferry/blockdev/deadman"
	"blockferry/blockdev/volume"
)

// Promise: a cut is one point in time. Under a writer, each frozen view holds
// all writes up to some k and none after, and stays so.
func TestStackFrozenView(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: frozenViewDisk}}}, func(t *testing.T) { checkFrozenView(t, ubd(0)) })
}

const frozenViewDisk = 192 << 20

func checkFrozenView(t *testing.T, disk string) {
	ctl := mapper(t)
	format(t, volume.FormatOptions{Device: disk, SizeBytes: testSize, CowBytes: 64 << 20})
	v := up(t, ctl, volume.Options{Device: disk})
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
					// Block b is written after cut b, and block 20 each time. This
					// disk takes discards, so the one behind each counts, too.
					if got, want := names(list, b*grain), b >= since && b <= n; got != want {
						t.Errorf("changed from cut %d to %d: block %d named: %v", since, n, b, got)
					}
				}
				if !names(list, 20*grain) || !names(list, 21*grain) || names(list, 22*grain) {
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
	t.Parallel()
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
				go func() { stopped <- churn(dir, stop, 0) }()
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
					fsck(t, kind, c.View().(interface{ Name() string }).Name())
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

// churn makes, renames and removes files until stopped, with a pause before each.
func churn(dir string, stop chan struct{}, pause time.Duration) error {
	content := bytes.Repeat([]byte("churn"), 10000)
	for i := 0; ; i++ {
		select {
		case <-stop:
			return nil
		default:
		}
		time.Sleep(pause)
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
		slow, delay := slowData(t)
		v := up(t, ctl, volume.Options{Device: slow, StallLimit: time.Second})
		mustWriteBlock(t, v.Path(), 0, 1) // its era mark is durable
		delay(4000)
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
		// The end of a view waits no longer.
		delay(0)
		view := mustCut(t, v, 2, true)
		mustWriteBlock(t, v.Path(), 0, 3)
		delay(4000)
		go func() { written <- writeBlock(v.Path(), 0, 4) }()
		time.Sleep(300 * time.Millisecond)
		start = time.Now()
		if err := view.Release(); !errors.Is(err, volume.ErrNoDrain) || time.Since(start) > 2*time.Second {
			t.Errorf("release with a write in flight: %v after %s", err, time.Since(start))
		}
		if err := view.Valid(); err == nil {
			t.Error("a view that is half released is valid")
		}
		if err := <-written; err != nil {
			t.Error(err)
		}
		delay(0)
		mustRelease(t, mustCut(t, v, 3, true)) // clears it away first
	})
}

// Writes that the kernel does not count must not pass for no writes.
func TestStackStatisticsSwitchedOff(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		info, err := ctl.Info("vol")
		if err != nil {
			t.Fatal(err)
		}
		iostats := fmt.Sprintf("/sys/dev/block/%s/queue/iostats", info.Dev())
		before, err := v.WrittenBytes()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(iostats, []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
		mustWriteBlock(t, v.Path(), 1<<20, 1)
		if n, err := v.WrittenBytes(); err == nil {
			t.Errorf("%d bytes were written before, %d after a write nobody counted", before, n)
		} else if !strings.Contains(err.Error(), iostats) {
			t.Errorf("the error does not name %s: %v", iostats, err)
		}
		mustWriteBlock(t, v.Path(), 2<<20, 2)
		if n, err := v.WrittenBytes(); err != nil || n <= before {
			t.Errorf("not switched on again: %d bytes before, %d after, %v", before, n, err)
		}
	})
}

// A stop without a cut: what is read of the live volume meanwhile is one point
// in time, and what fails in it, or takes too long, is no stop.
func TestStackStop(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize, CowBytes: 64 << 20})
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		h := history{Seed: 5, Size: testSize, MaxBytes: 256 << 10, Span: 8 << 20}
		w := startWriter(t, v.Path(), h, 1)
		image := alignedBuffer(8 << 20)
		h.Size = int64(len(image))
		for range 5 {
			w.awaitWrites(t, 50)
			if err := v.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
			atLeast := w.acked()
			stalled, err := v.Stop(t.Context(), 10*time.Second, func() error {
				_, err := v.ReadAt(image, 0)
				return err
			})
			atMost := w.issued()
			if err != nil || stalled <= 0 {
				t.Fatalf("stopped for %s: %v", stalled, err)
			}
			got, err := judgeImage(bytes.NewReader(image), h)
			if err != nil || got.Latest < atLeast || got.K > atMost {
				t.Fatalf("%+v, %v; want %d to %d", got, err, atLeast, atMost)
			}
		}
		failure := errors.New("not today")
		if _, err := v.Stop(t.Context(), 10*time.Second, func() error { return failure }); !errors.Is(err, failure) {
			t.Errorf("what fails inside: %v", err)
		}
		_, err := v.Stop(t.Context(), 200*time.Millisecond, func() error { time.Sleep(time.Second); return failure })
		if !errors.Is(err, deadman.ErrLate) || errors.Is(err, failure) {
			t.Errorf("beyond the limit: %v", err)
		}
		// A cut is taken as before.
		c := mustCut(t, v, 1, true)
		if err := c.Release(); err != nil {
			t.Error(err)
		}
		w.awaitWrites(t, 20)
		w.stop(t)
	})
}
