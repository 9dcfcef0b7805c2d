package era

import (
	"encoding/binary"
	"hash/crc32"
	"math"

	"blockferry/blockdev"
)

// The metadata is blocks of 4096 bytes, little-endian; block n stands at byte
// n*4096. Three kinds of block, each with a checksum over bytes 4 to 4095:
//
//	superblock (block 0, and the block of a metadata snapshot)
//	  0 csum u32                    4 flags u32
//	  8 own block number u64       16 uuid [16]
//	 32 magic u64                  40 version u32
//	 44 space map root [128]      172 data block size u32, sectors
//	176 metadata block size u32   180 nr_blocks u32
//	184 current era u32           188 current writeset: nr_bits u32
//	192 current writeset: root u64, 0 for none
//	200 writeset tree root u64    208 era array root u64
//	216 metadata snapshot u64, 0 for none
//
//	btree node
//	  0 csum u32                    4 flags u32: 1 internal, 2 leaf
//	  8 own block number u64       16 nr_entries u32
//	 20 max_entries u32            24 value_size u32
//	 32 keys u64[max_entries], the first nr_entries valid, ascending
//	 then values, stride value_size; in an internal node a child's block number
//
//	array block
//	  0 csum u32                    4 max_entries u32
//	  8 nr_entries u32             12 value_size u32
//	 16 own block number u64       24 values, stride value_size
//
// An array is a btree from an array block's index to its block number; value
// k stands in array block k/max_entries at k%max_entries. A bitset is an
// array of u64, bit b is bit b&63 of word b>>6.
//
// Writeset tree: era -> {nr_bits u32, bitset root u64}. Era array: a u32 for
// each data block, the last digested era it was written in, 0 for never.
const (
	metadataBlockSize = 4096

	superblockMagic   = 2126579579
	superblockVersion = 1
	superblockXOR     = 146538381
	nodeXOR           = 121107
	arrayXOR          = 595846735

	internalNode   = 1
	leafNode       = 2
	nodeHeaderSize = 32
	keySize        = 8

	arrayHeaderSize  = 24
	eraSize          = 4
	wordSize         = 8
	blockNumberSize  = 8
	writesetSize     = 12
	bitsPerWord      = 64
	erasPerArray     = (metadataBlockSize - arrayHeaderSize) / eraSize
	wordsPerArray    = (metadataBlockSize - arrayHeaderSize) / wordSize
	maxTreeDepth     = 16      // three levels hold the largest array there is
	maxMetadataBlock = 4161600 // what the kernel's space map can number: 255 * (16384-64)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(block []byte, xor uint32) uint32 {
	return ^crc32.Checksum(block[4:metadataBlockSize], castagnoli) ^ xor
}

func le32(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
func le64(b []byte, at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }

// Superblock is what the head of the metadata, or of a snapshot of it, says.
type Superblock struct {
	// Block is where it stands.
	Block uint64
	// DataBlockSize is the grain of tracking, in bytes.
	DataBlockSize int64
	// Blocks is the number of data blocks tracked.
	Blocks uint32
	// CurrentEra is the era that writes are marked in now; in a metadata
	// snapshot, the era that began when it was taken.
	CurrentEra uint32
	// MetadataSnapshot is the block of the held metadata snapshot, 0 for none.
	MetadataSnapshot uint64

	currentWriteset  writeset // root 0 when there is none
	writesetTreeRoot uint64
	eraArrayRoot     uint64
}

// TrackedBytes is the size of the tracked device, rounded up to DataBlockSize.
func (s Superblock) TrackedBytes() int64 { return int64(s.Blocks) * s.DataBlockSize }

type writeset struct {
	era  uint32
	bits uint32
	root uint64
}

func parseSuperblock(b []byte, block uint64) (Superblock, error) {
	fail := func(format string, args ...any) (Superblock, error) {
		return Superblock{}, unknown(block, "superblock: "+format, args...)
	}
	if magic := le64(b, 32); magic != superblockMagic {
		return fail("magic %d, want %d", magic, superblockMagic)
	}
	if got, want := le32(b, 0), checksum(b, superblockXOR); got != want {
		return fail("checksum %#x, want %#x", got, want)
	}
	if at := le64(b, 8); at != block {
		return fail("it says it is block %d", at)
	}
	if version := le32(b, 40); version != superblockVersion {
		return fail("version %d, want %d", version, superblockVersion)
	}
	sectors := le32(b, 172)
	if sectors == 0 || sectors%8 != 0 {
		return fail("data blocks of %d sectors, want a multiple of 8", sectors)
	}
	if n := le32(b, 176); n != metadataBlockSize/blockdev.SectorSize {
		return fail("metadata blocks of %d sectors, want %d", n, metadataBlockSize/blockdev.SectorSize)
	}
	s := Superblock{
		Block:            block,
		DataBlockSize:    int64(sectors) * blockdev.SectorSize,
		Blocks:           le32(b, 180),
		CurrentEra:       le32(b, 184),
		MetadataSnapshot: le64(b, 216),
		currentWriteset:  writeset{bits: le32(b, 188), root: le64(b, 192)},
		writesetTreeRoot: le64(b, 200),
		eraArrayRoot:     le64(b, 208),
	}
	s.currentWriteset.era = s.CurrentEra
	if int64(s.Blocks) > math.MaxInt64/s.DataBlockSize {
		return fail("%d data blocks of %d bytes: no device is that large", s.Blocks, s.DataBlockSize)
	}
	return s, nil
}
