package protocol

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// openEpoch is the epoch whose frames are coming in; epochMu guards it.
type openEpoch struct {
	start    EpochStart
	digests  [MaxStreams]*StreamDigest
	frames   uint64
	length   int64 // of the frames with their headers
	touched  *touched
	rounds   roundSet
	broken   error    // why it can't be committed any more
	bytes    uint64   // that the frames describe
	blocks   blockSet // what it describes, if that may be the only copy, or is fine
	fine     bool     // its blocks are all that it changes, and somebody may ask for them
	narrowed bool     // of a fine one some were compared

	writer *segmentWriter // of a journal epoch
	first  cursor
	// spilled: it goes on in the spill file; decided: a commit may be found that
	// counts on what is there, spillPart
	spilled, decided bool
	spillPart        *spillPart

	pipe   *writePipe // of an in-place epoch
	marked *touched   // what the durable change map names already
}

// Begin starts an epoch or a new attempt at one; what was appended for an
// epoch that was not committed, or kept, is dropped. ErrNeedsFull and ErrNotForward say
// that it can't follow what the replica holds; nothing was written then. An in-place
// epoch waits until everything is applied and no image is held, and makes it
// durable that the replica is inconsistent; Abort doesn't change that any more.
func (r *Replica) Begin(ctx context.Context, s EpochStart) error {
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	s.Lineage = s.Lineage.Clone()
	if err := r.mayBegin(s); err != nil {
		return err
	}
	r.dropOpen()
	o := &openEpoch{start: s, touched: newTouched(r.lay.size)}
	if s.Mode == ModeInPlace {
		return r.beginInPlace(ctx, o)
	}
	r.mu.Lock()
	o.first, o.fine = r.sb.head, r.fine != nil && !s.Full && s.Discard.IsZero()
	r.mu.Unlock()
	o.writer = newSegmentWriter(r.ring, o.first, s.Epoch, s.Attempt, r.runs)
	r.open = o
	return nil
}

// mayBegin checks an epoch's announcement.
func (r *Replica) mayBegin(s EpochStart) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.usable(); err != nil {
		return err
	}
	if s.Mode != ModeJournal && (s.Mode != ModeInPlace || !s.Discard.IsZero()) || s.Epoch == 0 {
		return fmt.Errorf("%s: epoch %d in mode %d, giving up %v: want an epoch above 0 and mode journal, or in-place and nothing given up",
			r.store.Name(), s.Epoch, s.Mode, s.Discard)
	}
	return r.mayFollow(s.Epoch, s.Lineage, s)
}

// mayFollow says whether an epoch that was begun so can be laid over what is
// committed; mu is held.
func (r *Replica) mayFollow(epoch uint64, l Lineage, begun EpochStart) error {
	full := begun.Full
	if err := l.Check(); err != nil {
		return fmt.Errorf("%s: epoch %d: %w", r.store.Name(), epoch, err)
	}
	if l.Tip().Epoch < epoch {
		return fmt.Errorf("%s: epoch %d: its lineage ends with %s", r.store.Name(), epoch, l.Tip())
	}
	have := r.lineage()
	relation := Compare(l, have)
	if !r.sb.tookOver.IsZero() {
		return fmt.Errorf("%s: %w as %v", r.store.Name(), ErrTookOver, r.sb.tookOver)
	}
	if r.strayed() != "" || !begun.Discard.IsZero() {
		return r.mayDiscard(begun.Discard, l, relation)
	}
	forward := relation.Kind == Ahead && epoch > have.Tip().Epoch
	if full {
		if relation.Kind == Same && len(have) > 0 || relation.Kind == Behind || relation.Kind == Ahead && !forward {
			return fmt.Errorf("%s: %w: it holds %s, the epoch is %d of %s", r.store.Name(), ErrNotForward, have.Tip(), epoch, l.Tip())
		}
		return nil
	}
	var why string
	interrupted := r.sb.inPlace
	switch {
	case r.needsFull():
		why = r.sb.state.String()
	case relation.Kind == Same || relation.Kind == Behind || relation.Kind == Ahead && !forward:
		return fmt.Errorf("%s: %w: it holds %s, the epoch is %d of %s", r.store.Name(), ErrNotForward, have.Tip(), epoch, l.Tip())
	case relation.Kind != Ahead:
		why = fmt.Sprintf("its lineage %s and the epoch's, %s, are %s", have, l, relation)
	case !interrupted.IsZero() && !slices.ContainsFunc(l, func(p Position) bool {
		return p.Generation == interrupted.Generation && p.Epoch >= interrupted.Epoch
	}):
		// What that epoch wrote is only covered by changes since the image
		// before it if the new epoch went the same way.
		why = fmt.Sprintf("an in-place sync to %s has not ended and is not part of %s", interrupted, l)
	default:
		return nil
	}
	return fmt.Errorf("%s: %w: %s", r.store.Name(), ErrNeedsFull, why)
}

func (r *Replica) beginInPlace(ctx context.Context, o *openEpoch) error {
	err := r.wait(ctx, func() (bool, error) {
		if len(r.pending) > 0 || r.applying || r.holds > 0 {
			return false, nil
		}
		r.inPlace = true // from here on no image is handed out
		return true, nil
	})
	if err != nil {
		return err
	}
	o.marked = newTouched(r.lay.size)
	o.pipe = newWritePipe(r.store, r.lay.dataOffset, r.dec, r.runs)
	r.open = o
	s := o.start
	err = r.writeSuper(2, func(sb *superblock) {
		sb.state, sb.why = DiskInconsistent, whyInPlace
		sb.needFull = sb.needFull || s.Full || sb.applied.IsZero()
		sb.inPlace = Position{s.Lineage.Tip().Generation, s.Epoch}
		// Nothing left in the ring by an attempt at a journaled epoch can be
		// taken for a continuation.
		sb.head = cursor{logical: sb.head.logical + uint64(r.lay.journal.length), sequence: sb.head.sequence + 1}
		sb.tail = sb.head
	}, nil)
	if err == nil && s.Full {
		// Everything counts as changed until the commit knows better.
		if err = r.cmap.writeAll(s.Epoch, nil); err == nil {
			err = r.store.Flush()
		}
		if err != nil {
			err = r.failed(err)
		}
	}
	if err != nil {
		r.dropOpen()
	}
	return err
}

// dropOpen forgets the open epoch; epochMu is held.
func (r *Replica) dropOpen() {
	o := r.open
	r.open = nil
	if o == nil {
		return
	}
	if o.writer != nil {
		o.writer.end()
	}
	if o.pipe != nil {
		o.pipe.close()
	}
	if o.spilled && !o.decided {
		r.emptySpill()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inPlace = false
	r.usedEnd = 0
	r.kept = KeptStatus{}
	r.notify()
}

// Abort drops the open epoch, if there is one. A replica that an in-place
// epoch has begun to write stays inconsistent.
func (r *Replica) Abort() error {
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	r.dropOpen()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.usable()
}

// Append takes whole frames of the open epoch, at most MaxAppendBytes; their
// memory is the caller's again when it returns. stream (0 to MaxStreams-1) is which of the
// sender's streams they came by; the calls for one stream come one after
// another, those for several may run at once. In-place epochs want rounds in ascending
// order. When the journal has no room Append waits for applies, and returns
// ErrJournalFull when these can't help. After an error the epoch can't be committed.
func (r *Replica) Append(ctx context.Context, stream int, frames []byte) error {
	b, err := parseBundle(frames)
	return r.appendBundle(ctx, stream, b, err)
}

// appendBundle is Append of what came as one message; it stays the caller's.
// err is why it is no whole message.
func (r *Replica) appendBundle(ctx context.Context, stream int, b *bundle, err error) error {
	if stream < 0 || stream >= MaxStreams || b.bytes > MaxAppendBytes {
		return fmt.Errorf("%s: append of %d bytes to stream %d: at most %d bytes, streams 0 to %d",
			r.store.Name(), b.bytes, stream, MaxAppendBytes, MaxStreams-1)
	}
	r.mu.Lock()
	inPlace := r.inPlace
	r.mu.Unlock()
	// What goes to the journal is unpacked once here, so that nothing is ever
	// committed that can't be applied.
	if err == nil {
		err = r.check(b, inPlace)
	}
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	o := r.open
	if o == nil {
		return fmt.Errorf("%s: append without an open epoch", r.store.Name())
	}
	if o.broken != nil {
		return o.broken
	}
	if err == nil && o.writer != nil && !o.spilled {
		// Waited for before anything of it is taken: the sender may vanish meanwhile.
		if e := r.makeRoom(ctx, o.writer.endAfter(b.bytes)+r.roomBehind()); e != nil && !errors.Is(e, ErrJournalFull) {
			return e
		}
	}
	if err == nil {
		err = r.append(ctx, o, stream, b)
	}
	if err != nil {
		o.broken = fmt.Errorf("%s: epoch %d: %w", r.store.Name(), o.start.Epoch, err)
		return o.broken
	}
	return nil
}

// check looks at the payloads on their arrival. What is written from where
// this process has just summed it up is not looked at again.
func (r *Replica) check(b *bundle, inPlace bool) error {
	scratch := r.pool.Get().(*[]byte)
	defer r.pool.Put(scratch)
	for _, f := range b.frames {
		if _, same := within(b.data, f.Payload); inPlace && b.summed && same {
			continue
		}
		if err := f.checkPayload(); err != nil {
			return fmt.Errorf("%w: %s", ErrBadFrame, err)
		}
		if !inPlace && f.Kind == FrameData && f.Codec != CodecNone {
			if err := r.dec.Decode((*scratch)[:f.Length], f); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *Replica) append(ctx context.Context, o *openEpoch, stream int, b *bundle) error {
	frames := b.frames
	for _, f := range frames {
		if err := checkFrame(f, o.start.Epoch, o.start.Attempt, r.lay.size); err != nil {
			return err
		}
		if o.pipe != nil && o.frames > 0 && f.Round < o.rounds.last {
			return fmt.Errorf("%w: round %d after round %d in an in-place epoch", ErrBadFrame, f.Round, o.rounds.last)
		}
		if err := o.rounds.add(f.Round); err != nil {
			return err
		}
		o.touched.add(f)
		o.frames++
		o.bytes += uint64(f.Length)
	}
	o.length += int64(b.bytes)
	if o.digests[stream] == nil {
		o.digests[stream] = NewStreamDigest()
	}
	for _, f := range frames {
		o.digests[stream].Add(f.Header)
		if o.fine || !o.start.Discard.IsZero() {
			o.blocks.add(f.Range())
		}
	}
	if o.fine && len(o.blocks.pages) > maxFinePages {
		o.fine, o.blocks = false, blockSet{}
	}
	if o.pipe != nil {
		return r.appendInPlace(o, b)
	}
	for _, f := range frames {
		if err := r.roomFor(ctx, o, f); err != nil {
			return err
		}
		if err := o.writer.add(f); err != nil {
			return r.writeFailed(err)
		}
	}
	r.mu.Lock()
	if o.spilled {
		r.spilled = int64(o.writer.endAfter(0))
	} else {
		r.usedEnd = o.writer.endAfter(0)
	}
	r.mu.Unlock()
	return nil
}

// roomFor waits until there is room for a frame, in the journal or, once the
// whole of it is not enough, in the spill file.
func (r *Replica) roomFor(ctx context.Context, o *openEpoch, f Frame) error {
	n := FrameHeaderBytes + len(f.Payload)
	if !o.spilled {
		err := r.makeRoom(ctx, o.writer.endAfter(n)+r.roomBehind())
		if !errors.Is(err, ErrJournalFull) || !r.mayDivert() {
			return err
		}
		if err := r.divert(o); err != nil {
			return r.writeFailed(err)
		}
	}
	if end := o.writer.endAfter(n); end > uint64(r.spillLimit) {
		return fmt.Errorf("%w: the epoch needs more than the journal's %d bytes and the %d that may spill: allow more there, enlarge the journal or allow an in-place catch-up",
			ErrJournalFull, r.lay.journal.length, r.spillLimit)
	}
	return nil
}

// roomBehind is what must follow an epoch's frames in the journal.
func (r *Replica) roomBehind() uint64 {
	n := uint64(commitMaxBytes)
	if r.mayDivert() {
		n += segHeaderBytes + BlockSize // the marker
	}
	return n
}

// makeRoom waits until the journal may be written up to a logical offset.
func (r *Replica) makeRoom(ctx context.Context, end uint64) error {
	return r.wait(ctx, func() (bool, error) {
		if end-r.sb.tail.logical <= uint64(r.lay.journal.length) {
			return true, nil
		}
		if len(r.pending) == 0 && !r.applying {
			return false, fmt.Errorf("%w: the epoch needs more than %d bytes: enlarge the journal, give it a spill file or allow an in-place catch-up",
				ErrJournalFull, r.lay.journal.length)
		}
		return false, nil
	})
}

func (r *Replica) appendInPlace(o *openEpoch, b *bundle) error {
	frames := b.frames
	if !o.start.Full {
		these := newTouched(r.lay.size)
		for _, f := range frames {
			these.add(f)
		}
		// The change map is durable before the data it describes.
		if fresh := o.marked.takeNew(these); fresh != nil {
			damaged, err := r.cmap.update(fresh, o.start.Epoch)
			r.warn(damaged)
			if err == nil {
				err = r.store.Flush()
			}
			if err != nil {
				return r.failed(err)
			}
		}
	}
	for _, f := range frames {
		if err := o.pipe.put(f, b.data); err != nil {
			return r.pipeFailed(err)
		}
	}
	// Nothing of b stays behind that no writer has: the sender may wait for it.
	if err := o.pipe.letGo(); err != nil {
		return r.pipeFailed(err)
	}
	return nil
}

// pipeFailed tells a frame that can't be unpacked, which spoils the epoch,
// from a fault of the store.
func (r *Replica) pipeFailed(err error) error {
	if errors.Is(err, ErrBadFrame) {
		return err
	}
	return r.failed(err)
}

// Commit decides the open epoch: once it returns nil the epoch is durable and
// may be acknowledged. ErrSums says that what arrived is not what was sent.
// When ctx ends early nothing was decided; after any other error but ErrSums
// and those of Begin only opening the replica again tells.
func (r *Replica) Commit(ctx context.Context, c EpochCommit) error {
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	o := r.open
	if o == nil || o.start.Epoch != c.Epoch || o.start.Attempt != c.Attempt {
		return fmt.Errorf("%s: commit of epoch %d attempt %d, which is not open", r.store.Name(), c.Epoch, c.Attempt)
	}
	if o.broken != nil {
		return o.broken
	}
	record := commitRecord{frames: o.frames, cutNanos: c.CutUnixNanos, full: o.start.Full, streams: c.Streams, lineage: c.Lineage.Clone()}
	if len(c.Lineage) == 0 {
		record.lineage = o.start.Lineage
	}
	if record.cutNanos == 0 {
		record.cutNanos = o.start.CutUnixNanos
	}
	if err := o.checkSums(c.Streams); err != nil {
		return fmt.Errorf("%s: epoch %d: %w", r.store.Name(), c.Epoch, err)
	}
	// Room among the pending is waited for before anything is decided.
	err := r.wait(ctx, func() (bool, error) {
		if err := r.mayFollow(c.Epoch, record.lineage, o.start); err != nil {
			return false, err
		}
		if len(r.pending) >= r.mostPending() || o.spilled && r.device != nil {
			return false, nil
		}
		r.spilling = o.spilled
		return true, nil
	})
	defer r.notSpilling()
	if err == nil && o.frames == 0 && o.writer != nil {
		// Each frame made sure of the commit's room; here there was none.
		err = r.makeRoom(ctx, o.first.logical+commitMaxBytes)
	}
	if err != nil {
		return err
	}
	if o.pipe != nil {
		if err := o.pipe.drain(); err != nil {
			return r.pipeFailed(err)
		}
		err = r.commitInPlace(o, record)
	} else {
		// The spill comes first, which may have no room: each rescue is a file more.
		if o.spilled {
			err = r.finishSpill(o)
		}
		if err != nil {
			o.broken = fmt.Errorf("%s: epoch %d: %w", r.store.Name(), c.Epoch, r.writeFailed(err))
			return o.broken
		}
		if err := r.rescue(ctx, o, record.lineage); err != nil {
			o.broken = err
			return err
		}
		// From here on a reader may find the epoch committed: what it has in the
		// spill file stays.
		o.decided = o.spilled
		err = r.commitJournal(o, record)
	}
	if err != nil {
		return r.failed(err)
	}
	r.dropOpen()
	return nil
}

// compared notes ranges whose difference to what the replica holds is asked for, for an epoch
// that is open: what is equal does not come as frames, and yet may have been something
// else at cuts in between.
func (r *Replica) compared(ranges []Range) {
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	if r.open == nil {
		return
	}
	for _, c := range ranges {
		r.open.touched.compared(c)
		if r.open.fine {
			r.open.blocks.add(c)
			r.open.narrowed = true
		}
	}
}

func (o *openEpoch) checkSums(sums []StreamSum) error {
	if len(sums) > MaxStreams {
		return fmt.Errorf("%w: %d streams, at most %d", ErrSums, len(sums), MaxStreams)
	}
	for i, d := range o.digests {
		var got, want StreamSum
		if d != nil {
			got = d.Sum()
		}
		if i < len(sums) {
			want = sums[i]
		}
		if got.Frames != want.Frames || got.Frames > 0 && got != want {
			return fmt.Errorf("%w: stream %d brought %d frames (digest %x), the sender names %d (%x)",
				ErrSums, i, got.Frames, got.Digest[:4], want.Frames, want.Digest[:4])
		}
	}
	return nil
}

// commitJournal makes the epoch's segments durable, then names them in the
// superblock; only the second decides.
func (r *Replica) commitJournal(o *openEpoch, c commitRecord) error {
	if err := o.writer.commit(c); err != nil {
		return err
	}
	if err := r.store.Flush(); err != nil {
		return fmt.Errorf("%s: flush of the journal: %w", r.store.Name(), err)
	}
	p := &pendingEpoch{first: o.first, end: o.writer.next, start: o.start.Epoch, attempt: o.start.Attempt,
		commit: c, touched: o.touched, rounds: o.rounds, spill: o.spillPart}
	return r.writeSuper(1, func(sb *superblock) {
		sb.committed, sb.head = p.position(), p.end
	}, func() {
		r.came(o, p.position().Epoch)
		p.brought = r.brought
		r.pending = append(r.pending, p)
		r.commits++
	})
}

// commitInPlace makes data and map durable, then the label that it is whole.
func (r *Replica) commitInPlace(o *openEpoch, c commitRecord) error {
	// The commit may name a later epoch than the one the map names so far.
	var err error
	if epoch := c.lineage.Tip().Epoch; c.full {
		err = r.cmap.writeAll(epoch, o.touched)
	} else {
		var damaged []string
		damaged, err = r.cmap.update(o.touched, epoch)
		r.warn(damaged)
	}
	if err != nil {
		return err
	}
	return r.markApplied(o.touched, c, nil, func() { r.came(o, c.lineage.Tip().Epoch) })
}

// markApplied makes what was written durable, and then that it is an epoch. p
// is the pending epoch it was, nil for an in-place one, of which then is called, with mu held.
func (r *Replica) markApplied(t *touched, c commitRecord, p *pendingEpoch, then func()) error {
	if err := r.store.Flush(); err != nil {
		return fmt.Errorf("%s: flush of the data: %w", r.store.Name(), err)
	}
	r.mu.Lock()
	old := r.sb.watched
	r.mu.Unlock()
	changed := t.has
	if p == nil { // one before that was cut off may have brought what now was found equal
		changed = t.looked
	}
	watched, err := watch(r.store, r.lay, old, changed)
	if err != nil {
		return err
	}
	copies := 1
	if p != nil && p.spill != nil {
		copies = 2 // the spill file is emptied next: no copy may still count on it
	}
	return r.writeSuper(copies, func(sb *superblock) {
		before := sb.lineage
		sb.applied, sb.lineage, sb.cutNanos, sb.watched = c.lineage.Tip(), c.lineage, c.cutNanos, watched
		sb.applying = 0
		if p != nil {
			sb.tail = p.end
		} else {
			sb.committed = sb.applied
		}
		// Of another line's numbers the map knows nothing, nor of cuts between the last
		// epoch and one of which only the frames are known.
		switched := Compare(sb.lineage, before).Kind != Ahead
		if c.full || switched || p != nil && p.found {
			sb.mapBase = sb.applied.Epoch
		}
		sb.strayed = ""
		sb.needFull = sb.needFull && !c.full
		if !sb.needFull {
			sb.state, sb.why, sb.inPlace = DiskConsistent, whyNone, Position{}
		}
	}, func() {
		if p != nil {
			r.pending = r.pending[1:]
			r.applies++
			r.imaged = p.brought
		} else {
			then()
			r.imaged = r.brought
		}
	})
}
