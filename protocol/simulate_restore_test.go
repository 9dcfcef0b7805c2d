package protocol

import (
	"context"
	"errors"
	"fmt"

	"blockferry/blockdev/blocktest"
)

// restore gives a node whose disk is lost a blank one, and fills that from another's copy, as if
// that copy's disk were beside it. It may fail or lose its power meanwhile; then it is gone on with, or begun anew.
func (n *simNode) restore(from *simNode) error {
	w := n.w
	if st := from.rep.Status(); st.State != DiskConsistent || st.Strayed != "" {
		return nil
	}
	if err := from.check(); err != nil { // what it had acknowledged is forgotten below
		return err
	}
	at := from.rep.Status().Lineage
	from.acks = []Lineage{at} // nothing is restored that it can lose
	w.say("%s loses its disk, and is restored from %s at %v", n.name, from.name, at)
	n.close()
	n.disk(blocktest.NewMemory(simOptions().NeededBytes()))
	n.label, n.acks, n.unflushed = &memState{}, nil, false
	if err := saveState(n.label, BeginRestore("r", at)); err != nil {
		return err
	}
	got, err := n.fill(from, w.rng.IntN(3) == 0)
	if err != nil {
		w.did["restore cut off"]++
		w.say("the restore is cut off: %v", err)
		if w.rng.IntN(2) == 0 {
			n.disk(n.dev.PowerCut(w.rng))
		}
		if err := n.unfinished(); err != nil {
			return err
		}
		if got, err = n.fill(from, false); err != nil {
			return err
		}
	}
	w.did["restored"]++
	if !got.Equal(at) {
		return fmt.Errorf("%s is restored at %v, not at %v", n.name, got, at)
	}
	old, err := DecodeSourceState(n.label.b)
	if err == nil {
		old, err = FinishRestore(old)
	}
	if err == nil {
		err = saveState(n.label, old)
	}
	if err != nil {
		return err
	}
	n.disk(n.dev.PowerCut(w.rng)) // all of it is durable
	image, err := n.data()
	if at := firstDifference(image, w.images[got.Tip()]); err == nil && at >= 0 {
		err = fmt.Errorf("%s was restored at %v, and differs from that cut at %d", n.name, got.Tip(), at)
	}
	n.state, n.tracked, n.marks = old, got.Tip().Epoch, [simBlocks]uint64{}
	if err != nil || w.rng.IntN(2) == 0 {
		w.did["restored, primary"]++
		return errors.Join(err, n.start())
	}
	h, err := StandDown(n.label, n.dev, n.downOptions(nil))
	if err != nil {
		return err
	}
	w.say("%s stands down as it was restored: %v", n.name, h.Lineage)
	if n.acks = []Lineage{at}; !h.Lineage.Equal(at) || h.Strayed != "" {
		return fmt.Errorf("%s was restored at %v and not written, and holds %v, strayed %q", n.name, at, h.Lineage, h.Strayed)
	}
	return n.start()
}

// fill goes on with the restore that the label tells of.
func (n *simNode) fill(from *simNode, fault bool) (Lineage, error) {
	if fault {
		op := []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush}[n.w.rng.IntN(2)]
		n.dev.FailAt(op, n.w.rng.IntN(3), errors.New("broken on purpose"))
		defer n.dev.FailAt(op, 0, nil)
	}
	state, err := DecodeSourceState(n.label.b)
	if err != nil {
		return nil, err
	}
	return RestoreTo(context.Background(), LocalClient(from.recv), RestoreConfig{VolumeUUID: testUUID, Replica: "r", SizeBytes: simSize, Target: n.dev,
		From: state.Restore, Save: func(s RestoreState) error { return saveState(n.label, SourceState{Restore: &s}) },
		CheckpointBytes: simSize / 4})
}

// unfinished: half a volume is neither a primary's nor a replica.
func (n *simNode) unfinished() error {
	if s, _, err := BeginPrimary(&memState{b: n.label.b}); err == nil {
		return fmt.Errorf("%s is half restored, and begins as primary: %+v", n.name, s)
	}
	if h, err := StandDown(&memState{b: n.label.b}, n.dev, n.downOptions(nil)); err == nil {
		return fmt.Errorf("%s is half restored, and stands down as a replica: %+v", n.name, h)
	}
	return nil
}
