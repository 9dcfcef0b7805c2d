package agent

import (
	"errors"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/cmd/blockferry/transport"
	"blockferry/proto"
	"blockferry/protocol"
)

// What a node that is known to be fenced had is given up, and nothing else: that node and every
// other one counts as ever.
func TestTakeOverBesideAFencedNode(t *testing.T) {
	disk, at, _ := eitherRole(t)
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	up := &proto.Standing{Primary: true, Serving: true, Lineage: at.Proto()}
	level := &proto.Standing{Lineage: at.Proto()}
	ahead := &proto.Standing{Lineage: history(1, 6).Proto()}
	behind := &proto.Standing{Lineage: history(1, 4).Proto()}
	for name, c := range map[string]struct {
		says   []*proto.Standing // of node-b; nil: it is silent
		third  bool              // there is a node-c, which is silent
		fenced []string
		want   string // "": it takes over
	}{
		"it is silent":                          {fenced: []string{"node-b"}},
		"it is silent, and nobody fenced it":    {want: "what is lost is not known"},
		"it serves":                             {says: []*proto.Standing{up, up}, fenced: []string{"node-b"}, want: "--fenced said that node 'node-b' writes"},
		"another one serves":                    {says: []*proto.Standing{up, up}, third: true, fenced: []string{"node-c"}, want: "another primary is alive"},
		"another one holds more":                {says: []*proto.Standing{ahead}, third: true, fenced: []string{"node-c"}, want: "writes may be lost"},
		"another one is level":                  {says: []*proto.Standing{level}, third: true, fenced: []string{"node-c"}},
		"another one is behind":                 {says: []*proto.Standing{behind}, third: true, fenced: []string{"node-c"}},
		"another one is silent":                 {third: true, fenced: []string{"node-b"}, want: "writes may be lost"},
		"one is no peer":                        {fenced: []string{"node-b", "node-x"}, want: "node 'node-x' is not among its 'peers'"},
		"both are silent, and both were fenced": {third: true, fenced: []string{"node-c", "node-b"}},
		"it answers, as a copy":                 {says: []*proto.Standing{level}, fenced: []string{"node-b"}},
	} {
		asked := new(atomic.Int32)
		if c.says != nil {
			asked.Store(1) // it answers at once
		}
		s, stop := besideNode(t, raw, &scriptedNode{asked: asked, says: c.says}, hooks.AfterDemote)
		if c.third {
			s.config.Peers = append(s.config.Peers, "node-c")
			s.config.Replicas = append(s.config.Replicas, &config.Replica{Name: "third", Peer: "node-c", Address: "unix:" + filepath.Join(t.TempDir(), "nobody")})
		}
		ctx, end := serveCopy(t, s)
		_, err := s.primaryWithout(ctx, false, c.fenced)
		if r := s.roleOnDisk(); c.want == "" && r != rolePrimary || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || r != roleSecondary) {
			t.Errorf("%s: %v", name, err)
		}
		if wrong := strings.Contains(c.want, "'peers'"); c.want != "" && (exit.Of(err) == exit.Usage) != wrong {
			t.Errorf("%s: ends with %d", name, exit.Of(err))
		}
		end()
		stop()
	}
}

// A fence that was made known beforehand is not made again.
func TestFencedNodeIsNotFencedAgain(t *testing.T) {
	disk, _, _ := eitherRole(t)
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	s, stop := besideNode(t, raw, &scriptedNode{asked: new(atomic.Int32)}, hooks.AfterDemote)
	defer stop()
	s.managed.hooks = hooks.New("node-a", "data", map[hooks.Event][]string{hooks.FencePeer: {"/bin/false"}}, time.Minute, quiet())
	ctx, end := serveCopy(t, s)
	defer end()
	if _, err := s.primaryWithout(ctx, true, nil); err == nil || s.roleOnDisk() != roleSecondary {
		t.Errorf("it was not fenced: %v", err)
	}
	if _, err := s.primaryWithout(ctx, false, []string{"node-b"}); s.roleOnDisk() != rolePrimary {
		t.Errorf("it was fenced: %v", err)
	}
}

// A copy's status says whether it may take over, and how far it is known to be behind.
func TestTakeOverStatus(t *testing.T) {
	cuts := func(n uint64) *uint64 { return &n }
	for name, c := range map[string]struct {
		b, c    *heard
		before  bool // what was heard is from before the agent's start
		ago     time.Duration
		missing *uint64
	}{
		"nobody was heard":                     {},
		"the primary is at the next epoch":     {b: &heard{primary: true, lineage: history(1, 6)}, missing: cuts(0)},
		"the primary has two more cuts":        {b: &heard{primary: true, lineage: history(1, 8)}, missing: cuts(2)},
		"the primary was lost":                 {b: &heard{primary: true, lineage: history(1, 8)}, ago: time.Hour, missing: cuts(2)},
		"the others are copies, and level":     {b: &heard{lineage: history(1, 5)}, c: &heard{lineage: history(1, 4)}, missing: cuts(0)},
		"another copy has one more":            {b: &heard{lineage: history(1, 6)}, c: &heard{lineage: history(1, 5)}, missing: cuts(1)},
		"one copy is level, one not heard":     {b: &heard{lineage: history(1, 5)}},
		"a copy was heard, but long ago":       {b: &heard{lineage: history(1, 5)}, c: &heard{lineage: history(1, 5)}, ago: time.Hour},
		"copies were heard, before the start":  {b: &heard{lineage: history(1, 5)}, c: &heard{lineage: history(1, 5)}, before: true},
		"the primary went on from an older":    {b: &heard{primary: true, lineage: history(1, 3, 2, 9)}, missing: cuts(5)},
		"the primary follows from what it has": {b: &heard{primary: true, lineage: history(1, 5, 2, 6)}, missing: cuts(0)},
	} {
		s := secondaryAt(t, protocol.FormatOptions{Holds: &protocol.Holding{Lineage: history(1, 5)}})
		s.config.Peers = []string{"node-b", "node-c"}
		for node, h := range map[string]*heard{"node-b": c.b, "node-c": c.c} {
			if h != nil {
				h.at, h.before = time.Now().Add(-c.ago), c.before
				s.heard[node] = *h
			}
		}
		got := s.takeOverStatus()
		if got == nil || !got.Possible || (got.MissingCuts == nil) != (c.missing == nil) || c.missing != nil && *got.MissingCuts != *c.missing {
			t.Errorf("%s: %+v", name, got)
			if got != nil && got.MissingCuts != nil {
				t.Errorf("%s: %d cuts are missing", name, *got.MissingCuts)
			}
		}
	}
	for name, o := range map[string]protocol.FormatOptions{
		"it was never synced": {},
		"it strayed":          {Holds: &protocol.Holding{Lineage: history(1, 5), Strayed: "written"}},
	} {
		if got := secondaryAt(t, o).takeOverStatus(); got == nil || got.Possible || got.Reason == "" || got.MissingCuts != nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
	var one *switching
	if got := one.takeOverStatus(); got != nil {
		t.Errorf("a replica that has one role: %+v", got)
	}
}

// secondaryAt is a volume that is secondary here, with a copy in memory.
func secondaryAt(t *testing.T, o protocol.FormatOptions) *switching {
	t.Helper()
	s := aSwitching(t, nil)
	s.role, s.agent.identity, s.agent.options.Config.Node = roleSecondary, transport.NewIdentity("node-a", "", quiet()), &config.Node{Name: "node-a"}
	s.agent.peers = newPeers(s.agent)
	s.copy.peers = s.agent.peers
	o.VolumeUUID, o.SizeBytes, o.JournalBytes, o.DataOffset = [16]byte{1}, 1<<20, protocol.MinJournalBytes, 1<<20
	s.copy.replica = replicaFrom(t, "here", o, nil)
	return s
}

// A primary's disk that a node left behind stays down when that node does not answer any more, unless
// the operator forces it. One that nobody left behind waits for nodes that are silent, unless the
// operator decides, or a lease tells that none of them is primary.
func TestOvertakenStaysDown(t *testing.T) {
	disk := history(1, 10)
	for name, c := range map[string]struct {
		says  *proto.Standing
		stays bool
	}{
		"it took over":                        {&proto.Standing{Primary: true, Serving: true, Lineage: history(1, 10, 2, 12).Proto()}, true},
		"neither remembers where they parted": {&proto.Standing{Primary: true, Lineage: history(3, 13).Proto()}, true},
		"it serves":                           {&proto.Standing{Primary: true, Serving: true, Lineage: history(1, 10).Proto()}, false},
	} {
		asked := new(atomic.Int32)
		asked.Store(1) // it answers at once
		s, stop := besideNode(t, nil, &scriptedNode{asked: asked, says: []*proto.Standing{c.says}}, hooks.AfterDemote)
		s.role, s.agent.identity, s.agent.options.Config.Node = rolePrimary, transport.NewIdentity("node-a", "", quiet()), &config.Node{Name: "node-a"}
		s.agent.peers = newPeers(s.agent)
		close(s.agent.peers.listening)
		if err := s.superseded(volume.UUID{7}, disk); err == nil {
			t.Errorf("%s, and answers: it comes up", name)
		}
		stop()
		var silent *silentError
		if err := s.superseded(volume.UUID{7}, history(1, 10, 3, 20)); !errors.As(err, &silent) || !strings.Contains(err.Error(), "node 'node-b' does not say") {
			t.Errorf("%s, and does not answer, and the disk has another history: %v", name, err)
		}
		s.decide(toBePrimary)
		err := s.superseded(volume.UUID{7}, disk)
		if c.stays != (err != nil) || c.stays && !strings.Contains(err.Error(), "as it said before") {
			t.Errorf("%s, and does not answer: %v", name, err)
		}
		s.decide(forced)
		if err := s.superseded(volume.UUID{7}, disk); err != nil {
			t.Errorf("%s, and the operator decided: %v", name, err)
		}
		s.decide(undecided)
		s.lease = &keeper{}
		if err := s.superseded(volume.UUID{7}, history(1, 10, 3, 20)); err != nil {
			t.Errorf("%s, the disk has another history, and a lease: %v", name, err)
		}
	}
}
