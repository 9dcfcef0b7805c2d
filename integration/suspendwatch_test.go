package integration

import (
	"slices"
	"sync"
	"testing"
	"time"

	"blockferry/blockdev/dm"
)

// suspendWatch looks at devices over and over and measures how long they are
// seen suspended. A span ends with the first look that finds the device
// running again and began with the last one before it that did: it is never
// measured too short by the clock that counts here, which goes on by at most
// lookAtMost from one look to the next. What is beyond that the watch was not run
// for, and nor was anything else in its guest, which has one CPU. Spans that fall
// between two looks are not seen.
type suspendWatch struct {
	stop, done chan struct{}
	once       sync.Once

	mu    sync.Mutex
	looks int
	spans []time.Duration // that of a device still suspended is the last one
	blind time.Duration   // the longest time without a look
	err   error
}

// lookAtMost is far longer than from one look to the next in a guest that its host runs.
const lookAtMost = 50 * time.Millisecond

// watchSuspends looks until the test ends, or end is called.
func watchSuspends(t *testing.T, devices ...string) *suspendWatch {
	t.Helper()
	ctl, err := dm.Open()
	if err != nil {
		t.Fatal(err)
	}
	w := &suspendWatch{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		defer ctl.Close()
		w.run(ctl, devices)
	}()
	t.Cleanup(w.halt)
	return w
}

func (w *suspendWatch) halt() {
	w.once.Do(func() { close(w.stop) })
	<-w.done
}

func (w *suspendWatch) run(ctl *dm.Control, devices []string) {
	running := make([]time.Duration, len(devices)) // when it was last seen so, by now
	span := make([]int, len(devices))              // its place in spans while suspended, from 1
	last, now := time.Now(), time.Duration(0)
	for {
		select {
		case <-w.stop:
			return
		case <-time.After(2 * time.Millisecond):
		}
		for i, name := range devices {
			info, err := ctl.Info(name)
			w.mu.Lock()
			gap := time.Since(last)
			last = last.Add(gap)
			now += min(gap, lookAtMost)
			w.blind = max(w.blind, gap)
			if info.Suspended && span[i] == 0 {
				w.spans = append(w.spans, 0)
				span[i] = len(w.spans)
			}
			if span[i] > 0 {
				w.spans[span[i]-1] = now - running[i]
			}
			if !info.Suspended {
				span[i], running[i] = 0, now
			}
			w.err = err
			w.mu.Unlock()
			if err != nil {
				return
			}
		}
		w.mu.Lock()
		w.looks++
		w.mu.Unlock()
	}
}

// sorted is how long each suspend seen so far lasted.
func (w *suspendWatch) sorted() []time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(slices.Values(w.spans))
}

func (w *suspendWatch) count() int { return len(w.sorted()) }

func (w *suspendWatch) longest() time.Duration {
	if list := w.sorted(); len(list) > 0 {
		return list[len(list)-1]
	}
	return 0
}

func (w *suspendWatch) median() time.Duration {
	if list := w.sorted(); len(list) > 0 {
		return list[len(list)/2]
	}
	return 0
}

// end stops the watch and fails the test if a device was suspended for longer
// than the limit. A span is longer than the device was suspended by a look at
// either end.
func (w *suspendWatch) end(t *testing.T, limit time.Duration) {
	t.Helper()
	w.halt()
	if w.err != nil {
		t.Fatal(w.err)
	}
	t.Logf("MEASURED %d looks, at most %v apart: suspended %d times, at most %v", w.looks, w.blind.Round(time.Millisecond), w.count(), w.longest().Round(time.Millisecond))
	if w.count() == 0 {
		t.Error("no suspend was seen: this watch proves nothing")
	}
	if w.longest() > limit+2*lookAtMost {
		t.Errorf("a device stayed suspended for %v, want at most %v", w.longest(), limit)
	}
}
