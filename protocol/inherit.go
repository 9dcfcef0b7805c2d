package protocol

import (
	"errors"
	"fmt"
	"slices"
)

// Inheritance is what the disk of a volume that took over still tells of the time
// before: the change map that it kept as a replica lies in its tail, which nobody
// writes to before it stands down. It joins what the map knows up to the position at
// which the copy took over with what the tracker knows since, for copies that were
// behind.
//
// A position names one content, wherever it is, so the map speaks of two positions and not of
// the disk: whatever became of the disk since, its answer holds for every line that went
// through the position at which it took over. What came after that only the tracker knows;
// where that was lost, or begun anew later, nothing is known.
type Inheritance struct {
	cmap    changeMap
	lineage Lineage // until it took over
	base    uint64
}

// errNoInheritance is why nothing of the time before is known.
var errNoInheritance = fmt.Errorf("%w: nothing is known of the time before it took over", ErrTrackingLost)

// ReadInheritance reads what a disk tells of the time before it took over as a volume,
// whose line is given. It writes nothing. The error wraps ErrTrackingLost when
// it tells nothing.
func ReadInheritance(disk Store, volume [16]byte, sizeBytes int64, line Lineage) (*Inheritance, error) {
	sb, _, err := newestSuperblock(disk)
	if err != nil && !errors.Is(err, ErrNoSuperblock) {
		return nil, fmt.Errorf("%w: %w", errNoInheritance, err)
	}
	return sb.inheritance(disk, volume, sizeBytes, line)
}

func (sb *superblock) inheritance(disk Store, volume [16]byte, sizeBytes int64, line Lineage) (*Inheritance, error) {
	none := func(format string, args ...any) (*Inheritance, error) {
		return nil, fmt.Errorf("%w: %s: %s", errNoInheritance, disk.Name(), fmt.Sprintf(format, args...))
	}
	switch {
	case sb == nil || sb.tookOver.IsZero():
		return none("it did not take over from a replica")
	case sb.volume != volume || sb.layout.size != sizeBytes:
		return none("its tail is of volume %x with %d bytes", sb.volume, sb.layout.size)
	case sb.state != DiskConsistent || sb.applied != sb.committed || sb.applying != 0:
		return none("it was %v at %v when it took over, with %v committed", sb.state, sb.applied, sb.committed)
	}
	// The line left the position by a generation of its own: what came before is just what
	// the copy held.
	if rel := Compare(sb.lineage, line); rel.Kind != Behind || rel.Common != sb.applied || !slices.Contains(line, sb.applied) {
		return none("it took over at %v, which is %v when compared with the volume at %v", sb.applied, rel, line.Tip())
	}
	return &Inheritance{cmap: changeMap{disk, sb.layout, sb.tag()}, lineage: sb.lineage, base: sb.mapBase}, nil
}

// At is the position at which the copy took over.
func (h *Inheritance) At() Position { return h.lineage.Tip() }

// ChangedSince lists, ascending, what may have changed between the cut of the volume's line
// with a number and the moment that tracked tells of: what may have changed up
// to then after a cut, or ErrTrackingLost. The error is ErrTrackingLost where
// both together do not reach back.
func (h *Inheritance) ChangedSince(since uint64, tracked func(since uint64) ([]Range, error)) ([]Range, error) {
	at := h.At()
	if since >= at.Epoch || since < h.base {
		return nil, fmt.Errorf("%w: it took over at %v, and its change map reaches back to epoch %d, not to %d", errNoInheritance, at, h.base, since)
	}
	after, err := tracked(at.Epoch)
	if err != nil {
		return nil, fmt.Errorf("since it took over at %v: %w", at, err)
	}
	before, _, err := h.cmap.changedSince(since)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoInheritance, err)
	}
	return uniteRanges(before, cleanRanges(after, h.cmap.lay.size)), nil
}
