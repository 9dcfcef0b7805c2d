package protocol

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"blockferry/blockdev/blocktest"
)

// A replica whose disk was enlarged, as clouds do while a machine is stopped,
// may be the only copy: it is never called a disk without a replica.
func TestEnlargedReplicaIsKnown(t *testing.T) {
	m, dev, r := synced(t, 31)
	must(t, r.Close())
	larger := blocktest.NewMemory(dev.Size() + 3<<20)
	_, err := larger.WriteAt(snapshot(t, dev), 0)
	must(t, err)
	_, err = PeekReplica(larger)
	if !errors.Is(err, ErrResized) || errors.Is(err, ErrNoSuperblock) || !strings.Contains(err.Error(), m.acked.String()) {
		t.Fatalf("%v", err)
	}
	if _, err := PeekReplica(blocktest.NewMemory(dev.Size())); !errors.Is(err, ErrNoSuperblock) {
		t.Fatalf("a blank disk: %v", err)
	}
}

// A superblock of a later version is not passed over for the older copy beside
// it, nor for no superblock at all.
func TestLaterVersionIsNotPassedOver(t *testing.T) {
	_, dev, r := synced(t, 32)
	must(t, r.Close())
	sb := super(t, dev)
	b := sb.encode()
	le := binary.LittleEndian
	le.PutUint32(b[8:], superVersion+1)
	le.PutUint32(b[12:], 0)
	le.PutUint32(b[12:], crc32c(b))
	for i := range uint64(2) { // the newer copy first, then both
		_, err := dev.WriteAt(b, superOffset(sb.layout, sb.sequence+i))
		must(t, err)
		if _, err := PeekReplica(dev); !errors.Is(err, ErrNewerFormat) || errors.Is(err, ErrNoSuperblock) {
			t.Fatalf("%d copies: %v", i+1, err)
		}
	}
}
