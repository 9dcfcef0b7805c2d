package agent

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/proto"
	"blockferry/protocol"
)

// One epoch more comes to a copy at epoch 5: a block at an offset.
func oneMore(t *testing.T, r *protocol.Replica, offset int64) {
	t.Helper()
	codec, err := protocol.NewCompressor(protocol.CodecNone)
	if err != nil {
		t.Fatal(err)
	}
	frames := protocol.AppendFrames(nil, protocol.FrameMeta{Epoch: 6, Attempt: 1}, offset, bytes.Repeat([]byte("new "), protocol.BlockSize/4), codec)
	f, err := protocol.NewFrameReader(frames).Next()
	if err != nil {
		t.Fatal(err)
	}
	digest := protocol.NewStreamDigest()
	digest.Add(f.Header)
	if err := r.Begin(t.Context(), protocol.EpochStart{Epoch: 6, Attempt: 1, Mode: protocol.ModeJournal, Lineage: history(1, 6)}); err != nil {
		t.Fatal(err)
	}
	if err := r.Append(t.Context(), 0, frames); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(t.Context(), protocol.EpochCommit{Epoch: 6, Attempt: 1, Streams: []protocol.StreamSum{digest.Sum()}}); err != nil {
		t.Fatal(err)
	}
}

// A disk that is held is let go when something else is to become of it, such as a copy that
// takes over: what was committed meanwhile is applied first, and who held it is told.
func TestHeldDiskIsLetGo(t *testing.T) {
	s, _ := besideCopy(t, "")
	s.copy.peers = &peers{agent: s.agent, node: &config.Node{Name: "node-a"}}
	_, end := serveCopy(t, s)
	a := s.agent
	a.peers.volumes, a.volumes, a.options.Config.Volumes = []*secondary{s.copy}, []*managed{s.managed}, []*config.Volume{s.config}
	s.config.Copy = s.copy.replica.config
	for name, want := range map[string]*localReplica{"ebs": s.managed.replicas[0], "node-a": s.copy.replica} {
		if l, err := a.replicaHere("data", name); err != nil || l != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := a.replicaHere("data", "far"); exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "there: blockferry snapshot data node-b -- COMMAND") {
		t.Errorf("of one at another node: %v", err)
	}
	if _, err := a.replicaHere("data", "none"); err == nil {
		t.Error("of one that is not configured")
	}

	l := s.copy.replica
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) { // it is open a moment before others may use it
		_, _, used, err := l.use(t.Context())
		if err == nil {
			used()
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	held, done := make(chan *proto.Held, 1), make(chan error, 1)
	go func() {
		done <- l.hold(t.Context(), time.Hour, func(h *proto.Held) error { held <- h; return nil }, nil)
	}()
	select {
	case h := <-held:
		if h.Epoch != 5 || h.Offset != 1<<20 || h.SizeBytes != 4<<20 || h.Device != s.config.Device {
			t.Errorf("held as %v", h)
		}
	case err := <-done:
		t.Fatalf("it is not held: %v", err)
	}
	l.mu.Lock()
	r := l.replica
	l.mu.Unlock()
	oneMore(t, r, 0)
	if st := r.Status(); st.Applied.Epoch != 5 || st.Committed.Epoch != 6 {
		t.Fatalf("%+v", st)
	}
	applyPatience = time.Minute
	t.Cleanup(func() { applyPatience = 5 * time.Second })
	ended := make(chan struct{})
	go func() {
		end()
		close(ended)
	}()
	select {
	case err := <-done:
		if err == nil || !strings.Contains(err.Error(), "is not held: the agent lets go of the disk") {
			t.Errorf("%v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("it is held on")
	}
	<-ended
	disk, err := blockdev.OpenFile(s.config.Device, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	if st, err := protocol.PeekReplica(disk); err != nil || st.Applied.Epoch != 6 {
		t.Errorf("let go with %+v, %v", st, err)
	}
	if err := l.hold(t.Context(), time.Hour, nil, nil); exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "is not open") {
		t.Errorf("of one that is not open: %v", err)
	}
}
