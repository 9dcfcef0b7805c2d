package bpf

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"blockferry/blockdev"
)

// world is maps in memory, a kernel that marks in them, and a record of what
// really changed when. Its process can be killed between any two operations
// that others can see.
type world struct {
	t      *testing.T
	rng    *rand.Rand
	grains int64
	pool   []int64 // grains that are written
	active marks
	kept   marks
	head   header
	c      *coverage

	half    []int64   // marked, their line not yet
	between [][]int64 // changed between one cut and the next; index is the later one's place in cuts
	cuts    []uint64  // sealed ones
	now     []int64   // changed since the last
	room    int       // of what exchanges take; if it is small, more is named
	killAt  int       // steps from now, < 0 never

	fetched map[int64]bool // what exchanges took since the last cut
	whole   bool           // all of it
}

type killed struct{}

const worldGrain = 4096

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 7)), grains: 40000, killAt: -1}
	for range 12 {
		first := w.rng.Int64N(w.grains - 3)
		w.pool = append(w.pool, first, first+1, first+2)
	}
	w.pool = append(w.pool, w.grains-1)
	w.fresh()
	return w
}

// fresh makes new maps, as an Open that begins anew.
func (w *world) fresh() {
	w.active = marksOn(make([]uint64, markMemory(w.grains)), w.grains)
	w.kept = marksOn(make([]uint64, markMemory(w.grains)), w.grains)
	w.head = make(header, headerWords)
	w.head.put(headState, stateBare)
	w.half, w.cuts, w.between, w.now = nil, nil, nil, nil
	w.start()
}

// start is a process that begins to work on the maps.
func (w *world) start() {
	w.room = []int{2, 5, 1 << 10}[w.rng.IntN(3)]
	w.c = newCoverage(w.active, w.kept, w.head, worldGrain, w.grains*worldGrain-512, w.room)
	w.c.limit = []int{3, 10, 1 << 20}[w.rng.IntN(3)]
	w.c.mostSets = []int{2, mostSets}[w.rng.IntN(2)]
	w.c.step = w.step
	w.killAt, w.fetched, w.whole = -1, map[int64]bool{}, false
}

func (w *world) step() {
	if w.rng.IntN(3) == 0 {
		w.write()
	}
	if w.killAt == 0 {
		panic(killed{})
	}
	w.killAt--
}

// write changes a grain, by the kernel's two steps; the second may come later.
func (w *world) write() {
	grain := w.pool[w.rng.IntN(len(w.pool))]
	w.active.words[grain/64] |= 1 << (grain % 64)
	w.half = append(w.half, grain)
	if w.rng.IntN(2) == 0 {
		w.finish()
	}
}

func (w *world) finish() {
	for _, grain := range w.half {
		line := grain / 64 / lineWords
		w.active.lines[line/64] |= 1 << (line % 64)
		w.now = append(w.now, grain)
	}
	w.half = nil
}

// try runs part of a process and says whether it lived.
func (w *world) try(f func()) (lived bool) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(killed); !ok {
				panic(r)
			}
		}
	}()
	f()
	return true
}

// restart is the next process after one that was killed or ended.
func (w *world) restart() {
	if w.head.get(headState) != stateCovered {
		w.fresh()
		return
	}
	w.start()
	w.c.adopt()
}

// sealed notes a cut.
func (w *world) sealed(number uint64) {
	w.cuts = append(w.cuts, number)
	w.between = append(w.between, w.now)
	w.now = nil
	w.fetched, w.whole = map[int64]bool{}, true
}

// fetch notes what the last exchange took.
func (w *world) fetch() {
	for grain := range grainsOf(w.c.lastTaken()) {
		w.fetched[grain] = true
	}
}

func grainsOf(list []blockdev.Extent) map[int64]bool {
	out := map[int64]bool{}
	for _, e := range list {
		for at := e.Offset; at < e.End(); at += worldGrain {
			out[at/worldGrain] = true
		}
	}
	return out
}

func (w *world) ask() {
	if len(w.cuts) == 0 {
		return
	}
	first, last, ok := w.c.bounds()
	if ok && last != w.cuts[len(w.cuts)-1] {
		w.t.Fatalf("covered to %d, want %d", last, w.cuts[len(w.cuts)-1])
	}
	i := w.rng.IntN(len(w.cuts))
	j := i + w.rng.IntN(len(w.cuts)-i)
	list, err := w.c.changed(w.cuts[i], w.cuts[j])
	if !ok || w.cuts[i] < first {
		if !errors.Is(err, ErrUncovered) {
			w.t.Fatalf("covered from %d (%v): changed since %d is %v, %v", first, ok, w.cuts[i], list, err)
		}
		return
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.check("changed between cuts", list, slices.Concat(w.between[i+1:j+1]...), w.c.exact(w.cuts[i], w.cuts[j]))
}

// check compares an answer with the truth; one that needs not be exact may name
// too much.
func (w *world) check(what string, got []blockdev.Extent, want []int64, exact bool) {
	w.t.Helper()
	for i, e := range got {
		if e.Length <= 0 || e.End() > w.c.length || i > 0 && e.Offset <= got[i-1].End() {
			w.t.Fatalf("%s: extent %d of %v", what, i, got)
		}
	}
	named, truth := grainsOf(got), map[int64]bool{}
	for _, grain := range want {
		truth[grain] = true
		if !named[grain] {
			w.t.Fatalf("%s: grain %d is missing", what, grain)
		}
	}
	if exact && len(named) != len(truth) {
		w.t.Fatalf("%s: %d grains named, %d changed", what, len(named), len(truth))
	}
}

func TestCoverageAgainstModel(t *testing.T) {
	kills, exact, wide := 0, 0, 0
	for seed := range uint64(400) {
		w := newWorld(t, seed)
		number := uint64(10)
		for range 40 {
			if w.rng.IntN(4) == 0 {
				w.killAt = w.rng.IntN(30)
			}
			lived := w.try(func() {
				for range w.rng.IntN(6) {
					w.write()
				}
				w.c.exchange() // a round
				if w.rng.IntN(8) == 0 {
					w.whole = false // what it took is not fetched
				} else {
					w.fetch()
				}
				if w.rng.IntN(3) == 0 && len(w.cuts) > 0 {
					w.c.forget(w.cuts[w.rng.IntN(len(w.cuts))])
				}
				if w.rng.IntN(3) == 0 {
					return // given up
				}
				// The cut: nothing is in flight, and nothing is written.
				w.finish()
				step := w.c.step
				w.c.step = func() {
					if w.killAt == 0 {
						panic(killed{})
					}
					w.killAt--
				}
				w.c.exchange()
				if w.rng.IntN(3) == 0 && len(w.cuts) > 0 {
					w.c.forget(w.cuts[w.rng.IntN(len(w.cuts))]) // as somebody else may meanwhile
				}
				prepared, fits := w.c.appendTaken(make([]blockdev.Extent, 0, 64))
				if !fits && w.room > 100 {
					t.Fatalf("seed %d: what was taken is not known without allocating", seed)
				}
				if taken := w.c.lastTaken(); fits && !slices.Equal(prepared, taken) {
					t.Fatalf("seed %d: taken without allocating %v, else %v", seed, prepared, taken)
				}
				w.fetch()
				if w.whole {
					for _, grain := range w.now {
						if !w.fetched[grain] {
							t.Fatalf("seed %d: no exchange before cut %d took grain %d", seed, number+1, grain)
						}
					}
				}
				w.c.step = step
				number++
				var before []int64
				before, w.now = w.now, nil
				sealed := w.try(func() {
					if err := w.c.seal(number, func(header) {}); err != nil {
						t.Fatalf("seed %d: %v", seed, err)
					}
				})
				after := w.now // changed by writers after the window
				w.now = before
				if sealed || w.head.get(headState) == stateCovered && w.head.get(headLast) == number {
					w.sealed(number)
					w.now = after
				} else {
					w.now = append(w.now, after...)
				}
				if !sealed {
					panic(killed{})
				}
				if w.rng.IntN(3) == 0 {
					w.c.forget(w.cuts[w.rng.IntN(len(w.cuts))])
				}
			})
			if !lived || w.rng.IntN(20) == 0 {
				kills++
				w.finish()
				w.restart()
			}
			for range 3 {
				w.ask()
			}
			if n := len(w.cuts); n > 1 && w.c.exact(w.cuts[n-2], w.cuts[n-1]) {
				exact++
			} else if n > 1 {
				wide++
			}
			if w.rng.IntN(40) == 0 {
				w.c.end("a reason")
				if _, err := w.c.changed(number, number); !errors.Is(err, ErrUncovered) {
					t.Fatalf("seed %d: without coverage: %v", seed, err)
				}
				w.cuts, w.between = nil, nil
			}
			if t.Failed() {
				return
			}
		}
	}
	if kills < 500 || exact < 500 || wide < 500 {
		t.Errorf("%d kills, %d exact answers and %d others: this test checks nothing", kills, exact, wide)
	}
}
