package protocol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"blockferry/blockdev/blocktest"
	"blockferry/proto"
)

const testVolumeSize = 8<<20 + 3*BlockSize // no multiple of anything nice

var testUUID = [16]byte{7}

// memState is a label in memory.
type memState struct {
	mu    sync.Mutex
	b     []byte
	saves int
	err   error
}

func (m *memState) Load() ([]byte, error) { m.mu.Lock(); defer m.mu.Unlock(); return m.b, nil }
func (m *memState) Save(b []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	m.b, m.saves = append([]byte(nil), b...), m.saves+1
	return nil
}

// node is a replica and the server in front of it.
type node struct {
	t     *testing.T
	name  string
	store *blocktest.Memory
	rep   *Replica
	recv  *Receiver
	conn  *grpc.ClientConn

	mu    sync.Mutex
	conns []net.Conn
	down  bool
	limit func() int64 // a connection breaks once so many bytes came by it; nil: never
	cuts  int          // how often that was
	bytes int64        // that came by all
}

// meteredConn is the primary's end of a connection to a node.
type meteredConn struct {
	net.Conn
	n     *node
	sent  int64
	limit int64
}

func (c *meteredConn) Write(b []byte) (int, error) {
	c.n.mu.Lock()
	c.sent += int64(len(b))
	c.n.bytes += int64(len(b))
	cut := c.limit > 0 && c.sent > c.limit
	if cut {
		c.n.cuts++
	}
	c.n.mu.Unlock()
	if cut {
		_ = c.Conn.Close()
	}
	return c.Conn.Write(b)
}

func newNode(t *testing.T, name string, size, journal int64) *node {
	t.Helper()
	o := FormatOptions{VolumeUUID: testUUID, SizeBytes: size, JournalBytes: journal}
	store := blocktest.NewMemory(o.NeededBytes())
	store.Fill(bytes.Repeat([]byte("garbage."), BlockSize/8))
	if err := FormatReplica(store, o); err != nil {
		t.Fatal(err)
	}
	return openNode(t, name, store, ReceiverConfig{WindowBytes: 2 << 20})
}

// client reaches the node over its connection, which tests can break.
func (n *node) client() proto.ReplicationClient { return proto.NewReplicationClient(n.conn) }

func openNode(t *testing.T, name string, store *blocktest.Memory, cfg ReceiverConfig) *node {
	t.Helper()
	rep, err := OpenReplica(t.Context(), store, OpenOptions{RescueDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, name: name, store: store, rep: rep, recv: NewReceiver(cfg)}
	if err := n.recv.Add(name, rep); err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(ServerOptions()...)
	proto.RegisterReplicationServer(server, n.recv)
	lis := bufconn.Listen(1 << 20)
	go func() { _ = server.Serve(lis) }()
	n.conn, err = grpc.NewClient("passthrough:///"+name, append(DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second}),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			if n.down {
				return nil, errors.New("the network is down")
			}
			c, err := lis.DialContext(ctx)
			if err == nil {
				n.conns = append(n.conns, c)
				m := &meteredConn{Conn: c, n: n}
				if n.limit != nil {
					m.limit = n.limit()
				}
				c = m
			}
			return c, err
		}))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = n.conn.Close()
		n.recv.Close()
		server.Stop()
		if err := n.rep.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// cutWires breaks every connection to the node.
func (n *node) cutWires() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		_ = c.Close()
	}
	n.conns = nil
}

// check reads the replica's image and compares it with the source's at that
// very cut: all writes up to it, and none after. It returns the cut, 0 when
// the replica holds none.
func (n *node) check(s *memSource) uint64 {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	img, err := n.rep.Hold(ctx)
	if errors.Is(err, ErrNotConsistent) {
		return 0
	}
	if err != nil {
		n.t.Fatalf("%s: %v", n.name, err)
	}
	defer img.Release()
	epoch := img.Position().Epoch
	want := s.image(epoch)
	if want == nil {
		n.t.Fatalf("%s holds epoch %d, which is no cut", n.name, epoch)
	}
	got, exp := make([]byte, BlockSize), make([]byte, BlockSize)
	for b, k := range want {
		if _, err := img.ReadAt(got, int64(b)*BlockSize); err != nil {
			n.t.Fatal(err)
		}
		content(exp, int64(b), k)
		if !bytes.Equal(got, exp) {
			n.t.Fatalf("%s at epoch %d: block %d does not hold write %d", n.name, epoch, b, k)
		}
	}
	return epoch
}

// watch checks the replica over and over until the test ends it.
func (n *node) watch(s *memSource) (stop func() int) {
	ctx, cancel := context.WithCancel(context.Background())
	checked := 0
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			if n.check(s) > 0 {
				checked++
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	var once sync.Once
	stop = func() int { once.Do(func() { cancel(); wg.Wait() }); return checked }
	n.t.Cleanup(func() { stop() })
	return stop
}

type rig struct {
	t     *testing.T
	src   *memSource
	state *memState
	p     *Primary
	mu    sync.Mutex
	voids []string
	epoch map[string][]EpochStats
	lost  map[string][]error
	plans map[string][]Plan
}

// newRig is one to be started, and what with; change may alter that.
func newRig(t *testing.T, nodes []*node, change func(*PrimaryConfig)) (*rig, PrimaryConfig) {
	r := &rig{t: t, epoch: map[string][]EpochStats{}, lost: map[string][]error{}, plans: map[string][]Plan{}}
	cfg := PrimaryConfig{
		Volume: "data", VolumeUUID: testUUID, Interval: 20 * time.Millisecond,
		LiveRestBytes: 256 << 10, RetryMin: 5 * time.Millisecond, RetryMax: 50 * time.Millisecond, CutLimit: 5 * time.Second,
		Events: PrimaryEvents{
			Connected: func(n string, p Plan) { r.mu.Lock(); r.plans[n] = append(r.plans[n], p); r.mu.Unlock() },
			Committed: func(n string, e EpochStats) { r.mu.Lock(); r.epoch[n] = append(r.epoch[n], e); r.mu.Unlock() },
			Void: func(n string, e uint64, err error) {
				r.mu.Lock()
				r.voids = append(r.voids, fmt.Sprintf("%s %d: %v", n, e, err))
				r.mu.Unlock()
			},
			Disconnected: func(n string, err error) { r.mu.Lock(); r.lost[n] = append(r.lost[n], err); r.mu.Unlock() },
		},
	}
	for _, n := range nodes {
		cfg.Replicas = append(cfg.Replicas, ReplicaConfig{Name: n.name, Client: n.client(), Link: LinkConfig{Codec: CodecS2, BatchBytes: 512 << 10}})
	}
	if change != nil {
		change(&cfg)
	}
	return r, cfg
}

// startRig begins a primary; change may alter its configuration.
func startRig(t *testing.T, src *memSource, state *memState, nodes []*node, change func(*PrimaryConfig)) *rig {
	t.Helper()
	r, cfg := newRig(t, nodes, func(c *PrimaryConfig) {
		c.Source, c.State = src, state
		if change != nil {
			change(c)
		}
	})
	r.src, r.state = src, state
	s, _, err := BeginPrimary(state)
	if err != nil {
		t.Fatal(err)
	}
	if r.p, err = NewPrimary(cfg, s); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.stop)
	return r
}

// stop ends it at once.
func (r *rig) stop() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, _ = r.p.Stop(ctx, nil)
}

func (r *rig) sync() uint64 {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	epoch, _, err := r.p.SyncNow(ctx)
	if err != nil {
		r.t.Fatalf("%v; voids %v, lost %v", err, r.voids, r.lost)
	}
	// Who waits for the status may see it before the event that tells of the epoch.
	eventually(r.t, "what was committed is told of", func() bool {
		for _, report := range r.p.Status().Replicas {
			if e := r.epochs(report.Name); report.LastEpoch != nil && (len(e) == 0 || e[len(e)-1].Epoch < report.LastEpoch.Epoch) {
				return false
			}
		}
		return true
	})
	return epoch
}

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
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
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

// syncedRig is a source whose tracker names grains of so many bytes, the first
// blocks written, and one replica that holds it.
func syncedRig(t *testing.T, grain, written int64) (*memSource, *node, *rig) {
	t.Helper()
	src := newMemSource(testVolumeSize, grain)
	wroteSome(src, 0, written)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	return src, n, r
}

// epochs are all that were committed; the newest may be an empty one, as cuts come
// by themselves.
func (r *rig) epochs(name string) []EpochStats {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.epoch[name])
}

func (r *rig) last(name string) EpochStats {
	e := r.epochs(name)
	return e[len(e)-1]
}

// A busy volume with a fast and a slower replica: at every moment each
// replica holds exactly one cut's image.
func TestReplicasHoldOneCut(t *testing.T) {
	for _, grain := range []int64{BlockSize, 64 << 10, 1 << 20} {
		t.Run(fmt.Sprintf("grain %d", grain), func(t *testing.T) {
			t.Parallel()
			src := newMemSource(testVolumeSize, grain)
			for b := range int64(1500) {
				src.write(b)
			}
			src.busy(t, uint64(grain), 200*time.Microsecond)
			a, b := newNode(t, "ebs", testVolumeSize, 32<<20), newNode(t, "peer", testVolumeSize, 32<<20)
			r := startRig(t, src, &memState{}, []*node{a, b}, nil)
			watchA, watchB := a.watch(src), b.watch(src)
			for range 3 {
				r.sync()
				time.Sleep(50 * time.Millisecond)
			}
			if n, m := watchA(), watchB(); n < 3 || m < 3 {
				t.Fatalf("only %d and %d images were looked at", n, m)
			}
			for _, n := range []*node{a, b} {
				if e := n.check(src); e == 0 {
					t.Fatalf("%s holds nothing", n.name)
				}
			}
			if len(r.voids) > 0 {
				t.Fatalf("voids: %v", r.voids)
			}
			src.mu.Lock()
			defer src.mu.Unlock()
			for e, n := range src.flushed {
				if n > 1 {
					t.Fatalf("the source was flushed %d times for cut %d", n, e)
				}
			}
		})
	}
}

// Two replicas that came to hold different cuts of a volume that nobody writes
// to end on the same one, and then no more cuts are taken.
func TestIdleReplicasMeet(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	r := startRig(t, src, &memState{}, []*node{newNode(t, "ebs", testVolumeSize, 32<<20), newNode(t, "peer", testVolumeSize, 32<<20)}, nil)
	r.sync()
	for range 3 {
		if err := r.p.Pause("peer"); err != nil {
			t.Fatal(err)
		}
		src.write(1)
		time.Sleep(100 * time.Millisecond) // "ebs" gets it
		if err := r.p.Resume("peer"); err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(10 * time.Second); ; {
			src.mu.Lock()
			before := src.cuts
			src.mu.Unlock()
			time.Sleep(200 * time.Millisecond) // 10 intervals
			src.mu.Lock()
			n := src.cuts - before
			src.mu.Unlock()
			s := r.p.Status()
			if n == 0 && s.Replicas[0].Disk == "UpToDate" && s.Replicas[1].Disk == "UpToDate" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%d cuts of an idle volume in 10 intervals; %+v", n, s.Replicas)
			}
		}
	}
}

// The wire breaks at random places: the replica is never torn, and what is
// sent afterwards is what changed, not everything.
func TestBrokenStreams(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	for b := range int64(2000) {
		src.write(b)
	}
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	first := r.last("ebs")
	if first.Link.SentBytes < testVolumeSize {
		t.Fatalf("the first sync sent %d of %d bytes", first.Link.SentBytes, testVolumeSize)
	}
	stop := src.busyWithin(t, 3, 300*time.Microsecond, 500)
	done := n.watch(src)
	rng := rand.New(rand.NewPCG(4, 4))
	for range 25 {
		for n.recv.Status()[0].Session == nil {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Duration(rng.IntN(30)) * time.Millisecond)
		n.cutWires()
	}
	stop()
	r.sync()
	done()
	if e := n.check(src); e == 0 {
		t.Fatal("the replica holds nothing")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.lost["ebs"]) < 5 {
		t.Fatalf("only %d sessions broke", len(r.lost["ebs"]))
	}
	for _, p := range r.plans["ebs"][1:] {
		if p.Action != Incremental || p.InPlace {
			t.Fatalf("after a break: %v", p)
		}
	}
	for _, e := range r.epoch["ebs"][1:] {
		if e.Link.SentBytes > testVolumeSize/2*uint64(1+e.Resumed) { // what changes again is sent again
			t.Fatalf("epoch %d sent %d bytes across %d breaks", e.Epoch, e.Link.SentBytes, e.Resumed)
		}
	}
}

// The wire breaks during the first sync: the replica stays Inconsistent until
// one has ended, and the next try compares.
func TestBrokenFirstSync(t *testing.T) {
	src := newMemSource(testVolumeSize, 64<<10)
	for b := range int64(2000) {
		src.write(b)
	}
	src.busy(t, 5, time.Millisecond)
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) { c.Replicas[0].Link.Codec = CodecNone })
	deadline := time.Now().Add(10 * time.Second)
	for breaks := 0; breaks < 3; {
		st := n.recv.Status()[0]
		if st.Session != nil && st.Session.ReceivedBytes > 1<<20 && st.Disk.State != DiskConsistent {
			n.cutWires()
			breaks++
			time.Sleep(5 * time.Millisecond)
		}
		if st.Disk.State == DiskConsistent || time.Now().After(deadline) {
			t.Logf("%d breaks", breaks)
			break
		}
	}
	r.sync()
	if n.check(src) == 0 {
		t.Fatal("the replica holds nothing")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if ps := r.plans["ebs"]; len(ps) > 1 && ps[1].Action != CompareAll && ps[1].Action != Incremental {
		t.Fatalf("after a broken first sync: %v", ps[1])
	}
}
