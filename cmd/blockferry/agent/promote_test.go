package agent

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
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

// aSwitching is a volume of both roles whose disk is a file.
func aSwitching(t *testing.T, disk []byte, replicas ...*config.Replica) *switching {
	t.Helper()
	return onDisk(t, aDisk(t, disk), replicas...)
}

// serveCopy has the copy on a volume's disk served, as by the agent of node-a, until end.
func serveCopy(t *testing.T, s *switching) (ctx context.Context, end func()) {
	t.Helper()
	s.agent.identity = transport.NewIdentity("node-a", "", quiet())
	s.agent.options.Config.Node = &config.Node{Name: "node-a"}
	s.agent.peers = newPeers(s.agent)
	s.copy.peers = s.agent.peers
	replica := s.copy.replica
	replica.receiver, replica.parked = s.agent.peers.receiver, false
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		replica.run(ctx)
	}()
	replica.settled(ctx)
	return ctx, func() {
		stop()
		<-ended
	}
}

// aDisk is a file with holes.
func aDisk(t *testing.T, disk []byte) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zeros := make([]byte, 1<<20)
	for at := 0; at < len(disk) && err == nil; at += len(zeros) {
		if piece := disk[at:min(at+len(zeros), len(disk))]; !bytes.Equal(piece, zeros[:len(piece)]) {
			_, err = f.WriteAt(piece, int64(at))
		}
	}
	if err == nil {
		err = f.Truncate(int64(len(disk)))
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// onDisk is one whose disk is a file that is there.
func onDisk(t *testing.T, path string, replicas ...*config.Replica) *switching {
	t.Helper()
	m := aManaged(&config.Volume{Name: "data", Device: path, Replicas: replicas})
	s := &switching{agent: m.agent, config: m.config, log: m.log, managed: m, heard: map[string]heard{}, overtaken: map[string]heard{}, change: make(chan struct{}), role: rolePrimary}
	s.copy = &secondary{roles: s, config: m.config, replica: newLocalReplica(m.agent, m.config, &config.Replica{Name: "here", Device: path})}
	s.copy.replica.parked = true
	m.roles = s
	return s
}

// fakeStack is one that is up, as far as is asked here.
type fakeStack struct{ raised }

func (fakeStack) Size() int64          { return 4096 }
func (fakeStack) UUID() volume.UUID    { return volume.UUID{7} }
func (fakeStack) TrackingLost() string { return "" }
func (fakeStack) Path() string         { return "/dev/mapper/data" }

// 'primary --force' counts for one start: after that, other nodes are asked again.
func TestForceCountsOnce(t *testing.T) {
	s := aSwitching(t, nil)
	s.config.Attach = true // needs no mapper
	s.role = rolePrimary
	if _, err := s.primary(t.Context(), true); err == nil || s.decided != undecided {
		t.Errorf("after a 'primary --force' that failed: %v, %v", s.decided, err)
	}
	s.decide(forced)
	if _, err := s.managed.down(t.Context(), true); err != nil || s.decided != undecided {
		t.Errorf("after a down: %v, %v", s.decided, err)
	}
	s.decide(forced)
	s.managed.nowUp(fakeStack{}, nil)
	if s.decided != undecided {
		t.Error("after it came up")
	}
	s.decide(forced)
	if _, err := s.primary(t.Context(), true); err != nil || s.decided != undecided {
		t.Errorf("after 'primary' of one that is up: %v, %v", s.decided, err)
	}
}

// While a copy takes over, whoever asks hears of a primary, also once it is parked; so two
// that are asked to take over at once do not both.
func TestOneThatTakesOverSaysPrimary(t *testing.T) {
	s := aSwitching(t, nil)
	at := history(1, 10)
	s.role, s.uuid = roleSecondary, volume.UUID{1}
	s.copy.replica = replicaAt(t, "here", at)
	ask := func() bool {
		t.Helper()
		said, known := s.standing("node-b")
		if !known {
			t.Fatal("it says nothing")
		}
		if said.Primary != said.Serving {
			t.Error("another primary could come up beside it")
		}
		return said.Primary
	}
	if ask() {
		t.Error("a secondary says that it is primary")
	}
	s.promote(at)
	s.copy.replica.mu.Lock()
	s.copy.replica.replica = nil
	s.copy.replica.mu.Unlock()
	if !ask() {
		t.Error("once it is parked it is not heard of as primary")
	}
	s.promote(nil)
	if said, known := s.standing("node-b"); known && said.Primary {
		t.Error("it still says primary after that")
	}
}

// While a hook of a change of role runs, commands that would wait for its end are refused
// at once, or done; those of others wait for their turn.
func TestHookDoesNotWaitForItself(t *testing.T) {
	disk, at, _ := eitherRole(t)
	if err := takeOverHere(disk, at); err != nil {
		t.Fatal(err)
	}
	closeCleanly(t, disk)
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	s := aSwitching(t, raw)
	s.config.Attach = true // needs no mapper
	dir := t.TempDir()
	started, end := filepath.Join(dir, "started"), filepath.Join(dir, "end")
	for _, path := range []string{started, end} {
		if err := syscall.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.managed.hooks = hooks.New("node-a", "data", map[hooks.Event][]string{hooks.AfterDemote: {"/bin/sh", "-c", `echo >"$1"; read x <"$2"`, "hook", started, end}}, time.Minute, quiet())
	s.agent.options.Config.Volumes, s.agent.roles, s.agent.volumes, s.agent.stopping = []*config.Volume{s.config}, []*switching{s}, []*managed{s.managed}, make(chan struct{})
	c := control{agent: s.agent}
	request := &proto.VolumeRequest{Volume: "data"}
	result := make(chan error, 1)
	go func() {
		_, err := c.Secondary(context.Background(), request)
		result <- err
	}()
	if _, err := os.ReadFile(started); err != nil { // waits for the hook
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for name, call := range map[string]func(context.Context, *proto.VolumeRequest) (*proto.Done, error){"primary": c.Primary, "secondary": c.Secondary, "up": c.Up, "down": c.Down} {
		answer := make(chan error, 1)
		go func() {
			_, err := call(ctx, request)
			answer <- err
		}()
		want := "hook 'after-demote' of that has not ended"
		if name == "up" || name == "down" {
			want = "is secondary here"
		}
		select {
		case err := <-answer:
			if exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", name, err)
			}
		case <-ctx.Done():
			t.Fatalf("%s waits for the hook", name)
		}
	}
	if !s.managed.op.TryLock() {
		t.Fatal("the volume is held while the hook runs")
	}
	s.managed.op.Unlock()
	if err := os.WriteFile(end, []byte("\n"), 0); err != nil {
		t.Fatal(err)
	}
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	if _, err := c.Secondary(t.Context(), request); err != nil {
		t.Errorf("after the hook: %v", err)
	}
}

// A disk without room for a replica is refused while its volume is up, and that stays up.
func TestRoomIsLookedAtFirst(t *testing.T) {
	for tail, refused := range map[int64]bool{0: true, protocol.TailBytes(4<<20, protocol.MinJournalBytes): false} {
		disk := blocktest.NewMemory(64 << 20)
		if _, err := volume.FormatOn(disk, volume.UUID{7}, volume.LayoutOptions{SizeBytes: 4 << 20, CowBytes: config.MinCowBytes, TailBytes: tail}, nil); err != nil {
			t.Fatal(err)
		}
		raw := make([]byte, disk.Size())
		if _, err := disk.ReadAt(raw, 0); err != nil {
			t.Fatal(err)
		}
		s := aSwitching(t, raw)
		s.config.Attach = true // needs no mapper
		s.managed.nowUp(fakeStack{}, nil)
		_, err := s.secondary(t.Context(), false)
		if err == nil || strings.Contains(err.Error(), "without room for a replica") != refused || s.managed.at() != stageUp || s.managed.stack == nil {
			t.Errorf("a tail of %d bytes: %v; it is %s", tail, err, stageWords[s.managed.at()])
		}
	}
}

// What waited for a change of role does nothing to the disk of a volume that is
// secondary by then.
func TestNothingIsDoneToASecondary(t *testing.T) {
	s := aSwitching(t, nil)
	s.role = roleSecondary
	m := s.managed
	m.config.Attach = true // needs no mapper
	for name, do := range map[string]func() error{
		"up":      func() error { _, err := m.up(t.Context()); return err },
		"down":    func() error { _, err := m.down(t.Context(), true); return err },
		"restore": func() error { return m.restoreVolume(t.Context(), "", true, nil) },
	} {
		if err := do(); err == nil || !strings.Contains(err.Error(), "is secondary here") || m.at() != stageStarting {
			t.Errorf("%s: %v, %s", name, err, stageWords[m.at()])
		}
	}
}

// After an error the disk's label says which role it is, and a primary whose label says
// secondary is told what to do.
func TestLabelDecidesAfterAnError(t *testing.T) {
	disk, at, _ := eitherRole(t)
	for _, want := range []role{roleSecondary, rolePrimary} {
		raw := make([]byte, disk.Size())
		if _, err := disk.ReadAt(raw, 0); err != nil {
			t.Fatal(err)
		}
		if got := aSwitching(t, raw).roleOnDisk(); got != want {
			t.Errorf("%v, not %v", got, want)
		}
		if want == roleSecondary {
			if err := takeOverHere(disk, at); err != nil {
				t.Fatal(err)
			}
		}
	}
	m := aSwitching(t, nil).managed
	_ = m.refuse(fmt.Errorf("it does not start: %w", protocol.ErrSecondary))
	if !strings.Contains(m.advice, "blockferry secondary data") {
		t.Error(m.advice)
	}
}
