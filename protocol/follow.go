package protocol

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"
)

// This file is about cascades: a copy that follows a primary at another node feeds
// replicas of its own. Its cuts are the primary's: the image between two applies, with the
// history, the number and the time that it has there. While one is held the next epochs
// wait in the copy's journal. The data that is read is durable, as its position is.

// ErrOtherLine says that a copy went another way than the cuts that were taken of it
// before: what is fed from it has to be planned anew.
var ErrOtherLine = errors.New("it went another way than before")

// Follower is a Source that stands at cuts that another node has taken. Its Cut is told no
// number and returns a FollowedCut, of the newest position; cuts are of one line.
type Follower interface {
	Source
	// Standing never waits.
	Standing() Standing
}

// Standing is where a Follower stands at one moment.
type Standing struct {
	Lineage Lineage // its tip is the newest position
	Written uint64  // WrittenBytes then
	Err     error   // why there is nothing to cut now; nil: there is
}

// FollowedCut is a Cut of a Follower.
type FollowedCut interface {
	DatedCut          // when the primary took it
	Lineage() Lineage // its tip is the cut
}

// NewFollower starts to feed replicas from a Follower, cfg.Source. cfg.State is not used. It
// ends with Stop, whose seal is nil. A frozen view is held for cfg.CutLimit at most; what
// is not read by then is read live, like all of a first sync.
func NewFollower(cfg PrimaryConfig) (*Primary, error) {
	f, ok := cfg.Source.(Follower)
	if !ok {
		return nil, fmt.Errorf("volume %q: its source stands at no other node's cuts", cfg.Volume)
	}
	st := f.Standing()
	if st.Err != nil {
		return nil, st.Err
	}
	return startPrimary(cfg, followState(st.Lineage), f)
}

// followState is the state of a source at a position that another node has cut.
func followState(l Lineage) SourceState {
	return SourceState{Lineage: l.Clone(), Generation: l.Tip().Generation, Clean: true}
}

// history is what the source stands for, with what is open; mu is held.
func (p *Primary) history() Lineage {
	if p.follow != nil {
		return p.follow.Standing().Lineage
	}
	return p.state.Effective()
}

// newest is the number of the cut that has all there is now; mu is held.
func (p *Primary) newest() uint64 {
	if p.follow != nil {
		return p.follow.Standing().Lineage.Tip().Epoch
	}
	return p.state.OpenEpoch
}

// whoLacks tells for which replicas there may be a cut that they do not have; mu is held. A
// follower has none for those that are at its own position.
func (p *Primary) whoLacks() (lacks func(*replicaWorker) bool, err error) {
	if p.follow == nil {
		return func(*replicaWorker) bool { return true }, nil
	}
	st := p.follow.Standing()
	if st.Err != nil {
		p.cutErr = st.Err
		return nil, st.Err
	}
	at := st.Lineage.Tip()
	return func(w *replicaWorker) bool { return w.at != at }, nil
}

// stands notes the replica's position; mu is held. One that is where a follower is has all
// there is, though no cut was taken for it.
func (w *replicaWorker) stands(at Position, plan Plan) {
	w.at = at
	p := w.p
	if p.follow == nil || plan.Action != Nothing {
		return
	}
	if st := p.follow.Standing(); st.Err == nil && st.Lineage.Tip() == at {
		p.lastCut = &cutRecord{epoch: at.Epoch, written: st.Written, covers: p.cfg.Clock.Now()}
		w.committed = p.lastCut
	}
}

// ReplicaSource is a replica's image as a Follower. Its owner ends what uses it before
// the replica is closed.
type ReplicaSource struct {
	r *Replica

	mu   sync.Mutex
	line Lineage // of the last cut; before the first, of the beginning
}

var (
	_ Follower  = (*ReplicaSource)(nil)
	_ Forgetter = (*ReplicaSource)(nil)
)

// FollowReplica begins at what the replica has committed. The error says why nothing can
// be fed from it now: ErrNotConsistent, ErrStrayed, or its fault.
func FollowReplica(r *Replica) (*ReplicaSource, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.mayFeed(); err != nil {
		return nil, err
	}
	if r.fine == nil {
		r.fine = &fineLog{from: r.lineage().Tip().Epoch}
	}
	return &ReplicaSource{r: r, line: r.lineage().Clone()}, nil
}

// mayFeed says why the image can't be passed on; mu is held. A first sync is not, nor is
// what belongs to no cut.
func (r *Replica) mayFeed() error {
	if err := r.usable(); err != nil {
		return err
	}
	switch {
	case r.inPlace, r.sb.state != DiskConsistent && len(r.pending) == 0:
		return fmt.Errorf("%s: %w: it is %s", r.store.Name(), ErrNotConsistent, r.sb.state)
	case !r.sb.tookOver.IsZero():
		return fmt.Errorf("%s: %w as %v", r.store.Name(), ErrTookOver, r.sb.tookOver)
	case r.strayed() != "":
		return fmt.Errorf("%s: %w: %s", r.store.Name(), ErrStrayed, r.strayed())
	case len(r.lineage()) == 0:
		return fmt.Errorf("%s: %w: it holds nothing yet", r.store.Name(), ErrNotConsistent)
	}
	return nil
}

// goesOn says whether a history follows the last cut's; mu is held.
func (s *ReplicaSource) goesOn(l Lineage) error {
	if kind := Compare(l, s.line).Kind; kind != Same && kind != Ahead {
		return fmt.Errorf("%s: %w: it was at [%v], and is at [%v]", s.r.store.Name(), ErrOtherLine, s.line, l)
	}
	return nil
}

// Standing implements Follower.
func (s *ReplicaSource) Standing() Standing {
	s.r.mu.Lock()
	st := Standing{s.r.lineage().Clone(), s.r.brought, s.r.mayFeed()}
	s.r.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.Err == nil {
		st.Err = s.goesOn(st.Lineage)
	}
	return st
}

// Size is the volume's size in bytes.
func (s *ReplicaSource) Size() int64 { return s.r.lay.size }

// WrittenBytes counts what epochs have brought since the replica was opened.
func (s *ReplicaSource) WrittenBytes() (uint64, error) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	return s.r.brought, nil
}

// ReadAt reads what is there, between two applies or in the middle of one: of that the
// change map knew before it began.
func (s *ReplicaSource) ReadAt(p []byte, offset int64) (int, error) {
	if err := s.r.checkRead(len(p), offset); err != nil {
		return 0, err
	}
	s.r.mu.Lock()
	err := s.r.mayFeed()
	s.r.mu.Unlock()
	if err == nil {
		err = s.r.read(p, offset)
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// Cut holds the image of what is committed now, once it is applied. The number is the
// primary's.
func (s *ReplicaSource) Cut(ctx context.Context, _ uint64, _ CutWish) (Cut, error) {
	image, err := s.r.Hold(ctx)
	if err != nil {
		return nil, err
	}
	c := &replicaCut{Image: image}
	s.r.mu.Lock() // while it is held, none of this changes
	c.written = s.r.imaged
	if why := s.r.sb.strayed; why != "" {
		err = fmt.Errorf("%s: %w: %s", s.r.store.Name(), ErrStrayed, why)
	}
	s.r.mu.Unlock()
	s.mu.Lock()
	if err == nil {
		err = s.goesOn(image.lineage)
	}
	if err == nil {
		s.line = image.lineage
	}
	s.mu.Unlock()
	if err != nil {
		image.Release()
		return nil, err
	}
	return c, nil
}

// Forget implements Forgetter.
func (s *ReplicaSource) Forget(upTo uint64) {
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	s.r.fine.forget(upTo)
}

// replicaCut is a cut that a replica holds.
type replicaCut struct {
	*Image
	written uint64
}

var (
	_ FollowedCut = (*replicaCut)(nil)
	_ ExactCut    = (*replicaCut)(nil)
)

func (c *replicaCut) Epoch() uint64          { return c.Position().Epoch }
func (c *replicaCut) View() io.ReaderAt      { return c.Image }
func (c *replicaCut) NoView() error          { return nil }
func (c *replicaCut) WholeView() bool        { return true }
func (c *replicaCut) Stalled() time.Duration { return 0 }
func (c *replicaCut) WrittenBytes() uint64   { return c.written }

// Changed is to the block where all epochs since then came while somebody followed,
// else what the change map says.
func (c *replicaCut) Changed(since uint64) ([]Range, error) {
	if since >= c.mapBase {
		c.r.mu.Lock()
		fine, ok := c.r.fine.between(since, c.Epoch())
		c.r.mu.Unlock()
		if ok {
			return fine.within(nil, Range{0, c.SizeBytes()}), nil
		}
	}
	return c.ChangedSince(since)
}

func (c *replicaCut) ChangedExact(since uint64) bool {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	return since >= c.mapBase && c.r.fine.exact(since, c.Epoch())
}

// Valid: nothing is written to the data while its image is held, unless by somebody else,
// or a fault.
func (c *replicaCut) Valid() error {
	c.r.mu.Lock()
	defer c.r.mu.Unlock()
	return c.r.usable()
}

// FlushSource: the data was flushed before the position moved to where it is, and that is
// durable. A power cut can't leave the copy older than what is fed from it.
func (c *replicaCut) FlushSource() error { return nil }

func (c *replicaCut) Release() error {
	c.Image.Release()
	return nil
}

// maxFinePages bounds a fineLog: pages of 4 KiB, each of which is for 128 MiB of the volume.
const maxFinePages = 16 << 10

// fineLog remembers, to the block, what the last epochs changed that came by the journal
// while somebody followed. It is in memory alone.
type fineLog struct {
	from   uint64 // all after this epoch are there
	epochs []fineEpoch
	pages  int
}

type fineEpoch struct {
	epoch  uint64
	blocks blockSet // those that came, and those that were compared and are equal
	// narrowed: some were compared. Such a one may have been something else at a cut that this
	// copy was never at, so whoever is fed has to compare it, too, and note that.
	narrowed bool
}

// size is in pages, one at least.
func (e *fineEpoch) size() int { return max(1, len(e.blocks.pages)) }

// came notes what an epoch has brought; mu is held.
func (r *Replica) came(o *openEpoch, epoch uint64) {
	r.brought += max(o.bytes, 1)
	switch {
	case r.fine == nil:
	case o.fine:
		r.fine.add(fineEpoch{epoch, o.blocks, o.narrowed})
	default: // it may have changed what its frames do not name
		*r.fine = fineLog{from: epoch}
	}
}

func (l *fineLog) add(e fineEpoch) {
	l.epochs = append(l.epochs, e)
	l.pages += e.size()
	for l.pages > maxFinePages {
		l.forget(l.epochs[0].epoch)
	}
}

// forget drops the epochs up to one.
func (l *fineLog) forget(upTo uint64) {
	for len(l.epochs) > 0 && l.epochs[0].epoch <= upTo {
		l.from = l.epochs[0].epoch
		l.pages -= l.epochs[0].size()
		l.epochs = l.epochs[1:]
	}
}

// exact says that what changed after one epoch up to another is known, and need not be compared.
func (l *fineLog) exact(since, upTo uint64) bool {
	return since >= l.from && !slices.ContainsFunc(l.epochs, func(e fineEpoch) bool {
		return e.epoch > since && e.epoch <= upTo && e.narrowed
	})
}

// between is what may have changed after one epoch up to another; false: that is not known.
func (l *fineLog) between(since, upTo uint64) (*blockSet, bool) {
	if since < l.from {
		return nil, false
	}
	all := &blockSet{}
	for _, e := range l.epochs {
		if e.epoch <= since || e.epoch > upTo {
			continue
		}
		all.unite(&e.blocks)
	}
	return all, true
}
