package protocol

import "sort"

// appendRange adds r, which does not begin before the last one, joining what
// touches.
func appendRange(out []Range, r Range) []Range {
	if r.Length <= 0 {
		return out
	}
	if n := len(out); n > 0 && out[n-1].End() >= r.Offset {
		out[n-1].Length = max(out[n-1].End(), r.End()) - out[n-1].Offset
		return out
	}
	return append(out, r)
}

// uniteRanges is everything in a or b: ascending, disjoint, joined. The
// inputs may be in any order and are not changed.
func uniteRanges(a, b []Range) []Range {
	all := make([]Range, 0, len(a)+len(b))
	all = append(append(all, a...), b...)
	sort.Slice(all, func(i, j int) bool { return all[i].Offset < all[j].Offset })
	var out []Range
	for _, r := range all {
		out = appendRange(out, r)
	}
	return out
}

// subtractRanges is what of a is not in b; both ascending and disjoint.
func subtractRanges(a, b []Range) []Range {
	var out []Range
	for _, r := range a {
		for len(b) > 0 && b[0].End() <= r.Offset {
			b = b[1:]
		}
		for _, cut := range b {
			if cut.Offset >= r.End() {
				break
			}
			out = appendRange(out, Range{r.Offset, cut.Offset - r.Offset})
			r = Range{max(r.Offset, cut.End()), r.End() - max(r.Offset, cut.End())}
			if r.Length <= 0 {
				break
			}
		}
		out = appendRange(out, r)
	}
	return out
}

// intersectRanges is what is in both; both ascending and disjoint.
func intersectRanges(a, b []Range) []Range { return subtractRanges(a, subtractRanges(a, b)) }

func totalBytes(ranges []Range) int64 {
	var n int64
	for _, r := range ranges {
		n += r.Length
	}
	return n
}

// cleanRanges makes what a tracker named fit for sending: widened to whole
// blocks, within the volume, ascending and disjoint.
func cleanRanges(in []Range, size int64) []Range {
	out := make([]Range, 0, len(in))
	for _, r := range in {
		start := max(0, r.Offset/BlockSize*BlockSize)
		end := min(size, roundUp(r.End(), BlockSize))
		if end > start {
			out = append(out, Range{start, end - start})
		}
	}
	return uniteRanges(out, nil)
}

// maxBatchRanges keeps one batch of scattered small ranges from growing long.
const maxBatchRanges = 1024

// batcher cuts ascending ranges into batches of at most limit bytes, a
// multiple of UnitSize.
type batcher struct {
	ranges []Range
	limit  int64
}

func newBatcher(ranges []Range, limit int64) *batcher {
	return &batcher{ranges: append([]Range(nil), ranges...), limit: limit}
}

// next takes the next batch; nil at the end.
func (b *batcher) next() []Range {
	var out []Range
	room := b.limit
	for len(b.ranges) > 0 && room > 0 && len(out) < maxBatchRanges {
		r := b.ranges[0]
		n := min(r.Length, room)
		if n < r.Length {
			// Cut where units of the whole volume begin, so that a later
			// comparison of the same range asks about the same units.
			if end := (r.Offset + n) / UnitSize * UnitSize; end > r.Offset {
				n = end - r.Offset
			} else if len(out) > 0 {
				break
			}
		}
		out = append(out, Range{r.Offset, n})
		room -= n
		if n == r.Length {
			b.ranges = b.ranges[1:]
		} else {
			b.ranges[0] = Range{r.Offset + n, r.Length - n}
			break
		}
	}
	return out
}

// blockSet is a set of 4 KiB blocks: one bit each, in pages that are there
// only where something is. A full terabyte takes 32 MiB.
type blockSet struct {
	pages map[int64]*[blockSetWords]uint64
}

const (
	blockSetWords     = 512
	blockSetPageBytes = blockSetWords * 64 * BlockSize
)

func (s *blockSet) add(r Range) {
	for at := r.Offset; at < r.End(); {
		key := at / blockSetPageBytes
		page := s.page(key)
		end := min(r.End(), (key+1)*blockSetPageBytes)
		for ; at < end; at += BlockSize {
			bit := at % blockSetPageBytes / BlockSize
			page[bit/64] |= 1 << (bit % 64)
		}
	}
}

// unite adds what another set has.
func (s *blockSet) unite(other *blockSet) {
	for key, words := range other.pages {
		page := s.page(key)
		for i, word := range words {
			page[i] |= word
		}
	}
}

// page is there afterwards.
func (s *blockSet) page(key int64) *[blockSetWords]uint64 {
	if s.pages == nil {
		s.pages = map[int64]*[blockSetWords]uint64{}
	}
	if s.pages[key] == nil {
		s.pages[key] = new([blockSetWords]uint64)
	}
	return s.pages[key]
}

// within lists which parts of r are in the set.
func (s *blockSet) within(out []Range, r Range) []Range {
	for at := r.Offset; at < r.End(); {
		key := at / blockSetPageBytes
		end := min(r.End(), (key+1)*blockSetPageBytes)
		page := s.pages[key]
		if page == nil {
			at = end
			continue
		}
		for ; at < end; at += BlockSize {
			bit := at % blockSetPageBytes / BlockSize
			if page[bit/64]&(1<<(bit%64)) != 0 {
				out = appendRange(out, Range{at, BlockSize})
			}
		}
	}
	return out
}
