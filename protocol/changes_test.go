package protocol

import (
	"testing"

	gproto "google.golang.org/protobuf/proto"

	"blockferry/proto"
)

// What changed at a replica fits into one message to another node, however much
// it is, and leaves nothing out.
func TestChangesFitIntoAMessage(t *testing.T) {
	const limit = 2 << 20 // transport.MaxMessageBytes
	var changed []Range
	for i := range int64(3 * maxChangedRanges) {
		changed = append(changed, Range{1<<44 + 3*i*ChunkBytes, ChunkBytes})
	}
	joined := coarsen(changed, maxChangedRanges)
	m := &proto.Changes{Known: true}
	for range maxChangedRanges {
		m.Offsets, m.Lengths = append(m.Offsets, 1<<46), append(m.Lengths, 1<<46)
	}
	if n := gproto.Size(m); len(joined) > maxChangedRanges || n+1024 > limit {
		t.Errorf("%d ranges, at most %d; these take %d bytes of %d", len(joined), maxChangedRanges, n, limit)
	}
	if at := missing(joined, changed); at >= 0 {
		t.Errorf("what changed at %d is left out", at)
	}
}

// missing is where a range begins that is not within those of in; -1: none is.
func missing(in, ranges []Range) int64 {
	i := 0
	for _, r := range ranges {
		for i < len(in) && in[i].End() < r.End() {
			i++
		}
		if i == len(in) || in[i].Offset > r.Offset {
			return r.Offset
		}
	}
	return -1
}
