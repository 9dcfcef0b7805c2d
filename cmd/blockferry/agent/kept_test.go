package agent

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/transport"
	"blockferry/protocol"
)

// aListener is a secondary that holds epoch 10, whose peer does not answer, and that
// remembers in a folder.
func aListener(t *testing.T, dir string, of volume.UUID) *switching {
	t.Helper()
	s := aSwitching(t, nil, &config.Replica{Name: "far", Peer: "node-b", Address: "unix:" + filepath.Join(dir, "nobody")})
	s.role, s.uuid, s.config.Peers = roleSecondary, of, []string{"node-b"}
	s.agent.identity, s.agent.options.StateDir = transport.NewIdentity("node-a", "", quiet()), dir
	s.agent.options.Config.Node = &config.Node{Name: "node-a"}
	s.agent.peers = newPeers(s.agent)
	s.copy.peers, s.copy.replica = s.agent.peers, replicaAt(t, "here", history(1, 10))
	return s
}

func loss(t *testing.T, s *switching) string {
	t.Helper()
	st, err := s.copy.replica.replica.Status(), error(nil)
	st.CutUnixNanos = 1 // of a clock that is far behind
	heard, _, _ := s.hear(t.Context(), st, nil, nil)
	did, err := protocol.PlanTakeOver(st, protocol.TakeOverOptions{Heard: heard.beside(st.Lineage), Force: true, Fresh: protocol.Generation{9}})
	if err != nil {
		t.Fatal(err)
	}
	return did.Loss.String()
}

// What a primary said last is known after a restart, and told as old; how long it had gone
// on is counted here, whatever the other machine's clock says.
func TestHeardOutlivesTheAgent(t *testing.T) {
	dir := t.TempDir()
	s := aListener(t, dir, volume.UUID{7})
	if got := loss(t, s); !strings.Contains(got, "not known: nothing was heard") {
		t.Error(got)
	}
	behind := uint64(4096)
	now := time.Now()
	for i, epoch := range []uint64{10, 11, 11, 12, 13} { // cut 10 was heard of 3 s before the last
		s.note("node-b", heard{primary: true, lineage: history(1, epoch), behind: &behind, at: now.Add(time.Duration(i-4) * time.Second)})
	}
	const want = "2 later cuts and an open epoch, 3.0 s until the primary was last heard of, 4096 bytes by then"
	if got := loss(t, s); !strings.HasSuffix(got, want) {
		t.Error(got)
	}
	over, stop := context.WithCancel(t.Context())
	stop()
	s.run(over) // to its end

	again := aListener(t, dir, volume.UUID{7})
	again.run(over)
	if got := loss(t, again); !strings.Contains(got, want+", which was ") || !strings.Contains(got, "s ago, and the agent here was started since") {
		t.Errorf("after a restart: %s", got)
	}
	again.note("node-b", heard{primary: true, lineage: history(1, 13), behind: &behind, at: now})
	if got := loss(t, again); !strings.HasSuffix(got, want) {
		t.Errorf("heard again: %s", got)
	}

	// Another volume's, one that stood down since, and what makes no sense is nothing.
	other := aListener(t, dir, volume.UUID{8})
	if err := other.recallHeard(volume.UUID{8}); err != nil || len(other.heard) > 0 {
		t.Errorf("of another volume: %v, %v", other.heard, err)
	}
	again.note("node-b", heard{lineage: history(1, 13), at: now})
	path := filepath.Join(dir, "heard", "node-a", "data")
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("of one that is secondary since something is kept: %v", err)
	}
	for _, text := range []string{"", "{", `{"version":1,"volume":"` + s.uuid.String() + `","primaries":[{"node":"node-b","history":[{"generation":"01","epoch":5}]}]}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := other.recallHeard(volume.UUID{7}); err == nil || len(other.heard) > 0 {
			t.Errorf("%q: %v, %v", text, other.heard, err)
		}
	}
}

// Of two silent primaries the one heard in this life counts, whatever the clock said before;
// of two from before, the one that went on from the other.
func TestWhichSilentPrimaryCounts(t *testing.T) {
	early, late := time.Unix(0, 0), time.Now().Add(time.Hour)
	for name, c := range map[string]struct{ wins, loses heard }{
		"heard in this life":  {heard{at: early}, heard{at: late, before: true}},
		"heard later":         {heard{at: late}, heard{at: early}},
		"both before, one is": {heard{at: early, before: true, lineage: history(1, 10, 2, 12)}, heard{at: late, before: true, lineage: history(1, 10)}},
	} {
		if !c.wins.outdoes(c.loses) || c.loses.outdoes(c.wins) {
			t.Errorf("%s: it does not count", name)
		}
	}
}

// What was heard as a copy is nothing to the copy of a later life: a node that took over
// forgets it, and hears nothing until it has stood down.
func TestPrimaryForgetsWhatItHeard(t *testing.T) {
	dir := t.TempDir()
	s := aListener(t, dir, volume.UUID{7})
	s.config.Attach = true // there is nothing to bring up
	path := filepath.Join(dir, "heard", "node-a", "data")
	said := heard{primary: true, lineage: history(1, 11), at: time.Now()}
	s.note("node-b", said)
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	if _, err := s.startTaken(volume.UUID{7}); err == nil {
		t.Fatal("it came up from no disk")
	}
	s.note("node-b", said) // still under way
	if _, err := os.Stat(path); !os.IsNotExist(err) || len(s.heard) > 0 {
		t.Errorf("what it heard before: %v, %v", s.heard, err)
	}
}

// The cuts that the copy lacks are remembered from the oldest on, and not without a limit.
func TestCutsHeard(t *testing.T) {
	var last heard
	begin := time.Now()
	for i := range uint64(1000) {
		h := heard{primary: true, lineage: history(1, 100+i), at: begin.Add(time.Duration(i) * time.Second)}
		last = h.after(last, 150)
	}
	if len(last.cuts) != maxCutsHeard || last.cuts[0].open != 151 {
		t.Errorf("%d cuts from %+v on", len(last.cuts), last.cuts[0])
	}
	for holds, want := range map[uint64]float64{150: 999 - 51, 151: 999 - 52, 200: 999 - 101} {
		if got := last.known(holds).Seconds; got == nil || *got != want {
			t.Errorf("at %d: %v, want %v", holds, got, want)
		}
	}
	if got := last.known(5000).Seconds; got == nil || *got != 0 {
		t.Errorf("ahead of all that was heard: %v", got)
	}
}

// The operator's word for a copy outlives the agent, is for the position it was given at,
// and is gone once it was used.
func TestWordOutlivesTheAgent(t *testing.T) {
	dir := t.TempDir()
	disk := blocktest.NewMemory(48 << 20)
	o := protocol.FormatOptions{VolumeUUID: [16]byte{1}, SizeBytes: 1 << 20, JournalBytes: protocol.MinJournalBytes, Holds: &protocol.Holding{Lineage: history(1, 5), Strayed: "written"}}
	if err := protocol.FormatReplica(disk, o); err != nil {
		t.Fatal(err)
	}
	start := func() (*localReplica, *protocol.Replica) {
		t.Helper()
		l := newLocalReplica(&Agent{log: quiet(), hub: newHub(), options: Options{StateDir: dir, Config: &config.Config{}}}, &config.Volume{Name: "data"}, &config.Replica{Name: "here", Device: "/dev/here"})
		r, err := protocol.OpenReplica(context.Background(), disk, protocol.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		l.recallWord(r)
		l.set(r, "", "")
		return l, r
	}
	l, r := start()
	if st := r.Status(); !st.GivenUp.IsZero() {
		t.Fatalf("%+v", st)
	}
	out, err := l.giveUp("/rescue")
	if err != nil || !strings.Contains(out, "until then the word holds") {
		t.Fatal(out, err)
	}
	l.usedWord(r.Status()) // it was not
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	l, r = start()
	if st := r.Status(); st.GivenUp != history(1, 5).Tip() {
		t.Errorf("after a restart it is not given up: %+v", st)
	}
	moved := r.Status()
	moved.GivenUp = protocol.Position{}
	l.usedWord(moved)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	_, r = start()
	if st := r.Status(); !st.GivenUp.IsZero() {
		t.Errorf("it was used, and counts again: %+v", st)
	}

	// It is recalled before the disk is served.
	at := history(1, 5).Tip()
	if err := l.keepWord(r.Status().ReplicaUUID, &at); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	l.config.Device, l.receiver = filepath.Join(dir, "disk"), protocol.NewReceiver(protocol.ReceiverConfig{})
	if err := os.WriteFile(l.config.Device, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	l.set(nil, "", "")
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		l.run(ctx)
	}()
	l.settled(ctx)
	if st, open, reason, _ := l.status(); !open || st.GivenUp != at {
		t.Errorf("served: %v %s, given up: %v", open, reason, st.GivenUp)
	}
	stop()
	<-ended

	// And taken away once the copy that is served is not given up any more.
	if err := l.keepWord(r.Status().ReplicaUUID, nil); err != nil {
		t.Fatal(err)
	}
	ctx, stop = context.WithCancel(t.Context())
	ended = make(chan struct{})
	go func() {
		defer close(ended)
		l.run(ctx)
	}()
	l.settled(ctx)
	if err := l.keepWord(r.Status().ReplicaUUID, &at); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		left, err := os.ReadDir(filepath.Join(dir, "given-up"))
		if err == nil && len(left) == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it is kept of a copy that has moved on: %v, %v", left, err)
		}
	}
	stop()
	<-ended

	// A word for another position is for nothing.
	at = history(1, 4).Tip()
	if err := l.keepWord(r.Status().ReplicaUUID, &at); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	_, r = start()
	defer r.Close()
	if st := r.Status(); !st.GivenUp.IsZero() {
		t.Errorf("a word for another position counts: %+v", st)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "given-up")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	// Where nothing can be kept that is said.
	l.agent.options.StateDir = "/proc/nowhere"
	l.set(r, "", "")
	if out, err := l.giveUp("/rescue"); err != nil || !strings.Contains(out, "or the agent's end") {
		t.Error(out, err)
	}
}
