package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/protocol"
)

// twoSecondaries is a node with a replica of node-a's volume 'data', and a disk that waits for
// node-c's volume 'logs'.
func twoSecondaries(t *testing.T) (p *peers, data, logs *secondary) {
	t.Helper()
	p = &peers{agent: &Agent{}, node: &config.Node{Name: "node-b"}, log: quiet(), said: map[string]*feeding{}}
	add := func(name, peer string, of [16]byte, l protocol.Lineage) *secondary {
		s := &secondary{peers: p, config: &config.Volume{Name: name, EraBlockBytes: config.MinEraBlockBytes, Copy: &config.Replica{Name: name}, Peers: []string{peer}}, replica: replicaOf(t, of, name, l)}
		s.replica.last = of
		p.volumes = append(p.volumes, s)
		return s
	}
	return p, add("data", "node-a", [16]byte{1}, protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}}), add("logs", "node-c", protocol.AnyVolume, nil)
}

// A node that may have one waiting disk does not get another volume's id for it, also while
// the replica of that volume is not open.
func TestWaitingReplicaIsNotOfAnotherVolume(t *testing.T) {
	p, data, _ := twoSecondaries(t)
	steal := protocol.Admission{VolumeUUID: [16]byte{1}, Volume: "logs", Replica: "node-b", SizeBytes: 64 << 20}
	for _, open := range []bool{true, false} {
		if !open {
			data.replica.closed(errors.New("its disk is away"))
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		_, err := p.admitNode(ctx, "node-c", "node-c@10.0.0.3", steal)
		cancel()
		want := "is 'data' at node 'node-b', and not 'logs'"
		if open {
			want = "may not be written by node 'node-c'"
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("data open: %v: %v", open, err)
		}
	}
}

// Whatever ids disks turn out to have, each node gets to the replica that it may write.
func TestAdmittedByNameAndId(t *testing.T) {
	p, _, logs := twoSecondaries(t)
	logs.replica = replicaOf(t, [16]byte{1}, "logs", nil)
	for node, want := range map[string]string{"node-a": "data", "node-c": "logs"} {
		who, err := p.admitNode(t.Context(), node, node+"@10.0.0.3", protocol.Admission{VolumeUUID: [16]byte{1}, Volume: want, Replica: "node-b"})
		if err != nil || who.Name != want || who.From != node+"@10.0.0.3" {
			t.Errorf("%s: %+v, %v", node, who, err)
		}
	}
	p.receiver = protocol.NewReceiver(protocol.ReceiverConfig{})
	for _, s := range p.volumes {
		if err := p.receiver.Add(s.config.Name, s.replica.replica); err != nil {
			t.Error(err)
		}
	}
}

// A disk that is too small is asked for again and again: it stays open, and the log short.
func TestTooSmallDiskIsSaidOnce(t *testing.T) {
	var log bytes.Buffer
	p, _, logs := twoSecondaries(t)
	logs.replica.log = slog.New(slog.NewTextHandler(&log, nil))
	p.log = logs.replica.log
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		become, err := logs.replica.awaitVolume(ctx, logs.replica.replica, 48<<20)
		if become != nil {
			err = fmt.Errorf("it was closed to become %+v", become.as)
		}
		ended <- err
	}()
	offer := protocol.Admission{VolumeUUID: [16]byte{2}, Volume: "logs", Replica: "node-b", SizeBytes: 1 << 30}
	for range 5 {
		if _, err := p.admitNode(t.Context(), "node-c", "node-c@10.0.0.3", offer); err == nil || !strings.Contains(err.Error(), "can't take it") {
			t.Error(err)
		}
		if _, open, reason, _ := logs.replica.status(); !open {
			t.Errorf("it was closed: %s", reason)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if n := strings.Count(log.String(), "\n"); n > 1 {
		t.Errorf("%d lines of the log:\n%s", n, log.String())
	}
}

// Sessions that bring nothing are logged once; one that does, and what is new, is logged.
func TestEmptySessionsAreSaidOnce(t *testing.T) {
	var log bytes.Buffer
	p, _, _ := twoSecondaries(t)
	p.log = slog.New(slog.NewTextHandler(&log, nil))
	lines := func() int { return strings.Count(log.String(), "\n") }
	at := protocol.Position{Generation: protocol.Generation{1}, Epoch: 5}
	for range 20 {
		p.fed("data", "node-a@10.0.0.1", at)
		p.notFed("data", "node-a@10.0.0.1", nil)
		p.fed("logs", "node-c@10.0.0.3", at)
		p.notFed("logs", "node-c@10.0.0.3", errors.New("refused"))
		at.Epoch++
	}
	if n := lines(); n != 4 {
		t.Errorf("%d lines for two volumes:\n%s", n, log.String())
	}
	for _, step := range []struct {
		want string
		do   func()
	}{
		{"fed by", func() { p.fed("data", "node-a@10.0.0.1", at); p.brought("data", at); p.brought("data", at) }},
		{"the wire broke", func() { p.notFed("data", "node-a@10.0.0.1", errors.New("the wire broke")) }},
		{"from=node-d@10.0.0.4", func() { p.fed("data", "node-d@10.0.0.4", at) }},
	} {
		before := log.Len()
		step.do()
		if got := log.String()[before:]; strings.Count(got, "\n") != 1 || !strings.Contains(got, step.want) {
			t.Errorf("want one line with %q, got %q", step.want, got)
		}
	}
}

// A plan that refuses is made again and again while cuts go on: it is said once for each
// reason.
func TestRefusedPlanIsSaidOnce(t *testing.T) {
	var log bytes.Buffer
	m := aManaged(&config.Volume{Name: "data", Device: "/dev/a", Replicas: []*config.Replica{{Name: "zone-b", Address: "10.0.0.2:7070", Peer: "node-b"}}})
	m.log = slog.New(slog.NewTextHandler(&log, nil))
	e := m.events()
	events, end := m.agent.hub.listen()
	defer end()
	round := func(rule string, epoch int) {
		plan := protocol.Plan{Action: protocol.Refuse, Rule: rule, Evidence: fmt.Sprintf("primary at %d", epoch)}
		e.Connected("zone-b", plan)
		e.Disconnected("zone-b", plan.Err())
	}
	for epoch := range 10 {
		round("ahead", epoch)
	}
	if n := strings.Count(log.String(), "\n"); n != 2 || len(events) != 2 {
		t.Errorf("%d lines, %d events:\n%s", n, len(events), log.String())
	}
	round("both went on", 11)
	e.Connected("zone-b", protocol.Plan{Action: protocol.Incremental, Rule: "behind"})
	e.Disconnected("zone-b", errors.New("the wire broke"))
	round("both went on", 12)
	if n := strings.Count(log.String(), "\n"); n != 8 {
		t.Errorf("%d lines:\n%s", n, log.String())
	}
}

// A copy that holds blocks of no cut is no one to restore from, unless it is named.
func TestChooseLeavesStrayedOut(t *testing.T) {
	m := aManaged(&config.Volume{Name: "data", Device: "/dev/a", Replicas: []*config.Replica{{Name: "x", Device: "/dev/x"}, {Name: "y", Device: "/dev/y"}}})
	l := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}}
	m.replicas[0] = replicaAt(t, "x", l)
	m.replicas[1] = strayedAt(t, "y", protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 6}})
	_, _, err := m.choose(t.Context(), "")
	if exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "'y' at") || !strings.Contains(err.Error(), "blocks of no cut (written)") || !strings.Contains(err.Error(), "--from x") {
		t.Errorf("%v", err)
	}
	if best, _, err := m.choose(t.Context(), "y"); err != nil || best.config.Name != "y" {
		t.Errorf("named: %v", err)
	}
	if best, _, err := m.choose(t.Context(), "x"); err != nil || best.config.Name != "x" {
		t.Errorf("the other named: %v", err)
	}
}

// A peer tells what it keeps of an epoch whose link broke, and says so when it gives that up.
func TestKeptEpochIsTold(t *testing.T) {
	s := aListener(t, t.TempDir(), volume.UUID{7})
	l := s.copy.replica
	r := l.replica
	var log bytes.Buffer
	l.log = slog.New(slog.NewTextHandler(&log, nil))
	frames := protocol.AppendFrames(nil, protocol.FrameMeta{Epoch: 20, Attempt: 1}, 0, bytes.Repeat([]byte("x"), protocol.BlockSize), nil)
	err := errors.Join(
		r.Begin(t.Context(), protocol.EpochStart{Epoch: 20, Attempt: 1, Mode: protocol.ModeJournal, Lineage: history(1, 20), Token: [16]byte{1}}),
		r.Append(t.Context(), 0, frames))
	if v := s.copy.status(); err != nil || v.Kept != nil {
		t.Fatalf("being fed: %+v, %v", v.Kept, err)
	}
	if err := r.Interrupt(); err != nil {
		t.Fatal(err)
	}
	for _, limit := range []time.Duration{time.Hour, 0} {
		if k := s.copy.status().Kept; k == nil || k.Epoch != 20 || k.Bytes != uint64(len(frames)) || time.Since(k.Since) > time.Minute || log.Len() > 0 {
			t.Fatalf("it tells %+v; log: %s", k, log.String())
		}
		l.dropKept(r, limit)
	}
	if k := s.copy.status().Kept; k != nil || !strings.Contains(log.String(), fmt.Sprintf("%d bytes of epoch 20, kept since", len(frames))) || !strings.Contains(log.String(), "given up") {
		t.Errorf("given up it tells %+v; log: %s", k, log.String())
	}
}

// When its serving ends a replica applies what it has committed before it is closed, once what
// feeds from it has ended; for one whose image is held on that is waited for a while only.
func TestCommittedIsAppliedFirst(t *testing.T) {
	formatted, _, _ := eitherRole(t)
	raw := make([]byte, formatted.Size())
	if _, err := formatted.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	for _, held := range []bool{false, true} {
		if held {
			applyPatience = time.Millisecond
			t.Cleanup(func() { applyPatience = 5 * time.Second })
		}
		s := aSwitching(t, raw)
		l := s.copy.replica
		var log bytes.Buffer
		l.log = slog.New(slog.NewTextHandler(&log, nil))
		var image *protocol.Image
		l.feeds = func(*protocol.Replica) (end func()) {
			return func() {
				if !held {
					time.AfterFunc(50*time.Millisecond, image.Release)
				}
			}
		}
		_, end := serveCopy(t, s)
		l.mu.Lock()
		r := l.replica
		l.mu.Unlock()
		var err error
		if image, err = r.Hold(t.Context()); err != nil {
			t.Fatal(err)
		}
		start := protocol.EpochStart{Epoch: 6, Attempt: 1, Mode: protocol.ModeJournal, Lineage: history(1, 6)}
		if err := errors.Join(r.Begin(t.Context(), start), r.Commit(t.Context(), protocol.EpochCommit{Epoch: 6, Attempt: 1})); err != nil {
			t.Fatal(err)
		}
		end()
		disk, err := blockdev.OpenFile(s.config.Device, blockdev.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		st, err := protocol.PeekReplica(disk)
		if err = errors.Join(err, disk.Close()); err != nil {
			t.Fatal(err)
		}
		if st.Committed.Epoch != 6 || (st.Applied.Epoch == 6) == held || strings.Contains(log.String(), "not all is applied") != held {
			t.Errorf("held on %v: applied is %v of %v; log:\n%s", held, st.Applied, st.Committed, log.String())
		}
	}
}
