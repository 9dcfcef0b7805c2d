package protocol

import (
	"context"
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
	return fmt.Sprintf("%s: %s at %d: committed epochs up to %s can't be read back: %v; %s; open it dropping the damaged journal to sync again from there",
		d.Store, ErrJournalDamaged, d.Offset, d.Lost, d.Err, left)
}

// Is makes errors.Is(err, ErrJournalDamaged) true.
func (d *JournalDamage) Is(target error) bool { return target == ErrJournalDamaged }

// Unwrap is the fault that was found.
func (d *JournalDamage) Unwrap() error { return d.Err }

// readEpoch reads and checks one epoch from the journal, up to and including
// its commit segment, which must end at or before limit.
func (r ring) readEpoch(ctx context.Context, at cursor, limit uint64, sizeBytes int64) (*pendingEpoch, cursor, error) {
	p := &pendingEpoch{first: at, touched: newTouched(sizeBytes)}
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
func readPending(ctx context.Context, sb *superblock, r ring) (out []*pendingEpoch, damage *JournalDamage, err error) {
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
			applied := sb.applied
			if len(out) > 0 {
				applied = out[len(out)-1].position()
			}
			return out, &JournalDamage{Store: r.store.Name(), Offset: r.place(bad.logical), Lost: sb.committed, Applied: applied,
				ImageWhole: sb.state == DiskConsistent && (sb.applying == 0 || len(out) > 0), Err: err}, nil
		}
		out = append(out, p)
		at = p.end
	}
	limit := sb.tail.logical + uint64(r.area.length)
	for len(out) < maxPendingEpochs {
		p, _, err := r.readEpoch(ctx, at, limit, sb.layout.size)
		if ctx.Err() != nil {
			return out, nil, ctx.Err()
		}
		if err != nil {
			return out, nil, nil // what was not committed is dropped
		}
		out = append(out, p)
		at = p.end
	}
	return out, nil, nil
}
