package volume

import (
	"context"
	"errors"
	"fmt"

	"blockferry/blockdev"
)

// ErrTooSmall says that a disk has no room for what it is to hold.
var ErrTooSmall = errors.New("disk too small")

// Grow enlarges a volume to layout.SizeBytes; the disk, or its room, was enlarged before. What comes to
// the volume holds zeros, as at its replicas. The areas behind the data move: what the
// one for overwritten blocks holds counts for nothing while the volume is down; the marks of what was written
// are given up first, so that replicas are compared. Grown already it does nothing. The label decides, and comes last: cut off
// before, the volume comes up as large as it was, with its marks given up. Nothing is written when
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
	// The label first: the zeros may reach the era metadata where it stands now, and what
	// a power cut leaves of that may look whole.
	if err := o.change(func(l *Label) {
		l.EraID, l.Cuts, l.MetaFormatted, l.Watch = next.EraID, next.Cuts, next.MetaFormatted, next.Watch
	}); err != nil {
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
	if err := next.emptyAreas(o.disk); err != nil {
		return err
	}
	if err := o.disk.Flush(); err != nil {
		return fmt.Errorf("%s: %w", o.Name(), err)
	}
	return o.change(func(l *Label) { l.Areas = next.Areas })
}

// emptyAreas takes away what an earlier use of the disk left where the areas begin: Up would
// refuse the identity of another volume. Without one it gives them theirs. The caller flushes.
func (l *Label) emptyAreas(disk blockdev.Device) error {
	for _, a := range []struct {
		elsewhere  bool
		at, length int64
	}{
		{l.CowElsewhere, l.Areas.Cow.Offset, auxIDBytes},
		{l.MetaElsewhere, l.Areas.Meta.Offset, auxIDBytes + blockdev.BlockSize},
	} {
		if a.elsewhere {
			continue
		}
		if err := disk.ZeroOut(a.at, a.length); err != nil {
			return fmt.Errorf("%s: zeros for %d bytes at %d: %w", disk.Name(), a.length, a.at, err)
		}
	}
	return nil
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
