package volume

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
)

// New era metadata has its identity only when the old content is gone, and
// for good once it is there: otherwise a power cut leaves marks of another
// time under the name that the label trusts, or none under it.
func TestFreshMetadataSurvivesPowerCuts(t *testing.T) {
	l := sampleLabel(t)
	dev := blocktest.NewMemory(l.Areas.Meta.End())
	if err := writeMetaID(dev, l); err != nil {
		t.Fatal(err)
	}
	at := l.Areas.Meta.Offset
	if _, err := dev.WriteAt(bytes.Repeat([]byte{0xee}, blockdev.BlockSize), at+auxIDBytes); err != nil {
		t.Fatal(err)
	}
	if err := dev.Flush(); err != nil {
		t.Fatal(err)
	}
	next := *l
	next.EraID = NewUUID()
	look := func(after *blocktest.Memory) (isNew, emptied bool) {
		id, err := readAux(after, at)
		if err != nil && !errors.Is(err, errNoAux) {
			t.Fatal(err)
		}
		head := make([]byte, blockdev.BlockSize)
		if _, err := after.ReadAt(head, at+auxIDBytes); err != nil {
			t.Fatal(err)
		}
		return err == nil && id.era == next.EraID, firstNonzero(head) < 0
	}
	for _, op := range []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush, blocktest.OpZeroOut} {
		for k := 0; ; k++ {
			d := dev.Clone()
			d.FailAt(op, k, errors.New("broken on purpose"))
			err := freshMetadata(d, &next)
			for seed := range uint64(60) {
				isNew, emptied := look(d.Clone().PowerCut(rand.New(rand.NewPCG(seed, uint64(k)))))
				if isNew && !emptied {
					t.Fatalf("%v %d failed (%v): the new identity stands over the old content", op, k, err)
				}
				if err == nil && !isNew {
					t.Fatal("the new identity was said to be durable, and is lost")
				}
			}
			if d.FailurePending(op) {
				break
			}
		}
	}
}
