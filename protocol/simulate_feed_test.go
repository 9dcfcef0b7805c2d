package protocol

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"blockferry/blockdev/blocktest"
)

func (n *simNode) write() error {
	for range n.w.rng.IntN([]int{12, 12, 120}[n.w.rng.IntN(3)]) {
		b := n.w.rng.IntN(simBlocks)
		n.w.writes++
		page := make([]byte, BlockSize)
		binary.LittleEndian.PutUint64(page, n.w.writes)
		if n.w.rng.IntN(2) == 0 { // what was there before, perhaps
			binary.LittleEndian.PutUint64(page, uint64(n.w.rng.IntN(2)))
		}
		n.marks[b] = n.state.Lineage.Tip().Epoch + 1
		if _, err := n.dev.Memory.WriteAt(page, int64(b)*BlockSize); err != nil {
			return err
		}
	}
	if n.w.rng.IntN(3) == 0 {
		return n.flush()
	}
	return nil
}

func (n *simNode) flush() error {
	err := n.dev.Memory.Flush()
	n.unflushed = n.unflushed && err != nil
	return err
}

// cut makes the number durable, and remembers the image.
func (n *simNode) cut() ([]byte, error) {
	next, err := n.state.UseEpoch()
	if err == nil {
		err = saveState(n.label, next)
	}
	if err != nil {
		return nil, err
	}
	n.state = next
	image, err := n.data()
	tip := next.Lineage.Tip()
	if n.w.images[tip] != nil {
		return nil, fmt.Errorf("%s: position %v comes twice", n.name, tip)
	}
	n.w.images[tip], n.unflushed = image, true
	return image, err
}

// simCut is a cut that is fed: of a primary, or one at which a copy stands.
type simCut struct {
	line    Lineage // its tip is the cut
	image   []byte
	view    io.ReaderAt
	changed func(since uint64) ([]Range, error)
	flush   func() error // nothing is committed before
	release func()
}

// standing is the history under which a node feeds others.
func (n *simNode) standing() (Lineage, error) {
	if n.primary {
		return n.state.Effective(), nil
	}
	if n.source != nil && n.source.Standing().Err != nil { // it went another way: with nothing remembered
		n.source, n.kept = nil, map[*simNode]*keptAttempt{}
	}
	if n.source == nil {
		var err error
		if n.source, err = FollowReplica(n.rep); err != nil {
			return nil, err
		}
	}
	st := n.source.Standing()
	return st.Lineage, st.Err
}

// take takes a cut, or the one at which the copy stands.
func (n *simNode) take() (c simCut, err error) {
	if n.primary {
		image, err := n.cut()
		return simCut{n.state.Lineage, image, simView{n.w.s, image}, n.changed, n.flush, func() {}}, err
	}
	if err := n.check(); err != nil { // what it had acknowledged is forgotten below
		return simCut{}, err
	}
	cut, err := n.source.Cut(context.Background(), 0, CutWish{View: true})
	if err != nil {
		return simCut{}, err
	}
	line := cut.(FollowedCut).Lineage()
	c = simCut{line, n.w.images[line.Tip()], cut.View(), cut.Changed,
		func() error { return errors.Join(cut.Valid(), cut.FlushSource()) }, func() { _ = cut.Release() }}
	if c.image == nil {
		err = fmt.Errorf("%s passes on %v, which is no cut", n.name, line.Tip())
	}
	n.acks = []Lineage{line} // nothing is passed on that it can lose
	return c, err
}

// simSession is what one session to a replica is about.
type simSession struct {
	n, to  *simNode
	client *simClient
	link   *Link
	theirs []Range // what changed there since the common position
}

// feed brings a replica up to date, or is refused; the replica's disk may fail meanwhile. A
// primary may bring it several cuts in one session.
func (n *simNode) feed(to *simNode) error {
	ctx, w := context.Background(), n.w
	w.s.settle() // the session before has ended
	primary, err := n.standing()
	if err != nil {
		w.did["not passed on"]++
		w.say("%s passes nothing on: %v", n.name, err)
		return nil
	}
	w.links++
	f := &simSession{n: n, to: to, client: &simClient{s: w.s, name: fmt.Sprintf("link %d", w.links), receiver: to.recv, wire: w.rng.IntN(2) == 0}}
	f.link, err = Connect(ctx, f.client, LinkConfig{VolumeUUID: testUUID, SizeBytes: simSize, Replica: "r", BatchBytes: UnitSize, Batches: 2,
		Readers: simBlocks, // none waits for another
	}, primary)
	if err != nil {
		return err
	}
	defer f.link.Close()
	if !f.client.wire {
		f.link.local, f.link.frames = true, &to.recv.frames
	}
	c, err := n.take()
	if err != nil {
		return err
	}
	defer c.release() // of a primary's there is nothing to release
	disk, needsFull := f.link.Disk()
	in := PlanInput{Primary: primary, Replica: f.link.Lineage(), Disk: disk, NeedsFull: needsFull, Strayed: f.link.Strayed(),
		SplitBrain: []SplitBrain{SplitBrainNone, SplitBrainOlder}[w.rng.IntN(2)]}
	rel := Compare(in.Replica, primary)
	if (rel.Kind == Diverged || in.Strayed != "") && disk == DiskConsistent && !rel.Common.IsZero() {
		if f.theirs, in.ReplicaChanged.Known, err = f.link.Changes(ctx, rel.Common); err != nil {
			return err
		}
		if w.rng.IntN(2) == 0 {
			in.Discard = in.Replica.Tip()
		}
	}
	for {
		goesOn, err := f.epoch(c, in)
		if err != nil {
			return err
		}
		if !goesOn {
			return nil
		}
		if !n.primary || w.rng.IntN(3) > 0 {
			return to.rep.WaitApplied(ctx, c.line.Tip().Epoch)
		}
		// The next follows in the same session, applied or not.
		w.did["another in the session"]++
		in = PlanInput{Replica: c.line, Disk: DiskConsistent}
		if err := n.write(); err != nil {
			return err
		}
		in.Primary = n.state.Effective()
		if c, err = n.take(); err != nil {
			return err
		}
	}
}

// epoch brings one cut; goesOn says that it was acknowledged, and that the session lasts.
func (f *simSession) epoch(c simCut, in PlanInput) (goesOn bool, err error) {
	ctx, n, to, w, link, client := context.Background(), f.n, f.to, f.n.w, f.link, f.client
	rel := Compare(in.Replica, in.Primary)
	mine, err := c.changed(rel.Common.Epoch)
	in.Tracked = err == nil && !rel.Common.IsZero()
	plan := MakePlan(in)
	w.did[plan.Action.String()]++
	w.say("%s at %v feeds %s: %v", n.name, c.line, to.name, plan)
	if !n.primary {
		w.did["passed on, "+plan.Action.String()]++
	}
	if plan.Action == Refuse || plan.Action == Nothing {
		return false, nil
	}
	start := EpochStart{Epoch: c.line.Tip().Epoch, Mode: ModeJournal, Full: plan.Action != Incremental, Lineage: c.line, Discard: plan.Discard}
	ranges := []Range{{0, simSize}}
	if !start.Full {
		ranges = mine
		if !plan.Discard.IsZero() {
			ranges = uniteRanges(mine, f.theirs)
		}
	}
	if plan.InPlace {
		start.Mode = ModeInPlace
	}
	before, err := to.data()
	if err != nil {
		return false, err
	}
	fault := w.rng.IntN(5) == 0
	if fault {
		w.did["fault"]++
		op := []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush}[w.rng.IntN(2)]
		to.dev.FailAt(op, w.rng.IntN(12), errors.New("broken on purpose"))
	}
	if len(to.acks) == 0 {
		to.acks = []Lineage{nil} // it may as well stay blank
	}
	to.acks = append(to.acks, c.line) // from here on it may
	// Links are cut anywhere in an epoch, or near its commit; power goes anywhere, or
	// when a disk is about to make durable what was written.
	cut, power, near := w.rng.IntN(3) == 0, w.rng.IntN(5) == 0, w.rng.IntN(2) == 0
	powerCut := func() {
		w.did["power cut"]++
		to.after = to.dev.PowerCut(w.s.rng)
		client.stream.cut()
	}
	switch in := w.rng.IntN([]int{20, 200}[w.rng.IntN(2)]); {
	case power && near:
		to.dev.flushesLeft, to.dev.beforeFlush = in%8, powerCut
	case power:
		w.s.after(in, powerCut)
	case cut && !near:
		w.s.after(in, client.stream.cut)
	}
	defer w.s.after(0, nil)
	r := Round{Source: c.view, Narrow: w.rng.IntN(4) > 0 && plan.Action != FullCopy}
	begin := func() error { return link.Begin(ctx, start, plan.Overwrite) }
	k := n.kept[to]
	if k != nil {
		since, err := c.changed(k.base)
		if err == nil && k.fits(link, plan) {
			w.did["resumed"]++
			w.say("it goes on with epoch %d after cut %d: %d bytes are left, %d changed", k.epoch.start.Epoch, k.base, totalBytes(k.rest), totalBytes(since))
			ranges, r.Number, plan = uniteRanges(k.rest, since), k.round, k.plan
			begin = func() error { return link.resume(ctx, k.epoch) }
		} else {
			w.did["not resumed"]++
			k = nil
		}
	}
	r.Ranges = ranges
	delete(n.kept, to)
	var rest []Range
	begun := false
	if err = begin(); err == nil {
		begun = true
		rest, err = link.SendRound(ctx, r)
	}
	if cut && w.rng.IntN(8) == 0 {
		link.Close() // if it was not cut yet; the commit does not come
	}
	if err == nil || cut || power { // a view that was read to its end is flushed, whatever became of the link
		if e := c.flush(); err == nil {
			err = e
		}
	}
	if cut && !power && near {
		w.s.after(w.rng.IntN(12), client.stream.cut)
	}
	if err == nil {
		err = link.Commit(ctx, c.line, 1)
	}
	switch {
	case err == nil:
		to.acks = []Lineage{c.line} // acknowledged: from here on it must
		if !plan.Discard.IsZero() {
			w.did["gave up"]++
			if err := to.checkRescue(before, c.image, w.images[rel.Common]); err != nil {
				return false, err
			}
		}
	case (cut || power) && link.Err() != nil:
		w.did["link cut"]++
		w.say("the link is cut: %v", err)
		if !begun && k != nil { // it is to be gone on with all the same
			n.kept[to] = k
		} else if e := link.interrupted(); e != nil {
			n.kept[to] = &keptAttempt{epoch: e, plan: plan, base: c.line.Tip().Epoch, rest: rest, round: min(r.Number+1, MaxRounds-1)}
		}
	case !fault:
		return false, err
	}
	if fault || power {
		link.Close()
		w.s.settle()
		to.recv.Close()
		_ = to.rep.WaitApplied(ctx, c.line.Tip().Epoch)
		w.s.after(0, nil)
		return false, to.crash()
	}
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	return err == nil && !client.stream.lost, nil
}

// checkRescue: what only this copy had is in the rescue file.
func (n *simNode) checkRescue(before, after, common []byte) error {
	saved := make([]byte, simSize)
	have := map[int]bool{}
	if path := n.rep.Status().Rescued; path != "" {
		n.w.did["rescued"]++
		r, err := OpenRescue(path)
		if err != nil {
			return err
		}
		defer r.Close()
		for i, x := range r.Extents() {
			b, err := r.Extent(i)
			if err != nil {
				return err
			}
			copy(saved[x.Offset:], b)
			for at := x.Offset; at < x.End(); at += BlockSize {
				have[int(at)] = true
			}
		}
	}
	for at := 0; at < simSize; at += BlockSize {
		own := string(before[at : at+BlockSize])
		if own == string(after[at:at+BlockSize]) || own == string(common[at:at+BlockSize]) {
			continue
		}
		if !have[at] || string(saved[at:at+BlockSize]) != own {
			return fmt.Errorf("%s: what only it had at %d was overwritten and is in no rescue file", n.name, at)
		}
	}
	return nil
}
