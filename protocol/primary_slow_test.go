package protocol

import (
	"context"
	"strings"
	"sync"
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
