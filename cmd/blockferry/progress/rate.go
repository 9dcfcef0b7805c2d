package progress

import "time"

const (
	rateOver     = 10 * time.Second
	maxRateMarks = 64
)

// Rate is how fast something went over the last ten seconds. Not for several
// goroutines.
type Rate struct{ marks []mark }

// mark is what was done at a moment, in bytes.
type mark struct {
	at    time.Time
	bytes int64
}

// Mark notes how much was done by now. It remembers enough of the past for a
// rate over the last seconds; less than before means that it began again.
func (r *Rate) Mark(now time.Time, bytes int64) {
	if n := len(r.marks); n > 0 && bytes < r.marks[n-1].bytes {
		r.marks = r.marks[:0]
	}
	if n := len(r.marks); n > 1 && now.Sub(r.marks[n-2].at) < rateOver/maxRateMarks {
		r.marks = r.marks[:n-1]
	}
	r.marks = append(r.marks, mark{now, bytes})
	for len(r.marks) > 2 && now.Sub(r.marks[1].at) >= rateOver {
		r.marks = r.marks[1:]
	}
}

// PerSecond is in bytes, 0 when not known.
func (r *Rate) PerSecond() int64 {
	if len(r.marks) == 0 {
		return 0
	}
	first, last := r.marks[0], r.marks[len(r.marks)-1]
	span := last.at.Sub(first.at).Seconds()
	if span <= 0 {
		return 0
	}
	return int64(float64(last.bytes-first.bytes) / span)
}
