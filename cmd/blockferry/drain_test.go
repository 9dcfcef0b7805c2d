package main

import (
	"context"
	"encoding/json"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/status"
	"blockferry/proto"
)

// hanging is an agent that answers so many times, with a volume that is up,
// and then hangs as one that is stopped does.
type hanging struct {
	proto.UnimplementedControlServer
	answers chan struct{}
}

func (h *hanging) Status(ctx context.Context, _ *proto.StatusRequest) (*proto.StatusReply, error) {
	select {
	case <-h.answers:
		line, err := json.Marshal(status.Document{Volumes: []status.Volume{{Name: "data", Up: true, Stage: "up"}}})
		return &proto.StatusReply{Json: line}, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (h *hanging) Sync(ctx context.Context, _ *proto.SyncRequest) (*proto.SyncReply, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// A stop of the machine does not wait for an agent that hangs, whenever it
// begins to.
func TestDrainEndsWithoutAnAnswer(t *testing.T) {
	defer func(d time.Duration) { answerGrace = d }(answerGrace)
	answerGrace = 300 * time.Millisecond
	for answers, want := range []struct {
		code exit.Code
		says string
	}{
		{exit.Unreachable, "no answer within 300ms"},
		{exit.Timeout, "is not drained within 200ms\nwhat is lost if its disk goes now is not known: no answer within 300ms"},
	} {
		socket := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		server, agent := grpc.NewServer(), &hanging{answers: make(chan struct{}, answers)}
		for range answers {
			agent.answers <- struct{}{}
		}
		proto.RegisterControlServer(server, agent)
		go func() { _ = server.Serve(l) }()
		began := time.Now()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			out, errs, code := blockferry(t, "drain", "--down", "--timeout", "200ms", "--socket", socket)
			if code != want.code || !strings.Contains(errs, want.says) {
				t.Errorf("after %d answers: exit code %d\n%s%s", answers, code, out, errs)
			}
		}()
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
			t.Errorf("after %d answers: a drain that hangs", answers)
		}
		t.Logf("after %d answers: ended after %v", answers, time.Since(began))
		server.Stop()
	}
}

// What is lost if the disk goes now is said per replica, and never as less
// than it may be.
func TestDrainSaysWhatIsLost(t *testing.T) {
	seconds, bytes := 12.5, uint64(3<<30)
	at := func(generation string, epoch uint64) *status.Position {
		return &status.Position{Generation: generation, Epoch: epoch}
	}
	before := at("aa", 7)
	for _, c := range []struct {
		replica status.Replica
		want    string
		lost    bool
	}{
		{status.Replica{Disk: "Consistent", Position: at("aa", 8), BehindSeconds: &seconds, BehindBytes: &bytes}, "holds epoch 8, cut since", false},
		{status.Replica{Disk: "Consistent", Position: at("aa", 7), BehindSeconds: &seconds, BehindBytes: &bytes, Reason: "slow"}, "the last 12s and 3GiB of writes are lost (slow)", true},
		{status.Replica{Disk: "Consistent", Position: at("bb", 9), BehindSeconds: &seconds, BehindBytes: &bytes, BehindIsMinimum: true}, "the last at least 12s and 3GiB of writes are lost", true},
		{status.Replica{Disk: "Consistent", Position: at("aa", 5)}, "all writes since epoch 5 are lost; how much that is is not known", true},
		{status.Replica{Disk: "DUnknown"}, "all writes since its last cut are lost", true},
		{status.Replica{Disk: "Inconsistent", BehindSeconds: &seconds, BehindBytes: &bytes}, "nothing can be restored from it", true},
	} {
		c.replica.Name = "ebs"
		var d drained
		d.lost(status.Volume{Name: "data", Replicas: []status.Replica{c.replica}}, before)
		if len(d.lines) != 1 || !strings.HasPrefix(d.lines[0].text, "data: replica 'ebs' ") || !strings.Contains(d.lines[0].text, c.want) ||
			d.lines[0].document["drained"] != !c.lost {
			t.Errorf("%+v: %+v, want '%s'", c.replica, d.lines, c.want)
		}
	}
}
