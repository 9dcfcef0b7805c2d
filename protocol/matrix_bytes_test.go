package protocol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
)

const matrixBlocks = testVolume / BlockSize

// matrixOptions lays out the disks of the matrix, in either role.
var matrixOptions = FormatOptions{VolumeUUID: testUUID, SizeBytes: testVolume, JournalBytes: MinJournalBytes}

// matrixDisk is a node's disk with its label, and the volume that is on it while the node
// is primary: its tracker knows which blocks were written, to the block.
type matrixDisk struct {
	t     *testing.T
	name  string
	label memState

	mu      sync.Mutex
	dev     *blocktest.Memory
	image   []byte // what the volume is to hold
	writes  uint64 // each is another
	state   SourceState
	marks   [matrixBlocks]uint64 // after which cut a block was written, plus 1; survives a crash
	tracked uint64               // the tracker can tell since this cut
}

func newMatrixDisk(t *testing.T, name string, writes uint64) *matrixDisk {
	return &matrixDisk{t: t, name: name, dev: blocktest.NewMemory(matrixOptions.NeededBytes()), writes: writes}
}

// begin makes the disk a primary's, which its label says already.
func (d *matrixDisk) begin(state SourceState) {
	d.t.Helper()
	must(d.t, saveState(&d.label, state))
	d.state, d.image = state, dataOf(d.t, d.dev, testVolume)
	d.marks, d.tracked = [matrixBlocks]uint64{}, state.Lineage.Tip().Epoch
}

// again begins anew what a clean end or a crash has ended. The tracker goes on.
func (d *matrixDisk) again() {
	d.t.Helper()
	var err error
	d.state, _, err = BeginPrimary(&d.label)
	must(d.t, err)
}

func (d *matrixDisk) write(blocks ...int64) {
	d.t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range blocks {
		d.writes++
		page := d.image[b*BlockSize:][:BlockSize]
		content(page, b, d.writes)
		_, err := d.dev.WriteAt(page, b*BlockSize)
		must(d.t, err)
		d.marks[b] = d.state.Lineage.Tip().Epoch + 1
	}
}

// cut takes one that nobody has yet.
func (d *matrixDisk) cut() *matrixCut {
	d.t.Helper()
	next, err := d.state.UseEpoch()
	must(d.t, err)
	must(d.t, saveState(&d.label, next))
	must(d.t, d.dev.Flush())
	d.state = next
	return &matrixCut{d: d, epoch: next.Lineage.Tip().Epoch, image: bytes.Clone(d.image)}
}

// crash cuts the power: of what was not flushed anything may be left.
func (d *matrixDisk) crash(rng *rand.Rand) {
	d.dev = d.dev.PowerCut(rng)
	d.image = dataOf(d.t, d.dev, testVolume)
}

// lose has the tracker begin anew with the next cut.
func (d *matrixDisk) lose() { d.tracked = d.state.Lineage.Tip().Epoch + 1 }

func (d *matrixDisk) marked(since uint64) (out []Range, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if since < d.tracked {
		return nil, ErrTrackingLost
	}
	for b, m := range d.marks {
		if m > since {
			out = appendRange(out, Range{int64(b) * BlockSize, BlockSize})
		}
	}
	return out, nil
}

// standDown makes it a replica that is going to follow another, around the data that it has.
func (d *matrixDisk) standDown(follow Lineage) {
	d.t.Helper()
	before := dataOf(d.t, d.dev, testVolume)
	_, err := StandDown(&d.label, d.dev, StandDownOptions{Format: matrixOptions, Stray: true, Follow: follow, ChangedSince: d.marked})
	must(d.t, err)
	if at := firstDifference(dataOf(d.t, d.dev, testVolume), before); at >= 0 {
		d.t.Errorf("%s: standing down changed the data at %d", d.name, at)
	}
}

// restore fills a new disk in place of the one that was lost. After half of it the disk fails.
func (d *matrixDisk) restore(from *node, want []byte, half bool) {
	d.t.Helper()
	fresh := newMatrixDisk(d.t, d.name, d.writes)
	d.dev, d.image = fresh.dev, nil
	must(d.t, saveState(&d.label, BeginRestore(from.name, from.rep.Status().Lineage)))
	if half {
		d.dev.FailAt(blocktest.OpWrite, 1, errors.New("broken on purpose"))
	}
	lineage, err := RestoreTo(d.t.Context(), LocalClient(from.recv), RestoreConfig{VolumeUUID: testUUID, Replica: from.name, SizeBytes: testVolume, Target: d.dev,
		Save: func(s RestoreState) error { return saveState(&d.label, SourceState{Restore: &s}) }})
	if half {
		if _, down := StandDown(&d.label, d.dev, StandDownOptions{Format: matrixOptions, Stray: true}); err == nil || down == nil {
			d.t.Fatalf("half restored (%v), and it stands down: %v", err, down)
		}
		must(d.t, saveState(&d.label, SourceState{}))
		must(d.t, FormatReplica(d.dev, matrixOptions))
		return
	}
	must(d.t, err)
	state, err := FinishRestore(SourceState{Restore: &RestoreState{Replica: from.name, Lineage: lineage}})
	must(d.t, err)
	d.begin(state)
	if at := firstDifference(d.image, want); at >= 0 {
		d.t.Fatalf("restored from %v it differs at %d", lineage.Tip(), at)
	}
}

// The disk is a Source.

func (d *matrixDisk) ReadAt(p []byte, at int64) (int, error) { return d.dev.ReadAt(p, at) }
func (d *matrixDisk) Size() int64                            { return testVolume }

func (d *matrixDisk) WrittenBytes() (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.writes * BlockSize, nil
}

func (d *matrixDisk) Cut(_ context.Context, epoch uint64, _ CutWish) (Cut, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if tip := d.state.Lineage.Tip().Epoch; epoch <= tip {
		return nil, fmt.Errorf("cut %d after cut %d", epoch, tip)
	}
	raw, err := d.label.Load()
	if err == nil {
		d.state, err = DecodeSourceState(raw)
	}
	if err == nil && d.state.Lineage.Tip().Epoch != epoch {
		err = fmt.Errorf("cut %d, which the label does not know: it is at %v", epoch, d.state.Lineage.Tip())
	}
	return &matrixCut{d: d, epoch: epoch, image: bytes.Clone(d.image), written: d.writes * BlockSize}, err
}

// matrixCut is a cut of a matrixDisk, a Cut.
type matrixCut struct {
	d       *matrixDisk
	epoch   uint64
	image   []byte
	written uint64
}

func (c *matrixCut) Epoch() uint64          { return c.epoch }
func (c *matrixCut) View() io.ReaderAt      { return bytes.NewReader(c.image) }
func (c *matrixCut) NoView() error          { return nil }
func (c *matrixCut) WholeView() bool        { return true }
func (c *matrixCut) Valid() error           { return nil }
func (c *matrixCut) FlushSource() error     { return c.d.dev.Flush() }
func (c *matrixCut) Stalled() time.Duration { return time.Millisecond }
func (c *matrixCut) WrittenBytes() uint64   { return c.written }
func (c *matrixCut) Release() error         { return nil }

// Changed is what the tracker knows, and the disk of its time as a replica.
func (c *matrixCut) Changed(since uint64) ([]Range, error) {
	changed, err := c.d.marked(since)
	if err == nil {
		return changed, nil
	}
	past, err := ReadInheritance(c.d.dev, testUUID, testVolume, c.d.state.Effective())
	if err != nil {
		return nil, err
	}
	return past.ChangedSince(since, c.d.marked)
}

// matrixFeed is a session that brings cuts to a replica, one after another.
type matrixFeed struct {
	t    *testing.T
	n    *node
	link *Link
	at   uint64 // the cut that is there; 0: none
}

func (d *matrixDisk) connect(n *node) *matrixFeed {
	d.t.Helper()
	link, err := Connect(d.t.Context(), n.client(), LinkConfig{VolumeUUID: testUUID, SizeBytes: testVolume, Replica: n.name, BatchBytes: UnitSize}, d.state.Effective())
	must(d.t, err)
	return &matrixFeed{t: d.t, n: n, link: link}
}

// bring has the replica hold a cut.
func (f *matrixFeed) bring(c *matrixCut) {
	f.t.Helper()
	f.send(c, ModeJournal)
	must(f.t, f.link.Commit(f.t.Context(), c.d.state.Lineage, 1))
	must(f.t, f.n.rep.WaitApplied(f.t.Context(), c.epoch))
	f.at = c.epoch
	if at := firstDifference(dataOf(f.t, f.n.store, testVolume), c.image); at >= 0 {
		f.t.Fatalf("%s holds cut %d, and differs at %d", f.n.name, c.epoch, at)
	}
}

// send is bring without a commit.
func (f *matrixFeed) send(c *matrixCut, mode Mode) {
	f.t.Helper()
	start, ranges := EpochStart{Epoch: c.epoch, Mode: mode, Lineage: c.d.state.Lineage}, []Range{{0, testVolume}}
	if f.at == 0 {
		start.Mode, start.Full = ModeInPlace, true
	} else {
		var err error
		ranges, err = c.Changed(f.at)
		must(f.t, err)
	}
	must(f.t, f.link.Begin(f.t.Context(), start, false))
	_, err := f.link.SendRound(f.t.Context(), Round{Source: c.View(), Ranges: ranges})
	must(f.t, err)
}

// matrixWorld is what a row's moves are made with.
type matrixWorld struct {
	t      *testing.T
	c      failoverRow
	a, b   *matrixDisk
	nodes  map[string]*node  // b, and a's local replica
	images map[uint64][]byte // of generation 1
}

// serve opens a disk as the replica that it is.
func (w *matrixWorld) serve(d *matrixDisk) *node {
	w.t.Helper()
	n := openNode(w.t, d.name, d.dev, ReceiverConfig{WindowBytes: 2 << 20})
	w.nodes[d.name] = n
	return n
}

// withBytes has the row happen to real copies, on disks in memory. in and plan are what is to come of it.
func (c failoverRow) withBytes(t *testing.T, in PlanInput, plan Plan) {
	w := &matrixWorld{t: t, c: c, a: newMatrixDisk(t, "a", 0), b: newMatrixDisk(t, "b", 1_000_000),
		nodes: map[string]*node{}, images: map[uint64][]byte{}}
	w.asPrimary()
	if c.aEnd == crash || c.aEnd == cuts {
		if !c.alive {
			w.a.crash(testRand(uint64(len(c.name))))
		}
	}
	if !w.takeOver() {
		if !c.alive {
			w.a.again()
		}
		if w.c.bState == DiskInconsistent { // as after a crash of b
			w.nodes["b"].recv.Close()
			must(t, w.nodes["b"].rep.Close())
			w.serve(w.b)
		} else {
			must(t, w.nodes["b"].recv.Add("b", w.nodes["b"].rep))
		}
		w.converge(w.a, w.nodes["b"], in, plan)
		return
	}
	if w.comesBack(); c.bGives {
		w.a.again()
		w.b.standDown(w.a.state.Effective())
		w.converge(w.a, w.serve(w.b), in, plan)
		return
	}
	if in.Disk != DiskBlank {
		w.a.standDown(w.b.state.Effective())
	}
	w.converge(w.b, w.serve(w.a), in, plan)
}

// asPrimary is a's time as primary.
func (w *matrixWorld) asPrimary() {
	c, a := w.c, w.a
	a.begin(SourceState{Generation: gen(1), OpenEpoch: 1})
	for b := int64(0); b < matrixBlocks; b += 3 {
		a.write(b)
	}
	ebs := newMatrixDisk(w.t, "ebs", 0)
	feeds := map[uint64][]*matrixFeed{} // by the last cut that goes there
	for d, last := range map[*matrixDisk]uint64{w.b: c.bHolds, ebs: c.restore} {
		must(w.t, FormatReplica(d.dev, matrixOptions))
		feeds[last] = append(feeds[last], a.connect(w.serve(d)))
	}
	end := uint64(10)
	if c.aEnd == cuts || c.aEnd == cutsBlank {
		end = 13
	}
	for n := uint64(1); n <= end; n++ {
		if at := int64(n); n <= 10 || c.mayWrite() {
			a.write(5, 16*at, 16*at+1, 16*at+2)
		}
		cut := a.cut()
		w.images[n] = cut.image
		for last, to := range feeds {
			for _, f := range to {
				if n <= last {
					f.bring(cut)
				}
			}
		}
	}
	if (c.aEnd == crash || c.aEnd == cuts) && c.mayWrite() {
		a.write(300, 301)
		must(w.t, a.dev.Flush())
		a.write(5, 302, 330, matrixBlocks-1)
	}
	if c.aEnd == clean {
		a.state = a.state.Close()
		must(w.t, saveState(&a.label, a.state))
	}
	for _, to := range feeds {
		for _, f := range to {
			if f.n.name == "b" && c.bState == DiskInconsistent {
				f.send(a.cut(), ModeInPlace)
			}
			f.link.Close()
		}
	}
	if !c.tracks {
		a.lose()
	}
}

// takeOver has b take over and be written, if it may.
func (w *matrixWorld) takeOver() bool {
	w.t.Helper()
	c, b, n := w.c, w.b, w.nodes["b"]
	n.recv.Remove(testUUID, "b")
	var before []byte
	if c.take != "" {
		before = snapshot(w.t, b.dev)
	}
	o := TakeOverOptions{Force: c.force, Fresh: gen(2), Heard: Heard{Alive: c.alive}}
	if c.heard {
		o.Heard.Lineage = w.a.state.Effective()
	}
	p, err := n.rep.TakeOver(w.t.Context(), &b.label, o)
	if c.take != "" {
		if err == nil || !strings.Contains(err.Error(), c.take) {
			w.t.Fatalf("b takes over: %+v, %v; want %q", p, err, c.take)
		}
		if !bytes.Equal(snapshot(w.t, b.dev), before) || b.label.saves > 0 {
			w.t.Error("b was refused, and its disk or label was written to")
		}
		return false
	}
	must(w.t, err)
	must(w.t, n.rep.Close())
	b.begin(p.State)
	if at := firstDifference(b.image, w.images[c.bHolds]); at >= 0 {
		w.t.Fatalf("b took over at cut %d, and differs from that at %d", c.bHolds, at)
	}
	// What a wrote, too, what only b did, and something in each chunk but one.
	b.write(5, 145, 146, 210, 301, 302, 331, matrixBlocks-2)
	for chunk := range int64(matrixBlocks * BlockSize / ChunkBytes) {
		if chunk != 6 {
			b.write(chunk*ChunkBytes/BlockSize + 9)
		}
	}
	b.cut()
	b.write(160, 302, 460)
	if c.bCrash {
		must(w.t, b.dev.Flush())
		b.write(461, 462)
		b.crash(testRand(uint64(len(c.name))))
		b.again()
	}
	if !c.bTracks {
		b.lose()
	}
	return true
}

// comesBack leaves a's disk as it is when a comes back.
func (w *matrixWorld) comesBack() {
	w.t.Helper()
	c, a := w.c, w.a
	switch {
	case c.restore > 0:
		a.restore(w.nodes["ebs"], w.images[c.restore], c.half)
	case c.aEnd == blank:
		a.dev = newMatrixDisk(w.t, "a", 0).dev
		must(w.t, FormatReplica(a.dev, matrixOptions))
	}
	if c.up {
		if a.again(); c.wrote {
			a.write(300, 301)
			a.cut()
			a.write(5, 302, 330, matrixBlocks-1)
		}
	}
}
