package protocol

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"blockferry/blockdev/blocktest"
	"blockferry/proto"
)

// asking counts how often a replica is asked what changed there.
type asking struct {
	proto.ReplicationClient
	n *atomic.Int32
}

type askingStream struct {
	grpc.BidiStreamingClient[proto.FromPrimary, proto.FromReplica]
	n *atomic.Int32
}

func (a asking) Replicate(ctx context.Context, o ...grpc.CallOption) (grpc.BidiStreamingClient[proto.FromPrimary, proto.FromReplica], error) {
	s, err := a.ReplicationClient.Replicate(ctx, o...)
	return askingStream{s, a.n}, err
}

func (s askingStream) Send(m *proto.FromPrimary) error {
	if m.GetAskChanges() != nil {
		s.n.Add(1)
	}
	return s.BidiStreamingClient.Send(m)
}

// While nobody may decide, a copy that went its own way is not made to read its map
// again and again; and the operator's word is good for one time, at one position.
func TestWordIsGoodForOneTime(t *testing.T) {
	var asked atomic.Int32
	r := newWaywardWith(t, wayward{grain: BlockSize, known: true, written: true}, func(c *PrimaryConfig) {
		c.Replicas[0].Client = asking{c.Replicas[0].Client, &asked}
	})
	r.refused("both went on separately")
	tries := func() int { r.mu.Lock(); defer r.mu.Unlock(); return len(r.plans["old"]) }
	more := tries() + 5
	eventually(t, "it is tried again", func() bool { must(t, r.p.Resume("old")); return tries() >= more })
	if n := asked.Load(); n > 0 {
		t.Errorf("asked %d times what changed there, and nobody may decide", n)
	}
	before := r.disk.store.Clone()
	must(t, r.disk.rep.GiveUp(r.tip))
	r.sync()
	if asked.Load() == 0 {
		t.Error("it was given up, and not asked what changed there")
	}
	// The disk as it was is brought back.
	must(t, r.p.Pause("old"))
	r.disk.recv.Remove(testUUID, "old")
	must(t, r.disk.rep.Close())
	rep, err := OpenReplica(t.Context(), before, OpenOptions{RescueDir: r.dir})
	must(t, err)
	r.disk.store, r.disk.rep = before, rep
	must(t, r.disk.recv.Add("old", rep))
	must(t, r.p.Resume("old"))
	more = tries() + 2
	eventually(t, "it is refused again", func() bool { return tries() >= more })
	r.refused("both went on separately")
	if st := rep.Status(); st.Committed != r.tip {
		t.Errorf("an old word counted: %+v", st)
	}
}

// Nobody waits for a replica that only the operator can bring up to date. What was
// refused before is tried once more: the word may have been given since.
func TestDrainDoesNotWaitInVain(t *testing.T) {
	r := newWaywardWith(t, wayward{grain: BlockSize, known: true, written: true}, func(c *PrimaryConfig) {
		c.RetryMax = time.Hour
		c.Events.Behind = func(_, reason string, cause error) {
			if split, _ := IsSplitBrain(cause); split != strings.HasPrefix(reason, "the replica may not be written") || cause != nil && strings.HasPrefix(reason, "it catches up") {
				t.Errorf("%q comes with cause %v", reason, cause)
			}
		}
	})
	r.refused("both went on separately")
	drain := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		_, _, err := r.p.Drain(ctx, false)
		return err
	}
	if err := drain(); !errors.Is(err, ErrWaitIsVain) || !strings.Contains(err.Error(), "old (the replica may not be written: both went on separately") {
		t.Fatal(err)
	}
	cause := func() error { return r.p.Status().Replicas[0].Cause }
	if split, primary := IsSplitBrain(cause()); !split || primary {
		t.Errorf("the cause is %v", cause())
	}
	must(t, r.disk.rep.GiveUp(r.tip))
	must(t, drain())
	if err := cause(); err != nil {
		t.Errorf("it follows, yet: %v", err)
	}
	r.disk.check(r.src)
	must(t, r.p.Pause("old"))
	wroteSome(r.src, 70, 3)
	if err := drain(); !errors.Is(err, ErrWaitIsVain) || !strings.Contains(err.Error(), "paused") {
		t.Fatal(err)
	}
}

// One replica that does not come up to date keeps the others from the last cut only where
// all are asked for.
func TestDrainGoesOnForTheOthers(t *testing.T) {
	p := &Primary{cfg: PrimaryConfig{Clock: realClock{}}, kick: make(chan struct{}, 1), changed: make(chan struct{}), state: SourceState{OpenEpoch: 9}}
	p.ctx, p.cancel = context.WithCancel(t.Context())
	defer p.cancel()
	vain, slow := newReplicaWorker(p, ReplicaConfig{Name: "vain"}), newReplicaWorker(p, ReplicaConfig{Name: "slow"})
	vain.paused, p.workers = true, []*replicaWorker{vain, slow}
	for _, c := range []struct {
		others bool
		slow   uint64
		want   error
	}{{false, 8, ErrWaitIsVain}, {true, 8, context.DeadlineExceeded}, {true, 9, ErrWaitIsVain}} {
		slow.holds = c.slow
		patience := 30 * time.Second
		if c.want == context.DeadlineExceeded {
			patience = 50 * time.Millisecond
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if _, _, err := p.Drain(ctx, c.others); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v", c, err)
		}
		cancel()
	}
}

// Trackers name what changed by grains that differ; what weighs is the same grain on
// both sides.
func TestLeastChangesOfOneGrain(t *testing.T) {
	blocks := func(n, apart int64) (out []Range) {
		for i := range n {
			out = append(out, Range{i * apart, BlockSize})
		}
		return out
	}
	const size = 64 << 20
	for _, c := range []struct {
		name        string
		fine, grain []Range
		more        bool // the first changed more
	}{
		{"scattered blocks against whole chunks", blocks(100, ChunkBytes), []Range{{0, ChunkBytes}, {8 * ChunkBytes, 3 * ChunkBytes}}, true},
		{"few blocks against whole chunks", blocks(3, ChunkBytes), []Range{{0, ChunkBytes}, {8 * ChunkBytes, 3 * ChunkBytes}}, false},
		{"scattered blocks against era blocks", blocks(14, 4<<20), []Range{{4 << 20, 4 << 20}, {16 << 20, 8 << 20}}, true},
		{"the last chunk ends with the volume", blocks(2, ChunkBytes), []Range{{ChunkBytes, ChunkBytes}, {size - 3*ChunkBytes, 3*ChunkBytes - BlockSize}}, false},
	} {
		grain := max(grainOf(c.fine), grainOf(c.grain))
		a, b := totalBytes(widen(c.fine, grain, size)), totalBytes(widen(c.grain, grain, size))
		if (a > b) != c.more || missing(widen(c.fine, grain, size), c.fine) >= 0 {
			t.Errorf("%s: by grains of %d it is %d bytes against %d", c.name, grain, a, b)
		}
	}
	if grainOf(nil) != maxGrain || grainOf(blocks(3, 12<<10)) != BlockSize {
		t.Errorf("grains %d, %d", grainOf(nil), grainOf(blocks(3, 12<<10)))
	}
	if got := widen([]Range{{size - BlockSize, BlockSize}}, maxGrain, size); got[0].End() > size {
		t.Errorf("beyond the volume: %v", got)
	}
}

// The policy through the whole of it: here more was written, in fewer bytes than the map of
// the other names.
func TestLeastChangesDecidesByOneGrain(t *testing.T) {
	r := newWaywardWith(t, wayward{grain: BlockSize, known: true, written: true, policy: SplitBrainZero}, func(c *PrimaryConfig) {
		c.Replicas[0].SplitBrain = SplitBrainLeast
		src := c.Source.(*memSource)
		for chunk := int64(0); chunk < testVolumeSize/ChunkBytes; chunk++ {
			src.write(chunk * ChunkBytes / BlockSize)
		}
	})
	r.sync()
	r.disk.check(r.src)
	if p := r.plan("old"); !strings.Contains(p.Rule, string(SplitBrainLeast)) || p.Action == Refuse {
		t.Errorf("%v", p)
	}
}

// What a crash left of a rescue file goes away with the next one of the same copy; those
// of others, and whole ones, stay.
func TestRescueClearsWhatACrashLeft(t *testing.T) {
	dir := t.TempDir()
	from := noisyDevice(t, 1)
	whole, err := WriteRescue(dir, rescueInfo(), []Range{{0, 4096}}, from)
	must(t, err)
	other := rescueInfo()
	other.ReplicaUUID = [16]byte{6}
	crashed := func(i RescueInfo) string {
		from.FailAt(blocktest.OpRead, 1, errors.New("broken on purpose"))
		left := ""
		_, err := WriteRescue(dir, i, []Range{{0, 4096}, {8192, 4096}}, readerAtFunc(func(p []byte, at int64) (int, error) {
			files, err := filepath.Glob(filepath.Join(dir, fmt.Sprintf(".%x*", i.ReplicaUUID)))
			must(t, err)
			for _, f := range files {
				if b, err := os.ReadFile(f); err == nil && at > 0 {
					left = f
					must(t, os.WriteFile(f+".copy", b, 0o600))
				}
			}
			return from.ReadAt(p, at)
		}))
		if err == nil || left == "" {
			t.Fatalf("%v, %q", err, left)
		}
		must(t, os.Rename(left+".copy", left))
		return left
	}
	theirs, mine := crashed(other), crashed(rescueInfo())
	second, err := WriteRescue(dir, rescueInfo(), []Range{{0, 4096}}, from)
	must(t, err)
	for path, want := range map[string]bool{theirs: true, mine: false, whole: true, second: true} {
		if _, err := os.Stat(path); (err == nil) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
}

type readerAtFunc func([]byte, int64) (int, error)

func (f readerAtFunc) ReadAt(p []byte, at int64) (int, error) { return f(p, at) }

// An epoch that does not fit beside the journal saves nothing first: it comes again and
// again, and each time would be another file.
func TestNoRescueBeforeTheSpill(t *testing.T) {
	m := newModel(t, 5, 8<<20)
	m.fill(m.image)
	o := testOptions(m.size)
	o.Holds = &Holding{Lineage: line(1, 11), Strayed: "written", Since: 7, Changed: []Range{{0, m.size}}}
	dev, dir := testDevice(m.size), t.TempDir()
	must(t, FormatReplica(dev, o))
	spill := &testSpill{limit: testSpillLimit}
	opened := spill.options()
	opened.RescueDir = dir
	r, err := OpenReplica(t.Context(), dev, opened)
	must(t, err)
	t.Cleanup(func() { must(t, r.Close()) })
	try := func(attempt uint32) error {
		l := Lineage{{gen(1), 7}, {gen(2), 9}}
		must(t, r.Begin(t.Context(), EpochStart{Epoch: 9, Attempt: attempt, Mode: ModeJournal, Lineage: l, Discard: line(1, 11).Tip()}))
		c, err := NewCompressor(CodecNone)
		must(t, err)
		digest := NewStreamDigest()
		for at := int64(0); at < m.size; at += 1 << 20 {
			frames := AppendFrames(nil, FrameMeta{Epoch: 9, Attempt: attempt}, at, m.image[at:at+1<<20], c)
			must(t, digest.AddFrames(frames))
			must(t, r.Append(t.Context(), 0, frames))
		}
		if r.Status().SpilledBytes == 0 {
			t.Fatal("nothing was spilled")
		}
		return r.Commit(t.Context(), EpochCommit{Epoch: 9, Attempt: attempt, Streams: []StreamSum{digest.Sum()}})
	}
	spill.mem.FailAt(blocktest.OpFlush, 0, errors.New("no room"))
	for attempt := range uint32(2) {
		if err := try(attempt + 1); !errors.Is(err, ErrJournalFull) {
			t.Fatal(err)
		}
		spill.mem.FailAt(blocktest.OpFlush, 0, errors.New("no room"))
	}
	files, err := os.ReadDir(dir)
	must(t, err)
	if len(files) > 0 || r.Status().Committed != line(1, 11).Tip() {
		t.Fatalf("saved %v, it holds %v", files, r.Status().Committed)
	}
	// The rescue fails after the spill is durable: the old image, and the room is given back.
	spill.mem.FailAt(blocktest.OpFlush, -1, nil)
	must(t, os.Remove(dir))
	if err := try(3); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	must(t, r.Abort())
	if st := r.Status(); st.SpilledBytes != 0 || st.Err != nil || st.Committed != line(1, 11).Tip() {
		t.Fatalf("%+v", st)
	}
	must(t, os.Mkdir(dir, 0o700))
	must(t, try(4))
	must(t, r.WaitApplied(t.Context(), 9))
	if at := firstDifference(dataOf(t, dev, m.size), m.image); at >= 0 {
		t.Errorf("differs at %d", at)
	}
	if files, err = os.ReadDir(dir); err != nil || len(files) != 1 {
		t.Errorf("saved %v, %v", files, err)
	}
}

// The map goes on naming what it named when a copy switches to a line whose numbers are lower.
func TestMapKeepsTheLaterEpoch(t *testing.T) {
	o := testOptions(testVolume)
	changed := Range{1 << 20, ChunkBytes}
	o.Holds = &Holding{Lineage: line(1, 20), Since: 7, Changed: []Range{changed}}
	dev := testDevice(testVolume)
	must(t, FormatReplica(dev, o))
	r := open(t, dev)
	touched := newTouched(testVolume)
	touched.add(Frame{Kind: FrameData, Offset: changed.Offset, Length: BlockSize})
	// The map is durable before the data: here the power goes between.
	_, err := r.cmap.update(touched, 9)
	must(t, err)
	since, err := r.ChangedSince(t.Context(), Position{gen(1), 12})
	must(t, err)
	if at := missing(since, []Range{changed}); at >= 0 {
		t.Errorf("what changed after epoch 12 is %v, %v is missing", since, changed)
	}
}

// Nobody writes to a device while its image is read: who takes over waits.
func TestTakeOverWaitsForReaders(t *testing.T) {
	m := newModel(t, 6, testVolume)
	dev := testDevice(m.size)
	must(t, FormatReplica(dev, testOptions(m.size)))
	r := open(t, dev)
	must(t, m.send(r, epochPlan{mode: ModeInPlace, full: true, blocks: 3}))
	image, err := r.Hold(t.Context())
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	label := &memState{}
	if _, err := r.TakeOver(ctx, label, TakeOverOptions{Force: true}); !errors.Is(err, context.DeadlineExceeded) || label.saves > 0 || !r.Status().TookOver.IsZero() {
		t.Fatalf("it took over while an image is read: %v, %+v", err, r.Status())
	}
	image.Release()
	_, err = r.TakeOver(t.Context(), label, TakeOverOptions{Force: true})
	must(t, err)
}

// A superblock from an earlier life as a replica says nothing once the device was primary:
// wherever the power goes, what it held then is not taken for what it holds.
func TestStandDownForgetsAnEarlierLife(t *testing.T) {
	m := newModel(t, 8, testVolume)
	dev := replicaWith(t, m)
	must(t, open(t, dev).Close()) // all applied
	s := SourceState{Lineage: m.lineage.Extend(Position{gen(9), 50}), Generation: gen(9), Clean: true}
	// It was filled and written as primary, and its tail was left as it was.
	_, err := dev.WriteAt(m.noise(1<<20), 2<<20)
	must(t, err)
	must(t, dev.Flush())
	l := &memState{b: mustEncode(t, s)}
	o := StandDownOptions{Format: testOptions(m.size)}
	looks := 0
	var label *labelOf
	check := func(t *testing.T, d *blocktest.Memory, label *memState) {
		if got, err := DecodeSourceState(label.b); err != nil || !got.Secondary {
			must(t, err)
			return // it is primary
		}
		if r, err := OpenReplica(t.Context(), d.Clone(), OpenOptions{}); err == nil {
			if st := r.Status(); !st.Lineage.Equal(s.Lineage) {
				t.Fatalf("it says that it holds %v, it is %v", st.Lineage, s.Lineage)
			}
			must(t, r.Close())
		}
		h, err := StandDown(label, d, o)
		must(t, err)
		if !h.Lineage.Equal(s.Lineage) {
			t.Fatalf("told again it says that it holds %v, it is %v", h.Lineage, s.Lineage)
		}
	}
	eachPowerCut(t, dev, func(d *blocktest.Memory) error {
		label = &labelOf{memState: memState{b: l.b}}
		_, err := StandDown(label, d, o)
		return err
	}, func(t *testing.T, after *blocktest.Memory) {
		if looks++; looks%10 == 0 {
			check(t, after, &memState{b: label.b})
		}
	})
	for _, written := range []bool{false, true} {
		label := &labelOf{memState: memState{b: l.b}, fail: true, written: written}
		d := dev.Clone()
		if _, err := StandDown(label, d, o); err == nil {
			t.Fatal("the label failed, and nobody said so")
		}
		check(t, d, &memState{b: label.b})
	}
}
