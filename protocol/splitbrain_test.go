package protocol

import (
	"strings"
	"testing"
)

func TestDivergenceDiscards(t *testing.T) {
	known := func(n int64) ChangedBytes { return ChangedBytes{Known: true, Bytes: n} }
	common := line(1, 10).Tip()
	stayed, took, tookToo, restarted := line(1, 14), line(1, 10, 2, 12), line(1, 10, 3, 13), line(1, 12, 4, 15)
	for _, c := range []struct {
		name             string
		policy           SplitBrain
		primary, replica Lineage
		p, r             ChangedBytes
		want             Side
		rule             string
	}{
		{"none", SplitBrainNone, took, stayed, known(0), known(0), SideNone, "no policy"},
		{"empty", "", took, stayed, known(0), known(0), SideNone, "no policy"},
		{"unknown", "discard-me", took, stayed, known(0), known(0), SideNone, "unknown policy"},
		{"older: the replica stayed", SplitBrainOlder, took, stayed, ChangedBytes{}, ChangedBytes{}, SideReplica, "took over later"},
		{"older: the primary stayed", SplitBrainOlder, stayed, took, ChangedBytes{}, ChangedBytes{}, SidePrimary, "took over later"},
		{"older: the replica stayed, and started again", SplitBrainOlder, took, restarted, ChangedBytes{}, ChangedBytes{}, SideReplica, "took over later"},
		{"older: the primary stayed, and started again", SplitBrainOlder, restarted, took, ChangedBytes{}, ChangedBytes{}, SidePrimary, "took over later"},
		{"older: both took over", SplitBrainOlder, took, tookToo, known(1), known(2), SideNone, "neither went on"},
		{"least: the replica", SplitBrainLeast, took, stayed, known(9), known(8), SideReplica, "the primary changed 9 bytes, the replica 8"},
		{"least: the primary", SplitBrainLeast, took, stayed, known(8), known(9), SidePrimary, "the primary changed 8 bytes"},
		{"least: the same", SplitBrainLeast, took, stayed, known(8), known(8), SideNone, "can't tell"},
		{"least: nothing on either side", SplitBrainLeast, took, stayed, known(0), known(0), SideNone, "can't tell"},
		{"least: the replica's not known", SplitBrainLeast, took, stayed, known(8), ChangedBytes{}, SideNone, "the replica an unknown amount"},
		{"least: the primary's not known", SplitBrainLeast, took, stayed, ChangedBytes{}, known(8), SideNone, "the primary changed an unknown amount"},
		{"zero: the replica", SplitBrainZero, took, stayed, known(9), known(0), SideReplica, "the replica 0 bytes"},
		{"zero: the replica, the primary's not known", SplitBrainZero, took, stayed, ChangedBytes{}, known(0), SideReplica, "the replica 0 bytes"},
		{"zero: the primary", SplitBrainZero, took, stayed, known(0), known(9), SidePrimary, "the primary changed 0 bytes"},
		{"zero: both", SplitBrainZero, took, stayed, known(0), known(0), SideReplica, "the replica 0 bytes"},
		{"zero: none", SplitBrainZero, took, stayed, known(1), known(1), SideNone, "no side without changes"},
		{"zero: not known", SplitBrainZero, took, stayed, ChangedBytes{}, ChangedBytes{}, SideNone, "no side without changes"},
	} {
		side, rule := Divergence{Policy: c.policy, Primary: c.primary, Replica: c.replica, Common: common, PrimaryChanged: c.p, ReplicaChanged: c.r}.Discards()
		if side != c.want || !strings.Contains(rule, c.rule) || !strings.Contains(rule, "split brain") {
			t.Errorf("%s: %v (%s), want %v (%s)", c.name, side, rule, c.want, c.rule)
		}
		if _, err := ParseSplitBrain(string(c.policy)); (err != nil) != (c.name == "unknown") {
			t.Errorf("%s: %v", c.name, err)
		}
		// The sides changed over, the other one gives way; of two without changes the
		// one that would follow.
		back, _ := Divergence{Policy: c.policy, Primary: c.replica, Replica: c.primary, Common: common, PrimaryChanged: c.r, ReplicaChanged: c.p}.Discards()
		if mirror := map[Side]Side{SideNone: SideNone, SidePrimary: SideReplica, SideReplica: SidePrimary}[side]; back != mirror && c.name != "zero: both" {
			t.Errorf("%s: %v, and seen from the other side %v", c.name, side, back)
		}
	}
}
