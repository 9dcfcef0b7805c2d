package protocol

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"
)

// cutWish is what a replica's goroutine waits for.
type cutWish int

const (
	wishNone    cutWish = iota
	wishBarrier         // a cut that only tells the tracker; a view serves as well
	wishView            // a frozen view
)

// sharedCut is one cut that serves every replica that joined.
type sharedCut struct {
	cut       Cut
	rec       *cutRecord
	lineage   Lineage       // of a copy that holds this cut
	unixNanos int64         // wall clock, for people only
	patience  time.Duration // not withdrawn before, just because others want a cut
	stop      chan struct{}

	mu      sync.Mutex
	users   int
	idle    chan struct{} // closed when all are
	answers map[uint64]*changedAnswer
	flushed bool
	flush   error
}

type changedAnswer struct {
	once   sync.Once
	ranges []Range
	err    error
}

// cutHandle is one replica's part in a shared cut. done may be called twice;
// only the first counts.
type cutHandle struct {
	*sharedCut
	once sync.Once
}

func (h *cutHandle) done() {
	h.once.Do(func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.users--
		if h.users == 0 {
			close(h.idle)
		}
	})
}

// changed asks the tracker once for all replicas at the same position.
func (s *sharedCut) changed(since uint64, size int64) ([]Range, error) {
	s.mu.Lock()
	a := s.answers[since]
	if a == nil {
		a = &changedAnswer{}
		s.answers[since] = a
	}
	s.mu.Unlock()
	a.once.Do(func() {
		a.ranges, a.err = s.cut.Changed(since)
		a.ranges = cleanRanges(a.ranges, size)
	})
	return a.ranges, a.err
}

// ExactCut is a Cut that knows whether Changed(since) names only blocks that were
// really written, so that comparing them first would find nothing equal.
type ExactCut interface {
	ChangedExact(since uint64) bool
}

func (s *sharedCut) exact(since uint64) bool {
	e, ok := s.cut.(ExactCut)
	return ok && e.ChangedExact(since)
}

// valid is Cut.Valid, one caller at a time.
func (s *sharedCut) valid() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.cut.Valid(); err != nil {
		return &cutVoidError{s.rec.epoch, err}
	}
	return nil
}

// flushSource makes the cut durable at the source, once for all replicas.
func (s *sharedCut) flushSource() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.flushed {
		s.flushed = true
		if err := s.cut.FlushSource(); err != nil {
			s.flush = &flushError{s.rec.epoch, err}
		} else {
			s.rec.durable.Store(true)
		}
	}
	return s.flush
}

// cutVoidError: what was read of a frozen view may not have been the view.
type cutVoidError struct {
	epoch uint64
	err   error
}

func (e *cutVoidError) Error() string {
	return fmt.Sprintf("the frozen view of epoch %d is void: %v", e.epoch, e.err)
}
func (e *cutVoidError) Unwrap() error { return e.err }

// flushError: the cut is not durable at the source, so no replica may hold it.
type flushError struct {
	epoch uint64
	err   error
}

func (e *flushError) Error() string {
	return fmt.Sprintf("epoch %d is void, the source could not be flushed: %v", e.epoch, e.err)
}
func (e *flushError) Unwrap() error { return e.err }

// cutter takes cuts while somebody wants them. It is the only goroutine that
// calls Source.Cut, and has at most one cut at a time.
func (p *Primary) cutter(ctx context.Context) {
	tick := p.cfg.Clock.Now()
	var pause time.Duration
	failures := 0 // in a row
	// Each try may stop writers.
	failed := func(err error) {
		if errors.Is(err, ErrPasses) {
			failures = 0
		}
		pause = min(min(p.cfg.Interval, time.Second)<<min(failures, 20), p.cfg.RetryMax)
		failures++
	}
	for ctx.Err() == nil {
		var joiners []*replicaWorker
		var wish CutWish
		next := pause
		if pause == 0 {
			joiners, wish, next = p.gather(&tick)
		}
		if len(joiners) == 0 {
			kick := p.kick
			if pause > 0 {
				kick = nil // after a failure nobody hurries us
			}
			select {
			case <-ctx.Done():
			case <-kick:
			case <-p.cfg.Clock.After(next):
			}
			pause = 0
			continue
		}
		cut, err := p.takeCut(ctx, wish)
		if err != nil {
			failed(err)
			continue
		}
		failures = 0
		s := p.share(cut, wish, joiners)
		p.hold(s)
		if err := cut.Release(); err != nil {
			p.mu.Lock()
			p.cutErr = fmt.Errorf("cut %d was not released: %w", s.rec.epoch, err)
			p.mu.Unlock()
			if f := p.cfg.Events.CutFailed; f != nil {
				f(s.rec.epoch, err)
			}
			failed(err)
		}
	}
}

// lookAgain is how often is looked whether the last cut still waits for somebody.
const lookAgain = 100 * time.Millisecond

// gather says for whom a cut is due now, and what they want of it; or how long to
// wait. tick is when the interval began.
func (p *Primary) gather(tick *time.Time) (joiners []*replicaWorker, wish CutWish, wait time.Duration) {
	now := p.cfg.Clock.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	lacks, err := p.whoLacks()
	if err != nil {
		return nil, wish, p.cfg.Interval
	}
	unchanged := p.unchangedLocked()
	if unchanged {
		// The last cut is also the image of this moment.
		p.lastCut.covers = now
	}
	if unchanged && p.together != nil && p.together.Err() == nil && slices.ContainsFunc(p.workers, func(w *replicaWorker) bool { return w.connected && w.wish == wishNone }) {
		// Who is busy wakes us when it is done, but not when it goes away, or time is over.
		return nil, wish, min(p.cfg.Interval, lookAgain)
	}
	due := now.Sub(*tick) >= p.cfg.Interval
	if due {
		*tick = now
	}
	useful := func(w *replicaWorker) bool { return !unchanged || w.holds < p.lastCut.epoch || w.holds < p.syncTo }
	for _, w := range p.workers {
		switch {
		case w.wish == wishNone, !lacks(w):
		case w.urgent, w.wish == wishView && (w.holds < p.syncTo || due && useful(w)):
			joiners = append(joiners, w)
			wish.View = wish.View || w.wish == wishView
		}
	}
	if len(joiners) == 0 {
		return nil, wish, p.cfg.Interval - now.Sub(*tick)
	}
	if wish.View {
		// Who is ready gets it too, also if nothing was written since its last:
		// otherwise this cut would leave it behind, and idle replicas would take
		// turns for ever.
		*tick = now
		for _, w := range p.workers {
			if w.wish != wishNone && lacks(w) && !slices.Contains(joiners, w) {
				joiners = append(joiners, w)
			}
		}
		wish.Since = math.MaxUint64
		for _, w := range joiners {
			if w.wish == wishView {
				wish.Since, wish.LiveRounds = min(wish.Since, w.since), max(wish.LiveRounds, w.liveRounds)
			}
		}
	}
	return joiners, wish, 0
}

// share hands the cut to those of the joiners that still want it.
func (p *Primary) share(cut Cut, wish CutWish, joiners []*replicaWorker) *sharedCut {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := &sharedCut{
		cut: cut, rec: p.lastCut, lineage: p.state.Lineage.Clone(), unixNanos: time.Now().UnixNano(),
		stop: make(chan struct{}), idle: make(chan struct{}), answers: map[uint64]*changedAnswer{},
	}
	if c, ok := cut.(DatedCut); ok {
		s.unixNanos = c.CutUnixNanos()
	}
	var takers []*replicaWorker
	for _, w := range joiners {
		if w.wish == wishNone || (w.wish == wishView && cut.View() == nil && cut.NoView() == nil) {
			continue
		}
		if w.wish == wishView && w.since < wish.Since && cut.View() != nil && !cut.WholeView() {
			continue // it came anew, further behind, while the cut was taken
		}
		takers = append(takers, w)
		s.patience = max(s.patience, w.patience)
		if w.verify != nil {
			s.patience = max(s.patience, 2*verifySliceTime)
		}
	}
	// Counted before the first has it: one may be done before the next is told.
	s.users = len(takers)
	if s.users == 0 {
		close(s.idle)
	}
	for _, w := range takers {
		w.wish, w.urgent = wishNone, false
		w.cuts <- &cutHandle{sharedCut: s} // has room for one
	}
	return s
}

// hold waits until nobody needs the cut. A slower replica does not keep a
// faster one from its next cut: it is told to stop reading once the interval
// is over and somebody else wants a cut, and at the limit in any case. One that was
// told so before gets a little more patience, or it might never finish.
func (p *Primary) hold(s *sharedCut) {
	begun := p.cfg.Clock.Now()
	for {
		limit := p.cfg.CutLimit
		if p.wanted(s.rec) {
			limit = min(limit, max(p.cfg.Interval, s.patience))
		}
		left := limit - p.cfg.Clock.Now().Sub(begun)
		if left <= 0 {
			break
		}
		select {
		case <-s.idle:
			return
		case <-p.kick: // somebody came to wait
		case <-p.cfg.Clock.After(min(left, p.cfg.Interval)): // or something was written
		}
	}
	close(s.stop)
	<-s.idle
}

// wanted reports whether a replica waits for a later cut than this one.
func (p *Primary) wanted(rec *cutRecord) bool {
	written, err := p.cfg.Source.WrittenBytes()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.workers {
		if w.wish != wishNone && (w.urgent || w.holds < rec.epoch || w.holds < p.syncTo || err != nil || written != rec.written) {
			return true
		}
	}
	return false
}
