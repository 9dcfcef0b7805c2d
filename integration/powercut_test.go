package integration

import (
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// The primary's machine loses its power under load, and comes back with its disk: it finds
// that it was left behind, and does not come up. When the operator has given up what only
// it has, that is in a rescue file, and it follows by what changed.
func TestFailoverPowerCut(t *testing.T) {
	inGuests(t, farMembers(), nodeTasks(), func(t *testing.T, g *guests) {
		a, b := farTwins(g, "", "stall-limit: 20s")
		v := a.await("up", farWait, func(v status.Volume) bool { return v.Up })
		a.writes(v.Path, ofA)
		_, claimed := a.watch(3 * time.Second)
		// The link goes first: what is written from then on nobody else has.
		g.must(g.members["b"].Unplug())
		parted := a.written().Acked
		acked := a.acked(parted + 20)
		g.members["a"].Cut()
		g.must(g.members["b"].Plug())

		b.await("not fed any more", farWait, func(v status.Volume) bool { return isSecondary(v) && v.FedBy == "" })
		b.refused([]string{"writes may be lost", "force it", "does not say where it stands"}, "primary")
		if out := b.run("primary", "--force"); !strings.Contains(out, "what was written after the copy's cut is lost") {
			t.Errorf("it does not say what is lost: %s", out)
		}
		v = b.await("up", farWait, func(v status.Volume) bool { return v.Up })
		held := b.holds(v.Path, ofA, claimed, parted+1)
		if held.Partial {
			t.Errorf("write %d is in halfway", held.K+1)
		}
		g.logf("at least %d writes were acknowledged, %d had been claimed, %d are held", acked, claimed, held.K)
		b.writes(v.Path, ofB)

		g.boot("a")
		a.begin(false)
		s := a.await("out of date", farWait, func(v status.Volume) bool { return strings.Contains(v.Reason, "out of date") })
		if s.Up || !strings.Contains(s.Advice, "blockferry secondary") {
			t.Errorf("the old primary: %+v", s)
		}
		a.refused([]string{"out of date"}, "up")
		a.refused([]string{"secondary --force"}, "secondary")
		if out := a.run("secondary", "--force"); !strings.Contains(out, "written as primary after its last cut") {
			t.Errorf("it strays: %s", out)
		}
		b.await("aware of it", farWait, func(v status.Volume) bool { return strings.Contains(v.Replicas[0].Reason, "split brain") })
		var there written
		b.ask("b", "stop", none{}, &there)
		var before, after string
		b.ask("b", "log", none{}, &before)
		if a.kept(b, ofA, held.Latest+1, acked) == 0 {
			t.Error("node-a had nothing of its own: that was no test")
		}
		b.run("sync", "--wait", "--timeout", "60s")
		b.run("verify")
		b.ask("b", "log", none{}, &after)
		if log := after[len(before):]; plans(log, "full")+plans(log, "compare") > 0 || plans(log, "incremental") == 0 {
			t.Errorf("the old primary did not come back by what changed")
		}
		b.holds(v.Path, ofA, held.K, held.K)
		b.holds(v.Path, ofB, there.Acked, there.Acked)
	})
}
