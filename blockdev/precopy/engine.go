package precopy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"blockferry/blockdev"
)

const (
	defaultMemory  = 256 << 20
	defaultBudget  = 20 * time.Millisecond
	defaultRounds  = 8
	defaultReaders = 8
	// maxStops bounds how often in one cut writers are stopped in vain, because
	// more was written until they stood still than was foretold.
	maxStops = 3
	// maxAnew bounds how often in one cut the rounds begin anew.
	maxAnew = 2
	// roomFactor is how much more than foretold there may be in the stop: so much
	// memory is made ready, and so much longer the reads may take.
	roomFactor = 2
	roomBytes  = 4 << 20
	// margin is for what was foretold and takes longer.
	margin = 1.25
	// extraWeight is that of the last stop in what is expected of the next.
	extraWeight = 0.3
	// maxEntries bounds the lists used in the stop: extents taken, and reads.
	maxEntries = 64 << 10
	// longRun is how long what was freed is at least, if that is why much changed, in bytes;
	// lookParts is what part of the memory it is looked at in.
	longRun   = 1 << 20
	lookParts = 8
)

// ErrTooMuch says that there is no cut because too much was changed or goes on
// being changed. Nothing is lost. The error is a *TooMuchError.
var ErrTooMuch = errors.New("too much changes for a cut within the stall budget")

// ErrWritten says that something was written while writers should have stood
// still: the cut is void.
var ErrWritten = errors.New("written to while writers were stopped")

// ErrUntried says of a stop that it was not tried, as it would have been in vain.
var ErrUntried = errors.New("nobody was stopped for it")

// ErrNotWhole says that a cut lacks what was marked before it and not sealed: most
// often an earlier process had taken it and ended before its own seal.
// It is void, the next is not.
var ErrNotWhole = errors.New("the cut does not hold all that changed")

// ErrOutside says that a cut was asked for what it does not hold.
var ErrOutside = errors.New("not in this cut")

// Reason is why there was too much.
type Reason string

const (
	// ReasonMemory: what changed since the base does not fit into memory. Send
	// what changed so far, then cut against that.
	ReasonMemory Reason = "what changed does not fit into memory"
	// ReasonRounds: each round left more to read than the budget allows.
	ReasonRounds Reason = "writes are as fast as reads: what is left does not become little enough"
	// ReasonStall: what was left once writers stood still was more than was foretold.
	ReasonStall Reason = "more was left once writers stood still than can be read in time"
	// ReasonUnseen: of no stop the tracker could say that it had seen each write
	// complete, so that what the rounds had read might be old.
	ReasonUnseen Reason = "writes completed unseen in each attempt to read what changed"
)

// TooMuchError is ErrTooMuch in numbers.
type TooMuchError struct {
	Reason Reason
	Bytes  int64 // that would have to fit: into memory, or into the stall
	Limit  int64 // what would have fitted, in bytes; 0 with ReasonUnseen: any would
	Rounds int   // that were read
}

func (e *TooMuchError) Error() string {
	if e.Reason == ReasonUnseen {
		return fmt.Sprintf("%s: %d bytes were left after %d rounds", e.Reason, e.Bytes, e.Rounds)
	}
	return fmt.Sprintf("%s: %d bytes after %d rounds, %d would do", e.Reason, e.Bytes, e.Rounds, e.Limit)
}

// Is makes it an ErrTooMuch.
func (e *TooMuchError) Is(target error) bool { return target == ErrTooMuch }

// Tracker says what is written to the device. A mark is made at the latest when
// a write completes, before who issued it learns of that.
type Tracker interface {
	// MarkedBytes is how much is marked and was not exchanged yet.
	MarkedBytes() int64
	// Exchange takes what is marked into the open set.
	Exchange()
	// ExchangeStopped is Exchange with writers stopped. It allocates nothing.
	// false: writes may have completed unseen since the last one; what was read
	// of them is to be read again, and Seal decides whether that is all.
	ExchangeStopped() (whole bool)
	// Unheld says that writers did not stand still for the last ExchangeStopped: what
	// it concluded does not count, what it took does.
	Unheld()
	// Settled says whether Seal can tell that nothing was lost up to the last
	// Exchange, made while writes go on; possible: of this disk it can ever be.
	Settled() (settled, possible bool)
	// Taken is what the last Exchange took, ascending and disjoint.
	Taken() []blockdev.Extent
	// AppendTaken is Taken within the list's capacity, without allocating.
	AppendTaken(list []blockdev.Extent) ([]blockdev.Extent, bool)
	// Seal says that all that was exchanged since the last Seal changed before
	// cut number. An error: events were lost, what changed is not known.
	Seal(number uint64) error
	// Covered says between which cuts Changed has an answer.
	Covered() (first, last uint64, ok bool)
	// Changed is what changed after cut since and before cut upTo.
	Changed(since, upTo uint64) ([]blockdev.Extent, error)
}

// Stopper stops writers.
type Stopper interface {
	// Prepare is called before each look at how much is left, while writes go
	// on: what caches hold should be written.
	Prepare(ctx context.Context) error
	// Stop stops writers, waits for what is in flight, calls inside and lets
	// writers go on, all within limit. nil says that they stood still from
	// before inside was called until it returned, and that inside returned nil.
	// stalled is how long writers may have waited, also when it failed. inside may
	// not be called. ErrUntried: it was not tried.
	Stop(ctx context.Context, limit time.Duration, inside func() error) (stalled time.Duration, err error)
}

// Source is a device, read past every cache.
type Source interface {
	io.ReaderAt
	Name() string
	Size() int64
}

// Options of an Engine. 0 is the default.
type Options struct {
	Source  Source
	Tracker Tracker
	// MemoryBytes bounds what a cut may hold, long runs of zeros not counted, a multiple of 4096: 256 MiB.
	MemoryBytes int64
	// StallBudget is how long the reads with writers stopped may take: 20 ms,
	// or half of the stall limit if that is less.
	StallBudget time.Duration
	// StallLimit is what Stop is given: 1 s.
	StallLimit time.Duration
	// Rounds bounds the reads while writes go on: 8.
	Rounds int
	// Readers is how many read at once: 8.
	Readers int
}

// Engine takes cuts of one device, one at a time; what it has measured of the
// device it keeps between them.
type Engine struct {
	o       Options
	readers *readers

	mu    sync.Mutex // held by Cut and Mark
	open  []blockdev.Extent
	speed speed
	extra float64 // bytes that came on top of what was marked, in the last stops
	vain  int     // stops of Mark in a row that did not hold
	pool  pool
	cut   *Cut // not yet released
	w     window
}

// window is what is used while writers are stopped, made before.
type window struct {
	ctx    context.Context
	limit  time.Duration // what the reads should take
	taken  []blockdev.Extent
	jobs   []job
	inside func() error

	called bool
	at     time.Time // writers stood still
	left   int64     // bytes to read
	reads  int
	took   time.Duration
}

// errAgain: what is left goes into one more round.
var errAgain = errors.New("more is left than was foretold")

// errAnew: what the rounds have read may be old, they begin anew.
var errAnew = errors.New("writes completed unseen")

// New makes an engine. Close ends it.
func New(o Options) (*Engine, error) {
	if o.StallLimit == 0 {
		o.StallLimit = time.Second
	}
	if o.StallBudget == 0 {
		o.StallBudget = min(defaultBudget, o.StallLimit/2)
	}
	if o.MemoryBytes == 0 {
		o.MemoryBytes = defaultMemory
	}
	if o.Rounds == 0 {
		o.Rounds = defaultRounds
	}
	if o.Readers == 0 {
		o.Readers = defaultReaders
	}
	switch {
	case o.MemoryBytes < 1<<20 || o.MemoryBytes%blockdev.BlockSize != 0:
		return nil, fmt.Errorf("%s: %d bytes of memory for a cut: want at least 1 MiB, in blocks of %d", o.Source.Name(), o.MemoryBytes, blockdev.BlockSize)
	case o.StallBudget < time.Millisecond || o.StallBudget > o.StallLimit:
		return nil, fmt.Errorf("%s: a stall budget of %s: want 1 ms to the stall limit of %s", o.Source.Name(), o.StallBudget, o.StallLimit)
	case o.Rounds < 1 || o.Readers < 1:
		return nil, fmt.Errorf("%s: %d rounds by %d readers", o.Source.Name(), o.Rounds, o.Readers)
	}
	e := &Engine{o: o, readers: newReaders(o.Source, o.Readers)}
	e.pool.limit = o.MemoryBytes
	e.w.inside = e.inside
	e.w.taken, e.w.jobs = make([]blockdev.Extent, maxEntries), make([]job, maxEntries)
	clear(e.w.taken) // touched
	clear(e.w.jobs)
	return e, nil
}

// Close gives the memory back. A cut that was not released is released.
func (e *Engine) Close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cut != nil {
		e.cut.drop()
	}
	e.readers.close()
	return e.pool.free()
}

// Mark seals a cut without an image. Every write that completes after it returned is
// named by Changed since it, so that what is read of the device later, and that,
// together are whole. Writes go on, unless the tracker can't tell then what it saw:
// it does not of every disk. Then writers are stopped for it, for stalled.
//
// A stop that does not hold is an error, and the next Mark tries again: with one that
// holds the tracker may yet know all. Where it could tell without one,
// Mark seals all the same once there is nothing to keep, or maxStops in a row did not hold:
// Seal then ends the coverage, and the next Mark begins another.
func (e *Engine) Mark(ctx context.Context, number uint64, stop Stopper) (stalled time.Duration, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.exchange()
	if settled, possible := e.o.Tracker.Settled(); !settled {
		if err := stop.Prepare(ctx); err != nil {
			return 0, err
		}
		called := false
		stalled, err = stop.Stop(ctx, e.o.StallLimit, func() error {
			called = true
			e.o.Tracker.ExchangeStopped() // Seal decides
			return nil
		})
		e.keep(e.o.Tracker.Taken())
		if err != nil {
			if called {
				e.o.Tracker.Unheld()
			}
			if !errors.Is(err, ErrUntried) {
				e.vain++
			}
			if _, _, covered := e.o.Tracker.Covered(); !possible || ctx.Err() != nil || covered && e.vain < maxStops {
				return stalled, err
			}
		}
	}
	e.vain = 0
	lost := e.seal(number)
	if lost != nil && err != nil {
		lost = fmt.Errorf("%w; the stop before that did not hold: %w", lost, err)
	}
	return stalled, lost
}

// exchange keeps what it takes until it is sealed.
func (e *Engine) exchange() {
	e.o.Tracker.Exchange()
	e.keep(e.o.Tracker.Taken())
}

func (e *Engine) keep(taken []blockdev.Extent) {
	e.open = blockdev.Union(e.open, taken)
}

// Seal seals a cut that is taken without the engine, as when it would have been
// too much for that: what was exchanged for it belongs to that cut then, and to no
// later one. The error is the tracker's.
func (e *Engine) Seal(number uint64) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.seal(number)
}

func (e *Engine) seal(number uint64) error {
	err := e.o.Tracker.Seal(number)
	e.open = nil // sealed, or of no use
	return err
}

// Request is what a cut is asked to be.
type Request struct {
	// Number of the cut, larger than any before.
	Number uint64
	// Since is the base: the cut holds what may have changed since that cut.
	Since uint64
	// Force takes the cut however long writers have to be stopped, up to the
	// stall limit, once all rounds are used up.
	Force bool
}

// Cut takes a cut. Errors: *TooMuchError; what the tracker or the stopper says;
// ErrWritten. After any error there is no cut, its number is used up, and what
// was exchanged belongs to the next.
func (e *Engine) Cut(ctx context.Context, r Request, stop Stopper) (*Cut, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cut != nil {
		return nil, fmt.Errorf("cut %d is not released", e.cut.number)
	}
	c := &Cut{engine: e, number: r.Number}
	err := e.take(ctx, r, stop, c)
	if err == nil {
		err = e.seal(r.Number)
	}
	if err == nil {
		c.extents = e.pool.extents()
		err = e.whole(r, c.extents)
	}
	if err != nil {
		return nil, errors.Join(err, e.pool.reset())
	}
	e.cut = c
	return c, nil
}

// whole says whether the cut holds all that the tracker names now that it is
// sealed. An earlier process may have exchanged marks and ended before it
// sealed a cut: only this seal makes them known.
func (e *Engine) whole(r Request, holds []blockdev.Extent) error {
	changed, err := e.o.Tracker.Changed(r.Since, r.Number)
	if err != nil {
		return err
	}
	want := blockdev.Clip(changed, e.o.Source.Size())
	if missing := want.Total() - blockdev.Intersect(want, holds).Total(); missing > 0 {
		return fmt.Errorf("%s: %w: %d bytes were marked earlier and become known only with it; it is void, the next cut holds them", e.o.Source.Name(), ErrNotWhole, missing)
	}
	return nil
}

func (e *Engine) take(ctx context.Context, r Request, stop Stopper, c *Cut) error {
	// What is written back now is read in the first round.
	if err := stop.Prepare(ctx); err != nil {
		return err
	}
	pending, err := e.sinceBase(r.Since)
	if err != nil {
		return err
	}
	failed, anew := 0, 0
	for c.rounds = 1; ; c.rounds++ {
		if err := e.round(ctx, pending, c); err != nil {
			return err
		}
		if err := errors.Join(stop.Prepare(ctx), ctx.Err()); err != nil {
			return err
		}
		left := e.o.Tracker.MarkedBytes() + int64(e.extra)
		last := c.rounds == e.o.Rounds || failed+1 == maxStops
		limit := e.o.StallBudget
		if last && r.Force {
			limit = e.o.StallLimit * 3 / 4
		}
		var missed []blockdev.Extent
		if e.fitting(limit) >= left {
			err := e.stop(ctx, left, limit, stop, c)
			if err == nil {
				return nil
			}
			if errors.Is(err, errAnew) {
				if anew == maxAnew {
					return &TooMuchError{ReasonUnseen, e.w.left, 0, c.rounds}
				}
				if pending, err = e.sinceBase(r.Since); err != nil {
					return err
				}
				anew, c.rounds = anew+1, 0
				continue
			}
			if !errors.Is(err, errAgain) && !errors.Is(err, errSlow) {
				return err
			}
			if last {
				return &TooMuchError{ReasonStall, e.w.left, e.fitting(limit), c.rounds}
			}
			failed++
			missed = e.o.Tracker.Taken()
		} else if last {
			return &TooMuchError{ReasonRounds, left, e.fitting(limit), c.rounds}
		}
		e.extra /= 2 // it may have been that once only
		e.exchange()
		pending = blockdev.Union(missed, e.o.Tracker.Taken()).Clip(e.o.Source.Size())
	}
}

// sinceBase is what the first round reads, after an exchange.
func (e *Engine) sinceBase(since uint64) (blockdev.Extents, error) {
	e.exchange()
	_, last, ok := e.o.Tracker.Covered()
	if !ok {
		last = since // Changed says why it has no answer
	}
	changed, err := e.o.Tracker.Changed(since, last)
	if err != nil {
		return nil, err
	}
	return blockdev.Union(changed, e.open).Clip(e.o.Source.Size()), nil
}

// round reads extents while writes go on. More of them than there is memory for may have
// been freed: that shows, part by part, when it is read.
func (e *Engine) round(ctx context.Context, extents blockdev.Extents, c *Cut) error {
	var long, short blockdev.Extents
	for _, x := range extents {
		if x.Length >= longRun {
			long = append(long, x)
		} else {
			short = append(short, x)
		}
	}
	for {
		news, _, _ := e.pool.news(long)
		others, _, _ := e.pool.news(short)
		if e.pool.used+news+others <= e.pool.limit {
			_, err := e.readPart(ctx, blockdev.Union(long, short), c)
			return err
		}
		tooMuch := &TooMuchError{ReasonMemory, e.pool.used + news + others, e.pool.limit, c.rounds - 1}
		look := e.pool.limit / lookParts / blockdev.BlockSize * blockdev.BlockSize
		if e.pool.used+look+others > e.pool.limit || news == 0 {
			return tooMuch
		}
		part, rest := e.pool.upTo(long, look)
		news, _, _ = e.pool.news(part)
		zeros, err := e.readPart(ctx, part, c)
		switch {
		case err != nil:
			return err
		case zeros < news/2:
			return tooMuch
		}
		long = rest
	}
}

// readPart reads extents for which there is memory; zeros is how much of them needs none.
func (e *Engine) readPart(ctx context.Context, extents blockdev.Extents, c *Cut) (zeros int64, err error) {
	news, pieces, reads := e.pool.news(extents)
	if err := e.pool.touch(news, pieces); err != nil {
		return 0, err
	}
	jobs := make([]job, 0, reads)
	jobs, missing, full := e.pool.place(extents, jobs)
	if missing > 0 || full {
		return 0, fmt.Errorf("%s: no room for %d extents in %d pieces (%d bytes missing)", e.o.Source.Name(), len(extents), len(e.pool.pieces), missing)
	}
	start := time.Now()
	if err := e.readers.read(ctx, e.pool.memory, jobs, time.Time{}); err != nil {
		return 0, err
	}
	e.speed.add(len(jobs), extents.Total(), time.Since(start))
	c.read += extents.Total()
	zeros = e.pool.dropZeros()
	e.pool.merge()
	return zeros, nil
}

// fitting is how many bytes, in reads as they were of late, can be read within
// a time, and kept.
func (e *Engine) fitting(limit time.Duration) int64 {
	const unit = 1 << 20
	took := e.speed.foretell(int(unit/e.speed.readBytes()), unit)
	n := e.pool.limit - e.pool.used
	if took > 0 {
		n = min(n, int64(float64(limit)/float64(took)*unit/margin))
	}
	return n
}

// stop has writers stopped and what is left read.
func (e *Engine) stop(ctx context.Context, left int64, limit time.Duration, stop Stopper, c *Cut) error {
	w := &e.w
	if err := e.pool.touch(roomFactor*left+roomBytes, maxEntries); err != nil {
		return err
	}
	w.ctx, w.limit, w.called, w.at, w.left, w.took, w.reads = ctx, limit, false, time.Time{}, 0, 0, 0
	stalled, err := stop.Stop(ctx, e.o.StallLimit, w.inside)
	e.pool.merge()
	c.stalled += stalled
	if !w.called {
		return errors.Join(err, ctx.Err())
	}
	e.keep(e.o.Tracker.Taken())
	if err != nil && !errors.Is(err, errAnew) { // without it the next stop concludes the same anew
		e.o.Tracker.Unheld()
	}
	e.extra = max(0, e.extra+(float64(w.left)-float64(left))*extraWeight)
	if err == nil {
		e.speed.add(w.reads, w.left, w.took)
		c.at, c.inside = w.at, w.left
	}
	return err
}

// inside reads what is left, with writers stopped. It allocates nothing and
// faults no page, unless it fails.
func (e *Engine) inside() error {
	w := &e.w
	w.called, w.at = true, time.Now()
	seen := e.o.Tracker.ExchangeStopped()
	taken, whole := e.o.Tracker.AppendTaken(w.taken[:0])
	for _, t := range taken {
		w.left += t.Length
	}
	switch {
	case !seen:
		return errAnew
	case !whole:
		return errAgain
	}
	if n := len(taken); n > 0 && taken[n-1].End() > e.o.Source.Size() {
		return fmt.Errorf("%s: the tracker names %d bytes at %d, beyond its end", e.o.Source.Name(), taken[n-1].Length, taken[n-1].Offset)
	}
	jobs, missing, full := e.pool.place(taken, w.jobs[:0])
	if missing > 0 || full || e.speed.foretell(len(jobs), w.left) > roomFactor*w.limit {
		return errAgain
	}
	w.reads = len(jobs)
	if err := e.readers.read(w.ctx, e.pool.memory, jobs, w.at.Add(roomFactor*w.limit)); err != nil {
		return err
	}
	w.took = time.Since(w.at)
	if n := e.o.Tracker.MarkedBytes(); n != 0 {
		return fmt.Errorf("%s: %w: %d bytes", e.o.Source.Name(), ErrWritten, n)
	}
	return nil
}
