package era

import (
	"fmt"
	"io"
	"math"

	"blockferry/blockdev"
)

// reader reads metadata blocks, each at most once: one that is pointed to
// twice is a loop, or belongs to somebody else.
type reader struct {
	r     io.ReaderAt
	limit uint64   // the first block number beyond the metadata
	seen  []uint64 // a bit for each block
}

func newReader(r io.ReaderAt) *reader {
	m := &reader{r: r, limit: maxMetadataBlock}
	if sized, ok := r.(interface{ Size() int64 }); ok {
		m.limit = min(m.limit, uint64(max(sized.Size(), 0))/metadataBlockSize)
	}
	return m
}

// claim says that a block is read now, for the first time.
func (m *reader) claim(block uint64) error {
	if block >= m.limit {
		return unknown(block, "no such block, want one below %d", m.limit)
	}
	for block/bitsPerWord >= uint64(len(m.seen)) {
		m.seen = append(m.seen, 0)
	}
	if m.seen[block/bitsPerWord]>>(block%bitsPerWord)&1 != 0 {
		return unknown(block, "it is pointed to twice")
	}
	m.seen[block/bitsPerWord] |= 1 << (block % bitsPerWord)
	return nil
}

func (m *reader) readStretch(p []byte, block uint64) error {
	n, err := m.r.ReadAt(p, int64(block)*metadataBlockSize)
	if n == len(p) {
		return nil // an io.ReaderAt may say io.EOF with the last byte
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("era metadata block %d: read of %d bytes: %w: %w", block, len(p), err, ErrUnknown)
}

// read returns one block in memory of its own.
func (m *reader) read(block uint64) ([]byte, error) {
	if err := m.claim(block); err != nil {
		return nil, err
	}
	b := blockdev.AlignedBuffer(metadataBlockSize)
	return b, m.readStretch(b, block)
}

// node is a checked btree node.
type node struct {
	b         []byte
	block     uint64
	leaf      bool
	entries   int
	max       int
	valueSize int
}

func (n node) key(i int) uint64 { return le64(n.b, nodeHeaderSize+i*keySize) }
func (n node) value(i int) []byte {
	return n.b[nodeHeaderSize+n.max*keySize+i*n.valueSize:][:n.valueSize]
}
func (n node) child(i int) uint64 { return le64(n.value(i), 0) }

func parseNode(b []byte, block uint64, leafValueSize int) (node, error) {
	fail := func(format string, args ...any) (node, error) {
		return node{}, unknown(block, "btree node: "+format, args...)
	}
	if got, want := le32(b, 0), checksum(b, nodeXOR); got != want {
		return fail("checksum %#x, want %#x", got, want)
	}
	if at := le64(b, 8); at != block {
		return fail("it says it is block %d", at)
	}
	n := node{b: b, block: block, valueSize: blockNumberSize}
	switch flags := le32(b, 4); flags {
	case leafNode:
		n.leaf, n.valueSize = true, leafValueSize
	case internalNode:
	default:
		return fail("flags %d, want %d or %d", flags, internalNode, leafNode)
	}
	entries, limit, size := le32(b, 16), le32(b, 20), le32(b, 24)
	if size != uint32(n.valueSize) {
		return fail("values of %d bytes, want %d", size, n.valueSize)
	}
	if fit := (metadataBlockSize - nodeHeaderSize) / (keySize + size); limit > fit {
		return fail("at most %d entries, but only %d fit", limit, fit)
	}
	if entries > limit {
		return fail("%d entries, want at most %d", entries, limit)
	}
	n.entries, n.max = int(entries), int(limit)
	for i := 1; i < n.entries; i++ {
		if n.key(i-1) >= n.key(i) {
			return fail("key %d follows key %d", n.key(i), n.key(i-1))
		}
	}
	return n, nil
}

// tree visits the leaves of a btree in the order of their keys.
func (m *reader) tree(root uint64, valueSize int, visit func(leaf node) error) error {
	return m.subtree(root, valueSize, 1, 0, math.MaxUint64, visit)
}

// subtree visits the leaves below a block, whose keys must be from first to
// last.
func (m *reader) subtree(block uint64, valueSize, depth int, first, last uint64, visit func(leaf node) error) error {
	if depth > maxTreeDepth {
		return unknown(block, "btree node: more than %d levels down", maxTreeDepth)
	}
	b, err := m.read(block)
	if err != nil {
		return err
	}
	n, err := parseNode(b, block, valueSize)
	if err != nil {
		return err
	}
	if n.entries == 0 {
		if n.leaf && depth == 1 {
			return nil // an empty tree
		}
		return unknown(block, "btree node: it is empty")
	}
	if n.key(0) < first || n.key(n.entries-1) > last {
		return unknown(block, "btree node: keys %d to %d, want them from %d to %d", n.key(0), n.key(n.entries-1), first, last)
	}
	if n.leaf {
		return visit(n)
	}
	for i := range n.entries {
		childLast := last
		if i+1 < n.entries {
			childLast = n.key(i+1) - 1
		}
		if err := m.subtree(n.child(i), valueSize, depth+1, n.key(i), childLast, visit); err != nil {
			return err
		}
	}
	return nil
}

// eras marks the blocks whose last digested era is since or later.
func (m *reader) eras(s Superblock, since uint32, marked *bitmap) error {
	return m.each(array{s.eraArrayRoot, int64(s.Blocks), eraSize, func(block uint64, first int64, values []byte) error {
		word, bit := int(first/bitsPerWord), first%bitsPerWord
		var collected uint64
		for i := 0; i < len(values); i += eraSize {
			era := le32(values, i)
			if era > s.CurrentEra {
				return unknown(block, "array block: era %d for data block %d, but it is only era %d",
					era, first+int64(i/eraSize), s.CurrentEra)
			}
			if era >= since {
				collected |= 1 << bit
			}
			if bit++; bit == bitsPerWord {
				marked.or(word, collected)
				word, bit, collected = word+1, 0, 0
			}
		}
		marked.or(word, collected)
		return nil
	}})
}

// writesets lists the archived writesets that are not digested yet.
func (m *reader) writesets(s Superblock) ([]writeset, error) {
	var sets []writeset
	err := m.tree(s.writesetTreeRoot, writesetSize, func(leaf node) error {
		for i := range leaf.entries {
			era, v := leaf.key(i), leaf.value(i)
			if era > uint64(s.CurrentEra) {
				return unknown(leaf.block, "writeset tree: a writeset of era %d, but it is only era %d", era, s.CurrentEra)
			}
			sets = append(sets, writeset{uint32(era), le32(v, 0), le64(v, 4)})
		}
		return nil
	})
	return sets, err
}

// bits marks the blocks of a writeset. After the device was resized a
// writeset may have more or fewer bits than the device has blocks.
func (m *reader) bits(s Superblock, w writeset, marked *bitmap) error {
	words := (int64(w.bits) + bitsPerWord - 1) / bitsPerWord
	valid := int64(min(w.bits, s.Blocks))
	return m.each(array{w.root, words, wordSize, func(_ uint64, first int64, values []byte) error {
		for i := 0; i < len(values); i += wordSize {
			word := first + int64(i/wordSize)
			set := le64(values, i)
			if left := valid - word*bitsPerWord; left <= 0 {
				return nil
			} else if left < bitsPerWord {
				set &= 1<<left - 1
			}
			marked.or(int(word), set)
		}
		return nil
	}})
}
