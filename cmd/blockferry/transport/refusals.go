package transport

import (
	"sync"
	"time"
)

const (
	// againAfter is how long the same refusal is not logged again.
	againAfter = time.Hour
	// maxRefusals is how many are remembered, and maxLines how many are logged
	// in lineWindow, whatever they are.
	maxRefusals = 128
	maxLines    = 30
	lineWindow  = time.Minute
)

// refusals remembers what was logged, so that whoever tries again and again
// fills neither log nor memory.
type refusals struct {
	mu     sync.Mutex
	known  map[string]*refusal
	window time.Time
	lines  int
}

type refusal struct {
	logged time.Time
	since  int // not logged since
}

// note says whether a refusal is to be logged, and how often it was not since it
// was the last time.
func (r *refusals) note(who, why string, now time.Time) (since int, log bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.known == nil {
		r.known = map[string]*refusal{}
	}
	key := who + "\x00" + why
	known := r.known[key]
	if known != nil && now.Sub(known.logged) < againAfter {
		known.since++
		return 0, false
	}
	if now.Sub(r.window) >= lineWindow {
		r.window, r.lines = now, 0
	}
	if r.lines >= maxLines {
		if known != nil {
			known.since++
		}
		return 0, false
	}
	r.lines++
	if known == nil {
		r.makeRoom()
		known = &refusal{}
		r.known[key] = known
	}
	since, known.logged, known.since = known.since, now, 0
	return since, true
}

// makeRoom forgets the one that was logged longest ago; mu is held.
func (r *refusals) makeRoom() {
	if len(r.known) < maxRefusals {
		return
	}
	oldest := ""
	for key, one := range r.known {
		if oldest == "" || one.logged.Before(r.known[oldest].logged) {
			oldest = key
		}
	}
	delete(r.known, oldest)
}
