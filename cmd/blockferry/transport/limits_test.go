package transport

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"blockferry/proto"
)

// Each volume has a connection of its own: what one node may have grows with the volumes,
// and who has more is told so, instead of a connection that breaks.
func TestEachVolumeMayConnect(t *testing.T) {
	a := authority(t)
	dir := folder(t, a, "node-b", 0)
	identity := NewIdentity("node-a", folder(t, a, "node-a", 0), discard())
	for _, c := range []struct{ volumes, allowed int }{{1, 16}, {17, 102}} {
		log := &logged{}
		l, err := Listen(t.Context(), "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		server := NewServer(ServerOptions{Identity: NewIdentity("node-b", dir, discard()), Log: slog.New(slog.NewTextHandler(log, nil)),
			Service: &holding{}, Known: func(string) bool { return true }, Volumes: c.volumes})
		done := make(chan error, 1)
		go func() { done <- server.Serve(l) }()
		ctx, cancel := context.WithCancel(t.Context())
		open := func() error {
			stream, err := identity.Client("node-b", l.Addr().String()).Replicate(ctx)
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		}
		for i := range c.allowed {
			if err := open(); err != nil {
				t.Fatalf("%d volumes, connection %d: %v", c.volumes, i, err)
			}
		}
		want := fmt.Sprintf("it has more than %d connections", c.allowed)
		if err := open(); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), want) {
			t.Errorf("%d volumes, one more: %v", c.volumes, err)
		}
		log.await(t, want)
		cancel()
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// holding says something and keeps the call open.
type holding struct {
	proto.UnimplementedReplicationServer
}

func (*holding) Replicate(s proto.Replication_ReplicateServer) error {
	if err := s.Send(&proto.FromReplica{}); err != nil {
		return err
	}
	<-s.Context().Done()
	return s.Context().Err()
}

// Who breaks off the handshake again and again, each time from another port, is logged
// by the same words.
func TestHandshakeWordsHaveNoPort(t *testing.T) {
	words := ""
	for port := range 3 {
		err := &net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{Port: 7070}, Addr: &net.TCPAddr{Port: 50000 + port}, Err: os.NewSyscallError("read", syscall.ECONNRESET)}
		got := handshakeWords(fmt.Errorf("tls: %w", err))
		if words != "" && got != words || !strings.Contains(got, "connection reset") {
			t.Errorf("%q, before %q", got, words)
		}
		words = got
	}
}
