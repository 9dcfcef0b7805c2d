package protocol

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
)

func TestMakePlan(t *testing.T) {
	primary := line(1, 10, 2, 15)
	for _, c := range []struct {
		name string
		in   PlanInput
		want Plan // Rule: a piece of it
	}{
		{"blank", PlanInput{Disk: DiskBlank}, Plan{Action: FullCopy, InPlace: true, Rule: "never synced"}},
		{"blank with a history", PlanInput{Disk: DiskBlank, Replica: line(1, 3)}, Plan{Action: Refuse, Rule: "names one"}},
		{"first sync broken off", PlanInput{Disk: DiskInconsistent}, Plan{Action: CompareAll, InPlace: true, Rule: "first sync"}},
		{"consistent without a history", PlanInput{Disk: DiskConsistent}, Plan{Action: Refuse, Rule: "no history in common"}},
		{"same", PlanInput{Disk: DiskConsistent, Replica: primary}, Plan{Action: Nothing, Since: 15, Rule: "same cut"}},
		{"same but inconsistent", PlanInput{Disk: DiskInconsistent, Replica: primary}, Plan{Action: CompareAll, InPlace: true, Rule: "not finished"}},
		{"behind, tracked", PlanInput{Disk: DiskConsistent, Replica: line(1, 7), Tracked: true}, Plan{Action: Incremental, Since: 7, Rule: "is known"}},
		{"behind, not tracked", PlanInput{Disk: DiskConsistent, Replica: line(1, 7)}, Plan{Action: CompareAll, Rule: "not known"}},
		{"behind, journal too small", PlanInput{Disk: DiskConsistent, Replica: line(1, 7), Tracked: true, JournalTooSmall: true}, Plan{Action: Incremental, Since: 7, Rule: "is known"}},
		{"behind, in place allowed but not needed", PlanInput{Disk: DiskConsistent, Replica: line(1, 7), Tracked: true, CatchUpInPlace: true}, Plan{Action: Incremental, Since: 7, Rule: "is known"}},
		{"behind, in place needed and allowed", PlanInput{Disk: DiskConsistent, Replica: line(1, 7), Tracked: true, CatchUpInPlace: true, JournalTooSmall: true}, Plan{Action: Incremental, Since: 7, InPlace: true, Rule: "is known"}},
		{"catch-up broken off, tracked", PlanInput{Disk: DiskInconsistent, Replica: line(1, 7), Tracked: true}, Plan{Action: Incremental, Since: 7, InPlace: true, Rule: "not finished"}},
		{"catch-up broken off, not tracked", PlanInput{Disk: DiskInconsistent, Replica: line(1, 7)}, Plan{Action: CompareAll, InPlace: true, Rule: "not known"}},
		{"catch-up broken off, changed outside", PlanInput{Disk: DiskInconsistent, NeedsFull: true, Replica: line(1, 7), Tracked: true}, Plan{Action: CompareAll, InPlace: true, Rule: "not what it last"}},
		{"ahead", PlanInput{Disk: DiskConsistent, Replica: line(1, 10, 2, 16), Tracked: true, AllowUnrelated: true}, Plan{Action: Refuse, Rule: "ahead"}},
		{"diverged", PlanInput{Disk: DiskConsistent, Replica: line(1, 11), Tracked: true, AllowUnrelated: true}, Plan{Action: Refuse, Rule: "split brain"}},
		{"diverged, inconsistent", PlanInput{Disk: DiskInconsistent, Replica: line(1, 11), Tracked: true, AllowUnrelated: true}, Plan{Action: Refuse, Rule: "split brain"}},
		{"diverged, given up", PlanInput{Disk: DiskConsistent, Replica: line(1, 11), Tracked: true, Discard: line(1, 11).Tip(), ReplicaChanged: ChangedBytes{true, 5}},
			Plan{Action: Incremental, Since: 10, Discard: line(1, 11).Tip(), Rule: "operator gave up"}},
		{"diverged, given up, the journal is too small", PlanInput{Disk: DiskConsistent, Replica: line(1, 11), Tracked: true, Discard: line(1, 11).Tip(), CatchUpInPlace: true, JournalTooSmall: true},
			Plan{Action: CompareAll, Discard: line(1, 11).Tip(), Rule: "operator gave up"}},
		{"diverged, given up, its changes not known", PlanInput{Disk: DiskConsistent, Replica: line(1, 11), Tracked: true, Discard: line(1, 11).Tip()},
			Plan{Action: CompareAll, Discard: line(1, 11).Tip(), Rule: "not known of both"}},
		{"diverged, given up, ours not known", PlanInput{Disk: DiskConsistent, Replica: line(1, 11), Discard: line(1, 11).Tip(), ReplicaChanged: ChangedBytes{true, 5}},
			Plan{Action: CompareAll, Discard: line(1, 11).Tip(), Rule: "not known of both"}},
		{"diverged, given up where it was before", PlanInput{Disk: DiskConsistent, Replica: line(1, 11), Tracked: true, Discard: line(1, 12).Tip()}, Plan{Action: Refuse, Rule: "split brain"}},
		{"diverged, given up, not whole", PlanInput{Disk: DiskInconsistent, Replica: line(1, 11), Discard: line(1, 11).Tip()}, Plan{Action: Refuse, Rule: "not whole"}},
		{"diverged, given up, changed outside", PlanInput{Disk: DiskConsistent, NeedsFull: true, Replica: line(1, 11), Discard: line(1, 11).Tip()}, Plan{Action: Refuse, Rule: "not whole"}},
		{"diverged, policy", PlanInput{Disk: DiskConsistent, Replica: line(1, 11), Tracked: true, SplitBrain: SplitBrainOlder, ReplicaChanged: ChangedBytes{true, 5}},
			Plan{Action: Incremental, Since: 10, Discard: line(1, 11).Tip(), Rule: "discard-older-primary"}},
		{"diverged, the policy is against the primary", PlanInput{Disk: DiskConsistent, Replica: line(1, 11), SplitBrain: SplitBrainLeast, PrimaryChanged: ChangedBytes{true, 4}, ReplicaChanged: ChangedBytes{true, 5}},
			Plan{Action: Refuse, Rule: "the primary would have to give way"}},
		{"diverged, the operator is against the policy", PlanInput{Disk: DiskConsistent, Replica: line(1, 11), SplitBrain: SplitBrainLeast, Discard: line(1, 11).Tip(), PrimaryChanged: ChangedBytes{true, 4}, ReplicaChanged: ChangedBytes{true, 5}},
			Plan{Action: CompareAll, Discard: line(1, 11).Tip(), Rule: "operator gave up"}},
		{"behind, yet strayed", PlanInput{Disk: DiskConsistent, Strayed: "written", Replica: line(1, 7), Tracked: true, ReplicaChanged: ChangedBytes{true, 0}}, Plan{Action: Refuse, Rule: "no policy"}},
		{"same, yet strayed", PlanInput{Disk: DiskConsistent, Strayed: "written", Replica: primary, Tracked: true}, Plan{Action: Refuse, Rule: "no policy"}},
		{"strayed, given up", PlanInput{Disk: DiskConsistent, Strayed: "written", Replica: line(1, 7), Tracked: true, Discard: line(1, 7).Tip(), ReplicaChanged: ChangedBytes{true, 5}},
			Plan{Action: Incremental, Since: 7, Discard: line(1, 7).Tip(), Rule: "operator gave up"}},
		{"strayed and unrelated, allowed", PlanInput{Disk: DiskConsistent, Strayed: "written", Replica: line(9, 11), AllowUnrelated: true, Discard: line(9, 11).Tip()}, Plan{Action: Refuse, Rule: "no history in common"}},
		{"unrelated, given up", PlanInput{Disk: DiskConsistent, Replica: line(9, 11), Discard: line(9, 11).Tip()}, Plan{Action: Refuse, Rule: "no history in common"}},
		{"unrelated", PlanInput{Disk: DiskConsistent, Replica: line(9, 11), Tracked: true}, Plan{Action: Refuse, Rule: "no history in common"}},
		{"unrelated, allowed", PlanInput{Disk: DiskConsistent, Replica: line(9, 11), Tracked: true, AllowUnrelated: true}, Plan{Action: CompareAll, InPlace: true, Overwrite: true, Rule: "operator"}},
		{"malformed", PlanInput{Disk: DiskConsistent, Replica: line(9, 11, 9, 12), AllowUnrelated: true}, Plan{Action: Refuse, Rule: "malformed"}},
		{"unknown state", PlanInput{Replica: line(1, 7), Tracked: true}, Plan{Action: Refuse, Rule: "unknown state"}},
	} {
		c.in.Primary = primary
		got := MakePlan(c.in)
		if got.Action != c.want.Action || got.Since != c.want.Since || got.InPlace != c.want.InPlace ||
			got.Overwrite != c.want.Overwrite || got.Discard != c.want.Discard || !strings.Contains(got.Rule, c.want.Rule) {
			t.Errorf("%s: %v since %d in place %v overwrite %v\nwant %+v", c.name, got, got.Since, got.InPlace, got.Overwrite, c.want)
		}
		var refused *PlanRefusedError
		if errors.As(got.Err(), &refused) != (got.Action == Refuse) {
			t.Errorf("%s: Err() = %v", c.name, got.Err())
		}
		if got.Action == Refuse && (!strings.Contains(got.Err().Error(), c.in.Replica.Tip().String()) || !strings.Contains(got.Err().Error(), primary.Tip().String())) {
			t.Errorf("%s: the refusal does not name both positions: %v", c.name, got.Err())
		}
	}
}

// Whatever the input: a replica that holds something the primary does not is
// not written, a consistent one is not written in place without the operator's
// word, and what is unknown is never 'nothing' or incremental.
func TestMakePlanNeverDestroys(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	for seed := range uint64(30) {
		all := growHistory(rand.New(rand.NewPCG(seed, 2)), 40)
		for range 2000 {
			a, b := all[rng.IntN(len(all))], all[rng.IntN(len(all))]
			in := PlanInput{Primary: a.line, Replica: b.line, Disk: DiskState(rng.IntN(5)), Tracked: rng.IntN(2) == 0, NeedsFull: rng.IntN(4) == 0,
				AllowUnrelated: rng.IntN(2) == 0, CatchUpInPlace: rng.IntN(2) == 0, JournalTooSmall: rng.IntN(2) == 0,
				SplitBrain:     []SplitBrain{SplitBrainNone, SplitBrainOlder, SplitBrainLeast, SplitBrainZero}[rng.IntN(4)],
				PrimaryChanged: ChangedBytes{rng.IntN(2) == 0, rng.Int64N(3)}, ReplicaChanged: ChangedBytes{rng.IntN(2) == 0, rng.Int64N(3)}}
			if rng.IntN(4) == 0 {
				in.Strayed = "written"
			}
			if rng.IntN(4) == 0 {
				in.Discard = all[rng.IntN(len(all))].pos
			}
			p := MakePlan(in)
			if !p.Discard.IsZero() {
				side, _ := Divergence{Policy: in.SplitBrain, Primary: in.Primary, Replica: in.Replica, Common: Compare(a.line, b.line).Common,
					PrimaryChanged: in.PrimaryChanged, ReplicaChanged: in.ReplicaChanged}.Discards()
				if p.Action != CompareAll && p.Action != Incremental || p.InPlace || p.Overwrite || p.Discard != b.pos || in.Disk != DiskConsistent || in.NeedsFull {
					t.Fatalf("%+v: %v gives up %v", in, p, p.Discard)
				}
				if side != SideReplica && in.Discard != b.pos {
					t.Fatalf("%+v: %v gives up %v without a word", in, p, p.Discard)
				}
				if p.Action == Incremental && (!in.Tracked || !in.ReplicaChanged.Known || p.Since != Compare(a.line, b.line).Common.Epoch) {
					t.Fatalf("%+v: %v since %d", in, p, p.Since)
				}
				continue
			}
			if in.Strayed != "" && p.Action != Refuse && len(b.line) > 0 && in.Disk != DiskBlank {
				t.Fatalf("%+v: %v writes to a strayed copy", in, p)
			}
			if p.Action != Refuse && !a.contains(b) {
				t.Fatalf("%+v: %v, yet the replica holds a cut that the primary does not", in, p)
			}
			if in.Disk == DiskConsistent && p.InPlace && !(in.CatchUpInPlace && in.JournalTooSmall) {
				t.Fatalf("%+v: %v makes a consistent replica inconsistent", in, p)
			}
			if in.Disk == DiskInconsistent && p.Action != Refuse && !p.InPlace {
				t.Fatalf("%+v: %v journals onto an image that is not whole", in, p)
			}
			if p.Action == Incremental && (!in.Tracked || in.NeedsFull || p.Since != b.pos.Epoch) {
				t.Fatalf("%+v: %v since %d", in, p, p.Since)
			}
			if p.Action == Nothing && (a != b || in.Disk != DiskConsistent) {
				t.Fatalf("%+v: %v", in, p)
			}
		}
	}
}
