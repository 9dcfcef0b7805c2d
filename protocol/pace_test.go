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

// stepClock is a clock that goes on when somebody waits for it.
type stepClock struct {
	mu  sync.Mutex
	now time.Time
}

func newStepClock() *stepClock { return &stepClock{now: time.Unix(1000, 0)} }

func (c *stepClock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *stepClock) After(d time.Duration) <-chan time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
	at := make(chan time.Time, 1)
	at <- c.now
	return at
}

// A pace of its rate is kept whatever the size of messages, a pause saves up no
// more than the burst, and a change of the rate counts from then on.
func TestPace(t *testing.T) {
	const rate = 1 << 20
	for _, size := range []int{100, 64 << 10, 3 << 20} {
		clock := newStepClock()
		now := int64(rate)
		p := NewPace(func() int64 { return now }, clock)
		send := func(bytes int) float64 {
			begun := clock.Now()
			for n := 0; n < bytes; n += size {
				if err := p.take(t.Context(), size); err != nil {
					t.Fatal(err)
				}
			}
			return clock.Now().Sub(begun).Seconds()
		}
		settle := func(what string, got, want float64) {
			t.Helper()
			// One message may be ahead, at the slowest rate, and the burst.
			if off := 4*float64(size)/rate + 1; got < want-off || got > want+off {
				t.Errorf("messages of %d bytes, %s: %.2f s, want %.2f", size, what, got, want)
			}
		}
		settle("at the rate", send(60*rate), 60)
		clock.After(time.Hour)
		settle("after a pause", send(60*rate), 60)
		now = rate / 4
		settle("at a quarter", send(15*rate), 60)
		now = 0
		if took := send(1000 * rate); took > 0 {
			t.Errorf("without a limit it took %.2f s", took)
		}
		now = rate
		settle("again", send(60*rate), 60)
		if !p.Holding() {
			t.Error("it does not say that the limit holds")
		}
		clock.After(2 * paceFresh)
		if p.Holding() {
			t.Error("it still says that the limit holds")
		}
	}
}

// Who waits for the limit does not outlive its session.
func TestPaceEnds(t *testing.T) {
	p := NewPace(func() int64 { return 1 }, nil)
	if err := p.take(t.Context(), 1<<30); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.take(ctx, 1) }()
	eventually(t, "it waits", p.Holding)
	cancel()
	if err := <-ended; err == nil {
		t.Fatal("it was let through")
	}
}

// A replica with a limit is sent no more than that a second, sessions that break
// included, and says so; the one beside it is not delayed, and both end whole.
func TestLimitedReplicaDelaysNobody(t *testing.T) {
	const rate = 2 << 20
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 100)
	fast, far := newNode(t, "ebs", testVolumeSize, 32<<20), newNode(t, "peer", testVolumeSize, 32<<20)
	counted := &countConn{ClientConnInterface: far.conn}
	limit := atomic.Int64{}
	r := startRig(t, src, &memState{}, []*node{fast, far}, func(c *PrimaryConfig) {
		c.Replicas[1].Client = proto.NewReplicationClient(counted)
		c.Replicas[1].Link.Codec, c.Replicas[1].Link.BatchBytes = CodecNone, 64<<10
		c.Replicas[1].Link.AnswerTimeout = 3 * time.Second
		c.Replicas[1].Link.Pace = NewPace(limit.Load, nil)
		c.CutLimit = time.Minute
	})
	eventually(t, "both are there", func() bool {
		s := r.p.Status()
		return s.Replicas[0].Disk == "UpToDate" && s.Replicas[1].Disk == "UpToDate"
	})
	if s := r.p.Status().Replicas[1]; s.Limited || s.LimitBytes != 0 {
		t.Errorf("without a limit: %+v", s)
	}
	limit.Store(rate)
	stop := src.busy(t, 6, time.Millisecond)
	start, before := time.Now(), counted.bytes.Load()
	worst, said := 0.0, 0
	for broken := false; time.Since(start) < 6*time.Second; time.Sleep(5 * time.Millisecond) {
		if !broken && time.Since(start) > 2*time.Second {
			broken = true
			far.cutWires()
		}
		s := r.p.Status()
		worst = max(worst, s.Replicas[0].LagSeconds)
		if peer := s.Replicas[1]; peer.Limited && peer.LimitBytes == rate && strings.Contains(peer.Reason, ReasonLimit+" of 2 MiB a second") {
			said++
		}
	}
	sent, took := counted.bytes.Load()-before, time.Since(start).Seconds()
	stop()
	t.Logf("%.2f MiB a second; the near one was %.2f s behind at worst; said %d times", float64(sent)/took/(1<<20), worst, said)
	if got := float64(sent) / took; got > 1.3*rate {
		t.Errorf("%.0f bytes a second were sent with a limit of %d", got, rate)
	}
	if worst > 5 { // the far one is behind by more, and for longer
		t.Errorf("the near replica was %.1f s behind", worst)
	}
	if said == 0 {
		t.Error("status did not say that the limit holds it back")
	}
	limit.Store(0)
	r.sync()
	fast.check(src)
	far.check(src)
}

// A replica that its own limit makes late does not hold up others for a part of
// that; one that is slow does.
func TestLimitedReplicaHasNoPatience(t *testing.T) {
	clock := newStepClock()
	rate := int64(0)
	w := &replicaWorker{p: &Primary{cfg: PrimaryConfig{Clock: clock}}}
	w.cfg.Link.Pace = NewPace(func() int64 { return rate }, clock)
	a := &attempt{w: w, withdrawn: true, started: clock.Now()}
	clock.After(10 * time.Minute)
	if got := a.patience(); got < time.Minute {
		t.Errorf("a slow one: %v", got)
	}
	rate = 1 << 10
	for range 3 {
		if err := w.cfg.Link.Pace.take(t.Context(), 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	if got := a.patience(); got != 0 {
		t.Errorf("one that its limit holds back: %v", got)
	}
}

// A limit that lets a message through every few seconds is not mistaken for a
// replica that does not answer.
func TestLimitIsNoSilence(t *testing.T) {
	src := newMemSource(testVolumeSize, BlockSize)
	n := newNode(t, "far", testVolumeSize, 32<<20)
	limit := atomic.Int64{}
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		l := &c.Replicas[0].Link
		l.Codec, l.Batches, l.BatchBytes, l.AnswerTimeout, l.Pace = CodecNone, 8, 512<<10, 2*time.Second, NewPace(limit.Load, nil)
	})
	r.sync()
	limit.Store(128 << 10) // a message of 512 KiB takes longer than the replica may be silent
	wroteSome(src, 0, 512)
	r.sync()
	limit.Store(0)
	n.check(src)
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.lost["far"]) > 0 {
		t.Fatalf("the session was lost: %v", r.lost["far"])
	}
}

// countConn counts the bytes of frames.
type countConn struct {
	grpc.ClientConnInterface
	bytes atomic.Int64
}

type countStream struct {
	grpc.ClientStream
	c *countConn
}

func (c *countConn) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, o ...grpc.CallOption) (grpc.ClientStream, error) {
	st, err := c.ClientConnInterface.NewStream(ctx, d, method, o...)
	return &countStream{st, c}, err
}

func (s *countStream) SendMsg(m any) error {
	if b, ok := m.(*proto.FromPrimary).Message.(*proto.FromPrimary_Bundle); ok {
		s.c.bytes.Add(int64(b.Bundle.(*bundle).bytes))
	}
	return s.ClientStream.SendMsg(m)
}
