package precopy

import (
	"errors"
	"testing"
)

// When writes completed unseen, what the rounds have read is read again: of a write
// that had begun before a round, and completes after its read, there is no mark
// to tell.
func TestRoundsBeginAnew(t *testing.T) {
	for lost := range maxAnew + 2 {
		e, d, m, g := prepared(t, Options{Rounds: 2}, 8<<20)
		base := make([]byte, d.Size())
		if _, err := d.ReadAt(base, 0); err != nil {
			t.Fatal(err)
		}
		m.mark(5*block, block)
		calls := uint64(0)
		g.prepare = func() {
			if calls++; calls == 2 { // round 1 has read it
				d.write(5*block, block, 99)
			}
		}
		m.unseen = lost
		if lost == 0 {
			g.prepare()
			g.prepare()
		}
		c, err := e.Cut(t.Context(), Request{Number: 2, Since: 1, Force: true}, g)
		if lost > maxAnew {
			if !errors.Is(err, errAnew) || g.stops != maxAnew+1 {
				t.Errorf("completions were lost each time: %v after %d stops", err, g.stops)
			}
			m.unseen = 0
			if c, err = e.Cut(t.Context(), Request{Number: 3, Since: 1, Force: true}, g); err != nil {
				t.Fatal(err)
			}
		} else if err != nil || g.stops != lost+1 {
			t.Fatalf("lost %d times: %v after %d stops", lost, err, g.stops)
		}
		check(t, c, g.image, base)
		if err := c.Release(); err != nil {
			t.Fatal(err)
		}
	}
}

// A cut without an image stops writers only where nothing is known otherwise.
func TestMarkStopsIfNeeded(t *testing.T) {
	e, _, m, g := prepared(t, Options{}, 8<<20)
	if g.stops != 0 {
		t.Errorf("writers were stopped %d times", g.stops)
	}
	m.unsettled = true
	g.draining = func() { m.mark(3*block, block) }
	if _, err := e.Mark(t.Context(), 2, g); err != nil || g.stops != 1 {
		t.Errorf("%v, %d stops, want one", err, g.stops)
	}
	if list, err := m.Changed(1, 2); err != nil || len(list) != 1 || list[0].Offset != 3*block {
		t.Errorf("what was written until then: %v, %v", list, err)
	}
	g.fail = errors.New("not today")
	if _, err := e.Mark(t.Context(), 3, g); !errors.Is(err, g.fail) {
		t.Errorf("a stop that failed: %v", err)
	}
	if _, last, _ := m.Covered(); last != 2 {
		t.Errorf("sealed to %d", last)
	}
}
