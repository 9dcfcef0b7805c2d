package era

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
)

// image builds metadata in memory; of the reader's code it uses only the
// checksum, which the kernel's own images prove.
type image struct {
	b     []byte
	kinds []kind // of each block
	free  []uint64
	// fanout is how many entries a tree node gets; 0 stands for as many as fit.
	fanout int
}

type kind byte

const (
	empty kind = iota
	super
	treeNode
	arrayBlk
)

// newImage makes room for n blocks, handed out in ascending order, or in
// random order when rng is not nil.
func newImage(n int, rng *rand.Rand) *image {
	im := &image{b: make([]byte, n*metadataBlockSize), kinds: make([]kind, n)}
	for i := 1; i < n; i++ {
		im.free = append(im.free, uint64(i))
	}
	if rng != nil {
		rng.Shuffle(len(im.free), func(i, j int) { im.free[i], im.free[j] = im.free[j], im.free[i] })
	}
	return im
}

func (im *image) block(n uint64) []byte { return im.b[n*metadataBlockSize:][:metadataBlockSize] }

func (im *image) alloc(k kind) (uint64, []byte) {
	n := im.free[0]
	im.free = im.free[1:]
	im.kinds[n] = k
	return n, im.block(n)
}

// seal writes the checksum of a block as of its kind.
func (im *image) seal(n uint64) {
	xor := map[kind]uint32{super: 146538381, treeNode: 121107, arrayBlk: 595846735}[im.kinds[n]]
	put32(im.block(n), 0, checksum(im.block(n), xor))
}

func (im *image) reader() *bytes.Reader { return bytes.NewReader(im.b) }

func put32(b []byte, at int, v uint32) { binary.LittleEndian.PutUint32(b[at:], v) }
func put64(b []byte, at int, v uint64) { binary.LittleEndian.PutUint64(b[at:], v) }

func bytes64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

func (im *image) node(flags uint32, valueSize int, keys []uint64, values [][]byte) uint64 {
	n, b := im.alloc(treeNode)
	room := (4096 - 32) / (8 + valueSize) / 3 * 3 // as the kernel has it
	put32(b, 4, flags)
	put64(b, 8, n)
	put32(b, 16, uint32(len(keys)))
	put32(b, 20, uint32(room))
	put32(b, 24, uint32(valueSize))
	for i, key := range keys {
		put64(b, 32+8*i, key)
		copy(b[32+8*room+i*valueSize:], values[i])
	}
	im.seal(n)
	return n
}

func (im *image) tree(valueSize int, keys []uint64, values [][]byte) uint64 {
	flags := uint32(2)
	for {
		fanout := im.fanout
		if fanout == 0 {
			fanout = (4096 - 32) / (8 + valueSize) / 3 * 3
		}
		if len(keys) <= fanout {
			return im.node(flags, valueSize, keys, values)
		}
		var upKeys []uint64
		var upValues [][]byte
		for len(keys) > 0 {
			n := min(fanout, len(keys))
			upKeys = append(upKeys, keys[0])
			upValues = append(upValues, bytes64(im.node(flags, valueSize, keys[:n], values[:n])))
			keys, values = keys[n:], values[n:]
		}
		keys, values, flags, valueSize = upKeys, upValues, 1, 8
	}
}

// array takes the values end to end.
func (im *image) array(valueSize int, values []byte) uint64 {
	room := (4096 - 24) / valueSize
	var keys []uint64
	var blocks [][]byte
	for len(values) > 0 {
		n := min(room*valueSize, len(values))
		at, b := im.alloc(arrayBlk)
		put32(b, 4, uint32(room))
		put32(b, 8, uint32(n/valueSize))
		put32(b, 12, uint32(valueSize))
		put64(b, 16, at)
		copy(b[24:], values[:n])
		im.seal(at)
		keys, blocks = append(keys, uint64(len(keys))), append(blocks, bytes64(at))
		values = values[n:]
	}
	return im.tree(8, keys, blocks)
}

// set is a writeset as a test thinks of it.
type set struct {
	era  uint32
	bits uint32
	in   func(b uint32) bool
}

func (im *image) bitset(s set) uint64 {
	words := make([]byte, (s.bits+63)/64*8)
	for b := range uint32(len(words) * 8) {
		// Beyond bits everything is set: it must not be looked at.
		if b >= s.bits || s.in(b) {
			words[b/8] |= 1 << (b % 8)
		}
	}
	return im.array(8, words)
}

// content is what the metadata says.
type content struct {
	blocks  uint32
	era     uint32
	digest  func(b uint32) uint32 // the era array
	sets    []set                 // archived, ascending
	current *set                  // not archived
	sectors uint32
}

// write puts metadata into the image: the superblock at block `at`.
func (im *image) write(c content, at uint64) {
	eras := make([]byte, 4*c.blocks)
	for b := range c.blocks {
		put32(eras, int(4*b), c.digest(b))
	}
	var keys []uint64
	var values [][]byte
	for _, s := range c.sets {
		keys = append(keys, uint64(s.era))
		values = append(values, append(binary.LittleEndian.AppendUint32(nil, s.bits), bytes64(im.bitset(s))...))
	}
	im.kinds[at] = super
	b := im.block(at)
	put64(b, 8, at)
	put64(b, 32, 2126579579)
	put32(b, 40, 1)
	put32(b, 172, c.sectors)
	put32(b, 176, 8)
	put32(b, 180, c.blocks)
	put32(b, 184, c.era)
	if c.current != nil {
		put32(b, 188, c.current.bits)
		put64(b, 192, im.bitset(*c.current))
	}
	put64(b, 200, im.tree(12, keys, values))
	put64(b, 208, im.array(4, eras))
	im.seal(at)
}

// want is the answer, the plain way.
func (c content) want(since uint32, withCurrent bool) []bool {
	changed := make([]bool, c.blocks)
	for b := range c.blocks {
		changed[b] = c.digest(b) >= since
		for _, s := range c.sets {
			changed[b] = changed[b] || s.era >= since && b < s.bits && s.in(b)
		}
		if withCurrent && c.current != nil {
			changed[b] = changed[b] || b < c.current.bits && c.current.in(b)
		}
	}
	return changed
}
