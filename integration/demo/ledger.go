package main

import (
	"fmt"
	"math"
	"sync"
	"time"
)

// ledger remembers, outside the volume, what the writers did and when each
// write was known to be durable. It is what the restored image is judged by.
//
// A key is a place that holds one version at a time: a page, a file's name, a
// record's place in a log. Its versions are written in order, each committed
// (fsync returned) before the next is issued.
type ledger struct {
	begun time.Time

	mu        sync.Mutex
	keys      map[string][]version
	committed int
	bytes     int64
}

type version struct {
	issued    time.Duration // since begun: the image may hold it from here on
	committed time.Duration // since begun: the image must hold it from here on; never, if unknown
}

const never = time.Duration(math.MaxInt64)

func newLedger() *ledger { return &ledger{begun: time.Now(), keys: map[string][]version{}} }

func (l *ledger) now() time.Duration { return time.Since(l.begun) }

// next is the number of the key's next version, from 1.
func (l *ledger) next(key string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.keys[key]) + 1
}

// issue says that the next version of each key is about to be written.
func (l *ledger) issue(keys ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	for _, key := range keys {
		l.keys[key] = append(l.keys[key], version{issued: now, committed: never})
	}
}

// commit says that the last version of each key is durable.
func (l *ledger) commit(bytes int64, keys ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	for _, key := range keys {
		l.keys[key][len(l.keys[key])-1].committed = now
	}
	l.committed += len(keys)
	l.bytes += bytes
}

// forget drops a key whose place is about to be given up.
func (l *ledger) forget(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.keys, key)
}

func (l *ledger) totals() (records int, bytes int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.committed, l.bytes
}

// moment is the stretch of time in which the image must have been cut.
type moment struct {
	// after: the latest issue of anything the image holds; before: the
	// earliest commit of anything it does not hold.
	after, before       time.Duration
	lastHeld, firstLost string
	held, lost          int // committed versions that are, are not in the image
}

// judge finds when an image was cut, from which version of each key it holds
// (0 or absent: none). An error says that there is no such time: something
// that was durable is missing though later writes are there.
func (l *ledger) judge(found map[string]int) (moment, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	m := moment{before: never}
	for key, versions := range l.keys {
		held := found[key]
		if held > len(versions) {
			return m, fmt.Errorf("%s holds version %d, but only %d were ever written", key, held, len(versions))
		}
		if held > 0 {
			if v := versions[held-1]; v.issued > m.after {
				m.after, m.lastHeld = v.issued, fmt.Sprintf("%s version %d", key, held)
			}
			m.held++
		}
		for i, v := range versions[held:] {
			if v.committed == never {
				continue
			}
			m.lost++
			if v.committed < m.before {
				m.before, m.firstLost = v.committed, fmt.Sprintf("%s version %d", key, held+i+1)
			}
		}
	}
	if m.after >= m.before {
		return m, fmt.Errorf("no single point in time: the image holds %s, begun at %v, but lacks %s, durable since %v",
			m.lastHeld, m.after, m.firstLost, m.before)
	}
	return m, nil
}
