package protocol

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"blockferry/blockdev/blocktest"
)

// eachPowerCut has one operation after another of do fail, on a copy of dev
// each time, and shows look what a power cut leaves after it, in several ways.
func eachPowerCut(t *testing.T, dev *blocktest.Memory, do func(*blocktest.Memory) error, look func(t *testing.T, after *blocktest.Memory)) {
	t.Helper()
	somePowerCuts(t, dev, 40, do, look)
}

// somePowerCuts is eachPowerCut in so many ways.
func somePowerCuts(t *testing.T, dev *blocktest.Memory, ways uint64, do func(*blocktest.Memory) error, look func(t *testing.T, after *blocktest.Memory)) {
	t.Helper()
	for _, op := range []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush, blocktest.OpZeroOut} {
		for k := 0; ; k++ {
			d := dev.Clone()
			d.FailAt(op, k, errors.New("broken on purpose"))
			err := do(d)
			if d.FailurePending(op) {
				must(t, err)
				break
			}
			if err == nil {
				t.Fatalf("%v %d failed, and nobody said so", op, k)
			}
			for seed := range ways {
				look(t, d.Clone().PowerCut(rand.New(rand.NewPCG(seed, uint64(k)))))
			}
		}
	}
}

// Whatever is left of a device whose formatting a power cut ended: a
// superblock there vouches only for its own change map, all of it.
func TestFormatSurvivesPowerCuts(t *testing.T) {
	o := testOptions(testVolume)
	dev := testDevice(testVolume)
	o.ReplicaUUID = [16]byte{1}
	must(t, FormatReplica(dev, o))
	o.ReplicaUUID = [16]byte{2}
	none, old, fresh := 0, 0, 0
	eachPowerCut(t, dev, func(d *blocktest.Memory) error { return FormatReplica(d, o) }, func(t *testing.T, after *blocktest.Memory) {
		sb, _, err := readSuperblocks(after)
		if errors.Is(err, ErrNoSuperblock) {
			none++
			return
		}
		must(t, err)
		if sb.replica == o.ReplicaUUID {
			fresh++
		} else {
			old++
		}
		_, damaged, err := changeMap{after, sb.layout, sb.tag()}.ranges(func(mapEntry, uint32) bool { return false })
		must(t, err)
		if len(damaged) > 0 {
			t.Fatalf("the superblock of replica %x vouches for a map that is not its own: %s", sb.replica[:1], damaged[0])
		}
	})
	if none == 0 || old == 0 || fresh == 0 {
		t.Errorf("not all outcomes came: %d without a superblock, %d the old replica, %d the new one", none, old, fresh)
	}
}

// A replica's changed content, once accepted, is all named by the map: what
// the map calls zeros a restore does not even read.
func TestAcceptChangesSurvivesPowerCuts(t *testing.T) {
	dev := testDevice(testVolume)
	must(t, FormatReplica(dev, testOptions(testVolume)))
	sb := super(t, dev)
	tip := Position{Generation{7}, 1}
	watched, err := watch(dev, sb.layout, nil, nil)
	must(t, err)
	sb.sequence++
	sb.state, sb.lineage, sb.applied, sb.committed, sb.mapBase, sb.watched = DiskConsistent, Lineage{tip}, tip, tip, 1, watched
	must(t, writeSuperblock(dev, *sb)) // an image of zeros
	page := make([]byte, BlockSize)
	page[9] = 1
	_, err = dev.WriteAt(page, 0)
	must(t, err)
	must(t, dev.Flush())
	r := open(t, dev) // it finds that, and says so on the disk
	if st := r.Status(); !st.ChangedOutside {
		t.Fatalf("%+v", st)
	}
	must(t, r.Close())
	accepted := 0
	accept := func(d *blocktest.Memory) error {
		r, err := OpenReplica(context.Background(), d, OpenOptions{})
		if err != nil {
			return err
		}
		return errors.Join(r.AcceptChanges(Generation{8}), r.Close())
	}
	eachPowerCut(t, dev, accept, func(t *testing.T, after *blocktest.Memory) {
		r := open(t, after)
		defer r.Close()
		if r.Status().State != DiskConsistent {
			return
		}
		accepted++
		image, err := r.Hold(context.Background())
		must(t, err)
		defer image.Release()
		data, err := image.DataRanges()
		must(t, err)
		if len(data) == 0 || data[0].Offset != 0 {
			t.Fatalf("what was written at 0 and accepted is not among the data: %v", data)
		}
	})
	if accepted == 0 {
		t.Error("the changes were never accepted")
	}
}

// A superblock whose flush failed is read as the newest, but may be in the disk's
// cache alone for good. The other copy is the one that survives then, so it is not
// overwritten before the newest is durable.
func TestTwoFailedFlushesLeaveASuperblock(t *testing.T) {
	broken := errors.New("broken on purpose")
	dev := testDevice(testVolume)
	must(t, FormatReplica(dev, testOptions(testVolume)))
	for n := range byte(2) {
		if n > 0 {
			dev.FailAt(blocktest.OpFlush, 0, broken)
		}
		r, err := OpenReplica(context.Background(), dev, OpenOptions{})
		if err != nil {
			break // it noticed
		}
		dev.FailAt(blocktest.OpFlush, 0, broken)
		change := func(sb *superblock) { // in sectors far from each other
			sb.cutNanos++
			sb.watched = []watchedPlace{{length: BlockSize, digest: [32]byte{n + 1}}}
		}
		if err := r.writeSuper(1, change, nil); !errors.Is(err, broken) {
			t.Fatalf("the superblock's flush did not fail: %v", err)
		}
		must(t, r.Close())
	}
	for seed := range uint64(300) {
		after := dev.Clone().PowerCut(rand.New(rand.NewPCG(seed, 1)))
		r, err := OpenReplica(context.Background(), after, OpenOptions{})
		if err != nil {
			t.Fatalf("power cut %d: %v", seed, err)
		}
		must(t, r.Close())
	}
}
