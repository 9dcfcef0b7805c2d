package volume

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/deadman"
	"blockferry/blockdev/dm"
)

const (
	// suspendTries bounds how often a suspend that a signal interrupted is
	// tried again within one window.
	suspendTries = 20
	// nudgePause is how often a thread that waits too long is interrupted.
	nudgePause = 5 * time.Millisecond
)

// ErrNoDrain says that what was in flight did not end within the stall limit;
// nothing was suspended.
var ErrNoDrain = errors.New("the device did not come to rest in time")

// window is the time in which writers are stopped. All it needs is made
// before: between suspend and resume it allocates nothing, as the memory
// might have to come from a page on the way to the very device it stopped.
type window struct {
	volume  *Volume
	guard   *deadman.Guard
	limit   time.Duration
	begun   time.Duration // since boot, before it was armed
	devices []string      // inner to outer

	suspend  *dm.Request
	inner    *dm.Request   // while the top is suspended; nil: nothing
	between  func() error  // then, may be nil
	rescuers []*dm.Request // resume all, should the dead-man be dead

	// exchange takes what fine tracking marked; nil without it. What was lost is
	// the seal's to tell: no round was read before.
	exchange func() bool

	buffer  [512]byte
	written uint64
	at      time.Time // writers stood still
	ready   time.Time // all that needs them to is done
	stalled time.Duration
	err     error
}

func (v *Volume) newWindow(withView bool) (*window, error) {
	o := v.options
	name := func(role string) string { return deviceName(o.Name, role) }
	w := &window{volume: v, guard: o.Guard, limit: o.StallLimit, devices: []string{name(roleTop)}}
	var errs []error
	request := func(r *dm.Request, err error) *dm.Request {
		errs = append(errs, err)
		return r
	}
	w.suspend = request(v.ctl.SuspendRequest(name(roleTop), dm.SuspendOptions{LockFS: o.FreezeFilesystem, Flush: o.FreezeFilesystem}))
	if withView {
		w.devices = []string{name(roleBase), name(roleTop)}
		// The snapshot is there already: the origin takes its split size from it. The
		// origin's resume suspends, exchanges and resumes in one call.
		w.inner = request(v.ctl.ResumeRequest(name(roleBase)))
	}
	if v.fine != nil {
		w.exchange = v.fine.tracker.ExchangeStopped
	}
	for _, device := range w.devices {
		w.rescuers = append(w.rescuers, request(v.ctl.ResumeRequest(device)))
	}
	return w, errors.Join(errs...)
}

// run stops writers, does the inner calls and has the dead-man resume. nil
// means that all of it happened while writers stood still.
func (w *window) run() error {
	w.begun = deadman.BootTime()
	if err := w.guard.Arm(w.limit, w.devices...); err != nil {
		return err
	}
	var late error
	rescue := w.rescue
	var start time.Time
	deadman.Quiet(func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		start = time.Now()
		w.inside()
		w.ready = time.Now()
		late = w.guard.Resume(rescue)
		w.stalled = time.Since(start)
	})
	if w.at.IsZero() && w.err != nil && !errors.Is(late, deadman.ErrStopped) {
		late = nil // nothing was suspended
	}
	w.volume.stopped("cut", w.stalled)
	if !w.at.IsZero() {
		w.volume.log.Debug("a cut's stop in parts", "drain-seconds", w.at.Sub(start).Seconds(),
			"inside-seconds", w.ready.Sub(w.at).Seconds(), "resume-seconds", (w.stalled - w.ready.Sub(start)).Seconds())
	}
	if w.between != nil && late != nil {
		return late // whatever it read is worth nothing
	}
	return errors.Join(w.err, late)
}

// rescue resumes the devices without a dead-man.
func (w *window) rescue() error {
	var errs []error
	for _, r := range w.rescuers {
		if err := retryEINTR(r.Do); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// patience is for how long a suspend that begins now may wait: until half of the
// limit has passed since the dead-man looked at the lease, also should this process
// have been stopped since. One that is broken off after the lease's end lets
// through what it held. 0 or less: not at all.
func (w *window) patience() time.Duration { return w.limit/2 - (deadman.BootTime() - w.begun) }

// inside is the window proper; its error is left in w.err.
func (w *window) inside() {
	stop := nudgeAfter(w.volume.ctl, w.patience())
	for range suspendTries {
		w.err = w.suspend.Do()
		if w.err == nil || !errors.Is(w.err, unix.EINTR) || stop.fired() {
			break
		}
	}
	if stop.end() && errors.Is(w.err, unix.EINTR) {
		w.err = fmt.Errorf("%w: writes were still in flight after %s", ErrNoDrain, w.limit/2)
	}
	if w.err != nil {
		return
	}
	w.at = time.Now()
	if w.exchange != nil {
		w.exchange()
	}
	if w.inner != nil {
		if w.err = w.inner.Do(); w.err != nil {
			return
		}
	}
	if w.between != nil {
		if w.err = w.between(); w.err != nil {
			return
		}
	}
	w.written, w.err = w.volume.readWritten(w.buffer[:])
}

// nudge interrupts this thread again and again once a time has passed.
// Otherwise a suspend that waits for a slow disk would hold up new writes for
// as long as that takes, and no dead-man can end it.
type nudge struct {
	timer *time.Timer
	late  atomic.Bool
	ended chan struct{}
	done  chan struct{}
}

func nudgeAfter(ctl *dm.Control, patience time.Duration) *nudge {
	n := &nudge{ended: make(chan struct{}), done: make(chan struct{})}
	thread := dm.ThisThread()
	n.timer = time.AfterFunc(patience, func() {
		defer close(n.done)
		n.late.Store(true)
		ticker := time.NewTicker(nudgePause)
		defer ticker.Stop()
		for {
			_ = ctl.Interrupt(thread) // it runs, or this process is ending
			select {
			case <-n.ended:
				return
			case <-ticker.C:
			}
		}
	})
	return n
}

func (n *nudge) fired() bool { return n.late.Load() }

// end stops it and says whether it fired.
func (n *nudge) end() bool {
	if n.timer.Stop() {
		return false
	}
	close(n.ended)
	<-n.done
	return true
}
