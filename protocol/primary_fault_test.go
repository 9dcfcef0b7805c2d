package protocol

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"blockferry/proto"
)

func (r *rig) plan(name string) Plan {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.plans[name]; len(p) > 0 {
		return p[len(p)-1]
	}
	return Plan{}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// wroteSome makes a few writes that the replica then lacks.
func wroteSome(s *memSource, from, n int64) {
	for b := from; b < from+n; b++ {
		s.write(b)
	}
}

// A view that turns out void after its last read is never committed, whatever
// was sent of it; the epoch then begins with a live round.
func TestVoidCutsNeverCommit(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 500)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	bad := map[uint64]bool{}
	src.mu.Lock()
	left := 4
	src.validErr = func(cut uint64) error {
		if left--; left >= 0 {
			bad[cut] = true
			return errors.New("the window was missed")
		}
		return nil
	}
	src.mu.Unlock()
	wroteSome(src, 100, 50)
	epoch := r.sync()
	if n.check(src) < epoch {
		t.Fatal("the replica did not follow")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(bad) != 4 || len(r.voids) != 4 {
		t.Fatalf("%d void cuts, told of %v", len(bad), r.voids)
	}
	for _, e := range r.epoch["ebs"] {
		if bad[e.Epoch] {
			t.Fatalf("void cut %d was committed", e.Epoch)
		}
	}
	if e := r.epoch["ebs"][len(r.epoch["ebs"])-1]; e.Rounds < 2 {
		t.Fatalf("the epoch after the void ones had %d round, no live one", e.Rounds)
	}
}

// A copy-on-write store too small for what is read of a view: a live round
// brings the work down, until a view lasts.
func TestSmallCopyOnWriteStore(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	src.viewMax = 400 << 10
	wroteSome(src, 0, 2000)
	src.busy(t, 8, 20*time.Millisecond)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	done := n.watch(src)
	for i := range int64(3) {
		r.sync()
		wroteSome(src, 600*i, 300)
	}
	r.sync()
	done()
	n.check(src)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.voids) == 0 || !strings.Contains(r.voids[0], "store is full") {
		t.Fatalf("voids: %v", r.voids)
	}
}

// Without a durable source there is no commit: a power cut could leave the
// primary older than its replica.
func TestFlushFailureVoidsTheEpoch(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 500)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	src.mu.Lock()
	var failed []uint64
	src.flushErr = func(cut uint64) error {
		if len(failed) < 3 {
			failed = append(failed, cut)
			return errors.New("input/output error")
		}
		return nil
	}
	src.mu.Unlock()
	wroteSome(src, 100, 50)
	r.sync()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(failed) != 3 || len(r.voids) != 3 || !strings.Contains(r.voids[0], "could not be flushed") {
		t.Fatalf("failed %v, told of %v", failed, r.voids)
	}
	for _, e := range r.epoch["ebs"] {
		src.mu.Lock()
		if src.flushed[e.Epoch] == 0 {
			t.Errorf("epoch %d was committed, its source never flushed", e.Epoch)
		}
		src.mu.Unlock()
		for _, f := range failed {
			if e.Epoch == f {
				t.Errorf("epoch %d was committed though its source could not be flushed", f)
			}
		}
	}
}

// What must not be written is refused before anything is.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*PrimaryConfig)
		state  func() SourceState
		want   string
	}{
		{"another volume", func(c *PrimaryConfig) { c.VolumeUUID = [16]byte{8} }, nil, "holds volume 07"},
		{"another replica", func(c *PrimaryConfig) { c.Replicas[0].Name = "nvme" }, nil, `no replica "nvme"`},
		{"another size", func(c *PrimaryConfig) { c.Source = newMemSource(4<<20, BlockSize) }, nil, "formatted for a volume of"},
		{"no common history", nil, nil, "no history in common"},
		// The label is an old one, as after a disk was copied back: the number of
		// the next epoch is one the replica knows with another content.
		{"the label was turned back", nil, func() SourceState {
			return SourceState{Lineage: line(1, 1), Generation: gen(1), Clean: true}
		}, "split brain"},
		{"the label was turned back, unclean", nil, func() SourceState {
			return SourceState{Lineage: line(1, 1), Generation: gen(1), OpenEpoch: 2}
		}, "split brain"},
	} {
		t.Run(c.name, func(t *testing.T) {
			src := newMemSource(testVolumeSize, BlockSize)
			wroteSome(src, 0, 100)
			n := newNode(t, "ebs", testVolumeSize, 32<<20)
			// The replica belongs to generation 1, epoch 2.
			link, err := Connect(t.Context(), n.client(), LinkConfig{VolumeUUID: testUUID, SizeBytes: testVolumeSize, Replica: "ebs"}, line(1, 2))
			if err != nil {
				t.Fatal(err)
			}
			err = link.Begin(t.Context(), EpochStart{Epoch: 2, Mode: ModeInPlace, Full: true, Lineage: line(1, 2)}, false)
			if err == nil {
				_, err = link.SendRound(t.Context(), Round{Source: src, Ranges: []Range{{0, testVolumeSize}}})
			}
			if err == nil {
				err = link.Commit(t.Context(), line(1, 2), 0)
			}
			if err != nil {
				t.Fatal(err)
			}
			link.Close()
			before := n.store.Clone()
			state := &memState{}
			if c.state != nil {
				state.b = mustEncode(t, c.state())
			}
			r := startRig(t, src, state, []*node{n}, c.change)
			var report ReplicaReport
			eventually(t, c.want, func() bool {
				report = r.p.Status().Replicas[0]
				return strings.Contains(report.Reason, c.want)
			})
			if len(r.epoch) > 0 {
				t.Fatalf("epochs were committed: %v", r.epoch)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, _, err := r.p.SyncNow(ctx); err == nil {
				t.Fatal("SyncNow succeeded")
			}
			a, b := make([]byte, before.Size()), make([]byte, before.Size())
			if _, err := before.ReadAt(a, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := n.store.ReadAt(b, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(a, b) {
				t.Fatal("the refused replica was written to")
			}
		})
	}
}

// A replica that speaks other versions is refused by name.
func TestVersionMismatch(t *testing.T) {
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	stream, err := proto.NewReplicationClient(n.conn).Replicate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&proto.FromPrimary{Message: &proto.FromPrimary_Hello{Hello: &proto.Hello{
		Version: 9, MinVersion: 8, VolumeUuid: testUUID[:], Replica: "ebs", SizeBytes: testVolumeSize, HashKey: make([]byte, 16)}}}); err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil || m.GetRefused().GetReason() != proto.Reason_REASON_VERSION {
		t.Fatalf("%v, %v", m, err)
	}
}

// A second session for the same replica is refused while the first lives.
func TestOneSessionPerReplica(t *testing.T) {
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	cfg := LinkConfig{VolumeUUID: testUUID, SizeBytes: testVolumeSize, Replica: "ebs"}
	first, err := Connect(t.Context(), n.client(), cfg, line(1, 1))
	if err != nil {
		t.Fatal(err)
	}
	var refused *RefusedError
	if _, err := Connect(t.Context(), n.client(), cfg, line(2, 1)); !errors.As(err, &refused) || refused.Reason != proto.Reason_REASON_BUSY {
		t.Fatalf("the second session: %v", err)
	}
	first.Close()
	eventually(t, "the place is free again", func() bool {
		l, err := Connect(t.Context(), n.client(), cfg, line(1, 1))
		if err == nil {
			l.Close()
		}
		return err == nil
	})
}

// windowSpy counts how many frame bytes are under way.
type windowSpy struct {
	grpc.ClientConnInterface
	mu        sync.Mutex
	under     int64
	most      int64
	messages  int
	violation string
}

type spyStream struct {
	grpc.ClientStream
	spy *windowSpy
}

func (s *windowSpy) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, o ...grpc.CallOption) (grpc.ClientStream, error) {
	st, err := s.ClientConnInterface.NewStream(ctx, d, method, o...)
	return &spyStream{st, s}, err
}

func (s *spyStream) SendMsg(m any) error {
	if b, ok := m.(*proto.FromPrimary).Message.(*proto.FromPrimary_Bundle); ok {
		s.spy.mu.Lock()
		s.spy.under += int64(b.Bundle.(*bundle).bytes)
		s.spy.most = max(s.spy.most, s.spy.under)
		s.spy.messages++
		s.spy.mu.Unlock()
	}
	return s.ClientStream.SendMsg(m)
}

func (s *spyStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if w := m.(*proto.FromReplica).GetWindow(); err == nil && w != nil {
		s.spy.mu.Lock()
		s.spy.under -= int64(w.Bytes)
		if s.spy.under < 0 {
			s.spy.violation = "more was granted than sent"
		}
		s.spy.mu.Unlock()
	}
	return err
}

func TestWindowIsRespected(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	for b := range src.blocks {
		src.write(int64(b))
	}
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	spy := &windowSpy{ClientConnInterface: n.conn}
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		c.Replicas[0].Client, c.Replicas[0].Link.Codec = proto.NewReplicationClient(spy), CodecNone
	})
	r.sync()
	n.check(src)
	if spy.most > 2<<20 || spy.most < 1<<20 || spy.violation != "" || spy.messages < 8 {
		t.Fatalf("%d bytes were under way with a window of %d, in %d messages %s", spy.most, 2<<20, spy.messages, spy.violation)
	}
}

// Lost tracking means: compare everything, into the journal, and send only
// what differs.
func TestTrackingLost(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 2000)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	n.mu.Lock()
	n.down = true
	n.mu.Unlock()
	n.cutWires()
	wroteSome(src, 300, 10)
	src.mu.Lock()
	src.lostBefore = src.cut + 1
	src.mu.Unlock()
	n.mu.Lock()
	n.down = false
	n.mu.Unlock()
	done := n.watch(src)
	r.sync()
	done()
	e := r.last("ebs")
	if e.Action != "compare" || e.Link.ComparedBytes < testVolumeSize || e.Link.SentBytes != 10*BlockSize {
		t.Fatalf("%+v", e)
	}
	if st := n.rep.Status(); st.State != DiskConsistent {
		t.Fatalf("the replica is %v", st.State)
	}
	n.check(src)
	wroteSome(src, 300, 5)
	r.sync()
	if e := r.last("ebs"); e.Action != "incremental" {
		t.Fatalf("the next epoch: %+v", e)
	}
}

// A replica that is done with a cut before the next one is told of it ends
// neither the cut nor the process.
func TestCutSharedWithAQuickReplica(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	cut, err := src.Cut(t.Context(), 1, false)
	if err != nil {
		t.Fatal(err)
	}
	p := &Primary{changed: make(chan struct{})}
	quick, slow := newReplicaWorker(p, ReplicaConfig{Name: "quick"}), newReplicaWorker(p, ReplicaConfig{Name: "slow"})
	for range 20000 {
		quick.wish, slow.wish = wishBarrier, wishBarrier
		go func() { (<-quick.cuts).done() }()
		s := p.share(cut, []*replicaWorker{quick, slow})
		h := <-slow.cuts
		select {
		case <-s.idle:
			t.Fatal("the cut was given up though a replica uses it")
		default:
		}
		h.done()
		<-s.idle
	}
}

// A tracker that never answers again costs comparisons; the replica is kept up
// to date all the same.
func TestTrackingLostForGood(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 2000)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	src.mu.Lock()
	src.lostBefore = 1 << 60
	src.mu.Unlock()
	for i := range int64(3) {
		wroteSome(src, 300*i, 10)
		r.sync()
		if e := r.last("ebs"); e.Action != "compare" {
			t.Fatalf("%+v", e)
		}
		n.check(src)
	}
	src.mu.Lock()
	src.lostBefore = src.cut + 1
	src.mu.Unlock()
	wroteSome(src, 300, 10)
	r.sync()
	wroteSome(src, 300, 5)
	r.sync()
	if e := r.last("ebs"); e.Action != "incremental" {
		t.Fatalf("the tracker answers again: %+v", e)
	}
	n.check(src)
}

// Coarse marks are narrowed: what is sent is what was written.
func TestMarksAreNarrowed(t *testing.T) {
	src := newMemSource(testVolumeSize, 1<<20)
	wroteSome(src, 0, 2000)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	for _, b := range []int64{5, 304, 305, 1500, 2050} {
		src.write(b)
	}
	r.sync()
	if e := r.last("ebs"); e.Link.SentBytes != 5*BlockSize || e.Link.MarkedBytes < 3<<20 {
		t.Fatalf("five blocks were written: %+v", e.Link)
	}
	n.check(src)
}

// A, then B in a live round, then A again: the comparison with the committed
// image must not leave the B of the live round in the journal.
func TestBackToTheOldContentWithinAnEpoch(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 100)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	link, err := Connect(t.Context(), n.client(), LinkConfig{VolumeUUID: testUUID, SizeBytes: testVolumeSize, Replica: "ebs"}, line(1, 2))
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	all := []Range{{0, testVolumeSize}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	round := func(number uint32, content byte, narrow bool) {
		t.Helper()
		_, err := link.SendRound(t.Context(), Round{Number: number, Source: bytes.NewReader(bytes.Repeat([]byte{content}, testVolumeSize)), Ranges: all, Narrow: narrow})
		must(err)
	}
	holds := func(want byte) {
		t.Helper()
		img, err := n.rep.Hold(t.Context())
		must(err)
		defer img.Release()
		b := make([]byte, testVolumeSize)
		_, err = img.ReadAt(b, 0)
		must(err)
		if !bytes.Equal(b, bytes.Repeat([]byte{want}, len(b))) {
			t.Fatalf("the replica does not hold %q", want)
		}
	}
	must(link.Begin(t.Context(), EpochStart{Epoch: 1, Mode: ModeInPlace, Full: true, Lineage: line(1, 1)}, false))
	round(0, 'A', false)
	round(1, 'B', true)
	round(2, 'A', true)
	must(link.Commit(t.Context(), line(1, 2), 0))
	holds('A')
	must(link.Begin(t.Context(), EpochStart{Epoch: 3, Mode: ModeJournal, Lineage: line(1, 3)}, false))
	round(0, 'B', true)
	round(1, 'A', true)
	must(link.Commit(t.Context(), line(1, 3), 0))
	holds('A')
}

// An epoch that does not fit into the journal leaves the old image in place
// and says why; with the operator's word it is caught up in place.
func TestEpochLargerThanJournal(t *testing.T) {
	for _, allowed := range []bool{false, true} {
		src := newMemSource(testVolumeSize, 64<<10)
		wroteSome(src, 0, 2000)
		n := newNode(t, "ebs", testVolumeSize, MinJournalBytes)
		r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
			c.Replicas[0].Link.Codec, c.Replicas[0].CatchUpInPlace = CodecNone, allowed
		})
		first := r.sync()
		for b := range src.blocks {
			src.write(int64(b))
		}
		if !allowed {
			eventually(t, "the reason", func() bool {
				return strings.Contains(r.p.Status().Replicas[0].Reason, "does not fit into the replica's journal")
			})
			held := n.check(src)
			src.mu.Lock()
			cut := src.cut
			src.mu.Unlock()
			if held < first || held >= cut {
				t.Fatalf("the replica holds epoch %d, the first was %d, the last cut %d", held, first, cut)
			}
			continue
		}
		r.sync()
		if n.check(src) <= first {
			t.Fatal("the replica did not catch up")
		}
		src.write(7)
		r.sync()
		if st := n.rep.Status(); st.State != DiskConsistent {
			t.Fatalf("the replica is %v afterwards", st.State)
		}
	}
}

// A replica that can't keep up costs the other one at most the interval.
func TestSlowReplicaDelaysNobody(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 100)
	fast, slow := newNode(t, "ebs", testVolumeSize, 32<<20), newNode(t, "peer", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{fast, slow}, func(c *PrimaryConfig) {
		c.Replicas[1].Link.Codec = CodecNone
		c.Replicas[1].Client = proto.NewReplicationClient(&slowConn{ClientConnInterface: slow.conn, perSecond: 2 << 20})
		c.Replicas[1].Link.BatchBytes = 64 << 10 // or all that is read fits into its buffers
		c.CutLimit = time.Minute
	})
	eventually(t, "both are there", func() bool {
		s := r.p.Status()
		return s.Replicas[0].Disk == "UpToDate" && s.Replicas[1].Epoch > 0
	})
	stop := src.busy(t, 6, time.Millisecond) // about ten times of what the peer takes
	start := time.Now()
	worst := 0.0
	for time.Since(start) < 5*time.Second {
		s := r.p.Status()
		worst = max(worst, s.Replicas[0].LagSeconds)
		time.Sleep(5 * time.Millisecond)
	}
	peer := r.p.Status().Replicas[1]
	stop()
	r.sync()
	fast.check(src)
	slow.check(src) // whole, though its views were given up half read
	if worst > 2.5 {
		t.Fatalf("the fast replica was %.1f s behind, the slow one %.1f s", worst, peer.LagSeconds)
	}
	t.Logf("fast %.2f s behind at worst, slow %.2f s: %s", worst, peer.LagSeconds, peer.Reason)
}

// slowConn lets through so many frame bytes a second.
type slowConn struct {
	grpc.ClientConnInterface
	perSecond int
}

type slowStream struct {
	grpc.ClientStream
	c *slowConn
}

func (c *slowConn) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, o ...grpc.CallOption) (grpc.ClientStream, error) {
	st, err := c.ClientConnInterface.NewStream(ctx, d, method, o...)
	return &slowStream{st, c}, err
}

func (s *slowStream) SendMsg(m any) error {
	if b, ok := m.(*proto.FromPrimary).Message.(*proto.FromPrimary_Bundle); ok {
		time.Sleep(time.Duration(b.Bundle.(*bundle).bytes) * time.Second / time.Duration(s.c.perSecond))
	}
	return s.ClientStream.SendMsg(m)
}

func TestVerify(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 2000)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	stop := src.busy(t, 11, 5*time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var last VerifyProgress
	res, err := r.p.Verify(ctx, "ebs", func(p VerifyProgress) { last = p })
	if err != nil || !res.Same() || last.DoneBytes != testVolumeSize {
		t.Fatalf("%+v, %v; progress %+v", res, err, last)
	}
	// One bit rots at the replica, where nobody writes any more.
	stop()
	r.sync()
	n.check(src) // and with it all is applied
	const rotten = 1234
	b := make([]byte, BlockSize)
	if _, err := n.store.ReadAt(b, rotten*BlockSize); err != nil {
		t.Fatal(err)
	}
	b[17] ^= 4
	if _, err := n.store.WriteAt(b, rotten*BlockSize); err != nil {
		t.Fatal(err)
	}
	res, err = r.p.Verify(ctx, "ebs", nil)
	if err != nil || res.DifferentBytes != BlockSize || len(res.Differences) != 1 || res.Differences[0] != (Range{rotten * BlockSize, BlockSize}) {
		t.Fatalf("after a flipped bit: %+v, %v", res, err)
	}
	if _, err := r.p.Verify(ctx, "nobody", nil); err == nil {
		t.Fatal("an unknown replica was verified")
	}
}

// Paused means no session; resumed it goes on incrementally.
func TestPauseAndResume(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 500)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	first := n.check(src)
	if err := r.p.Pause("ebs"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the session ends", func() bool { return n.recv.Status()[0].Session == nil })
	wroteSome(src, 10, 3)
	time.Sleep(100 * time.Millisecond)
	s := r.p.Status().Replicas[0]
	if s.Replication != "Paused" || s.LagBytes != 3*BlockSize || s.LagSeconds <= 0 || s.Reason == "" || n.check(src) != first {
		t.Fatalf("while paused: %+v", s)
	}
	if err := r.p.Resume(""); err != nil {
		t.Fatal(err)
	}
	r.sync()
	if e := r.last("ebs"); e.Action != "incremental" || e.Link.SentBytes != 3*BlockSize {
		t.Fatalf("after the pause: %+v", e)
	}
	if err := r.p.Pause("nobody"); err == nil {
		t.Fatal("an unknown replica was paused")
	}
}

// While nothing is written no cut is taken and the lag is zero, however long.
func TestIdle(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 500)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	state := &memState{}
	r := startRig(t, src, state, []*node{n}, nil)
	r.sync()
	time.Sleep(50 * time.Millisecond)
	src.mu.Lock()
	cuts := src.cuts
	src.mu.Unlock()
	time.Sleep(700 * time.Millisecond)
	s := r.p.Status()
	src.mu.Lock()
	defer src.mu.Unlock()
	if src.cuts != cuts {
		t.Fatalf("%d cuts were taken of an idle volume", src.cuts-cuts)
	}
	rep := s.Replicas[0]
	if rep.LagSeconds != 0 || rep.LagBytes != 0 || rep.LagIsMinimum || rep.Disk != "UpToDate" || rep.Replication != "Established" || rep.Reason != "" {
		t.Fatalf("idle: %+v", rep)
	}
	// After the idle time the age of what is missing counts from its write, not
	// from the last cut.
	state.mu.Lock()
	state.err = errors.New("no cuts for now")
	state.mu.Unlock()
	src.mu.Unlock()
	written := time.Now()
	src.write(1)
	lag := r.p.Status().Replicas[0].LagSeconds
	src.mu.Lock()
	if limit := time.Since(written).Seconds() + 0.2; lag <= 0 || lag > limit {
		t.Fatalf("right after a write the replica is %.3f s behind, want at most %.3f", lag, limit)
	}
	b, err := json.Marshal(s)
	if err != nil || !bytes.Contains(b, []byte(`"lag-seconds":0,`)) || !bytes.Contains(b, []byte(`"size-bytes":`)) {
		t.Fatalf("%s %v", b, err)
	}
}

// After a clean end and after an unclean one replication goes on incrementally,
// under a new generation.
func TestStops(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 500)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	state := &memState{}
	r := startRig(t, src, state, []*node{n}, nil)
	r.sync()
	wroteSome(src, 10, 5)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	sealed := false
	clean, err := r.p.Stop(ctx, func() error { sealed = true; return nil })
	if err != nil || !clean || !sealed {
		t.Fatalf("clean %v, sealed %v: %v", clean, sealed, err)
	}
	s, err := DecodeSourceState(state.b)
	if err != nil || !s.Clean {
		t.Fatalf("%+v, %v", s, err)
	}
	if n.check(src) != s.Lineage.Tip().Epoch {
		t.Fatal("the replica does not hold the last cut")
	}
	if _, _, err := r.p.SyncNow(ctx); !errors.Is(err, ErrStopped) {
		t.Fatalf("SyncNow after the end: %v", err)
	}
	generation := s.Generation

	r = startRig(t, src, state, []*node{n}, nil)
	wroteSome(src, 20, 3)
	r.sync()
	if e := r.last("ebs"); e.Action != "incremental" || e.Link.SentBytes != 3*BlockSize {
		t.Fatalf("after a clean end: %+v", e)
	}
	if p := r.plan("ebs"); p.Action != Incremental {
		t.Fatalf("after a clean end: %v", p)
	}
	// Written after the last cut and before the seal: not clean.
	clean, err = r.p.Stop(ctx, func() error { src.write(3); return nil })
	if err != nil || clean {
		t.Fatalf("written behind the last cut's back, yet clean %v: %v", clean, err)
	}
	r = startRig(t, src, state, []*node{n}, nil)
	r.sync()
	s, err = DecodeSourceState(state.b)
	if err != nil || s.Generation == generation || s.Clean || len(s.Lineage) != 3 {
		t.Fatalf("%+v, %v", s, err)
	}
	if e := r.last("ebs"); e.Action != "incremental" || e.Link.SentBytes != BlockSize {
		t.Fatalf("after an unclean end: %+v", e)
	}
	n.check(src)
}

// No cut is taken, and no frame leaves, while the label can't be written.
func TestLabelFailureStopsCuts(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	wroteSome(src, 0, 50)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	state := &memState{}
	r := startRig(t, src, state, []*node{n}, nil)
	r.sync()
	state.mu.Lock()
	state.err = errors.New("input/output error")
	state.mu.Unlock()
	wroteSome(src, 0, 5)
	eventually(t, "the problem is told", func() bool { return strings.Contains(r.p.Status().Problem, "input/output error") })
	src.mu.Lock()
	cuts := src.cuts
	src.mu.Unlock()
	time.Sleep(100 * time.Millisecond)
	src.mu.Lock()
	if src.cuts != cuts {
		t.Error("a cut was taken whose number is not durable")
	}
	src.mu.Unlock()
	state.mu.Lock()
	state.err = nil
	state.mu.Unlock()
	r.sync()
	if p := r.p.Status().Problem; p != "" {
		t.Fatalf("still a problem: %s", p)
	}
	n.check(src)
}

// A session that ends with an epoch open gives the journal's room back.
func TestSessionEndDropsTheOpenEpoch(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 2000)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.p.Stop(ctx, nil); err != nil {
		t.Fatal(err)
	}
	n.check(src)
	free := n.rep.JournalFree()
	var link *Link
	eventually(t, "connected", func() (ok bool) {
		var err error
		link, err = Connect(t.Context(), n.client(), LinkConfig{VolumeUUID: testUUID, SizeBytes: testVolumeSize, Replica: "ebs"}, n.rep.Status().Lineage)
		return err == nil
	})
	next := Position{gen(50), n.rep.Status().Committed.Epoch + 1}
	err := link.Begin(t.Context(), EpochStart{Epoch: next.Epoch, Mode: ModeJournal, Lineage: link.Lineage().Extend(next)}, false)
	if err == nil {
		_, err = link.SendRound(t.Context(), Round{Source: src, Ranges: []Range{{0, testVolumeSize}}})
	}
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the frames are in the journal", func() bool { return n.rep.JournalFree() < free-4<<20 })
	link.Close()
	eventually(t, "the room is free again", func() bool { return n.rep.JournalFree() >= free-1<<20 })
}
