package agent

import (
	"fmt"
	"os"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/spill"
	"blockferry/protocol"
)

// openOptions opens a replica with its configured spill file. A file in a bad
// place is only read, if what is committed lies there already, and why nothing more is
// put there is kept for the status.
func (l *localReplica) openOptions(disk *blockdev.File) (protocol.OpenOptions, error) {
	o := protocol.OpenOptions{RescueDir: l.agent.options.Config.RescueDir}
	// Should it not be there, nothing is given up, and it is said then.
	if err := os.MkdirAll(o.RescueDir, 0o700); err != nil {
		l.log.Warn("no folder for rescue files", "error", err)
	}
	l.mu.Lock()
	l.noSpill = ""
	l.mu.Unlock()
	if l.config.Spill == "" {
		return o, nil
	}
	s, err := protocol.PeekReplica(disk)
	if err != nil {
		return o, fmt.Errorf("open replica: %w", err)
	}
	if s.VolumeUUID == protocol.AnyVolume {
		return o, nil // nothing is written to it
	}
	limit := l.config.SpillLimitBytes
	if limit == 0 {
		limit = s.SizeBytes
	}
	o.Spill = &spill.File{Path: l.config.Spill, LimitBytes: limit}
	device, err := pathOf(l.volume.Device)
	if err == nil {
		err = blockdev.Survives(l.config.Spill, device)
	}
	if err != nil {
		l.mu.Lock()
		l.noSpill = fmt.Sprintf("its spill file is not used: %v", err)
		l.mu.Unlock()
		l.log.Warn("spill file not used", "error", err)
		return o, nil
	}
	o.SpillLimitBytes = limit
	return o, nil
}

// spillWords says what there is to say of a replica's spill file: how much it
// holds, or why it can't be used, and what to do then.
func (l *localReplica) spillWords(s protocol.ReplicaStatus) (words, advice string) {
	l.mu.Lock()
	problem := l.noSpill
	l.mu.Unlock()
	if problem == "" {
		problem = s.SpillProblem
	}
	switch {
	case problem != "":
		return problem, "epochs that fit into its journal go on; name another place for it with 'spill'"
	case s.SpilledBytes > 0:
		return fmt.Sprintf("an epoch is larger than the journal: %s of it are in %s, until it is applied",
			config.FormatSize(s.SpilledBytes), l.config.Spill), ""
	}
	return "", ""
}
