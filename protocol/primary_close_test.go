package protocol

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// A clean end says that the device holds exactly the last cut, after a power
// cut too: it is recorded only when that cut was flushed, whether or not a
// replica took it.
func TestCleanEndIsFlushed(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 100)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	state := &memState{}
	r := startRig(t, src, state, []*node{n}, nil)
	r.sync()
	src.mu.Lock()
	src.flushErr = func(uint64) error { return errors.New("input/output error") }
	src.mu.Unlock()
	wroteSome(src, 10, 5)
	eventually(t, "an epoch is void", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.voids) > 0
	})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	clean, err := r.p.Stop(ctx, func() error { return nil })
	if clean || err == nil || !strings.Contains(err.Error(), "input/output error") {
		t.Fatalf("the last cut was never durable: clean %v, %v", clean, err)
	}
	if s, err := DecodeSourceState(state.b); err != nil || s.Clean {
		t.Fatalf("%+v, %v", s, err)
	}

	// And a cut that nobody took is flushed at the end.
	src.mu.Lock()
	src.flushErr = nil
	src.mu.Unlock()
	r = startRig(t, src, state, nil, nil)
	wroteSome(src, 20, 5)
	clean, err = r.p.Stop(t.Context(), func() error { return nil })
	if err != nil || !clean {
		t.Fatalf("clean %v, %v", clean, err)
	}
	s, err := DecodeSourceState(state.b)
	if err != nil {
		t.Fatal(err)
	}
	src.mu.Lock()
	defer src.mu.Unlock()
	if src.flushed[s.Lineage.Tip().Epoch] == 0 {
		t.Fatalf("the end is clean at %v, which was never flushed", s.Lineage.Tip())
	}
}
