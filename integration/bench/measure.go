package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"
)

// goal is what a row should reach.
type goal struct {
	AtLeast float64 `json:"at-least,omitempty"`
	AtMost  float64 `json:"at-most,omitempty"`
}

func (g *goal) String() string {
	switch {
	case g == nil:
		return ""
	case g.AtLeast > 0:
		return "at least " + short(g.AtLeast)
	}
	return "at most " + short(g.AtMost)
}

func (g *goal) met(x float64) bool {
	return g == nil || x >= g.AtLeast && (g.AtMost == 0 || x <= g.AtMost)
}

// row is one number with what it was made from.
type row struct {
	Name string `json:"name"`
	// What says in words what the number is.
	What string `json:"what"`
	// Unit is that of Ours and Theirs, and of the number itself if there is no
	// other side.
	Unit   string    `json:"unit"`
	Ours   []float64 `json:"ours"`             // in the order of the runs
	Theirs []float64 `json:"theirs,omitempty"` // likewise; each beside its pair
	Values []float64 `json:"values"`           // the ratio of each pair, or Ours
	Median float64   `json:"median"`
	Goal   *goal     `json:"goal,omitempty"`
	// Inverse: the ratio is theirs/ours, not ours/theirs.
	Inverse bool `json:"inverse,omitempty"`
}

func (r *row) String() string {
	unit := ""
	if r.Theirs == nil {
		unit = " " + r.Unit
	}
	text := fmt.Sprintf("%s: %s%s (median of %d, from %s to %s)", r.Name, short(r.Median), unit, len(r.Values),
		short(slices.Min(r.Values)), short(slices.Max(r.Values)))
	if r.Goal != nil {
		text += ", wanted " + r.Goal.String()
		if !r.Goal.met(r.Median) {
			text += ", MISSED"
		}
	}
	return text + ": " + r.What
}

// short writes a number with three digits that count, and no exponent.
func short(x float64) string {
	digits := 2
	switch a := math.Abs(x); {
	case a >= 100:
		digits = 0
	case a >= 10:
		digits = 1
	case a > 0 && a < 1:
		digits = min(6, 2-int(math.Floor(math.Log10(a))))
	}
	return strconv.FormatFloat(x, 'f', digits, 64)
}

// result is a figure that was measured.
type result struct {
	Figure      string         `json:"figure"`
	About       string         `json:"about"`
	Quick       bool           `json:"quick"`
	Date        string         `json:"date"`
	TookSeconds float64        `json:"took-seconds"`
	GuestKernel string         `json:"guest-kernel"`
	Native      bool           `json:"native,omitempty"`    // that kernel is this machine's
	Debian      bool           `json:"debian,omitempty"`    // the guest's kernel is Debian's own, under an emulator
	HostLoad    float64        `json:"host-load,omitempty"` // processes that wanted to run in the minute before it
	Rows        []row          `json:"rows"`
	Extra       map[string]any `json:"extra,omitempty"`
}

// check refuses what is no measurement.
func (r *result) check() error {
	if len(r.Rows) == 0 {
		return errors.New("nothing was measured")
	}
	for _, row := range r.Rows {
		for _, v := range append(slices.Clone(row.Values), row.Median) {
			if math.IsNaN(v) || math.IsInf(v, 0) || v < 0 {
				return fmt.Errorf("%s: no number: ours %v, theirs %v", row.Name, row.Ours, row.Theirs)
			}
		}
	}
	return nil
}

// measured collects a figure's rows.
type measured struct{ result }

// runs is how often something is measured.
func (m *measured) runs(full, quick int) int {
	switch {
	case once:
		return min(quick, 1)
	case m.Quick:
		return quick
	}
	return full
}

// lasting is how long a run takes.
func (m *measured) lasting(full, quick time.Duration) time.Duration {
	switch {
	case once:
		return min(quick, 500*time.Millisecond)
	case m.Quick:
		return quick
	}
	return full
}

// side measures one side once.
type side func(ctx context.Context) (float64, error)

// pairs measures both sides count times, in either order: what comes second
// may find warmer caches. The row's Ours and Theirs are filled in.
func (m *measured) pairs(ctx context.Context, r row, count int, ours, theirs side) error {
	for n := range count {
		order := []side{ours, theirs}
		into := []*[]float64{&r.Ours, &r.Theirs}
		if n%2 == 1 {
			slices.Reverse(order)
			slices.Reverse(into)
		}
		for i, measure := range order {
			x, err := measure(ctx)
			if err != nil {
				return fmt.Errorf("%s, pair %d: %w", r.Name, n+1, err)
			}
			*into[i] = append(*into[i], x)
		}
		fmt.Printf("%s, pair %d of %d: %s and %s %s\n", r.Name, n+1, count, short(r.Ours[n]), short(r.Theirs[n]), r.Unit)
	}
	m.add(r)
	return nil
}

// add completes a row whose Ours, and Theirs if there is another side, are
// known.
func (m *measured) add(r row) {
	r.Values = nil
	for i, x := range r.Ours {
		switch {
		case r.Theirs == nil:
		case r.Inverse:
			x = r.Theirs[i] / x
		default:
			x /= r.Theirs[i]
		}
		r.Values = append(r.Values, x)
	}
	r.Median = percentile(r.Values, 50)
	if r.Goal == nil {
		r.Goal = goalOf(m.Figure, r.Name)
	}
	m.Rows = append(m.Rows, r)
}

func (m *measured) note(key string, value any) {
	if m.Extra == nil {
		m.Extra = map[string]any{}
	}
	m.Extra[key] = value
}

// percentile of unordered values; the 50th is the median. NaN of none.
func percentile(values []float64, p float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	at := p / 100 * float64(len(sorted)-1)
	low := int(at)
	high := min(low+1, len(sorted)-1)
	return sorted[low] + (at-float64(low))*(sorted[high]-sorted[low])
}
