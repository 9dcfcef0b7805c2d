package protocol

import (
	"context"
	"errors"
	"fmt"

	"blockferry/proto"
)

// SplitBrain says what gives way when two copies were both written after what
// they last had in common. The names and what they do are DRBD's.
type SplitBrain string

// IsSplitBrain says whether nothing is sent to a replica because both sides were
// written on their own; primary: the other one still is.
func IsSplitBrain(cause error) (split, primary bool) {
	var two *TwoPrimariesError
	var refused *PlanRefusedError
	primary = errors.As(cause, &two)
	return primary || errors.As(cause, &refused) && refused.Plan.Diverged, primary
}

// The policies; the empty one is SplitBrainNone. Whatever they say, a copy that
// is written as primary never gives way by itself.
const (
	// SplitBrainNone: neither, until the operator has decided.
	SplitBrainNone SplitBrain = "none"
	// SplitBrainOlder: the side that was primary first, which went on in the
	// generation of the common position while the other took over.
	SplitBrainOlder SplitBrain = "discard-older-primary"
	// SplitBrainLeast: the side that changed less since then.
	SplitBrainLeast SplitBrain = "discard-least-changes"
	// SplitBrainZero: the side that changed nothing since then.
	SplitBrainZero SplitBrain = "discard-zero-changes"
)

// ParseSplitBrain reads a policy's name.
func ParseSplitBrain(s string) (SplitBrain, error) {
	switch p := SplitBrain(s); p {
	case "":
		return SplitBrainNone, nil
	case SplitBrainNone, SplitBrainOlder, SplitBrainLeast, SplitBrainZero:
		return p, nil
	}
	return "", fmt.Errorf("split-brain policy %q: want %s, %s, %s or %s", s, SplitBrainNone, SplitBrainOlder, SplitBrainLeast, SplitBrainZero)
}

// needsChanges says that the policy wants to know how much either side changed.
func (p SplitBrain) needsChanges() bool { return p == SplitBrainLeast || p == SplitBrainZero }

// ChangedBytes is how much of a copy may have changed since the common position.
type ChangedBytes struct {
	Known bool
	Bytes int64
}

func (c ChangedBytes) String() string {
	if !c.Known {
		return "an unknown amount"
	}
	return fmt.Sprintf("%d bytes", c.Bytes)
}

// Side is one of two copies.
type Side int

// The sides of a decision.
const (
	SideNone    Side = iota // it is the operator's
	SidePrimary             // the one that is written now
	SideReplica             // the one that would follow
)

func (s Side) String() string { return [...]string{"neither side", "the primary", "the replica"}[s] }

// Divergence is all that a decision about two copies that went on separately is
// made from.
type Divergence struct {
	Policy           SplitBrain
	Primary, Replica Lineage
	Common           Position
	PrimaryChanged   ChangedBytes
	ReplicaChanged   ChangedBytes
}

// Discards says which side gives way, and the rule in words. It is pure, total,
// and knows no clock.
func (d Divergence) Discards() (Side, string) {
	switch d.Policy {
	case SplitBrainNone, "":
		return SideNone, "split brain: no policy, so the operator decides"
	case SplitBrainOlder:
		primary, replica := wentOn(d.Primary, d.Common), wentOn(d.Replica, d.Common)
		switch {
		case primary == replica:
			return SideNone, fmt.Sprintf("split brain: %s can't tell, as %s went on in the generation of %v", d.Policy, bothOrNeither(primary), d.Common)
		case primary:
			return SidePrimary, "split brain: " + string(d.Policy) + ": the replica's line took over later"
		}
		return SideReplica, "split brain: " + string(d.Policy) + ": the primary's line took over later"
	case SplitBrainLeast, SplitBrainZero:
	default:
		return SideNone, fmt.Sprintf("split brain: unknown policy %q", d.Policy)
	}
	p, r := d.PrimaryChanged, d.ReplicaChanged
	changed := fmt.Sprintf("the primary changed %v, the replica %v", p, r)
	if d.Policy == SplitBrainZero {
		switch {
		case r.Known && r.Bytes == 0:
			return SideReplica, "split brain: " + string(d.Policy) + ": " + changed
		case p.Known && p.Bytes == 0:
			return SidePrimary, "split brain: " + string(d.Policy) + ": " + changed
		}
		return SideNone, "split brain: " + string(d.Policy) + " finds no side without changes: " + changed
	}
	switch {
	case !p.Known || !r.Known || p.Bytes == r.Bytes:
		return SideNone, "split brain: " + string(d.Policy) + " can't tell: " + changed
	case p.Bytes < r.Bytes:
		return SidePrimary, "split brain: " + string(d.Policy) + ": " + changed
	}
	return SideReplica, "split brain: " + string(d.Policy) + ": " + changed
}

// wentOn says whether a line went on from a common position in that one's own
// generation, whose primary thus was primary already.
func wentOn(l Lineage, common Position) bool {
	for _, p := range l {
		if p.Generation == common.Generation {
			return p.Epoch > common.Epoch
		}
	}
	return false
}

func bothOrNeither(both bool) string {
	if both {
		return "both"
	}
	return "neither"
}

// diverged plans for a replica that went its own way. p has the evidence.
func (p Plan) diverged(in PlanInput, rel Relation) Plan {
	d := Divergence{Policy: in.SplitBrain, Primary: in.Primary, Replica: in.Replica, Common: rel.Common,
		PrimaryChanged: in.PrimaryChanged, ReplicaChanged: in.ReplicaChanged}
	if in.Strayed != "" {
		p.Evidence += "; the replica strayed: " + in.Strayed
	}
	if in.SplitBrain.needsChanges() {
		p.Evidence += fmt.Sprintf("; since %v the primary changed %v, the replica %v", rel.Common, in.PrimaryChanged, in.ReplicaChanged)
	}
	side, rule := d.Discards()
	if in.Discard == in.Replica.Tip() && !in.Discard.IsZero() {
		side, rule = SideReplica, fmt.Sprintf("the operator gave up what the replica has at %v", in.Discard)
	}
	switch side {
	case SidePrimary:
		p.Action, p.Rule = Refuse, rule+"; the primary would have to give way, and it is in use: let it stand down, or give up the replica"
		return p
	case SideNone:
		p.Action, p.Rule = Refuse, "both went on separately from "+rel.Common.String()+" ("+rule+")"
		return p
	}
	if in.Disk != DiskConsistent || in.NeedsFull {
		p.Action, p.Format, p.Rule = Refuse, true, rule+"; yet the replica's image is not whole, so nothing of it can be saved: format it to give it up"
		return p
	}
	// The old image stays until the new one is whole: never in place.
	p.Discard = in.Replica.Tip()
	if in.Tracked && in.ReplicaChanged.Known {
		p.Action, p.Since, p.Rule = Incremental, rel.Common.Epoch, rule+"; what changed at either side since "+rel.Common.String()+" is known"
		return p
	}
	p.Action, p.Rule = CompareAll, rule+"; what changed since "+rel.Common.String()+" is not known of both sides"
	return p
}

// TwoPrimariesError says that the node at the other end is primary, too. Neither
// gets what the other writes, and both go on.
type TwoPrimariesError struct {
	Mine, Theirs Lineage
}

func (e *TwoPrimariesError) Error() string {
	return fmt.Sprintf("%s; here it is at %v, history [%v]; there at %v, history [%v]", e.Reason(), e.Mine.Tip(), e.Mine, e.Theirs.Tip(), e.Theirs)
}

// Reason is the error without what moves on while both are written.
func (e *TwoPrimariesError) Reason() string {
	const both = "split brain: the volume is primary there, too"
	if rel := Compare(e.Theirs, e.Mine); rel.Kind == Diverged {
		return both + ", and both went on separately from " + rel.Common.String()
	}
	return both
}

// twoPrimaries tells a refusal because the other node is primary from others.
func twoPrimaries(err error, mine Lineage) error {
	var r *RefusedError
	if errors.As(err, &r) && r.Reason == proto.Reason_REASON_PRIMARY {
		return &TwoPrimariesError{Mine: mine.Clone(), Theirs: r.Lineage}
	}
	return err
}

func refusedFromProto(m *proto.Refused) *RefusedError {
	r := &RefusedError{Reason: m.Reason, Message: clip(m.Message)}
	r.Lineage, _ = LineageFromProto(m.Lineage) // without it less is known, no more
	return r
}

// askWayward finds out what a plan for a replica needs that went its own way:
// what changed at either side since the common position.
func (w *replicaWorker) askWayward(ctx context.Context, link *Link, rel Relation) (err error) {
	w.strayed, w.mineChanged, w.itsChanged, w.itsRanges = link.Strayed(), ChangedBytes{}, ChangedBytes{}, nil
	disk, _ := link.Disk()
	if rel.Kind != Diverged && w.strayed == "" || rel.Common.IsZero() || disk != DiskConsistent {
		return nil
	}
	policy := w.cfg.SplitBrain != "" && w.cfg.SplitBrain != SplitBrainNone
	if !policy && link.GivenUp() != link.Lineage().Tip() {
		return nil // it costs the replica a look at all of its map, and would decide nothing
	}
	w.itsRanges, w.itsChanged.Known, err = link.Changes(ctx, rel.Common)
	w.itsChanged.Bytes = totalBytes(w.itsRanges)
	if err != nil || !w.cfg.SplitBrain.needsChanges() {
		return err
	}
	h, err := w.await(ctx, wishBarrier, rel.Common.Epoch, 0, true, 0)
	if err != nil {
		return err
	}
	defer h.done()
	changed, err := h.changed(rel.Common.Epoch, w.p.size)
	if errors.Is(err, ErrTrackingLost) {
		return nil
	}
	if err != nil {
		return err
	}
	// One tracker's grain must not weigh against the other's.
	grain := max(grainOf(changed), grainOf(w.itsRanges))
	w.mineChanged = ChangedBytes{Known: true, Bytes: totalBytes(widen(changed, grain, w.p.size))}
	w.itsChanged.Bytes = totalBytes(widen(w.itsRanges, grain, w.p.size))
	return nil
}

// maxGrain is the coarsest that any tracker has: an era block of 4 MiB.
const maxGrain = 4 << 20

// grainOf is the largest grain, up to maxGrain, that a tracker may have that named
// the ranges; the last may end with the volume.
func grainOf(ranges []Range) int64 {
	grain := int64(maxGrain)
	for i, r := range ranges {
		for grain > BlockSize && (r.Offset%grain != 0 || r.End()%grain != 0 && i < len(ranges)-1) {
			grain /= 2
		}
	}
	return grain
}

// widen rounds ranges outwards, within the volume.
func widen(ranges []Range, grain, size int64) []Range {
	out := make([]Range, 0, len(ranges))
	for _, r := range ranges {
		start := r.Offset / grain * grain
		out = appendRange(out, Range{start, min(size, roundUp(r.End(), grain)) - start})
	}
	return out
}
