package protocol

import "fmt"

// PeekReplica reads what a device says of itself as a replica, without
// opening it: nothing is applied, written or checked beyond the superblock.
// The error wraps ErrNoSuperblock when the device is no replica.
func PeekReplica(store Store) (ReplicaStatus, error) {
	sb, warnings, err := readSuperblocks(store)
	if err != nil {
		return ReplicaStatus{}, err
	}
	s := ReplicaStatus{
		VolumeUUID: sb.volume, ReplicaUUID: sb.replica, SizeBytes: sb.layout.size, State: sb.state,
		NeedsFull: sb.needFull, Applied: sb.applied, Committed: sb.committed, Lineage: sb.lineage.Clone(),
		CutUnixNanos: sb.cutNanos, Warnings: warnings,
	}
	return s, nil
}

// Kind says in words what a device that PeekReplica read is.
func (s ReplicaStatus) Kind() string {
	u := s.VolumeUUID
	return fmt.Sprintf("a replica of volume %x-%x-%x-%x-%x, %s, at %v", u[:4], u[4:6], u[6:8], u[8:10], u[10:], s.State, s.Committed)
}
