package protocol

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"blockferry/blockdev/blocktest"
	"blockferry/proto"
)

// restoreRig is a replica with an image that has holes, and what it must
// come back as.
func restoreRig(t *testing.T, size int64) (*node, []byte, Lineage) {
	t.Helper()
	src := newMemSource(size, BlockSize)
	for b := range size / BlockSize {
		if b/300%2 == 0 {
			src.write(b)
		}
	}
	n := newNode(t, "ebs", size, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	wroteSome(src, 400, 3)
	r.sync()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.p.Stop(ctx, nil); err != nil {
		t.Fatal(err)
	}
	held := n.check(src)
	want := make([]byte, size)
	for b, k := range src.image(held) {
		content(want[int64(b)*BlockSize:][:BlockSize], int64(b), k)
	}
	return n, want, n.rep.Status().Lineage
}

// target is a device full of garbage.
func target(t *testing.T, size int64) *blocktest.Memory {
	t.Helper()
	m := blocktest.NewMemory(size)
	if _, err := m.WriteAt(bytes.Repeat([]byte{0xee}, int(size)), 0); err != nil {
		t.Fatal(err)
	}
	return m
}

func mustHold(t *testing.T, m Store, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := m.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if i := firstDifference(got, want); i >= 0 {
		t.Fatalf("the restored device differs at byte %d", i)
	}
}

func TestRestore(t *testing.T) {
	const size = 24<<20 + 5*BlockSize
	n, want, lineage := restoreRig(t, size)
	for _, codec := range []Codec{CodecNone, CodecS2, CodecZstd} {
		client := n.client()
		if codec == CodecS2 {
			client = LocalClient(n.recv)
		}
		m := target(t, size+1<<20)
		var saved []RestoreState
		var last RestoreProgress
		got, err := RestoreTo(t.Context(), client, RestoreConfig{VolumeUUID: testUUID, Replica: "ebs", SizeBytes: size, Target: m, Codec: codec,
			Save: func(s RestoreState) error { saved = append(saved, s); return nil }, Progress: func(p RestoreProgress) { last = p }, CheckpointBytes: 4 << 20})
		if err != nil || !got.Equal(lineage) {
			t.Fatalf("%v: %v, want %v", err, got, lineage)
		}
		mustHold(t, m, want)
		if len(saved) < 4 || saved[0].OffsetBytes != 0 || !saved[len(saved)-1].Verifying || last.Phase != "verifying" || last.DoneBytes != size {
			t.Fatalf("saved %+v, progress %+v", saved, last)
		}
		if last.DataBytes > size*3/4 || last.DataBytes < size/4 {
			t.Fatalf("%d of %d bytes came as data, half of it was never written", last.DataBytes, size)
		}
	}
}

// breakingConn ends Restore streams after so many messages.
type breakingConn struct {
	grpc.ClientConnInterface
	after    int
	delay    time.Duration // before each message
	requests []*proto.RestoreRequest
}

type breakingStream struct {
	grpc.ClientStream
	c    *breakingConn
	left int
}

func (c *breakingConn) NewStream(ctx context.Context, d *grpc.StreamDesc, method string, o ...grpc.CallOption) (grpc.ClientStream, error) {
	st, err := c.ClientConnInterface.NewStream(ctx, d, method, o...)
	return &breakingStream{st, c, c.after}, err
}

func (s *breakingStream) SendMsg(m any) error {
	s.c.requests = append(s.c.requests, m.(*proto.RestoreRequest))
	return s.ClientStream.SendMsg(m)
}

func (s *breakingStream) RecvMsg(m any) error {
	time.Sleep(s.c.delay)
	if s.left--; s.left == 0 {
		return errors.New("the wire broke")
	}
	return s.ClientStream.RecvMsg(m)
}

// A restore that is cut off, with its device losing what was not flushed,
// goes on from the note last saved.
func TestRestoreResumes(t *testing.T) {
	const size = 24<<20 + 5*BlockSize
	n, want, _ := restoreRig(t, size)
	m := target(t, size)
	conn := &breakingConn{ClientConnInterface: n.conn, after: 7}
	var state *RestoreState
	tries := 0
	for ; tries < 20; tries++ {
		_, err := RestoreTo(t.Context(), proto.NewReplicationClient(conn), RestoreConfig{VolumeUUID: testUUID, Replica: "ebs", SizeBytes: size, Target: m, From: state,
			Save: func(s RestoreState) error { state = &s; return nil }, CheckpointBytes: 2 << 20})
		if err == nil {
			break
		}
		if !strings.Contains(err.Error(), "the wire broke") {
			t.Fatal(err)
		}
		m = m.PowerCut(testRand(uint64(tries)))
		if state.Verifying {
			conn.after = -1 // let it end
		}
	}
	if tries < 3 || tries == 20 {
		t.Fatalf("%d tries", tries)
	}
	mustHold(t, m, want)
	var last uint64
	for _, r := range conn.requests[:len(conn.requests)-1] {
		if len(r.HashKey) > 0 {
			continue
		}
		if r.FromOffset < last || (r.FromOffset > 0 && r.Expected == nil) {
			t.Fatalf("asked from %d after %d, expecting %v", r.FromOffset, last, r.Expected)
		}
		last = r.FromOffset
	}
	if last == 0 {
		t.Fatal("every try began anew")
	}

	// The replica moved on: what is there and what would come do not fit.
	state.Lineage = state.Lineage.Extend(Position{gen(77), state.Lineage.Tip().Epoch + 1})
	state.Verifying = false
	before := m.Count(blocktest.OpWrite)
	_, err := RestoreTo(t.Context(), n.client(), RestoreConfig{VolumeUUID: testUUID, Replica: "ebs", SizeBytes: size, Target: m, From: state,
		Save: func(s RestoreState) error { return nil }})
	if err == nil || !strings.Contains(err.Error(), "begin it anew") || m.Count(blocktest.OpWrite) != before {
		t.Fatalf("another position: %v, %d writes", err, m.Count(blocktest.OpWrite)-before)
	}
}

// lyingStore loses one write.
type lyingStore struct {
	Store
	offset int64
}

func (l lyingStore) WriteAt(p []byte, off int64) (int, error) {
	if off <= l.offset && l.offset < off+int64(len(p)) {
		q := append([]byte(nil), p...)
		q[l.offset-off] ^= 1
		p = q
	}
	return l.Store.WriteAt(p, off)
}

func TestRestoreComparesAtTheEnd(t *testing.T) {
	const size = 8 << 20
	n, _, _ := restoreRig(t, size)
	cfg := RestoreConfig{VolumeUUID: testUUID, Replica: "ebs", SizeBytes: size, Target: lyingStore{target(t, size), 100*BlockSize + 5},
		Save: func(RestoreState) error { return nil }}
	_, err := RestoreTo(t.Context(), n.client(), cfg)
	var wrong *RestoreMismatchError
	if !errors.As(err, &wrong) || wrong.First.Offset != 100*BlockSize/UnitSize*UnitSize || wrong.DifferentBytes != UnitSize {
		t.Fatalf("a device that lost a bit: %v", err)
	}
}

func TestRestoreRefusals(t *testing.T) {
	const size = 8 << 20
	n, _, _ := restoreRig(t, size)
	blank := newNode(t, "peer", size, 8<<20)
	for _, c := range []struct {
		name string
		conn *grpc.ClientConn
		cfg  RestoreConfig
		want string
	}{
		{"another volume", n.conn, RestoreConfig{VolumeUUID: [16]byte{8}, Replica: "ebs", SizeBytes: size}, "holds volume"},
		{"another replica", n.conn, RestoreConfig{VolumeUUID: testUUID, Replica: "nvme", SizeBytes: size}, "no replica"},
		{"another size", n.conn, RestoreConfig{VolumeUUID: testUUID, Replica: "ebs", SizeBytes: size - BlockSize}, "volume of"},
		{"never synced", blank.conn, RestoreConfig{VolumeUUID: testUUID, Replica: "peer", SizeBytes: size}, "no consistent image"},
		{"target too small", n.conn, RestoreConfig{VolumeUUID: testUUID, Replica: "ebs", SizeBytes: 2 * size}, "the volume"},
		{"progress can't be saved", n.conn, RestoreConfig{VolumeUUID: testUUID, Replica: "ebs", SizeBytes: size,
			Save: func(RestoreState) error { return errors.New("input/output error") }}, "save the progress"},
	} {
		m := target(t, size)
		before := m.Count(blocktest.OpWrite)
		c.cfg.Target = m
		if c.cfg.Save == nil {
			c.cfg.Save = func(RestoreState) error { return nil }
		}
		if _, err := RestoreTo(t.Context(), proto.NewReplicationClient(c.conn), c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if n := m.Count(blocktest.OpWrite) - before; n > 0 {
			t.Errorf("%s: %d writes", c.name, n)
		}
	}
}

// While a replica is being restored from, the primary's epochs wait in the
// journal: the image that is read is one.
func TestRestoreWhileEpochsCome(t *testing.T) {
	const size = 32 << 20 // more than is read ahead
	src := newMemSource(size, BlockSize)
	wroteSome(src, 0, 8000)
	n := newNode(t, "ebs", size, 32<<20)
	r := startRig(t, src, &memState{}, []*node{n}, nil)
	r.sync()
	src.busy(t, 12, time.Millisecond)
	m := target(t, size)
	conn := &breakingConn{ClientConnInterface: n.conn, delay: 20 * time.Millisecond}
	for range 3 {
		var state RestoreState
		_, err := RestoreTo(t.Context(), proto.NewReplicationClient(conn), RestoreConfig{VolumeUUID: testUUID, Replica: "ebs", SizeBytes: size, Target: m,
			Save: func(s RestoreState) error { state = s; return nil }})
		// The comparison is another stream, and the replica may have moved on.
		if err != nil && !strings.Contains(err.Error(), "begin it anew") {
			t.Fatal(err)
		}
		if !state.Verifying {
			t.Fatalf("not filled: %+v", state)
		}
		want := make([]byte, size)
		for b, k := range src.image(state.Lineage.Tip().Epoch) {
			content(want[b*BlockSize:][:BlockSize], int64(b), k)
		}
		mustHold(t, m, want)
	}
}
