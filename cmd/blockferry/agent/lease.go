package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/deadman"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/lease"
	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

// askEtcd is how long etcd has for an answer, apart from renewals.
const askEtcd = 3 * time.Second

// leaseStore is where leases are (lease.Client).
type leaseStore interface {
	Look(ctx context.Context, volume string) (lease.Standing, error)
	Take(ctx context.Context, volume string, claim lease.Claim) (heldLease, error)
	Resume(ctx context.Context, volume string, claim lease.Claim) (heldLease, error)
	Watch(ctx context.Context, volume string) <-chan struct{}
}

// etcdLeases are those of a real etcd.
type etcdLeases struct{ *lease.Client }

func (e etcdLeases) Take(ctx context.Context, volume string, claim lease.Claim) (heldLease, error) {
	l, err := e.Client.Take(ctx, volume, claim)
	if err != nil {
		return nil, err // and no lease that is nil
	}
	return l, nil
}

func (e etcdLeases) Resume(ctx context.Context, volume string, claim lease.Claim) (heldLease, error) {
	l, err := e.Client.Resume(ctx, volume, claim)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// keeper has the lease of one volume, or waits for it. Its methods do nothing, and
// refuse nothing, on nil: a volume without a lease.
type keeper struct {
	terms
	store leaseStore
	// fenced returns nil if there is a dead-man's service to hold a deadline: a node without
	// one can't bring the volume up.
	fenced func() error
	// fail has everything on the volume's stack fail, whatever the dead-man knows of it.
	fail   func() error
	node   string
	boot   string // the kernel's id of this start of the machine
	config *config.Volume
	log    *slog.Logger
	record func() *lease.Record

	mu     sync.Mutex
	tenure *tenure // nil: not held
	holder string  // the node that has it, as far as is known
	words  string  // why it is not held here

	// These belong to who holds the volume's op.
	vacant time.Time // since when nobody has it; zero: somebody has
	pause  time.Time // it is not taken by itself before
	left   string    // why not
	busy   time.Time // since when somebody else has a disk of the volume; zero: nobody has
	// unfenced is why a volume does not fail whose lease has ended; "": it does.
	unfenced string
	told     bool // that it ends, to those who use the volume
	// declined: the operator had the volume stand down here; it is left to others until
	// one has had it.
	declined bool
}

func newKeeper(a *Agent, s *switching) *keeper {
	c := a.options.Config.Lease
	boot, err := blockdev.BootID()
	if err != nil {
		s.log.Warn("a lease of an earlier agent is not taken over", "error", err)
		rand.Read(boot[:]) // never fails
	}
	return &keeper{terms: terms{c.TTL, c.Margin(), deadman.BootTime}, store: a.leases, fenced: a.reachDeadMan, fail: s.failStack, node: a.options.Config.Node.Name, boot: hex.EncodeToString(boot[:]),
		config: s.config, log: s.log, record: s.copies, words: "the agent is starting"}
}

// ours says whether a lease is an earlier process's of this start of this node: not a
// machine's that was cloned from it, nor one of before, which is waited for.
func (k *keeper) ours(c *lease.Claim) bool { return c != nil && c.Node == k.node && c.Boot == k.boot }

// keeps is the keeper of a volume's lease; nil: it has none.
func (s *switching) keeps() *keeper {
	if s == nil {
		return nil
	}
	return s.lease
}

// held is the lease while it is had here, or nil.
func (k *keeper) held() *tenure {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.tenure
}

// say notes why the lease is not held here.
func (k *keeper) say(holder, format string, args ...any) {
	words := fmt.Sprintf(format, args...)
	k.mu.Lock()
	news := words != k.words
	k.holder, k.words = holder, words
	k.mu.Unlock()
	if news {
		k.log.Info("the lease", "holder", holder, "state", words)
	}
}

func (k *keeper) have(l heldLease) {
	n := newTenure(k.terms, k.log, l, k.record)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tenure, k.holder, k.words = n, k.node, ""
}

// need takes the lease, unless it is had, for a copy that holds has; op is held. A primary whose
// copy may lack what was written since is refused unless forced, and so is who had it last with
// more on its disk; another copy that takes over is judged elsewhere. The errors say what to do.
func (k *keeper) need(ctx context.Context, uuid volume.UUID, primary bool, has protocol.Lineage, force bool) error {
	if k == nil {
		return nil
	}
	if n := k.held(); n != nil {
		if _, ended, why := n.state(); ended {
			return exit.Errorf(exit.Refused, "volume '%s': its lease ends: %s; repeat it in %v", k.config.Name, why, k.ttl)
		}
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, askEtcd)
	defer cancel()
	standing, err := k.store.Look(ctx, uuid.String())
	var l heldLease
	switch h := standing.Holder; {
	case err != nil:
	case k.ours(h):
		l, err = k.store.Resume(ctx, uuid.String(), *h)
	case h != nil:
		err = fmt.Errorf("%w by node '%s'", lease.ErrHeld, h.Node)
	default:
		last := standing.Record != nil && standing.Record.Node == k.node // by the record alone it is known that it had more
		if why := mayFollow(standing.Record, k.node, primary, has); why != "" && (primary || last) && !force {
			return exit.Errorf(exit.Refused, "volume '%s': writes may be lost: %sblockferry primary --force %[1]s", k.config.Name, why)
		}
		if err := k.fenced(); err != nil {
			return exit.Errorf(exit.Refused, "volume '%s': its lease is not taken: %w; a lease needs the dead-man's service: systemctl enable --now blockferry-deadman", k.config.Name, err)
		}
		l, err = k.store.Take(ctx, uuid.String(), lease.Claim{Node: k.node, Boot: k.boot, Generation: fmt.Sprintf("%x", has.Tip().Generation), Epoch: has.Tip().Epoch})
	}
	switch {
	case errors.Is(err, lease.ErrHeld):
		return exit.Errorf(exit.Refused, "volume '%s': %w, which writes the volume; --force does not change that. If that node can be reached, there: blockferry secondary %[1]s; "+
			"if it is lost, repeat this when its lease has ended, within %[3]v", k.config.Name, err, k.ttl)
	case err != nil:
		return exit.Errorf(exit.Refused, "volume '%s': its lease can't be had: %w; without etcd no node becomes primary. Only if no other node writes it, and none will: "+
			"take 'promote: auto' out of the configuration, restart the agent and repeat this", k.config.Name, err)
	}
	k.declined = false
	k.have(l)
	return nil
}

// decline gives the lease up, which is left to others.
func (k *keeper) decline() {
	if k != nil {
		k.declined = true
		k.release()
	}
}

// release gives the lease up. The volume is down.
func (k *keeper) release() {
	if k == nil {
		return
	}
	k.mu.Lock()
	n := k.tenure
	k.tenure = nil
	k.mu.Unlock()
	if n == nil {
		return
	}
	n.stop()
	n.unguard()
	ctx, cancel := context.WithTimeout(context.Background(), askEtcd)
	defer cancel()
	if err := n.lease.Release(ctx); err != nil {
		k.log.Info("the lease was not given up; it ends by itself", "error", err)
	}
}

// drop forgets a lease whose deadline has passed. It ends in etcd by itself, later.
func (k *keeper) drop() {
	k.mu.Lock()
	n := k.tenure
	k.tenure = nil
	k.mu.Unlock()
	if n != nil {
		n.stop()
	}
}

// mayWrite refuses to bring a volume up whose lease is not had.
func (k *keeper) mayWrite() error {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	n, words := k.tenure, k.words
	k.mu.Unlock()
	if n == nil {
		return &noLeaseError{words}
	}
	if _, ended, why := n.state(); ended {
		return &noLeaseError{"its lease ends: " + why}
	}
	return nil
}

// noLeaseError says that a volume waits for its lease.
type noLeaseError struct{ why string }

func (n *noLeaseError) Error() string { return n.why }

// proved asks etcd whether the lease is had still. The record stays as it was.
func (k *keeper) proved(ctx context.Context) error {
	if k == nil {
		return nil
	}
	if err := k.mayWrite(); err != nil {
		return err
	}
	return k.held().renew(ctx, nil)
}

// ready is called before a volume is brought up, by when nothing else can refuse it: the
// lease is proved, and the record names this node, the last cut on its disk and, so far, no
// copy: from the first write on none is known to have it.
func (k *keeper) ready(ctx context.Context, cut func() (protocol.Position, error)) error {
	if k == nil {
		return nil
	}
	n := k.held()
	if n == nil {
		return &noLeaseError{"its lease is not held"}
	}
	at, err := cut()
	if err != nil {
		return err
	}
	if err := n.renew(ctx, recordOf(k.node, k.config, at, nil)); err != nil {
		return &noLeaseError{err.Error()}
	}
	return nil
}

// guard has the dead-man hold the deadline of a volume that comes up.
func (k *keeper) guard(hold func(until time.Duration) (deadline, error)) error {
	if k == nil {
		return nil
	}
	n := k.held()
	if n == nil {
		return &noLeaseError{"its lease is not held"}
	}
	return n.guard(hold)
}

// unguard is for a volume that went down.
func (k *keeper) unguard() {
	if k == nil {
		return
	}
	if n := k.held(); n != nil {
		n.unguard()
	}
}

// status is nil for a volume without a lease.
func (k *keeper) status() *status.Lease {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	n, s := k.tenure, &status.Lease{Holder: k.holder, Reason: k.words}
	k.mu.Unlock()
	if n != nil {
		left, ended, why := n.state()
		seconds := max(0, left.Seconds())
		s.Holder, s.SecondsLeft, s.Reason, s.Ending = k.node, &seconds, why, ended
	}
	return s
}

// holdDeadline has the dead-man hold the deadline of the volume's outermost device.
func (m *managed) holdDeadline(until time.Duration) (deadline, error) {
	info, err := m.agent.dm.Info(m.config.Name)
	if err != nil {
		return nil, err
	}
	d, err := deadman.HoldLease(m.agent.options.DeadMan, m.config.Name, info.UUID, until)
	if err != nil {
		return nil, err // and no deadline that is nil
	}
	return d, nil
}

// reachDeadMan connects to the dead-man's service, and asks nothing.
func (a *Agent) reachDeadMan() error {
	conn, err := net.DialTimeout("unix", a.options.DeadMan.Socket, askEtcd)
	if err != nil {
		return fmt.Errorf("%w: %w", deadman.ErrNoService, err)
	}
	return conn.Close()
}

// noLeases answers why there are none.
type noLeases struct{ err error }

func (n noLeases) Look(context.Context, string) (lease.Standing, error) {
	return lease.Standing{}, n.err
}

func (n noLeases) Take(context.Context, string, lease.Claim) (heldLease, error) { return nil, n.err }

func (n noLeases) Resume(context.Context, string, lease.Claim) (heldLease, error) {
	return nil, n.err
}

func (n noLeases) Watch(context.Context, string) <-chan struct{} { return nil }

// openLeases connects to etcd, if any volume has a lease. What makes that impossible keeps those
// volumes waiting, and no other.
func (a *Agent) openLeases() (closeAll func()) {
	c := a.options.Config.Lease
	if c == nil {
		return func() {}
	}
	client, err := lease.Open(lease.Options{Endpoints: c.Endpoints, CA: c.CA, Cert: c.Cert, Key: c.Key, Prefix: c.Prefix, TTL: c.TTL, Now: deadman.BootTime})
	if err != nil {
		a.log.Error("volumes with a lease wait: etcd can't be asked", "error", err, "advice", "correct what 'lease' names in the configuration, then restart the agent")
		a.leases = noLeases{fmt.Errorf("'lease': %w; correct that, then restart the agent", err)}
		return func() {}
	}
	a.leases = etcdLeases{client}
	return func() { _ = client.Close() }
}
