package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/deadman"
	"blockferry/blockdev/dm"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/lease"
	"blockferry/protocol"
)

// fakeLeases is an etcd that says what it is told to.
type fakeLeases struct {
	standing lease.Standing
	err      error
	taken    int
	resumed  int
	now      func() time.Duration
	watched  chan string // has what is watched, unless nil
}

func (f *fakeLeases) Look(context.Context, string) (lease.Standing, error) { return f.standing, f.err }

func (f *fakeLeases) Take(_ context.Context, _ string, c lease.Claim) (heldLease, error) {
	if f.standing.Holder != nil {
		return nil, fmt.Errorf("%w by node '%s'", lease.ErrHeld, f.standing.Holder.Node)
	}
	f.taken++
	f.standing.Holder = &c
	return &scriptedLease{now: f.now, sent: f.now()}, nil
}

func (f *fakeLeases) Resume(context.Context, string, lease.Claim) (heldLease, error) {
	f.resumed++
	return &scriptedLease{now: f.now, sent: f.now()}, nil
}

func (f *fakeLeases) Watch(_ context.Context, volume string) <-chan struct{} {
	if f.watched != nil {
		f.watched <- volume
	}
	return nil
}

// withLease is a volume of both roles at node-a, with a lease.
func withLease(t *testing.T, disk []byte) (*switching, *fakeLeases) {
	t.Helper()
	s := aSwitching(t, disk)
	begun := time.Now()
	f := &fakeLeases{now: func() time.Duration { return time.Since(begun) }}
	s.lease = &keeper{terms: walkTerms(f.now), store: f, fenced: func() error { return nil }, fail: s.failStack, node: "node-a", config: s.config, log: quiet(), record: s.copies}
	t.Cleanup(s.lease.drop)
	return s, f
}

// primaryWithLease is one whose disk says that it is primary, from a history on.
func primaryWithLease(t *testing.T) (s *switching, f *fakeLeases, at protocol.Lineage) {
	t.Helper()
	disk, at, _ := eitherRole(t)
	if err := takeOverHere(disk, at); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	s, f = withLease(t, raw)
	return s, f, at
}

func copyAt(epoch uint64) lease.Copy {
	return lease.Copy{Generation: fmt.Sprintf("%x", protocol.Generation{1}), Epoch: epoch}
}

func diskOf(epoch uint64) *lease.Copy {
	c := copyAt(epoch)
	return &c
}

// By itself only the copy goes on that is the last holder's, or that it knew to be close enough and
// that still holds what it held then.
func TestWhoMayFollow(t *testing.T) {
	has := history(1, 10)
	for name, c := range map[string]struct {
		record  *lease.Record
		primary bool
		refused string // "": not
	}{
		"nobody had it, a primary":       {nil, true, ""},
		"nobody had it, a secondary":     {nil, false, "no node had the lease yet"},
		"it had it last":                 {&lease.Record{Node: "node-a"}, false, ""},
		"its disk holds what it held":    {&lease.Record{Node: "node-a", Disk: diskOf(10)}, true, ""},
		"its disk went on since":         {&lease.Record{Node: "node-a", Disk: diskOf(9)}, false, ""},
		"its disk went back":             {&lease.Record{Node: "node-a", Disk: diskOf(11)}, true, "its disk, which is at"},
		"and it is secondary":            {&lease.Record{Node: "node-a", Disk: diskOf(11)}, false, "it went back"},
		"filled from a copy beside it":   {&lease.Record{Node: "node-a", Disk: diskOf(11), Copies: map[string]lease.Copy{"node-a": copyAt(10)}}, true, ""},
		"filled from an older state":     {&lease.Record{Node: "node-a", Disk: diskOf(12), Copies: map[string]lease.Copy{"node-a": copyAt(11)}}, true, "it went back"},
		"another's disk":                 {&lease.Record{Node: "node-b", Disk: diskOf(11), Copies: map[string]lease.Copy{"node-a": copyAt(9)}}, false, ""},
		"it is on record":                {&lease.Record{Node: "node-b", Copies: map[string]lease.Copy{"node-a": copyAt(9)}}, false, ""},
		"on record with all it has":      {&lease.Record{Node: "node-b", Copies: map[string]lease.Copy{"node-a": copyAt(10)}}, true, ""},
		"it had more once":               {&lease.Record{Node: "node-b", Copies: map[string]lease.Copy{"node-a": copyAt(11)}}, false, "it went back"},
		"of another line":                {&lease.Record{Node: "node-b", Copies: map[string]lease.Copy{"node-a": {Generation: fmt.Sprintf("%x", protocol.Generation{2}), Epoch: 9}}}, false, "it went back"},
		"another's copy is on record":    {&lease.Record{Node: "node-b", Copies: map[string]lease.Copy{"node-c": copyAt(9)}}, false, "'max-loss' behind"},
		"an old primary, not on record":  {&lease.Record{Node: "node-b"}, true, "node 'node-b', which had it last"},
		"a record that makes no sense":   {&lease.Record{Node: "node-b", Copies: map[string]lease.Copy{"node-a": {Generation: "zz", Epoch: 9}}}, false, "which is none"},
		"a record with a zero position ": {&lease.Record{Node: "node-b", Copies: map[string]lease.Copy{"node-a": {}}}, false, "which is none"},
	} {
		if got := mayFollow(c.record, "node-a", c.primary, has); (got == "") != (c.refused == "") || !strings.Contains(got, c.refused) {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// On record are what the disk holds and the copies that are connected and close enough; of those
// beside the disk the furthest.
func TestRecordOfCopies(t *testing.T) {
	v := &config.Volume{MaxLoss: 5 * time.Second, Replicas: []*config.Replica{{Name: "near", Device: "/dev/x"}, {Name: "nearer", Device: "/dev/y"}, {Name: "far", Peer: "node-b", Address: "x:1"}}}
	good := protocol.ReplicaReport{Name: "far", Connection: "Connected", Epoch: 7, Generation: "01", LagSeconds: 5}
	near, nearer := good, good
	near.Name, nearer.Name = "near", "nearer"
	for _, epochs := range [][2]uint64{{7, 8}, {8, 7}} {
		near.Epoch, nearer.Epoch = epochs[0], epochs[1]
		got := recordOf("node-a", v, protocol.Position{Generation: protocol.Generation{1}, Epoch: 9}, []protocol.ReplicaReport{near, nearer, good})
		if got.Disk == nil || *got.Disk != copyAt(9) || got.Copies["node-a"].Epoch != 8 || got.Copies["node-b"].Epoch != 7 || len(got.Copies) != 2 {
			t.Errorf("%+v", got)
		}
	}
	for name, c := range map[string]struct {
		change func(*protocol.ReplicaReport)
		in     bool
	}{
		"close":            {func(*protocol.ReplicaReport) {}, true},
		"further behind":   {func(r *protocol.ReplicaReport) { r.LagSeconds = 5.1 }, false},
		"not known better": {func(r *protocol.ReplicaReport) { r.LagIsMinimum = true }, false},
		"away":             {func(r *protocol.ReplicaReport) { r.Connection = "Connecting" }, false},
		"never synced":     {func(r *protocol.ReplicaReport) { r.Epoch = 0 }, false},
		"of this node":     {func(r *protocol.ReplicaReport) { r.Name = "near" }, false},
		"of nobody":        {func(r *protocol.ReplicaReport) { r.Name = "lost" }, false},
	} {
		r := good
		c.change(&r)
		got := recordOf("node-a", v, protocol.Position{}, []protocol.ReplicaReport{r})
		if got.Disk != nil {
			t.Errorf("%s: a disk without a cut is at %+v", name, got.Disk)
		}
		if at, in := got.Copies["node-b"]; got.Node != "node-a" || in != c.in || in && at != (lease.Copy{Generation: "01", Epoch: 7}) || len(got.Copies) > 1 {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// A lease that a node has is overridden by nobody; without etcd nobody becomes primary; what the
// record says counts for a disk that was primary, unless forced.
func TestLeaseIsNeeded(t *testing.T) {
	has, ctx := history(1, 10), t.Context()
	for _, force := range []bool{false, true} {
		s, f := withLease(t, nil)
		f.standing.Holder = &lease.Claim{Node: "node-b"}
		if err := s.lease.need(ctx, volume.UUID{7}, false, has, force); exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "held by node 'node-b'") || !strings.Contains(err.Error(), "blockferry secondary data") {
			t.Errorf("force %v: held by another: %v", force, err)
		}
		f.err = errors.New("no route")
		if err := s.lease.need(ctx, volume.UUID{7}, false, has, force); exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "no route") || !strings.Contains(err.Error(), "take 'promote: auto' out") {
			t.Errorf("force %v: etcd is away: %v", force, err)
		}
		f.err, f.standing = nil, lease.Standing{Record: &lease.Record{Node: "node-b"}}
		err := s.lease.need(ctx, volume.UUID{7}, true, has, force)
		if force != (err == nil) || !force && !strings.Contains(err.Error(), "primary --force data") {
			t.Errorf("force %v: another had it last: %v", force, err)
		}
		if (f.taken == 1) != force || (s.lease.held() != nil) != force {
			t.Errorf("force %v: taken %d times", force, f.taken)
		}
		if err := s.lease.need(ctx, volume.UUID{7}, true, has, force); force && (err != nil || f.taken != 1) {
			t.Errorf("needed again: %v, taken %d times", err, f.taken)
		}
		for _, primary := range []bool{true, false} { // who had it last, and its disk went back
			s, f := withLease(t, nil)
			f.standing.Record = &lease.Record{Node: "node-a", Disk: diskOf(11)}
			err := s.lease.need(ctx, volume.UUID{7}, primary, has, force)
			if force != (err == nil) || !force && (!strings.Contains(err.Error(), "went back") || !strings.Contains(err.Error(), "primary --force data")) {
				t.Errorf("force %v, primary %v: %v", force, primary, err)
			}
		}
	}
	s, f := withLease(t, nil)
	s.lease.boot = "this"
	f.standing.Holder = &lease.Claim{Node: "node-a", Boot: "another", Lease: 5}
	if err := s.lease.need(ctx, volume.UUID{7}, true, has, true); err == nil || f.resumed != 0 {
		t.Errorf("of a clone of this machine: %v, resumed %d times", err, f.resumed)
	}
	f.standing.Holder = &lease.Claim{Node: "node-a", Boot: "this", Lease: 5}
	if err := s.lease.need(ctx, volume.UUID{7}, true, has, false); err != nil || f.resumed != 1 || s.lease.held() == nil {
		t.Errorf("of an earlier process: %v", err)
	}
}

// Hooks may take longer than the lease lives: then nothing is written.
func TestTakeOverProvesTheLease(t *testing.T) {
	disk, _, _ := eitherRole(t)
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	for _, lost := range []error{nil, fmt.Errorf("%w by a test", lease.ErrLost)} {
		s, f := withLease(t, raw)
		s.role, s.uuid, s.config.Attach = roleSecondary, volume.UUID{7}, true // needs no mapper
		ctx, end := serveCopy(t, s)
		l := &scriptedLease{now: f.now, sent: f.now()}
		l.say(lost)
		s.lease.have(l)
		_, err := s.primary(ctx, true)
		if lost != nil && (!errors.Is(err, lease.ErrLost) || s.at() != roleSecondary || s.roleOnDisk() != roleSecondary || s.lease.held() != nil) {
			t.Errorf("its lease is lost: %v, the role is %v", err, s.at())
		}
		if lost == nil && s.roleOnDisk() != rolePrimary {
			t.Errorf("its lease lives: %v", err)
		}
		end()
	}
}

// A node without a dead-man's service can't bring the volume up, and leaves the lease to others.
func TestLeaseNeedsDeadMan(t *testing.T) {
	s, f := withLease(t, nil)
	s.agent.options.DeadMan.Socket = filepath.Join(t.TempDir(), "socket")
	s.lease.fenced = s.agent.reachDeadMan
	err := s.lease.need(t.Context(), volume.UUID{7}, true, history(1, 10), true)
	if exit.Of(err) != exit.Refused || !errors.Is(err, deadman.ErrNoService) || f.taken != 0 || s.lease.held() != nil {
		t.Errorf("without a service: %v, taken %d times", err, f.taken)
	}
	l, err := net.Listen("unix", s.agent.options.DeadMan.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := s.lease.need(t.Context(), volume.UUID{7}, true, history(1, 10), true); err != nil || f.taken != 1 {
		t.Errorf("with one: %v, taken %d times", err, f.taken)
	}
}

// A lease that can't be asked for has its volumes wait, and says why; the agent runs.
func TestAgentWithoutAuthority(t *testing.T) {
	ca := filepath.Join(t.TempDir(), "ca.crt")
	s := aSwitching(t, nil)
	s.agent.options.Config.Lease = &config.Lease{Endpoints: []string{"https://127.0.0.1:1"}, CA: ca, TTL: 10 * time.Second}
	defer s.agent.openLeases()()
	if _, err := s.agent.leases.Look(t.Context(), "data"); err == nil || !strings.Contains(err.Error(), ca) {
		t.Errorf("without %s: %v", ca, err)
	}
}

// What has a lease does not come up without it, and says why.
func TestWaitsForItsLease(t *testing.T) {
	s, f, _ := primaryWithLease(t)
	s.config.Attach = true // needs no mapper
	uuid := volume.UUID{7}
	s.know(uuid)
	look := func() (string, *keeper) {
		t.Helper()
		s.lookAtLease(t.Context(), rolePrimary, uuid)
		return s.managed.why(), s.lease
	}
	f.err = errors.New("no route")
	if why, k := look(); k.held() != nil || k.mayWrite() == nil || !strings.Contains(why, "no route") || s.managed.at() != stageWaiting {
		t.Errorf("etcd is away: %s", why)
	}
	f.err, f.standing.Record = nil, &lease.Record{Node: "node-b"}
	if why, k := look(); k.held() != nil || !strings.Contains(why, "primary --force data") {
		t.Errorf("another went on: %s", why)
	}
	f.standing.Record = nil
	s.lease.declined = true
	if why, k := look(); k.held() != nil || !strings.Contains(why, "stand down") {
		t.Errorf("the operator had it stand down: %s", why)
	}
	s.lease.declined = false
	if _, k := look(); k.held() == nil || k.mayWrite() != nil || f.taken != 1 {
		t.Errorf("nobody has it: taken %d times", f.taken)
	}
	// It can't be brought up here, so another may have it; but not while it comes up after all.
	s.managed.set(stageRefused, "a broken disk", "")
	s.managed.op.Lock()
	_, k := look()
	s.managed.op.Unlock()
	if k.held() == nil {
		t.Error("it is given up while the volume comes up")
	}
	if _, k := look(); k.held() != nil {
		t.Error("it is kept by a node that can't bring the volume up")
	}
	f.standing.Holder = nil
	for range 3 { // the words don't tell themselves
		s.managed.set(stageStarting, s.managed.why(), "")
		if why, k := look(); k.held() != nil || k.status().Reason != "nobody has it; it is left to others: a broken disk" {
			t.Errorf("taken again at once: %s, %s", why, k.status().Reason)
		}
	}
}

// A stack that may be written is made to fail, whether or not a dead-man knows of its deadline, before
// its node follows another or forgets its lease; while it can't be it does neither.
func TestStackFailsFirst(t *testing.T) {
	s, f, _ := primaryWithLease(t)
	s.config.Attach = true // needs no mapper
	s.know(volume.UUID{7})
	hangs := errors.New("what is in flight has not ended")
	failed := 0
	s.lease.fail = func() error { failed++; return hangs }
	f.standing.Holder = &lease.Claim{Node: "node-b"}
	look := func() { s.lookAtLease(t.Context(), rolePrimary, volume.UUID{7}) }
	if look(); failed != 1 || s.roleOnDisk() != rolePrimary || !strings.Contains(s.lease.status().Reason, "may still be written") {
		t.Errorf("another node has the lease: failed %d times, %s", failed, s.lease.status().Reason)
	}
	hangs = nil
	if look(); failed != 2 || s.roleOnDisk() != roleSecondary {
		t.Errorf("it does not follow: failed %d times, %s", failed, s.lease.status().Reason)
	}

	// The deadline of its own lease has passed.
	failed, hangs = 0, errors.New("what is in flight has not ended")
	l := &scriptedLease{now: f.now, sent: f.now() - s.lease.ttl}
	l.say(errors.New("no route"))
	s.lease.have(l)
	n := s.lease.held()
	<-n.ending
	if look(); failed != 1 || s.lease.held() == nil || s.lease.unfenced == "" {
		t.Errorf("its deadline has passed: failed %d times, '%s'", failed, s.lease.unfenced)
	}
	hangs = nil
	if look(); failed != 2 || s.lease.held() != nil || s.lease.unfenced != "" {
		t.Errorf("it keeps its lease: failed %d times, '%s'", failed, s.lease.unfenced)
	}
}

// What is up and can't be managed may be written, and nothing replicates that: no copy stays on
// record. From before a volume comes up its own disk is.
func TestRecordOfUnmanaged(t *testing.T) {
	s, f, at := primaryWithLease(t)
	cut := func(r *lease.Record) bool {
		return r != nil && r.Node == "node-a" && r.Disk != nil && r.Disk.Epoch == at.Tip().Epoch && r.Disk.Generation == fmt.Sprintf("%x", at.Tip().Generation) && len(r.Copies) == 0
	}
	l := &scriptedLease{now: f.now, sent: f.now()}
	s.lease.have(l)
	if err := s.lease.ready(t.Context(), s.cutOnDisk); err != nil || !cut(l.last()) {
		t.Errorf("before it comes up %+v is on record: %v", l.last(), err)
	}
	if r := s.copies(); r != nil {
		t.Errorf("without a stack %+v is on record", r)
	}
	s.agent.dm, s.config.Attach, s.managed.stack = new(dm.Control), true, attached{} // it is left up
	for at, none := range map[stage]bool{stageRefused: true, stageBusy: true, stageUp: false, stageStarting: false} {
		s.managed.set(at, "", "")
		if r := s.copies(); none != (r != nil) || none && !cut(r) {
			t.Errorf("%s: %+v is on record", stageWords[at], r)
		}
	}
	s.config.Device += "-gone"
	s.managed.set(stageRefused, "", "")
	if r := s.copies(); r == nil || r.Node != "node-a" || r.Disk != nil || len(r.Copies) != 0 {
		t.Errorf("its disk can't be read: %+v", r)
	}
	if s.makeRoom(); s.lease.held() == nil {
		t.Error("the lease is given up of what may be written")
	}
	s.managed.stack = nil
	if s.makeRoom(); s.lease.held() != nil {
		t.Error("the lease is kept of what can't be brought up")
	}
}

// A disk that somebody else has for long is left to another node, which may bring the volume up.
func TestLeaseOfBusyVolume(t *testing.T) {
	s, f := withLease(t, nil)
	s.config.Attach = true // needs no mapper
	s.lease.have(&scriptedLease{now: f.now, sent: f.now()})
	for _, at := range []stage{stageBusy, stageUp, stageBusy} { // each time counts anew
		s.managed.set(at, "somebody has it", "")
		s.lookAtLease(t.Context(), rolePrimary, volume.UUID{7})
		if s.lease.held() == nil {
			t.Fatal("it is given up at once")
		}
		if busy := !s.lease.busy.IsZero(); busy != (at == stageBusy) {
			t.Fatalf("at %s it counts: %v", stageWords[at], busy)
		}
	}
	s.lease.busy = time.Now().Add(-s.lease.ttl)
	s.lookAtLease(t.Context(), rolePrimary, volume.UUID{7})
	if s.lease.held() != nil {
		t.Error("it is kept for ever")
	}
}

// A volume that the operator took down stays down when its lease ends, and is not taken for
// one that waits for it.
func TestDownStaysDownWithoutLease(t *testing.T) {
	s, f := withLease(t, nil)
	s.config.Attach = true // needs no mapper
	l := &scriptedLease{now: f.now, sent: f.now()}
	s.lease.have(l)
	s.managed.set(stageDown, "taken down", "")
	s.lease.held().end(errors.New("etcd is away"))
	s.lookAtLease(t.Context(), rolePrimary, volume.UUID{7})
	if at := s.managed.at(); s.lease.held() != nil || at != stageDown {
		t.Errorf("without its lease it is %s", stageWords[at])
	}
}

// The volume's id may become another while the agent runs: the watch follows it.
func TestWatchFollowsTheVolume(t *testing.T) {
	s, f := withLease(t, nil)
	s.config.Attach = true // needs no mapper
	f.err, f.watched = errors.New("no route"), make(chan string)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.watchLease(ctx)
	}()
	for _, uuid := range []volume.UUID{{7}, {8}} {
		s.know(uuid)
		select {
		case got := <-f.watched:
			if got != uuid.String() {
				t.Errorf("watched is %s, not %s", got, uuid)
			}
		case <-time.After(time.Minute):
			t.Fatalf("%s is not watched", uuid)
		}
	}
	stop()
	<-ended
}
