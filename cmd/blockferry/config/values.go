package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// units of sizes; only binary ones, so that nobody loses 7 % by a letter.
var units = []struct {
	suffix string
	bytes  int64
}{{"KiB", KiB}, {"MiB", MiB}, {"GiB", GiB}, {"TiB", TiB}}

// ParseSize reads '64KiB', '100 GiB', '1.5TiB' or a plain number of bytes.
func ParseSize(text string) (int64, error) {
	s := strings.TrimSpace(text)
	unit := int64(1)
	for _, u := range units {
		if strings.HasSuffix(s, u.suffix) {
			s, unit = strings.TrimSpace(strings.TrimSuffix(s, u.suffix)), u.bytes
			break
		}
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		if n < 0 || n > math.MaxInt64/unit {
			return 0, fmt.Errorf("size '%s' is out of range", text)
		}
		return n * unit, nil
	}
	if f, err := strconv.ParseFloat(s, 64); err == nil && unit > 1 && f >= 0 && f*float64(unit) < math.MaxInt64 {
		return int64(f * float64(unit)), nil
	}
	return 0, fmt.Errorf("'%s' is not a size%s", text, sizeHint(s))
}

// sizeHint guesses what was meant by a unit that is not ours.
func sizeHint(s string) string {
	digits := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
	if digits != "" && digits != s {
		if _, err := strconv.ParseFloat(digits, 64); err == nil {
			rest := strings.TrimSpace(strings.ToUpper(s[len(digits):]))
			for _, u := range units {
				if rest != "" && rest[0] == u.suffix[0] {
					return "; did you mean '" + digits + u.suffix + "'?"
				}
			}
		}
	}
	return "; write it like 64KiB, 512MiB, 100GiB or 2TiB"
}

// FormatSize writes a size the way ParseSize reads it, in the largest unit
// that leaves at most two decimals worth reading.
func FormatSize(bytes int64) string {
	for i := len(units) - 1; i >= 0; i-- {
		if u := units[i]; bytes >= u.bytes {
			if bytes%u.bytes == 0 {
				return strconv.FormatInt(bytes/u.bytes, 10) + u.suffix
			}
			s := strconv.FormatFloat(float64(bytes)/float64(u.bytes), 'f', 2, 64)
			return strings.TrimSuffix(strings.TrimRight(s, "0"), ".") + u.suffix
		}
	}
	return strconv.FormatInt(bytes, 10) + "B"
}

// shortDuration is 1h, not 1h0m0s.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func parseDuration(text string) (time.Duration, error) {
	d, err := time.ParseDuration(strings.TrimSpace(text))
	if err != nil {
		hint := "; write it like 500ms, 1s or 5m"
		if _, bare := strconv.ParseFloat(text, 64); bare == nil {
			hint = "; did you mean '" + text + "s'?"
		}
		return 0, fmt.Errorf("'%s' is not a duration%s", text, hint)
	}
	return d, nil
}
