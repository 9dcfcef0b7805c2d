package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"blockferry/blockdev/deadman"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/lease"
)

const (
	// renewAgain is the pause after a renewal that failed.
	renewAgain = 500 * time.Millisecond
	// strikeSoon is the deadline of a volume whose lease is another's.
	strikeSoon = 10 * time.Millisecond
)

// heldLease is a lease in etcd (lease.Lease).
type heldLease interface {
	Renew(ctx context.Context, record *lease.Record) error
	Release(ctx context.Context) error
	Sent() time.Duration
	TTL() time.Duration
}

// deadline is the dead-man's half of a lease (deadman.Lease).
type deadline interface {
	Extend(until time.Duration) error
	Release() error
}

// terms are what is agreed of all leases.
type terms struct {
	ttl    time.Duration
	margin time.Duration        // from the deadline until another may have the lease
	now    func() time.Duration // goes on while the machine sleeps
}

// of are the terms of a lease that was granted for less, before 'ttl' was raised.
func (t terms) of(granted time.Duration) terms {
	if granted < t.ttl {
		t.ttl, t.margin = granted, (&config.Lease{TTL: granted}).Margin()
	}
	return t
}

// early is how long before its deadline a volume is given up that could not be
// renewed, to take it down in order if nobody uses it.
func (t terms) early() time.Duration { return t.ttl / 10 }

// tenure is a lease that this node has. The lease lives in etcd for ttl from when the
// renewal reached it; the deadline is counted from before it was sent, and is sooner by the
// margin. It is the dead-man's first and known here only then, so the volume fails before
// another can have the lease, whatever becomes of this process.
type tenure struct {
	terms
	log    *slog.Logger
	lease  heldLease
	record func() *lease.Record // nil: as it was

	ending  chan struct{} // closed: the volume is to be given up
	stopped chan struct{} // closed when nothing is renewed any more
	cancel  context.CancelFunc

	// renewing holds a token while the lease, or the dead-man, is asked for something:
	// one at a time. It guards what follows.
	renewing chan struct{}
	deadMan  deadline // nil: the volume is not up
	hold     func(until time.Duration) (deadline, error)

	mu    sync.Mutex
	until time.Duration // the deadline
	ended bool
	why   string // the last renewal failed, or it has ended
}

// newTenure renews a lease until it ends, or stop.
func newTenure(t terms, log *slog.Logger, l heldLease, record func() *lease.Record) *tenure {
	ctx, cancel := context.WithCancel(context.Background())
	t = t.of(l.TTL())
	n := &tenure{terms: t, log: log, lease: l, record: record, ending: make(chan struct{}), stopped: make(chan struct{}), cancel: cancel, renewing: make(chan struct{}, 1),
		until: l.Sent() + t.ttl - t.margin}
	go n.run(ctx)
	return n
}

// left is how long the volume may be written still, below 0: not any more.
func (n *tenure) left() time.Duration {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.until - n.now()
}

// state says when it ends, whether the volume is to be given up, and what is wrong.
func (n *tenure) state() (left time.Duration, ended bool, why string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.until - n.now(), n.ended, n.why
}

// run renews it a third of its life after the last renewal was sent.
func (n *tenure) run(ctx context.Context) {
	defer close(n.stopped)
	wait := n.ttl / 3
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(min(wait, max(0, n.left()-n.early()))):
		}
		err := n.renew(ctx, n.record())
		wait = n.ttl / 3
		if err != nil {
			wait = renewAgain
		}
		if ctx.Err() != nil {
			return
		}
		if _, ended, _ := n.state(); ended {
			return
		}
		if n.left() <= n.early() {
			n.end(fmt.Errorf("it could not be renewed in time: %w", errors.Join(err, context.DeadlineExceeded)))
			return
		}
	}
}

// renew asks etcd once, and moves the deadline, the dead-man's first.
func (n *tenure) renew(ctx context.Context, record *lease.Record) error {
	n.renewing <- struct{}{}
	defer func() { <-n.renewing }()
	patience := min(n.ttl/6, askEtcd, n.left()-n.early())
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := n.lease.Renew(ctx, record)
	if errors.Is(err, lease.ErrLost) {
		n.strike()
		n.end(err)
		return err
	}
	until := n.lease.Sent() + n.ttl - n.margin
	if err == nil && n.deadMan != nil {
		err = n.deadMan.Extend(until)
		if errors.Is(err, deadman.ErrLeaseEnded) {
			n.end(err)
			return err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	was := n.why
	n.why = ""
	if err != nil {
		n.why = err.Error()
		if was == "" {
			n.log.Warn("the lease was not renewed", "error", err, "seconds-left", (n.until - n.now()).Seconds())
		}
		return err
	}
	n.until = until
	if was != "" {
		n.log.Info("the lease is renewed again")
	}
	return nil
}

// strike has a volume fail now whose lease is another's: somebody took it away.
func (n *tenure) strike() {
	until := n.now() + strikeSoon
	if n.deadMan != nil && n.left() > strikeSoon {
		if _, err := n.hold(until); err != nil {
			n.log.Warn("the volume does not fail before its deadline", "error", err)
			return
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.until = min(n.until, until)
}

// end has the volume given up, for a reason.
func (n *tenure) end(err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ended {
		return
	}
	n.ended, n.why = true, err.Error()
	close(n.ending)
	n.log.Warn("the lease ends; the volume is given up", "error", err, "seconds-left", (n.until - n.now()).Seconds())
}

// guard has the dead-man hold the deadline of a volume that is up now. hold asks it
// to, from a deadline on.
func (n *tenure) guard(hold func(until time.Duration) (deadline, error)) error {
	n.renewing <- struct{}{}
	defer func() { <-n.renewing }()
	n.mu.Lock()
	until, ended, why := n.until, n.ended, n.why
	n.mu.Unlock()
	if ended {
		return fmt.Errorf("%w: %s", lease.ErrLost, why)
	}
	d, err := hold(until)
	if err == nil {
		n.deadMan, n.hold = d, hold
	}
	return err
}

// unguard has the dead-man forget the deadline: the volume is down.
func (n *tenure) unguard() {
	n.renewing <- struct{}{}
	defer func() { <-n.renewing }()
	if n.deadMan == nil {
		return
	}
	if err := n.deadMan.Release(); err != nil {
		n.log.Warn("the dead-man may still hold the deadline of a volume that is down", "error", err)
	}
	n.deadMan = nil
}

// stop ends renewals. The deadline stays.
func (n *tenure) stop() {
	n.cancel()
	<-n.stopped
}
