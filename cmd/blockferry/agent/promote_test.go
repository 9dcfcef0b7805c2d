package agent

import (
	"os"
	"path/filepath"
	"testing"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
)

// aSwitching is a volume of both roles whose disk is a file.
func aSwitching(t *testing.T, disk []byte, replicas ...*config.Replica) *switching {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, disk, 0o600); err != nil {
		t.Fatal(err)
	}
	m := aManaged(&config.Volume{Name: "data", Device: path, Replicas: replicas})
	s := &switching{agent: m.agent, config: m.config, log: m.log, managed: m, heard: map[string]heard{}, change: make(chan struct{}), role: rolePrimary}
	s.copy = &secondary{roles: s, config: m.config, replica: newLocalReplica(m.agent, m.config, &config.Replica{Name: "here", Device: path})}
	s.copy.replica.parked = true
	m.roles = s
	return s
}

// fakeStack is one that is up, as far as is asked here.
type fakeStack struct{ raised }

func (fakeStack) Size() int64          { return 4096 }
func (fakeStack) UUID() volume.UUID    { return volume.UUID{7} }
func (fakeStack) TrackingLost() string { return "" }

// 'primary --force' counts for one start: after that, other nodes are asked again.
func TestForceCountsOnce(t *testing.T) {
	s := aSwitching(t, nil)
	s.config.Attach = true // needs no mapper
	s.decide(true)
	if _, err := s.managed.down(t.Context(), true); err != nil || s.decided {
		t.Errorf("after a down: %v, %v", s.decided, err)
	}
	s.decide(true)
	s.managed.nowUp(fakeStack{}, nil)
	if s.decided {
		t.Error("after it came up")
	}
	s.decide(true)
	if _, err := s.primary(t.Context(), false); err != nil || s.decided {
		t.Errorf("after 'primary' of one that is up: %v, %v", s.decided, err)
	}
}
