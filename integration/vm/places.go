package vm

import (
	"context"
	"slices"
	"sync"
	"time"
)

// places is how many guests may run at once. It may be used from several
// goroutines.
type places struct {
	all     int
	mu      sync.Mutex
	free    int
	waiting []*waiter // the next one first
}

type waiter struct {
	longest time.Duration
	need    int
	turn    chan struct{} // closed when the places are its own
}

func newPlaces(all int) *places {
	all = max(all, 1)
	return &places{all: all, free: all}
}

// take waits for places, no more than there are in all: it gets them at once, so that no
// two have half of what they need. Of those that wait the one that may take longest is the
// next, since whatever is long and begins last is waited for alone. An error is
// the context's, and then there is nothing to give.
func (p *places) take(ctx context.Context, longest time.Duration, need int) error {
	w := &waiter{longest: longest, need: need, turn: make(chan struct{})}
	p.mu.Lock()
	at := slices.IndexFunc(p.waiting, func(other *waiter) bool { return other.longest < longest })
	if at < 0 {
		at = len(p.waiting)
	}
	p.waiting = slices.Insert(p.waiting, at, w)
	p.next()
	p.mu.Unlock()
	select {
	case <-w.turn:
		return nil
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if at := slices.Index(p.waiting, w); at >= 0 {
		p.waiting = slices.Delete(p.waiting, at, at+1)
	} else {
		p.free += need // its turn came meanwhile
	}
	p.next()
	return ctx.Err()
}

// give ends what a take that succeeded began.
func (p *places) give(taken int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.free += taken
	p.next()
}

// next hands out what is free, to one after another: who needs many would wait for ever
// behind those that need one. The caller holds mu.
func (p *places) next() {
	for len(p.waiting) > 0 && p.free >= p.waiting[0].need {
		p.free -= p.waiting[0].need
		close(p.waiting[0].turn)
		p.waiting = p.waiting[1:]
	}
}
