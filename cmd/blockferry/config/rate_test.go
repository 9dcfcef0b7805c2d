package config

import (
	"strings"
	"testing"
	"time"
)

// parseRate reads a volume whose far replica has a rate.
func parseRate(t *testing.T, rate string) (*Rate, error) {
	t.Helper()
	c, err := Parse("x", []byte("node: {name: a}\nvolumes:\n  data:\n    device: /dev/a\n    replicas:\n      far: {address: \"unix:/x\", peer: b, rate: "+rate+"}\n"))
	if err != nil {
		return nil, err
	}
	return c.Volumes[0].Replicas[0].Rate, nil
}

func TestRateByTimeOfDay(t *testing.T) {
	for _, c := range []struct {
		rate string
		at   map[string]int64
	}{
		{"50MiB", map[string]int64{"00:00": 50 * MiB, "23:59": 50 * MiB}},
		{"unlimited", map[string]int64{"12:00": 0}},
		{`{"20:00": unlimited, "08:00": 10MiB}`, map[string]int64{"00:00": 0, "07:59": 0, "08:00": 10 * MiB, "19:59": 10 * MiB, "20:00": 0, "23:59": 0}},
		{`{"06:30": 1MiB, "22:00": 3MiB, "06:31": 2MiB}`, map[string]int64{"06:29": 3 * MiB, "06:30": MiB, "06:31": 2 * MiB, "21:59": 2 * MiB, "22:00": 3 * MiB}},
	} {
		r, err := parseRate(t, c.rate)
		if err != nil {
			t.Errorf("%s: %v", c.rate, err)
			continue
		}
		for at, want := range c.at {
			when, _ := time.Parse("15:04", at)
			if got := r.At(when.Add(59 * time.Second)); got != want {
				t.Errorf("%s at %s: %d bytes a second, want %d", c.rate, at, got, want)
			}
		}
	}
	if (*Rate)(nil).At(time.Now()) != 0 {
		t.Error("no rate is a limit")
	}
}

func TestRateRefused(t *testing.T) {
	for rate, want := range map[string]string{
		"fast": "not a size", "1KiB": "not between 64KiB and 1TiB", "0": "'unlimited' is no limit", "50MB": "did you mean '50MiB'", "{}": "names no time",
		`{"8": 1MiB}`: "not a time of day", `{"24:00": 1MiB}`: "not a time of day", `{"8:00": 1MiB}`: "not a time of day", `{"08:00": [1MiB]}`: "plain value",
		`[1MiB]`: "plain value", `{"08:00": 1MiB, "08:00": 2MiB}`: "already defined",
	} {
		if r, err := parseRate(t, rate); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, %v; want '%s'", rate, r, err, want)
		}
	}
}
