package protocol

import (
	"context"
	"errors"
	"fmt"
)

// This file is about replicas whose device or whose volume has grown. Nobody else has the
// device meanwhile. Two steps, each decided by one superblock and repeated if it was cut off:
//
//  1. The device was enlarged: change map, journal and superblocks move to its new end. The
//     new ones do not touch the old superblocks, which count, at the device's
//     former end, until there is one at the new end. Then they become zeros.
//  2. The volume grows: what is behind its former end becomes zeros, as at its primary, so the position names one
//     content of the new size, too. Then the change map of the new size, then the superblock.
//
// The map begins anew in both: it takes all for changed up to the position, and for data.
// What is overwritten of the former one before counts as damaged, and so as changed.

// GrowOptions says what a replica becomes; sizes in bytes.
type GrowOptions struct {
	VolumeUUID   [16]byte // that it must be of; zero: of any
	SizeBytes    int64    // of the volume; 0: as it is
	ReserveBytes int64    // as in FormatOptions
	Open         OpenOptions
	// Progress may be nil; it is called from the caller's goroutine.
	Progress func(zeroed, total int64)
}

// shorter is a store without its end.
type shorter struct {
	Store
	size int64
}

func (s shorter) Size() int64 { return s.size }

// GrowReplica applies what waits in the journal, moves the tail to the device's end and
// enlarges the volume's part to o.SizeBytes. Done twice it does nothing. Before anything is written it refuses a device that is
// too small (ErrTooSmall, with the size it needs), one of another volume, and a copy that is not whole; the
// other errors are OpenReplica's. After an error that is none of these it is to be repeated:
// the replica is whole at each moment, if perhaps only at its device's former size (ErrResized).
func GrowReplica(ctx context.Context, store Store, o GrowOptions) error {
	p, err := planGrow(store, o)
	if err != nil {
		return err
	}
	if err := p.do(ctx, store, o); err != nil {
		return fmt.Errorf("grow replica %s: %w", store.Name(), err)
	}
	return nil
}

// CheckGrow says what GrowReplica would refuse before it writes anything; nil: nothing.
func CheckGrow(store Store, o GrowOptions) error {
	_, err := planGrow(store, o)
	return err
}

// growPlan is what a replica is, and becomes in either step.
type growPlan struct {
	sb            *superblock
	before        Store // as large as sb says
	moved, larger layout
}

func planGrow(store Store, o GrowOptions) (p growPlan, err error) {
	sb, before, err := findReplica(store)
	if err != nil {
		return p, fmt.Errorf("grow replica %w", err)
	}
	fail := func(err error) (growPlan, error) {
		return p, fmt.Errorf("grow replica %s: %w", store.Name(), err)
	}
	size := o.SizeBytes
	if size == 0 {
		size = sb.layout.size
	}
	switch {
	case sb.volume == AnyVolume:
		return fail(errors.New("it has no volume yet; format it anew"))
	case sb.volume != o.VolumeUUID && o.VolumeUUID != [16]byte{}:
		return fail(fmt.Errorf("it is of volume %x, want %x", sb.volume, o.VolumeUUID))
	case size < sb.layout.size:
		return fail(fmt.Errorf("its volume has %d bytes, and does not shrink to %d", sb.layout.size, size))
	case !sb.tookOver.IsZero():
		return fail(fmt.Errorf("%w as %v", ErrTookOver, sb.tookOver))
	case sb.strayed != "":
		return fail(fmt.Errorf("%w: %s", ErrStrayed, sb.strayed))
	case sb.state == DiskInconsistent:
		return fail(fmt.Errorf("%w: have it synced first", ErrNotConsistent))
	}
	moved, err := movedLayout(store.Size(), sb.layout)
	if err != nil {
		return fail(err)
	}
	larger, err := layoutFor(store.Size(), FormatOptions{VolumeUUID: sb.volume, SizeBytes: size, DataOffset: moved.dataOffset,
		JournalBytes: moved.journal.length, ReserveBytes: max(o.ReserveBytes, moved.reserve.length)})
	if err != nil {
		return fail(err)
	}
	return growPlan{sb, before, moved, larger}, nil
}

func (p growPlan) do(ctx context.Context, store Store, o GrowOptions) error {
	left := p.sb.leftBehind(p.before)
	if p.moved == p.sb.layout && p.larger.size == p.sb.layout.size && len(left) == 0 {
		return nil
	}
	sb, err := emptied(ctx, p.before, o.Open)
	for _, at := range left { // the journal may lie there, but is empty now
		if err == nil {
			err = zeroSuperblocks(store, at)
		}
	}
	if err == nil && p.moved != sb.layout {
		err = sb.moveTail(store, p.moved)
	}
	if err == nil && p.larger.size > sb.layout.size {
		err = sb.enlarge(ctx, store, p.larger, o.Progress)
	}
	return err
}

// findReplica finds the superblock that counts, and the device as large as that says.
func findReplica(store Store) (*superblock, Store, error) {
	sb, warnings, err := newestSuperblock(store)
	if err != nil {
		return nil, nil, err
	}
	if sb != nil {
		return sb, store, nil
	}
	if sb = formerSize(store); sb == nil {
		return nil, nil, fmt.Errorf("%s: %w: %s, nor at the former ends that were tried", store.Name(), ErrNoSuperblock, warnings)
	}
	return sb, shorter{store, sb.layout.deviceBytes}, nil
}

// leftBehind is where this replica's superblocks stood before a tail was moved, and
// still stand: they would count again if the present ones were lost. What is data, or the
// present change map, is none.
func (sb *superblock) leftBehind(store Store) (at []int64) {
	for s := range formerSuperblocks(store) {
		l, present := s.layout, sb.layout.changeMap
		free := l.superA >= sb.layout.dataOffset+sb.layout.size &&
			(l.superA >= present.offset+present.length || l.superA+superAreaBytes <= present.offset)
		if free && s.replica == sb.replica && s.volume == sb.volume && s.sequence < sb.sequence &&
			l.deviceBytes < sb.layout.deviceBytes {
			at = append(at, l.superA)
		}
	}
	return at
}

// movedLayout is the layout with the tail at the end of a device that may have grown. Its
// change map keeps off the former superblocks: the journal takes the room between.
func movedLayout(deviceBytes int64, l layout) (layout, error) {
	o := FormatOptions{VolumeUUID: AnyVolume, SizeBytes: l.size, DataOffset: l.dataOffset, JournalBytes: l.journal.length, ReserveBytes: l.reserve.length}
	o.VolumeUUID[0]++ // any that is one
	to, err := layoutFor(deviceBytes, o)
	if err != nil || to.superA == l.superA {
		return l, err
	}
	if map1 := to.changeMap; map1.offset < l.superA+superAreaBytes && l.superA < map1.offset+map1.length {
		o.JournalBytes += map1.offset + map1.length - l.superA
		to, err = layoutFor(deviceBytes, o)
	}
	return to, err
}

// emptied applies what the journal holds, and returns the superblock then.
func emptied(ctx context.Context, store Store, o OpenOptions) (*superblock, error) {
	r, err := OpenReplica(ctx, store, o)
	if err != nil {
		return nil, err
	}
	st := r.Status()
	if err := r.Close(); err != nil {
		return nil, err
	}
	if st.State != DiskConsistent && st.State != DiskBlank || st.PendingEpochs > 0 {
		return nil, fmt.Errorf("%w: it is %s %s", ErrNotConsistent, st.State, st.Reason)
	}
	sb, _, err := readSuperblocks(store)
	if err == nil && sb.tail != sb.head {
		err = errors.New("its journal is not empty")
	}
	return sb, err
}

// moveTail writes a tail elsewhere; from its first superblock on that one counts, and then
// is the only one: the new change map keeps off the former, so they can go.
func (sb *superblock) moveTail(store Store, to layout) error {
	next := *sb
	next.layout = to
	next.emptyRing(sb.layout)
	if err := next.freshMap(store); err != nil {
		return err
	}
	former := sb.layout.superA
	if err := sb.become(store, next); err != nil {
		return err
	}
	return zeroSuperblocks(store, former)
}

// enlarge makes what comes to the volume zeros, and then says so.
func (sb *superblock) enlarge(ctx context.Context, store Store, to layout, progress func(zeroed, total int64)) error {
	next := *sb
	next.layout = to
	const piece = 256 << 20
	from, total := sb.layout.size, to.size-sb.layout.size
	if sb.state == DiskBlank {
		total = 0
	}
	for done := int64(0); done < total; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(piece, total-done)
		if err := store.ZeroOut(to.dataOffset+from+done, n); err != nil {
			return fmt.Errorf("zeros for %d bytes at %d: %w", n, to.dataOffset+from+done, err)
		}
		if done += n; progress != nil {
			progress(done, total)
		}
	}
	if err := next.freshMap(store); err != nil { // its flush makes the zeros durable, too
		return err
	}
	if sb.state == DiskConsistent {
		var err error
		if next.watched, err = watch(store, to, nil, nil); err != nil {
			return err
		}
	}
	return sb.become(store, next)
}

// freshMap writes the change map of a layout, durably: of a consistent replica all has
// changed up to its position, and may hold data.
func (sb *superblock) freshMap(store Store) error {
	sb.mapBase = sb.applied.Epoch
	if err := (changeMap{store, sb.layout, sb.tag()}).writeAll(sb.mapBase, nil); err != nil {
		return err
	}
	return store.Flush()
}

// emptyRing begins an empty journal, beyond anything that was ever in the former one.
func (sb *superblock) emptyRing(former layout) {
	sb.head = cursor{logical: sb.head.logical + uint64(former.journal.length+sb.layout.journal.length), sequence: sb.head.sequence + 1}
	sb.tail = sb.head
}

// become writes both copies of the next superblock.
func (sb *superblock) become(store Store, next superblock) error {
	for range 2 {
		next.sequence++
		if err := writeSuperblock(store, next); err != nil {
			return err
		}
	}
	*sb = next
	return nil
}
