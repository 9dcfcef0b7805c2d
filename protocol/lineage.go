package protocol

import (
	"fmt"
	"strings"

	"blockferry/proto"
)

// MaxGenerations is how many generations a lineage keeps. Older ones are
// forgotten from the front; a copy that is older than all that is kept is
// then unrelated, and refused.
const MaxGenerations = 128

// Lineage is every generation a copy went through, oldest first, each with
// the last epoch of it that the copy contains. The last point is what the
// copy holds. An empty lineage means 'never held anything'.
//
// Generations are not zero and occur once; epochs grow from point to point.
// Epoch numbers of two copies mean the same cut only as far as their lineages
// agree, so they are compared by Compare and nowhere else.
type Lineage []Position

// Tip is the position the copy holds; the zero Position when there is none.
func (l Lineage) Tip() Position {
	if len(l) == 0 {
		return Position{}
	}
	return l[len(l)-1]
}

// Check says what is wrong with a lineage, nil when it is well formed.
func (l Lineage) Check() error {
	if len(l) > MaxGenerations {
		return fmt.Errorf("lineage has %d generations, at most %d are allowed", len(l), MaxGenerations)
	}
	seen := make(map[Generation]bool, len(l))
	var last uint64
	for i, p := range l {
		switch {
		case p.Generation == Generation{}:
			return fmt.Errorf("lineage point %d has no generation", i)
		case seen[p.Generation]:
			return fmt.Errorf("lineage names generation %x twice", p.Generation[:4])
		case p.Epoch <= last:
			return fmt.Errorf("lineage point %d: epoch %d does not follow %d", i, p.Epoch, last)
		}
		seen[p.Generation] = true
		last = p.Epoch
	}
	return nil
}

// Extend returns the lineage of a copy that went on from l to p: within l's
// last generation, or into a new one. l itself is not changed. p's epoch must
// be larger than l's; Check tells otherwise.
func (l Lineage) Extend(p Position) Lineage {
	keep := l
	if len(keep) > 0 && keep.Tip().Generation == p.Generation {
		keep = keep[:len(keep)-1]
	}
	if len(keep) >= MaxGenerations {
		keep = keep[len(keep)-MaxGenerations+1:]
	}
	out := make(Lineage, 0, len(keep)+1)
	return append(append(out, keep...), p)
}

// Until is the lineage cut back to a position that it contains, which becomes
// its tip: what the copy was when it held just that. It is nil when l does not
// contain the position.
func (l Lineage) Until(at Position) Lineage {
	var before uint64
	for i, p := range l {
		if p.Generation == at.Generation && before < at.Epoch && at.Epoch <= p.Epoch {
			return append(l[:i].Clone(), at)
		}
		before = p.Epoch
	}
	return nil
}

// Clone returns a copy that shares nothing with l.
func (l Lineage) Clone() Lineage { return append(Lineage(nil), l...) }

// Equal reports whether both are the same, point by point.
func (l Lineage) Equal(o Lineage) bool {
	if len(l) != len(o) {
		return false
	}
	for i := range l {
		if l[i] != o[i] {
			return false
		}
	}
	return true
}

// String lists the points, oldest first; of a long lineage only the last four.
func (l Lineage) String() string {
	if len(l) == 0 {
		return "none"
	}
	var b strings.Builder
	show := l
	if len(show) > 4 {
		show = show[len(show)-4:]
		b.WriteString("... ")
	}
	for i, p := range show {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(p.String())
	}
	return b.String()
}

// RelationKind says how one copy stands to another.
type RelationKind int

// The five ways in which two copies can stand to each other.
const (
	Unrelated RelationKind = iota // no common history is known
	Same                          // both hold the same cut
	Ahead                         // the first continues from exactly what the second holds
	Behind                        // the second continues from exactly what the first holds
	Diverged                      // both went on from a common position, each its own way
)

func (k RelationKind) String() string {
	switch k {
	case Same:
		return "same"
	case Ahead:
		return "ahead"
	case Behind:
		return "behind"
	case Diverged:
		return "diverged"
	default:
		return "unrelated"
	}
}

// Relation is what Compare found. Common is the newest position both contain;
// zero when they are unrelated.
type Relation struct {
	Kind   RelationKind
	Common Position
}

func (r Relation) String() string {
	if r.Kind == Diverged {
		return fmt.Sprintf("diverged (common ancestor %v)", r.Common)
	}
	return r.Kind.String()
}

// Compare says how a stands to b. It is total: a lineage that is not well
// formed is unrelated to everything, an empty one to everything but another
// empty one. Compare(b, a) is the mirror image.
//
// Either may have forgotten its oldest generations. So the walk begins at the
// first generation known to both, which must be the oldest one of at least
// one of them: two different pasts before a common generation can't be.
func Compare(a, b Lineage) Relation {
	if len(a) == 0 && len(b) == 0 {
		return Relation{Kind: Same}
	}
	if a.Check() != nil || b.Check() != nil {
		return Relation{}
	}
	i, j := firstShared(a, b)
	if i < 0 || (i > 0 && j > 0) {
		return Relation{}
	}
	var common Position
	for i < len(a) && j < len(b) && a[i] == b[j] {
		common = a[i]
		i++
		j++
	}
	switch {
	case i == len(a) && j == len(b):
		return Relation{Same, common}
	case i == len(a):
		return Relation{Behind, common}
	case j == len(b):
		return Relation{Ahead, common}
	case a[i].Generation != b[j].Generation:
		return Relation{Diverged, common}
	}
	// The same generation, to different epochs: the shorter one is contained
	// in the longer, unless it left that generation for another.
	if a[i].Epoch < b[j].Epoch {
		if i == len(a)-1 {
			return Relation{Behind, a[i]}
		}
		return Relation{Diverged, a[i]}
	}
	if j == len(b)-1 {
		return Relation{Ahead, b[j]}
	}
	return Relation{Diverged, b[j]}
}

// firstShared finds the oldest generation that both name; -1 when there is
// none, or when the two disagree on which comes first.
func firstShared(a, b Lineage) (int, int) {
	inB := make(map[Generation]int, len(b))
	for j, p := range b {
		inB[p.Generation] = j
	}
	for i, p := range a {
		j, ok := inB[p.Generation]
		if !ok {
			continue
		}
		inA := make(map[Generation]bool, len(a))
		for _, q := range a {
			inA[q.Generation] = true
		}
		for _, q := range b[:j] {
			if inA[q.Generation] {
				return -1, -1
			}
		}
		return i, j
	}
	return -1, -1
}

// LineageFromProto reads a lineage off the wire and checks it.
func LineageFromProto(m *proto.Lineage) (Lineage, error) {
	points := m.GetPoints()
	if len(points) > MaxGenerations {
		return nil, fmt.Errorf("lineage has %d generations, at most %d are allowed", len(points), MaxGenerations)
	}
	var l Lineage
	for _, p := range points {
		pos, err := positionFromProto(p)
		if err != nil {
			return nil, err
		}
		l = append(l, pos)
	}
	return l, l.Check()
}

// Proto is the lineage in wire form.
func (l Lineage) Proto() *proto.Lineage {
	m := &proto.Lineage{}
	for _, p := range l {
		m.Points = append(m.Points, p.proto())
	}
	return m
}

func (p Position) proto() *proto.Position {
	return &proto.Position{Generation: append([]byte(nil), p.Generation[:]...), Epoch: p.Epoch}
}

func positionFromProto(m *proto.Position) (Position, error) {
	var p Position
	if len(m.GetGeneration()) != len(p.Generation) {
		return p, fmt.Errorf("a generation has %d bytes, not %d", len(p.Generation), len(m.GetGeneration()))
	}
	copy(p.Generation[:], m.GetGeneration())
	p.Epoch = m.GetEpoch()
	return p, nil
}
