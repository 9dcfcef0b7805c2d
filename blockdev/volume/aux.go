package volume

import (
	"errors"
	"fmt"
	"hash/crc32"

	"blockferry/blockdev"
)

// The identity block at the start of the COW and the metadata area tells a
// swapped or emptied device from the right one; little-endian:
//
//	 0 magic "BFAREA01"    8 crc32c u32, of the block with this field zero
//	12 kind u32: 1 COW, 2 era metadata
//	16 volume uuid [16]   32 id of the era metadata [16]
//
// The era metadata proper begins in the block after it.
const (
	auxMagic = "BFAREA01"
	kindCow  = 1
	kindMeta = 2
)

var errNoAux = errors.New("no identity block")

type auxID struct {
	kind   uint32
	volume UUID
	era    UUID
}

func (a auxID) encode() []byte {
	b := blockdev.AlignedBuffer(auxIDBytes)
	copy(b, auxMagic)
	le.PutUint32(b[12:], a.kind)
	copy(b[16:], a.volume[:])
	copy(b[32:], a.era[:])
	le.PutUint32(b[8:], crc32.Checksum(b, castagnoli))
	return b
}

func decodeAux(b []byte) (auxID, error) {
	if len(b) < auxIDBytes || string(b[:8]) != auxMagic {
		return auxID{}, errNoAux
	}
	b = b[:auxIDBytes]
	sum := crc32.Update(crc32.Update(crc32.Checksum(b[:8], castagnoli), castagnoli, make([]byte, 4)), castagnoli, b[12:])
	if sum != le.Uint32(b[8:]) {
		return auxID{}, errNoAux
	}
	return auxID{le.Uint32(b[12:]), UUID(b[16:32]), UUID(b[32:48])}, nil
}

func readAux(d blockdev.Device, at int64) (auxID, error) {
	b := blockdev.AlignedBuffer(auxIDBytes)
	if _, err := d.ReadAt(b, at); err != nil {
		return auxID{}, fmt.Errorf("%s: read the area's identity at %d: %w", d.Name(), at, err)
	}
	return decodeAux(b)
}

func writeAux(d blockdev.Device, at int64, a auxID) error {
	if _, err := d.WriteAt(a.encode(), at); err != nil {
		return fmt.Errorf("%s: write the area's identity at %d: %w", d.Name(), at, err)
	}
	return nil
}

// Role is what a disk is to a volume.
type Role string

// What Probe tells apart; "" is a disk that is none of these.
const (
	RoleDisk     Role = "volume"
	RoleCow      Role = "cow"
	RoleMetadata Role = "metadata"
)

// Probe says from a device's label, or from the identity of an area at its
// beginning, whether it belongs to a volume and to which. A damaged label
// still makes a disk a volume's; its id is zero then.
func Probe(d blockdev.Device) (Role, UUID, error) {
	label, err := ReadLabel(d)
	switch {
	case err == nil:
		return RoleDisk, label.UUID, nil
	case errors.Is(err, ErrBadLabel):
		return RoleDisk, UUID{}, nil
	case !errors.Is(err, ErrNoLabel):
		return "", UUID{}, err
	case d.Size() < auxIDBytes:
		return "", UUID{}, nil
	}
	id, err := readAux(d, 0)
	switch {
	case errors.Is(err, errNoAux):
		return "", UUID{}, nil
	case err != nil:
		return "", UUID{}, err
	case id.kind == kindCow:
		return RoleCow, id.volume, nil
	}
	return RoleMetadata, id.volume, nil
}
