package era

import (
	"math/bits"

	"blockferry/blockdev"
)

// bitmap is a set of data blocks. It grows as bits are set, so that it is
// never larger than what was really read allows.
type bitmap []uint64

func (m *bitmap) or(word int, bits uint64) {
	if bits == 0 {
		return
	}
	for word >= len(*m) {
		*m = append(*m, 0)
	}
	(*m)[word] |= bits
}

// extents are the runs of set bits, in bytes.
func (m bitmap) extents(s Superblock) []blockdev.Extent {
	var list []blockdev.Extent
	run := int64(-1) // where the run began that is not over yet
	end := func(block int64) {
		if run >= 0 {
			list = append(list, blockdev.Extent{Offset: run * s.DataBlockSize, Length: (block - run) * s.DataBlockSize})
			run = -1
		}
	}
	for i, word := range m {
		base := int64(i) * bitsPerWord
		for at := 0; at < bitsPerWord; {
			rest := word >> at
			if run < 0 {
				at += bits.TrailingZeros64(rest) // 64 when none is left
				if at < bitsPerWord {
					run = base + int64(at)
				}
			} else if ones := bits.TrailingZeros64(^rest); at+ones < bitsPerWord {
				at += ones
				end(base + int64(at))
			} else {
				break // the run goes on in the next word
			}
		}
	}
	end(int64(len(m)) * bitsPerWord)
	return list
}
