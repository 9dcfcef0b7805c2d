package integration

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding/gzip"

	"blockferry/blockdev/blocktest"
	"blockferry/cmd/blockferry/certs"
	"blockferry/cmd/blockferry/status"
	"blockferry/cmd/blockferry/transport"
	"blockferry/proto"
	"blockferry/protocol"
)

const (
	fortBytes = 32 << 20
	fortDisk  = fortBytes + 128<<20
)

var (
	fortUUID    = [16]byte{7, 7, 7}
	fortLineage = protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}}
	fortNext    = protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 6}}
)

// fort is an agent of the built binary with a replica of node-a's volume 'data'
// and one of node-c's volume 'logs', and what others try on it.
type fort struct {
	*cli
	disk, address string
	folders       map[string]string
}

func newFort(t *testing.T) *fort {
	t.Helper()
	onThisKernel(t)
	f := &fort{disk: blocktest.Loop(t, fortDisk), address: freeAddress(t)}
	f.folders = issue(t, blockferry(t), "node-a", "node-b", "node-c", "node-d")
	f.cli = newCLI(t, fmt.Sprintf(`node: {name: node-b, certs: %s, listen: "%s"}
volumes:
  data: {role: secondary, device: %s, journal: 16MiB, peers: [node-a]}
  logs: {role: secondary, device: %s, journal: 16MiB, peers: [node-c]}
`, f.folders["node-b"], f.address, f.disk, blocktest.Loop(t, fortDisk)))
	f.must(t, "create", "data")
	f.must(t, "create", "logs")
	f.start(t)
	// The first epoch, by the one who may.
	l := f.connect(t)
	defer l.Close()
	err := l.Begin(t.Context(), protocol.EpochStart{Epoch: 5, Mode: protocol.ModeInPlace, Full: true, Lineage: fortLineage}, false)
	if err == nil {
		_, err = l.SendRound(t.Context(), protocol.Round{Source: pattern{}, Ranges: []protocol.Range{{Length: fortBytes}}})
	}
	if err == nil {
		err = l.Commit(t.Context(), fortLineage, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); l.Applied() != 5; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("epoch 5 is not applied")
		}
	}
	return f
}

// pattern is a volume in which each block differs.
type pattern struct{}

func (pattern) ReadAt(p []byte, at int64) (int, error) {
	for i := range p {
		n := at + int64(i)
		p[i] = byte(n ^ n>>8 ^ n>>12 ^ n>>20)
	}
	return len(p), nil
}

func (f *fort) client(node string) *transport.Client {
	return transport.NewIdentity(node, f.folders[node], slog.New(slog.NewTextHandler(io.Discard, nil))).Client("node-b", f.address)
}

func (f *fort) link() protocol.LinkConfig {
	return protocol.LinkConfig{Volume: "data", VolumeUUID: fortUUID, SizeBytes: fortBytes, Replica: "node-b"}
}

// connect is node-a's session; the agent may have to start first, or to notice that the
// one before has ended.
func (f *fort) connect(t *testing.T) *protocol.Link {
	t.Helper()
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		var l *protocol.Link
		if l, err = protocol.Connect(t.Context(), f.client("node-a"), f.link(), fortLineage); err == nil {
			return l
		}
	}
	t.Fatal(err)
	return nil
}

// volume is the fort's status of 'data'.
func (f *fort) volume(t *testing.T) status.Volume {
	t.Helper()
	out := f.must(t, "status", "data", "--json")
	v, err := oneVolume(out)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// peak is the largest memory that the agent ever had, in bytes.
func (f *fort) peak(t *testing.T) int64 {
	t.Helper()
	text := mustRead(t, fmt.Sprintf("/proc/%d/status", f.agent.Process.Pid))
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindStringSubmatch(text)
	if m == nil {
		t.Fatal("no VmHWM")
	}
	kib, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return kib << 10
}

// attempt runs what an intruder tries, several times. It must fail, be logged once with the
// reason, if one is given, and leave the replica's image and position as they are.
func (f *fort) attempt(t *testing.T, what, reason string, try func() error) {
	t.Helper()
	before := len(f.logText(t))
	for range 3 {
		if err := try(); err == nil {
			t.Errorf("%s: nothing was refused", what)
		} else {
			t.Logf("%s: told: %v", what, err)
		}
	}
	if reason == "" { // gRPC's own, before anybody of ours is asked
		return
	}
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(f.logText(t)[before:], reason); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("%s: '%s' is not in the log:\n%s", what, reason, f.logText(t)[before:])
			return
		}
	}
	lines := 0
	for line := range strings.Lines(f.logText(t)[before:]) {
		if strings.Contains(line, "msg=refused") && strings.Contains(line, reason) {
			lines++
		}
	}
	if lines != 1 {
		t.Errorf("%s: logged %d times:\n%s", what, lines, f.logText(t)[before:])
	}
}

// unharmed compares the image and the position with those of before.
func (f *fort) unharmed(t *testing.T, image string) {
	t.Helper()
	if got := digestOf(t, f.disk, fortBytes); got != image {
		t.Error("the replica's image was written to")
	}
	v := f.volume(t)
	if v.Position == nil || v.Position.Epoch != 5 || v.Disk != "Consistent" {
		t.Errorf("the replica holds %v, %s", v.Position, v.Disk)
	}
}

// Who has no certificate, or a bad one, or a good one for something else, gets nowhere.
func TestIntruderCertificates(t *testing.T) {
	f := newFort(t)
	image, whole := digestOf(t, f.disk, fortBytes), ""
	bad := issue(t, f.binary, "node-a")["node-a"]
	expired := expiredFolder(t, filepath.Dir(filepath.Dir(f.folders["node-a"])))
	raw := func(folder string, change func(*tls.Config)) func() error {
		return func() error {
			n, err := certs.ReadNode(folder)
			if err != nil {
				t.Fatal(err)
			}
			c := clientTLS(n)
			if change != nil {
				change(c)
			}
			conn, err := grpc.NewClient(f.address, grpc.WithTransportCredentials(credentials.NewTLS(c)))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			link, err := protocol.Connect(t.Context(), proto.NewReplicationClient(conn), f.link(), fortLineage)
			if err == nil {
				link.Close()
			}
			return err
		}
	}
	session := func(node string, change func(*protocol.LinkConfig)) func() error {
		return func() error {
			c := f.link()
			if change != nil {
				change(&c)
			}
			link, err := protocol.Connect(t.Context(), f.client(node), c, fortLineage)
			if err == nil {
				link.Close()
			}
			return err
		}
	}
	restore := func(node string, uuid [16]byte) func() error {
		return func() error {
			stream, err := f.client(node).Restore(t.Context(), &proto.RestoreRequest{VolumeUuid: uuid[:], Replica: "node-b"})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		}
	}
	whole = digestOf(t, f.disk, fortDisk)
	f.attempt(t, "foreign", "is not by an authority that is trusted here", raw(bad, nil))
	f.attempt(t, "expired", "expired on", raw(expired, nil))
	f.attempt(t, "none", "it shows no certificate", raw(bad, func(c *tls.Config) { c.Certificates = nil }))
	f.attempt(t, "TLS 1.2", "it speaks no TLS 1.3", raw(f.folders["node-a"], func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }))
	f.attempt(t, "plaintext", "it does not speak TLS", func() error {
		link, err := protocol.Connect(t.Context(), transport.NewIdentity("node-a", "", slog.Default()).Client("node-b", f.address), f.link(), fortLineage)
		if err == nil {
			link.Close()
		}
		return err
	})
	f.attempt(t, "a node of no volume", "node 'node-d' is not among the 'peers' of any volume here", session("node-d", nil))
	f.attempt(t, "another volume's node", "may not be written by node 'node-c'", session("node-c", nil))
	f.attempt(t, "another volume's node, reading", "may not be read by node 'node-c'", restore("node-c", fortUUID))
	f.attempt(t, "another volume of that name", "is a replica of volume 07070700", session("node-a", func(c *protocol.LinkConfig) { c.VolumeUUID = [16]byte{8} }))
	f.attempt(t, "another volume's name", "of node 'node-a' has no replica at node 'node-b'", session("node-a", func(c *protocol.LinkConfig) { c.Volume, c.VolumeUUID = "logs", [16]byte{8} }))
	f.attempt(t, "the id of none", "is no volume's id", session("node-a", func(c *protocol.LinkConfig) { c.VolumeUUID = protocol.AnyVolume }))
	f.attempt(t, "another size", "was formatted for a volume of", session("node-a", func(c *protocol.LinkConfig) { c.SizeBytes *= 2 }))
	f.attempt(t, "another node's replica", "asked for is a replica at node 'elsewhere'", session("node-a", func(c *protocol.LinkConfig) { c.Replica = "elsewhere" }))
	if got := digestOf(t, f.disk, fortDisk); got != whole {
		t.Error("the replica's disk was written to")
	}
	f.unharmed(t, image)
	// The other replica still waits for its own.
	if v, err := oneVolume(f.must(t, "status", "logs", "--json")); err != nil || !strings.Contains(v.Reason, "waiting for the first of node-c") {
		t.Errorf("%+v, %v", v, err)
	}
	f.connect(t).Close() // who may still can
}

// A node that may write sends what is no epoch: torn, oversized, bombs, beyond the
// volume's end.
func TestIntruderFrames(t *testing.T) {
	f := newFort(t)
	image := digestOf(t, f.disk, fortBytes)
	meta := protocol.FrameMeta{Epoch: 6, Attempt: 1}
	packed := func(codec protocol.Codec, data []byte) []byte {
		c, err := protocol.NewCompressor(codec)
		if err != nil {
			t.Fatal(err)
		}
		return protocol.AppendFrames(nil, meta, 0, data, c)
	}
	plain := packed(protocol.CodecNone, junk(8<<10))
	bomb := func(codec protocol.Codec) []byte { // claims 4 KiB, unpacks to much more
		large := packed(codec, bytes.Repeat([]byte("bomb"), protocol.DefaultDataFrameBytes/4))
		return reheaded(t, large, meta, codec, 0, 4096)
	}
	frames := func(b []byte) func() error { return func() error { return f.send(t, b) } }
	peak := f.peak(t)
	f.attempt(t, "torn", "epoch 6: ", frames(plain[:len(plain)-100]))
	f.attempt(t, "half a header", "epoch 6: ", frames(plain[:20]))
	f.attempt(t, "a changed byte", "checksum", frames(flipped(plain, len(plain)-10)))
	f.attempt(t, "beyond the end", "a frame of 8192 bytes at", frames(protocol.AppendFrames(nil, meta, fortBytes-4096, junk(8<<10), mustCodec(t, protocol.CodecNone))))
	f.attempt(t, "far beyond the end", "the volume has", frames(protocol.AppendZeroFrames(nil, meta, protocol.Range{Offset: 1 << 60, Length: 4096})))
	f.attempt(t, "an s2 bomb", "replica \\\"node-b\\\": ", frames(bomb(protocol.CodecS2)))
	f.attempt(t, "a zstd bomb", "zstd", frames(bomb(protocol.CodecZstd)))
	f.attempt(t, "a message that is too large", "received message larger than max", frames(make([]byte, 3<<20)))
	f.attempt(t, "a message that claims 4 GiB", "larger than max", func() error { return f.rawMessage(t, []byte{0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3}) })
	f.attempt(t, "no protobuf", "unmarshal", func() error { return f.rawMessage(t, []byte{0, 0, 0, 0, 3, 0xff, 0xff, 0xff}) })
	f.attempt(t, "a packed message", "", func() error { return f.send(t, make([]byte, 1<<20), grpc.UseCompressor(gzip.Name)) })
	f.attempt(t, "a command", "only replication is served here, not /blockferry.v1.Control/Down", func() error { return f.command(t) })
	f.attempt(t, "comparisons of what is not there", "a range of", func() error {
		return f.say(t, &proto.FromPrimary{Message: &proto.FromPrimary_Compare{Compare: &proto.Compare{Id: 1, Offsets: []uint64{fortBytes}, Lengths: []uint32{4096}, UnitHashes: make([]byte, 16)}}})
	})
	f.attempt(t, "a commit of what was not sent", "the primary sent 9 frames", func() error {
		return f.say(t, &proto.FromPrimary{Message: &proto.FromPrimary_Commit{Commit: &proto.Commit{Epoch: 6, Attempt: 1,
			Streams: []*proto.StreamSum{{Frames: 9, Digest: make([]byte, 32)}}}}})
	})
	if grown := f.peak(t) - peak; grown > 96<<20 {
		t.Errorf("the agent's memory grew by %d MiB", grown>>20)
	} else {
		t.Logf("the agent's memory grew by %d MiB from %d MiB", grown>>20, peak>>20)
	}
	f.unharmed(t, image)
	l := f.connect(t) // who may still can
	defer l.Close()
	err := l.Begin(t.Context(), protocol.EpochStart{Epoch: 6, Mode: protocol.ModeJournal, Lineage: fortNext}, false)
	if err == nil {
		_, err = l.SendRound(t.Context(), protocol.Round{Source: pattern{}, Ranges: []protocol.Range{{Length: 1 << 20}}})
	}
	if err == nil {
		err = l.Commit(t.Context(), fortNext, 0)
	}
	if err != nil {
		t.Error(err)
	}
}

// Many connections of strangers cost a bounded number of places and little memory, and the
// one who may comes through in the end.
func TestIntruderFlood(t *testing.T) {
	f := newFort(t)
	image := digestOf(t, f.disk, fortBytes)
	peak := f.peak(t)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
	defer cancel()
	ended := make(chan int)
	for range 8 {
		go func() {
			n := 0
			for ; ctx.Err() == nil; n++ {
				_, _ = floodOnce(ctx, f.address)
			}
			ended <- n
		}()
	}
	total := 0
	for range 8 {
		total += <-ended
	}
	lines := strings.Count(f.logText(t), "msg=refused")
	t.Logf("%d connections, %d lines in the log, memory grew by %d MiB", total, lines, (f.peak(t)-peak)>>20)
	if total < 100 {
		t.Errorf("only %d connections: that was no flood", total)
	}
	if lines > 10 {
		t.Errorf("%d connections took %d lines of the log", total, lines)
	}
	if grown := f.peak(t) - peak; grown > 64<<20 {
		t.Errorf("the agent's memory grew by %d MiB", grown>>20)
	}
	f.connect(t).Close()
	f.unharmed(t, image)
}

var errRefused = errors.New("refused")

// send opens epoch 6 as node-a and sends frames.
func (f *fort) send(t *testing.T, frames []byte, o ...grpc.CallOption) error {
	t.Helper()
	return f.say(t, &proto.FromPrimary{Message: &proto.FromPrimary_Frames{Frames: &proto.Frames{Data: frames}}}, o...)
}

// say opens epoch 6 as node-a and sends one message; what comes back must be a
// refusal.
func (f *fort) say(t *testing.T, m *proto.FromPrimary, o ...grpc.CallOption) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for { // until the session before has ended
		err := f.sayOnce(ctx, m, o...)
		if err == nil || !strings.Contains(err.Error(), "one primary at a time") {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (f *fort) sayOnce(ctx context.Context, m *proto.FromPrimary, o ...grpc.CallOption) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := f.client("node-a").Replicate(ctx, o...)
	if err != nil {
		return err
	}
	for _, one := range []*proto.FromPrimary{
		{Message: &proto.FromPrimary_Hello{Hello: &proto.Hello{Version: 1, MinVersion: 1, Features: protocol.Features(), Volume: "data", VolumeUuid: fortUUID[:],
			SizeBytes: fortBytes, Replica: "node-b", HashKey: make([]byte, protocol.HashKeyBytes), Lineage: fortLineage.Proto()}}},
		{Message: &proto.FromPrimary_Begin{Begin: &proto.Begin{Epoch: 6, Attempt: 1, Mode: proto.Mode_MODE_JOURNAL, Lineage: fortNext.Proto()}}},
		m,
	} {
		if stream.Send(one) != nil {
			break // Recv says why
		}
	}
	for {
		reply, err := stream.Recv()
		if err != nil {
			return err
		}
		if r := reply.GetRefused(); r != nil {
			return fmt.Errorf("%w: %s", errRefused, r.Message)
		}
		if reply.GetCommitted() != nil {
			return nil
		}
	}
}

func digestOf(t *testing.T, device string, size int64) string {
	t.Helper()
	file, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	return readDigest(t, io.NewSectionReader(file, 0, size))
}
