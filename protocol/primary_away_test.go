package protocol

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"blockferry/proto"
)

// retryClock lets waits of seconds and more pass at once, and notes them.
type retryClock struct {
	realClock
	mu    sync.Mutex
	waits []time.Duration
}

func (c *retryClock) After(d time.Duration) <-chan time.Time {
	if d < time.Second {
		return c.realClock.After(d)
	}
	c.mu.Lock()
	c.waits = append(c.waits, d)
	c.mu.Unlock()
	return c.realClock.After(time.Millisecond)
}

// offlineConn refuses at once while it is down.
type offlineConn struct {
	grpc.ClientConnInterface
	mu   sync.Mutex
	down bool
}

func (c *offlineConn) set(down bool) { c.mu.Lock(); defer c.mu.Unlock(); c.down = down }

func (c *offlineConn) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, o ...grpc.CallOption) (grpc.ClientStream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down {
		return nil, errors.New("the peer is off")
	}
	return c.ClientConnInterface.NewStream(ctx, d, method, o...)
}

// Tries at a peer that is away come twice as far apart each time, up to a limit,
// spread by a quarter to both sides, and begin anew after it was there.
func TestTriesBackOff(t *testing.T) {
	const first, most = 10 * time.Second, 160 * time.Second
	src := newMemSource(testVolumeSize, BlockSize)
	n := newNode(t, "far", testVolumeSize, 32<<20)
	conn, clock := &offlineConn{ClientConnInterface: n.conn, down: true}, &retryClock{}
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
		c.Replicas[0].Client, c.RetryMin, c.RetryMax, c.Clock = proto.NewReplicationClient(conn), first, most, clock
	})
	waited := func(n int) []time.Duration {
		t.Helper()
		var w []time.Duration
		eventually(t, "enough tries", func() bool {
			clock.mu.Lock()
			defer clock.mu.Unlock()
			w = append([]time.Duration(nil), clock.waits...)
			return len(w) >= n
		})
		return w
	}
	check := func(w []time.Duration) {
		t.Helper()
		var least, largest = 2.0, 0.0
		for i, d := range w {
			share := float64(d) / float64(min(first<<min(i, 10), most))
			least, largest = min(least, share), max(largest, share)
		}
		if least < 0.75 || largest > 1.25 || largest-least < 0.1 {
			t.Errorf("waits %v: between %.2f and %.2f of what was due, want a spread within 0.75 to 1.25", w, least, largest)
		}
	}
	check(waited(30)[:30])
	conn.set(false)
	r.sync()
	before := len(waited(0))
	conn.set(true)
	n.cutWires()
	check(waited(before + 30)[before : before+30])
}

// What was overwritten many times while a peer was away, through many cuts that
// another replica took part in, is sent to it once.
func TestOverwrittenWhileAwayIsSentOnce(t *testing.T) {
	const blocks, times = 40, 100
	src := newMemSource(testVolumeSize, BlockSize)
	wroteSome(src, 0, 500)
	near, far := newNode(t, "ebs", testVolumeSize, 32<<20), newNode(t, "far", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{near, far}, func(c *PrimaryConfig) { c.Interval = time.Millisecond })
	r.sync()
	far.mu.Lock()
	far.down = true
	far.mu.Unlock()
	far.cutWires()
	for range times {
		wroteSome(src, 100, blocks)
		epoch := r.p.Status().Replicas[0].Epoch
		eventually(t, "the near one goes on", func() bool { return r.p.Status().Replicas[0].Epoch > epoch })
	}
	before := len(r.epochs("far"))
	far.mu.Lock()
	far.down = false
	far.mu.Unlock()
	r.sync()
	far.check(src)
	var sent, wire uint64
	for _, e := range r.epochs("far")[before:] {
		sent, wire = sent+e.Link.SentBytes, wire+e.Link.WireBytes
		if e.Action != Incremental.String() {
			t.Errorf("it was not incremental: %+v", e)
		}
	}
	if sent != blocks*BlockSize || wire > 2*blocks*BlockSize {
		t.Errorf("%d bytes sent, %d on the wire; %d were written %d times", sent, wire, blocks*BlockSize, times)
	}
}

// A peer that is away for thousands of cuts costs no memory.
func TestPeerAwayCostsNoMemory(t *testing.T) {
	src := newMemSource(1<<20, BlockSize)
	wroteSome(src, 0, 100)
	near, far := newNode(t, "ebs", 1<<20, 32<<20), newNode(t, "far", 1<<20, 32<<20)
	r := startRig(t, src, &memState{}, []*node{near, far}, func(c *PrimaryConfig) {
		c.Interval, c.Events = time.Millisecond, PrimaryEvents{}
	})
	r.sync()
	far.mu.Lock()
	far.down = true
	far.mu.Unlock()
	far.cutWires()
	cuts := func(n uint64) uint64 {
		until := r.p.Status().Epoch + n
		for b := int64(0); r.p.Status().Epoch < until; b++ {
			src.write(b % 100)
			src.mu.Lock()
			for e := range src.images { // the test's own
				if e+100 < src.cut {
					delete(src.images, e)
				}
			}
			src.mu.Unlock()
			time.Sleep(time.Millisecond)
		}
		var m runtime.MemStats
		runtime.GC() // pools are emptied by the second
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	// The heap's own noise comes in one window; what cuts cost, in each.
	at := []uint64{cuts(300)}
	least := int64(1 << 62)
	for range 3 {
		at = append(at, cuts(700))
		least = min(least, int64(at[len(at)-1])-int64(at[len(at)-2]))
	}
	t.Logf("%d KiB more after 700 cuts, at least; in use %d", least>>10, at)
	if least > 128<<10 {
		t.Errorf("each 700 cuts cost %d bytes of memory or more: %d", least, at)
	}
}
