package bpf

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"blockferry/blockdev"
)

const (
	// takenWords is how many words exchanges can take before somebody fetches
	// them; more is named by what is kept, which is too much. 4 MiB each of two.
	takenWords = 1 << 18
	// memoryWords bounds the sets of single cuts, 16 MiB. Older ones are
	// answered from what is kept.
	memoryWords = 1 << 20
	// mostSets bounds their number; beyond it the two oldest become one.
	mostSets = 4096
)

// sealed is what changed after one cut and before another.
type sealed struct {
	after, to uint64
	set       set
}

// coverage knows what changed between which cuts. It works on words in memory
// and knows nothing of where they come from.
//
// What is marked wanders from active, by exchange, to kept and to the open set
// of this process; Seal makes a cut's set of the open one. kept and head
// outlive this process, the sets do not: it then answers from kept.
type coverage struct {
	active, kept marks
	head         header
	grain        int64 // bytes
	length       int64 // of the volume, in bytes
	limit        int   // memoryWords
	mostSets     int

	// exchanging guards log and what moves from active to kept. It is held for
	// microseconds, as an exchange in a window waits for it.
	exchanging sync.Mutex
	log        *takenLog
	step       func() // of tests; see exchange

	// mu guards the rest. It is taken before exchanging.
	mu        sync.Mutex
	spare     *takenLog
	taken     set    // by the last exchange
	takenRest uint32 // and all that is kept from here on
	open      set    // since the last cut
	// wide says that the open set is all that is kept: what this process knows
	// of it is not all, or too much to hold.
	wide bool
	// covered: first to last. Sets of cuts after from are in sets, all of them.
	covered           bool
	first, last, from uint64
	sets              []sealed
	held              int    // words in sets and open
	reason            string // why it is not covered
}

// newCoverage works on maps that may hold anything; what they hold counts as
// changed before the first cut.
func newCoverage(active, kept marks, head header, grain, length int64, room int) *coverage {
	return &coverage{active: active, kept: kept, head: head, grain: grain, length: length, limit: memoryWords, mostSets: mostSets,
		log: newTakenLog(room), spare: newTakenLog(room), takenRest: noRest, reason: "no cut was sealed since tracking began"}
}

// adopt goes on from what the header says. The caller has checked that it is of
// this volume and that nothing was lost.
func (c *coverage) adopt() {
	c.active.mend()
	c.kept.mend()
	c.covered = true
	c.first, c.last = c.head.get(headFirst), c.head.get(headLast)
	c.from = c.last
	c.wide = c.head.get(headOpen) != 0
}

func (c *coverage) exchange() {
	c.exchanging.Lock()
	defer c.exchanging.Unlock()
	visible(c.step)
	c.head.put(headOpen, 1)
	exchange(c.active, c.kept, c.log, c.step)
}

// fold fetches what exchanges took into the open set; it says whether there was
// an exchange. mu is held.
func (c *coverage) fold() bool {
	c.exchanging.Lock()
	log := c.log
	if !log.exchanged {
		c.exchanging.Unlock()
		return false
	}
	c.spare.reset()
	c.log, c.spare = c.spare, log
	c.exchanging.Unlock()

	all := make([]entry, log.used)
	for i := range all {
		all[i] = entry{log.index[i], log.word[i]}
	}
	c.taken, c.takenRest = append(set(nil), all[log.last:]...), log.lastRest
	if log.rest != noRest {
		c.widen()
	}
	if c.wide {
		return true
	}
	c.held -= len(c.open)
	c.open = union(c.open, normal(all))
	c.held += len(c.open)
	c.bound()
	return true
}

// widen makes the open set all that is kept.
func (c *coverage) widen() {
	c.held -= len(c.open)
	c.open, c.wide = nil, true
}

// bound forgets the oldest sets, whose cuts are then answered from kept, until
// the others fit.
func (c *coverage) bound() {
	for c.held > c.limit && len(c.sets) > 0 {
		c.held -= len(c.sets[0].set)
		c.from = c.sets[0].to
		c.sets = c.sets[1:]
	}
	if c.held > c.limit {
		c.widen()
	}
	if len(c.sets) > c.mostSets {
		a, b := c.sets[0], c.sets[1]
		c.sets = c.sets[1:]
		c.sets[0] = sealed{a.after, b.to, union(a.set, b.set)}
		c.held += len(c.sets[0].set) - len(a.set) - len(b.set)
	}
}

// lastTaken is what the last exchange took.
func (c *coverage) lastTaken() []blockdev.Extent {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fold()
	return c.extents(c.taken, c.takenRest)
}

// appendTaken is lastTaken without allocating, and without mu, which whoever
// forgets holds for long.
func (c *coverage) appendTaken(list []blockdev.Extent) ([]blockdev.Extent, bool) {
	x := extents{list: list, grain: c.grain, length: c.length, bounded: true}
	c.exchanging.Lock()
	defer c.exchanging.Unlock()
	log := c.log
	if !log.exchanged {
		log = c.spare // somebody has fetched it, and it is as it was
	}
	if !log.exchanged || log.lastRest != noRest {
		return list, false
	}
	for i := log.last; i < log.used; i++ {
		x.add(log.index[i], log.word[i])
	}
	return x.list, !x.full
}

// extents are a set's, and all that is kept from a word on.
func (c *coverage) extents(s set, rest uint32) []blockdev.Extent {
	x := extents{grain: c.grain, length: c.length}
	for _, e := range s {
		x.add(e.index, e.word)
	}
	if rest != noRest {
		c.kept.eachFrom(rest, x.add)
	}
	return x.list
}

// seal ends the open set at a cut, the first one begins the coverage. The caller
// has checked that nothing was lost; keep writes what he knows then to the header,
// before it says that the cut is sealed.
func (c *coverage) seal(number uint64, keep func(header)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fold()
	begins := !c.covered
	switch {
	case begins:
		c.head.put(headFirst, number)
		c.sets, c.from, c.first, c.covered, c.reason = nil, number, number, true, ""
	case number <= c.last:
		return fmt.Errorf("cut %d comes after cut %d: its number must be higher", number, c.last)
	case c.wide:
		c.sets, c.from = nil, number
	default:
		c.sets = append(c.sets, sealed{c.last, number, c.open})
	}
	if begins || c.wide {
		c.held = 0
	}
	c.last, c.open, c.wide = number, nil, false
	c.bound()
	visible(c.step)
	keep(c.head)
	visible(c.step)
	c.head.put(headLast, number)
	c.exchanging.Lock()
	if !c.log.exchanged {
		visible(c.step)
		c.head.put(headOpen, 0)
	}
	c.exchanging.Unlock()
	if begins {
		visible(c.step)
		c.head.put(headState, stateCovered)
		c.prune()
	}
	return nil
}

// end ends the coverage; the next seal begins another.
func (c *coverage) end(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.head.put(headState, stateBare)
	c.head.setReason(reason)
	c.covered, c.reason, c.sets = false, reason, nil
	c.held = len(c.open)
}

func (c *coverage) bounds() (first, last uint64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.first, c.last, c.covered
}

func (c *coverage) changed(since, upTo uint64) ([]blockdev.Extent, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	no := func(format string, args ...any) ([]blockdev.Extent, error) {
		return nil, fmt.Errorf("%w: what changed between cuts %d and %d: %s", ErrUncovered, since, upTo, fmt.Sprintf(format, args...))
	}
	switch {
	case since > upTo:
		return nil, fmt.Errorf("what changed between cuts %d and %d: the first comes after the second", since, upTo)
	case !c.covered:
		return no("%s", c.reason)
	case since < c.first:
		return no("the coverage begins at cut %d", c.first)
	case upTo > c.last:
		return no("the last cut is %d", c.last)
	case since == upTo:
		return nil, nil
	}
	if since < c.from {
		return c.extents(nil, 0), nil
	}
	var all []entry
	for _, s := range c.sets {
		if s.to > since && s.after < upTo {
			all = append(all, s.set...)
		}
	}
	return c.extents(normal(all), noRest), nil
}

// exact says whether changed names nothing that did not change between the two:
// what is kept and sets of several cuts may name more.
func (c *coverage) exact(since, upTo uint64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.covered || since < c.first || since < c.from || upTo > c.last {
		return false
	}
	for _, s := range c.sets {
		if s.after < since && since < s.to || s.after < upTo && upTo < s.to {
			return false
		}
	}
	return true
}

// forget moves the coverage's begin to a cut: first in the header, then what is
// kept for nothing else goes.
func (c *coverage) forget(upTo uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if upTo = min(upTo, c.last); !c.covered || upTo <= c.first {
		return
	}
	c.first = upTo
	visible(c.step)
	c.head.put(headFirst, upTo)
	for len(c.sets) > 0 && c.sets[0].to <= upTo {
		c.held -= len(c.sets[0].set)
		c.sets = c.sets[1:]
	}
	c.from = max(c.from, upTo)
	c.prune()
}

// prune takes out of kept what no answer needs any more. It can only when all
// answers are known here. mu is held.
func (c *coverage) prune() {
	c.fold()
	if c.from > c.first || c.wide {
		return
	}
	needed := c.needed()
	for s := 0; s < len(c.kept.lines); {
		if c.kept.line(s) == 0 {
			s++
			continue
		}
		if c.fold() {
			if c.wide {
				return
			}
			needed = c.needed()
		}
		c.exchanging.Lock()
		if !c.log.exchanged {
			c.pruneLines(s, needed)
			s++
		}
		c.exchanging.Unlock()
	}
}

// needed is all that is in a set.
func (c *coverage) needed() set {
	all := append([]entry(nil), c.open...)
	for _, s := range c.sets {
		all = append(all, s.set...)
	}
	return normal(all)
}

// pruneLines does it for the lines of one word of the summary. Nobody exchanges
// meanwhile.
func (c *coverage) pruneLines(s int, needed set) {
	for lines := c.kept.line(s); lines != 0; lines &= lines - 1 {
		line := bits.TrailingZeros64(lines)
		first := (s*wordBits + line) * lineWords
		var left uint64
		for i := first; i < first+lineWords; i++ {
			kept := atomic.LoadUint64(&c.kept.words[i])
			if kept == 0 {
				continue
			}
			word := needed.word(uint32(i))
			left |= word
			if kept&^word != 0 {
				visible(c.step)
				atomic.AndUint64(&c.kept.words[i], word)
			}
		}
		if left == 0 {
			visible(c.step)
			atomic.AndUint64(&c.kept.lines[s], ^uint64(1<<line))
		}
	}
}
