package volume

import (
	"context"
	"errors"
	"fmt"
)

// ErrTooSmall says that a disk has no room for what it is to hold.
var ErrTooSmall = errors.New("disk too small")

// Grow enlarges a volume to layout.SizeBytes; the disk, or its room, was enlarged before. What comes to
// the volume holds zeros, as at its replicas. The areas behind the data move: what the
// one for overwritten blocks holds counts for nothing while the volume is down; the marks of what was written
// are given up, so that replicas are compared. Grown already it does nothing. The label decides, and comes last: cut off
// before, the volume comes up as large as it was, with its marks given up, perhaps. Nothing is written when
// it is refused: ErrTooSmall, a size below the volume's. progress may be nil.
func (o *Offline) Grow(ctx context.Context, layout LayoutOptions, progress func(zeroed, total int64)) error {
	l := &o.label
	if layout.SizeBytes == l.Areas.Data.Length {
		return nil
	}
	next, err := o.grown(layout)
	if err != nil {
		return err
	}
	const piece = 256 << 20
	from := l.Areas.Data.End()
	total := next.Areas.Data.End() - from
	for done := int64(0); done < total; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(piece, total-done)
		if err := o.disk.ZeroOut(from+done, n); err != nil {
			return fmt.Errorf("%s: zeros for %d bytes at %d: %w", o.Name(), n, from+done, err)
		}
		if done += n; progress != nil {
			progress(done, total)
		}
	}
	if err := o.disk.Flush(); err != nil {
		return fmt.Errorf("%s: %w", o.Name(), err)
	}
	// What lies where the areas are now is not theirs; Up sees that by their
	// identities, and begins tracking anew.
	return o.change(func(l *Label) { *l = *next })
}

// CheckGrow says what Grow would refuse before it writes anything; nil: nothing.
func (o *Offline) CheckGrow(layout LayoutOptions) error {
	_, err := o.grown(layout)
	return err
}

// grown is the label of a larger volume.
func (o *Offline) grown(layout LayoutOptions) (*Label, error) {
	fail := func(format string, args ...any) (*Label, error) {
		return nil, fmt.Errorf("grow the volume on %s: "+format, append([]any{o.Name()}, args...)...)
	}
	next := o.label
	layout.EraBlockBytes = next.EraBlockBytes
	if next.CowElsewhere != (layout.CowDeviceBytes > 0) || next.MetaElsewhere != (layout.MetaDeviceBytes > 0) {
		return fail("areas on the disk and elsewhere are not as its label says: COW area elsewhere %v, era metadata %v", next.CowElsewhere, next.MetaElsewhere)
	}
	if layout.SizeBytes < next.Areas.Data.Length {
		return fail("it has %d bytes, and does not shrink to %d", next.Areas.Data.Length, layout.SizeBytes)
	}
	areas, err := Layout(o.disk.Size(), layout)
	if err != nil {
		return fail("%w: %w", ErrTooSmall, err)
	}
	if areas.Data.Offset != next.Areas.Data.Offset {
		return fail("its data begins at %d, not at %d", next.Areas.Data.Offset, areas.Data.Offset)
	}
	next.Areas, next.EraID, next.Cuts, next.MetaFormatted, next.Watch = areas, NewUUID(), nil, false, Watch{}
	return &next, nil
}
