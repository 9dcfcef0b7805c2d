package agent

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"blockferry/cmd/blockferry/config"
	"blockferry/proto"
	"blockferry/protocol"
)

// What a refusal asks for is said as a command, for the disk that it is about.
func TestAdviceNamesCommands(t *testing.T) {
	m := aManaged(&config.Volume{Name: "data", Device: "/dev/a", Replicas: []*config.Replica{
		{Name: "ebs", Device: "/dev/b"}, {Name: "zone-b", Address: "10.0.0.2:7070", Peer: "node-b"}}})
	l := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}}
	m.replicas[0] = replicaAt(t, "ebs", l)
	m.replicas[0].config = m.config.Replicas[0]
	plan := func(in protocol.PlanInput) error {
		in.Primary = l
		return protocol.MakePlan(in).Err()
	}
	other := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 4}, {Generation: protocol.Generation{2}, Epoch: 9}}
	const nearFormat, farFormat = "with the agent stopped: blockferry create --replica ebs data --discard-my-data", "at node 'node-b' with its agent stopped: blockferry create --discard-my-data data"
	const again = "see what the kernel's log says of /dev/a and /dev/b"
	for name, c := range map[string]struct {
		cause     error
		near, far string
	}{
		"ahead":                    {plan(protocol.PlanInput{Replica: protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 9}}, Disk: protocol.DiskConsistent}), nearFormat, farFormat},
		"unrelated":                {plan(protocol.PlanInput{Replica: protocol.Lineage{{Generation: protocol.Generation{3}, Epoch: 9}}, Disk: protocol.DiskConsistent}), nearFormat, farFormat},
		"blank with a history":     {plan(protocol.PlanInput{Replica: other, Disk: protocol.DiskBlank}), nearFormat, farFormat},
		"given up, and not whole":  {plan(protocol.PlanInput{Replica: other, Disk: protocol.DiskInconsistent, Discard: other.Tip()}), nearFormat, farFormat},
		"split brain":              {plan(protocol.PlanInput{Replica: other, Disk: protocol.DiskConsistent}), "blockferry discard --replica ebs data", "at node 'node-b': blockferry discard data"},
		"two primaries":            {&protocol.TwoPrimariesError{Mine: l, Theirs: other}, "blockferry secondary --force data, then blockferry discard data", "blockferry secondary --force data, then blockferry discard data"},
		"words of another":         {errors.New("split brain: format it; its certificate can't be reached"), again, "agent's log at node 'node-b'"},
		"it may not write":         {fmt.Errorf("replica: %w", &protocol.RefusedError{Reason: proto.Reason_REASON_WRONG_VOLUME, Message: "no"}), again, "name this node there in 'peers'"},
		"it catches up after that": {nil, again, "agent's log at node 'node-b'"},
	} {
		reason := "it catches up; before that: split brain"
		if c.cause != nil {
			reason = c.cause.Error()
		}
		report := []protocol.ReplicaReport{{Name: "ebs", Reason: reason, Cause: c.cause, Connection: "Connected"}, {Name: "zone-b", Reason: reason, Cause: c.cause}}
		if s := m.replicaStatus(m.replicas[0], protocol.PrimaryStatus{Replicas: report}); !strings.Contains(s.Advice, c.near) || s.Reason != reason {
			t.Errorf("%s: %s\n%s, want %s", name, s.Reason, s.Advice, c.near)
		}
		if s := m.remoteStatus(m.config.Replicas[1], protocol.PrimaryStatus{Replicas: report}); !strings.Contains(s.Advice, c.far) {
			t.Errorf("%s: %s\n%s, want %s", name, s.Reason, s.Advice, c.far)
		}
	}
	if got := m.replicas[0].advise(fmt.Errorf("/dev/b: %w", protocol.ErrTookOver)); !strings.Contains(got, "blockferry primary data") || !strings.Contains(got, "blockferry secondary data") {
		t.Error(got)
	}
}

// The event of split brain is of what a replica's session ends with, not of words in a
// reason: one that catches up after it is none.
func TestSplitBrainIsToldByItsCause(t *testing.T) {
	m := aManaged(&config.Volume{Name: "data", Device: "/dev/a", Replicas: []*config.Replica{{Name: "ebs", Device: "/dev/b"}}})
	events, end := m.agent.hub.listen()
	defer end()
	e := m.withHooks(m.events())
	two := &protocol.TwoPrimariesError{}
	told := func(reason string, cause error) (split bool) {
		e.Behind("ebs", reason, cause)
		for len(events) > 0 {
			split = (<-events).Kind == "split-brain" || split
		}
		return split
	}
	if !told(two.Reason(), two) || !m.split["ebs"] {
		t.Error("it is not told")
	}
	m.split["ebs"] = false
	if told("it catches up; before that: "+two.Reason(), nil) || m.split["ebs"] {
		t.Error("what is over is told")
	}
}
