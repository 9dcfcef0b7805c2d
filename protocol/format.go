package protocol

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
)

// A replica's device, from its start:
//
//	0 (or dataOffset)                                          end (rounded down to 1 MiB)
//	+-----------+-----+---------+------------+--------------+----------------------+
//	| data      | gap | reserve | change map | journal ring | superblocks A and B  |
//	| size bytes|     |         |            |              | A at end - 1 MiB     |
//	+-----------+-----+---------+------------+--------------+ B at end - 512 KiB   +
//
// All areas but the data begin and end at multiples of 1 MiB. The reserve is
// not touched; it is for the areas the device needs in the primary's role.
const (
	layoutAlign     = 1 << 20
	superAreaBytes  = 1 << 20
	superCopyOffset = 512 << 10 // of copy B behind copy A

	// MinJournalBytes is the smallest journal a replica can work with.
	MinJournalBytes = 4 << 20
	// MaxVolumeBytes is the largest volume, 1 PiB.
	MaxVolumeBytes = 1 << 50
	// MaxJournalBytes is the largest journal, 16 TiB.
	MaxJournalBytes = 1 << 44
)

// ErrTooSmall says that a device has no room for what is to be put on it.
var ErrTooSmall = errors.New("device too small")

// layout is where the areas of a replica are, in bytes.
type layout struct {
	size         int64 // of the volume
	dataOffset   int64
	reserve      area
	changeMap    area
	journal      area
	superA       int64
	deviceBytes  int64 // of the whole device as used: the end of the superblocks
	mapPageCount int64
}

type area struct{ offset, length int64 }

func roundUp(n, to int64) int64 { return (n + to - 1) / to * to }

func mapAreaBytes(sizeBytes int64) int64 {
	return roundUp(mapPages(sizeBytes)*mapPageBytes, layoutAlign)
}

// TailBytes is the room behind the data that a volume's change map, journal
// and superblocks take, in bytes: with a reserve of zero, a device of
// TailBytes plus the volume's size, both rounded up to 1 MiB, is large enough.
func TailBytes(sizeBytes, journalBytes int64) int64 {
	return mapAreaBytes(sizeBytes) + roundUp(journalBytes, layoutAlign) + superAreaBytes
}

// FormatOptions says what to put on a replica's device; sizes in bytes.
type FormatOptions struct {
	VolumeUUID  [16]byte
	ReplicaUUID [16]byte // zero: a random one is made

	SizeBytes    int64 // of the volume; a multiple of BlockSize
	DataOffset   int64 // where the volume's data begins: 0 for a plain replica; a multiple of 1 MiB
	JournalBytes int64 // rounded up to 1 MiB; at least MinJournalBytes
	ReserveBytes int64 // kept free between data and tail; rounded up to 1 MiB

	// Holds: the data is there already, and this is what it is. Nil: nothing is
	// known of it, and the replica is blank.
	Holds *Holding
}

// Holding is what the data area holds of a device that becomes a replica, an old
// primary's for one. Nobody writes to it meanwhile.
type Holding struct {
	// Lineage is the history of the data; its tip is the cut that it holds, or,
	// if it strayed, the epoch that was open.
	Lineage Lineage
	// Strayed says why the data may hold blocks that belong to no cut, those
	// written by a primary after its last one; empty: it holds exactly the tip.
	// At most MaxStrayedReason bytes.
	Strayed string
	// Since: Changed names all that may have changed after the cut with this
	// number, which is in Lineage. 0: what changed when is not known.
	Since   uint64
	Changed []Range
	// CutUnixNanos is the wall clock of the tip, for people only.
	CutUnixNanos int64
}

func (h *Holding) check(sizeBytes int64) error {
	if err := h.Lineage.Check(); err != nil {
		return err
	}
	switch tip := h.Lineage.Tip(); {
	case len(h.Lineage) == 0:
		return errors.New("the data is there, yet nothing is known of its history")
	case len(h.Strayed) > MaxStrayedReason:
		return fmt.Errorf("a reason of %d bytes, at most %d are allowed", len(h.Strayed), MaxStrayedReason)
	case h.Since > tip.Epoch || h.Since == 0 && len(h.Changed) > 0:
		return fmt.Errorf("%d changed ranges since epoch %d of a copy at %v", len(h.Changed), h.Since, tip)
	}
	for _, r := range h.Changed {
		if r.Offset < 0 || r.Length <= 0 || r.Offset > sizeBytes-r.Length {
			return fmt.Errorf("a changed range of %d bytes at %d in a volume of %d", r.Length, r.Offset, sizeBytes)
		}
	}
	return nil
}

// NeededBytes is how large a device must be for these options.
func (o FormatOptions) NeededBytes() int64 {
	return o.DataOffset + roundUp(o.SizeBytes, layoutAlign) + roundUp(o.ReserveBytes, layoutAlign) +
		TailBytes(o.SizeBytes, o.JournalBytes)
}

func (o FormatOptions) check() error {
	switch {
	case o.VolumeUUID == [16]byte{}:
		return errors.New("no volume UUID")
	case o.SizeBytes <= 0 || o.SizeBytes%BlockSize != 0 || o.SizeBytes > MaxVolumeBytes:
		return fmt.Errorf("volume size of %d bytes: want a multiple of %d up to %d", o.SizeBytes, BlockSize, int64(MaxVolumeBytes))
	case o.DataOffset < 0 || o.DataOffset%layoutAlign != 0 || o.DataOffset > MaxVolumeBytes:
		return fmt.Errorf("data offset of %d bytes: want a multiple of %d", o.DataOffset, layoutAlign)
	case o.JournalBytes < MinJournalBytes || o.JournalBytes > MaxJournalBytes:
		return fmt.Errorf("journal of %d bytes: want %d to %d", o.JournalBytes, MinJournalBytes, int64(MaxJournalBytes))
	case o.ReserveBytes < 0 || o.ReserveBytes > MaxVolumeBytes:
		return fmt.Errorf("reserve of %d bytes: want 0 to %d", o.ReserveBytes, int64(MaxVolumeBytes))
	}
	if o.Holds != nil {
		return o.Holds.check(o.SizeBytes)
	}
	return nil
}

// JournalBytes is how large a journal becomes that is asked for with a size.
func JournalBytes(asked int64) int64 { return roundUp(asked, layoutAlign) }

// Fits says why a device of a size can't be divided so, nil when it can. It wraps
// ErrTooSmall when only room is missing.
func (o FormatOptions) Fits(deviceBytes int64) error {
	_, err := layoutFor(deviceBytes, o)
	return err
}

// layoutFor places the areas at the end of a device.
func layoutFor(deviceBytes int64, o FormatOptions) (layout, error) {
	if err := o.check(); err != nil {
		return layout{}, err
	}
	end := deviceBytes / layoutAlign * layoutAlign
	if need := o.NeededBytes(); end < need {
		return layout{}, fmt.Errorf("%w: %d bytes, a volume of %d bytes with this journal and reserve needs %d",
			ErrTooSmall, deviceBytes, o.SizeBytes, need)
	}
	l := layout{size: o.SizeBytes, dataOffset: o.DataOffset, deviceBytes: end, superA: end - superAreaBytes, mapPageCount: mapPages(o.SizeBytes)}
	l.journal.length = JournalBytes(o.JournalBytes)
	l.journal.offset = l.superA - l.journal.length
	l.changeMap.length = mapAreaBytes(o.SizeBytes)
	l.changeMap.offset = l.journal.offset - l.changeMap.length
	l.reserve.length = roundUp(o.ReserveBytes, layoutAlign)
	l.reserve.offset = l.changeMap.offset - l.reserve.length
	return l, nil
}

// check says whether an area description read from a disk makes sense on a
// device of the given size.
func (l layout) check(deviceBytes int64) error {
	want, err := layoutFor(l.deviceBytes, FormatOptions{VolumeUUID: [16]byte{1}, SizeBytes: l.size, DataOffset: l.dataOffset,
		JournalBytes: l.journal.length, ReserveBytes: l.reserve.length})
	if err != nil {
		return err
	}
	if l != want {
		return fmt.Errorf("areas %+v, want %+v", l, want)
	}
	if l.deviceBytes > deviceBytes {
		return fmt.Errorf("areas end at %d, the device at %d", l.deviceBytes, deviceBytes)
	}
	return nil
}

// FormatReplica writes an empty change map and two superblocks to the tail of
// a device, which is then a blank replica, or one of what it holds already. The data area is not touched. Whether the
// device's present content may go is the caller's to decide. When the options
// don't fit nothing is written; after any other error the device is not a
// replica and FormatReplica is to be repeated.
func FormatReplica(store Store, o FormatOptions) error {
	l, err := layoutFor(store.Size(), o)
	if err != nil {
		return fmt.Errorf("format %s: %w", store.Name(), err)
	}
	sb := superblock{volume: o.VolumeUUID, replica: o.ReplicaUUID, layout: l, state: DiskBlank}
	var random [28]byte
	rand.Read(random[:]) // never fails
	if sb.replica == [16]byte{} {
		copy(sb.replica[:], random[:])
	}
	// Nothing that an earlier life of this replica left in the ring can be
	// taken for a continuation: it would need this chain.
	sb.head = cursor{sequence: binary.LittleEndian.Uint64(random[16:]) >> 16, chain: binary.LittleEndian.Uint32(random[24:])}
	sb.tail = sb.head
	// An older superblock must not vouch for a map that is being replaced.
	if err := zeroSuperblocks(store, l.superA); err != nil {
		return fmt.Errorf("format %s: %w", store.Name(), err)
	}
	if err := sb.hold(store, o.Holds); err != nil {
		return fmt.Errorf("format %s: %w", store.Name(), err)
	}
	if err := store.Flush(); err != nil { // with it the data that is there
		return fmt.Errorf("format %s: %w", store.Name(), err)
	}
	for range 2 {
		sb.sequence++
		if err := writeSuperblock(store, sb); err != nil {
			return fmt.Errorf("format %s: %w", store.Name(), err)
		}
	}
	return nil
}

// zeroSuperblocks makes it durable that there are none at a place.
func zeroSuperblocks(store Store, at int64) error {
	if err := store.ZeroOut(at, superAreaBytes); err != nil {
		return fmt.Errorf("superblocks at %d: %w", at, err)
	}
	return store.Flush()
}

// hold writes the change map, and notes in the superblock what the data is.
func (sb *superblock) hold(store Store, h *Holding) (err error) {
	cmap := changeMap{store, sb.layout, sb.tag()}
	if h == nil {
		return cmap.writeAll(0, nil)
	}
	tip := h.Lineage.Tip()
	sb.state, sb.lineage, sb.applied, sb.committed, sb.strayed, sb.cutNanos = DiskConsistent, h.Lineage.Clone(), tip, tip, h.Strayed, h.CutUnixNanos
	sb.mapBase = tip.Epoch
	if h.Since > 0 {
		sb.mapBase = h.Since
	}
	// Any chunk may hold data.
	if err := cmap.writeAll(sb.mapBase, nil); err != nil {
		return err
	}
	changed := newTouched(sb.layout.size)
	for _, r := range h.Changed {
		changed.add(Frame{Kind: FrameData, Offset: r.Offset, Length: r.Length})
	}
	if _, err := cmap.update(changed, tip.Epoch); err != nil {
		return err
	}
	sb.watched, err = watch(store, sb.layout, nil, nil)
	return err
}
