package bpf

import (
	"cmp"
	"math/bits"
	"slices"

	"blockferry/blockdev"
)

// entry is one word of a set.
type entry struct {
	index uint32
	word  uint64
}

// set is a sparse bitmap: ascending, no index twice, no word 0.
type set []entry

// normal makes a set of entries in any order.
func normal(list []entry) set {
	byIndex := func(a, b entry) int { return cmp.Compare(a.index, b.index) }
	if !slices.IsSortedFunc(list, byIndex) {
		slices.SortFunc(list, byIndex)
	}
	out := list[:0]
	for _, e := range list {
		if n := len(out); n > 0 && out[n-1].index == e.index {
			out[n-1].word |= e.word
		} else if e.word != 0 {
			out = append(out, e)
		}
	}
	return out
}

// union is what is in a, in b or in both. It may share memory with either.
func union(a, b set) set {
	if len(a) == 0 {
		return b
	}
	if len(b) == 0 {
		return a
	}
	out := make(set, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0].index < b[0].index:
			out, a = append(out, a[0]), a[1:]
		case a[0].index > b[0].index:
			out, b = append(out, b[0]), b[1:]
		default:
			out, a, b = append(out, entry{a[0].index, a[0].word | b[0].word}), a[1:], b[1:]
		}
	}
	return append(append(out, a...), b...)
}

// word is the set's word at an index.
func (s set) word(index uint32) uint64 {
	at, found := slices.BinarySearchFunc(s, index, func(e entry, i uint32) int { return cmp.Compare(e.index, i) })
	if !found {
		return 0
	}
	return s[at].word
}

// extents turns words into ranges of a volume. They are given to add ascending.
type extents struct {
	list   []blockdev.Extent
	grain  int64 // bytes
	length int64 // of the volume, in bytes
	// bounded says that list must not grow beyond its capacity; full that it
	// would have had to.
	bounded, full bool
}

func (x *extents) add(index uint32, word uint64) {
	for at := 0; word != 0; {
		skip := bits.TrailingZeros64(word)
		word >>= skip
		run := bits.TrailingZeros64(^word) // 64 when all are set
		x.run((int64(index)*wordBits+int64(at+skip))*x.grain, int64(run)*x.grain)
		at += skip + run
		if run == wordBits {
			return
		}
		word >>= run
	}
}

func (x *extents) run(offset, length int64) {
	if length = min(length, x.length-offset); length <= 0 {
		return // a bit beyond the end is none of the volume's
	}
	if n := len(x.list); n > 0 && x.list[n-1].End() == offset {
		x.list[n-1].Length += length
		return
	}
	if x.bounded && len(x.list) == cap(x.list) {
		x.full = true
		return
	}
	x.list = append(x.list, blockdev.Extent{Offset: offset, Length: length})
}
