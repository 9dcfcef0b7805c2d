package attach

import (
	"errors"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/bpf"
)

// trimmingTracker trims while writers stand still, or between two rounds.
type trimmingTracker struct {
	Tracker
	trim            func()
	stopped, rounds bool
}

func (t *trimmingTracker) ExchangeStopped() bool {
	whole := t.Tracker.ExchangeStopped()
	if t.stopped {
		t.trim()
	}
	return whole
}

func (t *trimmingTracker) Exchange() {
	if t.rounds {
		t.trim()
	}
	t.Tracker.Exchange()
}

// A file system is trimmed though it is frozen: the cut is void, and says so. While
// that goes on nobody is stopped in vain again for a while, and once it ends there is
// a cut, which has what was discarded.
func TestTrimWhileFrozen(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		r := newRig(t, 320<<20)
		path := blocktest.FileSystem(t, "xfs", r.device)
		// So much is free, and discarded, as fits into a cut.
		blocktest.Command(t, "fallocate", "-l", "220M", path+"/taken")
		tracker := &trimmingTracker{trim: func() { blocktest.Command(t, "fstrim", path) }}
		r.options.openTracker = func(target bpf.Target) (_ Tracker, err error) {
			tracker.Tracker, err = openTracker(target)
			return tracker, err
		}
		a := r.open()
		w := startWriters(t, path, true, time.Millisecond)
		w.await(100)
		i := r.newImage(a)

		tracker.stopped = true
		_, err := r.cut(a, i.at)
		tracker.stopped = false
		if !errors.Is(err, ErrDiscards) || !errors.Is(err, ErrWritten) || !strings.Contains(err.Error(), "fstrim runs") {
			t.Fatalf("a trim within the freeze: %v", err)
		}
		stopped := a.Stats().StalledTotal
		if stopped == 0 {
			t.Fatal("nothing was frozen: this test checks nothing")
		}
		tracker.rounds = true
		for range 3 {
			if _, err := r.cut(a, i.at); !errors.Is(err, ErrDiscards) {
				t.Errorf("while it is trimmed: %v", err)
			}
		}
		if now := a.Stats().StalledTotal; now != stopped {
			t.Errorf("writers were stopped for %s in vain", now-stopped)
		}
		// Discards that end with the writers, as those of a file system that discards
		// what it frees, are no reason for ever.
		a.freezer.trimmed = time.Now().Add(-trimPatience)
		if c, err := r.cut(a, i.at); err == nil {
			c.Release()
		}
		if now := a.Stats().StalledTotal; now == stopped {
			t.Error("nothing is frozen any more")
		}
		tracker.rounds = false

		before := w.acked()
		c, err := r.cut(a, i.at)
		for try := 0; err != nil && try < 5 && !errors.Is(err, ErrTrackingLost); try++ {
			t.Logf("again: %v", err)
			c, err = r.cut(a, i.at)
		}
		if errors.Is(err, ErrTrackingLost) { // all else was looked at by now
			t.Logf("events were lost: %v", err)
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		after := w.acked()
		w.await(100)
		i.apply(c)
		i.mounted("xfs", func(dir string) { w.judge(dir, before, after) })
		w.stop()
	})
}
