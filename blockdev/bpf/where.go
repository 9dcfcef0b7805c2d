package bpf

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/bits"

	"blockferry/blockdev"
)

const (
	sectorSize = blockdev.SectorSize
	// mostMarkBytes bounds the memory of one bitmap: 4 TiB in grains of 4 KiB.
	// A larger volume gets grains twice as large, or four times.
	mostMarkBytes = 128 << 20
)

// where is the volume's place and identity.
type where struct {
	target Target
	place  blockdev.Placement
	id     blockdev.Identity
	boot   [2]uint64
	start  int64 // of the volume on the whole disk, in bytes
	grain  int64 // bytes
}

func find(t Target) (w where, err error) {
	w.target = t
	if w.id, err = blockdev.Identify(t.Device); err != nil {
		return w, err
	}
	if t.Offset < 0 || t.Length <= 0 || t.Offset%blockdev.BlockSize != 0 || t.Length%blockdev.BlockSize != 0 ||
		t.Offset > w.id.SizeBytes || t.Length > w.id.SizeBytes-t.Offset {
		return w, fmt.Errorf("fine tracking of %d bytes at offset %d of %s: %w: want multiples of %d within its %d bytes",
			t.Length, t.Offset, t.Device, blockdev.ErrRange, blockdev.BlockSize, w.id.SizeBytes)
	}
	if w.place, err = blockdev.PlacementOf(t.Device); err != nil {
		return w, err
	}
	w.start = w.place.StartBytes + t.Offset
	boot, err := blockdev.BootID()
	if err != nil {
		return w, err
	}
	w.boot = [2]uint64{binary.BigEndian.Uint64(boot[:]), binary.BigEndian.Uint64(boot[8:])}
	w.grain = grainOf(t.Length)
	return w, nil
}

func grainOf(length int64) int64 {
	grain := int64(blockdev.BlockSize)
	for {
		if words, _ := shape((length + grain - 1) / grain); words*8 <= mostMarkBytes {
			return grain
		}
		grain *= 2
	}
}

func (w where) grains() int64 { return (w.target.Length + w.grain - 1) / w.grain }

func (w where) grainShift() uint32 { return uint32(bits.TrailingZeros64(uint64(w.grain / sectorSize))) }

// identity is what the header says from headIdentity on, and what each part is
// called.
func (w where) identity() (words [headIdentityEnd - headIdentity]uint64, names [headIdentityEnd - headIdentity]string) {
	serial := sha256.Sum256([]byte(w.id.Serial + "\x00" + w.id.WWID))
	size := uint64(w.id.SizeBytes)
	for i, part := range []struct {
		name  string
		value uint64
	}{
		{"other programs", objectDigest()},
		{"another boot", w.boot[0]}, {"another boot", w.boot[1]},
		{"another disk", uint64(w.place.Major)<<32 | uint64(w.place.Minor)},
		{"another disk (its sequence number is new)", w.place.Sequence},
		{"a device of another size", size},
		{"another place on the disk", uint64(w.start)}, {"another length", uint64(w.target.Length)},
		{"another grain", uint64(w.grain)},
		{"another disk (its serial number differs)", binary.NativeEndian.Uint64(serial[:])},
	} {
		words[i], names[i] = part.value, part.name
	}
	return words, names
}
