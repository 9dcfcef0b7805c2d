package protocol

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"blockferry/proto"
)

// replicaWorker feeds one replica: it connects, plans, joins cuts and sends.
type replicaWorker struct {
	p    *Primary
	cfg  ReplicaConfig
	cuts chan *cutHandle // room for one: what was wished for

	// Guarded by Primary.mu.
	wish        cutWish
	urgent      bool          // not only at the next interval
	since       uint64        // with wishView: CutWish.Since, for it alone
	liveRounds  int           // and CutWish.LiveRounds
	patience    time.Duration // how long it may hold up others that are done
	connected   bool
	link        *Link
	plan        *Plan
	disk        DiskState  // 0: not known
	holds       uint64     // epoch of its position, 0 when that is none of ours
	at          Position   // its position, whatever its disk's state; where the source follows: what it needs no cut of
	committed   *cutRecord // the cut it holds, nil when it was taken before this start
	reason      string     // why it is behind, for people; empty: it is not
	cause       error      // behind the reason; nil: it is no error
	refused     bool
	begun       uint64 // sessions, the one under way included
	lasting     uint64 // the last of them that ended for what only the operator changes
	paused      bool
	retryNow    bool
	stopSession func()
	verifying   bool // by a caller of Verify or Repair
	verify      *verifyJob
	repair      *repairJob // wanted of the next attempt, and not committed yet
	sync        *syncProgress
	last        *EpochStats

	// What was learned about the replica; used by its goroutine only.
	journalTooSmall bool
	needsFull       bool
	untracked       bool
	blind           bool // the tracker failed a comparison, too: it is done in one frozen view
	liveFirst       bool // the last frozen view did not last: shrink the work first

	kept     *keptAttempt // of a session that was lost; nil: none
	resuming bool         // the last attempt went on with one
	repairs  bool         // the last attempt was a repair as well
	afresh   bool         // until the next commit none is kept: the journal had no room for it

	// Of a replica that went its own way; for the present session.
	strayed     string
	mineChanged ChangedBytes // since the common position
	itsChanged  ChangedBytes
	itsRanges   []Range
}

const notConnectedYet = "not connected yet"

func newReplicaWorker(p *Primary, rc ReplicaConfig) *replicaWorker {
	rc.Link.Volume, rc.Link.VolumeUUID, rc.Link.SizeBytes = p.cfg.Volume, p.cfg.VolumeUUID, p.size
	if rc.Link.Replica == "" {
		rc.Link.Replica = rc.Name
	}
	if ev := p.cfg.Events.Packing; ev != nil {
		rc.Link.Packing = func(now Codec, why string) { ev(rc.Name, now, why) }
	}
	if rc.RetryMax <= 0 {
		rc.RetryMax = p.cfg.RetryMax
	}
	return &replicaWorker{p: p, cfg: rc, cuts: make(chan *cutHandle, 1), reason: notConnectedYet}
}

// update changes the worker's state under the lock and wakes who waits for it.
func (w *replicaWorker) update(f func()) {
	w.p.mu.Lock()
	before := w.reason
	f()
	after, cause := w.reason, w.cause
	w.p.notify()
	w.p.mu.Unlock()
	if ev := w.p.cfg.Events.Behind; ev != nil && before != after {
		ev(w.cfg.Name, after, cause)
	}
}

// because notes why the replica is behind; mu is held.
func (w *replicaWorker) because(reason string, cause error) { w.reason, w.cause = reason, cause }

// whyBehind is for messages; mu is held.
func (w *replicaWorker) whyBehind() string {
	switch {
	case w.paused:
		return "paused"
	case w.stuck() != "":
		return w.stuck()
	case w.reason != "":
		return w.reason
	case !w.connected:
		return "not connected"
	case w.sync != nil:
		return w.limited() + "being synced"
	case w.p.stateErr != nil:
		return "no cut can be taken: " + w.p.stateErr.Error()
	case w.p.cutErr != nil:
		return "no cut can be taken: " + w.p.cutErr.Error()
	}
	return w.limited() + "under way"
}

func (w *replicaWorker) run(ctx context.Context) {
	backoff := w.p.cfg.RetryMin
	for {
		if w.p.waitFor(ctx, func() bool { return !w.paused }) != nil {
			return
		}
		w.update(func() {
			w.retryNow = false
			w.begun++
		})
		progressed, err := w.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if progressed {
			backoff = w.p.cfg.RetryMin
		}
		w.repairLost(err)
		var refused interface{ Reason() string } // a plan, or another primary
		isRefused := errors.As(err, &refused)
		w.update(func() {
			if w.refused = isRefused; isRefused || wrongReplica(err) {
				w.lasting = w.begun
			}
			switch {
			case isRefused:
				w.because(refused.Reason(), err) // without the evidence, which goes on
			case err != nil:
				w.because(err.Error(), err)
			}
			if w.paused {
				w.because("paused by the operator", nil)
			}
		})
		delay := backoff
		if isRefused {
			// Only the operator changes that; look again now and then.
			delay = w.cfg.RetryMax
		}
		delay = Spread(delay)
		backoff = min(2*backoff, w.cfg.RetryMax)
		timer := w.p.cfg.Clock.After(delay)
		for again := false; !again; {
			w.p.mu.Lock()
			now, c := w.retryNow || w.paused, w.p.changed
			w.p.mu.Unlock()
			if now {
				break
			}
			select {
			case <-ctx.Done():
				return
			case <-timer:
				again = true
			case <-c:
			}
		}
	}
}

// wrongReplica says that what is at the other end is none for this volume.
func wrongReplica(err error) bool {
	var r *RefusedError
	return errors.As(err, &r) && (r.Reason == proto.Reason_REASON_WRONG_VOLUME || r.Reason == proto.Reason_REASON_SIZE || r.Reason == proto.Reason_REASON_VERSION)
}

// afterConnect is the reason to be behind of a replica that is connected again:
// it stands until an epoch is committed, if one is needed. mu is held.
func (w *replicaWorker) afterConnect() string {
	const again = "it catches up; before that: "
	switch {
	case w.reason == "" || w.reason == notConnectedYet:
		return ""
	case w.p.unchangedLocked() && w.holds >= w.p.lastCut.epoch:
		return ""
	}
	return again + strings.TrimPrefix(w.reason, again)
}

// session runs from the handshake to the end of the stream. progressed says
// whether an epoch was committed, or one of a session before went on.
func (w *replicaWorker) session(ctx context.Context) (progressed bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w.update(func() { w.stopSession = cancel })
	w.p.mu.Lock()
	primary := w.p.history()
	w.p.mu.Unlock()
	handshake, done := context.WithTimeout(ctx, w.p.cfg.ConnectTimeout)
	link, err := Connect(handshake, w.cfg.Client, w.cfg.Link, primary)
	done()
	if err != nil {
		return false, twoPrimaries(err, primary)
	}
	defer link.Close()
	go func() {
		select {
		case <-link.Dead():
			cancel()
		case <-ctx.Done():
		}
	}()
	disk, needsFull := link.Disk()
	lineage := link.Lineage()
	w.needsFull = w.needsFull || needsFull
	w.update(func() { w.connected, w.link, w.disk, w.refused, w.holds = true, link, disk, false, 0 })
	defer func() {
		w.update(func() { w.connected, w.link, w.sync, w.stopSession = false, nil, nil, nil })
		if lerr := link.Err(); lerr != nil && (err == nil || errors.Is(err, context.Canceled)) {
			err = lerr
		}
		if ev := w.p.cfg.Events.Disconnected; ev != nil {
			ev(w.cfg.Name, err)
		}
	}()
	if err := w.askWayward(ctx, link, Compare(lineage, primary)); err != nil {
		return false, w.learn(err)
	}
	voids := 0 // in a row
	for first := true; ; first = false {
		w.p.mu.Lock()
		primary = w.p.history()
		w.p.mu.Unlock()
		plan := MakePlan(PlanInput{
			Primary: primary, Replica: lineage, Disk: disk, NeedsFull: w.needsFull, Tracked: !w.untracked,
			AllowUnrelated: w.cfg.AllowUnrelated, CatchUpInPlace: w.cfg.CatchUpInPlace, JournalTooSmall: w.journalTooSmall,
			Strayed: w.strayed, Discard: link.GivenUp(), SplitBrain: w.cfg.SplitBrain, PrimaryChanged: w.mineChanged, ReplicaChanged: w.itsChanged,
		})
		if plan.Action != Refuse && w.goOn(link, plan) {
			plan.Rule += fmt.Sprintf("; it goes on with epoch %d, of which the replica kept what it had", w.kept.epoch.start.Epoch)
		}
		w.update(func() {
			w.plan = &plan
			if plan.Action == Nothing || plan.Action == Incremental || plan.Action == CompareAll && !plan.Overwrite && len(lineage) > 0 {
				w.holds = lineage.Tip().Epoch
			}
			if disk != DiskConsistent || !plan.Discard.IsZero() {
				w.holds = 0 // no epoch of ours
			}
			w.stands(lineage.Tip(), plan)
			if first && plan.Action != Refuse {
				w.because(w.afterConnect(), nil)
			}
		})
		if ev := w.p.cfg.Events.Connected; ev != nil && first {
			ev(w.cfg.Name, plan)
		}
		if err := plan.Err(); err != nil {
			return progressed, err
		}
		at, err := w.epoch(ctx, link, plan, first)
		var again *replanError
		switch {
		case err == nil:
			lineage, disk, progressed, voids = at, DiskConsistent, true, 0
			w.strayed, w.itsRanges = "", nil
			w.needsFull, w.untracked, w.journalTooSmall, w.liveFirst = false, false, false, false
			w.blind = w.blind && plan.Action != Incremental
		case errors.As(err, &again):
			// The same session goes on; an in-place attempt that was dropped
			// left the data torn.
			if again.torn {
				disk, w.needsFull = DiskInconsistent, w.needsFull || again.full
			}
			// A source whose cuts are all void is not cut at full speed. What was lost
			// once is compared at once: every moment is lag.
			if voids > 0 || !errors.Is(err, ErrTrackingLost) {
				select {
				case <-w.p.cfg.Clock.After(min(w.p.cfg.RetryMin<<min(voids, 20), w.p.cfg.RetryMax)):
				case <-ctx.Done():
				}
			}
			voids++
		default:
			progressed = progressed || w.resuming && w.kept != nil && link.anyStored()
			return progressed, w.learn(err)
		}
	}
}

// Spread is a delay, by up to a quarter longer or shorter at random: nodes that wait for
// each other do not come in step.
func Spread(delay time.Duration) time.Duration {
	return time.Duration(float64(delay) * (0.75 + rand.Float64()/2))
}

// replanError: the epoch did not happen, and a new plan may do better.
type replanError struct {
	err        error
	torn, full bool
}

func (e *replanError) Error() string { return e.err.Error() }
func (e *replanError) Unwrap() error { return e.err }

// learn notes what a refusal teaches for the next plan, and says it in words.
func (w *replicaWorker) learn(err error) error {
	if lerr := w.linkErr(); lerr != nil {
		err = lerr
	}
	var r *RefusedError
	if !errors.As(err, &r) {
		return err
	}
	switch r.Reason {
	case proto.Reason_REASON_NEEDS_FULL:
		w.needsFull = true
	case proto.Reason_REASON_JOURNAL_FULL:
		if w.resuming {
			// Some of what is kept there has changed again, and takes room all the same.
			w.afresh = true
			w.update(func() { w.retryNow = true })
			return fmt.Errorf("what is missing does not fit into the replica's journal beside what it kept, and is sent anew: %w", err)
		}
		if w.repairs {
			// Nothing is known of what changed alone. A repair never goes in place.
			w.update(func() { w.retryNow = true })
			return fmt.Errorf("what differs does not fit into the replica's journal; enlarge the journal, or give the replica room in a spill file: %w", err)
		}
		w.journalTooSmall = true
		if w.cfg.CatchUpInPlace {
			w.update(func() { w.retryNow = true })
			return fmt.Errorf("what is missing does not fit into the replica's journal; it catches up in place: %w", err)
		}
		return fmt.Errorf("what is missing does not fit into the replica's journal; enlarge the journal, give the replica room in a spill file, or allow catch-up: in-place "+
			"(the replica is Inconsistent meanwhile): %w", err)
	}
	return err
}

func (w *replicaWorker) linkErr() error {
	w.p.mu.Lock()
	l := w.link
	w.p.mu.Unlock()
	if l == nil {
		return nil
	}
	return l.Err()
}

// await joins the next cut of a kind, a view for what changed since an epoch.
func (w *replicaWorker) await(ctx context.Context, wish cutWish, since uint64, liveRounds int, urgent bool, patience time.Duration) (*cutHandle, error) {
	w.update(func() {
		w.wish, w.since, w.liveRounds, w.patience = wish, since, liveRounds, patience
		w.urgent = urgent || w.verify != nil || w.repair != nil
	})
	w.p.wake()
	select {
	case h := <-w.cuts:
		return h, nil
	case <-ctx.Done():
	}
	w.update(func() { w.wish = wishNone })
	select {
	case h := <-w.cuts: // it came at the same moment
		h.done()
	default:
	}
	return nil, ctx.Err()
}
