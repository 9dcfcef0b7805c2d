package protocol

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
)

// TestSimulate walks at random over what can happen to copies of a volume and checks
// after each step what is promised: a replica holds exactly one cut, whatever it
// acknowledged it keeps, no position has two contents, no device is both primary and
// replica, and nothing that only one copy had is overwritten unless it was given up and saved.
func TestSimulate(t *testing.T) {
	moves := allSimMoves()
	if *simulateMoves != "" {
		var err error
		if moves, err = parseSimMoves(*simulateMoves); err != nil {
			t.Fatal(err)
		}
	}
	var (
		next, turns atomic.Uint64
		failed      atomic.Bool
		mu          sync.Mutex
		all         = map[string]int{}
	)
	t.Run("walks", func(t *testing.T) {
		for slot := range min(runtime.GOMAXPROCS(0), simSlots-1) {
			t.Run("", func(t *testing.T) {
				t.Parallel()
				for !failed.Load() {
					n := next.Add(1) - 1
					if n >= *simulateSeeds {
						return
					}
					k := simWalk{seed: *simulateSeed + n, moves: moves, slot: slot + 1}
					r := k.walk(t)
					turns.Add(uint64(r.turns))
					mu.Lock()
					for what, times := range r.did {
						all[what] += times
					}
					mu.Unlock()
					if r.err != nil && !failed.Swap(true) {
						t.Error(k.report(t, r))
					}
				}
			})
		}
	})
	t.Logf("%d walks of %d turns: %v", *simulateSeeds, turns.Load(), all)
	if *simulateSeeds < 25 || *simulateMoves != "" || t.Failed() {
		return
	}
	if *simulateSeeds >= 500 && all["inherited"] == 0 { // one walk in ten or twenty
		t.Error("nobody ever asked for the time before a take-over")
	}
	if *simulateSeeds >= 500 && all["restore cut off"] == 0 {
		t.Error("no restore was ever cut off")
	}
	for _, what := range []string{"incremental", "compare", "full", "refuse", "gave up", "rescued", "took over", "stood down", "strayed", "crash", "fault", "power cut", "disk lost", "two primaries", "link cut", "resumed", "not resumed",
		"another in the session", "restored", "restored, primary", "not passed on", "passed on, incremental", "passed on, compare", "passed on, full", "passed on, nothing", "passed on, refuse"} {
		if all[what] == 0 {
			t.Errorf("it never came to: %s", what)
		}
	}
}

// report is a failed walk in words: the shortest found that still fails, and how to go it again.
func (k simWalk) report(t *testing.T, r simResult) string {
	first := r.err
	k, r = k.shrink(t, r)
	return fmt.Sprintf("seed %d: %v\n%d moves that still fail, in the end with: %v\n  %s\nagain: make simulate SEED=%d MOVES=%s",
		k.seed, first, len(k.moves), r.err, strings.Join(r.moves, "\n  "), k.seed, formatSimMoves(k.moves))
}

// simTries is how many walks a failed one may cost.
const simTries = 500

// shrink leaves out moves of a failed walk, many at once and then fewer, as long as it fails.
func (k simWalk) shrink(t *testing.T, r simResult) (simWalk, simResult) {
	k.moves = k.moves[:slices.Index(k.moves, r.at)+1]
	tries := simTries
	for size := len(k.moves) / 2; size > 0; {
		shorter := false
		for at := 0; at < len(k.moves) && tries > 0; {
			try := k
			try.moves = slices.Delete(slices.Clone(k.moves), at, min(at+size, len(k.moves)))
			tries--
			if got := try.walk(t); got.err != nil {
				try.moves = try.moves[:slices.Index(try.moves, got.at)+1]
				k, r, shorter = try, got, true
			} else {
				at += size
			}
		}
		if !shorter || tries == 0 {
			size /= 2
		}
	}
	return k, r
}

func formatSimMoves(moves []int) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(moves), " ", ","), "[]")
}

func parseSimMoves(text string) (moves []int, err error) {
	for _, one := range strings.Split(text, ",") {
		m, err := strconv.Atoi(one)
		if err != nil || m < 0 || m >= simMoves || len(moves) > 0 && m <= moves[len(moves)-1] {
			return nil, fmt.Errorf("moves %q: want ascending numbers below %d, with commas between them", text, simMoves)
		}
		moves = append(moves, m)
	}
	return moves, nil
}

// TestSimulateAgain goes walks several times, on one CPU and on two and at other hours: all
// that happens in them must be the same, to the byte.
func TestSimulateAgain(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	on := func(cpus int, k simWalk) simResult {
		runtime.GOMAXPROCS(cpus)
		return k.walk(t)
	}
	for seed := *simulateSeed; seed < *simulateSeed+*simulateAgain; seed++ {
		k := simWalk{seed: seed, moves: allSimMoves(), slot: 1}
		first := on(2, k)
		for _, cpus := range []int{1, 2} {
			other := k
			other.slot += cpus
			if again := on(cpus, other); again.trace == first.trace && again.turns == first.turns {
				continue
			}
			k.keep, other.keep = true, true
			where := "but not once more"
			for range 5 {
				if at := differs(on(2, k).lines, on(cpus, other).lines); at != "" {
					where = at
					break
				}
			}
			t.Fatalf("seed %d: on %d CPUs another walk: %s", seed, cpus, where)
		}
	}
}

// differs shows the first line in which two walks went different ways, and those before.
func differs(one, other []string) string {
	for i := range min(len(one), len(other)) {
		if one[i] != other[i] {
			return fmt.Sprintf("at turn %d\n  %s\n  and not\n  %s", i, strings.Join(one[max(0, i-20):i+1], "\n  "), other[i])
		}
	}
	return ""
}

// TestSimulateShortens: a walk that fails is reduced to the moves that it takes.
func TestSimulateShortens(t *testing.T) {
	k := simWalk{seed: 1, moves: allSimMoves(), slot: 1, check: func(w *simWorld) error {
		if w.did["took over"] > 0 && w.did["stood down"] > 0 {
			return errors.New("broken on purpose")
		}
		return nil
	}}
	r := k.walk(t)
	if r.err == nil {
		t.Fatal("the walk comes nowhere near what is to be found")
	}
	report := k.report(t, r)
	line := report[strings.LastIndex(report, "MOVES=")+len("MOVES="):]
	moves, err := parseSimMoves(line)
	if err != nil {
		t.Fatal(err)
	}
	// The first node begins as primary: one stands down or another takes over, and then the other of the two.
	if len(moves) > 4 {
		t.Errorf("%d moves are left:\n%s", len(moves), report)
	}
	k.moves = moves
	if again := k.walk(t); again.err == nil || again.err.Error() != r.err.Error() {
		t.Errorf("walked again, %v failed with: %v", moves, again.err)
	}
}
