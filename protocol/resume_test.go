package protocol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"blockferry/blockdev/blocktest"
	"blockferry/proto"
)

// connect waits until the session before has ended.
func (n *node) connect(primary Lineage) *Link {
	n.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		link, err := Connect(n.t.Context(), n.client(), LinkConfig{VolumeUUID: testUUID, SizeBytes: n.rep.Status().SizeBytes, Replica: n.name}, primary)
		var refused *RefusedError
		if err == nil {
			n.t.Cleanup(link.Close)
			return link
		}
		if !errors.As(err, &refused) || refused.Reason != proto.Reason_REASON_BUSY || time.Now().After(end) {
			n.t.Fatal(err)
		}
	}
}

// Over a link that breaks again and again, long before what is missing has
// passed, a first sync and a large epoch end all the same, and little is sent twice.
func TestResumeOverBreakingLink(t *testing.T) {
	const size, every = 24 << 20, 4 << 20
	for _, test := range []struct {
		name    string
		prepare func(src *memSource, r *rig)
		resumed int // lost sessions that it goes across
	}{
		{"first sync", nil, 4},
		{"journal", func(src *memSource, r *rig) {
			r.sync()
			wroteSome(src, 0, size/BlockSize)
		}, 4},
		{"compare", func(src *memSource, r *rig) {
			r.sync()
			wroteSome(src, 0, size/BlockSize)
			src.mu.Lock()
			src.lostBefore = src.cut + 1
			src.mu.Unlock()
		}, 4},
	} {
		t.Run(test.name, func(t *testing.T) {
			src := newMemSource(size, 64<<10)
			wroteSome(src, 0, size/BlockSize)
			n := newNode(t, "peer", size, 40<<20)
			n.recv.cfg.WindowBytes = MaxFramesBytes
			r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
				c.Replicas[0].Link.Codec, c.Replicas[0].Link.BatchBytes = CodecNone, 1<<20
				c.Interval = time.Hour // no cut but those that are asked for
				if test.prepare == nil {
					n.limit = func() int64 { return every }
				}
			})
			if test.prepare != nil {
				test.prepare(src, r)
				n.mu.Lock()
				n.limit, n.bytes = func() int64 { return every }, 0
				n.mu.Unlock()
				n.cutWires()
			}
			epoch := r.sync()
			if e := n.check(src); e < epoch {
				t.Errorf("it holds epoch %d, want %d", e, epoch)
			}
			last := r.last("peer")
			n.mu.Lock()
			defer n.mu.Unlock()
			sent := float64(n.bytes) / size
			t.Logf("%d cuts, %.2f times what changed crossed the link; %+v", n.cuts, sent, last)
			if last.Link.MarkedBytes > size+size/2 {
				t.Errorf("%d bytes are said to have changed, of %d", last.Link.MarkedBytes, size)
			}
			if last.Resumed < test.resumed || sent > 1.3 || sent < 0.8 {
				t.Errorf("the epoch went across %d lost sessions, want %d or more, and sent %.2f times what changed, want 0.8 to 1.3", last.Resumed, test.resumed, sent)
			}
		})
	}
}

// A link that breaks more often than an epoch has rounds is no hindrance.
func TestResumeOutlastsRounds(t *testing.T) {
	const size = 20 << 20
	src := newMemSource(size, 64<<10)
	wroteSome(src, 0, size/BlockSize)
	n := newNode(t, "peer", size, 8<<20)
	n.recv.cfg.WindowBytes = MaxFramesBytes
	n.limit = func() int64 { return 200 << 10 }
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		c.Replicas[0].Link.Codec, c.Replicas[0].Link.BatchBytes = CodecNone, UnitSize
		c.Interval = time.Hour
	})
	epoch := r.sync()
	if e := n.check(src); e < epoch {
		t.Errorf("it holds epoch %d, want %d", e, epoch)
	}
	if e := r.last("peer"); e.Resumed <= MaxRounds || e.Rounds >= MaxRounds {
		t.Errorf("want more than %d lost sessions, in fewer rounds: %+v", MaxRounds, e)
	}
}

// stored waits until the replica has said that all that left is there.
func (l *Link) stored(t *testing.T) {
	t.Helper()
	eventually(t, "all is stored", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return len(l.log.messages) == 0
	})
}

// A, then B in a session that is lost, then A again: what was kept of the B is not
// left there because the image below has an A.
func TestBackToTheOldContentAcrossSessions(t *testing.T) {
	n := newNode(t, "peer", testVolumeSize, 32<<20)
	all := []Range{{0, testVolumeSize}}
	send := func(l *Link, round uint32, content byte) {
		t.Helper()
		_, err := l.SendRound(t.Context(), Round{Number: round, Source: bytes.NewReader(bytes.Repeat([]byte{content}, testVolumeSize)), Ranges: all, Narrow: round > 0})
		must(t, err)
	}
	for i, mode := range []Mode{ModeInPlace, ModeJournal} {
		epoch := 2*i + 1
		link := n.connect(line(1, epoch))
		must(t, link.Begin(t.Context(), EpochStart{Epoch: uint64(epoch), Mode: mode, Full: true, Lineage: line(1, epoch)}, false))
		if mode == ModeInPlace {
			send(link, 0, 'A')
		}
		send(link, 1, 'B')
		link.stored(t)
		link.Close()
		e := link.interrupted()
		link = n.connect(line(1, epoch))
		if missing, ok := link.kept(e); !ok || len(missing) > 0 {
			t.Fatalf("kept %v, missing %v", ok, missing)
		}
		must(t, link.resume(t.Context(), e))
		send(link, 2, 'A')
		must(t, link.Commit(t.Context(), line(1, epoch+1), 0))
		link.Close()
		img, err := n.rep.Hold(t.Context())
		must(t, err)
		b := make([]byte, testVolumeSize)
		_, err = img.ReadAt(b, 0)
		must(t, err)
		img.Release()
		if at := firstDifference(b, bytes.Repeat([]byte{'A'}, len(b))); at >= 0 {
			t.Fatalf("mode %d: no A at %d", mode, at)
		}
	}
}

// reopen ends the replica and opens what its disk then holds.
func (n *node) reopen(powerCut func(*blocktest.Memory) *blocktest.Memory) {
	n.t.Helper()
	n.recv.Remove(testUUID, n.name)
	if powerCut != nil {
		after := powerCut(n.store)
		_ = n.rep.Close()
		n.store = after
	} else {
		must(n.t, n.rep.Close())
	}
	rep, err := OpenReplica(context.Background(), n.store, OpenOptions{RescueDir: n.t.TempDir()})
	must(n.t, err)
	n.rep = rep
	must(n.t, n.recv.Add(n.name, rep))
}

// Whatever is written while links break, replicas are opened anew, lose what was not
// durable, and primaries start again: a replica holds one cut's image.
func TestResumedEpochsAreOneCut(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rng := testRand(seed)
			src := newMemSource(testVolumeSize, []int64{BlockSize, 64 << 10}[seed%2])
			if seed%3 == 2 {
				src.frozenMax = 60 * BlockSize
			}
			wroteSome(src, 0, 1800)
			n := newNode(t, "peer", testVolumeSize, 32<<20)
			n.recv.cfg.WindowBytes = MaxFramesBytes
			lengths := testRand(seed + 100)
			n.limit = func() int64 { return 200<<10 + lengths.Int64N(1200<<10) } // n.mu is held
			state := &memState{}
			start := func() *rig {
				return startRig(t, src, state, []*node{n}, func(c *PrimaryConfig) { c.Replicas[0].Link.BatchBytes = 128 << 10 })
			}
			r := start()
			resumed := 0
			count := func() {
				for _, p := range r.epochs("peer") {
					resumed += p.Resumed
				}
			}
			cuts := func() int { n.mu.Lock(); defer n.mu.Unlock(); return n.cuts }
			stop := src.busy(t, seed, 300*time.Microsecond)
			for range 8 {
				before := cuts()
				wroteSome(src, rng.Int64N(600), 1200)
				eventually(t, "the link breaks", func() bool { return cuts() > before+1 })
				switch rng.IntN(5) {
				case 0:
					n.reopen(nil)
				case 1:
					n.reopen(func(m *blocktest.Memory) *blocktest.Memory { return m.PowerCut(rng) })
				case 2:
					ctx, cancel := context.WithCancel(context.Background())
					cancel()
					_, _ = r.p.Stop(ctx, nil)
					count()
					r = start()
				}
				n.check(src)
			}
			stop()
			epoch := r.sync()
			if e := n.check(src); e < epoch {
				t.Errorf("it holds epoch %d, want %d", e, epoch)
			}
			count()
			if resumed == 0 {
				t.Error("no epoch went across a lost session: the test shows nothing")
			}
			if len(r.voids) > 0 {
				t.Errorf("voids: %v", r.voids)
			}
		})
	}
}

// What was read of a view that was void is not gone on with.
func TestVoidViewIsNotResumed(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 2000)
	n := newNode(t, "peer", testVolumeSize, 32<<20)
	n.recv.cfg.WindowBytes = MaxFramesBytes
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		c.Replicas[0].Link.Codec, c.Replicas[0].Link.BatchBytes = CodecNone, 128<<10 // it is not read far ahead of the break
	})
	r.sync()
	n.mu.Lock()
	n.limit = func() int64 { return 3 << 20 }
	n.mu.Unlock()
	n.cutWires()
	src.mu.Lock()
	voided := 0
	src.validErr = func(uint64) error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.cuts != 1 || voided > 0 {
			return nil
		}
		n.limit = nil
		voided++
		return errors.New("void on purpose")
	}
	src.mu.Unlock()
	wroteSome(src, 0, 2000)
	epoch := r.sync()
	if e := n.check(src); e < epoch {
		t.Errorf("it holds epoch %d, want %d", e, epoch)
	}
	for _, e := range r.epochs("peer") {
		if e.Resumed > 0 {
			t.Errorf("it went on: %+v", e)
		}
	}
	src.mu.Lock()
	defer src.mu.Unlock()
	if voided == 0 {
		t.Error("no view was void: the test shows nothing")
	}
}

// What is kept, and has changed again, may leave no room for the rest: it is
// sent anew, and not taken for an epoch that the journal can't hold.
func TestKeptFramesMakeWay(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, testVolumeSize/BlockSize)
	n := newNode(t, "peer", testVolumeSize, 11<<20)
	n.recv.cfg.WindowBytes = MaxFramesBytes
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		c.Replicas[0].CatchUpInPlace, c.Replicas[0].Link.Codec = true, CodecNone
		c.Interval = time.Hour
	})
	r.sync()
	n.mu.Lock()
	n.limit = func() int64 { n.down = true; return 6 << 20 }
	n.mu.Unlock()
	n.cutWires()
	all := func() { wroteSome(src, 0, testVolumeSize/BlockSize) }
	all()
	synced := make(chan uint64)
	go func() { epoch, _, _ := r.p.SyncNow(t.Context()); synced <- epoch }()
	eventually(t, "the link breaks", func() bool { n.mu.Lock(); defer n.mu.Unlock(); return n.cuts > 0 })
	all()
	n.mu.Lock()
	n.limit, n.down = nil, false
	n.mu.Unlock()
	epoch := <-synced
	if e := n.check(src); e < epoch || epoch == 0 {
		t.Errorf("it holds epoch %d, want %d", e, epoch)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	went := false
	for i, p := range r.plans["peer"] {
		if went = went || strings.Contains(p.Rule, "it goes on with epoch"); i > 0 && p.InPlace {
			t.Errorf("it was caught up in place: %v", p)
		}
	}
	if e := r.epoch["peer"]; !went || e[len(e)-1].Resumed != 0 {
		t.Errorf("the plans were %v, the epochs %+v", r.plans["peer"], e)
	}
}

// tamper changes messages on their way.
type tamper struct {
	grpc.ClientConnInterface
	up   func(*proto.FromPrimary)
	down func(*proto.FromReplica)
}

type tamperStream struct {
	grpc.ClientStream
	t tamper
}

func (t tamper) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, o ...grpc.CallOption) (grpc.ClientStream, error) {
	st, err := t.ClientConnInterface.NewStream(ctx, d, method, o...)
	return &tamperStream{st, t}, err
}

func (s *tamperStream) SendMsg(m any) error {
	if s.t.up != nil {
		s.t.up(m.(*proto.FromPrimary))
	}
	return s.ClientStream.SendMsg(m)
}

func (s *tamperStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil && s.t.down != nil {
		s.t.down(m.(*proto.FromReplica))
	}
	return err
}

// A node that does not know of it gets what it always got, and one that names what it
// has not got is not gone on with.
func TestResumeNeedsBoth(t *testing.T) {
	without := func(features []string) (out []string) {
		for _, f := range features {
			if f != FeatureResume {
				out = append(out, f)
			}
		}
		return out
	}
	kept := func(change func(*proto.Kept)) tamper {
		return tamper{down: func(m *proto.FromReplica) {
			if k := m.GetWelcome().GetKept(); k != nil {
				change(k)
			}
		}}
	}
	for name, test := range map[string]tamper{
		"old primary": {up: func(m *proto.FromPrimary) {
			if h := m.GetHello(); h != nil {
				h.Features = without(h.Features)
			}
		}},
		"old replica": {
			up: func(m *proto.FromPrimary) {
				if b := m.GetBegin(); b != nil && (len(b.Token) > 0 || b.Resume) {
					t.Error("an old replica is asked to keep an epoch")
				}
			},
			down: func(m *proto.FromReplica) {
				if w := m.GetWelcome(); w != nil {
					w.Features, w.Kept = without(w.Features), nil
				}
			}},
		"another token":  kept(func(k *proto.Kept) { k.Token[3] ^= 1 }),
		"too few frames": kept(func(k *proto.Kept) { k.Streams[0].Frames-- }),
		"another digest": kept(func(k *proto.Kept) { k.Streams[0].Digest[3] ^= 1 }),
		"short digest":   kept(func(k *proto.Kept) { k.Streams[0].Digest = k.Streams[0].Digest[:31] }),
		"long digest":    kept(func(k *proto.Kept) { k.Streams[0].Digest = append(k.Streams[0].Digest, 0) }),
		"two streams":    kept(func(k *proto.Kept) { k.Streams = append(k.Streams, k.Streams[0]) }),
		"no streams":     kept(func(k *proto.Kept) { k.Streams = nil }),
		"another epoch":  kept(func(k *proto.Kept) { k.Epoch++ }),
		"another try":    kept(func(k *proto.Kept) { k.Attempt++ }),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			src := newMemSource(testVolumeSize, BlockSize)
			wroteSome(src, 0, 2000)
			n := newNode(t, "peer", testVolumeSize, 32<<20)
			n.recv.cfg.WindowBytes = MaxFramesBytes
			test.ClientConnInterface = n.conn
			r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
				c.Interval, c.Replicas[0].Client = time.Hour, proto.NewReplicationClient(test)
			})
			r.sync()
			n.mu.Lock()
			n.limit = func() int64 {
				if n.cuts == 2 {
					return 0
				}
				return 2 << 20
			}
			n.mu.Unlock()
			n.cutWires()
			wroteSome(src, 0, 2000)
			epoch := r.sync()
			if e := n.check(src); e < epoch {
				t.Errorf("it holds epoch %d, want %d", e, epoch)
			}
			n.mu.Lock()
			defer n.mu.Unlock()
			if e := r.last("peer"); e.Resumed != 0 || n.cuts != 2 {
				t.Errorf("%d cuts, %+v", n.cuts, e)
			}
		})
	}
}

// Small messages that a replica does not answer for cost no more than so much memory.
func TestUnstoredIsBounded(t *testing.T) {
	log := sentLog{stored: NewStreamDigest()}
	d := NewStreamDigest()
	for i := range uint64(maxUnstored) {
		d.Add([]byte{byte(i)})
		log.add(sentMessage{d.Clone(), i + 1, []Range{{int64(i) * BlockSize, BlockSize}}})
	}
	log.granted(2)
	if len(log.messages) != maxUnstored-2 || log.stored.frames != 2 {
		t.Fatalf("%d messages after %d frames", len(log.messages), log.stored.frames)
	}
	at := log.messages[9].upTo.Sum()
	some := sentLog{log.stored, log.messages}
	if lost, ok := some.missing(at); !ok || totalBytes(lost) != (maxUnstored-12)*BlockSize || lost[0].Offset != 12*BlockSize {
		t.Errorf("%v, %v", lost, ok)
	}
	if lost, ok := some.missing(at); !ok || len(lost) > 0 {
		t.Errorf("asked again: %v, %v", lost, ok)
	}
	for range 3 {
		log.add(sentMessage{d.Clone(), maxUnstored + 1, nil})
	}
	if _, ok := log.missing(at); ok || log.stored != nil || log.messages != nil {
		t.Error("more is remembered than the bound")
	}
	log.granted(1 << 20)
}

// begun is an epoch with a token, and frames for it.
func begun(m *model) (EpochStart, []byte) {
	start := EpochStart{Epoch: 50, Attempt: 2, Mode: ModeJournal, Lineage: m.lineage.Extend(Position{m.lineage.Tip().Generation, 50}), Token: token{4}}
	return start, AppendFrames(nil, FrameMeta{Epoch: 50, Attempt: 2, Round: 3}, 0, m.noise(BlockSize), nil)
}

// An epoch is kept only while all that it counts is there, under its token, and nobody
// began another.
func TestWhatIsNotKept(t *testing.T) {
	ctx := t.Context()
	for name, test := range map[string]struct {
		change func(*EpochStart)
		do     func(*Replica, []byte) error
		kept   bool
	}{
		"kept":          {kept: true},
		"no token":      {change: func(s *EpochStart) { s.Token = token{} }},
		"bad frame":     {do: func(r *Replica, b []byte) error { _ = r.Append(ctx, 0, b[:len(b)-1]); return nil }},
		"second stream": {do: func(r *Replica, b []byte) error { return r.Append(ctx, 1, b) }},
		"aborted":       {do: func(r *Replica, _ []byte) error { return r.Abort() }},
		"taken over": {do: func(r *Replica, _ []byte) error {
			_, err := r.TakeOver(ctx, &memState{}, TakeOverOptions{Force: true})
			return err
		}},
		"another begun": {do: func(r *Replica, _ []byte) error {
			return r.Begin(ctx, EpochStart{Epoch: 60, Attempt: 1, Mode: ModeJournal, Lineage: r.Status().Lineage.Extend(Position{r.Status().Committed.Generation, 60})})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			m, _, r := synced(t, 31)
			start, frames := begun(m)
			if test.change != nil {
				test.change(&start)
			}
			must(t, r.Begin(ctx, start))
			must(t, r.Append(ctx, 0, frames))
			if test.do != nil {
				must(t, test.do(r, frames))
			}
			must(t, r.Interrupt())
			k := r.Kept()
			if !test.kept {
				if err := r.Resume(start); k != nil || err == nil {
					t.Fatalf("%+v is kept, resumed with %v", k, err)
				}
				return
			}
			d := NewStreamDigest()
			must(t, d.AddFrames(frames))
			if k == nil || k.Start.Epoch != 50 || k.Round != 3 || k.Digest.Sum() != d.Sum() {
				t.Fatalf("%+v", k)
			}
			for i, other := range []func(*EpochStart){
				func(s *EpochStart) { s.Token[15] = 1 }, func(s *EpochStart) { s.Epoch = 49 }, func(s *EpochStart) { s.Attempt = 1 },
				func(s *EpochStart) { s.Full = true }, func(s *EpochStart) { s.Mode = ModeInPlace },
				func(s *EpochStart) {
					s.Lineage = append(slices.Clone(s.Lineage[:len(s.Lineage)-1]), Position{Generation{99}, 50})
				},
			} {
				o := start
				if other(&o); r.Resume(o) == nil {
					t.Errorf("resumed as %d: %+v", i, o)
				}
			}
			must(t, r.Resume(start))
		})
	}
}

// A sender that vanishes while its frames wait for room took nothing with it.
func TestKeptWhileItWaitsForRoom(t *testing.T) {
	for _, n := range []int{BlockSize, 128 << 10} {
		t.Run(strconv.Itoa(n), func(t *testing.T) { keptWhileItWaits(t, n) })
	}
}

func keptWhileItWaits(t *testing.T, n int) {
	m, _, r := synced(t, 32)
	ctx := t.Context()
	image, err := r.Hold(ctx)
	must(t, err)
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 12})) // stays in the journal
	start, frames := begun(m)
	must(t, r.Begin(ctx, start))
	sent := NewStreamDigest()
	for err == nil {
		soon, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		if err = r.Append(soon, 0, frames); err == nil {
			must(t, sent.AddFrames(frames))
		}
		cancel()
		frames = AppendFrames(nil, FrameMeta{Epoch: 50, Attempt: 2, Round: 3}, 0, m.noise(n), nil)
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	must(t, r.Interrupt())
	if k := r.Kept(); k == nil || k.Digest.Sum() != sent.Sum() {
		t.Fatalf("%+v is kept", k)
	}
	image.Release()
	must(t, r.Resume(start))
	must(t, r.Append(ctx, 0, frames))
	must(t, sent.AddFrames(frames))
	must(t, r.Commit(ctx, EpochCommit{Epoch: 50, Attempt: 2, Streams: []StreamSum{sent.Sum()}}))
	must(t, r.WaitApplied(ctx, 50))
	at := make([]byte, n)
	must(t, r.ReadData(ctx, at, 0))
	f, err := NewFrameReader(frames).Next()
	must(t, err)
	if !bytes.Equal(at[:len(f.Payload)], f.Payload) {
		t.Error("it does not hold the last frames")
	}
}

// A full copy that was to be gone on with, and about whose base nothing is known
// any more, begins anew and live: one view of a volume may not hold all of it.
func TestTrackingLostWhileAway(t *testing.T) {
	const size = 48 << 20
	src := newMemSource(size, 64<<10)
	wroteSome(src, 0, size/BlockSize)
	src.viewMax = 4 << 20
	n := newNode(t, "peer", size, 40<<20)
	n.recv.cfg.WindowBytes = MaxFramesBytes
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		c.Replicas[0].Link.Codec, c.Replicas[0].Link.BatchBytes = CodecNone, 1<<20
		n.limit = func() int64 { return 8 << 20 }
	})
	for {
		n.mu.Lock()
		often := n.cuts >= 2
		n.down = often
		n.mu.Unlock()
		if often {
			break
		}
		time.Sleep(time.Millisecond)
	}
	n.cutWires()
	src.mu.Lock()
	src.lostBefore = src.cut + 1
	src.mu.Unlock()
	n.mu.Lock()
	n.limit, n.down = nil, false
	n.mu.Unlock()
	r.sync()
	n.check(src)
}

// What is kept is told while nobody goes on with it, and dropped only after the limit;
// what is being fed is neither.
func TestKeptIsDroppedAfterALimit(t *testing.T) {
	ctx := t.Context()
	m, _, r := synced(t, 33)
	free := r.JournalFree()
	start, frames := begun(m)
	must(t, r.Begin(ctx, start))
	must(t, r.Append(ctx, 0, frames))
	fed := func() {
		t.Helper()
		if k, d := r.Status().Kept, r.DropKept(0); k.Epoch != 0 || d.Epoch != 0 {
			t.Fatalf("it is being fed, and %+v is kept, %+v dropped", k, d)
		}
	}
	fed()
	for range 2 {
		before := time.Now()
		must(t, r.Interrupt())
		k := r.Status().Kept
		if k.Epoch != 50 || k.Bytes != int64(len(frames)) || k.Since.Before(before) || k.Since.After(time.Now()) {
			t.Fatalf("%+v is kept", k)
		}
		if d := r.DropKept(time.Hour); d.Epoch != 0 || r.Status().Kept != k {
			t.Fatalf("dropped too early: %+v; %+v is kept", d, r.Status().Kept)
		}
		must(t, r.Resume(start))
		fed()
	}
	must(t, r.Interrupt())
	if d := r.DropKept(0); d.Epoch != 50 || d.Bytes != int64(len(frames)) {
		t.Errorf("dropped: %+v", d)
	}
	if k := r.Status().Kept; k.Epoch != 0 || r.Kept() != nil || r.Resume(start) == nil || r.JournalFree() != free {
		t.Errorf("dropped, and yet there: %+v, %+v; %d bytes are free of %d", k, r.Kept(), r.JournalFree(), free)
	}
	if d := r.DropKept(0); d.Epoch != 0 {
		t.Errorf("dropped twice: %+v", d)
	}
}
