package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/cmd/blockferry/transport"
	"blockferry/proto"
	"blockferry/protocol"
)

// A busy machine makes no node silent.
func init() { askNode = time.Minute }

// diskAt is the disk of a primary that is down, with a history; its last epoch is open.
func diskAt(t *testing.T, l protocol.Lineage) (path string) {
	t.Helper()
	state := protocol.SourceState{Lineage: l[:len(l)-1], Generation: l.Tip().Generation, OpenEpoch: l.Tip().Epoch}
	if n := len(l); n > 1 && l[n-2].Generation == l[n-1].Generation {
		t.Fatal("of a generation only the last epoch is named")
	}
	raw, err := state.Encode()
	if err != nil {
		t.Fatal(err)
	}
	disk := blocktest.NewMemory(64 << 20)
	layout := volume.LayoutOptions{SizeBytes: 4 << 20, CowBytes: config.MinCowBytes, TailBytes: protocol.TailBytes(4<<20, protocol.MinJournalBytes)}
	if _, err := volume.FormatOn(disk, volume.UUID{7}, layout, raw); err != nil {
		t.Fatal(err)
	}
	all := make([]byte, disk.Size())
	if _, err := disk.ReadAt(all, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	return aDisk(t, all)
}

// twoNodes are two that hold a volume as primary, and ask each other over a socket. Their
// agents listen once run was called.
func twoNodes(t *testing.T, disks ...string) (nodes [2]*switching, run func(i int)) {
	t.Helper()
	dir := t.TempDir()
	address := func(i int) string { return fmt.Sprintf("unix:%s/%d", dir, i) }
	name := func(i int) string { return fmt.Sprintf("node-%c", 'a'+i) }
	for i, disk := range disks {
		s := onDisk(t, disk, &config.Replica{Name: "far", Peer: name(1 - i), Address: address(1 - i)})
		s.uuid, s.config.Peers = volume.UUID{7}, []string{name(1 - i)}
		s.agent.identity, s.agent.stopping = transport.NewIdentity(name(i), "", quiet()), make(chan struct{})
		s.agent.options.Config.Node = &config.Node{Name: name(i), Listen: address(i)}
		s.agent.peers = newPeers(s.agent)
		s.agent.volumes, s.agent.peers.volumes, s.copy.peers = []*managed{s.managed}, []*secondary{s.copy}, s.agent.peers
		nodes[i] = s
	}
	return nodes, func(i int) {
		ctx, stop := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			nodes[i].agent.peers.run(ctx)
		}()
		t.Cleanup(func() {
			stop()
			<-done
		})
	}
}

// comesUp is what a volume that is not up does before it is; it stays risen if it may be.
func (s *switching) comesUp() error {
	_, err := s.managed.beginOffline()
	if err != nil {
		s.rise(false)
	}
	return err
}

// Of two nodes that boot at once and hold separate histories, or of which one left the other
// behind, one comes up and never both, in whatever order they begin to listen and ask.
func TestBothBootAtOnce(t *testing.T) {
	for name, c := range map[string]struct{ a, b protocol.Lineage }{
		"separate histories":     {history(1, 10, 2, 12), history(1, 10, 3, 14)},
		"one was left behind":    {history(1, 11), history(1, 10, 3, 14)},
		"both hold the same":     {history(1, 11), history(1, 11)},
		"one goes on from there": {history(1, 11), history(1, 11, 3, 14)},
	} {
		t.Run(name, func(t *testing.T) {
			for round := range 3 {
				nodes, run := twoNodes(t, diskAt(t, c.a), diskAt(t, c.b)) // who comes up writes to its label
				var up [2]error
				var booting sync.WaitGroup
				for i, s := range nodes {
					wait := time.Duration(rand.IntN(5)*round) * time.Millisecond
					booting.Go(func() {
						time.Sleep(wait) // one machine is quicker
						run(i)
						up[i] = s.comesUp()
					})
				}
				booting.Wait()
				if up[0] == nil && up[1] == nil {
					t.Fatalf("round %d: both came up", round)
				}
				for i := 0; up[0] != nil && up[1] != nil; i++ {
					if i == 10 {
						t.Fatalf("neither comes up: %v; %v", up[0], up[1])
					}
					for n := range nodes { // each is tried again by itself, not in step
						if up[n] = nodes[n].comesUp(); up[n] == nil {
							break
						}
					}
				}
				for n, err := range up {
					if err != nil && !strings.Contains(err.Error(), fmt.Sprintf("node 'node-%c'", 'a'+1-n)) {
						t.Errorf("the other does not say why it is down: %v", err)
					}
				}
			}
		})
	}
}

// An old primary that boots while another node takes over from it, such as one that node has
// just fenced, waits for how that ends. Its disk has one epoch more than the copy there.
func TestBootBesideOneThatTakesOver(t *testing.T) {
	nodes, run := twoNodes(t, diskAt(t, history(1, 11)), "")
	old, other := nodes[0], nodes[1]
	other.role, other.copy.replica = roleSecondary, replicaOf(t, [16]byte{7}, "here", history(1, 10))
	other.copy.replica.parked = true // it stays as it is
	other.promote(history(1, 10))
	run(0)
	run(1)
	if err := old.comesUp(); err == nil || !strings.Contains(err.Error(), "would be a second primary") {
		t.Errorf("beside one that takes over: %v", err)
	}
	other.promote(nil)
	if err := old.comesUp(); err != nil {
		t.Errorf("that one did not take over: %v", err)
	}
}

// A node whose disk had no label when its agent began, such as one that is restored, is
// heard as soon as it comes up; and one that the operator decided for is heard, too.
func TestHeardWhileItComesUp(t *testing.T) {
	for name, decided := range map[string]decision{"it asks": toBePrimary, "it was decided for": forced} {
		nodes, run := twoNodes(t, diskAt(t, history(1, 10, 2, 12)), diskAt(t, history(1, 10, 3, 14)))
		nodes[0].uuid = volume.UUID{}
		nodes[0].decide(decided)
		run(0)
		up := nodes[0].comesUp() // the other one does not listen yet
		run(1)
		if err := nodes[1].comesUp(); up != nil || err == nil {
			t.Errorf("%s: %v; the other one: %v", name, up, err)
		}
	}
}

// Whoever asks before others can ask it waits for that.
func TestNobodyAsksUnheard(t *testing.T) {
	nodes, run := twoNodes(t, diskAt(t, history(1, 10, 2, 12)), diskAt(t, history(1, 10, 3, 14)))
	first := make(chan error, 1)
	go func() { first <- nodes[0].comesUp() }()
	select {
	case err := <-first:
		t.Fatalf("it asked before it listened: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	run(1)
	nodes[1].decide(toBePrimary)
	if err := nodes[1].comesUp(); err != nil {
		t.Fatalf("nobody answers, and it stays down: %v", err)
	}
	run(0)
	if err := <-first; err == nil {
		t.Error("both came up")
	}
}

// A primary that calls a node where the volume is primary, too, and down, is told so: it
// is split brain unless that disk was just left behind.
func TestPrimaryThatIsDownAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		disk, caller protocol.Lineage
		split        bool
	}{
		"it was left behind":                {history(1, 11), history(1, 10, 3, 14), false},
		"the caller goes on from it":        {history(1, 11), history(1, 11, 3, 14), false},
		"both went on":                      {history(1, 10, 2, 12), history(1, 10, 3, 14), true},
		"the caller was left behind itself": {history(1, 10, 3, 14), history(1, 11), true},
	} {
		s := onDisk(t, diskAt(t, c.disk))
		s.uuid, s.config.Peers = volume.UUID{7}, []string{"node-b"} // no replica is there
		s.agent.options.Config.Node = &config.Node{Name: "node-a"}
		s.agent.peers = newPeers(s.agent)
		s.agent.volumes, s.agent.peers.volumes, s.copy.peers = []*managed{s.managed}, []*secondary{s.copy}, s.agent.peers
		_, err := s.agent.peers.admitNode(t.Context(), "node-b", "node-b@10.0.0.2", protocol.Admission{VolumeUUID: [16]byte{7}, Volume: "data", Replica: "node-a", Lineage: c.caller})
		var refused *protocol.RefusedError
		if !errors.As(err, &refused) || (refused.Reason == proto.Reason_REASON_PRIMARY) != c.split || !strings.Contains(err.Error(), "is primary at node 'node-a', too, and not up") ||
			strings.Contains(err.Error(), "blockferry secondary data") == c.split {
			t.Errorf("%s: %v", name, err)
		}
		if s.managed.other != nil || len(s.managed.split) > 0 {
			t.Errorf("%s: it takes it for a split brain here", name)
		}
		if _, err := s.agent.peers.admitNode(t.Context(), "node-c", "node-c@10.0.0.3", protocol.Admission{VolumeUUID: [16]byte{7}, Volume: "data", Replica: "node-a", Lineage: c.caller}); err == nil ||
			strings.Contains(err.Error(), "primary") {
			t.Errorf("%s: a node that may not write it hears: %v", name, err)
		}
	}
}

// A node that hears that another one writes the volume is not told to restore all the same.
func TestRestoreBesideAPrimary(t *testing.T) {
	address := "unix:" + filepath.Join(t.TempDir(), "socket")
	l, err := transport.Listen(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	there := protocol.NewReceiver(protocol.ReceiverConfig{Admit: func(context.Context, protocol.Admission) (protocol.Admitted, error) {
		return protocol.Admitted{}, &protocol.RefusedError{Reason: proto.Reason_REASON_PRIMARY, Message: "it is written at node 'node-b', too"}
	}})
	server := transport.NewServer(transport.ServerOptions{Identity: transport.NewIdentity("node-b", "", quiet()), Log: quiet(), Service: there, Volumes: 1, Known: func(string) bool { return true }})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	s := aSwitching(t, nil, &config.Replica{Name: "far", Peer: "node-b", Address: address})
	s.agent.identity = transport.NewIdentity("node-a", "", quiet())
	for _, switches := range []bool{true, false} {
		if s.config.Copy = nil; switches {
			s.config.Copy = s.copy.replica.config
		}
		err := s.managed.askRemotes(t.Context(), replicaAt(t, "ebs", history(1, 10)), protocol.ReplicaStatus{VolumeUUID: [16]byte{7}, Lineage: history(1, 10)})
		want := "first at node 'node-b': blockferry down data"
		if switches {
			want = "to have this node follow: with 'role: secondary' of volume 'data' in the configuration: blockferry create data, with the agent stopped; to write it here again, first at node 'node-b': blockferry secondary data"
		}
		if exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "--from") {
			t.Errorf("both roles %v: %v", switches, err)
		}
	}
	server.Stop()
	there.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// A take-over asks the other nodes once, when no hook ran since; after one, once more.
func TestTakeOverAsksOnce(t *testing.T) {
	disk, _, _ := eitherRole(t)
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	for _, hooked := range []bool{false, true} {
		var asked atomic.Int32
		hook := hooks.AfterDemote // none of a take-over
		if hooked {
			hook = hooks.FencePeer
		}
		s, stop := besideNode(t, raw, &scriptedNode{asked: &asked}, hook)
		ctx, end := serveCopy(t, s)
		_, err := s.primary(ctx, true)
		if err == nil || !strings.Contains(err.Error(), "it is primary, and not up") || s.at() != rolePrimary {
			t.Errorf("%v", err) // there is nothing to bring up
		}
		want := int32(1)
		if hooked {
			want = 2
		}
		if n := asked.Load(); n != want {
			t.Errorf("asked %d times, hook %v", n, hooked)
		}
		end()
		stop()
	}
}

// A node that was fenced, and serves the volume all the same, is joined by no second primary, also by
// force; one that was reset and comes up gives way once it hears of the take-over.
func TestFenceThatLied(t *testing.T) {
	disk, at, _ := eitherRole(t)
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	up := &proto.Standing{Primary: true, Serving: true, Lineage: at.Proto()}
	down := &proto.Standing{Primary: true, Lineage: at.Proto()}
	for name, c := range map[string]struct {
		hook    hooks.Event
		says    []*proto.Standing
		refused bool
	}{
		"it serves":            {hooks.FencePeer, []*proto.Standing{up, up}, true},
		"it was coming up":     {hooks.FencePeer, []*proto.Standing{up, down}, false},
		"it is down":           {hooks.FencePeer, []*proto.Standing{down}, false},
		"nobody has fenced it": {hooks.BeforePromote, []*proto.Standing{up, up}, false}, // the operator's word
	} {
		s, stop := besideNode(t, raw, &scriptedNode{asked: new(atomic.Int32), says: c.says}, c.hook)
		ctx, end := serveCopy(t, s)
		_, err := s.primary(ctx, true)
		if r := s.roleOnDisk(); c.refused && (exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "'fence-peer' said that node 'node-b' writes") || r != roleSecondary || s.at() != roleSecondary) ||
			!c.refused && r != rolePrimary {
			t.Errorf("%s: %v", name, err)
		}
		end()
		stop()
	}
}

// besideNode is a secondary whose only other node answers as service does; its hook says yes.
func besideNode(t *testing.T, disk []byte, service proto.ReplicationServer, hook hooks.Event) (s *switching, stop func()) {
	t.Helper()
	address := "unix:" + filepath.Join(t.TempDir(), "socket")
	l, err := transport.Listen(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	server := transport.NewServer(transport.ServerOptions{Identity: transport.NewIdentity("node-b", "", quiet()), Log: quiet(), Service: service, Volumes: 1, Known: func(string) bool { return true }})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	s = aSwitching(t, disk, &config.Replica{Name: "far", Peer: "node-b", Address: address})
	s.role, s.uuid, s.config.Peers, s.config.Attach = roleSecondary, volume.UUID{7}, []string{"node-b"}, true // needs no mapper
	s.managed.hooks = hooks.New("node-a", "data", map[hooks.Event][]string{hook: {"/bin/true"}}, time.Minute, quiet())
	return s, func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
}

// scriptedNode does not say where it stands when it is asked first; then it says one thing after
// another, and no more.
type scriptedNode struct {
	proto.UnimplementedReplicationServer
	asked *atomic.Int32
	says  []*proto.Standing
}

func (n *scriptedNode) Watch(_ *proto.WatchRequest, stream proto.Replication_WatchServer) error {
	if n.asked.Add(1) == 1 {
		return errors.New("no")
	}
	for _, said := range n.says {
		if err := stream.Send(said); err != nil {
			return err
		}
	}
	return errors.New("no more")
}
