package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/lease/etcdtest"
	"blockferry/cmd/blockferry/status"
	"blockferry/integration/vm"
)

// Promise: a volume with a lease is written by one node, also when the one that has it is
// paused for longer than the lease, as a machine that sleeps. The other takes over by
// itself; the first goes on into a lease that is another's: its writes fail, it stands
// down, and what only it has is kept apart.
//
// To a guest of User-Mode Linux whose processes are stopped this is a sleep: its clocks,
// CLOCK_BOOTTIME and that of its timers, have gone on (TestSet of package uml measures that).
// Timers that ran out meanwhile fire in one go, the writer's and the dead-man's, in no
// order that helps.
func TestLeasePaused(t *testing.T) {
	inGuests(t, farMembers(), nodeTasks(), func(t *testing.T, g *guests) { leasePaused(t, g, false) })
}

// The same where the paused guest's clocks stood still as well. It can't know that its lease
// is over before it asks, so it may write on until its next renewal, and in any case not
// longer than its deadline by its own clock: to its own disk alone, and all of that is kept.
func TestLeasePausedUnaware(t *testing.T) {
	members := farMembers()
	members[0].OwnClock = true
	inGuests(t, members, nodeTasks(), func(t *testing.T, g *guests) { leasePaused(t, g, true) })
}

func leasePaused(t *testing.T, g *guests, unaware bool) {
	// At a place that is not paused.
	address := vm.HostAddress + ":2379"
	etcdtest.StartAt(t, g.set.Network.Inside(), address)
	a, b := farTwins(g, fmt.Sprintf("lease: {endpoints: [\"http://%s\"], insecure: plaintext, ttl: %v}\n", address, failoverTTL),
		"stall-limit: 3s\n    promote: auto\n    max-loss: 20s")
	v := a.await("up with its lease", farWait, func(v status.Volume) bool { return v.Up && v.Lease != nil && v.Lease.Holder == "node-a" })
	a.writes(v.Path, ofA)
	seen, claimed := a.watch(failoverTTL * 2 / 5) // from one renewal to the next, and longer: who may follow is on record

	g.must(g.members["a"].Pause())
	paused := time.Now()
	v = b.await("up by itself", farWait, func(v status.Volume) bool { return v.Up })
	up := time.Since(paused)
	if v.Lease == nil || v.Lease.Holder != "node-b" {
		t.Errorf("its lease: %+v", v.Lease)
	}
	held := b.holds(v.Path, ofA, claimed, anyWrite)
	if held.Partial {
		t.Errorf("write %d is in halfway", held.K+1)
	}
	b.writes(v.Path, ofB)

	goOn := g.members["a"].Continue
	if unaware {
		goOn = g.members["a"].ContinueUnaware
	}
	resumed := time.Now()
	g.must(goOn())
	var own written
	for own = a.written(); !own.Done; own = a.written() {
		time.Sleep(10 * time.Millisecond)
		if time.Since(resumed) > time.Minute {
			t.Fatal("writes go on though another node has the lease")
		}
	}
	answered := time.Now()
	if !strings.Contains(own.Err, "input/output error") {
		t.Errorf("its writer ended with '%s'", own.Err)
	}
	// Its dead-man tells it a moment later; or the agent was sooner, and took the volume down.
	deadMan := ""
	for !strings.Contains(deadMan, "the lease of a volume has ended: everything on it fails") && !strings.Contains(deadMan, "the lease of a volume has ended that is gone") {
		if a.ask("a", "dead-man", none{}, &deadMan); time.Since(answered) > time.Minute {
			t.Fatalf("its dead-man knows nothing of the lease's end: %s", deadMan)
		}
	}
	// By the host's clock. Between the two kinds of writes lies the pause.
	edge, hidden := paused.Add(up/2), time.Duration(0)
	if unaware {
		edge, hidden = resumed, resumed.Sub(paused)
	}
	var last time.Time
	late, lasted := 0, time.Duration(0)
	for _, ago := range own.Ended {
		if at := answered.Add(-ago); at.Before(edge) {
			last = at.Add(-hidden)
		} else {
			late++
			lasted = at.Sub(resumed)
		}
	}
	var other written
	asked := time.Now()
	b.ask("b", "stop", none{}, &other)
	first := asked.Add(-other.Begun)
	g.logf("node-b was up %v after the pause began, which took %v; its first write began %v after the last of node-a", up.Round(time.Millisecond),
		resumed.Sub(paused).Round(time.Millisecond), first.Sub(last).Round(time.Millisecond))
	g.logf("node-a acknowledged %d writes, %d had been claimed, %d are held; %d were acknowledged after the pause, the last within %v", own.Acked, claimed, held.K,
		late, lasted.Round(time.Millisecond))
	if !first.After(last) {
		t.Errorf("node-b wrote %v before node-a's last write was acknowledged", last.Sub(first))
	}
	// Until the dead-man is scheduled the one that was in the middle may be, and, as the
	// guest does not preempt, those that the writer can make before its turn.
	limit := leaseSlack
	if unaware {
		limit += failoverTTL * 4 / 5
	}
	if lasted > limit {
		t.Errorf("%d writes were acknowledged after the pause, the last %v after it", late, lasted)
	}
	if own.Acked < seen || held.K > own.Issued {
		t.Errorf("%d writes were acknowledged, %d issued, %d seen, %d are held", own.Acked, own.Issued, seen, held.K)
	}

	// It says so, and follows, as far as nothing is lost by that.
	s := a.await("secondary by itself", farWait, func(v status.Volume) bool { return isSecondary(v) && v.Position != nil })
	if s.Up || s.Lease == nil || s.Lease.Holder != "node-b" {
		t.Errorf("the old primary: %+v, its lease %+v", s, s.Lease)
	}
	a.refused([]string{"lease is held by node 'node-b'"}, "primary", "--force")
	// Where the pause came just after a cut it may have nothing of its own.
	split := !upToDate(b.await("followed, or aware of what only node-a has", farWait, func(v status.Volume) bool {
		return upToDate(v) || strings.Contains(v.Replicas[0].Reason, "split brain")
	}))
	b.holds(v.Path, ofA, held.K, held.K)
	b.holds(v.Path, ofB, other.Acked, other.Acked)
	if split {
		a.kept(b, ofA, held.Latest+1, own.Acked)
	} else if own.Acked > held.Latest {
		t.Errorf("it follows, and its own writes, %d to %d, nobody gave up", held.Latest+1, own.Acked)
	}
	b.run("verify")
	b.holds(v.Path, ofA, held.K, held.K)
	b.holds(v.Path, ofB, other.Acked, other.Acked)
}
