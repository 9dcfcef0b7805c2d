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
func (o *orphans) suspended(name string) bool {
	info, err := o.devices.Info(name)
	if err != nil {
		o.log.Warn("was it left suspended?", "device", name, "error", err)
	}
	return err == nil && o.ours(info.UUID) && info.Suspended && info.HasActive
}

// dealtWith resumes a device unless it is held; it is false if that one is suspended.
func (o *orphans) dealtWith(name string) bool {
	if !o.suspended(name) {
		return true
	}
	// Looked at anew while nobody can arm it.
	look := func() {
		if o.suspended(name) {
			o.resumeOne(name)
		}
	}
	if o.holds.file == nil {
		look()
		return true
	}
	return o.holds.alone(name, look)
}

func (o *orphans) resumeOne(name string) {
	struck, err := o.fence.overdue(name)
	if struck || err != nil {
		o.log.Error("a volume was left suspended, and its lease has ended: it is made to fail", "volume", name, "error", err)
		return
	}
	err = o.devices.Resume(name)
	o.log.Warn("a volume was left suspended; it is resumed", "volume", name, "error", err)
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
			if o.dealtWith(name) {
				return true
			}
			if late {
				o.resumeOne(name)
			}
			return late
		})
	}
}
