package protocol

import (
	"context"
	"errors"
	"fmt"
)

// RepairResult is what Repair found and did.
type RepairResult struct {
	Found VerifyResult // by the first look
	// Epoch brought the replica what differed; 0: nothing did.
	Epoch uint64
	// SentBytes of what differed were sent, at most Found.DifferentBytes and what was written
	// there meanwhile. The rest was found equal when it was compared again.
	SentBytes int64
	// Left is what the second look found, at all of the volume; without a first difference there is none.
	Left VerifyResult
}

// errNotInPlace ends a repair whose epoch would go in place: a crash would leave it torn where nothing is
// marked as changed, so that the next incremental epoch would pass over it.
var errNotInPlace = errors.New("the replica is being synced in place, which a repair never is")

// repairJob is what one replica is to get though nothing changed there.
type repairJob struct {
	ranges []Range         // ascending, disjoint, whole blocks
	done   chan repairDone // room for one
}

type repairDone struct {
	epoch uint64
	sent  int64
	err   error
}

// Repair is Verify, and if something differs the replica gets the volume's content there, with
// the next epoch, through its journal: it holds a complete point in time throughout. Then it is verified
// once more. found, which may be nil, is called in between, before anything is sent: the volume counts
// as the truth, whichever of the two disks is the bad one.
//
// What is compared again is narrowed as in any epoch, and what is repaired counts as changed for those
// who are fed from the replica. A session that ends before the commit ends the repair; then, and
// whenever else it came to nothing, the error says so, and the result has what was found.
func (p *Primary) Repair(ctx context.Context, replica string, progress func(VerifyProgress), found func(VerifyResult)) (RepairResult, error) {
	w, end, err := p.beginVerify(replica)
	if err != nil {
		return RepairResult{}, err
	}
	defer end()
	job, err := w.look(ctx, progress, true)
	if err != nil {
		return RepairResult{}, w.verifyError("verify", err)
	}
	res := RepairResult{Found: job.result}
	if res.Found.Same() {
		return res, nil
	}
	if found != nil {
		found(res.Found)
	}
	done := w.mend(ctx, job.found)
	if done.err != nil {
		return res, w.verifyError("repair", done.err)
	}
	res.Epoch, res.SentBytes = done.epoch, done.sent
	if job, err = w.look(ctx, progress, false); err != nil {
		return res, w.verifyError("second verify", err)
	}
	res.Left = job.result
	return res, nil
}

// mend waits until an epoch with the ranges is committed.
func (w *replicaWorker) mend(ctx context.Context, ranges []Range) (done repairDone) {
	job := &repairJob{ranges: ranges, done: make(chan repairDone, 1)}
	w.update(func() {
		if !w.connected {
			job.done <- repairDone{err: errors.New("it is not connected: " + w.whyBehind())}
			return
		}
		w.repair = job
		w.urgent = w.wish != wishNone // whoever waits for the interval comes before
	})
	w.p.wake()
	select {
	case done = <-job.done:
	case <-ctx.Done():
		done.err = ctx.Err()
	case <-w.p.ctx.Done():
		done.err = ErrStopped
	}
	w.endRepair(job, done) // nobody waits for it any more
	return done
}

func (w *replicaWorker) endRepair(job *repairJob, done repairDone) {
	w.update(func() {
		if w.repair == job {
			w.repair = nil
			job.done <- done
		}
	})
}

// repairLost ends the repair that a session's end leaves undone, if there is one.
func (w *replicaWorker) repairLost(err error) {
	w.p.mu.Lock()
	job := w.repair
	w.p.mu.Unlock()
	if job != nil {
		w.endRepair(job, repairDone{err: fmt.Errorf("the session ended before it was committed: %w", err)})
	}
}

// takeRepair adds a repair that waits to a new attempt.
func (a *attempt) takeRepair() {
	w := a.w
	w.p.mu.Lock()
	job := w.repair
	w.p.mu.Unlock()
	switch {
	case job == nil:
	case a.plan.InPlace:
		w.endRepair(job, repairDone{err: errNotInPlace})
	default:
		if a.repair = job; !a.full {
			a.rest = uniteRanges(a.rest, job.ranges)
		}
	}
}

// repaired ends the attempt's repair: the epoch is committed.
func (a *attempt) repaired(epoch uint64) {
	if a.repair == nil {
		return
	}
	sent := a.link.described(a.repair.ranges)
	a.w.endRepair(a.repair, repairDone{epoch: epoch, sent: sent})
}
