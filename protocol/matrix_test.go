package protocol

import (
	"strings"
	"testing"
)

// How a's time as primary ends, in a failoverRow.
const (
	clean     = iota + 1 // stood down or taken down in order, at cut 10
	crash                // its disk survived: epoch 11 was open
	cuts                 // the link was cut first: it took cuts 11 to 13, and then crashed
	blank                // its disk is lost
	cutsBlank            // cuts, and its disk is lost
)

// failoverRow is what happens to two nodes, a and b, and what becomes of that. Up to the
// end of a's time a was primary in generation 1 and b its replica; a's last cut is 10, or 13. Then b
// takes over in generation 2 or does not, is written, and a comes back as what its disk
// says: the plan is what the one that is primary then does about the other's copy.
type failoverRow struct {
	name    string
	aEnd    int
	bHolds  uint64 // the cut that b holds
	heard   bool   // b knows where a was when it was last heard of
	alive   bool   // ... and that it still is
	force   bool
	bState  DiskState // 0: consistent
	wrote   bool      // a was written after the cut in question
	tracks  bool      // a's tracker can tell
	restore uint64    // a, blank, is restored from a local replica at this cut first
	half    bool      // ... and that ends halfway
	up      bool      // ... and is primary for a while then, in generation 5; wrote is of that
	bTracks bool
	bCrash  bool // b crashes and goes on in generation 4
	bGives  bool // in the end it is b that stands down; a goes on in generation 3
	given   bool // the operator gives up what only the replica has
	policy  SplitBrain
	take    string // why b does not take over, and follows a as before; empty: it does
	plan    Action
	rule    string
}

// mayWrite says whether a may have been written after the cut in question, as far as anybody knows.
func (c failoverRow) mayWrite() bool {
	return c.wrote || !c.tracks && (c.aEnd == crash || c.aEnd == cuts)
}

var failoverRows = []failoverRow{
	// b wants to take over.
	{name: "switchover", aEnd: clean, bHolds: 10, heard: true, tracks: true, bTracks: true, plan: Incremental, rule: "earlier cut"},
	{name: "switchover, b has lost its tracking since", aEnd: clean, bHolds: 10, heard: true, tracks: true, plan: CompareAll, rule: "not known"},
	{name: "b is behind a clean end", aEnd: clean, bHolds: 8, heard: true, take: "may be lost", tracks: true, plan: Incremental, rule: "earlier cut"},
	{name: "b is behind a clean end, forced", aEnd: clean, bHolds: 8, heard: true, force: true, wrote: true, tracks: true, bTracks: true, plan: Refuse, rule: "split brain"},
	{name: "b is behind a clean end, forced, given up", aEnd: clean, bHolds: 8, heard: true, force: true, tracks: true, bTracks: true, given: true, plan: Incremental, rule: "gave up"},
	{name: "b is behind a clean end, forced, given up, a can't tell", aEnd: clean, bHolds: 8, heard: true, force: true, bTracks: true, given: true, plan: CompareAll, rule: "gave up"},
	{name: "a crashed", aEnd: crash, bHolds: 10, heard: true, take: "may be lost", tracks: true, wrote: true, plan: Incremental, rule: "earlier cut"},
	{name: "a crashed, nothing was heard", aEnd: crash, bHolds: 10, take: "not known", plan: CompareAll, rule: "not known"},
	{name: "a is alive", aEnd: crash, bHolds: 10, heard: true, alive: true, take: "alive", tracks: true, wrote: true, plan: Incremental, rule: "earlier cut"},
	{name: "a is alive and idle, forced", aEnd: crash, bHolds: 10, heard: true, alive: true, force: true, tracks: true, bTracks: true, plan: Incremental, rule: "earlier cut"},
	{name: "b is inconsistent", aEnd: crash, bHolds: 10, heard: true, bState: DiskInconsistent, take: "no whole image", tracks: true, wrote: true, plan: Incremental, rule: "catch-up in place was begun"},
	{name: "b is inconsistent, forced", aEnd: crash, bHolds: 10, heard: true, bState: DiskInconsistent, force: true, take: "no whole image", plan: CompareAll, rule: "not known"},
	{name: "b is blank, forced", aEnd: crash, bHolds: 0, heard: true, bState: DiskBlank, force: true, take: "no whole image", tracks: true, wrote: true, plan: FullCopy, rule: "never synced"},
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
	{name: "cut off", aEnd: cuts, bHolds: 10, heard: true, take: "may be lost", tracks: true, wrote: true, plan: Incremental, rule: "earlier cut"},
	{name: "cut off, alive", aEnd: cuts, bHolds: 10, heard: true, alive: true, take: "alive", tracks: true, wrote: true, plan: Incremental, rule: "earlier cut"},
	{name: "cut off, forced", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, wrote: true, plan: Refuse, rule: "operator decides"},
	{name: "cut off, forced, given up", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, wrote: true, given: true, plan: Incremental, rule: "gave up"},
	{name: "cut off, forced, older gives way", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, wrote: true, policy: SplitBrainOlder, plan: Incremental, rule: "discard-older-primary"},
	{name: "cut off, forced, a did nothing in its cuts", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, policy: SplitBrainZero, plan: Incremental, rule: "discard-zero-changes"},
	{name: "cut off, forced, given up, nobody can tell", aEnd: cuts, bHolds: 10, force: true, given: true, plan: CompareAll, rule: "gave up"},
	{name: "cut off earlier, forced, given up", aEnd: cuts, bHolds: 3, force: true, tracks: true, bTracks: true, wrote: true, given: true, plan: Incremental, rule: "gave up"},
	{name: "cut off, forced, the older one goes on", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, wrote: true, bGives: true, policy: SplitBrainOlder, plan: Refuse, rule: "would have to give way"},
	// b crashed, too, and goes on in another generation.
	{name: "switchover, b crashed since", aEnd: clean, bHolds: 10, heard: true, tracks: true, bTracks: true, bCrash: true, plan: Incremental, rule: "earlier cut"},
	{name: "a wrote nothing more, b crashed since", aEnd: crash, bHolds: 10, force: true, tracks: true, bTracks: true, bCrash: true, plan: Incremental, rule: "earlier cut"},
	{name: "a wrote, both crashed", aEnd: crash, bHolds: 10, force: true, tracks: true, wrote: true, bTracks: true, bCrash: true, plan: Refuse, rule: "operator decides"},
	{name: "a wrote, both crashed, given up", aEnd: crash, bHolds: 10, force: true, tracks: true, wrote: true, bTracks: true, bCrash: true, given: true, plan: Incremental, rule: "gave up"},
	{name: "a wrote, both crashed, given up, b has lost its tracking", aEnd: crash, bHolds: 10, force: true, tracks: true, wrote: true, bCrash: true, given: true, plan: CompareAll, rule: "gave up"},
	// It is a that goes on in the end, and what b wrote gives way.
	{name: "cut off, forced, b stands down", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, wrote: true, bGives: true, plan: Refuse, rule: "operator decides"},
	{name: "cut off, forced, b is given up", aEnd: cuts, bHolds: 10, force: true, tracks: true, bTracks: true, wrote: true, bGives: true, given: true, plan: Incremental, rule: "gave up"},
	{name: "cut off, forced, b is given up, nobody can tell", aEnd: cuts, bHolds: 10, force: true, bGives: true, given: true, plan: CompareAll, rule: "gave up"},
	{name: "a crashed, forced, b is given up", aEnd: crash, bHolds: 8, force: true, tracks: true, bTracks: true, wrote: true, bGives: true, given: true, plan: Incremental, rule: "gave up"},
	// a's disk is lost.
	{name: "lost", aEnd: blank, bHolds: 10, force: true, bTracks: true, plan: FullCopy, rule: "never synced"},
	{name: "lost, restored from an older cut", aEnd: blank, bHolds: 10, force: true, restore: 7, bTracks: true, plan: Incremental, rule: "earlier cut"},
	{name: "lost, restored from an older cut, b can't tell", aEnd: blank, bHolds: 10, force: true, restore: 7, plan: CompareAll, rule: "not known"},
	{name: "lost, restored from the same cut", aEnd: blank, bHolds: 10, force: true, restore: 10, bTracks: true, plan: Incremental, rule: "earlier cut"},
	{name: "lost, restored from a newer cut", aEnd: blank, bHolds: 8, force: true, restore: 10, bTracks: true, plan: Refuse, rule: "operator decides"},
	{name: "lost, restored from a newer cut, given up", aEnd: blank, bHolds: 8, force: true, restore: 10, bTracks: true, given: true, plan: CompareAll, rule: "gave up"},
	{name: "lost, restored from a newer cut, older gives way", aEnd: blank, bHolds: 8, force: true, restore: 10, bTracks: true, policy: SplitBrainOlder, plan: CompareAll, rule: "discard-older-primary"},
	{name: "lost, restored from a far older cut", aEnd: blank, bHolds: 10, force: true, restore: 2, bTracks: true, plan: Incremental, rule: "earlier cut"},
	{name: "lost, restored from an older cut, b crashed since", aEnd: blank, bHolds: 10, force: true, restore: 7, bTracks: true, bCrash: true, plan: Incremental, rule: "earlier cut"},
	{name: "lost, restored from the same cut, b can't tell", aEnd: blank, bHolds: 10, force: true, restore: 10, plan: CompareAll, rule: "not known"},
	{name: "lost, restored from a newer cut, b can't tell, given up", aEnd: blank, bHolds: 8, force: true, restore: 10, given: true, plan: CompareAll, rule: "gave up"},
	{name: "lost, restored from a newer cut, without changes gives way", aEnd: blank, bHolds: 8, force: true, restore: 10, bTracks: true, policy: SplitBrainZero, plan: Refuse, rule: "no side without changes"},
	{name: "lost, restored from a newer cut, least gives way", aEnd: blank, bHolds: 8, force: true, restore: 10, bTracks: true, policy: SplitBrainLeast, plan: Refuse, rule: "can't tell"},
	{name: "lost, restored from a newer cut, b is given up", aEnd: blank, bHolds: 8, force: true, restore: 10, bTracks: true, bGives: true, given: true, plan: CompareAll, rule: "gave up"},
	{name: "lost, restored from what it cut when cut off", aEnd: cutsBlank, bHolds: 10, force: true, wrote: true, restore: 13, bTracks: true, plan: Refuse, rule: "operator decides"},
	{name: "lost, restored from what it cut when cut off, given up", aEnd: cutsBlank, bHolds: 10, force: true, wrote: true, restore: 13, bTracks: true, given: true, plan: CompareAll, rule: "gave up"},
	{name: "lost, restored from before what it cut when cut off", aEnd: cutsBlank, bHolds: 10, force: true, wrote: true, restore: 9, bTracks: true, plan: Incremental, rule: "earlier cut"},
	{name: "lost, the restore was cut off", aEnd: blank, bHolds: 10, force: true, restore: 7, half: true, bTracks: true, plan: FullCopy, rule: "never synced"},
	// It was written again once it was restored.
	{name: "restored from the same cut, up, not written", aEnd: blank, bHolds: 10, force: true, restore: 10, up: true, tracks: true, bTracks: true, plan: Incremental, rule: "earlier cut"},
	{name: "restored from the same cut, up, written", aEnd: blank, bHolds: 10, force: true, restore: 10, up: true, tracks: true, wrote: true, bTracks: true, plan: Refuse, rule: "operator decides"},
	{name: "restored from the same cut, up, written, given up", aEnd: blank, bHolds: 10, force: true, restore: 10, up: true, tracks: true, wrote: true, bTracks: true, given: true, plan: Incremental, rule: "gave up"},
	{name: "restored from an older cut, up, written", aEnd: blank, bHolds: 10, force: true, restore: 7, up: true, tracks: true, wrote: true, bTracks: true, plan: Refuse, rule: "operator decides"},
	{name: "restored from an older cut, up, written, given up", aEnd: blank, bHolds: 10, force: true, restore: 7, up: true, tracks: true, wrote: true, bTracks: true, given: true, plan: Incremental, rule: "gave up"},
	{name: "restored from a newer cut, up, written, given up", aEnd: blank, bHolds: 8, force: true, restore: 10, up: true, tracks: true, wrote: true, bTracks: true, given: true, plan: CompareAll, rule: "gave up"},
}

// TestFailoverMatrix tells what becomes of two nodes in any order of events: by plan alone, and
// then with real copies on disks in memory, what each holds in the end.
func TestFailoverMatrix(t *testing.T) {
	for _, c := range failoverRows {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			in := c.decide(t)
			plan := MakePlan(in)
			if plan.Action != c.plan || !strings.Contains(plan.Rule, c.rule) {
				t.Fatalf("%v\nwant %v: %s", plan, c.plan, c.rule)
			}
			if gaveUp := !plan.Discard.IsZero(); gaveUp && plan.InPlace || gaveUp != (c.plan != Refuse && (c.given || c.policy != "")) {
				t.Errorf("%v gives up %v, in place %v", plan, plan.Discard, plan.InPlace)
			}
			c.withBytes(t, in, plan)
		})
	}
}

// decide tells from what the plan is made in the end.
func (c failoverRow) decide(t *testing.T) (in PlanInput) {
	// a's label.
	a := SourceState{Lineage: line(1, 10), Generation: gen(1), OpenEpoch: 11}
	switch c.aEnd {
	case clean:
		a = a.Close()
	case cuts, cutsBlank:
		a = SourceState{Lineage: line(1, 13), Generation: gen(1), OpenEpoch: 14}
	}
	// b takes over.
	b := ReplicaStatus{State: DiskConsistent, Lineage: line(1, int(c.bHolds))}
	if c.bState != 0 {
		b.State = c.bState
	}
	if b.State == DiskBlank {
		b.Lineage = nil
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
		if !c.alive {
			a, _, err = StartPrimary(a, gen(3))
			must(t, err)
		}
		return PlanInput{Primary: a.Effective(), Replica: b.Lineage, Disk: b.State, Tracked: c.tracks}
	}
	must(t, err)
	bState, err := p.State.UseEpoch() // it took a cut, and goes on
	must(t, err)
	if c.bCrash {
		bState, _, err = StartPrimary(bState, gen(4))
		must(t, err)
	}
	// a comes back.
	if c.restore > 0 {
		a = BeginRestore("ebs", line(1, int(c.restore)))
		if !c.half {
			a, err = FinishRestore(a)
			must(t, err)
		}
	}
	if c.up {
		a, _, err = StartPrimary(a, gen(5))
		must(t, err)
	}
	// What a did as primary has no name that b uses.
	for _, used := range a.Effective() {
		if used.Generation == bState.Generation {
			t.Errorf("generation of %v is both's", used)
		}
	}
	lost := (c.aEnd == blank || c.aEnd == cutsBlank) && c.restore == 0 || c.half
	if !lost && !c.up && !Superseded(a.Effective(), bState.Effective()) {
		t.Errorf("b took over with [%v], and a at [%v] would be primary again", bState.Effective(), a.Effective())
	}
	in = PlanInput{Primary: bState.Effective(), Disk: DiskBlank, Tracked: c.bTracks, SplitBrain: c.policy, PrimaryChanged: ChangedBytes{c.bTracks, 5 << 20}}
	stands, tracks, since := a, c.tracks, c.restore
	if c.bGives {
		a, _, err = StartPrimary(a, gen(3))
		must(t, err)
		stands, tracks, since = bState, c.bTracks, p.State.Lineage.Tip().Epoch
		in.Primary, in.Tracked, in.PrimaryChanged.Known = a.Effective(), c.tracks, c.tracks
	}
	if lost {
		return in
	}
	// One stands down.
	h, err := PlanStandDown(stands, StandDownOptions{Stray: true, Follow: in.Primary, ChangedSince: func(asked uint64) ([]Range, error) {
		switch {
		case !tracks || asked < since:
			return nil, ErrTrackingLost
		case c.wrote || c.bGives:
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
	return in
}
