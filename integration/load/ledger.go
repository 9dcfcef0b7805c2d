// Package load writes to a file system as applications do, remembers outside
// of it what was durable when, and judges what came back by that.
package load

import (
	"fmt"
	"math"
	"sync"
	"time"
)

// Ledger remembers what the writers did and when each
// write was known to be durable. It is what the restored image is judged by.
//
// A key is a place that holds one version at a time: a page, a file's name, a
// record's place in a log. Its versions are written in order, each committed
// (fsync returned) before the next is issued.
type Ledger struct {
	// Begun is the zero of its clock.
	Begun time.Time

	mu        sync.Mutex
	keys      map[string][]version
	committed int
	bytes     int64
}

type version struct {
	issued    time.Duration // since begun: the image may hold it from here on
	committed time.Duration // since begun: the image must hold it from here on; Never, if unknown
}

// Never is the time of what did not happen.
const Never = time.Duration(math.MaxInt64)

// NewLedger begins one.
func NewLedger() *Ledger { return &Ledger{Begun: time.Now(), keys: map[string][]version{}} }

// Now is the time since Begun.
func (l *Ledger) Now() time.Duration { return time.Since(l.Begun) }

// next is the number of the key's next version, from 1.
func (l *Ledger) next(key string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.keys[key]) + 1
}

// issue says that the next version of each key is about to be written.
func (l *Ledger) issue(keys ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.Now()
	for _, key := range keys {
		l.keys[key] = append(l.keys[key], version{issued: now, committed: Never})
	}
}

// commit says that the last version of each key is durable.
func (l *Ledger) commit(bytes int64, keys ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.Now()
	for _, key := range keys {
		l.keys[key][len(l.keys[key])-1].committed = now
	}
	l.committed += len(keys)
	l.bytes += bytes
}

// forget drops a key whose place is about to be given up.
func (l *Ledger) forget(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.keys, key)
}

// Totals is what was made durable so far.
func (l *Ledger) Totals() (records int, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.committed, l.bytes
}

// Moment is the stretch of time in which the image must have been cut.
type Moment struct {
	// After: the latest issue of anything the image holds; Before: the
	// earliest commit of anything it does not hold.
	After, Before       time.Duration
	lastHeld, firstLost string
	Held, Lost          int // committed versions that are, are not in the image
}

// Judge finds when an image was cut, from which version of each key it holds
// (0 or absent: none). An error says that there is no such time: something
// that was durable is missing though later writes are there.
func (l *Ledger) Judge(found map[string]int) (Moment, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := Moment{Before: Never}
	for key, versions := range l.keys {
		held := found[key]
		if held > len(versions) {
			return m, fmt.Errorf("%s holds version %d, but only %d were ever written", key, held, len(versions))
		}
		if held > 0 {
			if v := versions[held-1]; v.issued > m.After {
				m.After, m.lastHeld = v.issued, fmt.Sprintf("%s version %d", key, held)
			}
			m.Held++
		}
		for i, v := range versions[held:] {
			if v.committed == Never {
				continue
			}
			m.Lost++
			if v.committed < m.Before {
				m.Before, m.firstLost = v.committed, fmt.Sprintf("%s version %d", key, held+i+1)
			}
		}
	}
	if m.After >= m.Before {
		return m, fmt.Errorf("no single point in time: the image holds %s, begun at %v, but lacks %s, durable since %v",
			m.lastHeld, m.After, m.firstLost, m.Before)
	}
	return m, nil
}
