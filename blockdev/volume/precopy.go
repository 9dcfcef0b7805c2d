package volume

import (
	"context"
	"errors"
	"fmt"
	"time"

	"blockferry/blockdev/bpf"
	"blockferry/blockdev/precopy"
)

// openPreCopy makes what reads cuts into memory. It needs fine tracking: the
// era would name far too much.
func (v *Volume) openPreCopy() error {
	if !v.options.PreCopy || v.fine == nil {
		return nil
	}
	var err error
	v.engine, err = precopy.New(precopy.Options{
		Source: v, Tracker: v.fine.tracker, StallBudget: v.options.StallBudget, StallLimit: v.options.StallLimit,
	})
	return err
}

// Want is what CutSince is asked for.
type Want struct {
	// Since is the cut after which what changed will be read; 0: anything may be.
	Since uint64
	// Force, with pre-copy, stops writers for as long as it takes, up to the stall limit,
	// when the stall budget will not do.
	Force bool
	// OnlyMemory has a cut for which too much changes fail, with precopy.ErrTooMuch. Then take
	// one without a view, of the same number, read the device while writes go on, and cut
	// against that; Force may help, too.
	OnlyMemory bool
}

// CutSince is Cut with a view of which only that will be read which changed
// after cut want.Since. With pre-copy it holds just that, in
// memory, and nothing is copied out. A cut that needs an era of its own, or for
// which too much changes unless want.OnlyMemory says otherwise, is one with a whole view all the same.
func (v *Volume) CutSince(ctx context.Context, number uint64, want Want) (*Cut, error) {
	return v.cutBy(ctx, number, true, func(c *Cut) error {
		if v.engine != nil && want.Since > 0 && !v.rollNow() {
			if first, _, ok := v.fine.tracker.Covered(); ok && first <= want.Since {
				done, err := c.preCopy(ctx, want)
				if done || err != nil {
					return err
				}
			}
		}
		return c.take()
	})
}

// preCopy takes the cut, or says that it is to be taken another way.
func (c *Cut) preCopy(ctx context.Context, want Want) (done bool, err error) {
	v := c.volume
	s := &stopper{volume: v}
	image, err := v.engine.Cut(ctx, precopy.Request{Number: c.number, Since: want.Since, Force: want.Force}, s)
	switch {
	case errors.Is(err, bpf.ErrUncovered):
		v.lostFine(c.number, err)
		return false, nil
	case errors.Is(err, precopy.ErrTooMuch):
		c.tooMuch, c.withView = err, !want.OnlyMemory
		v.noteImage(c, err)
		if want.OnlyMemory {
			return false, err
		}
		return false, nil
	case err != nil:
		return false, err
	}
	v.noteImage(c, nil)
	v.log.Debug("read into memory", "cut", c.number, "rounds", image.Rounds(), "bytes", image.RoundBytes(), "inside-bytes", image.InsideBytes())
	v.newest = c.number
	if _, err := v.keepDiscardLimits(); err != nil {
		return false, errors.Join(err, image.Release())
	}
	c.image, c.fine, c.cuts = image, true, v.labelNow().Cuts
	c.at, c.stalled, c.written = image.At(), image.Stalled(), s.written
	v.countStats(func(s *Stats) { s.Cuts++ })
	return true, nil
}

// noteImage says once, not at each cut, that cuts have a frozen view in place of
// an image in memory, or none, and that they have one again. cutMu is held.
func (v *Volume) noteImage(c *Cut, tooMuch error) {
	var e *precopy.TooMuchError
	reason := precopy.Reason("")
	if errors.As(tooMuch, &e) {
		reason = e.Reason
	}
	if reason == v.tooMuch {
		return
	}
	v.tooMuch = reason
	if reason == "" {
		v.log.Info("cuts are read into memory again", "cut", c.number)
		return
	}
	instead := "a frozen view"
	if !c.withView {
		instead = "no image"
	}
	v.log.Warn("not read into memory: cuts have "+instead+" until less changes", "cut", c.number, "reason", tooMuch)
}

// stopper is a volume as a precopy.Stopper; cutMu is held.
type stopper struct {
	volume  *Volume
	written uint64 // at the stop that held
}

func (s *stopper) Prepare(ctx context.Context) error { return s.volume.Prepare(ctx) }

func (s *stopper) Stop(ctx context.Context, limit time.Duration, inside func() error) (stalled time.Duration, err error) {
	w, err := s.volume.stop(ctx, limit, inside)
	if w == nil {
		return 0, err
	}
	s.written = w.written
	return w.stalled, err
}

// stop is Stop with cutMu held. Its window is nil when none was begun.
func (v *Volume) stop(ctx context.Context, limit time.Duration, inside func() error) (*window, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	w, err := v.newWindow(false)
	if err != nil {
		return nil, err
	}
	w.limit, w.exchange, w.between = limit, nil, inside
	if err := w.run(); err != nil {
		return w, fmt.Errorf("volume %s: stop: %w", v.options.Name, err)
	}
	return w, nil
}

// Prepare has mounted file systems written back, if a stop is to freeze them.
// With Stop it makes a volume a precopy.Stopper.
func (v *Volume) Prepare(ctx context.Context) error {
	if v.options.FreezeFilesystem {
		v.syncMounts()
	}
	return ctx.Err()
}

// Stop stops writers and waits for what is in flight, calls inside and lets
// writers go on, all within limit. nil says that they stood still from before
// inside was called until it returned, and that it returned nil. Then every write
// completed before is in what inside read, by ReadAt or of the disk itself, and
// none issued after. Nothing is told to the tracker. inside must not allocate,
// nor call any other method but ReadAt. stalled is how long writers may have
// waited, also when it failed.
func (v *Volume) Stop(ctx context.Context, limit time.Duration, inside func() error) (stalled time.Duration, err error) {
	v.cutMu.Lock()
	defer v.cutMu.Unlock()
	w, err := v.stop(ctx, limit, inside)
	if w == nil {
		return 0, err
	}
	return w.stalled, err
}

// closePreCopy comes before closeFine: a cut that was not released is.
func (v *Volume) closePreCopy() error {
	if v.engine == nil {
		return nil
	}
	e := v.engine
	v.engine = nil
	return e.Close()
}
