package protocol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"blockferry/blockdev/blocktest"
)

// enlarged is a device with more room, full of old content, behind what it was.
func enlarged(t *testing.T, dev *blocktest.Memory, by int64) *blocktest.Memory {
	t.Helper()
	larger := blocktest.NewMemory(dev.Size() + by)
	zeros := make([]byte, BlockSize)
	for at, b := int64(0), append(snapshot(t, dev), bytes.Repeat([]byte("was here"), int(by/8))...); at < int64(len(b)); at += BlockSize {
		if block := b[at : at+BlockSize]; !bytes.Equal(block, zeros) {
			_, err := larger.WriteAt(block, at)
			must(t, err)
		}
	}
	must(t, larger.Flush())
	return larger
}

// grown is the model of a volume that has grown by zeros.
func (m *model) grown(size int64) *model {
	c := m.copied()
	c.size = size
	more := make([]byte, size-m.size)
	c.image = append(c.image, more...)
	for p, image := range c.images {
		c.images[p] = append(bytes.Clone(image), more...)
	}
	return c
}

// A device that was enlarged by whatever, its volume grown or not: at every moment, also after
// a power cut, there is one whole replica with all that was acknowledged, of the former size
// or of the new one; done again it is done.
func TestGrowSurvivesPowerCuts(t *testing.T) {
	for _, c := range []struct{ by, more int64 }{
		{0, 9 * BlockSize}, // there was room
		{1 << 20, 0},
		{5 << 20, 5 * BlockSize}, // the new map would come to lie over the old superblocks
		{9 << 20, 8 << 20},       // the volume comes to lie over its former tail
	} {
		t.Run(fmt.Sprintf("device by %d, volume by %d", c.by, c.more), func(t *testing.T) {
			t.Parallel()
			m, dev := waiting(t, 41)
			dev = enlarged(t, dev, c.by)
			o := GrowOptions{VolumeUUID: testOptions(1).VolumeUUID, SizeBytes: m.size + c.more}
			after := m.grown(o.SizeBytes)
			moments, old, fresh := 0, 0, 0
			look := func(t *testing.T, d *blocktest.Memory) {
				moments++
				sb, view, err := findReplica(d)
				must(t, err)
				want := m
				if sb.layout.size == o.SizeBytes {
					want = after
					fresh++
				} else {
					old++
				}
				if view.Size() != d.Size() {
					if _, err := PeekReplica(d); !errors.Is(err, ErrResized) {
						t.Fatalf("a device that was enlarged: %v", err)
					}
				}
				data := make([]byte, sb.layout.size)
				_, err = d.ReadAt(data, 0)
				must(t, err)
				if sb.layout.size > m.size && !allZero(data[m.size:]) {
					t.Fatal("what came to the volume is not zeros")
				}
				if moments%29 != 0 {
					return // all of it takes long
				}
				_, view, err = findReplica(d.Clone())
				must(t, err)
				if err := want.check(view); err != nil {
					t.Fatalf("as it is: %v", err)
				}
				must(t, GrowReplica(context.Background(), d, o))
				must(t, after.check(d))
			}
			somePowerCuts(t, dev, 10, func(d *blocktest.Memory) error { return GrowReplica(context.Background(), d, o) }, look)
			if fresh == 0 || c.more > 0 && old == 0 {
				t.Errorf("%d moments, %d before, %d after", moments, old, fresh)
			}
			// It goes on, also past its former end.
			must(t, GrowReplica(context.Background(), dev, o))
			writes := dev.Count(blocktest.OpWrite)
			must(t, GrowReplica(context.Background(), dev, o))
			if n := dev.Count(blocktest.OpWrite); n != writes {
				t.Errorf("done again it wrote %d times", n-writes)
			}
			if was := formerSize(dev); was != nil && was.layout.deviceBytes < super(t, dev).layout.deviceBytes {
				t.Errorf("its superblocks of when it had %d bytes still stand", was.layout.deviceBytes)
			}
			r := open(t, dev)
			if st := r.Status(); st.SizeBytes != o.SizeBytes || st.Committed != m.acked {
				t.Fatalf("%+v", st)
			}
			for range 3 {
				must(t, after.send(r, epochPlan{mode: ModeJournal, blocks: 8, codec: CodecS2}))
			}
			must(t, r.WaitApplied(t.Context(), after.acked.Epoch))
			must(t, after.checkOpen(r))
		})
	}
}

// What does not fit, or is no whole replica of the volume, is refused with what is needed, and
// nothing is written.
func TestGrowRefuses(t *testing.T) {
	m, dev, r := synced(t, 42)
	must(t, r.Close())
	dev = enlarged(t, dev, 4<<20)
	ours := testOptions(1).VolumeUUID
	strayed := testDevice(testVolume)
	o := testOptions(testVolume)
	o.Holds = &Holding{Lineage: Lineage{{Generation{1}, 5}}, Strayed: "written by hand"}
	must(t, FormatReplica(strayed, o))
	torn, tornDev, tr := synced(t, 43)
	must(t, tr.Begin(t.Context(), EpochStart{Epoch: torn.next, Attempt: 9, Mode: ModeInPlace, Lineage: torn.lineage.Extend(Position{torn.lineage.Tip().Generation, torn.next})}))
	must(t, tr.Close())
	for name, c := range map[string]struct {
		dev  *blocktest.Memory
		o    GrowOptions
		want error
		text string
	}{
		"too small":      {dev, GrowOptions{VolumeUUID: ours, SizeBytes: m.size + 64<<20}, ErrTooSmall, "needs 7"},
		"shrinks":        {dev, GrowOptions{VolumeUUID: ours, SizeBytes: m.size - BlockSize}, nil, "does not shrink"},
		"another volume": {dev, GrowOptions{VolumeUUID: [16]byte{8}, SizeBytes: m.size + BlockSize}, nil, "it is of volume"},
		"strayed":        {strayed, GrowOptions{VolumeUUID: ours, SizeBytes: m.size}, ErrStrayed, "by hand"},
		"torn":           {tornDev, GrowOptions{VolumeUUID: ours, SizeBytes: m.size}, ErrNotConsistent, "synced first"},
		"none":           {blocktest.NewMemory(8 << 20), GrowOptions{VolumeUUID: ours}, ErrNoSuperblock, ""},
	} {
		before := snapshot(t, c.dev)
		err := GrowReplica(t.Context(), c.dev, c.o)
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(before, snapshot(t, c.dev)) {
			t.Errorf("%s: refused, and written to", name)
		}
	}
}

// The new change map would come to lie over both former superblocks: until there are new
// ones the device is found by those.
func TestGrowKeepsTheFormerSuperblocks(t *testing.T) {
	const size, former = 20 << 30, 22 << 30
	o := testOptions(size)
	at := Position{Generation{1}, 5}
	o.Holds = &Holding{Lineage: Lineage{at}}
	// Then a map behind a journal as large as the former begins where they do.
	dev := blocktest.NewMemory(former + MinJournalBytes + mapAreaBytes(size))
	must(t, FormatReplica(shorter{dev, former}, o))
	grow := GrowOptions{VolumeUUID: o.VolumeUUID}
	if to, err := movedLayout(dev.Size(), super(t, shorter{dev, former}).layout); err != nil || to.journal.length <= MinJournalBytes {
		t.Fatalf("%+v, %v: this test shows nothing", to, err)
	}
	somePowerCuts(t, dev, 3, func(d *blocktest.Memory) error { return GrowReplica(context.Background(), d, grow) }, func(t *testing.T, d *blocktest.Memory) {
		sb, _, err := findReplica(d)
		must(t, err)
		if sb.applied != at || sb.state != DiskConsistent {
			t.Fatalf("%v %v", sb.state, sb.applied)
		}
		must(t, GrowReplica(context.Background(), d, grow))
		must(t, open(t, d).Close())
	})
}

// Where the power was cut before the former superblocks were gone, the next growth takes them away, though
// there is nothing else to do, and what the journal holds beside them by then is not lost. Another
// replica's stay.
func TestGrowTakesAwayWhatWasLeft(t *testing.T) {
	m, dev := waiting(t, 44)
	former := super(t, dev)
	dev = enlarged(t, dev, 9<<20)
	o := GrowOptions{VolumeUUID: testOptions(1).VolumeUUID}
	must(t, GrowReplica(t.Context(), dev, o))
	r := open(t, dev)
	image, err := r.Hold(t.Context())
	must(t, err)
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 5}))
	waits := dev.Clone()
	image.Release()
	must(t, r.Close())
	dev = waits
	present := super(t, dev)
	leave := func(replica [16]byte, end int64, sequence uint64) {
		old := *former
		old.replica, old.sequence = replica, sequence
		old.layout, err = layoutFor(end, FormatOptions{VolumeUUID: old.volume, SizeBytes: old.layout.size, JournalBytes: old.layout.journal.length})
		must(t, err)
		must(t, writeSuperblock(dev, old))
	}
	// One stands where what waits in the journal is, between its copies.
	ring := present.layout.journal
	waiting := ring.offset + int64(present.tail.logical)%ring.length
	ours := roundUp(waiting+1, layoutAlign)
	if inside := waiting % layoutAlign; present.head == present.tail || inside%superCopyOffset > superCopyOffset-100<<10 {
		t.Fatalf("the journal holds %v to %v: this test shows nothing", present.tail, present.head)
	} else if inside < superCopyOffset {
		leave(present.replica, ours, 1)
	} else {
		leave(present.replica, ours, 2)
	}
	other := ours - 3<<20
	leave([16]byte{7}, other, 1)
	ends := func() (at []int64) {
		for s := range formerSuperblocks(dev) {
			if s.layout.deviceBytes < present.layout.deviceBytes {
				at = append(at, s.layout.deviceBytes)
			}
		}
		return at
	}
	if got := ends(); !slices.Equal(got, []int64{ours, other}) {
		t.Fatalf("ends %v: this test shows nothing", got)
	}
	must(t, GrowReplica(t.Context(), dev, o))
	if got := ends(); !slices.Equal(got, []int64{other}) {
		t.Errorf("ends %v are left, want the other replica's, %d", got, other)
	}
	must(t, m.check(dev))
}

// An image of the device within its data is no former superblock.
func TestGrowLeavesDataAlone(t *testing.T) {
	o := testOptions(64 << 20)
	at := Position{Generation{1}, 5}
	o.Holds = &Holding{Lineage: Lineage{at}}
	dev := blocktest.NewMemory(160 << 20)
	must(t, FormatReplica(dev, o))
	small := testOptions(8 << 20)
	l, err := layoutFor(60<<20, small)
	must(t, err)
	image := *super(t, dev)
	image.layout, image.sequence, image.watched = l, 1, nil
	must(t, writeSuperblock(dev, image))
	before := snapshot(t, dev)[:64<<20]
	must(t, GrowReplica(t.Context(), dev, GrowOptions{VolumeUUID: o.VolumeUUID, SizeBytes: 65 << 20}))
	if got := snapshot(t, dev); !bytes.Equal(got[:64<<20], before) {
		t.Error("data was changed")
	}
}
