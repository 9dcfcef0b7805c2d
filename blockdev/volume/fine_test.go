package volume

import (
	"errors"
	"log/slog"
	"testing"
)

// A wish for an era lasts until a cut that began after it, and is whole, has
// begun one.
func TestRollNextIsNotLost(t *testing.T) {
	v := &Volume{log: slog.New(slog.DiscardHandler)}
	number := uint64(0)
	cut := func(take func(*Cut) error) {
		t.Helper()
		number++
		c, err := v.cutBy(t.Context(), number, false, take)
		if err == nil {
			err = c.Release()
		}
		if err != nil {
			t.Log(err)
		}
	}
	pending := func() bool { return v.rollAsked.Load() != v.rollDone }
	rolled := func(c *Cut) error { c.rolled = true; return nil }

	v.RollNext()
	cut(func(c *Cut) error { c.rolled = true; return errors.New("void") })
	if !pending() {
		t.Error("a void cut takes the wish along")
	}
	cut(func(*Cut) error { return nil })
	if !pending() {
		t.Error("a cut that began no era takes the wish along")
	}
	cut(func(c *Cut) error { v.RollNext(); return rolled(c) })
	if !pending() {
		t.Error("a cut that had begun before takes the wish along")
	}
	cut(rolled)
	if pending() {
		t.Error("the wish was fulfilled, and stands")
	}
}
