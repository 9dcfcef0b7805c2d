package protocol

import (
	"context"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"blockferry/proto"
)

func hello(replica string) *proto.FromPrimary {
	return &proto.FromPrimary{Message: &proto.FromPrimary_Hello{Hello: &proto.Hello{
		Version: ProtocolVersion, MinVersion: MinProtocolVersion, VolumeUuid: testUUID[:], SizeBytes: testVolumeSize,
		Replica: replica, HashKey: make([]byte, HashKeyBytes), Lineage: line(1, 1).Proto(),
	}}}
}

// A local stream ends as one over gRPC does: what the other side said last
// arrives, then the end; a caller that gives up waits for nobody.
func TestLocalStreamEnds(t *testing.T) {
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	client := LocalClient(n.recv)
	open := func(ctx context.Context, replica string) proto.Replication_ReplicateClient {
		t.Helper()
		s, err := client.Replicate(ctx)
		if err == nil {
			err = s.Send(hello(replica))
		}
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open(t.Context(), "nobody")
	if m, err := s.Recv(); err != nil || m.GetRefused().GetReason() != proto.Reason_REASON_UNKNOWN_REPLICA {
		t.Fatalf("%v, %v", m, err)
	}
	if m, err := s.Recv(); err != io.EOF {
		t.Fatalf("after the refusal: %v, %v", m, err)
	}
	if err := s.Send(hello("ebs")); err != io.EOF {
		t.Fatalf("sent after the end: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	s = open(ctx, "ebs")
	if m, err := s.Recv(); err != nil || m.GetWelcome() == nil {
		t.Fatalf("%v, %v", m, err)
	}
	received := make(chan error, 1)
	go func() { _, err := s.Recv(); received <- err }()
	cancel()
	select {
	case err := <-received:
		if status.Code(err) != codes.Canceled {
			t.Fatalf("given up: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Recv goes on after its caller gave up")
	}
	// Its end leaves the replica's one place free, soon.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		s = open(t.Context(), "ebs")
		m, err := s.Recv()
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("%v, %v", m, err)
		}
		if m.GetWelcome() != nil {
			break
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Fatalf("after CloseSend: %v", err)
	}
}

// A busy volume with a replica in the same process: what is handed over is not
// overwritten before it was stored.
func TestLocalReplicaHoldsOneCut(t *testing.T) {
	for _, codec := range []Codec{CodecNone, CodecS2} {
		src := newMemSource(testVolumeSize, 64<<10)
		for b := range int64(1500) {
			src.write(b)
		}
		stop := src.busy(t, 7, 200*time.Microsecond)
		n := newNode(t, "ebs", testVolumeSize, 32<<20)
		r := startRig(t, src, &memState{}, []*node{n}, func(c *PrimaryConfig) {
			c.Replicas[0].Client, c.Replicas[0].Link.Codec = LocalClient(n.recv), codec
		})
		watched := n.watch(src)
		for range 3 {
			r.sync()
			time.Sleep(20 * time.Millisecond)
		}
		if seen := watched(); seen < 3 || n.check(src) == 0 || len(r.voids) > 0 {
			t.Fatalf("%v: %d images looked at, voids %v", codec, seen, r.voids)
		}
		stop()
	}
}
