package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"blockferry/blockdev/deadman"
	"blockferry/cmd/blockferry/lease"
)

// walkTerms are those of the walk.
func walkTerms(now func() time.Duration) terms {
	return terms{ttl: 10 * time.Second, margin: 2 * time.Second, now: now}
}

// walk is two nodes and an etcd in simulated time.
type walk struct {
	t     *testing.T
	rng   *rand.Rand
	begun time.Time
	ttl   time.Duration

	mu     sync.Mutex
	holder int // the lease's id; 0: nobody has it
	expiry time.Time
	ids    int
	nodes  [2]*walkNode
	taken  [2]int
}

// walkNode is one: its clock runs at a rate of its own, its agent is stopped, and cut off
// from etcd, now and then.
type walkNode struct {
	w      *walk
	number int
	rate   float64

	paused, cut time.Time     // until then
	until       time.Duration // its dead-man's deadline, on its clock; 0: nothing is written
}

func (w *walk) chance(percent int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rng.IntN(100) < percent
}

func (w *walk) upTo(d time.Duration) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Duration(w.rng.Int64N(int64(d)))
}

func (n *walkNode) now() time.Duration {
	return time.Duration(float64(time.Since(n.w.begun)) * n.rate)
}

// gate is where the agent is found stopped.
func (n *walkNode) gate() {
	for {
		n.w.mu.Lock()
		d := time.Until(n.paused)
		n.w.mu.Unlock()
		if d <= 0 {
			return
		}
		time.Sleep(d)
	}
}

// set moves the dead-man's deadline, and fails the test if the other node may write still.
func (n *walkNode) set(until time.Duration) error {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if n.until != 0 && n.now() >= n.until || n.now() >= until {
		return deadman.ErrLeaseEnded
	}
	n.until = max(n.until, until)
	o := w.nodes[1-n.number]
	if left := o.until - o.now(); left > 0 {
		w.t.Errorf("%v: node %d may write until %v, and node %d for %v still", time.Since(w.begun), n.number, until, o.number, left)
	}
	return nil
}

// Extend implements deadline.
func (n *walkNode) Extend(until time.Duration) error {
	n.gate()
	defer n.gate()
	if n.w.chance(5) {
		return deadman.ErrNoService
	}
	return n.set(until)
}

// Release implements deadline.
func (n *walkNode) Release() error {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	n.until = 0
	return nil
}

// call is a request and its answer: either is late, or lost, whether its caller waits or not.
func (n *walkNode) call(ctx context.Context, at func() error) error {
	n.gate()
	w := n.w
	w.mu.Lock()
	cut := time.Now().Before(n.cut)
	w.mu.Unlock()
	slow := time.Second / 20
	if w.chance(20) {
		slow = 5 * time.Second
	}
	there, back := w.upTo(slow), w.upTo(slow)
	lost, deaf := cut || w.chance(5), w.chance(5)
	answer := make(chan error, 1)
	go func() {
		time.Sleep(there)
		if lost {
			return
		}
		w.mu.Lock()
		err := at()
		w.mu.Unlock()
		time.Sleep(back)
		if !deaf {
			answer <- err
		}
	}()
	defer n.gate()
	select {
	case err := <-answer:
		if w.chance(5) { // stopped between the answer and what is made of it, then cut off
			stop := w.upTo(8 * time.Second)
			w.mu.Lock()
			n.paused = time.Now().Add(stop)
			n.cut = n.paused.Add(20 * time.Second)
			w.mu.Unlock()
		}
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

type walkLease struct {
	n    *walkNode
	id   int
	sent time.Duration
}

func (l *walkLease) Sent() time.Duration { return l.sent }

func (l *walkLease) TTL() time.Duration { return l.n.w.ttl }

func (l *walkLease) Renew(ctx context.Context, _ *lease.Record) error {
	w := l.n.w
	sent := l.n.now()
	err := l.n.call(ctx, func() error {
		if w.holder != l.id || time.Now().After(w.expiry) {
			return lease.ErrLost
		}
		w.expiry = time.Now().Add(w.ttl)
		return nil
	})
	if err == nil {
		l.sent = sent
	}
	return err
}

func (l *walkLease) Release(ctx context.Context) error {
	w := l.n.w
	return l.n.call(ctx, func() error {
		if w.holder == l.id {
			w.holder = 0
		}
		return nil
	})
}

func (n *walkNode) take(ctx context.Context) (*walkLease, error) {
	w := n.w
	l := &walkLease{n: n, sent: n.now()}
	w.mu.Lock()
	w.ids++
	l.id = w.ids
	w.mu.Unlock()
	return l, n.call(ctx, func() error {
		if w.holder != 0 && !time.Now().After(w.expiry) {
			return lease.ErrHeld
		}
		w.holder, w.expiry = l.id, time.Now().Add(w.ttl)
		return nil
	})
}

// live takes the lease when it can, writes as long as it may, and gives it up, until end.
func (n *walkNode) live(end time.Time) {
	w := n.w
	for time.Now().Before(end) {
		time.Sleep(w.upTo(time.Second))
		ctx, cancel := context.WithTimeout(context.Background(), askEtcd)
		l, err := n.take(ctx)
		cancel()
		if err != nil {
			continue
		}
		ten := newTenure(walkTerms(n.now), quiet(), l, func() *lease.Record { return nil })
		err = ten.guard(func(until time.Duration) (deadline, error) {
			n.gate()
			return n, n.set(until)
		})
		if err == nil {
			w.mu.Lock()
			w.taken[n.number]++
			w.mu.Unlock()
		}
		inOrder := w.chance(50)
		if err == nil {
			select {
			case <-ten.ending:
			case <-time.After(w.upTo(3 * time.Minute)):
				inOrder = true // as 'secondary' does
			}
		}
		n.gate()
		if inOrder && ten.left() > 0 {
			ten.stop()
			ten.unguard() // it is down
			ctx, cancel := context.WithTimeout(context.Background(), askEtcd)
			_ = l.Release(ctx)
			cancel()
			continue
		}
		for ten.left() > 0 {
			time.Sleep(ten.left())
		}
		ten.stop()
		_ = n.Release() // down, and another time up
	}
}

// trouble stops agents and cuts links.
func (w *walk) trouble(end time.Time) {
	for time.Now().Before(end) {
		time.Sleep(w.upTo(30 * time.Second))
		until := time.Now().Add(w.upTo(25 * time.Second))
		n := w.nodes[w.upTo(2)]
		if w.chance(50) {
			w.mu.Lock()
			n.paused = until
		} else {
			w.mu.Lock()
			n.cut = until
		}
		w.mu.Unlock()
	}
}

// Promise: of two nodes never both may write. Their agents are stopped at any moment, requests
// and answers are late or lost, links are cut, clocks run at different rates.
func TestTenureOneWriter(t *testing.T) {
	taken := [2]int{}
	for seed := range uint64(100) {
		synctest.Test(t, func(t *testing.T) {
			w := &walk{t: t, rng: rand.New(rand.NewPCG(seed, 1)), begun: time.Now(), ttl: 10 * time.Second}
			for i := range w.nodes {
				w.nodes[i] = &walkNode{w: w, number: i, rate: 0.98 + 0.04*w.rng.Float64()}
			}
			end := w.begun.Add(10 * time.Minute)
			var living sync.WaitGroup
			for _, n := range w.nodes {
				living.Go(func() { n.live(end) })
			}
			living.Go(func() { w.trouble(end) })
			living.Wait()
			time.Sleep(time.Minute) // what is on its way arrives
			for i := range taken {
				taken[i] += w.taken[i]
			}
		})
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	t.Logf("taken %v times", taken)
	if taken[0] < 500 || taken[1] < 500 {
		t.Errorf("hardly ever taken: %v", taken)
	}
}

// scriptedLease answers as it is told.
type scriptedLease struct {
	now func() time.Duration
	ttl time.Duration // 0: that of the walk

	mu     sync.Mutex
	sent   time.Duration
	err    error
	calls  int
	record *lease.Record
}

func (s *scriptedLease) Renew(_ context.Context, record *lease.Record) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	if record != nil {
		s.record = record
	}
	if s.err == nil {
		s.sent = s.now()
	}
	return s.err
}

func (s *scriptedLease) Release(context.Context) error { return nil }

func (s *scriptedLease) Sent() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sent
}

func (s *scriptedLease) TTL() time.Duration {
	if s.ttl != 0 {
		return s.ttl
	}
	return walkTerms(nil).ttl
}

func (s *scriptedLease) say(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *scriptedLease) last() *lease.Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.record
}

func (s *scriptedLease) called() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

// scriptedDeadMan is a dead-man that notes its deadline.
type scriptedDeadMan struct {
	mu    sync.Mutex
	until time.Duration
	err   error
}

func (s *scriptedDeadMan) Extend(until time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.until = until
	}
	return s.err
}

func (s *scriptedDeadMan) Release() error { return nil }

func (s *scriptedDeadMan) hold(until time.Duration) (deadline, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.until = until
	return s, nil
}

func (s *scriptedDeadMan) say(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *scriptedDeadMan) at() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.until
}

// The deadline is where the dead-man has it: an extension that it did not confirm does not
// count, and the volume is given up a while before the end of the last one that it did. One that is
// another's fails at once.
func TestTenureEnds(t *testing.T) {
	for name, c := range map[string]struct {
		lease, deadMan error
		after          time.Duration // since the last good renewal
	}{
		"etcd is away":              {errors.New("no route"), nil, 7 * time.Second},
		"the dead-man is away":      {nil, deadman.ErrNoService, 7 * time.Second},
		"the dead-man has struck":   {nil, deadman.ErrLeaseEnded, 10 * time.Second / 3},
		"etcd says it is another's": {fmt.Errorf("%w", lease.ErrLost), nil, 10 * time.Second / 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				now := func() time.Duration { return time.Since(begun) }
				l, d := &scriptedLease{now: now}, &scriptedDeadMan{}
				n := newTenure(walkTerms(now), quiet(), l, func() *lease.Record { return nil })
				if err := n.guard(d.hold); err != nil || d.at() != 8*time.Second {
					t.Fatalf("held until %v: %v", d.at(), err)
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				if left, ended, why := n.state(); ended || why != "" || left <= 4*time.Second || d.at()-now() != left {
					t.Fatalf("after a minute: %v left, the dead-man's %v, ended %v, %s", left, d.at()-now(), ended, why)
				}
				good := l.Sent()
				l.say(c.lease)
				d.say(c.deadMan)
				select {
				case <-n.ending:
				case <-time.After(time.Minute):
					t.Fatal("it is not given up")
				}
				if got := now() - good; got < c.after-10*time.Millisecond || got > c.after+100*time.Millisecond {
					t.Errorf("given up %v after the last good renewal, not %v", got, c.after)
				}
				if errors.Is(c.lease, lease.ErrLost) {
					if d.at()-now() > strikeSoon {
						t.Errorf("it fails in %v only", d.at()-now())
					}
				} else if d.at() != good+8*time.Second {
					t.Errorf("the dead-man's deadline is %v after the last good renewal", d.at()-good)
				}
				if err := n.guard(d.hold); err == nil {
					t.Error("a volume comes up under a lease that ends")
				}
				calls := l.called()
				time.Sleep(time.Minute)
				if l.called() != calls {
					t.Error("it is renewed after it was given up")
				}
				n.stop()
			})
		})
	}
}

// One that was taken before 'ttl' was raised counts as it was granted.
func TestTenureOfShorterLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		now := func() time.Duration { return time.Since(begun) }
		l, d := &scriptedLease{now: now, ttl: 5 * time.Second}, &scriptedDeadMan{}
		n := newTenure(walkTerms(now), quiet(), l, func() *lease.Record { return nil })
		if err := n.guard(d.hold); err != nil || d.at() != 4*time.Second {
			t.Fatalf("held until %v: %v", d.at(), err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if left, ended, why := n.state(); ended || why != "" || left <= 2*time.Second || left > 4*time.Second || d.at()-now() != left {
			t.Errorf("after a minute: %v left, the dead-man's %v, ended %v, %s", left, d.at()-now(), ended, why)
		}
		n.stop()
	})
}

// One that can be renewed in time again goes on, as soon as it can be.
func TestTenureGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		now := func() time.Duration { return time.Since(begun) }
		l := &scriptedLease{now: now}
		n := newTenure(walkTerms(now), quiet(), l, func() *lease.Record { return nil })
		for range 5 {
			l.say(errors.New("no route"))
			time.Sleep(3500 * time.Millisecond) // one renewal at least falls into it, and less than 7 s are without one
			synctest.Wait()
			if _, ended, why := n.state(); ended || why == "" {
				t.Fatalf("ended %v, %s", ended, why)
			}
			l.say(nil)
			back := now()
			time.Sleep(renewAgain + time.Millisecond)
			synctest.Wait()
			if l.Sent() < back {
				t.Fatalf("not renewed %v after it could be", renewAgain)
			}
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if left, ended, why := n.state(); ended || why != "" || left < 4*time.Second {
				t.Fatalf("ended %v, %v left, %s", ended, left, why)
			}
		}
		n.stop()
	})
}
