package protocol

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
)

// noise is what nothing can compress.
func (m *model) noise(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(m.rng.Uint32())
	}
	return b
}

func TestEpochsGoOnWhileOneWaits(t *testing.T) {
	m, _, r := synced(t, 20)
	ctx := context.Background()
	image, err := r.Hold(ctx)
	must(t, err)
	before := bytes.Clone(m.image)
	for range 3 {
		must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 4}))
	}
	st := r.Status()
	if st.PendingEpochs != 3 || st.Committed != m.acked || st.Applied.Epoch != 1 || st.State != DiskConsistent || !m.lineage.Equal(st.Lineage) {
		t.Fatalf("%+v", st)
	}
	got := make([]byte, m.size)
	_, err = image.ReadAt(got, 0)
	must(t, err)
	if !bytes.Equal(got, before) || image.Position().Epoch != 1 {
		t.Fatal("the held image changed")
	}
	// What waits for the image gives up with its context.
	soon, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := r.WaitApplied(soon, m.acked.Epoch); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v", err)
	}
	image.Release()
	image.Release()
	must(t, r.WaitApplied(ctx, m.acked.Epoch))
	must(t, m.checkOpen(r))
	// Whoever asks for an image gets no older one than was committed then,
	// also when the replica was opened with epochs waiting.
	_, again := waiting(t, 20)
	r2 := open(t, again)
	w := *m
	w.lineage, w.next, w.image = r2.Status().Lineage, 100, bytes.Clone(m.image)
	image, err = r2.Hold(ctx)
	must(t, err)
	must(t, w.send(r2, epochPlan{mode: ModeJournal, blocks: 1}))
	soon2, cancel2 := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel2()
	if _, err := r2.Hold(soon2); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an older image was handed out: %v", err)
	}
	image.Release()
	image, err = r2.Hold(ctx)
	must(t, err)
	if image.Position().Epoch != 100 {
		t.Errorf("image of %s", image.Position())
	}
	image.Release()
	if err := r.WaitApplied(ctx, m.acked.Epoch+1); err == nil {
		t.Error("waited for an epoch that was never committed")
	}
	// An epoch begun may be finished by a later cut, and the map names that one.
	for _, mode := range []Mode{ModeInPlace, ModeJournal} {
		must(t, m.send(r, epochPlan{mode: mode, blocks: 6, gap: 3}))
		must(t, r.WaitApplied(ctx, m.acked.Epoch))
		must(t, m.checkOpen(r))
	}
}

func TestJournalFull(t *testing.T) {
	m, dev, r := synced(t, 21)
	ctx := context.Background()
	send := func(ctx context.Context, bytes int) error {
		meta := FrameMeta{m.next, 1, 1}
		m.next++
		lineage := m.lineage.Extend(Position{m.lineage.Tip().Generation, meta.Epoch})
		if err := r.Begin(ctx, EpochStart{Epoch: meta.Epoch, Attempt: 1, Mode: ModeJournal, Lineage: lineage}); err != nil {
			return err
		}
		d := NewStreamDigest()
		for ; bytes > 0; bytes -= 1 << 20 {
			copy(m.image, m.noise(1<<20))
			frames := AppendFrames(nil, meta, 0, m.image[:1<<20], nil)
			must(t, d.AddFrames(frames))
			if err := r.Append(ctx, 0, frames); err != nil {
				if err2 := r.Commit(ctx, EpochCommit{Epoch: meta.Epoch, Attempt: 1, Streams: []StreamSum{d.Sum()}}); err2 == nil {
					t.Error("committed after a failed append")
				}
				return err
			}
		}
		p := lineage.Tip()
		m.images[p], m.asked[p] = append([]byte(nil), m.image...), true
		if err := r.Commit(ctx, EpochCommit{Epoch: meta.Epoch, Attempt: 1, Streams: []StreamSum{d.Sum()}}); err != nil {
			return err
		}
		m.lineage, m.acked = lineage, p
		return nil
	}
	// Larger than the ring: refused, and the old image stays.
	old := append([]byte(nil), m.image...)
	if err := send(ctx, 5<<20); !errors.Is(err, ErrJournalFull) {
		t.Fatalf("%v", err)
	}
	must(t, r.Abort())
	must(t, m.check(dev.Clone()))
	copy(m.image, old)
	// What JournalFree promises fits.
	free := r.JournalFree()
	if free < 3<<20 {
		t.Fatalf("%d bytes free of %d", free, MinJournalBytes)
	}
	// While an image is held the second has to wait; it goes on after it.
	image, err := r.Hold(ctx)
	must(t, err)
	must(t, send(ctx, 2<<20))
	soon, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
	defer cancel()
	if err := send(soon, 3<<20); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("%v", err)
	}
	must(t, r.Abort())
	done := make(chan error)
	go func() { done <- send(ctx, 3<<20) }()
	time.Sleep(10 * time.Millisecond)
	image.Release()
	must(t, <-done)
	must(t, r.WaitApplied(ctx, m.acked.Epoch))
	must(t, m.checkOpen(r))
	// Round and round the ring, also opened with epochs across its end.
	crossed := 0
	for range 12 {
		image, err := r.Hold(ctx)
		must(t, err)
		must(t, send(ctx, 1<<20))
		must(t, m.check(dev.Clone()))
		sb := super(t, dev)
		if sb.tail.logical/uint64(sb.layout.journal.length) != (sb.head.logical-1)/uint64(sb.layout.journal.length) {
			crossed++
		}
		image.Release()
		must(t, r.WaitApplied(ctx, m.acked.Epoch))
	}
	if crossed < 2 {
		t.Errorf("the ring's end was crossed %d times", crossed)
	}
	must(t, m.checkOpen(r))
}

// An epoch without a frame needs room in the journal, too: its commit must not
// be put over the beginning of one that is still to be applied.
func TestEmptyEpochsWaitForRoom(t *testing.T) {
	m, dev, r := synced(t, 25)
	ctx := context.Background()
	image, err := r.Hold(ctx)
	must(t, err)
	// send commits an epoch of single blocks, as many as fit and at most so many.
	send := func(ctx context.Context, most int) error {
		meta := FrameMeta{m.next, 1, 1}
		m.next++
		lineage := m.lineage.Extend(Position{m.lineage.Tip().Generation, meta.Epoch})
		must(t, r.Begin(ctx, EpochStart{Epoch: meta.Epoch, Attempt: 1, Mode: ModeJournal, Lineage: lineage}))
		d := NewStreamDigest()
		var sums []StreamSum
		for i := range most {
			if r.open.writer.endAfter(FrameHeaderBytes+BlockSize)+commitMaxBytes-r.sb.tail.logical > MinJournalBytes {
				break
			}
			at := int64(i) * BlockSize % m.size
			copy(m.image[at:], m.noise(BlockSize))
			frames := AppendFrames(nil, meta, at, m.image[at:at+BlockSize], nil)
			must(t, d.AddFrames(frames))
			must(t, r.Append(ctx, 0, frames))
			sums = []StreamSum{d.Sum()}
		}
		p := lineage.Tip()
		m.images[p], m.asked[p] = bytes.Clone(m.image), true
		if err := r.Commit(ctx, EpochCommit{Epoch: meta.Epoch, Attempt: 1, Streams: sums}); err != nil {
			return err
		}
		m.lineage, m.acked = lineage, p
		return nil
	}
	must(t, send(ctx, 1<<20))
	if st := r.Status(); st.JournalFreeBytes != 0 {
		t.Fatalf("not full: %+v", st)
	}
	var waited error
	for range maxPendingEpochs - 2 {
		soon, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
		waited = send(soon, 0)
		cancel()
		must(t, m.check(dev.Clone()))
		if waited != nil {
			break
		}
	}
	if !errors.Is(waited, context.DeadlineExceeded) {
		t.Fatalf("all empty epochs found room: %v", waited)
	}
	image.Release()
	must(t, send(ctx, 0))
	must(t, r.WaitApplied(ctx, m.acked.Epoch))
	must(t, m.checkOpen(r))
}

func TestCommitChecksWhatArrived(t *testing.T) {
	m, dev, r := synced(t, 22)
	ctx := context.Background()
	meta := FrameMeta{m.next, 1, 1}
	lineage := m.lineage.Extend(Position{m.lineage.Tip().Generation, m.next})
	begin := func() {
		must(t, r.Begin(ctx, EpochStart{Epoch: meta.Epoch, Attempt: 1, Mode: ModeJournal, Lineage: lineage}))
	}
	a := AppendFrames(nil, meta, 0, m.noise(8192), nil)
	b := AppendFrames(nil, meta, 8192, m.noise(8192), nil)
	sum := func(frames ...[]byte) StreamSum {
		d := NewStreamDigest()
		for _, f := range frames {
			must(t, d.AddFrames(f))
		}
		return d.Sum()
	}
	for name, sums := range map[string][]StreamSum{
		"one lost": {sum(a, b), sum(b)}, "none of a stream came": {sum(a), sum(b), sum(a)}, "one more": {{}, sum(b)}, "swapped": {sum(b), sum(a)}, "stream missing": {sum(a)},
		"another order": {sum(a), {Frames: 1, Digest: [32]byte{1}}}, "too many": make([]StreamSum, MaxStreams+1),
	} {
		begin()
		must(t, r.Append(ctx, 0, a))
		must(t, r.Append(ctx, 1, b))
		if err := r.Commit(ctx, EpochCommit{Epoch: meta.Epoch, Attempt: 1, Streams: sums}); !errors.Is(err, ErrSums) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Frames that don't belong here spoil the epoch.
	other := func(e uint64, attempt uint32, at int64) []byte {
		return AppendZeroFrames(nil, FrameMeta{e, attempt, 1}, Range{at, 4096})
	}
	broken := AppendFrames(nil, meta, 0, bytes.Repeat([]byte("text"), 4096), mustCompressor(t))
	broken[FrameHeaderBytes+9] ^= 0x55
	reseal(broken)
	flipped := slices.Clone(a)
	flipped[FrameHeaderBytes+5] ^= 1
	for name, frames := range map[string][]byte{
		"another epoch": other(meta.Epoch+1, 1, 0), "another attempt": other(meta.Epoch, 2, 0),
		"outside": other(meta.Epoch, 1, m.size), "cut off": a[:len(a)-1], "unpackable": broken, "payload flipped": flipped,
	} {
		begin()
		if err := r.Append(ctx, 0, frames); !errors.Is(err, ErrBadFrame) || !strings.Contains(err.Error(), dev.Name()) {
			t.Errorf("%s: %v", name, err)
		}
		if err := r.Commit(ctx, EpochCommit{Epoch: meta.Epoch, Attempt: 1}); err == nil {
			t.Errorf("%s: committed", name)
		}
	}
	// In place it is found out later, and the store is not to blame.
	inPlace, dev2, r2 := synced(t, 22)
	must(t, r2.Begin(ctx, EpochStart{Epoch: meta.Epoch, Attempt: 1, Mode: ModeInPlace, Lineage: lineage}))
	err := r2.Append(ctx, 0, broken)
	if err == nil {
		d := NewStreamDigest()
		must(t, d.AddFrames(broken))
		err = r2.Commit(ctx, EpochCommit{Epoch: meta.Epoch, Attempt: 1, Streams: []StreamSum{d.Sum()}})
	}
	if !errors.Is(err, ErrBadFrame) {
		t.Errorf("unpackable in place: %v", err)
	}
	must(t, r2.Abort())
	must(t, inPlace.send(r2, epochPlan{mode: ModeInPlace, full: true, gap: 1}))
	must(t, r2.Close())
	must(t, inPlace.check(dev2))
	for name, err := range map[string]error{
		"a huge append":  r.Append(ctx, 0, make([]byte, MaxAppendBytes+1)),
		"a wrong stream": r.Append(ctx, MaxStreams, a),
		"another commit": r.Commit(ctx, EpochCommit{Epoch: meta.Epoch, Attempt: 9}),
	} {
		if err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	must(t, m.checkOpen(r))
	must(t, m.check(dev.Clone()))
}

func mustCompressor(t *testing.T) *Compressor {
	t.Helper()
	c, err := NewCompressor(CodecS2)
	must(t, err)
	return c
}

func TestBeginRefusesWhatCannotFollow(t *testing.T) {
	m, dev, r := synced(t, 23)
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 1, gap: 4})) // 1/1..6
	g := m.lineage.Tip().Generation
	if m.acked.Epoch != 6 {
		t.Fatal(m.acked)
	}
	must(t, r.WaitApplied(context.Background(), 6))
	other := Generation{77}
	writes := dev.Count(blocktest.OpWrite)
	for name, c := range map[string]struct {
		s    EpochStart
		want error
	}{
		"the same position":     {EpochStart{Epoch: 6, Lineage: Lineage{{g, 6}}}, ErrNotForward},
		"the past":              {EpochStart{Epoch: 5, Lineage: Lineage{{g, 5}}}, ErrNotForward},
		"the past in full":      {EpochStart{Epoch: 5, Full: true, Lineage: Lineage{{g, 5}}}, ErrNotForward},
		"again in full":         {EpochStart{Epoch: 6, Full: true, Lineage: Lineage{{g, 6}}}, ErrNotForward},
		"a used number":         {EpochStart{Epoch: 6, Lineage: Lineage{{g, 7}}}, ErrNotForward},
		"unrelated":             {EpochStart{Epoch: 9, Lineage: Lineage{{other, 9}}}, ErrNeedsFull},
		"diverged":              {EpochStart{Epoch: 9, Lineage: Lineage{{g, 5}, {other, 9}}}, ErrNeedsFull},
		"no lineage":            {EpochStart{Epoch: 9}, nil},
		"a lineage ending soon": {EpochStart{Epoch: 9, Lineage: Lineage{{g, 8}}}, nil},
		"a bad lineage":         {EpochStart{Epoch: 9, Lineage: Lineage{{g, 7}, {g, 9}}}, nil},
		"epoch zero":            {EpochStart{Full: true, Lineage: Lineage{{other, 1}}}, nil},
		"no mode":               {EpochStart{Epoch: 9, Mode: 9, Lineage: Lineage{{g, 9}}}, nil},
	} {
		if c.s.Mode == 0 {
			c.s.Mode = ModeInPlace
		}
		err := r.Begin(context.Background(), c.s)
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if dev.Count(blocktest.OpWrite) != writes {
		t.Error("something refused was written")
	}
	must(t, m.checkOpen(r))
	// Full epochs may take another way.
	m.lineage = Lineage{{g, 3}, {other, 4}}
	m.acked, m.next = Position{}, 5
	must(t, m.send(r, epochPlan{mode: ModeJournal, full: true}))
	must(t, r.WaitApplied(context.Background(), 5))
	must(t, m.checkOpen(r))

	blank := testDevice(m.size)
	must(t, FormatReplica(blank, testOptions(m.size)))
	b := open(t, blank)
	if err := b.Begin(context.Background(), EpochStart{Epoch: 1, Mode: ModeJournal, Lineage: Lineage{{g, 1}}}); !errors.Is(err, ErrNeedsFull) {
		t.Errorf("changes for a blank replica: %v", err)
	}
	if _, err := b.Hold(context.Background()); !errors.Is(err, ErrNotConsistent) {
		t.Errorf("an image of a blank replica: %v", err)
	}
}

// An interrupted in-place catch-up leaves blocks of its epoch behind: only an
// epoch that contains that one may bring changes.
func TestInterruptedCatchUp(t *testing.T) {
	ctx := context.Background()
	for _, sameWay := range []bool{true, false} {
		m, dev, r := synced(t, 24)
		base := m.lineage.Clone()
		g := base.Tip().Generation
		old := bytes.Clone(m.image)
		begun := m.next
		must(t, r.Begin(ctx, EpochStart{Epoch: begun, Attempt: 1, Mode: ModeInPlace, Lineage: base.Extend(Position{g, begun})}))
		garbage := bytes.Repeat([]byte{0xdd}, 8192)
		must(t, r.Append(ctx, 0, AppendFrames(nil, FrameMeta{begun, 1, 1}, 1<<20, garbage, nil)))
		got := make([]byte, 8192)
		must(t, r.ReadData(ctx, got, 1<<20))
		if !bytes.Equal(got, garbage) {
			t.Error("ReadData does not see what came")
		}
		if err := r.Append(ctx, 0, AppendZeroFrames(nil, FrameMeta{begun, 1, 0}, Range{0, 4096})); !errors.Is(err, ErrBadFrame) {
			t.Errorf("an earlier round after a later one: %v", err)
		}
		must(t, r.Abort())
		must(t, r.Close())
		r = open(t, dev)
		if st := r.Status(); st.State != DiskInconsistent || st.NeedsFull || !strings.Contains(st.Reason, "in-place") {
			t.Fatalf("%+v", st)
		}
		next := Position{g, begun + 1}
		lineage := base.Extend(next)
		if !sameWay {
			next = Position{Generation{99}, begun + 1}
			lineage = base.Extend(next)
		}
		err := r.Begin(ctx, EpochStart{Epoch: next.Epoch, Attempt: 1, Mode: ModeInPlace, Lineage: lineage})
		if !sameWay {
			if !errors.Is(err, ErrNeedsFull) {
				t.Errorf("another generation: %v", err)
			}
			continue
		}
		must(t, err)
		copy(old[1<<20:], garbage)
		frames := AppendFrames(nil, FrameMeta{next.Epoch, 1, 1}, 1<<20, garbage, nil)
		must(t, r.Append(ctx, 0, bytes.Clone(frames)))
		d := NewStreamDigest()
		must(t, d.AddFrames(frames))
		must(t, r.Commit(ctx, EpochCommit{Epoch: next.Epoch, Attempt: 1, Streams: []StreamSum{d.Sum()}}))
		m.images[next], m.asked[next], m.acked = old, true, next
		must(t, m.checkOpen(r))
		must(t, r.Close())
		must(t, m.check(dev))
	}
}

// Zeros cost nothing: chunks that only ever were zeros are no data.
func TestZerosAreNoData(t *testing.T) {
	ctx := context.Background()
	for _, mode := range []Mode{ModeInPlace, ModeJournal} {
		m := newModel(t, 25, testVolume)
		dev := testDevice(m.size)
		_, err := dev.WriteAt(m.noise(int(m.size)/BlockSize*BlockSize), 0) // what was on the disk before
		must(t, err)
		must(t, FormatReplica(dev, testOptions(m.size)))
		r := open(t, dev)
		g := Generation{1}
		meta := FrameMeta{1, 1, 1}
		copy(m.image[600<<10:], m.noise(4096))
		var frames []byte
		for at := int64(0); at < m.size; at += 100 << 10 { // runs of zeros cut anywhere
			frames = AppendFrames(frames, meta, at, m.image[at:min(at+100<<10, m.size)], nil)
		}
		d := NewStreamDigest()
		must(t, d.AddFrames(frames))
		must(t, r.Begin(ctx, EpochStart{Epoch: 1, Attempt: 1, Mode: mode, Full: true, Lineage: Lineage{{g, 1}}}))
		must(t, r.Append(ctx, 0, frames))
		must(t, r.Commit(ctx, EpochCommit{Epoch: 1, Attempt: 1, Streams: []StreamSum{d.Sum()}}))
		must(t, r.WaitApplied(ctx, 1))
		image, err := r.Hold(ctx)
		must(t, err)
		got := make([]byte, m.size)
		_, err = image.ReadAt(got, 0)
		must(t, err)
		if !bytes.Equal(got, m.image) {
			t.Errorf("mode %d: another image at %d", mode, firstDifference(got, m.image))
		}
		ranges, err := image.DataRanges()
		if err != nil || len(ranges) != 1 || ranges[0] != (Range{512 << 10, ChunkBytes}) {
			t.Errorf("mode %d: data at %v, %v", mode, ranges, err)
		}
		if _, err := image.ChangedSince(0); !errors.Is(err, ErrTrackingLost) {
			t.Errorf("mode %d: changes before the first epoch: %v", mode, err)
		}
		image.Release()
		// A range found equal by comparison sends no frames: it may be data.
		must(t, r.Begin(ctx, EpochStart{Epoch: 2, Attempt: 1, Mode: mode, Full: true, Lineage: Lineage{{g, 2}}}))
		must(t, r.Commit(ctx, EpochCommit{Epoch: 2, Attempt: 1}))
		must(t, r.WaitApplied(ctx, 2))
		image, err = r.Hold(ctx)
		must(t, err)
		if ranges, err := image.DataRanges(); err != nil || len(ranges) != 1 || ranges[0].Length != m.size {
			t.Errorf("mode %d: data at %v, %v: want everything", mode, ranges, err)
		}
		image.Release()
	}
}

func TestCloseEndsWhatWaits(t *testing.T) {
	m, _, r := synced(t, 26)
	image, err := r.Hold(context.Background())
	must(t, err)
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 1}))
	done := make(chan error)
	go func() { done <- r.WaitApplied(context.Background(), m.acked.Epoch) }()
	time.Sleep(5 * time.Millisecond)
	must(t, r.Close())
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("%v", err)
	}
	image.Release()
	if err := m.send(r, epochPlan{mode: ModeJournal, blocks: 1}); !errors.Is(err, ErrClosed) {
		t.Errorf("%v", err)
	}
	must(t, r.Close())
}
