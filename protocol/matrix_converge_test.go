package protocol

import (
	"bytes"
	"path/filepath"
	"strings"
	"time"
)

// converge connects the two, and looks at the bytes of both.
func (w *matrixWorld) converge(primary *matrixDisk, n *node, in PlanInput, plan Plan) {
	t, c := w.t, w.c
	t.Helper()
	dir := t.TempDir()
	n.rep.rescueDir = dir
	st := n.rep.Status()
	rel, want := Compare(st.Lineage, primary.state.Effective()), Compare(in.Replica, in.Primary)
	if rel != want || st.State != in.Disk || (st.Strayed != "") != (in.Strayed != "") {
		t.Fatalf("%s at [%v] is %v, strayed %q, and %v when compared with [%v]; want %v, strayed %q, and %v",
			n.name, st.Lineage, st.State, st.Strayed, rel, primary.state.Effective(), in.Disk, in.Strayed, want)
	}
	if c.given {
		must(t, n.rep.GiveUp(st.Lineage.Tip()))
	}
	before := dataOf(t, n.store, testVolume)
	var disk []byte
	if plan.Action == Refuse {
		disk = snapshot(t, n.store)
	}
	mine := bytes.Clone(primary.image)
	only := w.only(before, mine, rel.Common.Epoch)
	r, cfg := newRig(t, []*node{n}, func(p *PrimaryConfig) {
		p.Source, p.State, p.Interval = primary, &primary.label, time.Hour
		p.Replicas[0].SplitBrain, p.Replicas[0].Link.BatchBytes = c.policy, UnitSize
	})
	var err error
	r.p, err = NewPrimary(cfg, primary.state)
	must(t, err)
	t.Cleanup(r.stop)
	saved := func() []string {
		files, err := filepath.Glob(filepath.Join(dir, "*"))
		must(t, err)
		return files
	}
	if plan.Action == Refuse {
		eventually(t, "refused: "+c.rule, func() bool { return strings.Contains(r.p.Status().Replicas[0].Reason, c.rule) })
		r.stop()
		if !bytes.Equal(snapshot(t, n.store), disk) || len(saved()) > 0 {
			t.Errorf("%s was refused, and yet its disk was written to, or something saved of it: %v", n.name, saved())
		}
		if at := firstDifference(dataOf(t, primary.dev, testVolume), mine); at >= 0 {
			t.Errorf("%s changed at %d", primary.name, at)
		}
		if len(only) == 0 {
			t.Error("refused, and there is nothing to lose")
		}
		return
	}
	r.sync()
	first := r.epochs(n.name)[0]
	in.Tracked = true // as far as it is known at first
	if got, want := r.plan(n.name), MakePlan(in); first.Action != plan.Action.String() || got.Action != want.Action || got.Diverged != want.Diverged || got.Discard.IsZero() != want.Discard.IsZero() ||
		got.Action == plan.Action && !strings.Contains(got.Rule, c.rule) {
		t.Errorf("it followed by %s, after %v; want %v, after %v", first.Action, got, plan, want)
	}
	w.holds(n, primary, mine)
	// By the smallest resync that is safe.
	differ := int64(0)
	for at := 0; at < testVolume; at += BlockSize {
		if !bytes.Equal(before[at:at+BlockSize], mine[at:at+BlockSize]) {
			differ += BlockSize
		}
	}
	sent, looked := int64(first.Link.SentBytes), int64(first.Link.MarkedBytes)
	if plan.Action != FullCopy && sent > differ || plan.Action == Incremental && looked >= testVolume {
		t.Errorf("%d bytes differed, %d were looked at and %d sent", differ, looked, sent)
	}
	w.rescued(saved(), before, only, st, rel, !plan.Discard.IsZero())
	if plan.Discard.IsZero() && in.Disk == DiskConsistent && len(only) > 0 {
		t.Errorf("%v were only at %s, and nobody gave them up", only, n.name)
	}
	// From here on it is a replica like others.
	primary.write(77, 301, 450)
	mine = bytes.Clone(primary.image)
	r.sync()
	w.holds(n, primary, mine)
	if again := r.epochs(n.name); again[len(again)-1].Action != Incremental.String() || len(saved()) > 1 {
		t.Errorf("afterwards: %+v, %v", again, saved())
	}
}

// only lists the blocks that the one copy has, and neither the other nor the cut they had in common.
func (w *matrixWorld) only(one, other []byte, common uint64) (out []Range) {
	was := w.images[common]
	if was == nil {
		was = make([]byte, testVolume)
	}
	for at := 0; at < testVolume; at += BlockSize {
		if own := one[at : at+BlockSize]; !bytes.Equal(own, other[at:at+BlockSize]) && !bytes.Equal(own, was[at:at+BlockSize]) {
			out = appendRange(out, Range{int64(at), BlockSize})
		}
	}
	return out
}

// holds looks whether both have the bytes, also once the replica's power has gone.
func (w *matrixWorld) holds(n *node, primary *matrixDisk, want []byte) {
	t := w.t
	t.Helper()
	at := n.rep.Status().Committed
	must(t, n.rep.WaitApplied(t.Context(), at.Epoch))
	if i := firstDifference(dataOf(t, primary.dev, testVolume), want); i >= 0 {
		t.Errorf("%s, the primary, changed at %d", primary.name, i)
	}
	if i := firstDifference(dataOf(t, n.store, testVolume), want); i >= 0 {
		t.Errorf("%s differs from %s at %d", n.name, primary.name, i)
	}
	rep := open(t, n.store.Clone().PowerCut(testRand(at.Epoch)))
	image, err := rep.Hold(t.Context())
	if err != nil {
		t.Fatalf("%v; %+v; %+v", err, n.rep.Status(), rep.Status())
	}
	defer image.Release()
	got := make([]byte, testVolume)
	_, err = image.ReadAt(got, 0)
	must(t, err)
	if i := firstDifference(got, want); i >= 0 || image.Position() != at || rep.Status().Strayed != "" {
		t.Errorf("after a loss of power %s holds %v, not %v, and differs at %d", n.name, image.Position(), at, i)
	}
}

// rescued looks whether what only the replica had is in a rescue file, if it was given up, and that else there is none.
func (w *matrixWorld) rescued(files []string, before []byte, only []Range, st ReplicaStatus, rel Relation, given bool) {
	t := w.t
	t.Helper()
	if !given || len(only) == 0 {
		if idle := w.c.aEnd == cuts && !w.c.mayWrite(); len(files) > 0 || given && !idle {
			t.Errorf("given up: %v, of which %v were its own; saved in %v", given, only, files)
		}
		return
	}
	if len(files) != 1 {
		t.Fatalf("%d bytes were its own; saved in %v", totalBytes(only), files)
	}
	r, err := OpenRescue(files[0])
	must(t, err)
	defer r.Close()
	if missed := subtractRanges(only, uniteRanges(r.Extents(), nil)); len(missed) > 0 {
		t.Errorf("not saved: %v", missed)
	}
	for i, x := range r.Extents() {
		b, err := r.Extent(i)
		must(t, err)
		if !bytes.Equal(b, before[x.Offset:x.End()]) {
			t.Errorf("saved at %d is not what the copy held", x.Offset)
		}
	}
	if r.Info.Common != rel.Common || !r.Info.Lineage.Equal(st.Lineage) {
		t.Errorf("saved as %+v, of [%v] since %v", r.Info, st.Lineage, rel.Common)
	}
}
