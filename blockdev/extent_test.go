package blockdev

import (
	"math/rand/v2"
	"slices"
	"testing"
)

const pictureSize = 64

// picture is a set the plain way: one bool a byte.
type picture [pictureSize]bool

func draw(list []Extent) (p picture) {
	for _, e := range list {
		for at := max(e.Offset, 0); at < min(e.End(), pictureSize); at++ {
			p[at] = true
		}
	}
	return p
}

func randomExtents(rng *rand.Rand) []Extent {
	list := make([]Extent, rng.IntN(12))
	for i := range list {
		offset := rng.Int64N(pictureSize)
		list[i] = Extent{offset, rng.Int64N(min(pictureSize-offset, 12)+2) - 1} // -1 and 0 too
		list[i].Length = min(list[i].Length, pictureSize-offset)
	}
	return list
}

func mustBeNormal(t *testing.T, what string, list Extents) {
	t.Helper()
	for i, e := range list {
		if e.Length <= 0 {
			t.Fatalf("%s: extent %d of %v is empty", what, i, list)
		}
		if i > 0 && e.Offset <= list[i-1].End() {
			t.Fatalf("%s: extents %d and %d of %v overlap, touch or go back", what, i-1, i, list)
		}
	}
}

func TestExtentsAgainstPicture(t *testing.T) {
	for seed := range uint64(5000) {
		rng := rand.New(rand.NewPCG(seed, 1))
		a, b := randomExtents(rng), randomExtents(rng)
		a0, b0 := slices.Clone(a), slices.Clone(b)
		size := rng.Int64N(pictureSize + 1)
		pa, pb := draw(a), draw(b)
		var both, either, clipped picture
		var total int64
		for i := range pictureSize {
			both[i], either[i], clipped[i] = pa[i] && pb[i], pa[i] || pb[i], pa[i] && int64(i) < size
			if pa[i] {
				total++
			}
		}
		for _, c := range []struct {
			what string
			got  Extents
			want picture
		}{
			{"Normalize", Normalize(a), pa},
			{"Union", Union(a, b), either},
			{"Intersect", Intersect(a, b), both},
			{"Clip", Clip(a, size), clipped},
		} {
			mustBeNormal(t, c.what, c.got)
			if draw(c.got) != c.want {
				t.Fatalf("seed %d: %s of %v and %v (size %d) is %v", seed, c.what, a, b, size, c.got)
			}
		}
		if Total(a) != total {
			t.Fatalf("seed %d: Total(%v) = %d, want %d", seed, a, Total(a), total)
		}
		if !slices.Equal(a, a0) || !slices.Equal(b, b0) {
			t.Fatalf("seed %d: an argument was changed", seed)
		}
	}
}
