package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/deadman"
	"blockferry/blockdev/precopy"
)

const (
	// settlePatience is how long after a freeze writes may still be in flight:
	// discards, which some file systems do not wait for.
	settlePatience = 5 * time.Millisecond
	settlePause    = 50 * time.Microsecond
	// trimPatience is for how long after a freeze that discards made void nothing is
	// frozen while discards go on: since the cut began, or within trimLook.
	trimPatience = 10 * time.Second
	trimLook     = 20 * time.Millisecond
)

// ErrWritten says that something was written, or in flight, while every file
// system was frozen: whatever it was, it goes past them. The cut is void.
var ErrWritten = precopy.ErrWritten

// ErrDiscards is ErrWritten of discards alone: the kernel's FITRIM does not mind that
// a file system is frozen. It passes when fstrim has ended.
var ErrDiscards = fmt.Errorf("discards go on though everything is frozen: fstrim runs: %w", ErrWritten)

// counters are those of the device's statistics that grow with every write.
// Fields, counted from 1, of its stat file: writes completed 5, sectors written
// 7, discards completed 12, sectors discarded 14.
type counters struct{ writes, written, discards, discarded uint64 }

func (c counters) bytes() uint64 { return (c.written + c.discarded) * blockdev.SectorSize }

// freezer stops writers by freezing every file system on the device. What it
// needs while they stand still is made before.
type freezer struct {
	attached *Attached
	stat     *os.File // the device's statistics
	inflight *os.File // its requests in flight
	buffer   [512]byte

	list   []fileSystem // what the cut under way freezes
	began  counters     // when that cut began
	files  []*os.File   // open while they are being frozen
	rescue func() error

	frozen, atEnd counters  // of the last stop that held
	seen          counters  // when the last stop, held or not, had ended
	trimmed       time.Time // when discards made one void, and none has held since
}

func newFreezer(a *Attached) (f *freezer, err error) {
	f = &freezer{attached: a}
	f.rescue = func() error { return a.options.Guard.Thaw(f.files...) }
	place, err := blockdev.PlacementOf(a.options.Device)
	if err != nil {
		return nil, err
	}
	dir := place.StatDir
	if f.stat, err = os.Open(dir + "/stat"); err != nil {
		return nil, err
	}
	if f.inflight, err = os.Open(dir + "/inflight"); err != nil {
		return nil, errors.Join(err, f.stat.Close())
	}
	if f.seen, err = f.counters(); err != nil {
		return nil, errors.Join(err, f.close())
	}
	return f, nil
}

func (f *freezer) close() error { return errors.Join(f.stat.Close(), f.inflight.Close()) }

// Prepare writes back what the file systems hold, so that the freeze finds
// little to do.
func (f *freezer) Prepare(ctx context.Context) error {
	for _, fs := range f.list {
		if err := ctx.Err(); err != nil {
			return err
		}
		file, err := fs.open()
		if err != nil {
			return err
		}
		err = unix.Syncfs(int(file.Fd()))
		if err = errors.Join(err, file.Close()); err != nil {
			return fmt.Errorf("sync %s before a freeze: %w", fs, err)
		}
	}
	return nil
}

// Stop implements precopy.Stopper. While discards go on that made a freeze void
// nothing is frozen, for a while.
func (f *freezer) Stop(ctx context.Context, limit time.Duration, inside func() error) (stalled time.Duration, err error) {
	if time.Since(f.trimmed) < trimPatience {
		if err := f.discarding(ctx); err != nil {
			return 0, err
		}
	}
	stalled, err = f.stop(ctx, limit, inside)
	if errors.Is(err, ErrDiscards) {
		f.trimmed = time.Now()
	} else if err == nil {
		f.trimmed = time.Time{}
	}
	if now, err := f.counters(); err == nil {
		f.seen = now
	}
	return stalled, err
}

// discarding looks whether discards go on.
func (f *freezer) discarding(ctx context.Context) error {
	for look := range 2 {
		now, err := f.counters()
		if err != nil {
			return err
		}
		if now.discarded != f.began.discarded {
			return fmt.Errorf("%w: %d bytes on %s since this cut began; %w", ErrDiscards,
				(now.discarded-f.began.discarded)*blockdev.SectorSize, f.attached.options.Device, precopy.ErrUntried)
		}
		if look == 0 {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(trimLook):
			}
		}
	}
	return nil
}

func (f *freezer) stop(ctx context.Context, limit time.Duration, inside func() error) (stalled time.Duration, err error) {
	if len(f.list) == 0 {
		// Nothing is stopped: it holds if nobody writes.
		deadman.Quiet(func() { err = f.watched(inside) })
		return 0, err
	}
	defer f.closeFiles()
	for _, fs := range f.list {
		file, err := fs.open()
		if err != nil {
			return 0, err
		}
		f.files = append(f.files, file)
	}
	guard := f.attached.options.Guard
	if err := guard.ArmMounts(limit, f.files...); err != nil {
		return 0, err
	}
	var late error
	var start, frozen, done time.Time
	froze := false
	deadman.Quiet(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		start = time.Now()
		if err = guard.Freeze(); err == nil {
			froze, frozen = true, time.Now()
			err = f.watched(inside)
		}
		done = time.Now()
		late = guard.Resume(f.rescue)
		stalled = time.Since(start)
	})
	f.attached.stopped(stalled)
	if froze {
		f.attached.log.Debug("a cut's stop in parts", "drain-seconds", frozen.Sub(start).Seconds(),
			"inside-seconds", done.Sub(frozen).Seconds(), "resume-seconds", (stalled - done.Sub(start)).Seconds())
	}
	switch {
	case !froze && !errors.Is(late, deadman.ErrStopped):
		return stalled, err // and so it says why it was no time
	case !froze:
		return stalled, errors.Join(err, late)
	case late != nil:
		// Whatever was read is worth nothing, so one more round does not help.
		return stalled, late
	}
	return stalled, err
}

// watched runs inside and says whether anything was written to the device from
// before it began until it ended. It allocates nothing unless it fails.
func (f *freezer) watched(inside func() error) error {
	for deadline := time.Now().Add(settlePatience); ; {
		n, err := f.writesInFlight()
		if err != nil {
			return err
		}
		if n == 0 {
			break
		}
		if time.Now().After(deadline) {
			kind := ErrWritten
			if now, err := f.counters(); err == nil && now.discarded != f.seen.discarded {
				kind = ErrDiscards
			}
			return fmt.Errorf("%w: %d writes are in flight on %s though it is frozen", kind, n, f.attached.options.Device)
		}
		pause := unix.NsecToTimespec(int64(settlePause))
		_ = unix.Nanosleep(&pause, nil)
	}
	var err error
	if f.frozen, err = f.counters(); err != nil {
		return err
	}
	because := inside()
	n, err := f.writesInFlight()
	if err != nil {
		return err
	}
	if f.atEnd, err = f.counters(); err != nil {
		return err
	}
	if f.atEnd.written == f.frozen.written && f.atEnd.discarded != f.frozen.discarded {
		return fmt.Errorf("%w: %d bytes on %s while it was frozen", ErrDiscards,
			(f.atEnd.discarded-f.frozen.discarded)*blockdev.SectorSize, f.attached.options.Device)
	}
	if n != 0 || f.atEnd.bytes() != f.frozen.bytes() { // the count of writes lags behind
		return fmt.Errorf("%w: %s: %d bytes in about %d writes, and %d writes in flight; find out who writes to it past the file system",
			ErrWritten, f.attached.options.Device, f.atEnd.bytes()-f.frozen.bytes(), f.atEnd.writes-f.frozen.writes+f.atEnd.discards-f.frozen.discards, n)
	}
	return because
}

func (f *freezer) closeFiles() {
	for _, file := range f.files {
		file.Close()
	}
	f.files = f.files[:0]
}

// writesInFlight is the second number of the inflight file.
func (f *freezer) writesInFlight() (uint64, error) {
	n, err := unix.Pread(int(f.inflight.Fd()), f.buffer[:], 0)
	if err != nil {
		return 0, fmt.Errorf("%s: requests in flight: %w", f.attached.options.Device, err)
	}
	writes, ok := blockdev.StatField(f.buffer[:n], 2)
	if !ok {
		return 0, fmt.Errorf("%s: requests in flight: no second number", f.attached.options.Device)
	}
	return writes, nil
}

func (f *freezer) counters() (c counters, err error) {
	n, err := unix.Pread(int(f.stat.Fd()), f.buffer[:], 0)
	if err != nil {
		return c, fmt.Errorf("%s: statistics: %w", f.attached.options.Device, err)
	}
	line := f.buffer[:n]
	var ok [4]bool
	c.writes, ok[0] = blockdev.StatField(line, 5)
	c.written, ok[1] = blockdev.StatField(line, 7)
	c.discards, ok[2] = blockdev.StatField(line, 12)
	c.discarded, ok[3] = blockdev.StatField(line, 14)
	if ok != [4]bool{true, true, true, true} {
		return c, fmt.Errorf("%s: statistics have too few fields", f.attached.options.Device)
	}
	return c, nil
}

// selfWritten counts what thawing writes itself: were it taken for a change, an
// idle file system would be cut for ever.
type selfWritten struct{ bytes atomic.Uint64 }
