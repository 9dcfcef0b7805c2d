package protocol

import (
	"math/rand/v2"
	"testing"
)

func gen(n byte) Generation { return Generation{n, n, n, n, 1} }

func line(points ...any) Lineage {
	var l Lineage
	for i := 0; i < len(points); i += 2 {
		l = append(l, Position{gen(byte(points[i].(int))), uint64(points[i+1].(int))})
	}
	return l
}

func TestCompareByHand(t *testing.T) {
	for _, c := range []struct {
		name string
		a, b Lineage
		want Relation
	}{
		{"both blank", nil, nil, Relation{Kind: Same}},
		{"blank and not", nil, line(1, 3), Relation{Kind: Unrelated}},
		{"same", line(1, 3, 2, 5), line(1, 3, 2, 5), Relation{Same, Position{gen(2), 5}}},
		{"behind in the generation", line(1, 3), line(1, 4), Relation{Behind, Position{gen(1), 3}}},
		{"behind by a generation", line(1, 3), line(1, 3, 2, 5), Relation{Behind, Position{gen(1), 3}}},
		{"behind, and the other left later", line(1, 3), line(1, 4, 2, 5), Relation{Behind, Position{gen(1), 3}}},
		{"went on after the other took over", line(1, 4), line(1, 3, 2, 5), Relation{Diverged, Position{gen(1), 3}}},
		{"two took over", line(1, 3, 3, 9), line(1, 3, 2, 5), Relation{Diverged, Position{gen(1), 3}}},
		{"unrelated", line(1, 3), line(2, 3), Relation{Kind: Unrelated}},
		{"one forgot its oldest", line(2, 5, 3, 7), line(1, 3, 2, 5), Relation{Ahead, Position{gen(2), 5}}},
		{"different pasts", line(1, 3, 3, 7), line(2, 3, 3, 7), Relation{Kind: Unrelated}},
		{"order disagrees", line(1, 3, 2, 5), line(2, 3, 1, 5), Relation{Kind: Unrelated}},
		{"malformed", line(1, 3, 1, 5), line(1, 3), Relation{Kind: Unrelated}},
		{"epochs do not grow", line(1, 3, 2, 3), line(1, 3), Relation{Kind: Unrelated}},
	} {
		if got := Compare(c.a, c.b); got != c.want {
			t.Errorf("%s: Compare(%v, %v) = %v %v, want %v %v", c.name, c.a, c.b, got, got.Common, c.want, c.want.Common)
		}
	}
}

// history is one cut in a tree of what really happened: the ground truth that
// Compare must find out from the lineages alone.
type history struct {
	parent *history
	pos    Position
	line   Lineage
}

func (h *history) contains(o *history) bool {
	for ; h != nil; h = h.parent {
		if h == o {
			return true
		}
	}
	return false
}

func growHistory(rng *rand.Rand, n int) []*history {
	var id byte
	newGen := func() Generation { id++; return gen(id) }
	start := Position{newGen(), 1}
	all := []*history{{pos: start, line: Lineage{start}}}
	used := map[Position]bool{start: true}
	for len(all) < n {
		from := all[rng.IntN(len(all))]
		p := Position{from.pos.Generation, from.pos.Epoch + 1 + rng.Uint64N(3)}
		// A generation has one writer, so it never forks: go on in it only
		// from its newest cut.
		tip := true
		for _, h := range all {
			if h.parent == from && h.pos.Generation == from.pos.Generation {
				tip = false
			}
		}
		if !tip || rng.IntN(4) == 0 {
			if id == 250 {
				continue
			}
			p.Generation = newGen()
		}
		if used[p] {
			continue
		}
		used[p] = true
		all = append(all, &history{from, p, from.line.Extend(p)})
	}
	return all
}

func TestCompareAgainstHistory(t *testing.T) {
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 1))
		all := growHistory(rng, 60)
		for _, a := range all {
			if err := a.line.Check(); err != nil {
				t.Fatal(err)
			}
			for _, b := range all {
				got := Compare(a.line, b.line)
				want := Relation{Kind: Diverged}
				switch {
				case a == b:
					want.Kind = Same
				case a.contains(b):
					want.Kind = Ahead
				case b.contains(a):
					want.Kind = Behind
				}
				for c := a; c != nil; c = c.parent {
					if b.contains(c) {
						want.Common = c.pos
						break
					}
				}
				if got != want {
					t.Fatalf("seed %d: Compare(%v, %v) = %v %v, want %v %v", seed, a.line, b.line, got, got.Common, want, want.Common)
				}
			}
		}
	}
}

// Whatever the two lineages, well formed or not: the mirror image agrees.
func TestCompareAntisymmetric(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	random := func() Lineage {
		var l Lineage
		var e uint64
		for range rng.IntN(5) {
			e += rng.Uint64N(3)
			l = append(l, Position{gen(byte(rng.IntN(4))), e})
		}
		return l
	}
	mirror := map[RelationKind]RelationKind{Same: Same, Ahead: Behind, Behind: Ahead, Diverged: Diverged, Unrelated: Unrelated}
	for range 200_000 {
		a, b := random(), random()
		ab, ba := Compare(a, b), Compare(b, a)
		if ba.Kind != mirror[ab.Kind] || ab.Common != ba.Common {
			t.Fatalf("Compare(%v, %v) = %v, the other way %v", a, b, ab, ba)
		}
		if ab.Kind == Same && a.Tip() != b.Tip() {
			t.Fatalf("Compare(%v, %v) = %v", a, b, ab)
		}
	}
}

func TestLineageForgetsItsOldest(t *testing.T) {
	var l Lineage
	var old Lineage
	for i := range 3 * MaxGenerations {
		var g Generation
		g[0], g[1], g[2] = byte(i), byte(i>>8), 1
		before := l.Clone()
		next := l.Extend(Position{g, uint64(i + 1)})
		if !l.Equal(before) {
			t.Fatal("Extend changed the lineage it extends")
		}
		l = next
		if err := l.Check(); err != nil {
			t.Fatal(err)
		}
		if i == 3*MaxGenerations-10 {
			old = l.Clone()
		}
	}
	if len(l) != MaxGenerations {
		t.Fatalf("%d generations kept, want %d", len(l), MaxGenerations)
	}
	if r := Compare(old, l); r.Kind != Behind || r.Common != old.Tip() {
		t.Fatalf("a copy nine generations behind is %v", r)
	}
	back, err := LineageFromProto(l.Proto())
	if err != nil || !back.Equal(l) {
		t.Fatalf("over the wire: %v, %v", err, back)
	}
}

func TestLineageUntil(t *testing.T) {
	l := line(1, 3, 2, 5, 3, 9)
	for _, c := range []struct {
		at   Lineage // its tip
		want Lineage
	}{
		{line(1, 3), line(1, 3)},
		{line(1, 1), line(1, 1)},
		{line(2, 4), line(1, 3, 2, 4)},
		{line(3, 9), l},
		{line(2, 3), nil}, // the number is an epoch of generation 1
		{line(2, 6), nil},
		{line(3, 10), nil},
		{line(4, 2), nil},
		{nil, nil},
	} {
		got := l.Until(c.at.Tip())
		if !got.Equal(c.want) {
			t.Errorf("%v until %v is %v, want %v", l, c.at.Tip(), got, c.want)
		}
		if r := Compare(got, l); got != nil && (r.Kind == Diverged || r.Common != c.at.Tip()) {
			t.Errorf("%v until %v is %v: %v", l, c.at.Tip(), got, r)
		}
	}
	if !l.Equal(line(1, 3, 2, 5, 3, 9)) {
		t.Errorf("l itself became %v", l)
	}
}
