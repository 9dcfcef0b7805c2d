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
		least     bool // of the far one, no more is known
		told      string
	}{
		{0, 0, false, ""}, {1, 9.9, false, ""}, {1, 10, false, "far"}, {1, 500, false, ""}, {1, 9, false, ""}, {1, 11, false, ""}, {1, 5, false, ""}, {1, 4.9, false, "far"},
		{1, 9, false, ""}, {10, 10, false, "near far"}, {0, 0, false, "near far"},
		{1, 9, true, ""}, {1, 10, true, "far"}, {1, 1, true, ""}, {1, 4, true, ""}, {1, 4, false, "far"},
	} {
		told := ""
		for _, r := range l.changed([]protocol.ReplicaReport{{Name: "near", LagSeconds: step.near}, {Name: "far", LagSeconds: step.far, LagIsMinimum: step.least}}) {
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
