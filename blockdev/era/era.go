// Package era reads the metadata of the kernel's dm-era target: which blocks
// of a device were written since a given era. It reads from any io.ReaderAt
// and knows no live device.
//
// A caller asks Changed of a metadata snapshot, while the device is in use,
// or ChangedInactive of the metadata of a device that is suspended or not
// active. The answer may name too much, never too little; when any part of it
// can't be had and checked there is no answer but ErrUnknown, which means:
// compare everything.
//
// The reader is called with offsets and lengths that are multiples of 4096
// and with memory fit for direct I/O, as devices want it, from up to sixteen
// goroutines at once, which end before the answer is given.
package era

import (
	"errors"
	"fmt"
	"io"

	"blockferry/blockdev"
)

// ErrUnknown says that what was written can't be known. It never means that
// nothing was written.
var ErrUnknown = errors.New("what changed is unknown")

func unknown(block uint64, format string, args ...any) error {
	return fmt.Errorf("era metadata block %d: %s: %w", block, fmt.Sprintf(format, args...), ErrUnknown)
}

// ReadSuperblock reads the superblock at the given block: 0, or the block of
// a metadata snapshot. Its errors wrap ErrUnknown.
func ReadSuperblock(r io.ReaderAt, block uint64) (Superblock, error) {
	m := newReader(r)
	b, err := m.read(block)
	if err != nil {
		return Superblock{}, err
	}
	return parseSuperblock(b, block)
}

// Changed lists the blocks written in era sinceEra or later, as far as the
// metadata snapshot at snapBlock knows: everything completed before it was
// taken. Extents are in bytes, ascending and disjoint; the last may reach
// beyond a device whose size is no multiple of the data block size. sinceEra
// 0 names every block. A sinceEra that this metadata has not come to belongs
// to other metadata, and is an error. All errors wrap ErrUnknown.
func Changed(r io.ReaderAt, snapBlock uint64, sinceEra uint32) ([]blockdev.Extent, error) {
	if snapBlock == 0 {
		return nil, unknown(0, "this is no metadata snapshot")
	}
	return changed(r, snapBlock, sinceEra, false)
}

// ChangedInactive is Changed for the whole metadata of a device that is not
// active, cleanly taken down or not, or suspended. On one that is in use its
// answer is worth nothing.
func ChangedInactive(r io.ReaderAt, sinceEra uint32) ([]blockdev.Extent, error) {
	return changed(r, 0, sinceEra, true)
}

func changed(r io.ReaderAt, block uint64, since uint32, withCurrent bool) ([]blockdev.Extent, error) {
	m := newReader(r)
	b, err := m.read(block)
	if err != nil {
		return nil, err
	}
	super, err := parseSuperblock(b, block)
	if err != nil {
		return nil, err
	}
	if since > super.CurrentEra {
		return nil, unknown(block, "superblock: it is in era %d, asked for changes since %d", super.CurrentEra, since)
	}
	// An archived writeset is removed only when the array holds all of it, so
	// array and writesets together are complete.
	var marked bitmap
	if err := m.eras(super, since, &marked); err != nil {
		return nil, err
	}
	sets, err := m.writesets(super)
	if err != nil {
		return nil, err
	}
	// In a snapshot the current writeset was just archived; the field is a
	// copy whose block may be something else by now.
	if withCurrent && super.currentWriteset.root != 0 {
		sets = append(sets, super.currentWriteset)
	}
	for _, s := range sets {
		if s.era < since {
			continue
		}
		if err := m.bits(super, s, &marked); err != nil {
			return nil, err
		}
	}
	return marked.extents(super), nil
}
