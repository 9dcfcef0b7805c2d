package volume

import (
	"errors"
	"log/slog"
	"testing"
	"time"
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
	// Asked as by a cut of a volume that is tracked finely, and had an era a moment ago.
	v.options.RollEvery = time.Hour
	pending := func() bool {
		v.fine = &fineTracker{covered: true, rolled: time.Now()}
		defer func() { v.fine = nil }()
		return v.rollNow()
	}
	if pending() {
		t.Error("nobody wished for an era")
	}
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
