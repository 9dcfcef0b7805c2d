package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/dm"
	"blockferry/blockdev/era"
	"blockferry/blockdev/precopy"
)

// ErrViewLost says that a cut's frozen view is not whole any more.
var ErrViewLost = errors.New("the frozen view is lost")

var errNumber = fmt.Errorf("a cut's number is 1 to %d and larger than any before", uint64(math.MaxInt64))

// Cut is a point in time of a volume. View, Changed, Valid and FlushSource
// may be used from several goroutines; Release ends it, when they are done.
type Cut struct {
	volume    *Volume
	number    uint64
	withView  bool
	view      *blockdev.File
	image     *precopy.Cut // in the view's place
	tooMuch   error        // why that was not to be had; nil: it was, or was not tried
	rolled    bool         // it began an era, just before
	era       uint32       // that one
	rollAsked uint64       // the volume's, before it began
	fine      bool         // fine tracking covers it
	marksMu   sync.Mutex
	hasMarks  bool   // a metadata snapshot was asked for
	snapBlock uint64 // of the metadata snapshot, 0: none was taken yet
	at        time.Time
	stalled   time.Duration
	written   uint64
	cuts      Cuts // up to and with this one, as far as they began an era
	void      bool
	released  bool
}

// Cut fixes a point in time: every write completed before it is in, every
// write issued after it is out. With a view its content stays readable until
// Release. The number must be larger than any before, void cuts included.
// ErrLate, or any other error, means that there is no cut and nothing is
// left of it.
func (v *Volume) Cut(ctx context.Context, number uint64, withView bool) (*Cut, error) {
	return v.cutBy(ctx, number, withView, (*Cut).take)
}

func (v *Volume) cutBy(ctx context.Context, number uint64, withView bool, take func(*Cut) error) (*Cut, error) {
	v.cutMu.Lock()
	defer v.cutMu.Unlock()
	fail := func(err error) (*Cut, error) {
		return nil, fmt.Errorf("volume %s: cut %d: %w", v.options.Name, number, err)
	}
	if err := ctx.Err(); err != nil {
		return fail(err)
	}
	if v.cut != nil {
		if !v.cut.failed() {
			return fail(fmt.Errorf("cut %d is not released", v.cut.number))
		}
		if err := v.cut.release(); err != nil {
			return fail(fmt.Errorf("cut %d could not be cleared away: %w", v.cut.number, err))
		}
	}
	if n := v.newestCut(); number > math.MaxInt64 || number <= n {
		return fail(fmt.Errorf("%w; the newest is %d", errNumber, n))
	}
	c := &Cut{volume: v, number: number, withView: withView, rollAsked: v.rollAsked.Load()}
	v.cut = c
	err := take(c)
	if err == nil {
		if c.rolled {
			v.rollDone = c.rollAsked
		}
		return c, nil
	}
	v.countStats(func(s *Stats) { s.VoidCuts++ })
	c.void = true
	if left := c.release(); left != nil {
		err = errors.Join(err, fmt.Errorf("what it leaves could not be removed: %w", left))
	}
	return fail(err)
}

func (v *Volume) newestCut() uint64 {
	newest := v.newest
	if cuts := v.labelNow().Cuts; len(cuts) > 0 {
		newest = max(newest, cuts[len(cuts)-1].Number)
	}
	if v.fine != nil {
		if _, last, ok := v.fine.tracker.Covered(); ok {
			newest = max(newest, last)
		}
	}
	return newest
}

func (c *Cut) take() error {
	v := c.volume
	if err := v.eraAnswers(); err != nil {
		return err
	}
	if c.withView {
		if err := v.prepareSnapshot(); err != nil {
			return err
		}
	}
	if v.options.FreezeFilesystem {
		v.syncMounts()
	}
	w, err := v.newWindow(c.withView)
	if err != nil {
		return err
	}
	if c.rolled = v.rollNow(); c.rolled {
		if c.era, err = v.beginEra(); err != nil {
			return err
		}
	}
	if err := w.run(); err != nil {
		if v.fine != nil {
			v.fine.tracker.Unheld()
		}
		return err
	}
	c.at, c.stalled, c.written = w.at, w.stalled, w.written
	v.newest = c.number
	c.sealFine()
	return c.afterWindow()
}

// afterWindow finishes what the window began.
func (c *Cut) afterWindow() error {
	v := c.volume
	lost, err := v.keepDiscardLimits()
	if err != nil {
		return err
	}
	c.cuts = v.labelNow().Cuts
	if lost {
		// Nor does this era know all: a discard may have come before the limits
		// were set again. The next cut begins another.
		v.RollNext()
	} else if c.rolled {
		if err := c.recordEra(); err != nil {
			return err
		}
	}
	if c.withView {
		path, err := v.ctl.OwnNode(deviceName(v.options.Name, roleSnap))
		if err != nil {
			return err
		}
		if c.view, err = blockdev.OpenFile(path, blockdev.OpenOptions{}); err != nil {
			return err
		}
		if err := c.Valid(); err != nil {
			return err
		}
	}
	v.countStats(func(s *Stats) { s.Cuts++ })
	return nil
}

// recordEra records the era that the cut began. Only now: an entry of a cut that
// never was would lose writes.
func (c *Cut) recordEra() error {
	v := c.volume
	if err := v.changeLabel(func(l *Label) {
		l.Cuts = l.Cuts.With(CutEra{c.number, c.era})
		c.cuts = l.Cuts
	}); err != nil {
		return err
	}
	if v.fine != nil {
		v.fine.rolled = time.Now()
	}
	return nil
}

// failed says that the cut is void, or was released in part: there is only
// something left to clear away.
func (c *Cut) failed() bool { return c.void }

// Number is the cut's number.
func (c *Cut) Number() uint64 { return c.number }

// View is the frozen image, nil for a cut without one.
func (c *Cut) View() io.ReaderAt {
	switch {
	case c.image != nil:
		return c.image
	case c.view != nil:
		return c.view
	}
	return nil
}

// WholeView says whether View holds all of the volume.
func (c *Cut) WholeView() bool { return c.image == nil }

// TooMuch is why what changed was not read into memory though that was tried: a
// precopy.ErrTooMuch; nil: it was, or was not to be.
func (c *Cut) TooMuch() error { return c.tooMuch }

// At is when it was, for people only.
func (c *Cut) At() time.Time { return c.at }

// Stalled is how long writers were stopped.
func (c *Cut) Stalled() time.Duration { return c.stalled }

// WrittenBytes is Volume.WrittenBytes at the cut.
func (c *Cut) WrittenBytes() uint64 { return c.written }

// FlushSource makes everything written before the cut durable on the disk.
func (c *Cut) FlushSource() error { return c.volume.FlushSource() }

// Changed lists what may have changed between the cut of the given number and
// this one: ascending, disjoint, within the volume. ErrTrackingLost when it
// can't be known.
func (c *Cut) Changed(since uint64) ([]blockdev.Extent, error) {
	v := c.volume
	if since > c.number {
		return nil, fmt.Errorf("volume %s: cut %d: asked for changes since the later cut %d", v.options.Name, c.number, since)
	}
	if extents, ok := c.changedFine(since); ok {
		return extents, nil
	}
	from, known := c.cuts.Since(since)
	if !known {
		return nil, fmt.Errorf("volume %s: %w: tracking began after cut %d", v.options.Name, ErrTrackingLost, since)
	}
	block, err := c.marks()
	if err != nil {
		return nil, fmt.Errorf("volume %s: cut %d: the era's marks: %w", v.options.Name, c.number, err)
	}
	marks, err := era.Changed(v.eras, block, from)
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w: %w (on %s, from byte %d)",
			v.options.Name, ErrTrackingLost, err, v.meta.Name(), v.labelNow().Areas.Meta.Offset+auxIDBytes)
	}
	label := v.labelNow()
	return blockdev.Clip(label.marked(marks), v.Size()), nil
}

// Valid says, after the last read of View, whether all that was read was the
// frozen image.
func (c *Cut) Valid() error {
	v := c.volume
	if c.image != nil {
		return c.image.Valid()
	}
	if !c.withView {
		return nil
	}
	name := deviceName(v.options.Name, roleSnap)
	if c.view == nil {
		return fmt.Errorf("volume %s: cut %d: %w: it was released", v.options.Name, c.number, ErrViewLost)
	}
	targets, err := v.ctl.Status(name)
	if err != nil {
		return fmt.Errorf("volume %s: cut %d: %w: %w", v.options.Name, c.number, ErrViewLost, err)
	}
	if len(targets) == 1 && targets[0].Type == "snapshot" && snapshotWhole(targets[0].Params) {
		return nil
	}
	return fmt.Errorf("volume %s: cut %d: %w: status of %s is '%v'; 'Invalid' and 'Overflow' mean that the COW area of %d bytes is full",
		v.options.Name, c.number, ErrViewLost, name, targets, v.labelNow().Areas.Cow.Length)
}

// snapshotWhole knows the one status of a snapshot that is whole:
// "used/total metadata" in sectors.
func snapshotWhole(status string) bool {
	status = strings.TrimSpace(status)
	return status != "" && strings.Trim(status, "0123456789/ ") == "" && strings.Contains(status, "/")
}

// Release gives the frozen view and the metadata snapshot back. After an
// error it may be called again; the next Cut does so by itself.
func (c *Cut) Release() error {
	v := c.volume
	v.cutMu.Lock()
	defer v.cutMu.Unlock()
	if c.released {
		return nil
	}
	if err := c.release(); err != nil {
		return fmt.Errorf("volume %s: release cut %d: %w", v.options.Name, c.number, err)
	}
	return nil
}

func (c *Cut) release() error {
	v := c.volume
	var errs []error
	if c.view != nil {
		errs = append(errs, c.view.Close())
		c.view = nil
	}
	if c.image != nil {
		errs = append(errs, c.image.Release())
	}
	if c.hasMarks {
		errs = append(errs, v.dropMetadataSnapshot())
	}
	if c.withView && c.image == nil {
		err := v.baseToLinear(v.options.StallLimit / 2)
		if err == nil {
			err = v.removeSnapshot()
		}
		errs = append(errs, err)
	}
	err := errors.Join(errs...)
	if err == nil {
		c.released = true
		v.cut = nil
	} else {
		c.void = true // unusable, only to be cleared away
	}
	return err
}

// syncMounts writes back what mounted file systems hold, so that the freeze
// inside the window finds little to do. What it can't, the freeze does.
func (v *Volume) syncMounts() {
	uses, err := blockdev.Users(v.Path())
	if err != nil {
		v.log.Warn("find the mounts to sync before a cut", "error", err)
	}
	for _, use := range uses {
		if use.Kind != "mount" {
			continue
		}
		dir, err := os.Open(use.By)
		if err == nil {
			err = errors.Join(unix.Syncfs(int(dir.Fd())), dir.Close())
		}
		if err != nil {
			v.log.Warn("sync before a cut", "mount", use.By, "error", err)
		}
	}
}

// prepareSnapshot makes the frozen view's device and loads the table of its origin,
// all that can be done before writers are stopped. The view is there already, of
// the volume as it goes on, until the base becomes its origin.
func (v *Volume) prepareSnapshot() error {
	name, base := deviceName(v.options.Name, roleSnap), deviceName(v.options.Name, roleBase)
	info, err := v.ctl.Create(name, deviceUUID(v.label.UUID, roleSnap))
	if err != nil {
		return err
	}
	v.devices[roleSnap] = info
	origin := v.originTable()
	snapshot := dm.Target{Length: origin.Length, Type: "snapshot", Params: fmt.Sprintf("%s %s N %d",
		v.devices[roleData].Dev(), v.devices[roleCow].Dev(), chunkBytes/blockdev.SectorSize)}
	if err := v.ctl.Load(name, []dm.Target{snapshot}); err != nil {
		return err
	}
	if err := v.ctl.Resume(name); err != nil {
		return err
	}
	return v.ctl.Load(base, []dm.Target{origin})
}
