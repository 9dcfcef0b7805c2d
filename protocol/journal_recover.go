package protocol

import (
	"context"
	"errors"
	"fmt"
)

// pendingEpoch is a committed epoch that lies in the journal.
type pendingEpoch struct {
	first   cursor // its first segment
	end     cursor // behind its commit segment
	start   uint64 // the epoch its frames carry
	attempt uint32
	commit  commitRecord
	touched *touched
	rounds  roundSet
	spill   *spillPart // what lies in the spill file; nil: all is in the journal
	brought uint64     // Replica.brought with it
	found   bool       // read from the journal, which does not say what was compared and found equal
}

// position is what the replica holds once the epoch is applied.
func (p *pendingEpoch) position() Position { return p.commit.lineage.Tip() }

// roundSet remembers the rounds of an epoch and whether they came in order.
type roundSet struct {
	seen      [MaxRounds]uint32
	n         int
	unordered bool
	last      uint32
}

func (s *roundSet) add(round uint32) error {
	if s.n > 0 && round == s.last {
		return nil
	}
	if s.n > 0 && round < s.last {
		s.unordered = true
	}
	s.last = round
	at := 0
	for at < s.n && s.seen[at] < round {
		at++
	}
	if at < s.n && s.seen[at] == round {
		return nil
	}
	if s.n == MaxRounds {
		return fmt.Errorf("more than %d rounds in one epoch", MaxRounds)
	}
	copy(s.seen[at+1:s.n+1], s.seen[at:s.n])
	s.seen[at] = round
	s.n++
	return nil
}

// passes lists what to apply in turn, each a span of rounds: everything at
// once where rounds came in order, otherwise one after another, so that the
// highest wins without an index of the epoch in memory.
func (s *roundSet) passes() (out [][2]uint32) {
	if !s.unordered {
		return [][2]uint32{{0, ^uint32(0)}}
	}
	for _, r := range s.seen[:s.n] {
		out = append(out, [2]uint32{r, r})
	}
	return out
}

// JournalDamage is the error for acknowledged epochs that can't be read back.
type JournalDamage struct {
	Store  string
	Offset int64 // of the damaged segment on the device
	// Lost are the epochs after Applied up to this position.
	Lost Position
	// Applied is what the data area holds if ImageWhole.
	Applied    Position
	ImageWhole bool
	Err        error
}

// Error names the place and what is left.
func (d *JournalDamage) Error() string {
	left := "their apply had begun, so the data area is inconsistent"
	switch {
	case d.ImageWhole:
		left = fmt.Sprintf("the older image, %s, is still whole", d.Applied)
	case d.Applied.IsZero():
		left = "there was no image before"
	}
	what, wayOut := ErrJournalDamaged.Error(), "open it dropping the damaged journal to sync again from there"
	switch {
	case d.passing():
		what, wayOut = "journal", "open it again; only if this does not pass, "+wayOut
	case errors.Is(d.Err, ErrSpill):
		wayOut = "bring the spill file back; only if it is lost, " + wayOut
	}
	lost := "committed epochs up to " + d.Lost.String()
	if d.Lost.IsZero() {
		lost = "epochs that may be committed"
	}
	return fmt.Sprintf("%s: %s at %d: %s can't be read back: %v; %s; %s", d.Store, what, d.Offset, lost, d.Err, left, wayOut)
}

// passing says that nothing is known to be damaged: another try may read it.
func (d *JournalDamage) passing() bool { return errors.Is(d.Err, ErrUnreadable) }

// Is makes errors.Is(err, ErrJournalDamaged) true, unless it may pass.
func (d *JournalDamage) Is(target error) bool { return target == ErrJournalDamaged && !d.passing() }

// Unwrap is the fault that was found.
func (d *JournalDamage) Unwrap() error { return d.Err }

// readEpoch reads and checks one epoch from the journal, up to and including
// its commit segment, which must end at or before limit.
func (r ring) readEpoch(ctx context.Context, at cursor, limit uint64, sizeBytes int64) (*pendingEpoch, cursor, error) {
	p := &pendingEpoch{first: at, touched: newTouched(sizeBytes), found: true}
	var frames, segments uint64
	var body []byte
	for {
		if err := ctx.Err(); err != nil {
			return nil, at, err
		}
		if at.logical+2*segHeaderBytes > limit {
			return nil, at, fmt.Errorf("%s: journal at %d: ends without a commit", r.store.Name(), r.place(at.logical))
		}
		s, err := r.readHeader(at)
		if err == nil && s.next().logical > limit {
			err = fmt.Errorf("%s: journal segment at %d: runs past the end at %d", r.store.Name(), r.place(at.logical), r.place(limit))
		}
		if err == nil && segments > 0 && (s.epoch != p.start || s.attempt != p.attempt) {
			err = fmt.Errorf("%s: journal segment at %d: belongs to epoch %d attempt %d, want %d and %d",
				r.store.Name(), r.place(at.logical), s.epoch, s.attempt, p.start, p.attempt)
		}
		if err != nil {
			return nil, at, err
		}
		p.start, p.attempt = s.epoch, s.attempt
		body, err = r.readBody(s, body)
		if err != nil {
			return nil, at, err
		}
		if s.kind == segCommit {
			c, err := decodeCommit(body)
			if err == nil && (c.frames != frames || c.segments != segments || c.lineage.Tip().Epoch < p.start) {
				err = fmt.Errorf("commit of %s names %d frames in %d segments, found %d in %d", c.lineage.Tip(), c.frames, c.segments, frames, segments)
			}
			if err != nil {
				return nil, at, fmt.Errorf("%s: journal segment at %d: %w", r.store.Name(), r.place(at.logical), err)
			}
			p.commit, p.end = *c, s.next()
			return p, at, nil
		}
		if s.kind == segSpill {
			n, m, err := r.readSpilled(ctx, p, s, body, limit, sizeBytes)
			if err != nil {
				return nil, at, err
			}
			frames += n
			segments += m + 1
			at = s.next()
			continue
		}
		n, err := eachFrame(body, s, sizeBytes, func(f Frame) error {
			p.touched.add(f)
			return p.rounds.add(f.Round)
		})
		if err != nil {
			return nil, at, fmt.Errorf("%s: journal segment at %d: %w", r.store.Name(), r.place(at.logical), err)
		}
		frames += uint64(n)
		segments++
		at = s.next()
	}
}

// spillFault is an epoch whose marker and commit are whole in the journal, but
// not what they name in the spill file. That was flushed before they were written,
// so it was committed, and is damaged or gone.
type spillFault struct {
	lost Position
	err  error
}

func (f *spillFault) Error() string {
	return fmt.Sprintf("a part of epoch %d is in the spill file: %v", f.lost.Epoch, f.err)
}

// Is makes errors.Is(err, ErrSpill) true.
func (f *spillFault) Is(target error) bool { return target == ErrSpill }

func (f *spillFault) Unwrap() error { return f.err }

// readSpilled reads and checks what a marker names in the spill file, and
// counts its frames and segments.
func (r ring) readSpilled(ctx context.Context, p *pendingEpoch, mark segment, body []byte, limit uint64, sizeBytes int64) (frames, segments uint64, err error) {
	fail := func(at int64, err error) error {
		return fmt.Errorf("%s: journal segment at %d: %w", r.store.Name(), at, err)
	}
	part, err := decodeSpillPart(body)
	if err == nil && (p.spill != nil || r.spilled == nil || part.first.sequence != mark.at.sequence || part.first.chain != mark.at.chain) {
		err = fmt.Errorf("spill marker out of place")
	}
	if err != nil {
		return 0, 0, fail(r.place(mark.at.logical), err)
	}
	// Without a commit right behind it nothing was decided.
	at := mark.next()
	if at.logical+2*segHeaderBytes > limit {
		return 0, 0, fail(r.place(at.logical), fmt.Errorf("no commit behind a spill marker"))
	}
	s, err := r.readHeader(at)
	if err != nil {
		return 0, 0, err
	}
	b, err := r.readBody(s, nil)
	if err != nil {
		return 0, 0, err
	}
	commit, err := decodeCommit(b)
	if s.kind != segCommit {
		err = fmt.Errorf("kind %d behind a spill marker, want a commit", s.kind)
	}
	if err != nil {
		return 0, 0, fail(r.place(at.logical), err)
	}
	p.spill = &part
	from, err := r.spilled(part.spill)
	for at := part.first; err == nil && at != part.end; segments++ {
		if err = ctx.Err(); err != nil {
			return 0, 0, err
		}
		var n uint32
		if s, n, err = from.readSpillSegment(p, at, part.end, sizeBytes); err == nil {
			frames += uint64(n)
			at = s.next()
		}
	}
	if err != nil {
		return 0, 0, &spillFault{commit.lineage.Tip(), err}
	}
	return frames, segments, nil
}

func (r ring) readSpillSegment(p *pendingEpoch, at, end cursor, sizeBytes int64) (segment, uint32, error) {
	fail := func(err error) (segment, uint32, error) {
		return segment{}, 0, fmt.Errorf("%s at %d: %w", r.store.Name(), r.place(at.logical), err)
	}
	if at.logical >= end.logical {
		return fail(fmt.Errorf("segments end with %+v, want %+v", at, end))
	}
	s, err := r.readHeader(at)
	if err != nil {
		return segment{}, 0, err
	}
	if s.kind != segFrames || s.epoch != p.start || s.attempt != p.attempt || s.next().logical > end.logical {
		return fail(fmt.Errorf("segment of kind %d, epoch %d, attempt %d up to %d: want frames of %d, %d up to %d at most",
			s.kind, s.epoch, s.attempt, s.next().logical, p.start, p.attempt, end.logical))
	}
	body, err := r.readBody(s, nil)
	if err != nil {
		return segment{}, 0, err
	}
	n, err := eachFrame(body, s, sizeBytes, func(f Frame) error {
		p.touched.add(f)
		return p.rounds.add(f.Round)
	})
	if err != nil {
		return fail(err)
	}
	return s, n, nil
}

// eachFrame walks over a frames segment's body and checks that it is what the
// header and the volume allow.
func eachFrame(body []byte, s segment, sizeBytes int64, do func(Frame) error) (n uint32, err error) {
	for fr := NewFrameReader(body); fr.More(); n++ {
		f, err := fr.Next()
		if err != nil {
			return n, err
		}
		if err := checkFrame(f, s.epoch, s.attempt, sizeBytes); err != nil {
			return n, err
		}
		if f.Round < s.minRound || f.Round > s.maxRound {
			return n, fmt.Errorf("%w: round %d in a segment of rounds %d to %d", ErrBadFrame, f.Round, s.minRound, s.maxRound)
		}
		if err := do(f); err != nil {
			return n, err
		}
	}
	if n != s.frames {
		return n, fmt.Errorf("%w: %d frames, the segment names %d", ErrBadFrame, n, s.frames)
	}
	return n, nil
}

// checkFrame says whether a frame belongs to an epoch and a volume.
func checkFrame(f Frame, epoch uint64, attempt uint32, sizeBytes int64) error {
	if f.Epoch != epoch || f.Attempt != attempt {
		return fmt.Errorf("%w: of epoch %d attempt %d, want epoch %d attempt %d", ErrBadFrame, f.Epoch, f.Attempt, epoch, attempt)
	}
	if f.Offset > sizeBytes-f.Length {
		return fmt.Errorf("%w: %d bytes at %d, the volume has %d bytes", ErrBadFrame, f.Length, f.Offset, sizeBytes)
	}
	return nil
}

// readPending reads everything that was committed and not applied. An epoch
// counts as committed when its commit segment is whole, also beyond what the superblock
// names: then the crash, or the loss of the newest superblock copy, came
// between the two, and the epoch may have been acknowledged.
// On damage before the head it returns the epochs in front of it.
func readPending(ctx context.Context, sb *superblock, r ring) (out []*pendingEpoch, _ *JournalDamage, err error) {
	damage := func(bad cursor, lost Position, err error) *JournalDamage {
		applied := sb.applied
		if len(out) > 0 {
			applied = out[len(out)-1].position()
		}
		return &JournalDamage{Store: r.store.Name(), Offset: r.place(bad.logical), Lost: lost, Applied: applied,
			ImageWhole: sb.state == DiskConsistent && (sb.applying == 0 || len(out) > 0), Err: err}
	}
	at := sb.tail
	for at.logical < sb.head.logical {
		p, bad, err := r.readEpoch(ctx, at, sb.head.logical, sb.layout.size)
		if err == nil && p.end.logical == sb.head.logical && (p.end != sb.head || p.position() != sb.committed) {
			bad = at
			err = fmt.Errorf("%s: journal at %d: ends with %s at %+v, the superblock names %s at %+v",
				r.store.Name(), r.place(at.logical), p.position(), p.end, sb.committed, sb.head)
		}
		if ctx.Err() != nil {
			return out, nil, ctx.Err()
		}
		if err != nil {
			return out, damage(bad, sb.committed, err), nil
		}
		out = append(out, p)
		at = p.end
	}
	limit := sb.tail.logical + uint64(r.area.length)
	for len(out) < maxHeldEpochs {
		p, bad, err := r.readEpoch(ctx, at, limit, sb.layout.size)
		if ctx.Err() != nil {
			return out, nil, ctx.Err()
		}
		var gone *spillFault
		if errors.As(err, &gone) {
			return out, damage(bad, gone.lost, err), nil
		}
		if errors.Is(err, ErrUnreadable) { // perhaps one that was acknowledged
			return out, damage(bad, Position{}, err), nil
		}
		if err != nil {
			return out, nil, nil // what was not committed is dropped
		}
		out = append(out, p)
		at = p.end
	}
	return out, nil, nil
}
