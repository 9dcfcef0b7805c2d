package protocol

import (
	"context"
	"errors"
	"fmt"
)

// recover brings a replica that was just read to a state in which its data
// area is one committed epoch: it applies what is pending.
func (r *Replica) recover(ctx context.Context, o OpenOptions) error {
	pending, damage, err := readPending(ctx, &r.sb, r.ring)
	if err != nil {
		return err
	}
	if damage != nil && !o.DropJournal {
		return damage
	}
	changed := ""
	if r.sb.state == DiskConsistent && (damage == nil || damage.ImageWhole) {
		var being *touched
		if r.sb.applying != 0 && len(pending) > 0 {
			being = pending[0].touched
		}
		if changed, err = changedOutside(r.store, r.lay, r.sb.watched, being); err != nil {
			return err
		}
	}
	if changed != "" {
		if len(pending) > 0 && !o.DropJournal {
			return fmt.Errorf("%s: %w: %s, while committed epochs up to %s wait in the journal; they are not laid over it: open it dropping the journal, and sync it in full",
				r.store.Name(), ErrChangedOutside, changed, pending[len(pending)-1].position())
		}
		r.warn([]string{changed})
		why := uint8(whyChangedOutside)
		if r.sb.applying != 0 {
			why = whyJournalDamaged // half an epoch lies there, too
		}
		if err := r.dropJournal(why); err != nil {
			return err
		}
		pending, damage = nil, nil
	}
	if len(pending) > 0 {
		if err := r.adopt(pending); err != nil {
			return err
		}
		for range pending {
			if err := r.applyNext(ctx); err != nil {
				return err
			}
		}
	}
	if damage != nil {
		r.warn([]string{damage.Error()})
		why := uint8(whyJournalDamaged)
		if damage.ImageWhole || r.sb.state == DiskBlank && r.sb.applying == 0 {
			why = whyNone
		}
		err := r.dropJournal(why)
		if err == nil && damage.passing() {
			// A sector that can't be read often can be once it is written, and the
			// next opening looks here for an epoch.
			err = r.ring.write(make([]byte, segHeaderBytes), r.sb.head.logical)
		}
		return err
	}
	return nil
}

// AcceptChanges takes what somebody else wrote to a replica, a mount that
// replayed a log for one, for its content: from then on it holds a position of
// its own, in the generation given, which no other copy has. It is for the
// operator who knows what was done; without a reason for it nothing happens.
// The error is ErrNotConsistent when the image is not whole for another reason.
func (r *Replica) AcceptChanges(g Generation) error {
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	r.mu.Lock()
	sb, err := r.sb, r.usable()
	r.mu.Unlock()
	switch {
	case err != nil:
		return err
	case sb.state == DiskConsistent:
		return nil
	case sb.state != DiskInconsistent || sb.why != whyChangedOutside || r.open != nil:
		return fmt.Errorf("%s: %w: it is %s, and not because it was changed outside", r.store.Name(), ErrNotConsistent, sb.state)
	}
	next := Position{g, sb.lineage.Tip().Epoch + 1}
	lineage := sb.lineage.Extend(next)
	if err := lineage.Check(); err != nil {
		return err
	}
	// Any chunk may hold data now, those that were all zero among them.
	if err := r.cmap.writeAll(next.Epoch, nil); err != nil {
		return r.failed(err)
	}
	watched, err := watch(r.store, r.lay, nil, nil)
	if err != nil {
		return r.failed(err)
	}
	if err := r.store.Flush(); err != nil {
		return r.failed(fmt.Errorf("%s: flush: %w", r.store.Name(), err))
	}
	return r.writeSuper(2, func(sb *superblock) {
		sb.state, sb.why, sb.needFull = DiskConsistent, whyNone, false
		sb.lineage, sb.applied, sb.committed, sb.mapBase, sb.watched = lineage, next, next, next.Epoch, watched
	}, nil)
}

// adopt takes over the epochs found in the journal, of which the last ones
// may be missing in the superblock.
func (r *Replica) adopt(pending []*pendingEpoch) error {
	last := pending[len(pending)-1]
	then := func() {
		r.pending = pending
		r.commits = uint64(len(pending))
	}
	if last.end.logical <= r.sb.head.logical {
		r.mu.Lock()
		defer r.mu.Unlock()
		then()
		return nil
	}
	// What was read may be in a cache only, and a flush that failed before may
	// have given it up: it is made durable anew.
	if err := r.ring.rewrite(r.sb.head.logical, last.end.logical); err != nil {
		return err
	}
	if err := r.store.Flush(); err != nil {
		return fmt.Errorf("%s: flush of the journal: %w", r.store.Name(), err)
	}
	return r.writeSuper(1, func(sb *superblock) {
		sb.committed, sb.head = last.position(), last.end
	}, then)
}

// readBackFailed tells damage from what the next opening may be able to read.
func readBackFailed(err error) error {
	if errors.Is(err, ErrUnreadable) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrJournalDamaged, err)
}

// dropJournal forgets what is committed but not applied. With a reason the
// data area counts as torn.
func (r *Replica) dropJournal(why uint8) error {
	return r.writeSuper(2, func(sb *superblock) {
		if why != whyNone {
			sb.state, sb.why, sb.needFull = DiskInconsistent, why, true
		}
		sb.applying, sb.committed = 0, sb.applied
		// A lap on, nothing in the ring can be taken for a continuation.
		sb.head = cursor{logical: sb.head.logical + uint64(r.lay.journal.length), sequence: sb.head.sequence + 1}
		sb.tail = sb.head
	}, nil)
}

// applyLoop applies pending epochs until ctx ends or something fails.
func (r *Replica) applyLoop(ctx context.Context) {
	for {
		err := r.wait(ctx, func() (bool, error) {
			if len(r.pending) == 0 || r.holds > 0 {
				return false, nil
			}
			for _, w := range r.waiting {
				if r.applies >= w.target {
					return false, nil // it takes this image first
				}
			}
			r.applying = true
			return true, nil
		})
		if err != nil {
			return
		}
		err = r.applyNext(ctx)
		if err != nil && ctx.Err() == nil {
			r.failed(err)
		}
		r.mu.Lock()
		r.applying = false
		r.notify()
		r.mu.Unlock()
	}
}

// applyNext lays the oldest pending epoch over the data area. Each step is
// durable before the next begins, and a crash at any of them repeats them all:
//
//	change map names what will change; superblock says that the apply begins
//	data; change map without the chunks that are zeros now (full epochs only)
//	superblock: applied, journal tail
func (r *Replica) applyNext(ctx context.Context) error {
	r.mu.Lock()
	p := r.pending[0]
	r.mu.Unlock()
	epoch := p.position().Epoch
	var damaged []string
	var err error
	if p.commit.full {
		err = r.cmap.writeAll(epoch, nil)
	} else {
		damaged, err = r.cmap.update(p.touched, epoch)
		r.warn(damaged)
	}
	if err == nil {
		// Its flush makes the map durable too.
		// In both copies: without it half an apply looks like somebody else's writes.
		err = r.writeSuper(2, func(sb *superblock) { sb.applying = epoch }, nil)
	}
	if err == nil {
		err = r.applyData(ctx, p)
	}
	if err == nil && p.commit.full {
		err = r.cmap.writeAll(epoch, p.touched)
	}
	if err == nil {
		err = r.markApplied(p.touched, p.commit, p, nil)
	}
	if err != nil {
		return fmt.Errorf("apply of epoch %d: %w", epoch, err)
	}
	if p.spill != nil {
		r.emptySpill()
	}
	return nil
}

func (r *Replica) applyData(ctx context.Context, p *pendingEpoch) error {
	pipe := newWritePipe(r.store, r.lay.dataOffset, r.dec, r.runs)
	defer pipe.close()
	for _, rounds := range p.rounds.passes() {
		if err := r.applySegments(ctx, pipe, r.ring, p.first, p.end, rounds); err != nil {
			return err
		}
		if s := p.spill; s != nil {
			if err := r.applySegments(ctx, pipe, spillRing(r.spill, r.ring.tag), s.first, s.end, rounds); err != nil {
				return err
			}
		}
	}
	return pipe.drain()
}

// applySegments puts the frames of some rounds between two cursors.
func (r *Replica) applySegments(ctx context.Context, pipe *writePipe, from ring, at, end cursor, rounds [2]uint32) error {
	var body []byte
	for at != end {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s, err := from.readHeader(at)
		if err != nil {
			return readBackFailed(err)
		}
		at = s.next()
		if s.kind != segFrames || s.maxRound < rounds[0] || s.minRound > rounds[1] {
			continue
		}
		body, err = from.readBody(s, body)
		if err != nil {
			return readBackFailed(err)
		}
		_, err = eachFrame(body, s, r.lay.size, func(f Frame) error {
			if f.Round < rounds[0] || f.Round > rounds[1] {
				return nil
			}
			return pipe.put(f, nil)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
