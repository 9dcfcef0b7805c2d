package protocol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
)

// startFollower feeds replicas from the one at a node; change may alter how.
func startFollower(t *testing.T, middle *node, nodes []*node, change func(*PrimaryConfig)) *rig {
	t.Helper()
	source, err := FollowReplica(middle.rep)
	if err != nil {
		t.Fatal(err)
	}
	r, cfg := newRig(t, nodes, func(c *PrimaryConfig) {
		c.Source = source
		if change != nil {
			change(c)
		}
	})
	if r.p, err = NewFollower(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	return r
}

// level waits until two replicas hold the same.
func level(t *testing.T, a, b *node) ReplicaStatus {
	t.Helper()
	eventually(t, a.name+" and "+b.name+" hold the same", func() bool {
		st := a.rep.Status()
		return !st.Committed.IsZero() && st.Lineage.Equal(b.rep.Status().Lineage)
	})
	return a.rep.Status()
}

// brought sums up what was sent for the epochs after one, up to another, which is waited for.
func (r *rig) brought(name string, since, upTo uint64) (sum LinkStats) {
	r.t.Helper()
	eventually(r.t, "the epoch is told of", func() bool { e := r.epochs(name); return len(e) > 0 && e[len(e)-1].Epoch >= upTo })
	for _, e := range r.epochs(name) {
		if e.Epoch <= since {
			continue
		}
		sum.SentBytes += e.Link.SentBytes
		sum.ComparedBytes += e.Link.ComparedBytes
		sum.MarkedBytes += e.Link.MarkedBytes
	}
	return sum
}

// A copy under load is passed on: at every moment both hold exactly one cut of the primary,
// under its own name, and what is sent is what changed, to the block.
func TestCascade(t *testing.T) {
	for _, grain := range []int64{BlockSize, 64 << 10} {
		t.Run(fmt.Sprintf("grain %d", grain), func(t *testing.T) {
			src := newMemSource(testVolumeSize, grain)
			wroteSome(src, 0, 1500)
			middle, last := newNode(t, "middle", testVolumeSize, 32<<20), newNode(t, "last", testVolumeSize, 32<<20)
			up := startRig(t, src, &memState{}, []*node{middle}, nil)
			up.sync()
			stop := src.busyWithin(t, uint64(grain), time.Millisecond, 200)
			down := startFollower(t, middle, []*node{last}, nil)
			watchM, watchL := middle.watch(src), last.watch(src)
			eventually(t, "some epochs came to the last", func() bool { return len(down.epochs("last")) > 5 })
			stop()
			up.sync()
			before := level(t, last, middle).Committed.Epoch
			wroteSome(src, 100, 3)
			up.sync()
			st, from := level(t, last, middle), middle.rep.Status()
			if n, m := watchM(), watchL(); n < 3 || m < 3 {
				t.Fatalf("only %d and %d images were looked at", n, m)
			}
			if last.check(src) != st.Committed.Epoch || st.CutUnixNanos != from.CutUnixNanos || st.CutUnixNanos != memCutNanos(st.Committed.Epoch) {
				t.Fatalf("%v cut at %d, %v at %d", st.Committed, st.CutUnixNanos, from.Committed, from.CutUnixNanos)
			}
			if first := down.epochs("last")[0]; first.Action != "full" {
				t.Errorf("it began with %+v", first)
			}
			// What was compared on the way to the copy, as all is of this source, is compared again.
			// One of three blocks in a row may be zeros.
			if got := down.brought("last", before, st.Committed.Epoch); got.SentBytes < 2*BlockSize || got.SentBytes > 64*BlockSize || got.ComparedBytes > uint64(2*max(grain, 3*BlockSize)) {
				t.Errorf("for three blocks: %+v", got)
			}
			for _, e := range down.epochs("last")[1:] {
				if e.Action != "incremental" {
					t.Errorf("epoch %+v", e)
				}
			}
			if len(down.voids) > 0 {
				t.Errorf("voids: %v", down.voids)
			}
			r := down.p.Status().Replicas[0]
			if r.Disk != "UpToDate" || r.LagBytes != 0 || r.LagIsMinimum || r.Epoch != st.Committed.Epoch {
				t.Errorf("%+v", r)
			}
		})
	}
}

// What came while nobody followed is known by the change map: little is sent then, after a
// comparison. Who is at the copy's position needs no cut, and is said to be up to date.
func TestCascadeAfterRestart(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 1500)
	middle, last := newNode(t, "middle", testVolumeSize, 32<<20), newNode(t, "last", testVolumeSize, 32<<20)
	up := startRig(t, src, &memState{}, []*node{middle}, nil)
	up.sync()
	down := startFollower(t, middle, []*node{last}, nil)
	level(t, last, middle)
	down.stop()
	again := func(n *node) *node { // as after a restart of its process
		t.Helper()
		n.recv.Remove(testUUID, n.name)
		if err := n.rep.Close(); err != nil {
			t.Fatal(err)
		}
		return openNode(t, n.name, n.store, ReceiverConfig{})
	}
	up.stop()
	middle = again(middle)
	up = startRig(t, src, up.state, []*node{middle}, nil)
	wroteSome(src, 10, 5)
	up.sync()
	wroteSome(src, 900, 5)
	up.sync()
	middle.rep.fine = nil
	down = startFollower(t, middle, []*node{last}, nil)
	level(t, last, middle)
	last.check(src)
	got := down.brought("last", 0, last.rep.Status().Committed.Epoch)
	if got.SentBytes != 10*BlockSize || got.ComparedBytes < 2*ChunkBytes || got.MarkedBytes > 4*ChunkBytes {
		t.Errorf("for ten blocks in two chunks: %+v", got)
	}
	down.stop()
	last = again(last)
	down = startFollower(t, middle, []*node{last}, nil)
	eventually(t, "up to date without a cut", func() bool {
		r := down.p.Status().Replicas[0]
		return r.Disk == "UpToDate" && !r.LagIsMinimum && r.LagSeconds == 0
	})
	if n := len(down.epochs("last")); n > 0 {
		t.Errorf("%d epochs were sent to one that has everything", n)
	}
	src.write(3)
	up.sync()
	level(t, last, middle)
	last.check(src)
}

// A replica that takes nothing delays the primary's epochs by the limit and no more, though
// they are compared with the copy's image; once it takes something it converges.
func TestCascadeToSlow(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 1500)
	middle, last := newNode(t, "middle", testVolumeSize, 32<<20), newNode(t, "last", testVolumeSize, 32<<20)
	up := startRig(t, src, &memState{}, []*node{middle}, nil)
	up.sync()
	var rate atomic.Int64
	pace := NewPace(rate.Load, nil)
	down := startFollower(t, middle, []*node{last}, func(c *PrimaryConfig) {
		c.CutLimit = 50 * time.Millisecond
		l := &c.Replicas[0].Link
		l.Pace, l.Codec, l.BatchBytes = pace, CodecNone, 64<<10 // an epoch is more than what is read ahead
	})
	was := level(t, last, middle).Committed
	rate.Store(1)
	wroteSome(src, 0, 1500)
	for n := range int64(10) {
		wroteSome(src, 100*n, 100)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if _, _, err := up.p.SyncNow(ctx); err != nil {
			t.Fatalf("the primary waits: %v", err)
		}
		cancel()
	}
	if at := last.rep.Status().Committed; at != was {
		t.Fatalf("at a byte a second it came from %v to %v", was, at)
	}
	last.check(src)
	r := down.p.Status().Replicas[0]
	if r.LagSeconds <= 0 || r.LagBytes < 900*BlockSize {
		t.Errorf("it does not say how far it is behind: %+v", r)
	}
	rate.Store(0)
	level(t, last, middle)
	last.check(src)
}

// heldAt is a node whose replica holds zeros at a position, or strayed there.
func heldAt(t *testing.T, name string, l Lineage, strayed string) *node {
	t.Helper()
	o := FormatOptions{VolumeUUID: testUUID, SizeBytes: testVolumeSize, JournalBytes: 32 << 20, Holds: &Holding{Lineage: l, Since: l.Tip().Epoch, Strayed: strayed}}
	store := blocktest.NewMemory(o.NeededBytes())
	if err := FormatReplica(store, o); err != nil {
		t.Fatal(err)
	}
	return openNode(t, name, store, ReceiverConfig{})
}

// bring begins an epoch of blocks after the writes given, in generation 1, and returns what
// commits it.
func bring(t *testing.T, r *Replica, s EpochStart, writes []uint64, blocks ...int64) EpochCommit {
	t.Helper()
	s.Lineage = line(1, int(s.Epoch))
	if err := r.Begin(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	digest := NewStreamDigest()
	data := make([]byte, BlockSize)
	for _, b := range blocks {
		content(data, b, writes[b])
		frame := AppendFrames(nil, FrameMeta{Epoch: s.Epoch, Attempt: s.Attempt}, b*BlockSize, data, compressor(t, CodecNone))
		f, err := NewFrameReader(frame).Next()
		if err != nil {
			t.Fatal(err)
		}
		digest.Add(f.Header)
		if err := r.Append(t.Context(), 0, frame); err != nil {
			t.Fatal(err)
		}
	}
	return EpochCommit{Epoch: s.Epoch, Attempt: s.Attempt, Streams: []StreamSum{digest.Sum()}}
}

// A cut is what is applied, under that name, whatever else is committed by then; that
// waits until the cut is released.
func TestCascadeCutIsBetweenApplies(t *testing.T) {
	r := heldAt(t, "middle", line(1, 5), "").rep
	source, err := FollowReplica(r)
	if err != nil {
		t.Fatal(err)
	}
	before, err := r.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	epoch := func(number, write uint64) {
		t.Helper()
		c := bring(t, r, EpochStart{Epoch: number, Attempt: 1, Mode: ModeJournal, CutUnixNanos: int64(number)}, []uint64{0, write}, 1)
		if err := r.Commit(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	epoch(6, 1)
	taken := make(chan Cut, 1)
	go func() {
		defer close(taken)
		c, err := source.Cut(context.Background(), 0, CutWish{View: true})
		if err != nil {
			t.Error(err)
			return
		}
		taken <- c
	}()
	eventually(t, "the cut is waited for", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.waiting) == 1
	})
	epoch(7, 2)
	before.Release()
	c := <-taken
	if c == nil {
		t.FailNow()
	}
	f := c.(FollowedCut)
	written, err := source.WrittenBytes()
	if err != nil || c.Epoch() != 6 || !f.Lineage().Equal(line(1, 6)) || f.CutUnixNanos() != 6 || c.WrittenBytes() != BlockSize || written != 2*BlockSize {
		t.Errorf("cut %d of [%v] at %d, %d of %d bytes written (%v)", c.Epoch(), f.Lineage(), f.CutUnixNanos(), c.WrittenBytes(), written, err)
	}
	if st := source.Standing(); st.Err != nil || !st.Lineage.Equal(line(1, 7)) || st.Written != written {
		t.Errorf("it stands at %+v", st)
	}
	if changed, err := c.Changed(5); err != nil || len(changed) != 1 || changed[0] != (Range{BlockSize, BlockSize}) || !c.(ExactCut).ChangedExact(5) {
		t.Errorf("changed: %v, %v", changed, err)
	}
	if changed, err := c.Changed(6); err != nil || len(changed) != 0 {
		t.Errorf("changed since itself: %v, %v", changed, err)
	}
	got, want := make([]byte, BlockSize), make([]byte, BlockSize)
	content(want, 1, 1)
	for range 10 {
		if _, err := c.View().ReadAt(got, BlockSize); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("it does not hold the first write (%v)", err)
		}
		time.Sleep(time.Millisecond)
	}
	if err := errors.Join(c.Valid(), c.FlushSource(), c.Release()); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.WaitApplied(ctx, 7); err != nil {
		t.Errorf("after its release: %v", err)
	}
}

// Nothing is passed on of a copy that has none of the primary's images, or strayed from
// them; nor as the same line of one that went another way while it was passed on.
func TestCascadeNotPassedOn(t *testing.T) {
	if _, err := FollowReplica(newNode(t, "blank", testVolumeSize, 32<<20).rep); !errors.Is(err, ErrNotConsistent) {
		t.Errorf("blank: %v", err)
	}
	if _, err := FollowReplica(heldAt(t, "strayed", line(1, 5), "written by hand").rep); !errors.Is(err, ErrStrayed) || !strings.Contains(err.Error(), "written by hand") {
		t.Errorf("strayed: %v", err)
	}
	middle := heldAt(t, "middle", line(1, 5), "")
	source, err := FollowReplica(middle.rep)
	if err != nil {
		t.Fatal(err)
	}
	begin := func(s EpochStart) {
		t.Helper()
		if err := middle.rep.Begin(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	begin(EpochStart{Epoch: 6, Attempt: 1, Mode: ModeInPlace, Lineage: line(1, 6)})
	if st := source.Standing(); !errors.Is(st.Err, ErrNotConsistent) {
		t.Errorf("while it is written in place: %+v", st)
	}
	if _, err := source.ReadAt(make([]byte, BlockSize), 0); !errors.Is(err, ErrNotConsistent) {
		t.Errorf("read while it is written in place: %v", err)
	}
	if _, err := source.Cut(t.Context(), 0, CutWish{}); !errors.Is(err, ErrNotConsistent) {
		t.Errorf("cut while it is written in place: %v", err)
	}
	if err := middle.rep.Commit(t.Context(), EpochCommit{Epoch: 6, Attempt: 1}); err != nil {
		t.Fatal(err)
	}
	cut, err := source.Cut(t.Context(), 0, CutWish{})
	if err != nil {
		t.Fatal(err)
	}
	if cut.Epoch() != 6 || cut.(ExactCut).ChangedExact(5) {
		t.Errorf("after it: epoch %d, known to the block: %v", cut.Epoch(), cut.(ExactCut).ChangedExact(5))
	}
	cut.Release()
	// It gives way to a line that left its own before.
	other := line(1, 5, 2, 9)
	begin(EpochStart{Epoch: 9, Attempt: 1, Mode: ModeJournal, Full: true, Lineage: other, Discard: line(1, 6).Tip()})
	if err := middle.rep.Commit(t.Context(), EpochCommit{Epoch: 9, Attempt: 1}); err != nil {
		t.Fatal(err)
	}
	if st := source.Standing(); !errors.Is(st.Err, ErrOtherLine) {
		t.Errorf("on another line: %+v", st)
	}
	if c, err := source.Cut(t.Context(), 0, CutWish{}); !errors.Is(err, ErrOtherLine) {
		t.Errorf("cut on another line: %v, %v", c, err)
	}
	if source, err = FollowReplica(middle.rep); err != nil {
		t.Fatal(err)
	}
	if cut, err = source.Cut(t.Context(), 0, CutWish{}); err != nil {
		t.Fatal(err)
	}
	defer cut.Release()
	if got, err := cut.Changed(5); !errors.Is(err, ErrTrackingLost) {
		t.Errorf("changed since before it went that way: %v, %v", got, err)
	}
	// What is beside it went the old way: that is refused, in words.
	last := heldAt(t, "last", line(1, 6), "")
	down := startFollower(t, middle, []*node{last}, nil)
	eventually(t, "refused", func() bool { return down.plan("last").Action == Refuse && down.plan("last").Diverged })
	if at := last.rep.Status().Committed; at != line(1, 6).Tip() {
		t.Errorf("it is at %v", at)
	}
}

// What an epoch in place wrote before it was begun anew is not in its frames: the map has it.
func TestCascadeInPlaceIsNotFine(t *testing.T) {
	middle, last := heldAt(t, "middle", line(1, 5), ""), heldAt(t, "last", line(1, 5), "")
	src := newMemSource(testVolumeSize, BlockSize)
	src.images[5], src.cut = make([]uint64, len(src.blocks)), 5
	startFollower(t, middle, []*node{last}, nil)
	src.write(1)
	src.write(900)
	image := func(number uint64) { src.images[number] = append([]uint64(nil), src.blocks...) }
	image(6)
	bring(t, middle.rep, EpochStart{Epoch: 6, Attempt: 1, Mode: ModeInPlace}, src.blocks, 1, 900)
	// It is there when its session is lost.
	if err := middle.rep.ReadData(t.Context(), make([]byte, BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := middle.rep.Abort(); err != nil {
		t.Fatal(err)
	}
	image(7)
	commit := bring(t, middle.rep, EpochStart{Epoch: 7, Attempt: 2, Mode: ModeInPlace}, src.blocks, 1) // block 900 was found equal
	if err := middle.rep.Commit(t.Context(), commit); err != nil {
		t.Fatal(err)
	}
	if got := level(t, last, middle).Committed.Epoch; got != 7 {
		t.Fatalf("it is at %d", got)
	}
	last.check(src)
}

// A replica whose image is torn, and that is at the copy's position by its label, can't be
// given that again: it waits for the next, and is compared then.
func TestCascadeTornAtTheSamePosition(t *testing.T) {
	middle, last := heldAt(t, "middle", line(1, 5), ""), heldAt(t, "last", line(1, 5), "")
	src := newMemSource(testVolumeSize, BlockSize)
	torn := append([]uint64(nil), src.blocks...)
	torn[900] = 99
	bring(t, last.rep, EpochStart{Epoch: 6, Attempt: 1, Mode: ModeInPlace}, torn, 900)
	if err := errors.Join(last.rep.ReadData(t.Context(), make([]byte, BlockSize), 0), last.rep.Abort()); err != nil {
		t.Fatal(err)
	}
	down := startFollower(t, middle, []*node{last}, nil)
	eventually(t, "a plan", func() bool { return down.plan("last").Action == CompareAll })
	time.Sleep(100 * time.Millisecond) // five intervals
	down.mu.Lock()
	lost := len(down.lost["last"])
	down.mu.Unlock()
	if st := down.p.Status().Replicas[0]; lost > 0 || st.Disk != "Inconsistent" || st.Connection != "Connected" {
		t.Errorf("while it waits: %d sessions ended, %+v", lost, st)
	}
	src.write(1)
	src.images[6] = append([]uint64(nil), src.blocks...)
	commit := bring(t, middle.rep, EpochStart{Epoch: 6, Attempt: 1, Mode: ModeJournal}, src.blocks, 1)
	if err := middle.rep.Commit(t.Context(), commit); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it holds the next", func() bool { return last.check(src) == 6 })
}

// The power fails at any step of the copy, and of its replica at the same moment: whatever is
// left, the replica is not ahead of the copy, and each holds the cut that it names.
func TestCascadePowerCuts(t *testing.T) {
	const size = 1 << 20
	src := newMemSource(size, BlockSize)
	wroteSome(src, 0, 200)
	state := &memState{}
	middle, last := newNode(t, "middle", size, MinJournalBytes), newNode(t, "last", size, MinJournalBytes)
	up := startRig(t, src, state, []*node{middle}, nil)
	up.sync()
	down := startFollower(t, middle, []*node{last}, nil)
	base := level(t, last, middle).Committed
	down.stop()
	up.stop()
	images := [2]*blocktest.Memory{middle.store.Clone(), last.store.Clone()}
	behind, same := 0, 0
	for _, op := range []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush} {
		for k := 0; ; k++ {
			m, l := images[0].Clone(), images[1].Clone()
			failed := false
			t.Run(fmt.Sprintf("%v %d", op, k), func(t *testing.T) {
				// Of a middle that failed nobody asks any more, so this is no node.
				nm, nl := openNode(t, "middle", m, ReceiverConfig{}), openNode(t, "last", l, ReceiverConfig{})
				// Nobody can begin to follow what failed already.
				down := startFollower(t, nm, []*node{nl}, func(c *PrimaryConfig) { c.Interval = time.Millisecond })
				m.FailAt(op, k, errors.New("broken on purpose"))
				up := startRig(t, src, state, []*node{nm}, func(c *PrimaryConfig) { c.Interval = 2 * time.Millisecond })
				for n := range 2 {
					wroteSome(src, int64(100*n), 2)
					want := nl.rep.Status().Committed
					eventually(t, "an epoch, or the end", func() bool {
						failed = nm.rep.Status().Err != nil
						return failed || nl.rep.Status().Committed != want
					})
				}
				rng := rand.New(rand.NewPCG(uint64(k), uint64(op)))
				ml, ll := m.PowerCut(rng), l.PowerCut(rng)
				down.stop()
				up.stop()
				after := [2]*node{openNode(t, "middle", ml, ReceiverConfig{}), openNode(t, "last", ll, ReceiverConfig{})}
				var at [2]Lineage
				for i, n := range after {
					n.check(src)
					at[i] = n.rep.Status().Lineage
				}
				switch Compare(at[1], at[0]).Kind {
				case Same:
					same++
				case Behind:
					behind++
				default:
					t.Errorf("the replica is at %v, the copy at %v", at[1], at[0])
				}
			})
			if t.Failed() || !failed {
				break
			}
		}
	}
	t.Logf("from %v: %d times level, %d times behind", base, same, behind)
	if same == 0 || behind == 0 {
		t.Error("not all outcomes came")
	}
}

// Of several epochs the fine log names what they changed, and forgets the oldest first.
func TestFineLog(t *testing.T) {
	set := func(blocks ...int64) (s blockSet) {
		for _, b := range blocks {
			s.add(Range{b * BlockSize, BlockSize})
		}
		return s
	}
	l := &fineLog{from: 5}
	l.add(fineEpoch{6, set(1), true})
	l.add(fineEpoch{8, set(1, 3), false})
	l.add(fineEpoch{9, set(blockSetPageBytes / BlockSize), false})
	for _, c := range []struct {
		since, upTo uint64
		want        bool
	}{{4, 9, false}, {5, 9, false}, {5, 6, false}, {6, 9, true}, {7, 8, true}, {9, 9, true}} {
		if l.exact(c.since, c.upTo) != c.want {
			t.Errorf("%d to %d: exact is %v", c.since, c.upTo, !c.want)
		}
	}
	count := func(since, upTo uint64) int64 {
		s, ok := l.between(since, upTo)
		if !ok {
			return -1
		}
		return totalBytes(s.within(nil, Range{0, 2 * blockSetPageBytes})) / BlockSize
	}
	for _, c := range []struct {
		since, upTo uint64
		want        int64
	}{{4, 9, -1}, {5, 9, 3}, {5, 8, 2}, {5, 6, 1}, {6, 8, 2}, {8, 9, 1}, {9, 9, 0}} {
		if got := count(c.since, c.upTo); got != c.want {
			t.Errorf("%d to %d: %d blocks, want %d", c.since, c.upTo, got, c.want)
		}
	}
	l.forget(7)
	if count(5, 9) != -1 || count(6, 9) != 3 {
		t.Errorf("after the oldest was forgotten: %d, %d", count(5, 9), count(6, 9))
	}
	for e := uint64(10); e < 10+maxFinePages; e++ {
		l.add(fineEpoch{e, set(1), false})
	}
	if l.pages > maxFinePages || count(8, 9) != -1 {
		t.Errorf("%d pages, and since 8 %d", l.pages, count(8, 9))
	}
}

// A block that was changed and changed back between two of the copy's cuts may be something
// else at one in between, which others have: the copy names it, and what it feeds does.
func TestCascadeNamesWhatWasCompared(t *testing.T) {
	const block = 900
	at := Range{block * BlockSize, BlockSize}
	// fed is a copy that goes from cut 5 to cut 7, by a comparison, while it is followed.
	fed := func(t *testing.T, follow func(middle *node)) *node {
		src := newMemSource(testVolumeSize, BlockSize)
		wroteSome(src, 0, 1500)
		was := src.blocks[block]
		middle, line := newNode(t, "middle", testVolumeSize, 32<<20), Lineage{{gen(1), 5}}
		feedTo(t, src, middle, line, 0, 5, false)
		follow(middle)
		src.write(block)
		other, err := src.Cut(t.Context(), 6, CutWish{}) // which others get
		must(t, err)
		must(t, other.Release())
		src.undo(block, was)
		if frames := feedTo(t, src, middle, line, 5, 7, true); frames != 0 {
			t.Fatalf("%d frames: that was no test", frames)
		}
		return middle
	}
	t.Run("to one that was at a cut in between", func(t *testing.T) {
		var source *ReplicaSource
		fed(t, func(middle *node) {
			var err error
			source, err = FollowReplica(middle.rep)
			must(t, err)
		})
		cut, err := source.Cut(t.Context(), 0, CutWish{View: true, Since: 6})
		must(t, err)
		defer func() { must(t, cut.Release()) }()
		changed, err := cut.Changed(6)
		if missing := subtractRanges([]Range{at}, changed); err != nil || len(missing) > 0 || cut.(ExactCut).ChangedExact(6) {
			t.Errorf("since cut 6 it names %v (%v), exact: %v", changed, err, cut.(ExactCut).ChangedExact(6))
		}
	})
	t.Run("to one that is carried elsewhere later", func(t *testing.T) {
		last := newNode(t, "last", testVolumeSize, 32<<20)
		var down *rig
		middle := fed(t, func(middle *node) {
			down = startFollower(t, middle, []*node{last}, nil)
			level(t, last, middle)
		})
		level(t, last, middle)
		eventually(t, "the epoch is told of", func() bool { e := down.epochs("last"); return len(e) > 0 && e[len(e)-1].Epoch == 7 })
		if e := down.epochs("last"); e[len(e)-1].Action != "incremental" || e[len(e)-1].Link.SentBytes > BlockSize {
			t.Errorf("%+v", e[len(e)-1])
		}
		must(t, last.rep.WaitApplied(t.Context(), 7))
		image, err := last.rep.Hold(t.Context())
		must(t, err)
		defer image.Release()
		if since, err := image.ChangedSince(6); err != nil || !chunksOf(t, testVolumeSize, since)[at.Offset/ChunkBytes] {
			t.Errorf("since cut 6 it names %v (%v), want the chunk of %d", since, err, at.Offset)
		}
	})
}
