package protocol

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A source that can freeze only what changed, and not much of it: what is more
// goes live, in rounds, and each replica holds one cut's image at every moment
// all the same.
func TestPartialViews(t *testing.T) {
	t.Parallel()
	src := newMemSource(testVolumeSize, BlockSize)
	src.frozenMax = 20 * BlockSize
	wroteSome(src, 0, 1500)
	stop := src.busy(t, 5, time.Millisecond)
	a, b := newNode(t, "ebs", testVolumeSize, 32<<20), newNode(t, "peer", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{a, b}, nil)
	watchA, watchB := a.watch(src), b.watch(src)
	for range 3 {
		r.sync()
		// One falls behind and has to go through live rounds again.
		if err := r.p.Pause("peer"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(100 * time.Millisecond)
		if err := r.p.Resume("peer"); err != nil {
			t.Fatal(err)
		}
	}
	r.sync()
	if n, m := watchA(), watchB(); n < 3 || m < 3 {
		t.Fatalf("only %d and %d images were looked at", n, m)
	}
	stop()
	epoch := r.sync()
	for _, n := range []*node{a, b} {
		if e := n.check(src); e < epoch {
			t.Errorf("%s holds epoch %d, want %d or later", n.name, e, epoch)
		}
	}
	if len(r.voids) > 0 {
		t.Errorf("voids: %v", r.voids)
	}
	src.mu.Lock()
	defer src.mu.Unlock()
	if src.noViews == 0 {
		t.Error("there was a view each time: the test shows nothing")
	}
	if src.forgotten < epoch {
		t.Errorf("every replica holds epoch %d, the source was told %d", epoch, src.forgotten)
	}
}

// A source that never has a view is no source of commits, and the replica
// says why it is behind.
func TestNoViewEver(t *testing.T) {
	t.Parallel()
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 500)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	src.mu.Lock()
	src.frozenMax = -1
	src.mu.Unlock()
	src.busy(t, 6, 100*time.Microsecond)
	eventually(t, "the reason is told", func() bool {
		return r.p.Status().Replicas[0].Reason == lastNoView(src)
	})
	first := n.check(src)
	time.Sleep(200 * time.Millisecond) // 10 intervals
	if e := n.check(src); e != first {
		t.Errorf("it holds epoch %d, want still %d", e, first)
	}
}

func lastNoView(s *memSource) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lastNoView == nil {
		return "none yet"
	}
	return s.lastNoView.Error()
}

// Verify finds what rotted also where views hold only what changed, and takes
// nothing for a difference that was written meanwhile.
func TestVerifyPartialViews(t *testing.T) {
	t.Parallel()
	src := newMemSource(testVolumeSize, BlockSize)
	src.frozenMax = 200 * BlockSize
	wroteSome(src, 0, 2000)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	const busy = 1500 // blocks that are written to
	stop := src.busyWithin(t, 11, time.Millisecond, busy)
	for range 3 {
		var last VerifyProgress
		res, err := r.p.Verify(ctx, "ebs", func(p VerifyProgress) { last = p })
		if err != nil || !res.Same() || last.DoneBytes != testVolumeSize {
			t.Fatalf("%+v, %v; progress %+v", res, err, last)
		}
	}
	const rotten = 1834
	b := make([]byte, BlockSize)
	if _, err := n.store.ReadAt(b, rotten*BlockSize); err != nil {
		t.Fatal(err)
	}
	b[17] ^= 4
	if _, err := n.store.WriteAt(b, rotten*BlockSize); err != nil {
		t.Fatal(err)
	}
	res, err := r.p.Verify(ctx, "ebs", nil)
	if err != nil || res.DifferentBytes != BlockSize || len(res.Differences) != 1 || res.Differences[0] != (Range{rotten * BlockSize, BlockSize}) {
		t.Fatalf("after a flipped bit: %+v, %v", res, err)
	}
	stop()
	r.sync()
	res, err = r.p.Verify(ctx, "ebs", nil)
	if err != nil || res.DifferentBytes != BlockSize {
		t.Fatalf("at rest: %+v, %v", res, err)
	}
	// A verification that is broken off leaves nothing for the next.
	brief, end := context.WithTimeout(ctx, time.Microsecond)
	defer end()
	if _, err := r.p.Verify(brief, "ebs", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestSubtractRanges(t *testing.T) {
	rng := testRand(3)
	const blocks = 40
	some := func() (out []Range, in [blocks]bool) {
		for b := range blocks {
			if rng.IntN(2) == 0 {
				out, in[b] = appendRange(out, Range{int64(b) * BlockSize, BlockSize}), true
			}
		}
		return out, in
	}
	for range 2000 {
		a, inA := some()
		b, inB := some()
		var want []Range
		for i := range blocks {
			if inA[i] && !inB[i] {
				want = appendRange(want, Range{int64(i) * BlockSize, BlockSize})
			}
		}
		got := subtractRanges(a, b)
		if len(got) != len(want) {
			t.Fatalf("%v without %v is %v, want %v", a, b, got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("%v without %v is %v, want %v", a, b, got, want)
			}
		}
	}
}

// What a comparison with the live image found is a difference only if nothing
// was written there up to a border that no write of before can pass unmarked,
// and the cuts in between are all known.
func TestJudge(t *testing.T) {
	blocks := func(from, n int64) Range { return Range{from * BlockSize, n * BlockSize} }
	begin := func() (*replicaWorker, *verifyJob) {
		p := &Primary{size: testVolumeSize, changed: make(chan struct{})}
		w := newReplicaWorker(p, ReplicaConfig{Name: "ebs"})
		w.verify = &verifyJob{done: make(chan error, 1), next: testVolumeSize, sliceFrom: 4096, suspectSince: 5, suspects: []Range{blocks(10, 4)}}
		return w, w.verify
	}
	w, job := begin()
	w.judge(5, 6, []Range{blocks(10, 1)}, false)
	if len(job.done) > 0 || job.result.DifferentBytes != 0 {
		t.Fatalf("decided before there was a view: %+v", job)
	}
	w.judge(6, 7, []Range{blocks(12, 1)}, true)
	if len(job.done) != 1 || job.result.DifferentBytes != 2*BlockSize || len(job.result.Differences) != 2 {
		t.Fatalf("%+v", job)
	}
	w, job = begin()
	w.judge(6, 7, nil, true)
	if len(job.done) > 0 || job.next != 4096 || job.result.DifferentBytes != 0 || job.suspectSince != 0 {
		t.Fatalf("a cut is missing, and the slice was not begun anew: %+v", job)
	}
}
