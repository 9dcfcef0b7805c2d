package protocol

import (
	"context"
	"errors"
	"time"
)

// keptAttempt is an attempt whose session was lost: what the replica has of it, and
// what it lacks. It costs a bit for each block sent, however long the replica is away.
type keptAttempt struct {
	epoch *interruptedEpoch
	plan  Plan // with which it began
	base  uint64
	rest  []Range
	round uint32

	withdrawn bool
	resumed   int
	started   time.Time
	left      time.Time     // when its session was lost
	away      time.Duration // before that, between sessions
	stats     LinkStats     // of all its sessions
}

// leftOff notes where a round ended early: everything but rest was read at, or
// after, the cut of h, and is on its way or equal at the replica.
func (a *attempt) leftOff(h *cutHandle, rest []Range) {
	a.whole, a.base, a.rest, a.known = false, h.rec.epoch, rest, true
	// Rounds are few. When they run short the next goes on under the same number: of
	// what comes by one stream the last wins.
	if a.round < MaxRounds/2 {
		a.round++
	}
}

// keep is what another session needs to go on with the attempt; nil if none can.
func (a *attempt) keep() *keptAttempt {
	e := a.resuming
	if a.begun {
		e = a.link.interrupted()
	}
	var refused *RefusedError
	if e == nil || !a.known || a.w.afresh || errors.As(a.link.Err(), &refused) {
		return nil
	}
	return &keptAttempt{epoch: e, plan: a.plan, base: a.base, rest: a.rest, round: a.round,
		withdrawn: a.withdrawn, resumed: a.resumed, started: a.started, left: a.w.p.cfg.Clock.Now(), away: a.away, stats: a.link.Stats().sub(a.stats)}
}

// goOn says whether the kept attempt, if there is one, fits the plan; else it is forgotten.
func (w *replicaWorker) goOn(link *Link, plan Plan) bool {
	if w.kept != nil && !w.kept.fits(link, plan) {
		w.kept = nil
	}
	return w.kept != nil
}

// fits says whether the plan is what the attempt was about, and the replica still has its
// part of that. What got lost on the way is added to the rest.
func (k *keptAttempt) fits(link *Link, plan Plan) bool {
	full := plan.Action == CompareAll || plan.Action == FullCopy
	lost, ok := link.kept(k.epoch)
	if !ok || full != k.epoch.start.Full || plan.InPlace != k.plan.InPlace || plan.Overwrite != k.plan.Overwrite ||
		!plan.Discard.IsZero() || !full && (plan.Action != Incremental || plan.Since != k.plan.Since) {
		return false
	}
	k.rest = uniteRanges(k.rest, lost)
	return true
}

// takeUp makes the attempt one that goes on with another.
func (a *attempt) takeUp(k *keptAttempt) {
	a.resuming, a.known, a.resumed = k.epoch, true, k.resumed+1
	a.repair = nil // the next attempt's
	a.plan, a.full, a.whole, a.base, a.rest, a.round = k.plan, k.epoch.start.Full, false, k.base, k.rest, k.round
	a.withdrawn, a.started, a.stats = k.withdrawn, k.started, a.stats.sub(k.stats)
	a.away = k.away + a.w.p.cfg.Clock.Now().Sub(k.left)
	// A frozen view may hold only what changed since the base.
	a.liveNext = len(a.rest) > 0 || a.plan.InPlace || a.w.liveFirst
}

// epoch runs one attempt, or goes on with the one that is kept. It returns the
// replica's lineage after the commit.
func (w *replicaWorker) epoch(ctx context.Context, link *Link, plan Plan, urgent bool) (Lineage, error) {
	a := newAttempt(w, link, plan)
	if w.kept != nil {
		a.takeUp(w.kept)
		w.kept = nil
	}
	w.repairs = a.repair != nil
	at, err := a.run(ctx, urgent || a.resuming != nil)
	if a.sync != nil {
		w.update(func() { w.sync = nil })
	}
	switch {
	case err == nil:
		w.afresh = false
	case a.lost(ctx):
		w.kept = a.keep()
	}
	w.resuming = a.resuming != nil
	return at, err
}

// lost says that the session has ended.
func (a *attempt) lost(ctx context.Context) bool { return ctx.Err() != nil || a.link.Err() != nil }
