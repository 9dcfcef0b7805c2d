package agent

import (
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"blockferry/cmd/blockferry/config"
	"blockferry/protocol"
)

// A missing spill file is not taken for a missing disk.
func TestAdviseMissingSpill(t *testing.T) {
	l := &localReplica{volume: &config.Volume{Name: "data"}, config: &config.Replica{Name: "ebs", Device: "/dev/ebs"}}
	advice := l.advise(fmt.Errorf("%w /srv/spill: %w", protocol.ErrSpill, fs.ErrNotExist))
	if !strings.Contains(advice, "bring its spill file back") {
		t.Errorf("advice: %s", advice)
	}
}

// A spill file is spoken of while it is in use and when it can't be used,
// with what to do, and not otherwise.
func TestSpillWords(t *testing.T) {
	l := &localReplica{config: &config.Replica{Name: "ebs", Spill: "/srv/spill"}}
	if words, _ := l.spillWords(protocol.ReplicaStatus{}); words != "" {
		t.Errorf("at rest: %q", words)
	}
	words, _ := l.spillWords(protocol.ReplicaStatus{SpilledBytes: 3 << 30})
	if !strings.Contains(words, "larger than the journal") || !strings.Contains(words, "3GiB") || !strings.Contains(words, "/srv/spill") {
		t.Errorf("in use: %q", words)
	}
	words, advice := l.spillWords(protocol.ReplicaStatus{SpillProblem: "no space"})
	if words != "no space" || !strings.Contains(advice, "'spill'") {
		t.Errorf("not usable: %q, %q", words, advice)
	}
	l.noSpill = "on tmpfs"
	if words, _ = l.spillWords(protocol.ReplicaStatus{SpilledBytes: 1}); words != "on tmpfs" {
		t.Errorf("in a bad place: %q", words)
	}
}
