package config

import (
	"fmt"
	"sort"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"
)

// What a rate may be, in bytes per second.
const (
	MinRate = 64 * KiB
	MaxRate = 1 * TiB
)

// unlimited is the word for no limit.
const unlimited = "unlimited"

// Rate is how many bytes may be sent to a replica a second, by the time of day.
// A nil Rate is no limit.
type Rate struct{ steps []rateStep }

// rateStep holds from a minute of the day to the next step's; before the day's
// first the last one does.
type rateStep struct {
	minute int
	bytes  int64 // per second; 0: no limit
}

// At is the rate at a time, by that time's own clock, in bytes per second; 0: no
// limit.
func (r *Rate) At(t time.Time) int64 {
	if r == nil {
		return 0
	}
	minute := t.Hour()*60 + t.Minute()
	now := r.steps[len(r.steps)-1]
	for _, s := range r.steps {
		if s.minute <= minute {
			now = s
		}
	}
	return now.bytes
}

// rate reads '50MiB', or {"08:00": 10MiB, "20:00": unlimited}.
func (r *reader) rate(key string, into **Rate, what string) field {
	return field{key, func(n ast.Node) {
		rate := &Rate{}
		*into = rate
		step := func(n ast.Node, minute int) {
			s := rateStep{minute: minute}
			r.text(key, func(text string) error {
				if text == unlimited {
					return nil
				}
				var err error
				if s.bytes, err = ParseSize(text); err != nil {
					return fmt.Errorf("%w, or '%s'", err, unlimited)
				}
				if s.bytes < MinRate || s.bytes > MaxRate {
					return fmt.Errorf("%s a second is not between %s and %s; 'unlimited' is no limit", text, FormatSize(MinRate), FormatSize(MaxRate))
				}
				return nil
			}).set(n)
			rate.steps = append(rate.steps, s)
		}
		if _, times := n.(*ast.MappingNode); !times {
			step(n, 0)
			return
		}
		r.mapping(n, "'"+key+"' of "+what, func(pair *ast.MappingValueNode, name string) bool {
			t, err := time.Parse("15:04", name)
			if err != nil || len(name) != len("15:04") {
				r.fail(pair.Key, "'%s' is not a time of day from \"00:00\" to \"23:59\"", name)
			}
			step(pair.Value, t.Hour()*60+t.Minute())
			return true
		})
		if len(rate.steps) == 0 {
			r.fail(n, "'%s' of %s names no time of day", key, what)
			*into = nil
		}
		sort.SliceStable(rate.steps, func(i, j int) bool { return rate.steps[i].minute < rate.steps[j].minute })
	}}
}

// String is as in a file.
func (r *Rate) String() string {
	if r == nil {
		return unlimited
	}
	var words []string
	for _, s := range r.steps {
		rate := unlimited
		if s.bytes > 0 {
			rate = FormatSize(s.bytes)
		}
		if len(r.steps) == 1 {
			return rate
		}
		words = append(words, fmt.Sprintf("%02d:%02d %s", s.minute/60, s.minute%60, rate))
	}
	return strings.Join(words, ", ")
}
