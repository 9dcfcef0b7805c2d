package agent

import (
	"bytes"
	"context"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/layout"
	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

// besideCopy is a secondary with a replica beside it, which is served; the copy is not yet.
func besideCopy(t *testing.T, strayed string) (s *switching, content []byte) {
	t.Helper()
	disk, at, content := eitherRole(t)
	if strayed != "" {
		label, err := volume.ReadLabel(disk)
		if err != nil {
			t.Fatal(err)
		}
		format := layout.OnLabelled(label)
		format.Holds = &protocol.Holding{Lineage: at, Since: 5, Strayed: strayed}
		if err := protocol.FormatReplica(disk, format); err != nil {
			t.Fatal(err)
		}
	}
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	o := protocol.FormatOptions{VolumeUUID: volume.UUID{7}, SizeBytes: int64(len(content)), JournalBytes: protocol.MinJournalBytes}
	blank := blocktest.NewMemory(o.NeededBytes())
	if err := protocol.FormatReplica(blank, o); err != nil {
		t.Fatal(err)
	}
	formatted := make([]byte, blank.Size())
	if _, err := blank.ReadAt(formatted, 0); err != nil {
		t.Fatal(err)
	}
	s = aSwitching(t, raw, &config.Replica{Name: "ebs", Device: aDisk(t, formatted), Compression: "none"}, &config.Replica{Name: "far", Peer: "node-b", Address: "10.0.0.2:7070"})
	s.role, s.config.Interval = roleSecondary, time.Hour // until it is looked again
	s.cascade = newCascade(s.managed, s.copy.replica)
	s.agent.receiver = protocol.NewReceiver(protocol.ReceiverConfig{})
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	ebs := s.managed.replicas[0]
	ebs.receiver = s.agent.receiver
	go func() {
		defer close(ended)
		ebs.run(ctx)
	}()
	t.Cleanup(func() {
		stop()
		<-ended
	})
	ebs.settled(ctx)
	cascadeLast = time.Minute
	t.Cleanup(func() { cascadeLast = time.Second })
	return s, content
}

// besideIs waits until the status says so of the replica beside the copy.
func besideIs(t *testing.T, s *switching, what string, ok func(status.Replica) bool) {
	t.Helper()
	var got []status.Replica
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if got = s.copy.status().Replicas; len(got) == 1 && ok(got[0]) {
			return
		}
	}
	t.Fatalf("not %s: %+v", what, got)
}

// besideHolds compares the data of the replica beside the copy, once it is applied.
func besideHolds(t *testing.T, s *switching, epoch uint64, content []byte) {
	t.Helper()
	l := s.managed.replicas[0]
	l.mu.Lock()
	r := l.replica
	l.mu.Unlock()
	if err := r.WaitApplied(t.Context(), epoch); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(l.config.Device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, len(content))
	if _, err := io.ReadFull(f, got); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the replica beside it holds something else than epoch %d (%v)", epoch, err)
	}
}

// The replica beside a copy is filled from it and follows, under the same names; what is
// stopped brings it the last epoch first. Those at other nodes are not fed from here.
func TestReplicaBesideACopy(t *testing.T) {
	s, content := besideCopy(t, "")
	besideIs(t, s, "said to wait for the copy", func(r status.Replica) bool {
		return strings.Contains(r.Reason, "the copy here is not open") && r.Advice != ""
	})
	_, end := serveCopy(t, s)
	besideIs(t, s, "up to date", func(r status.Replica) bool {
		return r.Name == "ebs" && r.Disk == "UpToDate" && r.Position != nil && r.Position.Epoch == 5 && r.BehindBytes != nil && *r.BehindBytes == 0 && r.Reason == ""
	})
	besideHolds(t, s, 5, content)
	// An epoch comes to the copy.
	codec, err := protocol.NewCompressor(protocol.CodecNone)
	if err != nil {
		t.Fatal(err)
	}
	s.copy.replica.mu.Lock()
	held := s.copy.replica.replica
	s.copy.replica.mu.Unlock()
	block := bytes.Repeat([]byte("new "), protocol.BlockSize/4)
	frames := protocol.AppendFrames(nil, protocol.FrameMeta{Epoch: 6, Attempt: 1}, 1<<20, block, codec)
	f, err := protocol.NewFrameReader(frames).Next()
	if err != nil {
		t.Fatal(err)
	}
	digest := protocol.NewStreamDigest()
	digest.Add(f.Header)
	at := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	start := protocol.EpochStart{Epoch: 6, Attempt: 1, Mode: protocol.ModeJournal, Lineage: history(1, 6), CutUnixNanos: at.UnixNano()}
	if err := held.Begin(t.Context(), start); err != nil {
		t.Fatal(err)
	}
	if err := held.Append(t.Context(), 0, frames); err != nil {
		t.Fatal(err)
	}
	if err := held.Commit(t.Context(), protocol.EpochCommit{Epoch: 6, Attempt: 1, Streams: []protocol.StreamSum{digest.Sum()}}); err != nil {
		t.Fatal(err)
	}
	besideIs(t, s, "behind", func(r status.Replica) bool {
		return r.Position.Epoch == 5 && r.BehindBytes != nil && *r.BehindBytes == protocol.BlockSize && r.BehindSeconds != nil && *r.BehindSeconds > 0
	})
	end()
	besideIs(t, s, "at the copy's last epoch", func(r status.Replica) bool { return r.Position.Epoch == 6 && r.CutAt != nil && r.CutAt.Equal(at) })
	besideHolds(t, s, 6, append(append(bytes.Clone(content[:1<<20]), block...), content[1<<20+protocol.BlockSize:]...))
	if feeder, _ := s.cascade.look(); feeder != nil {
		t.Error("it is still fed")
	}
}

// A copy that strayed is not passed on, and the status says why.
func TestStrayedCopyIsNotPassedOn(t *testing.T) {
	s, _ := besideCopy(t, "written by hand")
	_, end := serveCopy(t, s)
	defer end()
	besideIs(t, s, "told why", func(r status.Replica) bool {
		return strings.Contains(r.Reason, "can't be passed on") && strings.Contains(r.Reason, "written by hand") && r.Position == nil
	})
	// The operator's word for either is given here.
	s.agent.peers.volumes, s.agent.options.Config.Volumes = []*secondary{s.copy}, []*config.Volume{s.config}
	if message, err := s.agent.giveUp("data", ""); err != nil || !strings.Contains(message, s.config.Device) {
		t.Errorf("%s, %v", message, err)
	}
	if _, err := s.agent.giveUp("data", "ebs"); err == nil || !strings.Contains(err.Error(), s.managed.replicas[0].config.Device+" holds nothing") {
		t.Errorf("of the replica beside it: %v", err)
	}
	if advice := s.managed.adviseSplit(s.managed.replicas[0].config); !strings.HasSuffix(advice, "blockferry discard --replica ebs data") {
		t.Error(advice)
	}
}
