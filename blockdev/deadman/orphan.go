package deadman

import (
	"context"
	"log/slog"
	"slices"
	"time"

	"blockferry/blockdev/dm"
)

// orphans resumes the volumes that were left suspended: the dead-man before this
// one may have been killed, and its agent stopped. One that is held is left to
// whoever holds it, and looked at again until that one's limit must have passed:
// it may be stopped, too.
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
	told  string // the last error that was logged
}

// resume looks at all devices once; held are those that are suspended and held.
func (o *orphans) resume() (held []string) {
	names, err := o.devices.List()
	if err != nil {
		o.log.Warn("devices that were left suspended are not looked for", "error", err)
		return nil
	}
	return slices.DeleteFunc(names, o.dealtWith)
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
	if text := what + name + err.Error(); text != o.told {
		o.told = text
		o.log.Error(what+" It is tried again", "volume", name, "error", err)
	}
}

// dealtWith resumes a device unless it is held; it is false if that one is
// suspended, or can't be looked at, or not be resumed.
func (o *orphans) dealtWith(name string) (done bool) {
	if is, err := o.suspended(name); !is {
		return err == nil
	}
	// Looked at anew while nobody can arm it.
	look := func() {
		is, err := o.suspended(name)
		done = err == nil && (!is || o.resumeOne(name))
	}
	if o.holds.file == nil {
		look()
		return done
	}
	return o.holds.alone(name, look) && done
}

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
	if err := o.devices.Resume(name); err != nil {
		o.failed("a volume was left suspended and can't be resumed.", name, err)
		return false
	}
	o.log.Warn("a volume was left suspended; it is resumed", "volume", name)
	return true
}

// await looks again at devices that were held and suspended, until ctx ends or
// none is left. Whatever is suspended after the longest limit is resumed.
func (o *orphans) await(ctx context.Context, held []string) {
	defer o.holds.close()
	for end := o.now() + MaxLimit; len(held) > 0; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(deadmanRecheck):
		}
		late := o.now() > end
		held = slices.DeleteFunc(held, func(name string) bool {
			return o.dealtWith(name) || late && o.resumeOne(name)
		})
	}
}
