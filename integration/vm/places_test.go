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
		p := &places{free: 2}
		var order []string
		for _, c := range []struct {
			name    string
			longest time.Duration
		}{{"first", 1}, {"second", 1}, {"c", 3}, {"e", 2}, {"a", 5}, {"d", 3}, {"f", 1}, {"b", 4}} {
			go func() {
				if err := p.take(t.Context(), c.longest); err != nil {
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
			p.give()
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
		p := &places{free: 1}
		if err := p.take(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		gone, got := make(chan error, 1), make(chan error, 1)
		go func() { gone <- p.take(ctx, 2) }()
		go func() { got <- p.take(t.Context(), 1) }()
		synctest.Wait()
		cancel()
		if err := <-gone; err != context.Canceled {
			t.Errorf("given up: %v", err)
		}
		p.give()
		if err := <-got; err != nil {
			t.Error(err)
		}
		p.give()
		for range 100 {
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			if p.take(ctx, 1) == nil { // there is a place, and it may give up all the same
				p.give()
			}
		}
		if p.free != 1 || len(p.waiting) != 0 {
			t.Errorf("%d free, %d wait", p.free, len(p.waiting))
		}
	})
}
