package protocol

import (
	"strings"
	"testing"
)

// TestFailoverMatrix tells what becomes of two nodes, a and b, in any order of
// events. Up to the moment described a was primary in generation 1 and b its replica; a's last cut
// is 10. Then a is lost or cut off, b takes over in generation 2 or does not, and a comes
// back as what its disk says: the plan is what b, or a, does about the other's copy.
func TestFailoverMatrix(t *testing.T) {
	const (
		clean = iota + 1 // a's end: stood down or taken down in order
		crash            // its disk survived: epoch 11 was open
		cuts             // the link was cut first: it took cuts 11 to 13, and then crashed
		blank            // its disk is lost
	)
	for _, c := range []struct {
		name    string
		aEnd    int
		bHolds  uint64 // the cut that b holds
		heard   bool   // b knows where a was when it was last heard of
		alive   bool   // ... and that it still is
		force   bool
		bState  DiskState // 0: consistent
		wrote   bool      // a's tracker names writes after the cut in question
		tracks  bool      // a's tracker can tell
		restore uint64    // a, blank, is restored from a local replica at this cut first
		given   bool      // the operator gives up what only a has
		policy  SplitBrain
		bTracks bool
		take    string // why b does not take over; empty: it does
		plan    Action
		rule    string
	}{
		// b wants to take over.
		{name: "switchover", aEnd: clean, bHolds: 10, heard: true, tracks: true, bTracks: true, plan: Incremental, rule: "earlier cut"},
		{name: "switchover, b has lost its tracking since", aEnd: clean, bHolds: 10, heard: true, tracks: true, plan: CompareAll, rule: "not known"},
		{name: "b is behind a clean end", aEnd: clean, bHolds: 8, heard: true, take: "may be lost"},
		{name: "b is behind a clean end, forced", aEnd: clean, bHolds: 8, heard: true, force: true, tracks: true, bTracks: true, plan: Refuse, rule: "split brain"},
		{name: "b is behind a clean end, forced, given up", aEnd: clean, bHolds: 8, heard: true, force: true, tracks: true, bTracks: true, given: true, plan: Incremental, rule: "gave up"},
		{name: "b is behind a clean end, forced, given up, a can't tell", aEnd: clean, bHolds: 8, heard: true, force: true, bTracks: true, given: true, plan: CompareAll, rule: "gave up"},
		{name: "a crashed", aEnd: crash, bHolds: 10, heard: true, take: "may be lost"},
		{name: "a crashed, nothing was heard", aEnd: crash, bHolds: 10, take: "not known"},
		{name: "a is alive", aEnd: crash, bHolds: 10, heard: true, alive: true, take: "alive"},
		{name: "a is alive and idle, forced", aEnd: crash, bHolds: 10, heard: true, alive: true, force: true, tracks: true, bTracks: true, plan: Incremental, rule: "earlier cut"},
		{name: "b is inconsistent", aEnd: crash, bHolds: 10, heard: true, bState: DiskInconsistent, take: "no whole image"},
		{name: "b is inconsistent, forced", aEnd: crash, bHolds: 10, heard: true, bState: DiskInconsistent, force: true, take: "no whole image"},
		{name: "b is blank, forced", aEnd: crash, bHolds: 0, heard: true, bState: DiskBlank, force: true, take: "no whole image"},
		// a crashed, b was forced, a comes back with its disk.
		{name: "a wrote nothing more", aEnd: crash, bHolds: 10, force: true, heard: true, tracks: true, bTracks: true, plan: Incremental, rule: "earlier cut"},
		{name: "a wrote nothing more, b has lost its tracking", aEnd: crash, bHolds: 10, force: true, heard: true, tracks: true, plan: CompareAll, rule: "not known"},
		{name: "a wrote", aEnd: crash, bHolds: 10, force: true, tracks: true, wrote: true, bTracks: true, plan: Refuse, rule: "operator decides"},
		{name: "a may have written", aEnd: crash, bHolds: 10, force: true, bTracks: true, plan: Refuse, rule: "operator decides"},
		{name: "a wrote, given up", aEnd: crash, bHolds: 10, force: true, tracks: true, wrote: true, bTracks: true, given: true, plan: Incremental, rule: "gave up"},
		{name: "a wrote, given up, b can't tell", aEnd: crash, bHolds: 10, force: true, tracks: true, wrote: true, given: true, plan: CompareAll, rule: "gave up"},
		{name: "a may have written, given up", aEnd: crash, bHolds: 10, force: true, bTracks: true, given: true, plan: CompareAll, rule: "gave up"},
		{name: "a wrote, older gives way", aEnd: crash, bHolds: 10, force: true, tracks: true, wrote: true, bTracks: true, policy: SplitBrainOlder, plan: Incremental, rule: "discard-older-primary"},
		{name: "a wrote, without changes gives way", aEnd: crash, bHolds: 10, force: true, tracks: true, wrote: true, bTracks: true, policy: SplitBrainZero, plan: Refuse, rule: "no side without changes"},
		{name: "a may have written, without changes gives way", aEnd: crash, bHolds: 10, force: true, bTracks: true, policy: SplitBrainZero, plan: Refuse, rule: "no side without changes"},
		{name: "a wrote less, least gives way", aEnd: crash, bHolds: 10, force: true, tracks: true, wrote: true, bTracks: true, policy: SplitBrainLeast, plan: Incremental, rule: "discard-least-changes"},
		{name: "a may have written, least gives way", aEnd: crash, bHolds: 10, force: true, bTracks: true, policy: SplitBrainLeast, plan: Refuse, rule: "can't tell"},
		{name: "b was behind by two cuts", aEnd: crash, bHolds: 8, force: true, tracks: true, bTracks: true, wrote: true, plan: Refuse, rule: "operator decides"},
		{name: "b was behind by two cuts, given up", aEnd: crash, bHolds: 8, force: true, tracks: true, bTracks: true, wrote: true, given: true, plan: Incremental, rule: "gave up"},
		{name: "b was behind by two cuts, older gives way", aEnd: crash, bHolds: 8, force: true, tracks: true, bTracks: true, wrote: true, policy: SplitBrainOlder, plan: Incremental, rule: "discard-older-primary"},
		// The link was cut, both were written.
		{name: "cut off", aEnd: cuts, bHolds: 10, heard: true, take: "may be lost"},
		{name: "cut off, alive", aEnd: cuts, bHolds: 10, heard: true, alive: true, take: "alive"},
		{name: "cut off, forced", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, wrote: true, plan: Refuse, rule: "operator decides"},
		{name: "cut off, forced, given up", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, wrote: true, given: true, plan: Incremental, rule: "gave up"},
		{name: "cut off, forced, older gives way", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, wrote: true, policy: SplitBrainOlder, plan: Incremental, rule: "discard-older-primary"},
		{name: "cut off, forced, a did nothing in its cuts", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, policy: SplitBrainZero, plan: Incremental, rule: "discard-zero-changes"},
		{name: "cut off, forced, given up, nobody can tell", aEnd: cuts, bHolds: 10, force: true, given: true, plan: CompareAll, rule: "gave up"},
		{name: "cut off earlier, forced, given up", aEnd: cuts, bHolds: 3, force: true, tracks: true, bTracks: true, wrote: true, given: true, plan: Incremental, rule: "gave up"},
		// a's disk is lost.
		{name: "lost", aEnd: blank, bHolds: 10, force: true, bTracks: true, plan: FullCopy, rule: "never synced"},
		{name: "lost, restored from an older cut", aEnd: blank, bHolds: 10, force: true, restore: 7, bTracks: true, plan: Incremental, rule: "earlier cut"},
		{name: "lost, restored from an older cut, b can't tell", aEnd: blank, bHolds: 10, force: true, restore: 7, plan: CompareAll, rule: "not known"},
		{name: "lost, restored from the same cut", aEnd: blank, bHolds: 10, force: true, restore: 10, bTracks: true, plan: Incremental, rule: "earlier cut"},
		{name: "lost, restored from a newer cut", aEnd: blank, bHolds: 8, force: true, restore: 10, bTracks: true, plan: Refuse, rule: "operator decides"},
		{name: "lost, restored from a newer cut, given up", aEnd: blank, bHolds: 8, force: true, restore: 10, bTracks: true, given: true, plan: CompareAll, rule: "gave up"},
		{name: "lost, restored from a newer cut, older gives way", aEnd: blank, bHolds: 8, force: true, restore: 10, bTracks: true, policy: SplitBrainOlder, plan: CompareAll, rule: "discard-older-primary"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// a's label.
			a := SourceState{Lineage: line(1, 10), Generation: gen(1), OpenEpoch: 11}
			switch c.aEnd {
			case clean:
				a = a.Close()
			case cuts:
				a = SourceState{Lineage: line(1, 13), Generation: gen(1), OpenEpoch: 14}
			}
			// b takes over.
			b := ReplicaStatus{State: DiskConsistent, Lineage: line(1, int(c.bHolds))}
			if c.bState != 0 {
				b.State = c.bState
			}
			o := TakeOverOptions{Force: c.force, Fresh: gen(2), Heard: Heard{Alive: c.alive}}
			if c.heard {
				o.Heard.Lineage = a.Effective()
			}
			p, err := PlanTakeOver(b, o)
			if c.take != "" {
				if err == nil || !strings.Contains(err.Error(), c.take) || p.State.OpenEpoch != 0 {
					t.Fatalf("b takes over as %+v, %v; want %q", p.State, err, c.take)
				}
				return
			}
			must(t, err)
			bState, err := p.State.UseEpoch() // it took a cut, and goes on
			must(t, err)
			// a comes back, and stands down.
			in := PlanInput{Primary: bState.Effective(), Disk: DiskBlank, Tracked: c.bTracks, SplitBrain: c.policy, PrimaryChanged: ChangedBytes{c.bTracks, 5 << 20}}
			if c.restore > 0 {
				a, err = FinishRestore(BeginRestore("ebs", line(1, int(c.restore))))
				must(t, err)
			}
			if c.aEnd != blank || c.restore > 0 {
				h, err := PlanStandDown(a, StandDownOptions{Stray: true, Follow: in.Primary, ChangedSince: func(since uint64) ([]Range, error) {
					if !c.tracks {
						return nil, ErrTrackingLost
					}
					if c.wrote {
						return []Range{{0, 4096}}, nil
					}
					return nil, nil
				}})
				must(t, err)
				in.Disk, in.Replica, in.Strayed = DiskConsistent, h.Lineage, h.Strayed
				common := Compare(in.Replica, in.Primary).Common
				in.ReplicaChanged = ChangedBytes{h.Since > 0 && h.Since <= common.Epoch, totalBytes(h.Changed)}
				if c.given {
					in.Discard = h.Lineage.Tip()
				}
			}
			plan := MakePlan(in)
			if plan.Action != c.plan || !strings.Contains(plan.Rule, c.rule) {
				t.Fatalf("%v\nwant %v: %s", plan, c.plan, c.rule)
			}
			if gaveUp := !plan.Discard.IsZero(); gaveUp && plan.InPlace || gaveUp != (c.given || strings.Contains(c.rule, "discard-")) {
				t.Errorf("%v gives up %v, in place %v", plan, plan.Discard, plan.InPlace)
			}
			// What a did as primary has no name that b uses.
			for _, used := range a.Effective() {
				if used.Generation == bState.Generation {
					t.Errorf("generation of %v is both's", used)
				}
			}
		})
	}
}
