package protocol

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// A view that turns out void after its last read is never committed, whatever
// was sent of it; the epoch then begins with a live round.
func TestVoidCutsNeverCommit(t *testing.T) {
	src, n, r := syncedRig(t, 64<<10, 500)
	bad := map[uint64]bool{}
	src.mu.Lock()
	left := 4
	src.validErr = func(cut uint64) error {
		if left--; left >= 0 {
			bad[cut] = true
			return errors.New("the window was missed")
		}
		return nil
	}
	src.mu.Unlock()
	wroteSome(src, 100, 50)
	epoch := r.sync()
	if n.check(src) < epoch {
		t.Fatal("the replica did not follow")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(bad) != 4 || len(r.voids) != 4 {
		t.Fatalf("%d void cuts, told of %v", len(bad), r.voids)
	}
	for _, e := range r.epoch["ebs"] {
		if bad[e.Epoch] {
			t.Fatalf("void cut %d was committed", e.Epoch)
		}
	}
	if e := r.epoch["ebs"][len(r.epoch["ebs"])-1]; e.Rounds < 2 {
		t.Fatalf("the epoch after the void ones had %d round, no live one", e.Rounds)
	}
}

// A copy-on-write store too small for what is read of a view: a live round
// brings the work down, until a view lasts.
func TestSmallCopyOnWriteStore(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	src.viewMax = 400 << 10
	wroteSome(src, 0, 2000)
	src.busy(t, 8, 20*time.Millisecond)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	done := n.watch(src)
	for i := range int64(3) {
		r.sync()
		wroteSome(src, 600*i, 300)
	}
	r.sync()
	done()
	n.check(src)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.voids) == 0 || !strings.Contains(r.voids[0], "store is full") {
		t.Fatalf("voids: %v", r.voids)
	}
}

// Without a durable source there is no commit: a power cut could leave the
// primary older than its replica.
func TestFlushFailureVoidsTheEpoch(t *testing.T) {
	src, _, r := syncedRig(t, 64<<10, 500)
	src.mu.Lock()
	var failed []uint64
	src.flushErr = func(cut uint64) error {
		if len(failed) < 3 {
			failed = append(failed, cut)
			return errors.New("input/output error")
		}
		return nil
	}
	src.mu.Unlock()
	wroteSome(src, 100, 50)
	r.sync()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(failed) != 3 || len(r.voids) != 3 || !strings.Contains(r.voids[0], "could not be flushed") {
		t.Fatalf("failed %v, told of %v", failed, r.voids)
	}
	for _, e := range r.epoch["ebs"] {
		src.mu.Lock()
		if src.flushed[e.Epoch] == 0 {
			t.Errorf("epoch %d was committed, its source never flushed", e.Epoch)
		}
		src.mu.Unlock()
		for _, f := range failed {
			if e.Epoch == f {
				t.Errorf("epoch %d was committed though its source could not be flushed", f)
			}
		}
	}
}

// No cut is taken, and no frame leaves, while the label can't be written.
func TestLabelFailureStopsCuts(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 50)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	state := &memState{}
	r := startRig(t, src, state, []*node{n}, nil)
	r.sync()
	state.mu.Lock()
	state.err = errors.New("input/output error")
	state.mu.Unlock()
	wroteSome(src, 0, 5)
	eventually(t, "the problem is told", func() bool { return strings.Contains(r.p.Status().Problem, "input/output error") })
	src.mu.Lock()
	cuts := src.cuts
	src.mu.Unlock()
	time.Sleep(100 * time.Millisecond)
	src.mu.Lock()
	if src.cuts != cuts {
		t.Error("a cut was taken whose number is not durable")
	}
	src.mu.Unlock()
	state.mu.Lock()
	state.err = nil
	state.mu.Unlock()
	r.sync()
	if p := r.p.Status().Problem; p != "" {
		t.Fatalf("still a problem: %s", p)
	}
	n.check(src)
}

// What passes by itself, such as an fstrim, does not make cuts rare: each is tried
// after the interval, and status says why there is none.
func TestWhatPassesIsTriedSoon(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 10)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	var failed atomic.Int64
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		c.RetryMax = 24 * time.Hour
		c.Events.CutFailed = func(uint64, error) { failed.Add(1) }
	})
	r.sync()
	fail := func(err error) {
		src.mu.Lock()
		defer src.mu.Unlock()
		src.cutErr = err
	}
	fail(fmt.Errorf("%w: a trim runs", ErrPasses))
	wroteSome(src, 10, 10)
	// The pause would be of hours by now if it doubled each time.
	eventually(t, "20 tries", func() bool { return failed.Load() >= 20 })
	if s := r.p.Status(); !strings.Contains(s.Problem, "a trim runs") {
		t.Errorf("status: %+v", s)
	}
	fail(nil)
	epoch := r.sync()
	if n.check(src) < epoch {
		t.Error("the replica did not follow")
	}
}
