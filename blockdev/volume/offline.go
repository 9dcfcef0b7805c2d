package volume

import (
	"errors"
	"fmt"

	"blockferry/blockdev"
)

// Offline is a labelled disk whose volume is not up, held exclusively: what a
// restore fills. It is a Device of the volume's size, on the data area.
type Offline struct {
	lock  *blockdev.DeviceLock // nil: the caller has it, and the disk
	disk  blockdev.Device
	label Label
}

// OpenOffline takes a disk that holds a label, which is durable then. It refuses one
// that is in use, by the volume's own stack too.
func OpenOffline(device string) (*Offline, error) {
	lock, err := blockdev.Lock(device)
	if err != nil {
		return nil, err
	}
	disk, err := blockdev.OpenFile(device, blockdev.OpenOptions{Write: true, Exclusive: true})
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	label, err := ReadLabel(disk)
	if err == nil && label.endBytes() > disk.Size() {
		err = fmt.Errorf("%s: %w: it needs %d bytes, the disk has %d", device, ErrBadLabel, label.endBytes(), disk.Size())
	}
	if err == nil {
		err = keepLabel(disk, label)
	}
	if err != nil {
		return nil, errors.Join(err, disk.Close(), lock.Close())
	}
	return &Offline{lock: lock, disk: disk, label: *label}, nil
}

// Label is the label as it stands. The caller does not change what it shares.
func (o *Offline) Label() Label { return o.label }

// SetState keeps the caller's state in the label; durable on return.
func (o *Offline) SetState(state []byte) error {
	return o.change(func(l *Label) { l.State = append([]byte(nil), state...) })
}

// UnwrittenSince says whether the kernel's marks prove that nothing was
// written to the volume since a cut. metaDevice is where they are when not on
// the disk. False, with the reason, is also the answer when they can't tell.
func (o *Offline) UnwrittenSince(cut uint64, metaDevice string) (bool, string) {
	var from uint32
	for _, c := range o.label.Cuts {
		if c.Number == cut {
			from = c.Era
		}
	}
	if from == 0 {
		return false, fmt.Sprintf("the label does not know in which era cut %d was", cut)
	}
	written, err := o.markedSince(from, metaDevice)
	if err != nil {
		return false, err.Error()
	}
	if bytes := blockdev.Total(written); bytes > 0 {
		return false, fmt.Sprintf("%d bytes may have been written since cut %d", bytes, cut)
	}
	return true, ""
}

func (o *Offline) change(change func(*Label)) error {
	next := o.label
	change(&next)
	if err := writeLabel(o.disk, &next); err != nil {
		return err
	}
	o.label = next
	return nil
}

// Close gives the disk back. It does not flush the data area.
func (o *Offline) Close() error {
	if o.lock == nil {
		return nil
	}
	return errors.Join(o.disk.Close(), o.lock.Close())
}

var _ blockdev.Device = (*Offline)(nil)

// Name is the disk's path.
func (o *Offline) Name() string { return o.disk.Name() }

// DiskBytes is the disk's size.
func (o *Offline) DiskBytes() int64 { return o.disk.Size() }

// Size is the volume's size in bytes.
func (o *Offline) Size() int64 { return o.label.Areas.Data.Length }

// at checks a range and moves it to the data area.
func (o *Offline) at(op string, offset, length int64) (int64, error) {
	return o.label.Areas.Data.Offset + offset, blockdev.CheckRange(o, op, offset, length)
}

// ReadAt implements Device.
func (o *Offline) ReadAt(p []byte, offset int64) (int, error) {
	at, err := o.at("read", offset, int64(len(p)))
	if err != nil {
		return 0, err
	}
	return o.disk.ReadAt(p, at)
}

// WriteAt implements Device.
func (o *Offline) WriteAt(p []byte, offset int64) (int, error) {
	at, err := o.at("write", offset, int64(len(p)))
	if err != nil {
		return 0, err
	}
	return o.disk.WriteAt(p, at)
}

// Flush implements Device.
func (o *Offline) Flush() error { return o.disk.Flush() }

// ZeroOut implements Device.
func (o *Offline) ZeroOut(offset, length int64) error {
	at, err := o.at("zero-out", offset, length)
	if err != nil {
		return err
	}
	return o.disk.ZeroOut(at, length)
}

// Discard implements Device.
func (o *Offline) Discard(offset, length int64) error {
	at, err := o.at("discard", offset, length)
	if err != nil {
		return err
	}
	return o.disk.Discard(at, length)
}

// Restored tells a volume that just came up that its data area held exactly
// the image of a cut when Format wrote its label, whose era id is given: all
// that was written since is marked, so tracking answers 'changed since that
// cut'. It refuses when cuts are known or tracking began anew meanwhile.
func (v *Volume) Restored(cut uint64, eraID UUID) error {
	if cut == 0 || cut > 1<<63-1 {
		return fmt.Errorf("volume %s: %w", v.options.Name, errNumber)
	}
	label := v.labelNow()
	if len(label.Cuts) > 0 || label.EraID != eraID || v.lost != "" {
		return fmt.Errorf("volume %s: %w: its label knows of %d cuts, or tracking began anew (%s)", v.options.Name, ErrTrackingLost, len(label.Cuts), v.lost)
	}
	// A fresh era metadata begins with era 1.
	return v.changeLabel(func(l *Label) { l.Cuts = Cuts{{Number: cut, Era: 1}} })
}

// Opened says by whom the volume is open; nil when nothing has it open.
func (v *Volume) Opened() error { return refuseOpen(v.ctl, v.options.Name) }
