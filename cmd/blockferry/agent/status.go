package agent

import (
	"errors"
	"fmt"
	"strings"

	"blockferry/cmd/blockferry/status"
	"blockferry/proto"
	"blockferry/protocol"
)

// status is the volume as it stands. It never waits for a device.
func (m *managed) status() status.Volume {
	m.mu.Lock()
	s := status.Volume{
		Name: m.config.Name, Device: m.config.Device, Role: "Unknown", Disk: "DUnknown",
		IntervalSeconds: m.config.Interval.Seconds(), Paused: m.paused, Reason: m.reason, Advice: m.advice, Replicas: []status.Replica{},
		Stage: stageWords[m.stage], Restore: "manual", BothRoles: m.config.Switches(),
	}
	if m.restoresItself() {
		s.Restore = "auto"
	}
	st, stack, r, restoring := m.stage, m.stack, m.running, m.progress
	lost, lostAdvice := m.lostWords, m.lostAdvice
	if m.size > 0 {
		s.SizeBytes, s.UUID = m.size, m.uuid.String()
	}
	m.mu.Unlock()
	switch st {
	case stageAbsent, stageBlank, stageRestoring:
		s.Disk = "Diskless"
	case stageDown:
		s.Role, s.Disk = "Secondary", "Consistent"
	case stageWaiting:
		s.Role = "Secondary"
	}
	var primary protocol.PrimaryStatus
	if stack != nil && r != nil {
		primary = r.primary.Status()
		s.Role, s.Disk, s.Up, s.Path = "Primary", "UpToDate", true, stack.Path()
		s.WrittenBytes = &primary.WrittenBytes
		if primary.Epoch > 0 {
			s.Position = position(primary.Generation, primary.Epoch)
		}
		s.LastCut = r.source.lastCutStatus()
		s.Reason, s.Advice = m.otherWords()
		if primary.Problem != "" {
			s.Reason, s.Advice = primary.Problem, "see the agent's log; writes go on and are marked"
		}
		if s.Reason == "" {
			s.Reason, s.Advice = m.agent.disks.resizedWords(m.config.Device, m.config.Name)
		}
		if lost != "" {
			s.Disk, s.Reason, s.Advice = "Diskless", lost, lostAdvice
		}
	}
	if restoring != nil {
		done, total := restoring.done.Load(), restoring.total.Load()
		s.RestoreDoneBytes, s.RestoreTotalBytes = &done, &total
		s.Reason = fmt.Sprintf("being restored from replica '%s': %d%%", restoring.replica, percent(done, total))
	}
	s.Lease = m.roles.keeps().status()
	local := 0
	for _, r := range m.config.Replicas {
		if r.Address != "" {
			s.Replicas = append(s.Replicas, m.remoteStatus(r, primary))
			continue
		}
		s.Replicas = append(s.Replicas, m.replicaStatus(m.replicas[local], primary))
		local++
	}
	return s
}

func percent(done, total uint64) uint64 {
	if total == 0 {
		return 0
	}
	return min(100, done*100/total)
}

func position(generation string, epoch uint64) *status.Position {
	return &status.Position{Generation: generation, Epoch: epoch}
}

// replicaStatus joins what the primary knows of a replica with what its own
// disk says.
func (m *managed) replicaStatus(l *localReplica, primary protocol.PrimaryStatus) status.Replica {
	s := status.Replica{Name: l.config.Name, Device: l.config.Device, Connection: "StandAlone", Replication: "Off", Disk: "DUnknown"}
	own, open, reason, advice := l.status()
	s.Reason, s.Advice = reason, advice
	if open {
		s.Disk = diskWord(own.State)
		s.Reason = own.Reason
		if !own.Committed.IsZero() {
			s.Position = position(fmt.Sprintf("%x", own.Committed.Generation), own.Committed.Epoch)
		}
		if own.Err != nil {
			s.Reason, s.Advice = own.Err.Error(), l.advise(own.Err)
		}
	}
	for i := range primary.Replicas {
		r := &primary.Replicas[i]
		if r.Name != l.config.Name {
			continue
		}
		m.transfer(&s, r)
		if open && r.Disk != "DUnknown" {
			s.Disk = r.Disk
		}
		if open && r.Reason != "" {
			s.Reason = r.Reason
			var refused *protocol.RefusedError
			noRoom := errors.As(r.Cause, &refused) && refused.Reason == proto.Reason_REASON_JOURNAL_FULL // the reason says what to do
			if advice := m.adviseCause(l.config, r.Cause, "with the agent stopped: "+l.formatCommand()+" --discard-my-data"); advice != "" {
				s.Advice = advice
			} else if s.Advice == "" && !noRoom {
				s.Advice = l.adviseOpen(m.config.Device, r.Connection == "Connected")
			}
		}
	}
	if open {
		if words, todo := l.spillWords(own); words != "" && s.Reason == "" {
			s.Reason, s.Advice = words, todo
		} else if words != "" {
			s.Reason += "; " + words
		}
		if s.Reason == "" {
			s.Reason, s.Advice = m.agent.disks.resizedWords(l.config.Device, m.config.Name)
		}
		s.Reason = withHeld(s.Reason, own)
		if own.SpilledBytes > 0 {
			n := uint64(own.SpilledBytes)
			s.SpilledBytes = &n
		}
	}
	return s
}

// transfer is what the primary knows of a replica, wherever it is.
func (m *managed) transfer(s *status.Replica, r *protocol.ReplicaReport) {
	s.Connection, s.Replication = r.Connection, r.Replication
	if r.Replication == "Paused" {
		s.Replication = "PausedSyncS"
		s.Advice = "blockferry resume " + m.config.Name
	}
	if r.Epoch > 0 {
		s.BehindSeconds, s.BehindBytes, s.BehindIsMinimum = &r.LagSeconds, &r.LagBytes, r.LagIsMinimum
	}
	s.JournalFreeBytes = r.JournalFree
	if s.Limited = r.Limited; r.Limited && s.Advice == "" {
		s.Advice = "if it has to be quicker: raise 'rate' of replica '" + r.Name + "' in the configuration and restart the agent; writes go on and are marked"
	}
	if r.LimitBytes > 0 {
		limit := uint64(r.LimitBytes)
		s.LimitBytes = &limit
	}
	if r.Sync != nil {
		done, total := uint64(max(0, r.Sync.DoneBytes)), uint64(max(0, r.Sync.TotalBytes))
		s.DoneBytes, s.TotalBytes, s.EtaSeconds = &done, &total, r.Sync.ETASeconds
		s.Mode, _, _ = strings.Cut(r.Plan, ":")
	}
}

// diskWord is a replica's state in DRBD's words.
func diskWord(s protocol.DiskState) string {
	switch s {
	case protocol.DiskConsistent:
		return "Consistent"
	case protocol.DiskBlank, protocol.DiskInconsistent:
		return "Inconsistent"
	}
	return "DUnknown"
}
