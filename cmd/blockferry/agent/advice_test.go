package agent

import (
	"fmt"
	"strings"
	"testing"

	"blockferry/cmd/blockferry/config"
	"blockferry/protocol"
)

// What a refusal asks for is said as a command, for the disk that it is about.
func TestAdviceNamesCommands(t *testing.T) {
	m := aManaged(&config.Volume{Name: "data", Device: "/dev/a", Replicas: []*config.Replica{
		{Name: "ebs", Device: "/dev/b"}, {Name: "zone-b", Address: "10.0.0.2:7070", Peer: "node-b"}}})
	l := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}}
	m.replicas[0] = replicaAt(t, "ebs", l)
	m.replicas[0].config = m.config.Replicas[0]
	refused := func(replica protocol.Lineage, disk protocol.DiskState) string {
		err := protocol.MakePlan(protocol.PlanInput{Primary: l, Replica: replica, Disk: disk}).Err()
		return err.(*protocol.PlanRefusedError).Reason()
	}
	other := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 4}, {Generation: protocol.Generation{2}, Epoch: 9}}
	two := (&protocol.TwoPrimariesError{Mine: l, Theirs: other}).Reason()
	for _, c := range []struct{ reason, near, far string }{
		{refused(protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 9}}, protocol.DiskConsistent),
			"with the agent stopped: blockferry create --replica ebs data --discard-my-data", "at node 'node-b' with its agent stopped: blockferry create --discard-my-data data"},
		{refused(protocol.Lineage{{Generation: protocol.Generation{3}, Epoch: 9}}, protocol.DiskConsistent), "create --replica ebs data --discard-my-data", "create --discard-my-data data"},
		{refused(other, protocol.DiskConsistent), "blockferry discard --replica ebs data", "at node 'node-b': blockferry discard data"},
		{two, "blockferry secondary --force data, then blockferry discard data", "blockferry secondary --force data, then blockferry discard data"},
	} {
		report := []protocol.ReplicaReport{{Name: "ebs", Reason: c.reason}, {Name: "zone-b", Reason: c.reason}}
		if s := m.replicaStatus(m.replicas[0], protocol.PrimaryStatus{Replicas: report}); !strings.Contains(s.Advice, c.near) || s.Reason != c.reason {
			t.Errorf("%s\n%s, want %s", s.Reason, s.Advice, c.near)
		}
		if s := m.remoteStatus(m.config.Replicas[1], protocol.PrimaryStatus{Replicas: report}); !strings.Contains(s.Advice, c.far) {
			t.Errorf("%s\n%s, want %s", s.Reason, s.Advice, c.far)
		}
	}
	if got := m.replicas[0].advise(fmt.Errorf("/dev/b: %w", protocol.ErrTookOver)); !strings.Contains(got, "blockferry primary data") || !strings.Contains(got, "blockferry secondary data") {
		t.Error(got)
	}
}
