package blockdev

import (
	"cmp"
	"slices"
)

// Extent is a range of a device, in bytes.
type Extent struct {
	Offset int64
	Length int64
}

// End is the first byte after the extent.
func (e Extent) End() int64 { return e.Offset + e.Length }

// Extents is a set of bytes of a device. As a set it is normal: ascending,
// neither overlapping nor touching, no extent empty. The functions here take
// any list and give back normal ones; none changes its arguments.
type Extents []Extent

// Normalize makes a set of any list of extents. Empty ones and ones of
// negative length count for nothing.
func Normalize(list []Extent) Extents {
	sorted := make(Extents, 0, len(list))
	for _, e := range list {
		if e.Length > 0 {
			sorted = append(sorted, e)
		}
	}
	byOffset := func(a, b Extent) int { return cmp.Compare(a.Offset, b.Offset) }
	if !slices.IsSortedFunc(sorted, byOffset) {
		slices.SortFunc(sorted, byOffset)
	}
	merged := sorted[:0]
	for _, e := range sorted {
		merged = merged.with(e)
	}
	return merged
}

// with adds an extent that does not begin before the last one.
func (s Extents) with(e Extent) Extents {
	if n := len(s); n > 0 && e.Offset <= s[n-1].End() {
		s[n-1].Length = max(s[n-1].End(), e.End()) - s[n-1].Offset
		return s
	}
	return append(s, e)
}

// Union is what is in a, in b or in both.
func Union(a, b []Extent) Extents {
	x, y := Normalize(a), Normalize(b)
	out := make(Extents, 0, len(x)+len(y))
	for len(x) > 0 || len(y) > 0 {
		if len(y) == 0 || len(x) > 0 && x[0].Offset <= y[0].Offset {
			out, x = out.with(x[0]), x[1:]
		} else {
			out, y = out.with(y[0]), y[1:]
		}
	}
	return out
}

// Intersect is what is both in a and in b.
func Intersect(a, b []Extent) Extents {
	x, y := Normalize(a), Normalize(b)
	var out Extents
	for len(x) > 0 && len(y) > 0 {
		from, to := max(x[0].Offset, y[0].Offset), min(x[0].End(), y[0].End())
		if from < to {
			out = append(out, Extent{from, to - from})
		}
		if x[0].End() < y[0].End() {
			x = x[1:]
		} else {
			y = y[1:]
		}
	}
	return out
}

// Clip is the part of the set within [0, size).
func Clip(list []Extent, size int64) Extents {
	return Intersect(list, []Extent{{0, size}})
}

// Clip is the part of the set within [0, size).
func (s Extents) Clip(size int64) Extents { return Clip(s, size) }

// Total is the number of bytes in the set; every byte counts once.
func Total(list []Extent) int64 {
	var total int64
	for _, e := range Normalize(list) {
		total += e.Length
	}
	return total
}

// Total is the number of bytes in the set.
func (s Extents) Total() int64 { return Total(s) }
