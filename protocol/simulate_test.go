package protocol

import (
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
	"blockferry/proto"
)

var (
	simulateSeeds = flag.Uint64("simulate-seeds", 25, "how many random walks")
	simulateSeed  = flag.Uint64("simulate-seed", 1, "the first one's seed")
)

const (
	simSize   = 1 << 20
	simBlocks = simSize / BlockSize
	simMoves  = 60
	// simAgain is how often one seed alone is walked: the same moves with the same
	// faults, but how a session's two ends take turns is not the seed's to say.
	simAgain = 100
)

// simWorld is three nodes with a disk each, and all that ever was cut.
type simWorld struct {
	t      *testing.T
	rng    *rand.Rand
	nodes  []*simNode
	images map[Position][]byte
	writes uint64
	moves  []string // for the report
	did    map[string]int
}

// simNode is a node. Whether it is primary its label and superblock say.
type simNode struct {
	w     *simWorld
	name  string
	dir   string // for rescue files
	dev   *blocktest.Memory
	label *memState

	rep  *Replica
	recv *Receiver
	acks []Lineage // one of these, or what continues it, the replica must hold

	primary bool
	state   SourceState
	marks   [simBlocks]uint64 // after which cut it was written, plus 1; survives a crash
	tracked uint64            // the tracker can tell since this cut
	// unflushed: the device was not flushed since its last cut, which no replica has then.
	unflushed bool
	kept      map[*simNode]*keptAttempt // what links that were cut left; lost in a crash
}

// TestSimulate walks at random over what can happen to copies of a volume and checks
// after each step what is promised: a replica holds exactly one cut, whatever it
// acknowledged it keeps, no position has two contents, no device is both primary and
// replica, and nothing that only one copy had is overwritten unless it was given up and saved.
func TestSimulate(t *testing.T) {
	var (
		next  atomic.Uint64
		mu    sync.Mutex
		all   = map[string]int{}
		walks sync.WaitGroup
	)
	count := *simulateSeeds
	if count == 1 {
		count = simAgain
	}
	for range runtime.GOMAXPROCS(0) {
		walks.Go(func() {
			for !t.Failed() {
				n := next.Add(1) - 1
				if n >= count {
					return
				}
				seed := *simulateSeed + n%*simulateSeeds
				w := &simWorld{t: t, rng: rand.New(rand.NewPCG(seed, 0x51)), images: map[Position][]byte{}, did: map[string]int{}}
				err := w.walk()
				mu.Lock()
				for what, times := range w.did {
					all[what] += times
				}
				if err != nil {
					for _, m := range w.moves {
						t.Log(m)
					}
					t.Errorf("seed %d: %v\nagain: make simulate SEEDS=1 SEED=%d", seed, err, seed)
				}
				mu.Unlock()
			}
		})
	}
	walks.Wait()
	t.Logf("%d walks: %v", count, all)
	if *simulateSeeds < 25 || t.Failed() {
		return
	}
	if *simulateSeeds >= 500 && all["inherited"] == 0 { // one walk in ten or twenty
		t.Error("nobody ever asked for the time before a take-over")
	}
	for _, what := range []string{"incremental", "compare", "full", "refuse", "gave up", "rescued", "took over", "stood down", "strayed", "crash", "fault", "disk lost", "two primaries", "link cut", "resumed", "not resumed"} {
		if all[what] == 0 {
			t.Errorf("it never came to: %s", what)
		}
	}
}

func (w *simWorld) walk() error {
	defer func() {
		for _, n := range w.nodes {
			n.close()
		}
	}()
	for i := range 3 {
		n := &simNode{w: w, name: string(rune('a' + i)), dir: w.t.TempDir()}
		w.nodes = append(w.nodes, n)
		if err := n.blank(); err != nil {
			return err
		}
	}
	first := w.nodes[0]
	first.close()
	first.dev = blocktest.NewMemory(simOptions().NeededBytes())
	if err := first.start(); err != nil { // an empty label on a disk without a superblock
		return err
	}
	for range simMoves {
		if err := w.move(); err != nil {
			return err
		}
		primaries := 0
		for _, n := range w.nodes {
			if n.primary {
				primaries++
			}
			if err := n.check(); err != nil {
				return fmt.Errorf("%s: %w", n.name, err)
			}
		}
		if primaries > 1 {
			w.did["two primaries"]++
		}
	}
	return nil
}

func (w *simWorld) say(format string, args ...any) {
	w.moves = append(w.moves, fmt.Sprintf(format, args...))
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
		return err
	case k == 14 || k < 2:
		return n.crash()
	case k > 14 && k < 17 && n.primary:
		return n.standDown(other)
	case k > 14 && k < 18 && !n.primary:
		return n.takeOver()
	case k == 19 && w.rng.IntN(4) == 0 && !n.primary:
		w.did["disk lost"]++
		w.say("%s loses its disk", n.name)
		n.close()
		return n.blank()
	}
	return nil
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
	n.rep, n.recv, n.primary, n.kept = nil, nil, false, map[*simNode]*keptAttempt{}
}

func (n *simNode) blank() error {
	n.dev, n.label, n.acks, n.unflushed = blocktest.NewMemory(simOptions().NeededBytes()), &memState{}, nil, false
	if err := FormatReplica(n.dev, simOptions()); err != nil {
		return err
	}
	return n.start()
}

func (n *simNode) data() ([]byte, error) {
	b := make([]byte, simSize)
	_, err := n.dev.ReadAt(b, 0)
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

func (n *simNode) write() error {
	for range n.w.rng.IntN([]int{12, 12, 120}[n.w.rng.IntN(3)]) {
		b := n.w.rng.IntN(simBlocks)
		n.w.writes++
		page := make([]byte, BlockSize)
		binary.LittleEndian.PutUint64(page, n.w.writes)
		if n.w.rng.IntN(2) == 0 { // what was there before, perhaps
			binary.LittleEndian.PutUint64(page, uint64(n.w.rng.IntN(2)))
		}
		n.marks[b] = n.state.Lineage.Tip().Epoch + 1
		if _, err := n.dev.WriteAt(page, int64(b)*BlockSize); err != nil {
			return err
		}
	}
	if n.w.rng.IntN(3) == 0 {
		return n.flush()
	}
	return nil
}

func (n *simNode) flush() error {
	err := n.dev.Flush()
	n.unflushed = n.unflushed && err != nil
	return err
}

// cut makes the number durable, and remembers the image.
func (n *simNode) cut() ([]byte, error) {
	next, err := n.state.UseEpoch()
	if err == nil {
		err = saveState(n.label, next)
	}
	if err != nil {
		return nil, err
	}
	n.state = next
	image, err := n.data()
	tip := next.Lineage.Tip()
	if n.w.images[tip] != nil {
		return nil, fmt.Errorf("%s: position %v comes twice", n.name, tip)
	}
	n.w.images[tip], n.unflushed = image, true
	return image, err
}

type simView []byte

func (v simView) ReadAt(p []byte, off int64) (int, error) { return copy(p, v[off:]), nil }

// simLink is a view whose link breaks before a read of it.
type simLink struct {
	simView
	link *Link
	left atomic.Int64 // reads
}

func (v *simLink) ReadAt(p []byte, off int64) (int, error) {
	if v.left.Add(-1) == -1 {
		v.link.Close()
	}
	return v.simView.ReadAt(p, off)
}

var _ io.ReaderAt = simView(nil)

// feed brings a replica up to date, or is refused; the replica's disk may fail meanwhile.
func (n *simNode) feed(to *simNode) error {
	ctx, w := context.Background(), n.w
	primary := n.state.Effective()
	var link *Link
	var refused *RefusedError
	for { // the session before ends in its own time
		var err error
		link, err = Connect(ctx, LocalClient(to.recv), LinkConfig{VolumeUUID: testUUID, SizeBytes: simSize, Replica: "r", BatchBytes: UnitSize, Batches: 2}, primary)
		if errors.As(err, &refused) && refused.Reason == proto.Reason_REASON_BUSY {
			time.Sleep(100 * time.Microsecond)
			continue
		}
		if err != nil {
			return err
		}
		break
	}
	defer link.Close()
	image, err := n.cut()
	if err != nil {
		return err
	}
	disk, needsFull := link.Disk()
	in := PlanInput{Primary: primary, Replica: link.Lineage(), Disk: disk, NeedsFull: needsFull, Strayed: link.Strayed(),
		SplitBrain: []SplitBrain{SplitBrainNone, SplitBrainOlder}[w.rng.IntN(2)]}
	rel := Compare(in.Replica, primary)
	var theirs, mine []Range
	if (rel.Kind == Diverged || in.Strayed != "") && disk == DiskConsistent && !rel.Common.IsZero() {
		if theirs, in.ReplicaChanged.Known, err = link.Changes(ctx, rel.Common); err != nil {
			return err
		}
		if w.rng.IntN(2) == 0 {
			in.Discard = in.Replica.Tip()
		}
	}
	mine, err = n.changed(rel.Common.Epoch)
	in.Tracked = err == nil && !rel.Common.IsZero()
	plan := MakePlan(in)
	w.did[plan.Action.String()]++
	w.say("%s at %v feeds %s: %v", n.name, n.state.Lineage, to.name, plan)
	if plan.Action == Refuse {
		return nil
	}
	start := EpochStart{Epoch: n.state.Lineage.Tip().Epoch, Mode: ModeJournal, Full: plan.Action != Incremental, Lineage: n.state.Lineage, Discard: plan.Discard}
	ranges := []Range{{0, simSize}}
	if !start.Full {
		ranges = mine
		if !plan.Discard.IsZero() {
			ranges = uniteRanges(mine, theirs)
		}
	}
	if plan.InPlace {
		start.Mode = ModeInPlace
	}
	before, err := to.data()
	if err != nil {
		return err
	}
	fault := w.rng.IntN(5) == 0
	if fault {
		w.did["fault"]++
		to.dev.FailAt([]blocktest.Op{blocktest.OpWrite, blocktest.OpFlush}[w.rng.IntN(2)], w.rng.IntN(12), errors.New("broken on purpose"))
	}
	if len(to.acks) == 0 {
		to.acks = []Lineage{nil} // it may as well stay blank
	}
	to.acks = append(to.acks, n.state.Lineage) // from here on it may
	source := &simLink{simView: image, link: link}
	source.left.Store(1 << 62)
	cut := w.rng.IntN(3) == 0
	if cut {
		source.left.Store(w.rng.Int64N(20))
	}
	r := Round{Source: source, Narrow: w.rng.IntN(4) > 0 && plan.Action != FullCopy}
	begin := func() error { return link.Begin(ctx, start, plan.Overwrite) }
	if k := n.kept[to]; k != nil {
		since, err := n.changed(k.base)
		if err == nil && k.fits(link, plan) {
			w.did["resumed"]++
			w.say("it goes on with epoch %d after cut %d: %d bytes are left, %d changed", k.epoch.start.Epoch, k.base, totalBytes(k.rest), totalBytes(since))
			ranges, r.Number, plan = uniteRanges(k.rest, since), k.round, k.plan
			begin = func() error { return link.resume(ctx, k.epoch) }
		} else {
			w.did["not resumed"]++
		}
	}
	r.Ranges = ranges
	delete(n.kept, to)
	var rest []Range
	if err = begin(); err == nil {
		rest, err = link.SendRound(ctx, r)
	}
	if cut && w.rng.IntN(2) == 0 {
		link.Close() // if it was not yet; the commit does not come
		if err == nil {
			err = link.Err()
		}
	}
	if e := link.interrupted(); e != nil && cut && link.Err() != nil {
		w.did["link cut"]++
		w.say("the link is cut: %v", err)
		n.kept[to] = &keptAttempt{epoch: e, plan: plan, base: n.state.Lineage.Tip().Epoch, rest: rest, round: min(r.Number+1, MaxRounds-1)}
	}
	if err == nil || cut { // a view that was read to its end is flushed, whatever became of the link
		if e := n.flush(); err == nil {
			err = e
		}
	}
	if err == nil {
		err = link.Commit(ctx, n.state.Lineage, 1)
	}
	if err == nil {
		to.acks = []Lineage{n.state.Lineage} // acknowledged: from here on it must
		if !plan.Discard.IsZero() {
			w.did["gave up"]++
			if err := to.checkRescue(before, image, w.images[rel.Common]); err != nil {
				return err
			}
		}
		delete(n.kept, to)
	} else if !fault && !cut {
		return err
	}
	if fault || w.rng.IntN(6) == 0 {
		if !fault { // the power goes while it is applied
			to.dev.FailAt(blocktest.OpWrite, w.rng.IntN(12), errors.New("no power"))
		}
		// What goes on in the background comes to its end, so that a seed tells all.
		link.Close()
		to.recv.Close()
		_ = to.rep.WaitApplied(ctx, n.state.Lineage.Tip().Epoch)
		return to.crash()
	}
	if err != nil {
		return nil
	}
	return to.rep.WaitApplied(ctx, n.state.Lineage.Tip().Epoch)
}

// checkRescue: what only this copy had is in the rescue file.
func (n *simNode) checkRescue(before, after, common []byte) error {
	saved := make([]byte, simSize)
	have := map[int]bool{}
	if path := n.rep.Status().Rescued; path != "" {
		n.w.did["rescued"]++
		r, err := OpenRescue(path)
		if err != nil {
			return err
		}
		defer r.Close()
		for i, x := range r.Extents() {
			b, err := r.Extent(i)
			if err != nil {
				return err
			}
			copy(saved[x.Offset:], b)
			for at := x.Offset; at < x.End(); at += BlockSize {
				have[int(at)] = true
			}
		}
	}
	for at := 0; at < simSize; at += BlockSize {
		own := string(before[at : at+BlockSize])
		if own == string(after[at:at+BlockSize]) || own == string(common[at:at+BlockSize]) {
			continue
		}
		if !have[at] || string(saved[at:at+BlockSize]) != own {
			return fmt.Errorf("%s: what only it had at %d was overwritten and is in no rescue file", n.name, at)
		}
	}
	return nil
}

// crash cuts the power, and starts what is left.
func (n *simNode) crash() error {
	n.w.did["crash"]++
	n.w.say("%s crashes", n.name)
	was := n.primary
	after := n.dev.PowerCut(n.w.rng)
	n.close()
	n.dev = after
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
