package vm

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// Whoever may take longest is the next, and of two alike the one that came first.
func TestPlacesLongestFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(2)
		var order []string
		for _, c := range []struct {
			name    string
			longest time.Duration
		}{{"first", 1}, {"second", 1}, {"c", 3}, {"e", 2}, {"a", 5}, {"d", 3}, {"f", 1}, {"b", 4}} {
			go func() {
				if err := p.take(t.Context(), c.longest, 1); err != nil {
					t.Error(err)
				}
				order = append(order, c.name)
			}()
			synctest.Wait()
		}
		if !slices.Equal(order, []string{"first", "second"}) {
			t.Fatalf("at once: %v", order)
		}
		for range 6 {
			p.give(1)
			synctest.Wait()
		}
		if got := order[2:]; !slices.Equal(got, []string{"a", "b", "c", "d", "e", "f"}) {
			t.Errorf("in turn: %v", got)
		}
	})
}

// Who gives up waiting neither keeps a place nor takes one from others, also when
// its turn came at the same moment.
func TestPlacesGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(1)
		if err := p.take(t.Context(), 1, 1); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		gone, got := make(chan error, 1), make(chan error, 1)
		go func() { gone <- p.take(ctx, 2, 1) }()
		go func() { got <- p.take(t.Context(), 1, 1) }()
		synctest.Wait()
		cancel()
		if err := <-gone; err != context.Canceled {
			t.Errorf("given up: %v", err)
		}
		p.give(1)
		if err := <-got; err != nil {
			t.Error(err)
		}
		p.give(1)
		for range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if p.take(ctx, 1, 1) == nil { // there is a place, and it may give up all the same
				p.give(1)
			}
		}
		if p.free != 1 || len(p.waiting) != 0 {
			t.Errorf("%d free, %d wait", p.free, len(p.waiting))
		}
	})
}

// A set of guests gets all its places at once, before those that came later and need fewer;
// one that gives up is not waited for.
func TestPlacesForASet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlaces(2)
		var order []string
		take := func(ctx context.Context, name string, need int) {
			go func() {
				if p.take(ctx, 1, need) == nil {
					order = append(order, name)
				}
			}()
			synctest.Wait()
		}
		take(t.Context(), "one", 1)
		take(t.Context(), "set", 2)
		take(t.Context(), "later", 1)
		if !slices.Equal(order, []string{"one"}) {
			t.Fatalf("at once: %v", order)
		}
		p.give(1)
		synctest.Wait()
		if !slices.Equal(order, []string{"one", "set"}) {
			t.Fatalf("both places free: %v", order)
		}
		ctx, cancel := context.WithCancel(t.Context())
		p.give(2)
		synctest.Wait()
		take(ctx, "second set", 2)
		take(t.Context(), "last", 1)
		if !slices.Equal(order, []string{"one", "set", "later"}) {
			t.Fatalf("a set waits for one: %v", order)
		}
		cancel()
		synctest.Wait()
		if !slices.Equal(order, []string{"one", "set", "later", "last"}) || p.free != 0 {
			t.Errorf("a set gave up: %v, %d free", order, p.free)
		}
	})
}
