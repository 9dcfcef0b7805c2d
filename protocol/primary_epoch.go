package protocol

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// EpochStats tells of one committed epoch. Times are in seconds.
type EpochStats struct {
	Epoch         uint64    `json:"epoch"`
	Action        string    `json:"action"` // of the plan: incremental, compare, full
	Rounds        int       `json:"rounds"`
	Resumed       int       `json:"resumed,omitempty"`      // sessions that were lost on the way
	Link          LinkStats `json:"bytes"`                  // of all its sessions
	StallSeconds  float64   `json:"stall-seconds"`          // writers were stopped for the last cut
	ViewSeconds   float64   `json:"view-seconds"`           // the frozen view was held
	FlushSeconds  float64   `json:"source-flush-seconds"`   // of the source
	CommitSeconds float64   `json:"replica-commit-seconds"` // until the replica had it durable
	TotalSeconds  float64   `json:"total-seconds"`          // from the first cut to the acknowledgement
}

// syncProgress is what the status shows of a sync under way.
type syncProgress struct {
	begun      time.Time
	roundAt    atomic.Pointer[time.Time]
	round      atomic.Int64
	doneBytes  atomic.Int64
	totalBytes atomic.Int64
}

func (s *syncProgress) newRound(now time.Time, round, total int64) {
	s.roundAt.Store(&now)
	s.round.Store(round)
	s.doneBytes.Store(0)
	s.totalBytes.Store(total)
}

// attempt brings one replica from its position to a cut, in one or several
// rounds. Each round has a cut: what changed up to the cut before, and what
// was left of the round before, is its work.
//
// A live round reads the source while writes go on. What is torn by that
// changed after the round's cut, so the next round names it again. A frozen
// round reads the cut's view; the attempt is committed after a frozen round
// that was complete and valid.
type attempt struct {
	w    *replicaWorker
	link *Link
	plan Plan

	whole bool    // nothing is sent yet and everything must be
	base  uint64  // otherwise: what changed after this cut is missing,
	rest  []Range // and these

	begun    bool
	full     bool
	round    uint32
	live     int   // live rounds in a row
	lastLive int64 // bytes the last of them had to look at
	liveNext bool
	voids    int
	// withdrawn: a frozen round was ended early for the sake of others
	withdrawn bool
	// known: base and rest name all that what was sent lacks, and no frame holds what was never there
	known    bool
	resuming *interruptedEpoch // of a session before; nil: the attempt begins here
	resumed  int               // sessions before this one
	repair   *repairJob        // ends with the commit; nil: there is none, or what this is goes on with was begun before

	started time.Time
	away    time.Duration // since then, without a session
	stats   LinkStats
	sync    *syncProgress
}

func newAttempt(w *replicaWorker, link *Link, plan Plan) *attempt {
	if plan.Action == Nothing { // until there is something
		plan.Action = Incremental
	}
	a := &attempt{
		w: w, link: link, plan: plan, whole: plan.Action == FullCopy || plan.Action == CompareAll, base: plan.Since,
		stats: link.Stats(),
	}
	a.full = a.whole
	if !a.full && !plan.Discard.IsZero() {
		a.rest = w.itsRanges // what changed there differs, too
	}
	a.takeRepair()
	// What takes long is read live first: a frozen view can't be held that long, and may hold
	// only what changed here since the base. Unless the tracker can't tell what changes meanwhile.
	a.liveNext = (a.whole || len(a.rest) > 0 || plan.InPlace || w.liveFirst) && !(a.whole && w.blind)
	return a
}

// run does rounds until the epoch is committed, or does not happen.
func (a *attempt) run(ctx context.Context, urgent bool) (Lineage, error) {
	w := a.w
	urgent = urgent || a.liveNext || a.whole
	for {
		wish := wishView
		if a.liveNext {
			wish = wishBarrier
		}
		since := a.base
		if a.whole {
			since = 0
		}
		h, err := w.await(ctx, wish, since, a.live, urgent, a.patience())
		if err != nil {
			return nil, err
		}
		if a.started.IsZero() {
			a.started = w.p.cfg.Clock.Now()
		}
		at, err := a.step(ctx, h)
		h.done()
		if err != nil || at != nil {
			return at, err
		}
		urgent = true
	}
}

// patience is for how long the attempt may hold up the others: for a small part of
// its own delay, once its view was withdrawn; not while its own limit makes that
// delay, of hours perhaps, and not for the time between its sessions.
func (a *attempt) patience() time.Duration {
	if !a.withdrawn || a.w.cfg.Link.Pace.Holding() {
		return 0
	}
	return (a.w.p.cfg.Clock.Now().Sub(a.started) - a.away) / patienceShare
}

// step does one round. The lineage is not nil when the epoch is committed.
func (a *attempt) step(ctx context.Context, h *cutHandle) (Lineage, error) {
	w := a.w
	ranges := []Range{{0, w.p.size}}
	if !a.whole {
		begun := w.p.cfg.Clock.Now()
		changed, err := h.changed(a.base, w.p.size)
		if err != nil {
			return nil, a.giveUp(ctx, h, fmt.Errorf("what changed since epoch %d: %w", a.base, err))
		}
		ranges = uniteRanges(a.rest, changed)
		if ev := w.p.cfg.Events.Changed; ev != nil {
			ev(w.cfg.Name, ChangedInfo{h.rec.epoch, a.base, len(ranges), totalBytes(ranges), w.p.cfg.Clock.Now().Sub(begun)})
		}
	}
	size := totalBytes(ranges)
	view := h.cut.View()
	noView := h.cut.NoView() // one was asked for
	if a.liveNext && a.live > 0 && noView == nil && a.settled(size) {
		a.liveNext = false
		if view == nil || !h.cut.WholeView() {
			return nil, nil // a frozen round comes next, since the same base
		}
	}
	live := a.liveNext || view == nil
	if noView != nil && a.live > 0 {
		w.update(func() { w.because(noView.Error(), noView) })
	}
	if a.round >= MaxRounds {
		return nil, a.giveUp(ctx, h, fmt.Errorf("after %d rounds more is still written than the link takes", MaxRounds))
	}
	if err := a.begin(ctx, h); err != nil {
		return nil, err
	}
	r := Round{
		Number: a.round, Source: view, Ranges: ranges,
		// A blank replica has nothing to compare with until something was sent.
		Narrow: !(a.plan.Action == FullCopy && a.round == 0) && (a.whole || len(a.rest) > 0 || !h.exact(a.base)),
	}
	if live || a.whole || size > w.p.cfg.LiveRestBytes {
		a.show(size)
	}
	if a.sync != nil {
		a.sync.newRound(w.p.cfg.Clock.Now(), int64(a.round), size)
		r.Progress = func(n int64) { a.sync.doneBytes.Add(n) }
	}
	if live {
		return nil, a.liveRound(ctx, h, r, size)
	}
	return a.frozenRound(ctx, h, r)
}

// settled says that another live round would not make the rest much smaller.
func (a *attempt) settled(size int64) bool {
	cfg := a.w.p.cfg
	return size <= cfg.LiveRestBytes || size >= a.lastLive || a.live >= cfg.MaxLiveRounds
}

func (a *attempt) begin(ctx context.Context, h *cutHandle) error {
	if a.begun {
		return nil
	}
	s := EpochStart{Epoch: h.rec.epoch, Mode: ModeJournal, Full: a.full, Lineage: h.lineage, Discard: a.plan.Discard, CutUnixNanos: h.unixNanos}
	if a.plan.InPlace {
		s.Mode = ModeInPlace
	}
	var err error
	if a.resuming != nil {
		err = a.link.resume(ctx, a.resuming)
	} else {
		err = a.link.Begin(ctx, s, a.plan.Overwrite)
	}
	if err != nil {
		return err
	}
	a.begun = true
	if a.plan.InPlace {
		a.w.update(func() { a.w.disk, a.w.holds, a.w.committed = DiskInconsistent, 0, nil })
	}
	return nil
}

func (a *attempt) show(size int64) {
	if a.sync == nil {
		a.sync = &syncProgress{begun: a.w.p.cfg.Clock.Now()}
		a.sync.newRound(a.sync.begun, int64(a.round), size)
		a.w.update(func() { a.w.sync = a.sync })
	}
}

// liveRound reads the source itself; the cut has told what it had to.
func (a *attempt) liveRound(ctx context.Context, h *cutHandle, r Round, size int64) error {
	h.done()
	r.Source = a.w.p.cfg.Source
	a.known = false
	rest, err := a.link.SendRound(ctx, r)
	if err != nil {
		if a.lost(ctx) {
			a.leftOff(h, rest)
		}
		return a.giveUp(ctx, h, err)
	}
	a.w.judge(a.base, h.rec.epoch, r.Ranges, false)
	a.whole, a.base, a.rest, a.known = false, h.rec.epoch, nil, true
	a.round++
	a.live++
	a.lastLive = size
	written, err := a.w.p.cfg.Source.WrittenBytes()
	if err != nil {
		return a.giveUp(ctx, h, err)
	}
	// Whether another live round is worth it shows at its cut; when little was
	// written since, the frozen one is tried at once.
	a.liveNext = a.live < a.w.p.cfg.MaxLiveRounds && int64(written-h.rec.written) > a.w.p.cfg.LiveRestBytes
	return nil
}

func (a *attempt) frozenRound(ctx context.Context, h *cutHandle, r Round) (Lineage, error) {
	w := a.w
	clock := w.p.cfg.Clock
	e := EpochStats{Epoch: h.rec.epoch, Action: a.plan.Action.String(), StallSeconds: h.cut.Stalled().Seconds()}
	begun := clock.Now()
	w.p.mu.Lock()
	job := w.verify
	w.p.mu.Unlock()
	if r.Stop = h.stop; a.blind() {
		r.Stop = nil // what is not read of this view no later one can make up for
	}
	sound := false
	r.ReadsDone = func() error {
		// In this order: what was read counts only if the view was whole after
		// the last read, and may be committed only once the source itself
		// can't lose it.
		if err := h.valid(); err != nil {
			return err
		}
		t := clock.Now()
		err := h.flushSource()
		e.FlushSeconds = clock.Now().Sub(t).Seconds()
		if err == nil && job == nil {
			e.ViewSeconds = clock.Now().Sub(begun).Seconds()
			h.done()
		}
		sound = err == nil
		return err
	}
	a.known = false
	rest, err := a.link.SendRound(ctx, r)
	if err != nil && sound && a.lost(ctx) {
		a.leftOff(h, rest)
		return nil, a.giveUp(ctx, h, err)
	}
	a.round++
	var void *cutVoidError
	switch {
	case errors.As(err, &void) && a.plan.InPlace && a.voids < maxVoids:
		// What was sent may be wrong, and lies in the data area already: all of
		// it is sent again, over what changed since the cut before.
		a.void(h, err)
		a.voids++
		a.rest, a.liveNext, a.live, a.known = r.Ranges, !a.blind(), 0, !a.whole
		return nil, nil
	case errors.As(err, &void):
		w.liveFirst = true
		return nil, a.giveUp(ctx, h, err)
	case err != nil:
		return nil, a.giveUp(ctx, h, err)
	case len(rest) > 0:
		// The cut was withdrawn: others are faster. What was read counts; the
		// remainder is sent live, with what changed in the meantime.
		a.whole, a.base, a.rest, a.known = false, h.rec.epoch, rest, true
		a.liveNext, a.live, a.withdrawn = true, 0, true
		w.update(func() {
			w.because(fmt.Sprintf("slower than what is written: %d MiB of epoch %d were not sent when its view was given up",
				totalBytes(rest)>>20, h.rec.epoch), nil)
		})
		return nil, nil
	}
	since := a.base
	a.whole, a.base, a.rest, a.known = false, h.rec.epoch, nil, true
	t := clock.Now()
	if err := a.link.Commit(ctx, h.lineage, h.unixNanos); err != nil {
		return nil, err
	}
	now := clock.Now()
	e.CommitSeconds = now.Sub(t).Seconds()
	e.TotalSeconds = now.Sub(a.started).Seconds()
	e.Rounds, e.Resumed = int(a.round), a.resumed
	e.Link = a.link.Stats().sub(a.stats)
	w.update(func() {
		w.holds, w.committed, w.disk, w.last, w.sync = h.rec.epoch, h.rec, DiskConsistent, &e, nil
		w.because("", nil)
	})
	if ev := w.p.cfg.Events.Committed; ev != nil {
		ev(w.cfg.Name, e)
	}
	w.p.forget()
	a.repaired(h.rec.epoch)
	w.judge(since, h.rec.epoch, r.Ranges, true)
	if job != nil {
		if err := w.verifySlice(ctx, a.link, h, job); err != nil {
			return nil, err
		}
	}
	return h.lineage, nil
}

// patienceShare: a slow replica may make the others wait for one part in so many of the
// time that its epoch takes.
const patienceShare = 8

// maxVoids is how many void views one in-place attempt survives.
const maxVoids = 5

// blind says that the tracker can't tell what changes while everything is read:
// it has to be read from one frozen view, however long that takes.
func (a *attempt) blind() bool { return a.whole && a.w.blind }

func (a *attempt) void(h *cutHandle, err error) {
	cause := err
	if a.w.blind || a.full && a.w.p.follow == nil && errors.Is(err, ErrTrackingLost) {
		cause = fmt.Errorf("%w, so everything is compared in one frozen view each time: %w", ErrTrackingGone, err)
	}
	a.w.update(func() { a.w.because(cause.Error(), cause) })
	if ev := a.w.p.cfg.Events.Void; ev != nil {
		ev(a.w.cfg.Name, h.rec.epoch, err)
	}
}

// giveUp drops the open epoch at the replica and says whether the session can
// go on with a new plan.
func (a *attempt) giveUp(ctx context.Context, h *cutHandle, err error) error {
	if a.lost(ctx) {
		return err
	}
	a.known = false
	h.done()
	a.void(h, err)
	if a.begun {
		if e := a.link.Abort(ctx, err.Error()); e != nil {
			return e
		}
	}
	again := &replanError{err: err, torn: a.begun && a.plan.InPlace, full: a.full}
	var void *cutVoidError
	var flush *flushError
	switch {
	case errors.Is(err, ErrTrackingLost):
		a.w.untracked = true
		// One that was to be gone on with begins anew, and live.
		a.w.blind = a.w.blind || a.full && a.begun && a.w.p.follow == nil
		return again
	case errors.As(err, &void), errors.As(err, &flush):
		return again
	}
	// Anything else, a source that can't be read for one, is tried again with
	// a new session, after a pause.
	return err
}
