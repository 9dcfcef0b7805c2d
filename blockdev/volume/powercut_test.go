package volume

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
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

// A label whose flush failed is read as the newest, but may be in the disk's cache
// alone for good. The other slot is the one that survives then: whoever opens the
// disk makes the newest durable before it overwrites that, or goes by it.
func TestTwoFailedFlushesLeaveALabel(t *testing.T) {
	broken := errors.New("broken on purpose")
	d := blocktest.NewMemory(4 << 20)
	l := sampleLabel(t)
	for range 2 {
		if err := writeLabel(d, l); err != nil {
			t.Fatal(err)
		}
	}
	durable := l.Sequence
	change := func(l *Label) error {
		l.State = bytes.Repeat([]byte{byte(l.Sequence)}, 20000)
		d.FailAt(blocktest.OpFlush, 0, broken)
		return writeLabel(d, l)
	}
	if err := change(l); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	l, err := ReadLabel(d)
	if err != nil || l.Sequence != durable+1 {
		t.Fatalf("number %d, %v: this test checks nothing", l.Sequence, err)
	}
	d.FailAt(blocktest.OpFlush, 0, broken)
	if err := keepLabel(d, l); !errors.Is(err, broken) {
		t.Fatalf("it can't be kept: %v", err)
	}
	if err := keepLabel(d, l); err != nil {
		t.Fatal(err)
	}
	kept := l.Sequence
	if err := change(l); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	for seed := range uint64(300) {
		after, err := ReadLabel(d.Clone().PowerCut(rand.New(rand.NewPCG(seed, 1))))
		if err != nil {
			t.Fatalf("power cut %d: %v", seed, err)
		}
		if after.Sequence < kept {
			t.Fatalf("power cut %d: what was gone by, number %d, is lost; number %d is left", seed, kept, after.Sequence)
		}
	}
	// What is there no longer is not written over.
	if err := keepLabel(d, &Label{Sequence: 99}); !errors.Is(err, ErrBadLabel) {
		t.Errorf("another label: %v", err)
	}
}

// So does who opens a disk for another role.
func TestTwoFailedFlushesOfARole(t *testing.T) {
	broken := errors.New("broken on purpose")
	d := blocktest.NewMemory(1 << 30)
	if _, err := FormatOn(d, NewUUID(), LayoutOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		o, err := OfflineOn(d)
		if err != nil {
			t.Fatal(err)
		}
		d.FailAt(blocktest.OpFlush, 0, broken)
		if err := o.SetState(bytes.Repeat([]byte{byte(n + 1)}, 20000)); !errors.Is(err, broken) {
			t.Fatal(err)
		}
	}
	for seed := range uint64(300) {
		if _, err := ReadLabel(d.Clone().PowerCut(rand.New(rand.NewPCG(seed, 1)))); err != nil {
			t.Fatalf("power cut %d: %v", seed, err)
		}
	}
}

// Opening a disk makes its label durable.
func TestOpeningKeepsTheLabel(t *testing.T) {
	device := blocktest.Loop(t, 64<<20)
	label, err := Format(FormatOptions{Device: device, Overwrite: true})
	if err != nil {
		t.Fatal(err)
	}
	before := flushesOf(t, device)
	o, err := OpenOffline(device)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	if o.Label().Sequence != label.Sequence || flushesOf(t, device) == before {
		t.Errorf("number %d, want %d; %d flushes before and after", o.Label().Sequence, label.Sequence, before)
	}
}

func flushesOf(t *testing.T, device string) uint64 {
	t.Helper()
	text, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	n, ok := blockdev.StatField(text, 16)
	if !ok {
		t.Fatalf("'%s' has no count of flushes", text)
	}
	return n
}
