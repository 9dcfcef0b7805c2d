package volume

import (
	"errors"
	"fmt"

	"blockferry/blockdev"
)

// OfflineOn is an Offline on a device that the caller holds, and closes himself:
// for a disk that is a replica, too. The areas are on the disk. The label is durable then.
func OfflineOn(disk blockdev.Device) (*Offline, error) {
	label, err := ReadLabel(disk)
	if err != nil {
		return nil, err
	}
	switch {
	case label.endBytes() > disk.Size():
		return nil, fmt.Errorf("%s: %w: it needs %d bytes, the disk has %d", disk.Name(), ErrBadLabel, label.endBytes(), disk.Size())
	case label.CowElsewhere || label.MetaElsewhere:
		return nil, fmt.Errorf("%s: an area of volume %s is on another device: it can't change its role", disk.Name(), label.UUID)
	}
	if err := keepLabel(disk, label); err != nil {
		return nil, err
	}
	return &Offline{disk: disk, label: *label}, nil
}

// FormatOn is Format of a disk that the caller holds, with all areas on it. What
// it holds is lost, but for its data area.
func FormatOn(disk blockdev.Device, uuid UUID, layout LayoutOptions, state []byte) (*Label, error) {
	areas, err := Layout(disk.Size(), layout)
	if err != nil {
		return nil, fmt.Errorf("format %s: %w", disk.Name(), err)
	}
	if layout.EraBlockBytes == 0 {
		layout.EraBlockBytes = DefaultEraBlockBytes
	}
	identity := ""
	if f, ok := disk.(*blockdev.File); ok {
		identity = identityOf(f)
	}
	l := &Label{UUID: uuid, EraID: NewUUID(), Identity: identity, EraBlockBytes: layout.EraBlockBytes, Areas: areas, State: state}
	return l, l.format(disk, disk, disk)
}

// WipeLabel takes a label away that an earlier use left. Durable on return.
func WipeLabel(disk blockdev.Device) error {
	return errors.Join(disk.ZeroOut(0, dataOffset), disk.Flush())
}

// BeginAt keeps the caller's state, and begins tracking anew: the data area holds
// exactly the image of a cut, and all that is written from now on is marked as
// changed since it. The state and the cut are durable together, or, after an error,
// perhaps neither.
func (o *Offline) BeginAt(cut uint64, state []byte) error {
	if cut == 0 || cut > 1<<63-1 {
		return fmt.Errorf("%s: %w", o.Name(), errNumber)
	}
	next := o.label
	// What the old metadata marked belongs to no cut of the new one. While the
	// label names the old id it is as good as lost, which means a full comparison.
	next.EraID, next.MetaFormatted, next.Watch = NewUUID(), false, Watch{}
	next.State = append([]byte(nil), state...)
	next.Cuts = Cuts{{Number: cut, Era: 1}} // with which a fresh metadata begins
	if err := freshMetadata(o.disk, &next); err != nil {
		return err
	}
	if err := writeLabel(o.disk, &next); err != nil {
		return err
	}
	o.label = next
	return nil
}

// ChangedSince lists, ascending, what the kernel's marks name as written to the
// volume since a cut, and more where they are not that exact. The error is
// ErrTrackingLost when they can't tell.
func (o *Offline) ChangedSince(cut uint64) ([]blockdev.Extent, error) {
	from, known := o.label.Cuts.Since(cut)
	if !known {
		return nil, fmt.Errorf("%s: %w: the label does not know in which era cut %d was", o.Name(), ErrTrackingLost, cut)
	}
	changed, err := o.markedSince(from, "")
	if err != nil {
		return nil, errors.Join(ErrTrackingLost, err)
	}
	return changed, nil
}

// TailOffset is where the disk's tail begins, which the areas leave free.
func (l *Label) TailOffset() int64 { return roundUp(l.endBytes() - l.Areas.TailBytes) }
