package attach

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/bpf"
	"blockferry/blockdev/precopy"
)

// Want is what a cut is asked to be.
type Want struct {
	// View wants an image: it holds what may have changed since cut Since, and
	// nothing else. Without, the cut only tells changes before from changes after,
	// in that every write that completes after it began counts as after; writers are
	// stopped only if nothing is known while they go on, as of disks without requests.
	View  bool
	Since uint64
	// Force stops writers for as long as it takes, up to the stall limit, when
	// the stall budget will not do.
	Force bool
}

// Cut is a point in time of an attached device. View, Changed, Valid and
// FlushSource may be used from several goroutines; Release ends it.
type Cut struct {
	attached *Attached
	number   uint64
	image    *precopy.Cut // nil: without
	at       time.Time
	stalled  time.Duration
	written  uint64
}

// Cut fixes a point in time. The number must be larger than any before, void
// cuts included; after any error there is no cut and nothing is left of it.
//
// Errors: ErrTrackingLost, of a cut with a view, also of one whose base (Since) is not
// known any more or not yet: then take one without first, with which the tracking begins
// anew if need be, read all of the device while writes go on, and cut against that. precopy.ErrTooMuch: what changed
// does not fit, or does not become little enough; the same helps, as does Force.
// ErrWritten, deadman.ErrLate, deadman.ErrFrozen: the cut is void, the next may
// not be. ErrUser: something uses the device that can't be frozen.
func (a *Attached) Cut(ctx context.Context, number uint64, want Want) (*Cut, error) {
	a.cutMu.Lock()
	defer a.cutMu.Unlock()
	c := &Cut{attached: a, number: number}
	if err := a.take(ctx, c, want); err != nil {
		a.countStats(func(s *Stats) { s.VoidCuts++ })
		return nil, fmt.Errorf("volume %s: cut %d: %w", a.options.Name, number, trackingLost(err))
	}
	a.countStats(func(s *Stats) { s.Cuts++ })
	return c, nil
}

func (a *Attached) take(ctx context.Context, c *Cut, want Want) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	list, err := fileSystems(a.options.Device)
	if err != nil {
		return err
	}
	if c.written, err = a.WrittenBytes(); err != nil {
		return err
	}
	f := a.freezer
	f.list = list
	if f.began, err = f.counters(); err != nil {
		return err
	}
	if !want.View {
		c.at = time.Now()
		c.stalled, err = a.engine.Mark(ctx, c.number, f)
		if errors.Is(err, bpf.ErrUncovered) {
			// That ended the coverage. A new one begins with this cut: nobody can ask what
			// changed before it, everybody what did since.
			a.log.Warn("tracking begins anew: replicas will be compared in full", "reason", err)
			before := c.stalled
			c.at = time.Now()
			c.stalled, err = a.engine.Mark(ctx, c.number, f)
			c.stalled += before
		}
		if err != nil || c.stalled == 0 {
			return err
		}
		return a.afterStop(list)
	}
	c.image, err = a.engine.Cut(ctx, precopy.Request{Number: c.number, Since: want.Since, Force: want.Force}, f)
	if err != nil {
		return err
	}
	if err := a.afterStop(list); err != nil {
		return errors.Join(err, c.image.Release())
	}
	c.at, c.stalled = c.image.At(), c.image.Stalled()
	c.written = f.frozen.bytes() - a.self.bytes.Load()
	a.thawWrote(c.image)
	a.countStats(func(s *Stats) {
		s.Rounds, s.RoundBytes, s.InsideBytes, s.Frozen = c.image.Rounds(), c.image.RoundBytes(), c.image.InsideBytes(), nil
		for _, fs := range list {
			s.Frozen = append(s.Frozen, fs.points[0])
		}
	})
	return nil
}

// afterStop looks whether the device has the users it had before: one that came
// meanwhile was not frozen.
func (a *Attached) afterStop(before []fileSystem) error {
	after, err := fileSystems(a.options.Device)
	if err != nil {
		return err
	}
	if !sameFileSystems(before, after) {
		return errMounts
	}
	return nil
}

// thawWrote finds out whether the thaw of an ext4 itself made the only write
// since: of one of its blocks, while the superblock, in the first, is not as
// frozen. 24 in the superblock, which begins at 1024, is the size of a block u32,
// as a power of two beyond 1 KiB.
func (a *Attached) thawWrote(image *precopy.Cut) {
	f := a.freezer
	if len(f.list) != 1 || !strings.HasPrefix(f.list[0].kind, "ext") || f.list[0].device != a.device {
		return
	}
	before, live := make([]byte, blockdev.BlockSize), blockdev.AlignedBuffer(blockdev.BlockSize)
	if _, err := image.ReadAt(before, 0); err != nil {
		return // it did not change since the base
	}
	if _, err := a.disk.ReadAt(live, 0); err != nil {
		return
	}
	now, err := f.counters()
	if err != nil || now.writes-f.frozen.writes != 1 || now.discards != f.frozen.discards {
		return
	}
	size := uint64(1024) << (binary.LittleEndian.Uint32(live[1024+24:]) & 15)
	if n := now.bytes() - f.frozen.bytes(); n == size && !bytes.Equal(before, live) {
		a.self.bytes.Add(n)
	}
}

// stopped counts a time in which writers were stopped.
func (a *Attached) stopped(length time.Duration) {
	a.countStats(func(s *Stats) {
		s.StalledTotal += length
		s.LongestStall = max(s.LongestStall, length)
	})
	a.log.Debug("writers stopped", "for", "cut", "seconds", length.Seconds())
}

// Number is the cut's number.
func (c *Cut) Number() uint64 { return c.number }

// View is the image: it holds what Changed names for the cut's base or a later
// one; anything else is an error. nil for a cut without.
func (c *Cut) View() io.ReaderAt {
	if c.image == nil {
		return nil
	}
	return c.image
}

// At is when it was, for people only.
func (c *Cut) At() time.Time { return c.at }

// Stalled is how long writers were stopped, freezes in vain included.
func (c *Cut) Stalled() time.Duration { return c.stalled }

// WrittenBytes is Attached.WrittenBytes at the cut.
func (c *Cut) WrittenBytes() uint64 { return c.written }

// FlushSource makes everything written before the cut durable on the device.
func (c *Cut) FlushSource() error { return c.attached.FlushSource() }

// Changed lists what may have changed between the cut of the given number and
// this one: ascending, disjoint, within the device. ErrTrackingLost when it
// can't be known.
func (c *Cut) Changed(since uint64) ([]blockdev.Extent, error) {
	a := c.attached
	if since > c.number {
		return nil, fmt.Errorf("volume %s: cut %d: asked for changes since the later cut %d", a.options.Name, c.number, since)
	}
	list, err := a.tracker.Changed(since, c.number)
	if err != nil {
		return nil, fmt.Errorf("volume %s: cut %d: changes since %d: %w", a.options.Name, c.number, since, trackingLost(err))
	}
	return blockdev.Clip(list, a.Size()), nil
}

// ChangedExact says whether Changed names only blocks that were written since.
func (c *Cut) ChangedExact(since uint64) bool { return c.attached.tracker.Exact(since, c.number) }

// Valid says whether what was read of View was the cut.
func (c *Cut) Valid() error {
	if c.image == nil {
		return nil
	}
	return c.image.Valid()
}

// Release gives the image's memory back.
func (c *Cut) Release() error {
	if c.image == nil {
		return nil
	}
	return c.image.Release()
}
