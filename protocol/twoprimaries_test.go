package protocol

import (
	"context"
	"strings"
	"sync"
	"testing"

	"blockferry/proto"
)

// The word may be given where the copy is; it is for the position that the copy is at, and
// gone once that has moved on.
func TestGivenUpWhereItIs(t *testing.T) {
	r := newWayward(t, wayward{grain: BlockSize, known: true, written: true})
	r.refused("both went on separately")
	elsewhere := Position{r.tip.Generation, r.tip.Epoch + 1}
	for _, at := range []Position{{}, elsewhere, r.common} {
		if err := r.disk.rep.GiveUp(at); err == nil || !strings.Contains(err.Error(), "nothing is given up") {
			t.Errorf("given up at %v: %v", at, err)
		}
	}
	if st := r.disk.rep.Status(); !st.GivenUp.IsZero() || len(r.rescued()) > 0 {
		t.Errorf("%+v, %v", st, r.rescued())
	}
	want := r.onlyTheirs()
	must(t, r.disk.rep.GiveUp(r.tip))
	if st := r.disk.rep.Status(); st.GivenUp != r.tip {
		t.Errorf("%+v", st)
	}
	r.sync()
	r.disk.check(r.src)
	if files := r.rescued(); len(files) != 1 {
		t.Errorf("%d blocks were only its own, rescue files: %v", len(want), files)
	}
	if st := r.disk.rep.Status(); !st.GivenUp.IsZero() || st.Strayed != "" {
		t.Errorf("afterwards: %+v", st)
	}
}

// A copy that follows anyway loses nothing by the word.
func TestGivenUpForNothing(t *testing.T) {
	src, n, r := syncedRig(t, BlockSize, 100)
	must(t, n.rep.GiveUp(n.rep.Status().Committed))
	must(t, r.p.Pause("ebs"))
	wroteSome(src, 50, 20)
	must(t, r.p.Resume("ebs"))
	r.sync()
	n.check(src)
	if p := r.plan("ebs"); p.Action != Incremental || !p.Discard.IsZero() || n.rep.Status().Rescued != "" {
		t.Errorf("%v, %+v", p, n.rep.Status())
	}
}

// Both are primary: each is told by the other how far that is, says so by the same words
// while both go on, writes nothing there, and serves its own replicas as before.
func TestTwoPrimaries(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 100)
	near, far := newNode(t, "near", testVolumeSize, 32<<20), newNode(t, "far", testVolumeSize, 32<<20)
	before := snapshot(t, far.store)
	var mu sync.Mutex
	theirs := line(9, 7, 2, 12)
	var heard Lineage
	far.recv.cfg.Admit = func(_ context.Context, a Admission) (Admitted, error) {
		mu.Lock()
		defer mu.Unlock()
		heard = a.Lineage
		theirs[1].Epoch++
		return Admitted{}, &RefusedError{Reason: proto.Reason_REASON_PRIMARY, Message: "it is written here", Lineage: theirs}
	}
	state := &memState{b: mustEncode(t, SourceState{Lineage: line(9, 7), Generation: gen(9), OpenEpoch: 8})}
	var told []string
	r := startRig(t, src, state, []*node{near, far}, func(c *PrimaryConfig) {
		c.Events.Behind = func(replica, reason string, _ error) {
			mu.Lock()
			defer mu.Unlock()
			if replica == "far" {
				told = append(told, reason)
			}
		}
	})
	report := func(i int) ReplicaReport { return r.p.Status().Replicas[i] }
	const want = "split brain: the volume is primary there, too, and both went on separately from "
	common := Position{gen(9), 7}.String()
	eventually(t, "it is told", func() bool { return strings.Contains(report(1).Reason, want+common) })
	mu.Lock()
	first := theirs.Tip().Epoch
	mu.Unlock()
	wroteSome(src, 20, 60)
	eventually(t, "the other replica goes on", func() bool { return report(0).Disk == "UpToDate" && report(0).Epoch > 8 && report(0).Reason == "" })
	near.check(src)
	eventually(t, "it is tried again", func() bool { mu.Lock(); defer mu.Unlock(); return theirs.Tip().Epoch > first+5 })
	if split, primary := IsSplitBrain(report(1).Cause); !split || !primary {
		t.Errorf("the cause is %v", report(1).Cause)
	}
	if got := report(1); got.Reason != want+common || got.Connection == "Connected" {
		t.Errorf("%+v", got)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(told) != 1 {
		t.Errorf("said %d times: %q", len(told), told)
	}
	if rel := Compare(heard, theirs); rel.Kind != Diverged || rel.Common.String() != common {
		t.Errorf("the other was told %v: %v", heard, rel)
	}
	if string(snapshot(t, far.store)) != string(before) {
		t.Error("the other's disk was written to")
	}
}

// Whatever the other says of itself, it is no reason to write.
func TestTwoPrimariesInWords(t *testing.T) {
	for _, c := range []struct {
		theirs Lineage
		want   string
	}{
		{line(1, 7, 2, 9), "went on separately from " + line(1, 7).Tip().String()},
		{line(1, 12), "primary there, too"},
		{nil, "primary there, too"},
		{Lineage{{}}, "primary there, too"},
	} {
		e := &TwoPrimariesError{Mine: line(1, 10), Theirs: c.theirs}
		if !strings.HasPrefix(e.Reason(), "split brain: ") || !strings.Contains(e.Reason(), c.want) || !strings.Contains(e.Error(), line(1, 10).Tip().String()) {
			t.Errorf("%v: %s", c.theirs, e)
		}
	}
}
