package protocol

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"testing"
	"testing/synctest"
	"time"

	"blockferry/blockdev/blocktest"
)

var (
	simulateSeeds = flag.Uint64("simulate-seeds", 25, "how many random walks")
	simulateSeed  = flag.Uint64("simulate-seed", 1, "the first one's seed")
	simulateAgain = flag.Uint64("simulate-again", 5, "how many random walks are gone several times")
	simulateMoves = flag.String("simulate-moves", "", "the moves to make of one walk, as a failure prints them; empty: all")
)

const (
	simSize   = 1 << 20
	simBlocks = simSize / BlockSize
	simMoves  = 60
	// simPatience is by the machine's own clock; a walk takes a tenth of a second.
	simPatience = 5 * time.Minute
)

// simWorld is three nodes with a disk each, and all that ever was cut.
type simWorld struct {
	t      *testing.T
	s      *simSchedule
	rng    *rand.Rand // of the move
	nodes  []*simNode
	images map[Position][]byte
	writes uint64
	links  int
	moves  []string // for the report
	did    map[string]int
}

// simNode is a node. Whether it is primary its label and superblock say.
type simNode struct {
	w     *simWorld
	name  string
	dir   string // for rescue files
	dev   *simDisk
	after *blocktest.Memory // its disk, when the power went in the middle of something
	label *memState

	rep    *Replica
	recv   *Receiver
	source *ReplicaSource // of rep, once others were fed from it
	acks   []Lineage      // one of these, or what continues it, the replica must hold

	primary bool
	state   SourceState
	marks   [simBlocks]uint64 // after which cut it was written, plus 1; survives a crash
	tracked uint64            // the tracker can tell since this cut
	// unflushed: the device was not flushed since its last cut, which no replica has then.
	unflushed bool
	kept      map[*simNode]*keptAttempt // what links that were cut left; lost in a crash
}

// simWalk is a seed and which of its moves are made: each move draws from a
// source of its own, so that leaving one out changes nothing of what the others draw.
type simWalk struct {
	seed  uint64
	moves []int // ascending, below simMoves
	slot  int   // see inSimSlot
	keep  bool  // every line of the trace
	check func(*simWorld) error
}

// simResult is what became of a walk.
type simResult struct {
	err   error
	at    int    // the move that failed
	trace uint64 // of all that happened
	turns int
	lines []string // if they were kept
	moves []string // in words
	did   map[string]int
}

func allSimMoves() []int {
	all := make([]int, simMoves)
	for i := range all {
		all[i] = i
	}
	return all
}

// walk goes a walk in a bubble of its own.
func (k simWalk) walk(t *testing.T) (res simResult) {
	// Of a goroutine that waits for a sync.Mutex the bubble's own clock knows nothing.
	defer time.AfterFunc(simPatience, func() {
		debug.SetTraceback("all")
		panic(fmt.Sprintf("the walk of seed %d hangs", k.seed))
	}).Stop()
	synctest.Test(t, func(t *testing.T) {
		w := &simWorld{t: t, s: newSimSchedule(k.seed, k.keep), images: map[Position][]byte{}, did: map[string]int{}}
		inSimSlot(k.slot, k.seed, func() {
			w.begin(k, simMoves)
			done := make(chan struct{})
			go func() {
				defer close(done)
				w.s.run()
			}()
			res.at, res.err = w.walk(k)
			for _, n := range w.nodes {
				n.close()
			}
			w.s.settle()
			close(w.s.stop)
			<-done
			if res.err == nil && w.s.alike != "" {
				res.err = errors.New(w.s.alike)
			}
		})
		res.trace, res.turns, res.lines, res.moves, res.did = w.s.hash.Sum64(), w.s.count, w.s.lines, w.moves, w.did
	})
	return res
}

// begin lets a move draw from its own source.
func (w *simWorld) begin(k simWalk, move int) {
	w.rng = rand.New(rand.NewPCG(k.seed, uint64(move)))
	w.s.rng = rand.New(rand.NewPCG(k.seed, uint64(move)|1<<32))
	simReseed(k.slot, k.seed, uint64(move))
}

func (w *simWorld) walk(k simWalk) (at int, err error) {
	for i := range 3 {
		n := &simNode{w: w, name: string(rune('a' + i)), dir: w.t.TempDir(), kept: map[*simNode]*keptAttempt{}}
		w.nodes = append(w.nodes, n)
		if err := n.blank(); err != nil {
			return 0, err
		}
	}
	first := w.nodes[0]
	first.close()
	first.disk(blocktest.NewMemory(simOptions().NeededBytes()))
	if err := first.start(); err != nil { // an empty label on a disk without a superblock
		return 0, err
	}
	for _, at = range k.moves {
		w.s.settle()
		w.begin(k, at)
		w.say("move %d", at)
		err := w.move()
		w.s.settle()
		if err != nil {
			return at, err
		}
		primaries := 0
		for _, n := range w.nodes {
			if n.primary {
				primaries++
			}
			if err := n.check(); err != nil {
				return at, fmt.Errorf("%s: %w", n.name, err)
			}
		}
		if primaries > 1 {
			w.did["two primaries"]++
		}
		if k.check != nil {
			if err := k.check(w); err != nil {
				return at, err
			}
		}
	}
	return at, nil
}

func (w *simWorld) say(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	w.moves = append(w.moves, line)
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	w.s.note("%s", line)
}

func (w *simWorld) move() error {
	n := w.nodes[w.rng.IntN(len(w.nodes))]
	other := w.nodes[w.rng.IntN(len(w.nodes))]
	switch k := w.rng.IntN(20); {
	case k < 14 && n.primary:
		if err := n.write(); err != nil || n == other || other.primary {
			return err
		}
		err := n.feed(other)
		for err == nil && n.kept[other] != nil && w.rng.IntN(4) > 0 {
			if err = n.write(); err == nil {
				err = n.feed(other)
			}
		}
		for err == nil && w.rng.IntN(3) == 0 { // what came is passed on
			if err = other.passOn(w.third(n, other)); err == nil && w.rng.IntN(2) == 0 {
				if err = n.write(); err == nil {
					err = n.feed(other)
				}
			}
		}
		return err
	case k > 1 && k < 5 && !n.primary && n != other:
		return n.passOn(other)
	case k == 14 || k < 2:
		return n.crash()
	case k > 14 && k < 17 && n.primary:
		return n.standDown(other)
	case k > 14 && k < 18 && !n.primary:
		return n.takeOver()
	case k == 18 && !n.primary && !other.primary && n != other:
		return n.restore(other)
	case k == 19 && w.rng.IntN(4) == 0 && !n.primary:
		w.did["disk lost"]++
		w.say("%s loses its disk", n.name)
		n.close()
		return n.blank()
	}
	return nil
}

func (w *simWorld) third(one, two *simNode) *simNode {
	for _, n := range w.nodes {
		if n != one && n != two {
			return n
		}
	}
	panic("there are three")
}

// passOn feeds a node from a copy, as if its disk were beside that.
func (n *simNode) passOn(to *simNode) error {
	if n.primary || to.primary {
		return nil
	}
	return n.feed(to)
}

func simOptions() FormatOptions {
	return FormatOptions{VolumeUUID: testUUID, SizeBytes: simSize, JournalBytes: MinJournalBytes}
}

func (n *simNode) close() {
	if n.recv != nil {
		n.recv.Close()
	}
	if n.rep != nil {
		_ = n.rep.Close() // after a fault it has nothing to add
	}
	n.rep, n.recv, n.source, n.primary, n.kept = nil, nil, nil, false, map[*simNode]*keptAttempt{}
}

func (n *simNode) blank() error {
	n.disk(blocktest.NewMemory(simOptions().NeededBytes()))
	n.label, n.acks, n.unflushed = &memState{}, nil, false
	if err := FormatReplica(n.dev, simOptions()); err != nil {
		return err
	}
	return n.start()
}

func (n *simNode) disk(m *blocktest.Memory) {
	n.dev = &simDisk{Memory: m, s: n.w.s, name: n.name}
}

func (n *simNode) data() ([]byte, error) {
	b := make([]byte, simSize)
	_, err := n.dev.Memory.ReadAt(b, 0)
	return b, err
}

// start does what the label and the superblock say.
func (n *simNode) start() error {
	old, err := DecodeSourceState(n.label.b)
	if err != nil {
		return err
	}
	rep, err := OpenReplica(context.Background(), n.dev, OpenOptions{RescueDir: n.dir})
	asReplica := err == nil
	if asReplica && len(old.Effective()) > 0 && !old.Secondary {
		return errors.Join(errors.New("it may be used as primary and as replica"), rep.Close())
	}
	switch {
	case asReplica:
		n.rep, n.recv = rep, NewReceiver(ReceiverConfig{WindowBytes: MaxFramesBytes})
		return n.recv.Add("r", rep)
	case !errors.Is(err, ErrTookOver) && !errors.Is(err, ErrNoSuperblock):
		return err
	}
	if !old.Secondary && (len(old.Effective()) > 0 || errors.Is(err, ErrNoSuperblock)) {
		n.state, _, err = BeginPrimary(n.label)
		n.primary = err == nil
		n.w.say("%s begins as primary: %v", n.name, n.state.Effective())
		return err
	}
	// Something was cut off between the two roles: back, or on.
	if errors.Is(err, ErrTookOver) && n.w.rng.IntN(2) == 0 {
		n.rep, err = OpenReplica(context.Background(), n.dev, OpenOptions{TookOver: true})
		if err != nil {
			return err
		}
		if _, err := n.rep.TakeOver(context.Background(), n.label, TakeOverOptions{Force: true}); err == nil {
			return n.tookOver()
		} else if !errors.Is(err, ErrTookOver) {
			return err
		}
		n.close() // it was primary, and stands down
	}
	h, err := StandDown(n.label, n.dev, n.downOptions(nil))
	if err != nil {
		return err
	}
	n.w.say("%s stands down at last: %v", n.name, h.Lineage)
	return n.start()
}

// changed is what the tracker knows, and the disk of the time before.
func (n *simNode) changed(since uint64) ([]Range, error) {
	changed, err := n.marked(since)
	if err == nil {
		return changed, nil
	}
	past, err := ReadInheritance(n.dev, testUUID, simSize, n.state.Effective())
	if err != nil {
		return nil, err
	}
	if changed, err = past.ChangedSince(since, n.marked); err == nil {
		n.w.did["inherited"]++
		n.w.say("%s knows from before %v what changed since %d: %v", n.name, past.At(), since, changed)
	}
	return changed, err
}

func (n *simNode) marked(since uint64) ([]Range, error) {
	if since < n.tracked {
		return nil, ErrTrackingLost
	}
	var out []Range
	for b, m := range n.marks {
		if m > since {
			out = appendRange(out, Range{int64(b) * BlockSize, BlockSize})
		}
	}
	return out, nil
}

// crash cuts the power, and starts what is left.
func (n *simNode) crash() error {
	n.w.did["crash"]++
	n.w.say("%s crashes", n.name)
	was := n.primary
	after := n.after
	if n.after = nil; after == nil {
		after = n.dev.PowerCut(n.w.rng)
	}
	n.close()
	n.w.s.settle()
	n.disk(after)
	if n.unflushed { // what a cut was that nobody has is what is left of it
		image, err := n.data()
		if err != nil {
			return err
		}
		n.w.images[n.state.Lineage.Tip()], n.unflushed = image, false
	}
	if was && n.w.rng.IntN(3) == 0 {
		n.tracked = ^uint64(0) // its tracker is lost, too
	}
	return n.start()
}

func (n *simNode) downOptions(follow Lineage) StandDownOptions {
	return StandDownOptions{Format: simOptions(), Stray: true, ChangedSince: n.marked, Follow: follow}
}

// standDown takes a primary down, cleanly or not, and makes it a replica.
func (n *simNode) standDown(follow *simNode) error {
	w := n.w
	if w.rng.IntN(2) == 0 {
		if _, err := n.cut(); err != nil {
			return err
		}
		if err := n.flush(); err != nil {
			return err
		}
		n.state = n.state.Close()
		if err := saveState(n.label, n.state); err != nil {
			return err
		}
	}
	before, err := n.data()
	if err != nil {
		return err
	}
	var line Lineage
	if w.rng.IntN(2) == 0 && follow.primary && follow != n {
		line = follow.state.Effective()
	}
	fault := w.rng.IntN(3) == 0
	if fault {
		n.dev.FailAt(blocktest.OpWrite, w.rng.IntN(4), errors.New("broken on purpose"))
	}
	h, err := StandDown(n.label, n.dev, n.downOptions(line))
	n.dev.FailAt(blocktest.OpWrite, 0, nil)
	n.acks = []Lineage{n.state.Effective()}
	if err != nil {
		w.say("%s fails to stand down: %v", n.name, err)
		n.acks = []Lineage{n.state.Effective(), n.state.Lineage}
		return n.crash()
	}
	w.did["stood down"]++
	w.say("%s stands down at %v, strayed %q", n.name, h.Lineage, h.Strayed)
	if h.Strayed != "" {
		w.did["strayed"]++
	}
	n.acks, n.unflushed = []Lineage{h.Lineage}, false // its superblock was flushed
	n.close()
	if err := n.start(); err != nil {
		return err
	}
	after, err := n.data()
	if at := firstDifference(before, after); err == nil && at >= 0 {
		err = fmt.Errorf("%s: standing down changed the data at %d", n.name, at)
	}
	return err
}

// takeOver makes a replica primary, if it may.
func (n *simNode) takeOver() error {
	w := n.w
	if w.rng.IntN(3) == 0 {
		n.dev.FailAt(blocktest.OpWrite, w.rng.IntN(3), errors.New("broken on purpose"))
	}
	o := TakeOverOptions{Force: w.rng.IntN(3) > 0, Heard: Heard{Lineage: w.nodes[w.rng.IntN(3)].state.Effective()}}
	n.recv.Close()
	p, err := n.rep.TakeOver(context.Background(), n.label, o)
	n.dev.FailAt(blocktest.OpWrite, 0, nil)
	w.say("%s takes over (%+v): %+v, %v", n.name, o, p, err)
	if err != nil {
		return n.crash() // a refusal, or the fault
	}
	return n.tookOver()
}

// tookOver: the label has the state with which it is primary.
func (n *simNode) tookOver() error {
	n.w.did["took over"]++
	state, err := DecodeSourceState(n.label.b)
	if err != nil {
		return err
	}
	n.close()
	tip := state.Lineage.Tip()
	n.state, n.primary, n.tracked, n.marks, n.unflushed = state, true, tip.Epoch, [simBlocks]uint64{}, false
	image, err := n.data()
	if n.w.images[tip] == nil { // of a copy that had strayed
		n.w.images[tip] = image
	}
	if at := firstDifference(image, n.w.images[tip]); err == nil && at >= 0 {
		err = fmt.Errorf("%s took over at %v, and differs from that cut at %d", n.name, tip, at)
	}
	return err
}

// check looks whether a replica holds what it says, and what it must.
func (n *simNode) check() error {
	if n.rep == nil {
		return nil
	}
	st := n.rep.Status()
	held := len(n.acks) == 0
	for _, a := range n.acks {
		kind := Compare(st.Lineage, a).Kind
		held = held || kind == Same || kind == Ahead
	}
	if !held {
		return fmt.Errorf("it holds %v, none of %v", st.Lineage, n.acks)
	}
	if st.State != DiskConsistent || st.Strayed != "" {
		return nil
	}
	image, err := n.rep.Hold(context.Background())
	if err != nil {
		return err
	}
	defer image.Release()
	got := make([]byte, simSize)
	if _, err := image.ReadAt(got, 0); err != nil {
		return err
	}
	want := n.w.images[image.Position()]
	if want == nil {
		return fmt.Errorf("it holds %v, which is no cut", image.Position())
	}
	if at := firstDifference(got, want); at >= 0 {
		return fmt.Errorf("it says %v, and differs from that cut at %d", image.Position(), at)
	}
	return nil
}
