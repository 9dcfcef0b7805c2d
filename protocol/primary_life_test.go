package protocol

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"testing"
	"time"
)

func TestVerify(t *testing.T) {
	src, n, r := syncedRig(t, 64<<10, 2000)
	stop := src.busy(t, 11, 5*time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var last VerifyProgress
	res, err := r.p.Verify(ctx, "ebs", func(p VerifyProgress) { last = p })
	if err != nil || !res.Same() || last.DoneBytes != testVolumeSize {
		t.Fatalf("%+v, %v; progress %+v", res, err, last)
	}
	// One bit rots at the replica, where nobody writes any more.
	stop()
	r.sync()
	n.check(src) // and with it all is applied
	const rotten = 1234
	b := make([]byte, BlockSize)
	if _, err := n.store.ReadAt(b, rotten*BlockSize); err != nil {
		t.Fatal(err)
	}
	b[17] ^= 4
	if _, err := n.store.WriteAt(b, rotten*BlockSize); err != nil {
		t.Fatal(err)
	}
	res, err = r.p.Verify(ctx, "ebs", nil)
	if err != nil || res.DifferentBytes != BlockSize || len(res.Differences) != 1 || res.Differences[0] != (Range{rotten * BlockSize, BlockSize}) {
		t.Fatalf("after a flipped bit: %+v, %v", res, err)
	}
	if _, err := r.p.Verify(ctx, "nobody", nil); err == nil {
		t.Fatal("an unknown replica was verified")
	}
}

// Paused means no session; resumed it goes on incrementally.
func TestPauseAndResume(t *testing.T) {
	src, n, r := syncedRig(t, 64<<10, 500)
	first := n.check(src)
	if err := r.p.Pause("ebs"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the session ends", func() bool { return n.recv.Status()[0].Session == nil })
	wroteSome(src, 10, 3)
	time.Sleep(100 * time.Millisecond)
	s := r.p.Status().Replicas[0]
	if s.Replication != "Paused" || s.LagBytes != 3*BlockSize || s.LagSeconds <= 0 || s.Reason == "" || n.check(src) != first {
		t.Fatalf("while paused: %+v", s)
	}
	before := r.epochs("ebs")
	if err := r.p.Resume(""); err != nil {
		t.Fatal(err)
	}
	r.sync()
	sent := uint64(0)
	for _, e := range r.epochs("ebs")[len(before):] {
		sent += e.Link.SentBytes
		if e.Action != "incremental" {
			t.Errorf("after the pause: %+v", e)
		}
	}
	if sent != 3*BlockSize {
		t.Fatalf("%d bytes were sent after the pause", sent)
	}
	if err := r.p.Pause("nobody"); err == nil {
		t.Fatal("an unknown replica was paused")
	}
}

// While nothing is written no cut is taken and the lag is zero, however long.
func TestIdle(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 500)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	state := &memState{}
	r := startRig(t, src, state, []*node{n}, nil)
	r.sync()
	time.Sleep(50 * time.Millisecond)
	src.mu.Lock()
	cuts := src.cuts
	src.mu.Unlock()
	time.Sleep(700 * time.Millisecond)
	s := r.p.Status()
	src.mu.Lock()
	defer src.mu.Unlock()
	if src.cuts != cuts {
		t.Fatalf("%d cuts were taken of an idle volume", src.cuts-cuts)
	}
	rep := s.Replicas[0]
	if rep.LagSeconds != 0 || rep.LagBytes != 0 || rep.LagIsMinimum || rep.Disk != "UpToDate" || rep.Replication != "Established" || rep.Reason != "" {
		t.Fatalf("idle: %+v", rep)
	}
	// After the idle time the age of what is missing counts from its write, not
	// from the last cut.
	state.mu.Lock()
	state.err = errors.New("no cuts for now")
	state.mu.Unlock()
	src.mu.Unlock()
	written := time.Now()
	src.write(1)
	lag := r.p.Status().Replicas[0].LagSeconds
	src.mu.Lock()
	if limit := time.Since(written).Seconds() + 0.2; lag <= 0 || lag > limit {
		t.Fatalf("right after a write the replica is %.3f s behind, want at most %.3f", lag, limit)
	}
	b, err := json.Marshal(s)
	if err != nil || !bytes.Contains(b, []byte(`"lag-seconds":0,`)) || !bytes.Contains(b, []byte(`"size-bytes":`)) {
		t.Fatalf("%s %v", b, err)
	}
}

// After a clean end and after an unclean one replication goes on incrementally,
// under a new generation.
func TestStops(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 500)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	state := &memState{}
	r := startRig(t, src, state, []*node{n}, nil)
	r.sync()
	wroteSome(src, 10, 5)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	sealed := false
	clean, err := r.p.Stop(ctx, func() error { sealed = true; return nil })
	if err != nil || !clean || !sealed {
		t.Fatalf("clean %v, sealed %v: %v", clean, sealed, err)
	}
	s, err := DecodeSourceState(state.b)
	if err != nil || !s.Clean {
		t.Fatalf("%+v, %v", s, err)
	}
	if n.check(src) != s.Lineage.Tip().Epoch {
		t.Fatal("the replica does not hold the last cut")
	}
	if _, _, err := r.p.SyncNow(ctx); !errors.Is(err, ErrStopped) {
		t.Fatalf("SyncNow after the end: %v", err)
	}
	generation := s.Generation

	r = startRig(t, src, state, []*node{n}, nil)
	wroteSome(src, 20, 3)
	r.sync()
	if e := r.last("ebs"); e.Action != "incremental" || e.Link.SentBytes != 3*BlockSize {
		t.Fatalf("after a clean end: %+v", e)
	}
	if p := r.plan("ebs"); p.Action != Incremental {
		t.Fatalf("after a clean end: %v", p)
	}
	// Written after the last cut and before the seal: not clean.
	clean, err = r.p.Stop(ctx, func() error { src.write(3); return nil })
	if err != nil || clean {
		t.Fatalf("written behind the last cut's back, yet clean %v: %v", clean, err)
	}
	r = startRig(t, src, state, []*node{n}, nil)
	r.sync()
	s, err = DecodeSourceState(state.b)
	if err != nil || s.Generation == generation || s.Clean || len(s.Lineage) != 3 {
		t.Fatalf("%+v, %v", s, err)
	}
	if e := r.last("ebs"); e.Action != "incremental" || e.Link.SentBytes != BlockSize {
		t.Fatalf("after an unclean end: %+v", e)
	}
	n.check(src)
}
