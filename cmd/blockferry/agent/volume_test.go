package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blockferry/cmd/blockferry/config"
	"blockferry/protocol"
)

func aManaged(v *config.Volume) *managed {
	if v.Hooks == nil {
		v.Hooks = &config.Hooks{}
	}
	return newManaged(&Agent{log: quiet(), hub: newHub(), options: Options{Config: &config.Config{}}}, v)
}

// A disk that comes late is waited for, whichever of the volume's it is: a
// volume that is refused ends the wait of its unit at boot.
func TestEachMissingDiskIsWaitedFor(t *testing.T) {
	dir := t.TempDir()
	there, missing := filepath.Join(dir, "there"), filepath.Join(dir, "missing")
	if err := os.WriteFile(there, make([]byte, 4<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, v := range []config.Volume{
		{Name: "data", Device: missing},
		{Name: "data", Device: there, CowDevice: missing},
		{Name: "data", Device: there, MetadataDevice: missing},
	} {
		m := aManaged(&v)
		if err := m.inspect(); err == nil || m.at() != stageAbsent || !strings.Contains(m.why(), missing) {
			t.Errorf("%+v: %v; %s: %s", v, err, stageWords[m.at()], m.why())
		}
	}
}

// What kept a replica's disk from being served is no advice any more once the
// replica has taken an epoch since.
func TestAdviceEndsWithItsFault(t *testing.T) {
	m := aManaged(&config.Volume{Name: "data", Device: "/dev/a", Replicas: []*config.Replica{{Name: "ebs", Device: "/dev/b"}}})
	l := m.replicas[0]
	l.closed(fmt.Errorf("/dev/b: %w", fs.ErrNotExist))
	if advice := l.adviseOpen("/dev/a", false); !strings.Contains(advice, "attach the disk") {
		t.Errorf("after a fault: %s", advice)
	}
	m.events().Committed("ebs", protocol.EpochStats{})
	if advice := l.adviseOpen("/dev/a", false); strings.Contains(advice, "attach") || !strings.Contains(advice, "/dev/b") {
		t.Errorf("after an epoch: %s", advice)
	}
}

// Era metadata that is damaged while the volume is up is no fault of a disk's:
// status says one thing to do.
func TestOneAdviceForLostTracking(t *testing.T) {
	m := aManaged(&config.Volume{Name: "data", Device: "/dev/a", Replicas: []*config.Replica{{Name: "ebs", Device: "/dev/b"}}})
	m.replicas[0] = replicaAt(t, "ebs", protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}})
	for cause, want := range map[error]string{
		fmt.Errorf("%w, so everything is compared: checksum", protocol.ErrTrackingGone): "if it stays so: blockferry down data, then blockferry up data, begins tracking anew",
		errors.New("read of 4096 bytes at 0: tracking is lost"):                         "if this goes on, see what the kernel's log says of /dev/a and /dev/ebs; writes go on and are marked",
	} {
		s := m.replicaStatus(m.replicas[0], protocol.PrimaryStatus{Replicas: []protocol.ReplicaReport{{Name: "ebs", Connection: "Connected", Reason: cause.Error(), Cause: cause}}})
		if s.Reason != cause.Error() || s.Advice != want {
			t.Errorf("%s: %s", s.Reason, s.Advice)
		}
	}
}

// A disk that a replica here left behind is refused. With both roles, one that took over
// at another node is not, though the replica went further on the line before.
func TestFailbackWithLocalReplica(t *testing.T) {
	for _, c := range []struct {
		disk, replica protocol.Lineage
		both, refused bool
	}{
		{history(1, 10, 2, 30, 3, 31), history(1, 15), true, false},
		{history(1, 10, 2, 30, 3, 31), history(1, 15), false, true},
		{history(1, 10), history(1, 15), true, true},
		{history(1, 20), history(1, 15, 2, 16), true, true},
		{history(1, 20), history(1, 15), true, false},
	} {
		m := aManaged(&config.Volume{Name: "data", Device: "/dev/a", Replicas: []*config.Replica{{Name: "ebs", Device: "/dev/b"}}})
		m.replicas[0] = replicaAt(t, "ebs", c.replica)
		if c.both {
			m.roles = &switching{}
		}
		st, _, _, _ := m.replicas[0].status()
		if err := m.overtaken(st.VolumeUUID, c.disk); (err != nil) != c.refused {
			t.Errorf("[%v], [%v], both roles %v: %v", c.disk, c.replica, c.both, err)
		}
	}
}
