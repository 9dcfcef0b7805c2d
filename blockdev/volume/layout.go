package volume

import (
	"fmt"

	"blockferry/blockdev"
)

// The disk of a volume, from the front:
//
//	0        label, slot A
//	512 KiB  label, slot B
//	1 MiB    data, the volume's size rounded up to 1 MiB
//	         COW area          | each begins with an identity block of 4 KiB;
//	         era metadata area | either may be on a device of its own instead
//	         tail, kept free: what a replica has there (journal, change map)
const (
	alignBytes  = 1 << 20
	dataOffset  = 1 << 20
	auxIDBytes  = blockdev.BlockSize
	minCowBytes = 16 << 20
	maxCowBytes = 64 << 30

	// DefaultEraBlockBytes is the grain of tracking.
	DefaultEraBlockBytes = 64 << 10
	// MinEraBlockBytes and MaxEraBlockBytes bound it; it is a multiple of the
	// former.
	MinEraBlockBytes = 64 << 10
	MaxEraBlockBytes = 4 << 20
)

// Area is a range of a device, in bytes.
type Area struct {
	Offset, Length int64
}

// End is the first byte after the area.
func (a Area) End() int64 { return a.Offset + a.Length }

// Areas says where on a disk everything is. Cow and Meta have Offset 0 when
// they stand on a device of their own.
type Areas struct {
	Data, Cow, Meta Area
	TailBytes       int64
}

// LayoutOptions say what a disk is divided into.
type LayoutOptions struct {
	SizeBytes     int64 // of the volume, a multiple of 4096; 0: as large as fits
	EraBlockBytes int64 // 0: DefaultEraBlockBytes
	CowBytes      int64 // 0: DefaultCowBytes of the volume's size
	TailBytes     int64 // kept free at the disk's end
	// CowDeviceBytes and MetaDeviceBytes are the sizes of the devices that
	// hold these areas; 0: the disk itself holds them.
	CowDeviceBytes, MetaDeviceBytes int64
}

// DefaultCowBytes is a sixteenth of the volume, 16 MiB to 64 GiB.
func DefaultCowBytes(sizeBytes int64) int64 {
	return roundUp(min(max(sizeBytes/16, minCowBytes), maxCowBytes))
}

// EraMetadataBytes is the room the era metadata of a volume needs: 4.3 bytes
// a block, three times that because a held metadata snapshot can double it,
// and 4 MiB.
func EraMetadataBytes(sizeBytes, eraBlockBytes int64) int64 {
	blocks := (sizeBytes + eraBlockBytes - 1) / eraBlockBytes
	return roundUp(3*(blocks*43/10) + 4<<20)
}

// Layout divides a disk of diskBytes.
func Layout(diskBytes int64, o LayoutOptions) (Areas, error) {
	if o.EraBlockBytes == 0 {
		o.EraBlockBytes = DefaultEraBlockBytes
	}
	switch {
	case checkEraBlock(o.EraBlockBytes) != nil:
		return Areas{}, checkEraBlock(o.EraBlockBytes)
	case o.SizeBytes < 0 || o.SizeBytes%blockdev.BlockSize != 0:
		return Areas{}, fmt.Errorf("a volume's size of %d bytes is no multiple of %d", o.SizeBytes, blockdev.BlockSize)
	case o.CowBytes < 0 || o.CowBytes%blockdev.BlockSize != 0 || o.TailBytes < 0 || o.TailBytes%blockdev.BlockSize != 0:
		return Areas{}, fmt.Errorf("COW area of %d and tail of %d bytes: want multiples of %d", o.CowBytes, o.TailBytes, blockdev.BlockSize)
	}
	if o.SizeBytes > 0 {
		areas := o.place(o.SizeBytes)
		if need := areas.diskBytes(o); need > diskBytes {
			return Areas{}, fmt.Errorf("a volume of %d bytes needs a disk of %d bytes, this one has %d", o.SizeBytes, need, diskBytes)
		}
		return areas, o.checkDevices(areas)
	}
	// What a volume needs grows with its size: search for the largest.
	low, high := int64(0), diskBytes/blockdev.BlockSize
	for low < high {
		middle := (low + high + 1) / 2
		if o.place(middle*blockdev.BlockSize).diskBytes(o) <= diskBytes {
			low = middle
		} else {
			high = middle - 1
		}
	}
	if low == 0 {
		return Areas{}, fmt.Errorf("a disk of %d bytes is too small for a volume and its areas", diskBytes)
	}
	areas := o.place(low * blockdev.BlockSize)
	return areas, o.checkDevices(areas)
}

func (o LayoutOptions) place(size int64) Areas {
	a := Areas{Data: Area{dataOffset, size}, TailBytes: o.TailBytes}
	at := roundUp(a.Data.End())
	if o.CowDeviceBytes > 0 {
		a.Cow = Area{0, o.CowDeviceBytes &^ (blockdev.BlockSize - 1)}
	} else {
		a.Cow = Area{at, o.CowBytes}
		if o.CowBytes == 0 {
			a.Cow.Length = DefaultCowBytes(size)
		}
		at = roundUp(a.Cow.End())
	}
	need := EraMetadataBytes(size, o.EraBlockBytes)
	if o.MetaDeviceBytes > 0 {
		a.Meta = Area{0, o.MetaDeviceBytes &^ (blockdev.BlockSize - 1)}
	} else {
		a.Meta = Area{at, need}
	}
	return a
}

// diskBytes is how large a disk must be.
func (a Areas) diskBytes(o LayoutOptions) int64 {
	end := roundUp(a.Data.End())
	if o.CowDeviceBytes == 0 {
		end = roundUp(a.Cow.End())
	}
	if o.MetaDeviceBytes == 0 {
		end = a.Meta.End()
	}
	return end + a.TailBytes
}

func (o LayoutOptions) checkDevices(a Areas) error {
	if need := EraMetadataBytes(a.Data.Length, o.EraBlockBytes); a.Meta.Length < need {
		return fmt.Errorf("the metadata device has %d bytes, want at least %d", a.Meta.Length, need)
	}
	if a.Cow.Length < minCowBytes {
		return fmt.Errorf("the COW area has %d bytes, want at least %d", a.Cow.Length, int64(minCowBytes))
	}
	return nil
}

func checkEraBlock(bytes int64) error {
	if bytes < MinEraBlockBytes || bytes > MaxEraBlockBytes || bytes%MinEraBlockBytes != 0 {
		return fmt.Errorf("era blocks of %d bytes: want a multiple of 64 KiB up to 4 MiB", bytes)
	}
	return nil
}

func roundUp(n int64) int64 { return (n + alignBytes - 1) &^ (alignBytes - 1) }
