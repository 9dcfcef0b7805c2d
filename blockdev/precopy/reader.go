package precopy

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// job is one read of the device into the pool.
type job struct{ offset, at, length int64 }

var errSlow = errors.New("the reads took too long")

// readers read a list of jobs in parallel. What they need is made before.
type readers struct {
	source io.ReaderAt
	start  chan struct{}
	idle   sync.WaitGroup // of the readers at work
	ended  sync.WaitGroup

	count    int
	memory   []byte
	jobs     []job
	deadline time.Time // zero: none
	done     <-chan struct{}
	next     atomic.Int64
	failed   atomic.Bool
	mu       sync.Mutex
	err      error
}

func newReaders(source io.ReaderAt, count int) *readers {
	r := &readers{source: source, start: make(chan struct{}, count), count: count}
	for range count {
		r.ended.Go(r.work)
	}
	return r
}

func (r *readers) close() {
	close(r.start)
	r.ended.Wait()
}

// read reads all jobs into memory, one call at a time. After an error the
// memory holds anything.
func (r *readers) read(ctx context.Context, memory []byte, jobs []job, deadline time.Time) error {
	r.memory, r.jobs, r.deadline, r.done, r.err = memory, jobs, deadline, ctx.Done(), nil
	r.next.Store(0)
	r.failed.Store(false)
	n := min(r.count, len(jobs))
	r.idle.Add(n)
	for range n {
		r.start <- struct{}{}
	}
	r.idle.Wait()
	if errors.Is(r.err, errCancelled) {
		return ctx.Err()
	}
	return r.err
}

var errCancelled = errors.New("cancelled")

func (r *readers) work() {
	for range r.start {
		if err := r.some(); err != nil {
			r.failed.Store(true)
			r.mu.Lock()
			if r.err == nil {
				r.err = err
			}
			r.mu.Unlock()
		}
		r.idle.Done()
	}
}

func (r *readers) some() error {
	for !r.failed.Load() {
		i := r.next.Add(1) - 1
		if i >= int64(len(r.jobs)) {
			return nil
		}
		if !r.deadline.IsZero() && time.Now().After(r.deadline) {
			return errSlow
		}
		select {
		case <-r.done:
			return errCancelled
		default:
		}
		j := r.jobs[i]
		if n, err := r.source.ReadAt(r.memory[j.at:j.at+j.length], j.offset); int64(n) < j.length {
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
	}
	return nil
}
