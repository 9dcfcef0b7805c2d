package protocol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"blockferry/blockdev/blocktest"
)

// synced returns a replica that holds one full epoch, and its model.
func synced(t *testing.T, seed uint64) (*model, *blocktest.Memory, *Replica) {
	t.Helper()
	m := newModel(t, seed, testVolume)
	dev := testDevice(m.size)
	if err := FormatReplica(dev, testOptions(m.size)); err != nil {
		t.Fatal(err)
	}
	r := open(t, dev)
	must(t, m.send(r, epochPlan{mode: ModeInPlace, full: true, blocks: 2, codec: CodecS2}))
	return m, dev, r
}

func open(t *testing.T, dev Store) *Replica {
	t.Helper()
	r, err := OpenReplica(context.Background(), dev, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// waiting returns a device with two committed epochs in its journal that were
// not applied, as after a crash.
func waiting(t *testing.T, seed uint64) (*model, *blocktest.Memory) {
	t.Helper()
	m, dev, r := synced(t, seed)
	image, err := r.Hold(context.Background())
	must(t, err)
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 5, codec: CodecS2}))
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 5}))
	must(t, m.check(dev.Clone()))
	after := dev.Clone()
	image.Release()
	must(t, r.Close())
	return m, after
}

func flip(t *testing.T, dev Store, at int64, bit int) {
	t.Helper()
	block := make([]byte, BlockSize)
	_, err := dev.ReadAt(block, at/BlockSize*BlockSize)
	must(t, err)
	block[at%BlockSize] ^= 1 << bit
	_, err = dev.WriteAt(block, at/BlockSize*BlockSize)
	must(t, err)
	must(t, dev.Flush())
}

func super(t *testing.T, dev Store) *superblock {
	t.Helper()
	sb, _, err := readSuperblocks(dev)
	must(t, err)
	return sb
}

// snapshot is all of a device's content, to see that nothing was written.
func snapshot(t *testing.T, dev Store) []byte {
	t.Helper()
	b := make([]byte, dev.Size())
	_, err := dev.ReadAt(b, 0)
	must(t, err)
	return b
}

func TestDamagedJournalIsNeverClean(t *testing.T) {
	m, dev := waiting(t, 1)
	sb := super(t, dev)
	rg := ring{store: dev, area: sb.layout.journal, tag: sb.tag()}
	var first Position
	for p := range m.images {
		if p.Epoch == m.acked.Epoch-1 {
			first = p
		}
	}
	// One flip in each segment's header, body and last body byte.
	segments := 0
	for at := sb.tail; at != sb.head; segments++ {
		s, err := rg.readHeader(at)
		must(t, err)
		places := []int64{0, 13, 24, 40, 4095, segHeaderBytes, segHeaderBytes + int64(s.bodyLen)/2, segHeaderBytes + int64(s.bodyLen) - 1}
		for _, place := range places {
			bad := dev.Clone()
			flip(t, bad, rg.place(at.logical+uint64(place)), int(place)%8)
			before := snapshot(t, bad)
			_, err := OpenReplica(context.Background(), bad, OpenOptions{})
			var damage *JournalDamage
			if !errors.Is(err, ErrJournalDamaged) || !errors.As(err, &damage) {
				t.Fatalf("segment %d byte %d flipped: %v", segments, place, err)
			}
			if damage.Offset != rg.place(at.logical) || !damage.ImageWhole || damage.Lost != m.acked ||
				!strings.Contains(err.Error(), fmt.Sprint(damage.Offset)) || !strings.Contains(err.Error(), "still whole") {
				t.Fatalf("segment at %d: %+v: %v", rg.place(at.logical), damage, err)
			}
			if !bytes.Equal(before, snapshot(t, bad)) {
				t.Fatal("a refused open wrote something")
			}
			// With the operator's word it falls back to what it has.
			r, err := OpenReplica(context.Background(), bad, OpenOptions{DropJournal: true})
			must(t, err)
			st := r.Status()
			if st.State != DiskConsistent || st.Committed != damage.Applied || len(st.Warnings) == 0 ||
				damage.Applied != first && damage.Applied.Epoch != first.Epoch-1 {
				t.Fatalf("fell back to %+v, damage %+v", st, damage)
			}
			fallback := *m
			fallback.acked = damage.Applied
			must(t, fallback.checkOpen(r))
			must(t, r.Close())
			must(t, fallback.check(bad))
		}
		at = s.next()
	}
	if segments < 4 {
		t.Fatalf("only %d segments", segments)
	}
}

func TestJournalDamagedInTheApplyIsInconsistent(t *testing.T) {
	m, dev := waiting(t, 2)
	crashed := dev.Clone()
	// Writes of the recovery: map page, superblock, then data.
	crashed.FailAt(blocktest.OpWrite, 2, errors.New("broken on purpose"))
	if _, err := OpenReplica(context.Background(), crashed, OpenOptions{}); err == nil {
		t.Fatal("the fault was not met")
	}
	must(t, m.check(crashed.Clone()))
	bad := crashed.Clone()
	sb := super(t, bad)
	if sb.applying == 0 {
		t.Fatal("the apply had not begun")
	}
	flip(t, bad, ring{store: bad, area: sb.layout.journal, tag: 0}.place(sb.tail.logical+segHeaderBytes+100), 1)
	_, err := OpenReplica(context.Background(), bad, OpenOptions{})
	var damage *JournalDamage
	if !errors.As(err, &damage) || damage.ImageWhole {
		t.Fatalf("%v", err)
	}
	r, err := OpenReplica(context.Background(), bad, OpenOptions{DropJournal: true})
	must(t, err)
	defer r.Close()
	if st := r.Status(); st.State != DiskInconsistent || !st.NeedsFull || !strings.Contains(st.Reason, "journal") {
		t.Fatalf("%+v", st)
	}
	if _, err := r.Hold(context.Background()); !errors.Is(err, ErrNotConsistent) {
		t.Fatalf("an image was handed out: %v", err)
	}
	if err := m.send(r, epochPlan{mode: ModeJournal, blocks: 1}); !errors.Is(err, ErrNeedsFull) {
		t.Fatalf("changes were taken: %v", err)
	}
	must(t, m.send(r, epochPlan{mode: ModeJournal, full: true}))
	must(t, r.WaitApplied(context.Background(), m.acked.Epoch))
	must(t, m.checkOpen(r))
}

func TestLostSuperblockCopies(t *testing.T) {
	m, dev := waiting(t, 3)
	sb := super(t, dev)
	at := []int64{superOffset(sb.layout, sb.sequence), superOffset(sb.layout, sb.sequence+1)}
	for bit := 0; bit < superBytes*8; bit += 331 {
		for which, place := range at {
			bad := dev.Clone()
			flip(t, bad, place+int64(bit/8), bit%8)
			r, err := OpenReplica(context.Background(), bad, OpenOptions{})
			if err != nil {
				t.Fatalf("copy %d bit %d: %v", which, bit, err)
			}
			if w := r.Status().Warnings; len(w) != 1 || !strings.Contains(w[0], fmt.Sprint(place)) {
				t.Fatalf("copy %d bit %d: warnings %q", which, bit, w)
			}
			must(t, m.checkOpen(r)) // also without the newest copy: nothing acknowledged is lost
			must(t, r.Close())
		}
		both := dev.Clone()
		flip(t, both, at[0]+int64(bit/8), bit%8)
		flip(t, both, at[1]+int64(bit/8), bit%8)
		_, err := OpenReplica(context.Background(), both, OpenOptions{})
		if !errors.Is(err, ErrNoSuperblock) || !strings.Contains(err.Error(), fmt.Sprint(at[0])) || !strings.Contains(err.Error(), fmt.Sprint(at[1])) {
			t.Fatalf("bit %d of both copies: %v", bit, err)
		}
	}
	short := blocktest.NewMemory(dev.Size() - 2<<20)
	_, err := short.WriteAt(snapshot(t, dev)[:short.Size()], 0)
	must(t, err)
	if _, err := OpenReplica(context.Background(), short, OpenOptions{}); !errors.Is(err, ErrNoSuperblock) {
		t.Fatalf("a truncated device: %v", err)
	}
}

// A superblock that can't be read is no sign that the disk is no replica.
func TestUnreadableSuperblockIsNoBlank(t *testing.T) {
	_, dev := waiting(t, 3)
	l := super(t, dev).layout
	flip(t, dev, l.superA+superCopyOffset+1000, 3)
	no := errors.New("no such luck")
	dev.FailAt(blocktest.OpRead, 0, no)
	_, err := OpenReplica(context.Background(), dev, OpenOptions{})
	if !errors.Is(err, no) || errors.Is(err, ErrNoSuperblock) || !strings.Contains(err.Error(), fmt.Sprint(l.superA)) {
		t.Fatalf("one copy unreadable, the other damaged: %v", err)
	}
}

// That the data area is not whole must not be forgotten with one copy.
func TestInPlaceLabelStandsInBothCopies(t *testing.T) {
	m, dev, r := synced(t, 4)
	lineage := m.lineage.Extend(Position{m.lineage.Tip().Generation, m.next})
	must(t, r.Begin(context.Background(), EpochStart{Epoch: m.next, Attempt: 1, Mode: ModeInPlace, Lineage: lineage}))
	for i := range uint64(2) {
		bad := dev.Clone()
		flip(t, bad, superOffset(super(t, dev).layout, i)+200, 3)
		if st := open(t, bad).Status(); st.State != DiskInconsistent {
			t.Fatalf("without copy %d it is %s", i, st.State)
		}
	}
}

func TestDamagedChangeMapNamesTooMuch(t *testing.T) {
	m, dev, r := synced(t, 5)
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 1}))
	must(t, r.WaitApplied(context.Background(), m.acked.Epoch))
	must(t, r.Close())
	sb := super(t, dev)
	for _, how := range []string{"flip", "zero"} {
		bad := dev.Clone()
		at := sb.layout.changeMap.offset
		if how == "flip" {
			flip(t, bad, at+100, 0)
		} else {
			must(t, bad.ZeroOut(at, BlockSize))
		}
		r := open(t, bad)
		image, err := r.Hold(context.Background())
		must(t, err)
		for name, list := range map[string]func() ([]Range, error){
			"data": image.DataRanges, "changes": func() ([]Range, error) { return image.ChangedSince(m.acked.Epoch) },
		} {
			ranges, err := list()
			if err != nil || len(ranges) != 1 || ranges[0] != (Range{0, m.size}) {
				t.Errorf("%s, %s: %v, %v: want everything", how, name, ranges, err)
			}
		}
		if w := r.Status().Warnings; len(w) != 1 || !strings.Contains(w[0], fmt.Sprintf("page at %d", at)) {
			t.Errorf("%s: warnings %q", how, w)
		}
		image.Release()
		// An apply writes the page again, naming all of it.
		must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 1}))
		must(t, r.WaitApplied(context.Background(), m.acked.Epoch))
		image, err = r.Hold(context.Background())
		must(t, err)
		if ranges, err := image.ChangedSince(m.acked.Epoch - 1); err != nil || len(ranges) != 1 || ranges[0].Length != m.size {
			t.Errorf("%s, after an apply: %v, %v", how, ranges, err)
		}
		image.Release()
		must(t, r.Close())
		m.lineage, m.acked = m.lineage[:len(m.lineage)-1].Extend(Position{m.lineage.Tip().Generation, m.acked.Epoch - 1}), Position{m.acked.Generation, m.acked.Epoch - 1}
		m.image = bytes.Clone(m.images[m.acked])
	}
}

func TestChangedOutsideNeedsAFullSync(t *testing.T) {
	m, dev, r := synced(t, 6)
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 9}))
	must(t, r.WaitApplied(context.Background(), m.acked.Epoch))
	must(t, r.Close())
	places := watchPlaces(m.size)
	if len(places) < 5 || places[0].offset != 0 {
		t.Fatalf("watched: %+v", places)
	}
	for _, w := range places {
		bad := dev.Clone()
		flip(t, bad, w.offset+w.length-1, 2)
		r := open(t, bad)
		st := r.Status()
		if st.State != DiskInconsistent || !st.NeedsFull || !strings.Contains(st.Reason, "changed outside") {
			t.Fatalf("written at %d: %+v", w.offset, st)
		}
		must(t, r.Close())
	}
	flip(t, dev, 1024, 0)
	again := *m
	for range 2 { // it stays so
		r = open(t, dev)
		if err := again.send(r, epochPlan{mode: ModeJournal, blocks: 1}); !errors.Is(err, ErrNeedsFull) {
			t.Fatalf("changes were taken: %v", err)
		}
		must(t, r.Close())
	}
	r = open(t, dev)
	must(t, again.send(r, epochPlan{mode: ModeInPlace, full: true}))
	must(t, again.checkOpen(r))
	must(t, r.Close())
	must(t, again.check(dev))

	// Committed epochs are not laid over somebody else's work.
	w, dev := waiting(t, 7)
	flip(t, dev, 1024, 0)
	before := snapshot(t, dev)
	if _, err := OpenReplica(context.Background(), dev, OpenOptions{}); !errors.Is(err, ErrChangedOutside) {
		t.Fatalf("%v", err)
	}
	if !bytes.Equal(before, snapshot(t, dev)) {
		t.Fatal("a refused open wrote something")
	}
	r, err := OpenReplica(context.Background(), dev, OpenOptions{DropJournal: true})
	must(t, err)
	defer r.Close()
	if st := r.Status(); st.State != DiskInconsistent || st.PendingEpochs != 0 || st.Committed == w.acked {
		t.Fatalf("%+v", st)
	}
}

func TestFormatRefusesTooSmallADevice(t *testing.T) {
	o := testOptions(testVolume)
	small := blocktest.NewMemory(o.NeededBytes() - BlockSize)
	err := FormatReplica(small, o)
	if !errors.Is(err, ErrTooSmall) || !strings.Contains(err.Error(), fmt.Sprint(o.NeededBytes())) {
		t.Errorf("%v", err)
	}
	if small.Count(blocktest.OpWrite)+small.Count(blocktest.OpZeroOut) > 0 {
		t.Error("something was written")
	}
	must(t, FormatReplica(blocktest.NewMemory(o.NeededBytes()), o))
	for name, change := range map[string]func(*FormatOptions){
		"uuid": func(o *FormatOptions) { o.VolumeUUID = [16]byte{} }, "size": func(o *FormatOptions) { o.SizeBytes++ },
		"journal": func(o *FormatOptions) { o.JournalBytes = 4096 }, "offset": func(o *FormatOptions) { o.DataOffset = 4096 },
		"reserve": func(o *FormatOptions) { o.ReserveBytes = -1 },
	} {
		bad := o
		change(&bad)
		if err := FormatReplica(blocktest.NewMemory(64<<20), bad); err == nil {
			t.Errorf("%s: accepted %+v", name, bad)
		}
	}
}

// A device formatted again knows nothing of its former life, even when it
// keeps its UUID and its ring is full of valid segments.
func TestFormatForgetsTheFormerLife(t *testing.T) {
	for _, journal := range []bool{true, false} {
		m := newModel(t, 8, testVolume)
		dev := testDevice(m.size)
		must(t, FormatReplica(dev, testOptions(m.size)))
		r := open(t, dev)
		must(t, m.send(r, epochPlan{mode: ModeJournal, full: true}))
		must(t, r.WaitApplied(context.Background(), m.acked.Epoch))
		must(t, r.Close())
		if !journal {
			must(t, dev.ZeroOut(super(t, dev).layout.journal.offset, MinJournalBytes))
		}
		must(t, FormatReplica(dev, testOptions(m.size)))
		r = open(t, dev)
		if st := r.Status(); st.State != DiskBlank || !st.NeedsFull || !st.Committed.IsZero() {
			t.Fatalf("%+v", st)
		}
		must(t, r.Close())
	}
}

// The areas are where the drawing says, the data where the caller put it, and
// nothing else is touched.
func TestReplicaKeepsToItsAreas(t *testing.T) {
	m := newModel(t, 9, testVolume)
	o := testOptions(m.size)
	o.DataOffset, o.ReserveBytes = 3<<20, 2<<20
	dev := blocktest.NewMemory(o.NeededBytes() + 5*BlockSize)
	filler := bytes.Repeat([]byte{0x5a}, int(dev.Size()))
	_, err := dev.WriteAt(filler, 0)
	must(t, err)
	must(t, FormatReplica(dev, o))
	r := open(t, dev)
	must(t, m.send(r, epochPlan{mode: ModeInPlace, full: true, blocks: 2}))
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 8}))
	must(t, r.WaitApplied(context.Background(), m.acked.Epoch))
	must(t, r.Close())
	all := snapshot(t, dev)
	if !bytes.Equal(all[o.DataOffset:][:m.size], m.image) {
		t.Error("the data is not where it belongs")
	}
	l := super(t, dev).layout
	for _, free := range []area{{0, o.DataOffset}, {o.DataOffset + m.size, l.changeMap.offset - o.DataOffset - m.size}, {l.deviceBytes, dev.Size() - l.deviceBytes}} {
		if !bytes.Equal(all[free.offset:][:free.length], filler[:free.length]) {
			t.Errorf("written between %d and %d", free.offset, free.offset+free.length)
		}
	}
	if l.reserve.length != 2<<20 || l.reserve.offset+l.reserve.length != l.changeMap.offset {
		t.Errorf("%+v", l)
	}
}

// undecided returns a device whose last commit reached the journal and not
// the superblock.
func undecided(t *testing.T, seed uint64) (*model, *blocktest.Memory) {
	t.Helper()
	m, dev, r := synced(t, seed)
	dev.FailAt(blocktest.OpWrite, 2, errors.New("broken on purpose")) // after two segments
	if err := m.send(r, epochPlan{mode: ModeJournal, blocks: 2}); err == nil || m.acked.Epoch != 1 {
		t.Fatalf("%v, %s", err, m.acked)
	}
	must(t, r.Close())
	if sb := super(t, dev); sb.committed.Epoch != 1 {
		t.Fatalf("%+v", sb)
	}
	return m, dev
}

// What was dropped stays dropped, whatever can be read again later.
func TestDroppedEpochsStayDropped(t *testing.T) {
	m, dev := undecided(t, 40)
	rolled := open(t, dev.Clone())
	if st := rolled.Status(); st.Committed.Epoch != 2 {
		t.Fatalf("%+v", st) // it may have been acknowledged
	}
	must(t, m.checkOpen(rolled))
	other := dev.Clone()

	for _, drop := range []bool{false, true} { // its first segment can't be read: only the operator drops it
		dev.FailAt(blocktest.OpRead, 2, errors.New("for once"))
		r, err := OpenReplica(context.Background(), dev, OpenOptions{DropJournal: drop})
		if errors.Is(err, ErrUnreadable) == drop {
			t.Fatalf("dropping %v: %v", drop, err)
		}
		if err == nil {
			must(t, r.Close())
		}
	}
	r := open(t, dev)
	if st := r.Status(); st.Committed.Epoch != 1 {
		t.Fatalf("%+v", st)
	}
	m.lineage, m.image = Lineage{m.acked}, bytes.Clone(m.images[m.acked])
	clear(m.asked) // epoch 2 is no part of this history
	m.asked[m.acked] = true
	must(t, m.send(r, epochPlan{mode: ModeInPlace, blocks: 1}))
	must(t, r.Close())
	must(t, m.check(dev))

	flip(t, other, 1024, 0)
	r, err := OpenReplica(context.Background(), other, OpenOptions{DropJournal: true})
	must(t, err)
	must(t, r.Close())
	if st := open(t, other).Status(); st.State != DiskInconsistent || st.PendingEpochs != 0 || st.Committed.Epoch != 1 {
		t.Fatalf("%+v", st)
	}
}

// badSector can't be read until it is written.
type badSector struct {
	*blocktest.Memory
	at int64 // -1: healed
}

func (b *badSector) ReadAt(p []byte, off int64) (int, error) {
	if b.at >= off && b.at < off+int64(len(p)) {
		return 0, errors.New("medium error")
	}
	return b.Memory.ReadAt(p, off)
}

func (b *badSector) WriteAt(p []byte, off int64) (int, error) {
	if b.at >= off && b.at < off+int64(len(p)) {
		b.at = -1
	}
	return b.Memory.WriteAt(p, off)
}

// A bad sector where the next epoch would begin keeps a replica from being
// opened, as an acknowledged one may lie there; the operator's word ends that.
func TestBadSectorBehindTheHead(t *testing.T) {
	_, dev, r := synced(t, 41)
	must(t, r.Close())
	sb := super(t, dev)
	bad := &badSector{dev, ring{area: sb.layout.journal}.place(sb.head.logical)}
	for range 2 {
		if _, err := OpenReplica(context.Background(), bad, OpenOptions{}); !errors.Is(err, ErrUnreadable) || !strings.Contains(err.Error(), "epochs that may be committed") {
			t.Fatal(err)
		}
	}
	r, err := OpenReplica(context.Background(), bad, OpenOptions{DropJournal: true})
	must(t, err)
	must(t, r.Close())
	if s := open(t, bad).Status(); s.State != DiskConsistent || s.Committed != sb.committed {
		t.Fatalf("%+v", s)
	}
}
