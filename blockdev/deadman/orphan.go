package deadman

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"blockferry/blockdev/dm"
)

// orphans resumes the volumes that were left suspended: the dead-man before this
// one may have been killed, and its agent stopped. One that is held is left to
// whoever holds it, and looked at again until that one's limit must have passed:
// it may be stopped, too. One whose lease has ended is made to fail: its disk is
// flushed for that, and nobody else waits meanwhile.
type orphans struct {
	devices interface {
		List() ([]string, error)
		Info(name string) (dm.Info, error)
		Resume(name string) error
	}
	ours  func(uuid string) bool
	holds holds // without a file: all are nobody's
	fence *striker
	log   *slog.Logger
	now   func() time.Duration
	mu    sync.Mutex
	told  string // the last error that was logged
}

// resume looks at all devices once and makes none fail; left are those that are suspended yet.
func (o *orphans) resume() (left []string) {
	names, err := o.devices.List()
	if err != nil {
		o.log.Warn("devices that were left suspended are not looked for", "error", err)
		return nil
	}
	return slices.DeleteFunc(names, func(name string) bool { return o.dealtWith(name, o.resumeInTime) })
}

// suspended says that a device is ours and suspended.
func (o *orphans) suspended(name string) (bool, error) {
	info, err := o.devices.Info(name)
	if err != nil {
		o.failed("was it left suspended?", name, err)
	}
	return err == nil && o.ours(info.UUID) && info.Suspended && info.HasActive, err
}

// failed logs an error, unless it is the one before.
func (o *orphans) failed(what, name string, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if text := what + name + err.Error(); text != o.told {
		o.told = text
		o.log.Error(what+" It is tried again", "volume", name, "error", err)
	}
}

// dealtWith calls resume of a device that is suspended unless it is held; it is false
// if that one is suspended yet, or can't be looked at.
func (o *orphans) dealtWith(name string, resume func(string) bool) (done bool) {
	if is, err := o.suspended(name); !is {
		return err == nil
	}
	// Looked at anew while nobody can arm it.
	look := func() {
		is, err := o.suspended(name)
		done = err == nil && (!is || resume(name))
	}
	if o.holds.file == nil {
		look()
		return done
	}
	return o.holds.alone(name, look) && done
}

// resumeInTime resumes a device unless its lease has ended, or can't be read.
func (o *orphans) resumeInTime(name string) (done bool) {
	over, err := o.fence.passed(name)
	return !over && err == nil && o.release(name)
}

// resumeOne resumes a device, or makes it fail.
func (o *orphans) resumeOne(name string) (done bool) {
	ended, err := o.fence.overdue(name)
	if err != nil {
		o.failed("a volume was left suspended, and stays so: its lease has ended or can't be read, and it can't be made to fail.", name, err)
		return false
	}
	if ended {
		o.log.Error("a volume was left suspended, and its lease has ended or can't be read: everything on it fails; take it down, then up", "volume", name)
		return true
	}
	return o.release(name)
}

func (o *orphans) release(name string) (done bool) {
	if err := o.devices.Resume(name); err != nil {
		o.failed("a volume was left suspended and can't be resumed.", name, err)
		return false
	}
	o.log.Warn("a volume was left suspended; it is resumed", "volume", name)
	return true
}

// await looks at each device that was left, until ctx ends or it is dealt with. Whatever is
// suspended after the longest limit is resumed.
func (o *orphans) await(ctx context.Context, left []string) {
	defer o.holds.close()
	var looks sync.WaitGroup
	defer looks.Wait()
	end := o.now() + MaxLimit
	for _, name := range left {
		looks.Go(func() {
			for {
				late := o.now() > end
				if o.dealtWith(name, o.resumeOne) || late && o.resumeOne(name) {
					return
				}
				select {
				case <-ctx.Done():
					return
				case <-time.After(deadmanRecheck):
				}
			}
		})
	}
}
