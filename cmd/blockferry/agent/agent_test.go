package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/bpf"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/protocol"
)

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// A listener that does not read is sent away instead of missing events or
// stopping the agent; others are not disturbed.
func TestSlowListenerIsCutOff(t *testing.T) {
	h := newHub()
	slow, endSlow := h.listen()
	defer endSlow()
	fast, endFast := h.listen()
	defer endFast()
	for i := range eventBuffer + 1 {
		h.publish("data", "", "k", "")
		if e, ok := <-fast; !ok || e.Kind != "k" {
			t.Fatalf("event %d did not arrive", i)
		}
	}
	n := 0
	for range slow { // ends: it was closed
		n++
	}
	if n != eventBuffer {
		t.Errorf("the slow one got %d events, want %d and then the end", n, eventBuffer)
	}
	endFast()
	h.publish("data", "", "k", "")
	select {
	case e := <-fast:
		t.Errorf("an event after the end: %v", e)
	default:
	}
}

// A request that ends with the agent was not interrupted by its caller.
func TestRequestEndsWithTheAgent(t *testing.T) {
	a := &Agent{stopping: make(chan struct{})}
	call := func(err error) exit.Code {
		_, err = a.wireUnary(t.Context(), nil, nil, func(context.Context, any) (any, error) { return nil, fmt.Errorf("sync: %w", err) })
		return exit.Of(err)
	}
	if code := call(context.Canceled); code != exit.Interrupted {
		t.Errorf("its caller went away: %d", code)
	}
	close(a.stopping)
	for _, err := range []error{context.Canceled, protocol.ErrStopped} {
		if code := call(err); code != exit.Unreachable {
			t.Errorf("the agent is ending (%v): %d", err, code)
		}
	}
	if code := call(context.DeadlineExceeded); code != exit.Timeout {
		t.Errorf("its limit passed: %d", code)
	}
}

func TestSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "deep", "er", "s")
	l, closeIt, err := Listen(path, "agent", "--socket")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		info, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", p, info.Mode().Perm(), want)
		}
	}
	if _, _, err := Listen(path, "agent", "--socket"); exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent: %v", err)
	}
	closeIt()
	// What a killed agent leaves behind is replaced.
	dead, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	dead.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatal("no stale socket was left to test with")
	}
	_, closeAgain, err := Listen(path, "agent", "--socket")
	if err != nil {
		t.Fatalf("a stale socket: %v", err)
	}
	closeAgain()
	// What answers without our lock is somebody's all the same.
	alive, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer alive.Close()
	if _, _, err := Listen(path, "agent", "--socket"); exit.Of(err) != exit.Refused {
		t.Errorf("a foreign program's socket: %v", err)
	}
	// A file or a folder that was named by mistake is not removed.
	file, folder := filepath.Join(t.TempDir(), "config"), t.TempDir()
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{file, folder} {
		if _, _, err := Listen(wrong, "agent", "--socket"); exit.Of(err) != exit.Refused {
			t.Errorf("no socket: %v", err)
		}
		if _, err := os.Stat(wrong); err != nil {
			t.Error(err)
		}
	}
}

// replicaAt is a replica in memory that holds the given history; nil: blank.
func replicaAt(t *testing.T, name string, l protocol.Lineage) *localReplica {
	t.Helper()
	return replicaOf(t, [16]byte{1}, name, l)
}

// replicaOf is the same for a replica of any volume.
func replicaOf(t *testing.T, volume [16]byte, name string, l protocol.Lineage) *localReplica {
	t.Helper()
	return replicaFrom(t, name, protocol.FormatOptions{VolumeUUID: volume, SizeBytes: 1 << 20, JournalBytes: protocol.MinJournalBytes}, l)
}

// strayedAt is one around data that strayed.
func strayedAt(t *testing.T, name string, l protocol.Lineage) *localReplica {
	t.Helper()
	return replicaFrom(t, name, protocol.FormatOptions{VolumeUUID: [16]byte{1}, SizeBytes: 1 << 20, JournalBytes: protocol.MinJournalBytes,
		Holds: &protocol.Holding{Lineage: l, Strayed: "written"}}, nil)
}

func replicaFrom(t *testing.T, name string, o protocol.FormatOptions, l protocol.Lineage) *localReplica {
	t.Helper()
	r := newLocalReplica(&Agent{log: quiet(), hub: newHub()}, &config.Volume{Name: "data"}, &config.Replica{Name: name, Device: "/dev/" + name})
	disk := blocktest.NewMemory(48 << 20)
	if err := protocol.FormatReplica(disk, o); err != nil {
		t.Fatal(err)
	}
	replica, err := protocol.OpenReplica(t.Context(), disk, protocol.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { replica.Close() })
	if l != nil {
		epoch := l.Tip().Epoch
		if err := replica.Begin(t.Context(), protocol.EpochStart{Epoch: epoch, Attempt: 1, Mode: protocol.ModeInPlace, Full: true, Lineage: l}); err != nil {
			t.Fatal(err)
		}
		if err := replica.Commit(t.Context(), protocol.EpochCommit{Epoch: epoch, Attempt: 1, Streams: []protocol.StreamSum{protocol.NewStreamDigest().Sum()}, Lineage: l}); err != nil {
			t.Fatal(err)
		}
	}
	r.set(replica, "", "")
	return r
}

func away(name string) *localReplica {
	r := newLocalReplica(&Agent{log: quiet(), hub: newHub()}, &config.Volume{Name: "data"}, &config.Replica{Name: name})
	r.closed(errors.New("no such disk"))
	return r
}

// A restore takes the furthest replica, and none while another one may be
// further or went another way: old data must not come back as new.
func TestRestoreChoosesTheFurthest(t *testing.T) {
	a, b, c := protocol.Generation{1}, protocol.Generation{2}, protocol.Generation{3}
	old := protocol.Lineage{{Generation: a, Epoch: 5}}
	newer := protocol.Lineage{{Generation: a, Epoch: 7}, {Generation: b, Epoch: 9}}
	other := protocol.Lineage{{Generation: a, Epoch: 5}, {Generation: c, Epoch: 12}}
	for _, test := range []struct {
		name     string
		replicas []*localReplica
		from     string
		want     string
		words    []string
	}{
		{"one", []*localReplica{replicaAt(t, "x", old)}, "", "x", nil},
		{"the second is newer", []*localReplica{replicaAt(t, "x", old), replicaAt(t, "y", newer)}, "", "y", nil},
		{"the first is newer", []*localReplica{replicaAt(t, "x", newer), replicaAt(t, "y", old)}, "", "x", nil},
		{"an older one by name", []*localReplica{replicaAt(t, "x", old), replicaAt(t, "y", newer)}, "x", "x", nil},
		{"diverged", []*localReplica{replicaAt(t, "x", newer), replicaAt(t, "y", other)}, "", "", []string{"'x'", "'y'", "diverged", "--from"}},
		{"diverged, by name", []*localReplica{replicaAt(t, "x", newer), replicaAt(t, "y", other)}, "y", "y", nil},
		{"one is away", []*localReplica{replicaAt(t, "x", newer), away("y")}, "", "", []string{"'y' is not open (no such disk)", "may be newer", "--from x"}},
		{"one is away, by name", []*localReplica{replicaAt(t, "x", newer), away("y")}, "x", "x", nil},
		{"one is blank", []*localReplica{replicaAt(t, "x", newer), replicaAt(t, "y", nil)}, "", "x", nil},
		{"of two volumes", []*localReplica{replicaAt(t, "x", old), replicaOf(t, [16]byte{2}, "y", newer)}, "", "",
			[]string{"'x' on /dev/x holds volume 01000000-", "'y' on /dev/y holds volume 02000000-", "check the paths", "--from"}},
		{"of two volumes, one blank", []*localReplica{replicaOf(t, [16]byte{2}, "x", nil), replicaAt(t, "y", newer)}, "", "", []string{"'x'", "'y'", "check the paths"}},
		{"of two volumes, by name", []*localReplica{replicaAt(t, "x", old), replicaOf(t, [16]byte{2}, "y", newer)}, "x", "x", nil},
		{"only a blank one", []*localReplica{replicaAt(t, "x", nil)}, "", "", []string{"nothing to restore from", "'x' is blank"}},
	} {
		m := &managed{config: &config.Volume{Name: "data"}, replicas: test.replicas}
		got, have, err := m.choose(t.Context(), test.from)
		if test.want != "" {
			if err != nil || got.config.Name != test.want || have.Committed.IsZero() {
				t.Errorf("%s: %v, %v", test.name, got, err)
			}
			continue
		}
		if exit.Of(err) != exit.Refused {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		for _, w := range test.words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: '%s' is missing in: %v", test.name, w, err)
			}
		}
	}
}

// A replica of another volume than what is known of this one is no replica of it.
func TestRestoreKnowsItsVolume(t *testing.T) {
	r := replicaOf(t, [16]byte{2}, "y", protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}})
	for _, test := range []struct {
		begun, up volume.UUID
		refused   string // "": not
	}{
		{},
		{volume.UUID{2}, volume.UUID{2}, ""},
		{volume.UUID{1}, volume.UUID{}, "/dev/ssd holds the beginning of volume 01000000-"},
		{volume.UUID{}, volume.UUID{1}, "'data' was, when it was last up, volume 01000000-"},
	} {
		m := &managed{config: &config.Volume{Name: "data", Device: "/dev/ssd"}, uuid: test.up}
		err := m.sameVolume(test.begun, r, volume.UUID{2})
		if test.refused == "" && err == nil {
			continue
		}
		if exit.Of(err) != exit.Refused || test.refused == "" || !strings.Contains(err.Error(), test.refused) || !strings.Contains(err.Error(), "'y' on /dev/y holds volume 02000000-") {
			t.Errorf("begun %s, up %s: %v", test.begun, test.up, err)
		}
	}
}

// A replica that the agent has not looked at yet is waited for.
func TestRestoreWaitsForReplicas(t *testing.T) {
	late := newLocalReplica(&Agent{log: quiet(), hub: newHub()}, &config.Volume{Name: "data"}, &config.Replica{Name: "x"})
	ready := replicaAt(t, "x", protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}})
	go func() {
		time.Sleep(50 * time.Millisecond)
		late.set(ready.replica, "", "")
	}()
	m := &managed{config: &config.Volume{Name: "data"}, replicas: []*localReplica{late}}
	if _, have, err := m.choose(t.Context(), ""); err != nil || have.Committed.Epoch != 5 {
		t.Errorf("%v, %v", have.Committed, err)
	}
}

// Once the stack is gone only the marks say whether something was written.
func TestSealedSourceCounts(t *testing.T) {
	for _, written := range []bool{false, true} {
		s := &source{lastCut: 4096}
		s.seal(written)
		if n, err := s.WrittenBytes(); err != nil || (n != 4096) != written {
			t.Errorf("written %v: %d, %v", written, n, err)
		}
	}
}

// Requests end when the agent begins to stop.
// A volume that was taken out of the configuration costs its disk nothing more.
func TestStaleTrackingEnds(t *testing.T) {
	root, device := blocktest.PinDir(t), blocktest.Loop(t, 16<<20)
	a := &Agent{log: quiet(), options: Options{Config: &config.Config{Path: "blockferry.yaml", Volumes: []*config.Volume{{Name: "kept"}}}}}
	pin := func(volume string) string {
		id := fmt.Sprintf("%032x", len(volume))
		target := bpf.Target{Device: device, Length: 16 << 20, Pin: filepath.Join(root, id+"-"+id), Owner: a.owner(), Volume: volume}
		tracker, err := bpf.Open(target)
		if err == nil {
			err = tracker.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
		return target.Pin
	}
	gone, kept := pin("dropped"), pin("kept")
	a.unpinStale(root)
	if _, err := os.Stat(gone); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of a volume that is gone: %v", err)
	}
	if _, err := os.Stat(kept); err != nil {
		t.Errorf("of a volume that is there: %v", err)
	}
	if !filepath.IsAbs(a.owner()) {
		t.Errorf("the owner is called %s from anywhere", a.owner())
	}
}

func TestRequestsEndWithTheAgent(t *testing.T) {
	a := &Agent{stopping: make(chan struct{})}
	ctx, end := a.untilStop(context.Background())
	defer end()
	if ctx.Err() != nil {
		t.Fatal("ended at once")
	}
	close(a.stopping)
	select {
	case <-ctx.Done():
	case <-time.After(5 * time.Second):
		t.Error("did not end")
	}
}
