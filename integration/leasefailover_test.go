package integration

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/lease/etcdtest"
	"blockferry/cmd/blockferry/status"
)

// failoverTTL is that of the leases here: a busy guest has to renew them in time.
const failoverTTL = 10 * time.Second

// leaseTwins are two nodes, and an etcd at node-a.
type leaseTwins struct {
	*twins
	t    *testing.T
	etcd *etcdtest.Etcd
	h    history
}

func newLeaseTwins(t *testing.T) *leaseTwins {
	t.Helper()
	w := madeTwins(t, ubd(0), ubd(1), fmt.Sprintf("lease: {endpoints: [\"http://10.9.0.1:2379\"], insecure: plaintext, ttl: %v}\n", failoverTTL),
		"stall-limit: 3s\n    promote: auto\n    max-loss: 20s")
	l := &leaseTwins{twins: w, t: t, h: history{Seed: 53, Size: twinVolume, MaxBytes: 64 << 10, Span: 8 << 20, Pause: 10 * time.Millisecond}}
	l.etcd = etcdtest.StartAt(t, w.a.inside, "10.9.0.1:2379")
	for _, c := range []*cli{w.a, w.b} {
		socket, _ := startDeadMan(t, c.binary)
		c.agentFlags = []string{"--dead-man-socket", socket}
	}
	w.b.start(t)
	w.a.start(t)
	w.a.await(t, "up to date", 2*time.Minute, upToDate)
	// A volume has one name at all nodes, but these share a kernel. What was adopted is known
	// by its id.
	if err := w.b.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	w.b.edit(t, "  data:", "  twin:")
	w.b.start(t)
	w.a.await(t, "up to date again", time.Minute, upToDate)
	return l
}

// lostWriter writes at a node until that fails, as it does at the end of the node's lease; trouble is
// what happens to the node meanwhile.
func (l *leaseTwins) lostWriter(now, other *cli, device string, at uint64, trouble func()) (w *writer, claimed uint64) {
	l.t.Helper()
	w = startWriter(l.t, device, l.h, at+1)
	w.awaitWrites(l.t, 20)
	var said []claim
	// Longer than from one renewal to the next: who may follow is on record.
	for end := time.Now().Add(failoverTTL * 2 / 5); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		asked := time.Now()
		if v, _, known := now.look(l.t); known && v.Replicas[0].BehindSeconds != nil && !v.Replicas[0].BehindIsMinimum {
			said = append(said, claim{asked, time.Duration(*v.Replicas[0].BehindSeconds * float64(time.Second))})
		}
	}
	trouble()
	struck := time.Now()
	select {
	case <-w.done:
	case <-time.After(time.Minute):
		l.t.Fatal("writes go on though nobody renews the lease")
	}
	if v, _, known := other.look(l.t); known && v.Up {
		l.t.Error("it took over while the old primary wrote")
	}
	l.t.Logf("writes failed %v after that: %v", time.Since(struck).Round(time.Millisecond), w.err)
	if !errors.Is(w.err, unix.EIO) {
		l.t.Errorf("the writer ended with %v", w.err)
	}
	return w, w.claimed(said)
}

// takenOver waits until the other node has taken over, and judges what it holds; since is when the
// last write was acknowledged at the old one.
func (l *leaseTwins) takenOver(then *cli, w *writer, claimed uint64) (v status.Volume, at uint64) {
	l.t.Helper()
	waited := time.Now()
	v = then.await(l.t, "up by itself", time.Minute, func(v status.Volume) bool { return v.Up })
	l.t.Logf("the other node was up %v after the last write of the old one failed", time.Since(waited).Round(time.Millisecond))
	got := judgeDevice(l.t, v.Path, l.h, claimed, w.issued())
	l.t.Logf("%d writes were acknowledged, %d had been claimed, %d are held", w.acked(), claimed, got.K)
	if got.Partial {
		l.t.Errorf("write %d is in halfway", got.K+1)
	}
	return v, got.K
}

// follows waits until a node that was primary follows by itself, and gives up what only it has.
func (l *leaseTwins) follows(now, then *cli) {
	l.t.Helper()
	then.await(l.t, "secondary by itself", time.Minute, func(v status.Volume) bool { return isSecondary(v) && v.Position != nil })
	now.await(l.t, "with a replica", time.Minute, func(v status.Volume) bool {
		return upToDate(v) || strings.Contains(v.Replicas[0].Reason, "split brain")
	})
	if v, _, known := now.look(l.t); known && !upToDate(v) {
		then.must(l.t, "discard")
	}
	now.await(l.t, "up to date", time.Minute, upToDate)
}

// Promise: a volume with a lease is written by one node. That node's agent is stopped while it writes,
// or the node cut off: writes fail before the other node takes over, by itself, with all that status
// had claimed; the old primary follows by itself when it is back. A live lease is not overridden.
func TestLeaseFailover(t *testing.T) {
	inGuest(t, twinGuest(10*time.Minute), func(t *testing.T) {
		l := newLeaseTwins(t)
		a, b := l.a, l.b
		v := a.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		if v.Lease == nil || v.Lease.Holder != "node-a" || v.Lease.SecondsLeft == nil {
			t.Errorf("its lease: %+v", v.Lease)
		}
		b.refused(t, 3, []string{"lease is held by node 'node-a'", "--force does not change that", "blockferry secondary", "within 10s"}, "primary", "--force")

		// The agent is stopped, with all its threads.
		w, claimed := l.lostWriter(a, b, v.Path, 0, func() { _ = a.agent.Process.Signal(syscall.SIGSTOP) })
		a.kill(t) // it holds what a kernel of its own would keep
		removeStack(t, "data")
		v, at := l.takenOver(b, w, claimed)
		a.start(t)
		l.follows(b, a)

		// The node is cut off, from the other and from etcd. Its agent lives, and takes the
		// volume down once the writer has closed it.
		w, claimed = l.lostWriter(b, a, v.Path, at, func() { l.wire.ip("link set wire down") })
		v, at = l.takenOver(a, w, max(claimed, at))
		l.wire.ip("link set wire up")
		l.follows(a, b)

		// A planned switch needs nobody's patience.
		load := startWriter(t, v.Path, l.h, at+1)
		load.awaitWrites(t, 20)
		last := load.stop(t)
		if out := a.must(t, "secondary"); !strings.Contains(out, "nothing is lost") {
			t.Errorf("secondary: %s", out)
		}
		begun := time.Now()
		b.must(t, "primary")
		t.Logf("primary after %v", time.Since(begun).Round(time.Millisecond))
		v = b.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		judgeDevice(t, v.Path, l.h, last, last)
		b.must(t, "down")
		for _, c := range []*cli{a, b} {
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
		}
	})
}
