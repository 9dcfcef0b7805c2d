package main

import (
	"strings"
	"testing"

	"blockferry/cmd/blockferry/status"
)

// What is lost if the disk goes now is said per replica, and never as less
// than it may be.
func TestDrainSaysWhatIsLost(t *testing.T) {
	seconds, bytes := 12.5, uint64(3<<30)
	at := func(generation string, epoch uint64) *status.Position {
		return &status.Position{Generation: generation, Epoch: epoch}
	}
	before := at("aa", 7)
	for _, c := range []struct {
		replica status.Replica
		want    string
		lost    bool
	}{
		{status.Replica{Disk: "Consistent", Position: at("aa", 8), BehindSeconds: &seconds, BehindBytes: &bytes}, "holds epoch 8, cut since", false},
		{status.Replica{Disk: "Consistent", Position: at("aa", 7), BehindSeconds: &seconds, BehindBytes: &bytes, Reason: "slow"}, "the last 12s and 3GiB of writes are lost (slow)", true},
		{status.Replica{Disk: "Consistent", Position: at("bb", 9), BehindSeconds: &seconds, BehindBytes: &bytes, BehindIsMinimum: true}, "the last at least 12s and 3GiB of writes are lost", true},
		{status.Replica{Disk: "Consistent", Position: at("aa", 5)}, "all writes since epoch 5 are lost; how much that is is not known", true},
		{status.Replica{Disk: "DUnknown"}, "all writes since its last cut are lost", true},
		{status.Replica{Disk: "Inconsistent", BehindSeconds: &seconds, BehindBytes: &bytes}, "nothing can be restored from it", true},
	} {
		c.replica.Name = "ebs"
		var d drained
		d.lost(status.Volume{Name: "data", Replicas: []status.Replica{c.replica}}, before)
		if len(d.lines) != 1 || !strings.HasPrefix(d.lines[0].text, "data: replica 'ebs' ") || !strings.Contains(d.lines[0].text, c.want) ||
			d.lines[0].document["drained"] != !c.lost {
			t.Errorf("%+v: %+v, want '%s'", c.replica, d.lines, c.want)
		}
	}
}
