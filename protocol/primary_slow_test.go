package protocol

import (
	"context"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"

	"blockferry/proto"
)

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

// A replica that is done with a cut before the next one is told of it ends
// neither the cut nor the process.
func TestCutSharedWithAQuickReplica(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	cut, err := src.Cut(t.Context(), 1, CutWish{})
	if err != nil {
		t.Fatal(err)
	}
	p := &Primary{changed: make(chan struct{})}
	quick, slow := newReplicaWorker(p, ReplicaConfig{Name: "quick"}), newReplicaWorker(p, ReplicaConfig{Name: "slow"})
	for range 20000 {
		quick.wish, slow.wish = wishBarrier, wishBarrier
		go func() { (<-quick.cuts).done() }()
		s := p.share(cut, CutWish{}, []*replicaWorker{quick, slow})
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

// A replica that can't keep up holds no other one up: that one goes on though no more of the
// slow one's frames leave than one message for each of its epochs.
func TestSlowReplicaDelaysNobody(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 100)
	fast, slow := newNode(t, "ebs", testVolumeSize, 32<<20), newNode(t, "peer", testVolumeSize, 32<<20)
	gate := &gateConn{ClientConnInterface: slow.conn, pass: make(chan struct{}), open: make(chan struct{})}
	r := startRig(t, src, &memState{}, []*node{fast, slow}, func(c *PrimaryConfig) {
		c.Replicas[1].Link.Codec = CodecNone
		c.Replicas[1].Client = proto.NewReplicationClient(gate)
		c.Replicas[1].Link.BatchBytes = 64 << 10 // or all that is read fits into its buffers
		c.CutLimit = time.Minute
	})
	t.Cleanup(gate.letAll)
	eventually(t, "both are there", func() bool {
		s := r.p.Status()
		return s.Replicas[0].Disk == "UpToDate" && s.Replicas[1].Epoch > 0
	})
	gate.shut.Store(true)
	stop := src.busy(t, 6, time.Millisecond)
	epoch := func() uint64 { return r.p.Status().Replicas[0].Epoch }
	for range 20 {
		at := epoch()
		eventually(t, "the fast replica goes on", func() bool { return epoch() > at+1 })
		select {
		case gate.pass <- struct{}{}:
		case <-time.After(20 * time.Second):
			t.Fatal("nothing is sent to the slow replica")
		}
	}
	gate.letAll()
	stop()
	r.sync()
	fast.check(src)
	slow.check(src) // whole, though its views were given up half read
}

// gateConn lets through all messages, a message of frames for each pass once it is shut, and
// all again once it is open.
type gateConn struct {
	grpc.ClientConnInterface
	shut       atomic.Bool
	pass, open chan struct{}
	once       sync.Once
}

type gateStream struct {
	grpc.ClientStream
	c *gateConn
}

func (c *gateConn) letAll() { c.once.Do(func() { close(c.open) }) }

func (c *gateConn) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, o ...grpc.CallOption) (grpc.ClientStream, error) {
	st, err := c.ClientConnInterface.NewStream(ctx, d, method, o...)
	return &gateStream{st, c}, err
}

func (s *gateStream) SendMsg(m any) error {
	if _, ok := m.(*proto.FromPrimary).Message.(*proto.FromPrimary_Bundle); ok && s.c.shut.Load() {
		select {
		case <-s.c.pass:
		case <-s.c.open:
		}
	}
	return s.ClientStream.SendMsg(m)
}
