package protocol

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// PeekReplica reads what a device says of itself as a replica, without
// opening it: nothing is applied, written or checked beyond the superblock.
// The error wraps ErrNoSuperblock when the device is no replica.
func PeekReplica(store Store) (ReplicaStatus, error) {
	sb, warnings, err := readSuperblocks(store)
	if err != nil {
		return ReplicaStatus{}, err
	}
	s := ReplicaStatus{
		VolumeUUID: sb.volume, ReplicaUUID: sb.replica, SizeBytes: sb.layout.size, DataOffset: sb.layout.dataOffset, State: sb.state,
		NeedsFull: sb.needFull, Applied: sb.applied, Committed: sb.committed, Lineage: sb.lineage.Clone(),
		CutUnixNanos: sb.cutNanos, JournalBytes: sb.layout.journal.length, JournalUsedBytes: int64(sb.head.logical - sb.tail.logical), Strayed: sb.strayed, TookOver: sb.tookOver, Warnings: warnings,
	}
	return s, nil
}

// Kind says in words what a device that PeekReplica read is.
func (s ReplicaStatus) Kind() string {
	u := s.VolumeUUID
	return fmt.Sprintf("a replica of volume %x-%x-%x-%x-%x, %s, at %v", u[:4], u[4:6], u[6:8], u[8:10], u[10:], s.State, s.Committed)
}

// ProbeReplica says whether a device is a replica, and of which volume, from
// its superblocks' two places alone: cheap enough for every disk of a machine.
// One whose superblocks are damaged, or of another version, is a replica of no
// known volume; the id is zero. A device that has another size than when it
// was formatted is not recognised.
func ProbeReplica(store Store) (volume [16]byte, found bool, err error) {
	best, _, err := newestSuperblock(store)
	switch {
	case best != nil:
		return best.volume, true, nil
	case errors.Is(err, ErrNewerFormat):
		return volume, true, nil
	case errors.Is(err, ErrNoSuperblock): // too small for one
		return volume, false, nil
	case err != nil:
		return volume, false, err
	}
	end := store.Size() / layoutAlign * layoutAlign
	for i := range uint64(2) {
		b := make([]byte, superBytes)
		if _, err := store.ReadAt(b, superOffset(layout{superA: end - superAreaBytes}, i)); err != nil {
			return volume, false, err
		}
		found = found || binary.LittleEndian.Uint64(b) == superMagic
	}
	return volume, found, nil
}
