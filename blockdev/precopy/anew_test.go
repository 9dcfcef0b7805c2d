package precopy

import (
	"context"
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
			much := &TooMuchError{}
			if !errors.As(err, &much) || much.Reason != ReasonUnseen || !errors.Is(err, ErrTooMuch) || g.stops != maxAnew+1 {
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
	if m.unheld != 0 {
		t.Error("a stop that held was taken back")
	}
}

// Where a stop does not hold, what it concluded is taken back. A coverage is kept
// for the next; it ends when none holds, as long as the tracker then can begin
// another with writes going on.
func TestMarkWithoutAStop(t *testing.T) {
	fail := errors.New("not today")
	for _, c := range []struct {
		name           string
		covered, blind bool
		late           bool
		tries          int // until it is sealed, 0: never
	}{
		{"nothing to keep", false, false, false, 1},
		{"nothing to keep, late", false, false, true, 1},
		{"covered", true, false, false, maxStops},
		{"covered, late", true, false, true, maxStops},
		{"told by stops only", true, true, false, 0},
		{"nothing to keep, told by stops only", false, true, true, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			e, _, m, g := prepared(t, Options{}, 8<<20)
			number := uint64(2)
			mark := func() error {
				number++
				_, err := e.Mark(t.Context(), number, g)
				return err
			}
			ready := func() {
				g.fail, g.late, m.unsettled, m.blind, m.unheld = fail, nil, true, c.blind, 0
				if c.late {
					g.fail, g.late = nil, fail
				}
				if !c.covered {
					m.first = 0
				}
			}
			for range 2 {
				ready()
				first, gone := m.newest, c.tries-1
				if c.tries == 0 {
					gone = 2 * maxStops
				}
				g.untried = c.covered // does not count
				for try := 0; g.untried && try < maxStops; try++ {
					if err := mark(); !errors.Is(err, ErrUntried) || m.newest != first {
						t.Fatalf("not tried: %v, sealed to %d", err, m.newest)
					}
				}
				g.untried = false
				for try := range gone {
					if err := mark(); !errors.Is(err, fail) || m.newest != first {
						t.Fatalf("try %d: %v, sealed to %d", try, err, m.newest)
					}
				}
				want := gone
				if c.tries > 0 {
					want++
					m.lost = errUncovered // as it is when nothing else tells
					// It says both.
					if err := mark(); !errors.Is(err, errUncovered) || !errors.Is(err, fail) || m.newest != number {
						t.Fatalf("the last try: %v, sealed to %d", err, m.newest)
					}
				}
				if !c.late {
					want = 0
				}
				if m.unheld != want {
					t.Errorf("%d stops were taken back, want %d", m.unheld, want)
				}
				m.unsettled, m.blind, g.fail, g.late = false, false, nil, nil
				if err := mark(); err != nil || m.newest != number {
					t.Fatalf("afterwards: %v", err)
				}
			}
			// Who gave up did not ask for that.
			ready()
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			newest := m.newest
			for range maxStops {
				number++
				if _, err := e.Mark(ctx, number, g); !errors.Is(err, fail) || m.newest != newest {
					t.Fatalf("given up: %v, sealed to %d", err, m.newest)
				}
			}
		})
	}
}

// A stop of a cut that did not hold is taken back too; one after which the rounds
// begin anew is not: what it concluded is what they go on from.
func TestStopsTakenBack(t *testing.T) {
	e, _, m, g := prepared(t, Options{}, 8<<20)
	g.late = errors.New("not today")
	if _, err := e.Cut(t.Context(), Request{Number: 3, Since: 1}, g); !errors.Is(err, g.late) || m.unheld != 1 {
		t.Fatalf("%v, %d stops were taken back", err, m.unheld)
	}
	g.late, m.unseen = nil, 1
	c, err := e.Cut(t.Context(), Request{Number: 4, Since: 1}, g)
	if err != nil || m.unheld != 1 {
		t.Fatalf("%v, %d stops were taken back", err, m.unheld)
	}
	if err := c.Release(); err != nil {
		t.Fatal(err)
	}
}
