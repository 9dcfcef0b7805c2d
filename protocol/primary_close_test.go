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

// Two replicas that take turns with their cuts both end at the last one: a planned
// change of role asks for just that.
func TestAllEndAtTheLastCut(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 100)
	nodes := []*node{newNode(t, "one", testVolumeSize, 32<<20), newNode(t, "two", testVolumeSize, 32<<20)}
	state, rng := &memState{}, testRand(5)
	for round := range 20 {
		r := startRig(t, src, state, nodes, nil)
		r.sync()
		stop := src.busy(t, uint64(round), 200*time.Microsecond)
		time.Sleep(time.Duration(rng.Int64N(int64(20 * time.Millisecond))))
		stop()
		r.sync()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		clean, err := r.p.Stop(ctx, func() error { return nil })
		cancel()
		if behind := r.p.Behind(); err != nil || !clean || len(behind) > 0 {
			t.Fatalf("round %d: clean %v, %v, behind: %v", round, clean, err, behind)
		}
	}
	for _, n := range nodes {
		n.check(src)
	}
}

// The last cut is taken when all are ready for it, or they would go on taking turns. It
// waits for nobody who is away, nor beyond its time, nor while something is written.
func TestLastCutWaitsForAll(t *testing.T) {
	for name, c := range map[string]struct {
		change func(src *memSource, busy *replicaWorker, ended context.CancelFunc)
		want   int
	}{
		"one is busy":           {func(*memSource, *replicaWorker, context.CancelFunc) {}, 0},
		"both are ready":        {func(_ *memSource, busy *replicaWorker, _ context.CancelFunc) { busy.wish = wishView }, 2},
		"the other is away":     {func(_ *memSource, busy *replicaWorker, _ context.CancelFunc) { busy.connected = false }, 1},
		"the time is over":      {func(_ *memSource, _ *replicaWorker, ended context.CancelFunc) { ended() }, 1},
		"something was written": {func(src *memSource, _ *replicaWorker, _ context.CancelFunc) { src.write(1) }, 1},
	} {
		src := newMemSource(testVolumeSize, BlockSize)
		written, err := src.WrittenBytes()
		if err != nil {
			t.Fatal(err)
		}
		together, ended := context.WithCancel(t.Context())
		defer ended()
		p := &Primary{cfg: PrimaryConfig{Source: src, Clock: realClock{}, Interval: time.Hour}, lastCut: &cutRecord{epoch: 9, written: written}, syncTo: 9, together: together}
		ready, busy := &replicaWorker{p: p, connected: true, holds: 8, wish: wishView}, &replicaWorker{p: p, connected: true, holds: 8}
		p.workers = []*replicaWorker{ready, busy}
		c.change(src, busy, ended)
		tick := time.Now()
		got, _, wait := p.gather(&tick)
		if len(got) != c.want {
			t.Errorf("%s: %d joined the cut, want %d", name, len(got), c.want)
		}
		if wait > time.Second { // nobody says when its time is over
			t.Errorf("%s: it is looked at again after %v", name, wait)
		}
	}
}

// toldClock says when somebody begins to wait while told says so.
type toldClock struct {
	realClock
	told  func() bool
	waits chan struct{} // room for one
}

func (c toldClock) After(d time.Duration) <-chan time.Time {
	if c.told() {
		select {
		case c.waits <- struct{}{}:
		default:
		}
	}
	return time.After(d)
}

// With cuts an hour apart, the last one comes as soon as who was waited for goes away; a
// primary that ends without one waits for nobody.
func TestLastCutWaitsForNobodyWhoLeft(t *testing.T) {
	for name, seal := range map[string]func() error{"it goes down": func() error { return nil }, "its agent ends": nil} {
		src := newMemSource(testVolumeSize, BlockSize)
		written, err := src.WrittenBytes()
		if err != nil {
			t.Fatal(err)
		}
		clock := &toldClock{waits: make(chan struct{}, 1)}
		g := Generation{1}
		p := &Primary{cfg: PrimaryConfig{Source: src, State: &memState{}, Clock: clock, Interval: time.Hour}.withDefaults(), kick: make(chan struct{}, 1), changed: make(chan struct{}),
			state: SourceState{Lineage: Lineage{{Generation: g, Epoch: 9}}, Generation: g, OpenEpoch: 10}, lastCut: &cutRecord{epoch: 9, written: written}}
		clock.told = func() bool {
			p.mu.Lock()
			defer p.mu.Unlock()
			return p.together != nil
		}
		p.ctx, p.cancel = context.WithCancel(t.Context())
		ready, busy := newReplicaWorker(p, ReplicaConfig{Name: "ready"}), newReplicaWorker(p, ReplicaConfig{Name: "busy"})
		ready.connected, busy.connected, ready.holds, busy.holds, ready.wish = true, true, 8, 8, wishView
		p.workers = []*replicaWorker{ready, busy}
		p.wg.Go(func() { p.cutter(p.ctx) })
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			if clean, err := p.Stop(ctx, seal); err != nil || clean != (seal != nil) {
				t.Errorf("%s: clean %v, %v", name, clean, err)
			}
		}()
		waits := clock.waits
		if seal != nil {
			<-waits // for who is busy
			busy.update(func() { busy.connected = false })
			waits = nil
		}
		select {
		case <-waits:
			t.Errorf("%s: it waits for who is busy", name)
			cancel()
		case h := <-ready.cuts:
			ready.update(func() { ready.holds = h.rec.epoch })
			h.done()
		case <-ended:
			t.Errorf("%s: the last cut did not come", name)
		}
		if seal == nil {
			cancel() // who is busy does not get it
		}
		<-ended
		if seal != nil && ctx.Err() != nil {
			t.Errorf("%s: it took all its time", name)
		}
		cancel()
	}
}
