package protocol

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// verifySliceTime is how long a frozen view is held for one slice.
	verifySliceTime = 5 * time.Second
	// maxDifferences is how many ranges a VerifyResult lists.
	maxDifferences = 1000
	// maxIdleSlices is how many slices in a row may come to nothing.
	maxIdleSlices = 20
	// maxRepairRanges is how many ranges a repair keeps apart: 16 bytes each. Beyond, one
	// range reaches to the last difference.
	maxRepairRanges = 1 << 20
)

// VerifyProgress is how far a verification has come.
type VerifyProgress struct {
	DoneBytes      int64
	TotalBytes     int64
	DifferentBytes int64
}

// VerifyResult is what a verification found.
type VerifyResult struct {
	TotalBytes     int64
	DifferentBytes int64
	// Differences are the first ranges that differ, ascending, at most 1,000.
	Differences []Range
}

// Same reports whether source and replica hold the same.
func (r VerifyResult) Same() bool { return r.DifferentBytes == 0 }

type verifyJob struct {
	ctx      context.Context
	progress func(VerifyProgress)
	repair   bool       // keep all that differs
	done     chan error // room for one

	// Used by the replica's goroutine, read by Verify after done.
	next int64
	idle int
	// Of a slice that was compared with the live image: where it began, the
	// replica's epoch, and what differed. 0: there is none.
	sliceFrom    int64
	suspectSince uint64
	suspects     []Range
	result       VerifyResult
	found        []Range // with repair: all that differs, ascending, disjoint
}

// Verify compares a replica with the source, both at the same epoch, so that
// every difference is one. It goes in slices of at most five seconds, each
// with an epoch of its own; replication goes on in between. progress may be nil.
// Differences are not an error. The replica must be connected; a session
// that breaks meanwhile is waited for.
func (p *Primary) Verify(ctx context.Context, replica string, progress func(VerifyProgress)) (VerifyResult, error) {
	w, end, err := p.beginVerify(replica)
	if err != nil {
		return VerifyResult{}, err
	}
	defer end()
	job, err := w.look(ctx, progress, false)
	if err != nil {
		return VerifyResult{}, w.verifyError("verify", err)
	}
	return job.result, nil
}

func (w *replicaWorker) verifyError(what string, err error) error {
	return fmt.Errorf("volume %q: %s of replica %q: %w", w.p.cfg.Volume, what, w.cfg.Name, err)
}

// beginVerify keeps others from verifying a replica until end is called.
func (p *Primary) beginVerify(replica string) (w *replicaWorker, end func(), err error) {
	if w, err = p.worker(replica); err != nil {
		return nil, nil, err
	}
	refused := ""
	w.update(func() {
		switch {
		case w.verifying:
			refused = "it is being verified already"
		case !w.connected:
			refused = "it is not connected: " + w.whyBehind()
		default:
			w.verifying = true
		}
	})
	if refused != "" {
		return nil, nil, fmt.Errorf("volume %q: replica %q can't be verified: %s", p.cfg.Volume, replica, refused)
	}
	return w, func() { w.update(func() { w.verifying = false }) }, nil
}

// look compares all of the volume once.
func (w *replicaWorker) look(ctx context.Context, progress func(VerifyProgress), repair bool) (*verifyJob, error) {
	job := &verifyJob{ctx: ctx, progress: progress, repair: repair, done: make(chan error, 1), result: VerifyResult{TotalBytes: w.p.size}}
	w.update(func() {
		w.verify = job
		// It may be waiting for its interval.
		w.urgent = w.wish != wishNone
	})
	w.p.wake()
	var err error
	select {
	case err = <-job.done:
	case <-ctx.Done():
		err = ctx.Err()
	case <-w.p.ctx.Done():
		err = ErrStopped
	}
	w.update(func() { w.verify = nil })
	return job, err
}

// verifySlice compares the next slice on a cut that the replica has just
// committed. Only a session that broke is an error of the session.
//
// A view that holds only what changed can't be compared with. The live image is
// instead: what differs there is suspect until the next view, by when every
// write has been marked that could have made the difference (judge).
func (w *replicaWorker) verifySlice(ctx context.Context, link *Link, h *cutHandle, job *verifyJob) error {
	if job.ctx.Err() != nil || job.next >= w.p.size {
		return nil
	}
	var image io.ReaderAt = w.p.cfg.Source
	valid := func() error { return nil }
	whole := h.cut.WholeView()
	if whole {
		image, valid = h.cut.View(), h.valid
	} else {
		h.done()
	}
	stop := make(chan struct{})
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		defer close(stop)
		select {
		case <-h.stop:
		case <-w.p.cfg.Clock.After(verifySliceTime):
		case <-job.ctx.Done():
		case <-ended:
		}
	}()
	var mu sync.Mutex
	var found []Range
	ranges := []Range{{job.next, w.p.size - job.next}}
	rest, err := link.CompareRound(ctx, Round{Source: image, Ranges: ranges, Stop: stop, ReadsDone: func() error {
		defer h.done()
		return valid()
	}}, func(d []Range) {
		mu.Lock()
		found = append(found, d...)
		mu.Unlock()
	})
	var void *cutVoidError
	switch {
	case errors.As(err, &void):
		rest = ranges // what was found says nothing
	case err != nil && ctx.Err() == nil && link.Err() == nil:
		w.endVerify(job, err)
		return nil
	case err != nil:
		return err
	case whole:
		job.differ(uniteRanges(found, nil))
	default:
		job.sliceFrom, job.suspectSince, job.suspects = job.next, h.rec.epoch, uniteRanges(found, nil)
	}
	before := job.next
	job.next = w.p.size
	if len(rest) > 0 {
		job.next = rest[0].Offset
	}
	if job.next > before {
		job.idle = 0
	} else if job.idle++; job.idle > maxIdleSlices {
		w.endVerify(job, fmt.Errorf("no frozen view lasted long enough to compare anything at %d", job.next))
		return nil
	}
	w.endSlice(job)
	return nil
}

// judge decides about what a comparison with the live image found, with what
// changed from one cut to the next that the replica was sent. Only a view is a border behind which no write of
// before is left unmarked.
func (w *replicaWorker) judge(since, epoch uint64, changed []Range, view bool) {
	w.p.mu.Lock()
	job := w.verify
	w.p.mu.Unlock()
	switch {
	case job == nil || job.suspectSince == 0:
		return
	case job.suspectSince != since:
		// What was written in between is not known: this slice once more.
		job.next, job.suspects = job.sliceFrom, nil
	default:
		// What was written since is on its way to the replica anyhow.
		job.suspects = subtractRanges(job.suspects, changed)
		if !view {
			job.suspectSince = epoch
			return
		}
		job.differ(job.suspects)
	}
	job.suspectSince, job.suspects = 0, nil
	w.endSlice(job)
}

// differ counts what was found to differ: ascending, disjoint.
func (job *verifyJob) differ(found []Range) {
	job.result.DifferentBytes += totalBytes(found)
	for _, r := range found {
		if len(job.result.Differences) < maxDifferences {
			job.result.Differences = appendRange(job.result.Differences, r)
		}
		switch n := len(job.found); {
		case !job.repair:
		case n < maxRepairRanges:
			job.found = appendRange(job.found, r)
		default:
			job.found[n-1].Length = r.End() - job.found[n-1].Offset
		}
	}
}

// endSlice says how far the job is, and ends it when nothing is left.
func (w *replicaWorker) endSlice(job *verifyJob) {
	if job.suspectSince != 0 {
		return
	}
	if job.progress != nil {
		job.progress(VerifyProgress{DoneBytes: job.next, TotalBytes: w.p.size, DifferentBytes: job.result.DifferentBytes})
	}
	if job.next >= w.p.size {
		w.endVerify(job, nil)
	}
}

func (w *replicaWorker) endVerify(job *verifyJob, err error) {
	w.update(func() {
		if w.verify == job {
			w.verify = nil
		}
	})
	job.done <- err
}
