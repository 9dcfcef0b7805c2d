package protocol

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"blockferry/proto"
)

// This file is about copies that went another way than the primary's: one that
// was written as primary while another node took over, or a replica that such a
// primary fed. Nothing of them is overwritten without the operator's word for the
// very position that they are at, and what only they have is saved first.

// mayDiscard says whether an epoch of lineage l, related so to what the replica
// holds, may be laid over it though that went its own way; mu is held.
func (r *Replica) mayDiscard(discard Position, l Lineage, relation Relation) error {
	have, why := r.lineage().Tip(), r.strayed()
	if why == "" {
		why = fmt.Sprintf("it and %v are %v", l, relation)
	}
	refuse := func(what string) error {
		return fmt.Errorf("%s: %w: it is at %v, %s: %s", r.store.Name(), ErrStrayed, have, why, what)
	}
	switch {
	case discard.IsZero():
		return refuse("it is overwritten only on the operator's word")
	case discard != have:
		return refuse(fmt.Sprintf("the operator's word is for %v", discard))
	case relation.Kind != Diverged && (r.strayed() == "" || relation.Kind != Ahead):
		return refuse("a history in common, and two separate ways from there, are needed to tell what only this copy has")
	case r.rescueDir == "":
		return refuse("there is no folder for what only this copy has: name one for rescue files")
	case r.needsFull() || r.sb.state != DiskConsistent && len(r.pending) == 0:
		return refuse("its image is not whole, so nothing of it can be saved: format it anew to give it up")
	}
	return nil
}

// rescue saves what the open epoch is about to overwrite and no other copy has:
// of the blocks that it describes those that changed here since the two were the
// same, or all of them when that is not known. Nothing is decided yet.
func (r *Replica) rescue(ctx context.Context, o *openEpoch, l Lineage) error {
	if o.start.Discard.IsZero() {
		return nil
	}
	image, err := r.Hold(ctx)
	if err != nil {
		return err
	}
	defer image.Release()
	common := Compare(l, image.Lineage()).Common
	only := o.blocks.within(nil, Range{0, r.lay.size})
	changed, err := image.ChangedSince(common.Epoch)
	switch {
	case err == nil:
		only = intersectRanges(only, changed)
	case !errors.Is(err, ErrTrackingLost):
		return err
	}
	if len(only) == 0 {
		return nil
	}
	st := r.Status()
	path, err := WriteRescue(r.rescueDir, RescueInfo{VolumeUUID: st.VolumeUUID, ReplicaUUID: st.ReplicaUUID, SizeBytes: st.SizeBytes,
		Lineage: image.Lineage(), Common: common}, only, image)
	if err != nil {
		return fmt.Errorf("%s: epoch %d: %w: nothing was overwritten", r.store.Name(), o.start.Epoch, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rescued = path
	r.notify()
	return nil
}

// ChangedSince lists, ascending, what may have changed between a cut that the
// replica's history contains and what it has committed now. The error is
// ErrTrackingLost when it can't tell.
func (r *Replica) ChangedSince(ctx context.Context, since Position) ([]Range, error) {
	image, err := r.Hold(ctx)
	if err != nil {
		return nil, err
	}
	defer image.Release()
	if image.lineage.Until(since) == nil {
		return nil, fmt.Errorf("%s: %w: %v is not in its history, %v", r.store.Name(), ErrTrackingLost, since, image.lineage)
	}
	return image.ChangedSince(since.Epoch)
}

// maxChangedRanges bounds what one Changes message names: below 2 MiB, which is
// what nodes take of each other.
const maxChangedRanges = 1 << 17

// changesMessage tells what changed at a replica since a position; of many
// small ranges neighbours are joined.
func changesMessage(ctx context.Context, rep *Replica, since Position) (*proto.Changes, error) {
	changed, err := rep.ChangedSince(ctx, since)
	if errors.Is(err, ErrTrackingLost) {
		return &proto.Changes{}, nil
	}
	if err != nil {
		return nil, err
	}
	m := &proto.Changes{Known: true}
	for _, r := range coarsen(changed, maxChangedRanges) {
		m.Offsets, m.Lengths = append(m.Offsets, uint64(r.Offset)), append(m.Lengths, uint64(r.Length))
	}
	return m, nil
}

// coarsen widens ascending ranges until there are at most limit of them.
func coarsen(in []Range, limit int) []Range {
	for grain := int64(2 * ChunkBytes); len(in) > limit; grain *= 2 {
		var out []Range
		for _, r := range in {
			start := r.Offset / grain * grain
			out = appendRange(out, Range{start, roundUp(r.End(), grain) - start})
		}
		in = out
	}
	return in
}

// GiveUp is the operator's word, given where the replica is: should it have gone its own
// way, what it has at the position, which must be its own, may be overwritten, and is
// saved first. The word holds until the replica moves on or is closed.
func (r *Replica) GiveUp(at Position) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.usable(); err != nil {
		return err
	}
	if have := r.lineage().Tip(); at != have || at.IsZero() {
		return fmt.Errorf("%s: it is at %v, and not at %v: nothing is given up", r.store.Name(), have, at)
	}
	r.givenUp = at
	return nil
}

// GivenUp is what the operator gave up at the replica; zero: nothing.
func (l *Link) GivenUp() Position {
	at, err := positionFromProto(l.welcome.GivenUp)
	if l.welcome.GivenUp == nil || err != nil || at != l.lineage.Tip() {
		return Position{}
	}
	return at
}

// Strayed is why the replica holds blocks of no committed position, as it said
// at the handshake; empty: it does not.
func (l *Link) Strayed() string { return clip(l.welcome.Strayed) }

// Changes asks what changed at the replica since a position that both sides'
// histories contain. known is false when it can't tell. No epoch is open.
func (l *Link) Changes(ctx context.Context, since Position) (changed []Range, known bool, err error) {
	if !slices.Contains(l.welcome.Features, FeatureStrayed) {
		return nil, false, nil
	}
	if l.open {
		return nil, false, fmt.Errorf("replica %q: epoch %d is open", l.cfg.Replica, l.start.Epoch)
	}
	err = l.send(&proto.FromPrimary{Message: &proto.FromPrimary_AskChanges{AskChanges: &proto.AskChanges{Since: since.proto()}}})
	if err != nil {
		return nil, false, err
	}
	m, err := wait(ctx, l, l.answers)
	if err != nil {
		return nil, false, err
	}
	c := m.GetChanges()
	if c == nil || len(c.Offsets) != len(c.Lengths) {
		return nil, false, l.confused("AskChanges", m)
	}
	for i, o := range c.Offsets {
		if n := c.Lengths[i]; o > uint64(MaxVolumeBytes) || n > uint64(MaxVolumeBytes) {
			return nil, false, l.confused("AskChanges", m)
		} else {
			changed = append(changed, Range{int64(o), int64(n)})
		}
	}
	return cleanRanges(changed, l.cfg.SizeBytes), c.Known, nil
}
