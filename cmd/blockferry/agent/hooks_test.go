package agent

import (
	"testing"

	"blockferry/protocol"
)

// A replica is told of when it becomes late and when it is not any more, not in
// between, and not of each lag about the limit.
func TestLagWatch(t *testing.T) {
	l := lagWatch{after: 10, late: map[string]bool{}}
	for i, step := range []struct {
		near, far float64
		told      string
	}{
		{0, 0, ""}, {1, 9.9, ""}, {1, 10, "far"}, {1, 500, ""}, {1, 9, ""}, {1, 11, ""}, {1, 5, ""}, {1, 4.9, "far"}, {1, 9, ""}, {10, 10, "near far"}, {0, 0, "near far"},
	} {
		told := ""
		for _, r := range l.changed([]protocol.ReplicaReport{{Name: "near", LagSeconds: step.near}, {Name: "far", LagSeconds: step.far}}) {
			if told != "" {
				told += " "
			}
			told += r.Name
		}
		if told != step.told {
			t.Errorf("step %d: told of '%s', want '%s'", i, told, step.told)
		}
	}
}
