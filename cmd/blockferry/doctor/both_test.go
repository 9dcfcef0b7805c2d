package doctor

import (
	"testing"

	"blockferry/cmd/blockferry/config"
)

// A disk that has either role is in its place with a label, and, until it has its
// volume, as a replica of none; with another volume's label it is not.
func TestDiskOfEitherRole(t *testing.T) {
	v := &config.Volume{Name: "data", Device: "/dev/a", Copy: &config.Replica{Name: "data", Device: "/dev/a"}, BeginsSecondary: true,
		Replicas: []*config.Replica{{Name: "other", Address: "10.0.0.1:7070", Peer: "node-a"}}}
	for _, c := range []struct {
		name  string
		parts []Part
		wrong bool
	}{
		{"waits for its volume", []Part{{Role: roleReplica}}, false},
		{"a label and a replica", []Part{{Role: "volume", Volume: "A"}, {Role: roleReplica, Volume: "A"}}, false},
		{"an area of a volume", []Part{{Role: "cow", Volume: "A"}}, true},
	} {
		all := inspected{"/dev/a": {Disk: Disk{Path: "/dev/a", Ours: true, Parts: c.parts}}}
		if got := all.misplaced(v, v.DiskUses()[0]); (got != "") != c.wrong {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}
