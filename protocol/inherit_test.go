package protocol

import (
	"context"
	"errors"
	"testing"

	"blockferry/blockdev/blocktest"
	"blockferry/proto"
)

// feedTo brings a node's replica from the cut since (0: all of it, in place) to a
// new cut of the source, and returns how many frames it took.
func feedTo(t *testing.T, src *memSource, n *node, line Lineage, since, epoch uint64, narrow bool) uint64 {
	t.Helper()
	ctx := t.Context()
	c, err := src.Cut(ctx, epoch, CutWish{View: true})
	must(t, err)
	defer func() { must(t, c.Release()) }()
	var link *Link
	eventually(t, "the session before has ended", func() bool {
		link, err = Connect(ctx, LocalClient(n.recv), LinkConfig{VolumeUUID: testUUID, SizeBytes: testVolumeSize, Replica: n.name}, line)
		var refused *RefusedError
		return !errors.As(err, &refused) || refused.Reason != proto.Reason_REASON_BUSY
	})
	must(t, err)
	defer link.Close()
	to := Lineage{{line.Tip().Generation, epoch}}
	start, ranges := EpochStart{Epoch: epoch, Mode: ModeJournal, Lineage: to}, src.changed(since)
	if since == 0 {
		start.Mode, start.Full, ranges = ModeInPlace, true, []Range{{0, testVolumeSize}}
	}
	must(t, link.Begin(ctx, start, false))
	_, err = link.SendRound(ctx, Round{Source: c.View(), Ranges: cleanRanges(ranges, src.size), Narrow: narrow})
	must(t, err)
	must(t, link.Commit(ctx, to, 1))
	must(t, n.rep.WaitApplied(ctx, epoch))
	return link.Stats().Frames
}

// undo has a block hold what it held before, written again.
func (s *memSource) undo(b int64, k uint64) {
	s.write(b)
	s.mu.Lock()
	s.blocks[b] = k
	s.mu.Unlock()
}

// What was changed and changed back between two cuts that a copy was at differs at the cuts
// in between, which other copies may hold: its map names that, though nothing had to be
// sent, and zeros that came over zeros. What reads as zeros it still tells.
func TestMapNamesCutsItWasNeverAt(t *testing.T) {
	const block, chunk = 900, 900 * BlockSize / ChunkBytes
	for _, c := range []struct {
		name    string
		written bool // the block held data before
		narrow  bool
		frames  uint64
	}{{"compared, data", true, true, 0}, {"compared, zeros", false, true, 0}, {"sent, zeros", false, false, 1}} {
		t.Run(c.name, func(t *testing.T) {
			src := newMemSource(testVolumeSize, BlockSize)
			wroteSome(src, 0, 21) // the 22nd write is no zeros
			was := uint64(0)
			if c.written {
				src.write(block)
				was = src.blocks[block]
			}
			n, line := newNode(t, "x", testVolumeSize, 32<<20), Lineage{{gen(1), 5}}
			feedTo(t, src, n, line, 0, 5, false)
			src.write(block)
			other, err := src.Cut(t.Context(), 6, CutWish{}) // which others get
			must(t, err)
			must(t, other.Release())
			src.undo(block, was)
			if frames := feedTo(t, src, n, line, 5, 7, c.narrow); frames != c.frames {
				t.Fatalf("%d frames, want %d: that was no test", frames, c.frames)
			}
			n.check(src)
			image, err := n.rep.Hold(t.Context())
			must(t, err)
			defer image.Release()
			since, err := image.ChangedSince(6)
			must(t, err)
			if got := chunksOf(t, testVolumeSize, since); !got[chunk] || totalBytes(since) > ChunkBytes {
				t.Errorf("since cut 6 it names %v, want the chunk of %d", since, block*BlockSize)
			}
			data, err := image.DataRanges()
			must(t, err)
			if chunksOf(t, testVolumeSize, data)[chunk] != c.written {
				t.Errorf("with data: %v", data)
			}
		})
	}
}

// Of an epoch that was found in the journal only the frames are known.
func TestFoundEpochsEndWhatTheMapKnows(t *testing.T) {
	m := newModel(t, 8, testVolume)
	r := open(t, replicaWith(t, m))
	if _, err := r.ChangedSince(t.Context(), Position{m.acked.Generation, m.acked.Epoch - 1}); !errors.Is(err, ErrTrackingLost) {
		t.Errorf("it tells what changed between cuts of which it may not know all: %v", err)
	}
	if changed, err := r.ChangedSince(t.Context(), m.acked); err != nil || len(changed) > 0 {
		t.Errorf("since now: %v, %v", changed, err)
	}
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 5}))
	if changed, err := r.ChangedSince(t.Context(), Position{m.acked.Generation, m.acked.Epoch - 1}); err != nil || len(changed) == 0 {
		t.Errorf("since the epoch before: %v, %v", changed, err)
	}
}

// heir is a node that took over at cut 9 from a replica that was at cuts 5, 7 and 9 before;
// another copy is at 6, or at 8. Some blocks were changed and changed back meanwhile.
type heir struct {
	src   *memSource // of the new primary
	disk  *blocktest.Memory
	other *node
	label *memState
	line  Lineage
	wrote []Range // after the other's cut, also what was changed back
}

func newHeir(t *testing.T, otherAt uint64) *heir {
	t.Helper()
	old := newMemSource(testVolumeSize, BlockSize)
	wroteSome(old, 0, 1500)
	h := &heir{label: &memState{}, other: newNode(t, "other", testVolumeSize, 32<<20)}
	x, line := newNode(t, "x", testVolumeSize, 32<<20), Lineage{{gen(1), 1}}
	feedTo(t, old, h.other, line, 0, 4, false)
	at := map[uint64]bool{6: true, 8: true}
	since, last := uint64(0), uint64(4)
	for epoch := uint64(5); epoch <= 9; epoch++ {
		block := int64(100 * epoch)
		was := old.blocks[block+1]
		old.write(block)
		if at[epoch] { // and back, before the next cut
			old.write(block + 1)
			h.wrote = append(h.wrote, Range{(block + 1) * BlockSize, BlockSize})
			if epoch > otherAt {
				c, err := old.Cut(t.Context(), epoch, CutWish{})
				must(t, err)
				must(t, c.Release())
			} else {
				feedTo(t, old, h.other, line, last, epoch, true)
				last = epoch
			}
			old.undo(block+1, was)
			continue
		}
		feedTo(t, old, x, line, since, epoch, since > 0)
		since = epoch
	}
	x.recv.Remove(testUUID, "x")
	_, err := x.rep.TakeOver(t.Context(), h.label, TakeOverOptions{Force: true})
	must(t, err)
	state, err := DecodeSourceState(h.label.b)
	must(t, err)
	h.disk, h.line = x.store, state.Effective()
	h.src = newMemSource(testVolumeSize, BlockSize)
	h.src.blocks, h.src.last, h.src.cut, h.src.lostBefore = append([]uint64(nil), old.blocks...), 1_000_000, 9, 9
	return h
}

// inheriting is a volume whose cuts ask its disk for what its tracker does not know.
type inheriting struct {
	*memSource
	h *heir
	t *testing.T
}

type inheritingCut struct {
	Cut
	s inheriting
}

func (s inheriting) Cut(ctx context.Context, epoch uint64, wish CutWish) (Cut, error) {
	c, err := s.memSource.Cut(ctx, epoch, wish)
	if err != nil {
		return nil, err
	}
	return inheritingCut{c, s}, nil
}

func (c inheritingCut) Changed(since uint64) ([]Range, error) {
	changed, err := c.Cut.Changed(since)
	if !errors.Is(err, ErrTrackingLost) {
		return changed, err
	}
	raw, err := c.s.h.label.Load()
	if err != nil {
		return nil, err
	}
	state, err := DecodeSourceState(raw)
	if err != nil {
		return nil, err
	}
	past, err := ReadInheritance(c.s.h.disk, testUUID, testVolumeSize, state.Effective())
	if err != nil {
		return nil, err
	}
	return past.ChangedSince(since, c.Cut.Changed)
}

// A copy that was behind the one that took over gets what changed since its own cut, also
// what was changed back, and no more is looked at; what is not known is compared.
func TestBehindTheOneThatTookOver(t *testing.T) {
	for _, c := range []struct {
		name   string
		at     uint64
		spoil  func(*heir)
		action Action
	}{
		{"at a cut in between", 6, nil, Incremental},
		{"at a later one", 8, nil, Incremental},
		{"from before the map begins", 4, nil, CompareAll},
		{"tracking began anew since", 6, func(h *heir) { h.src.lostBefore = 10 }, CompareAll},
		{"the superblocks are gone", 6, func(h *heir) {
			must(t, zeroSuperblocks(h.disk, h.disk.Size()/layoutAlign*layoutAlign-superAreaBytes))
		}, CompareAll},
		{"the map can't be read", 6, func(h *heir) { h.disk.FailAt(blocktest.OpRead, 2, errors.New("broken on purpose")) }, CompareAll},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHeir(t, c.at)
			wroteSome(h.src, 1200, 10)
			if c.spoil != nil {
				c.spoil(h)
			}
			r := startRig(t, h.src, h.label, []*node{h.other}, func(p *PrimaryConfig) { p.Source = inheriting{h.src, h, t} })
			r.sync()
			h.other.check(h.src)
			e := r.epochs("other")[0]
			if e.Action != c.action.String() {
				t.Errorf("it followed by %s, want %v", e.Action, c.action)
			}
			if c.action == Incremental && (e.Link.MarkedBytes > 6*ChunkBytes || e.Link.SentBytes > 20*BlockSize) {
				t.Errorf("%d bytes were looked at and %d sent", e.Link.MarkedBytes, e.Link.SentBytes)
			}
		})
	}
}

// What a disk holds of its time as a replica counts for a line that went through the
// position at which it took over, and for no other.
func TestInheritance(t *testing.T) {
	h := newHeir(t, 6)
	at := Position{gen(1), 9}
	none := func(uint64) ([]Range, error) { return nil, nil }
	later := h.line.Extend(Position{gen(7), 40}).Extend(Position{gen(8), 41})
	var many Lineage
	for i := range MaxGenerations - 1 {
		many = append(many, Position{gen(byte(100 + i)), uint64(20 + i)})
	}
	for _, c := range []struct {
		name   string
		volume [16]byte
		size   int64
		line   Lineage
		known  bool
	}{
		{"the line it began", testUUID, testVolumeSize, h.line, true},
		{"much later", testUUID, testVolumeSize, later, true},
		{"older generations forgotten", testUUID, testVolumeSize, append(Lineage{at}, many...), true},
		{"its position forgotten, too", testUUID, testVolumeSize, many, false},
		{"another volume", [16]byte{1}, testVolumeSize, h.line, false},
		{"another size", testUUID, 2 * testVolumeSize, h.line, false},
		{"restored from an older cut", testUUID, testVolumeSize, Lineage{{gen(1), 8}, {gen(9), 50}}, false},
		{"restored from one that went on where it took over", testUUID, testVolumeSize, Lineage{{gen(1), 30}, {gen(9), 50}}, false},
		{"of another line", testUUID, testVolumeSize, Lineage{{gen(9), 50}}, false},
		{"no line", testUUID, testVolumeSize, nil, false},
	} {
		past, err := ReadInheritance(h.disk, c.volume, c.size, c.line)
		if c.known != (err == nil) || err != nil && !errors.Is(err, ErrTrackingLost) {
			t.Errorf("%s: %v", c.name, err)
		}
		if err == nil && past.At() != at {
			t.Errorf("%s: it took over at %v, want %v", c.name, past.At(), at)
		}
	}
	sb, _, err := newestSuperblock(h.disk)
	must(t, err)
	sb.lineage = Lineage{{gen(4), 2}, at}
	for past, known := range map[byte]bool{4: true, 5: false} { // of two pasts numbers mean two things
		_, err := sb.inheritance(h.disk, testUUID, testVolumeSize, Lineage{{gen(past), 2}, at, {gen(9), 50}})
		if known != (err == nil) {
			t.Errorf("a line that came from generation %d: %v", past, err)
		}
	}
	replica := h.other.rep.Status().Committed
	if past, err := ReadInheritance(h.other.store, testUUID, testVolumeSize, Lineage{replica}.Extend(Position{gen(9), 50})); err == nil {
		t.Errorf("a replica's disk tells of the time before %v", past.At())
	}
	past, err := ReadInheritance(h.disk, testUUID, testVolumeSize, h.line)
	must(t, err)
	for since, want := range map[uint64]bool{4: false, 5: true, 6: true, 8: true, 9: false, 10: false} {
		changed, err := past.ChangedSince(since, none)
		if want != (err == nil) || err != nil && !errors.Is(err, ErrTrackingLost) {
			t.Errorf("since %d: %v, %v", since, changed, err)
		}
		for _, w := range h.wrote {
			if written := uint64(w.Offset / BlockSize / 100); want && written >= since && missing(changed, []Range{w}) >= 0 {
				t.Errorf("since %d: it names %v, not %v", since, changed, w)
			}
		}
	}
	tracked := Range{5 << 20, BlockSize}
	changed, err := past.ChangedSince(8, func(since uint64) ([]Range, error) {
		if since != at.Epoch {
			t.Errorf("the tracker was asked for what changed since %d", since)
		}
		return []Range{tracked}, nil
	})
	must(t, err)
	if missing(changed, []Range{tracked}) >= 0 {
		t.Errorf("what changed since is left out: %v", changed)
	}
	if _, err := past.ChangedSince(8, func(uint64) ([]Range, error) { return nil, ErrTrackingLost }); !errors.Is(err, ErrTrackingLost) {
		t.Errorf("the tracker does not know, and yet: %v", err)
	}
	// A page of the map that is damaged counts as changed.
	_, err = h.disk.WriteAt(make([]byte, BlockSize), past.cmap.pageOffset(0))
	must(t, err)
	if changed, err := past.ChangedSince(8, none); err != nil || totalBytes(changed) != testVolumeSize {
		t.Errorf("the map is damaged, and it names %v, %v", changed, err)
	}
}

// One that took over and stands down for a node that went on from before that knows what
// changed, by both.
func TestStandDownKnowsTheTimeBefore(t *testing.T) {
	for _, known := range []bool{true, false} {
		h := newHeir(t, 6)
		state, err := DecodeSourceState(h.label.b)
		must(t, err)
		o := StandDownOptions{Stray: true, Follow: Lineage{{gen(1), 6}, {gen(5), 30}}, ChangedSince: func(since uint64) ([]Range, error) {
			if since < 9 {
				return nil, ErrTrackingLost
			}
			return []Range{{1200 * BlockSize, BlockSize}}, nil
		}}
		o.Format = FormatOptions{VolumeUUID: testUUID, SizeBytes: testVolumeSize, JournalBytes: 32 << 20}
		if !known {
			state.Lineage = Lineage{{gen(1), 8}, {gen(9), 9}} // as after a restore
			must(t, saveState(h.label, state))
		}
		got, err := StandDown(h.label, h.disk, o)
		must(t, err)
		if want := map[bool]uint64{true: 6, false: 0}[known]; got.Since != want {
			t.Errorf("known %v: it knows what changed since %d, want %d", known, got.Since, want)
		}
		if wrote := []Range{{700 * BlockSize, BlockSize}, h.wrote[0], {900 * BlockSize, BlockSize}, {1200 * BlockSize, BlockSize}}; known {
			for _, w := range wrote {
				if missing(got.Changed, []Range{w}) >= 0 {
					t.Errorf("%v is left out of %v", w, got.Changed)
				}
			}
		}
		r := open(t, h.disk)
		_, err = r.ChangedSince(t.Context(), Position{gen(1), 6})
		if known != (err == nil) || err != nil && !errors.Is(err, ErrTrackingLost) {
			t.Errorf("known %v: %v", known, err)
		}
	}
}
