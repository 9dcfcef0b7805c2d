package protocol

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"blockferry/blockdev/blocktest"
)

// mapWatch is a store that objects when data is written before the change map
// that names it is durable.
type mapWatch struct {
	*blocktest.Memory
	lay layout

	mu      sync.Mutex
	epoch   uint64 // what the map must name; 0: don't look
	durable []byte // the map as of the last flush
	faults  []string
	checked int
}

func (w *mapWatch) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := make([]byte, w.lay.changeMap.length)
	if _, err := w.Memory.ReadAt(now, w.lay.changeMap.offset); err != nil {
		return err
	}
	err := w.Memory.Flush()
	if err == nil {
		w.durable = now
	}
	return err
}

func (w *mapWatch) look(offset, length int64, zero bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.epoch == 0 || offset >= w.lay.size {
		return
	}
	for c := offset / ChunkBytes; c <= (offset+length-1)/ChunkBytes; c++ {
		page := w.durable[c/mapPageEntries*mapPageBytes:][:mapPageBytes]
		e := binary.LittleEndian.Uint64(page[mapHeaderBytes+c%mapPageEntries*8:])
		if w.checked++; e != w.epoch && !(zero && e == 0) {
			w.faults = append(w.faults, fmt.Sprintf("data written at %d while the map names epoch %d, not %d", offset, e, w.epoch))
		}
	}
}

func (w *mapWatch) WriteAt(b []byte, offset int64) (int, error) {
	w.look(offset, int64(len(b)), false)
	return w.Memory.WriteAt(b, offset)
}

func (w *mapWatch) ZeroOut(offset, length int64) error {
	w.look(offset, length, true)
	return w.Memory.ZeroOut(offset, length)
}

func TestChangeMapIsDurableBeforeTheData(t *testing.T) {
	m := newModel(t, 30, testVolume)
	w := &mapWatch{Memory: testDevice(m.size)}
	must(t, FormatReplica(w.Memory, testOptions(m.size)))
	w.lay = super(t, w.Memory).layout
	r := open(t, w)
	for i, p := range []epochPlan{
		{mode: ModeInPlace, full: true, blocks: 3}, {mode: ModeJournal, blocks: 6}, {mode: ModeInPlace, blocks: 9},
		{mode: ModeJournal, full: true}, {mode: ModeJournal, blocks: 2},
	} {
		w.mu.Lock()
		w.epoch, w.checked = m.next, 0
		w.mu.Unlock()
		must(t, m.send(r, p))
		must(t, r.WaitApplied(context.Background(), m.acked.Epoch))
		if len(w.faults) > 0 || w.checked == 0 {
			t.Fatalf("step %d: %d chunks written, %q", i, w.checked, w.faults)
		}
	}
	must(t, m.checkOpen(r))
}

// Pages at the seams: a volume whose last chunk and last page are partly used.
func TestChangeMapAgainstPlainList(t *testing.T) {
	size := int64(ChunkBytes*(2*mapPageEntries+3) + 5*BlockSize)
	l, err := layoutFor(testOptions(size).NeededBytes(), testOptions(size))
	must(t, err)
	cm := changeMap{blocktest.NewMemory(l.deviceBytes), l, 42}
	must(t, cm.writeAll(0, nil))
	want := make([]uint64, mapChunks(size))
	rng := rand.New(rand.NewPCG(1, 1))
	for epoch := uint64(1); epoch < 60; epoch++ {
		set := newTouched(size)
		for range 1 + rng.IntN(20) {
			f := Frame{Kind: FrameKind(1 + rng.IntN(3)), Length: (1 + rng.Int64N(3*ChunkBytes/BlockSize)) * BlockSize}
			if rng.IntN(4) == 0 {
				f.Kind, f.Length = FrameZero, ChunkBytes*600
			}
			f.Offset = rng.Int64N((size-f.Length)/BlockSize+1) * BlockSize
			if rng.IntN(9) == 0 {
				f.Offset = size - f.Length
			}
			set.add(f)
			if !set.has(f.Range()) {
				t.Fatal("it does not have what was added")
			}
			for c := f.Offset / ChunkBytes; c*ChunkBytes < f.Offset+f.Length; c++ {
				if f.Kind == FrameData || want[c] != 0 {
					want[c] = epoch
				}
			}
		}
		damaged, err := cm.update(set, epoch)
		if err != nil || len(damaged) > 0 {
			t.Fatal(damaged, err)
		}
		since := rng.Uint64N(epoch)
		ranges, _, err := cm.ranges(func(e uint64) bool { return e > since })
		must(t, err)
		got := make([]bool, len(want))
		last := int64(-1)
		for _, r := range ranges {
			if r.Offset <= last || r.End() > size {
				t.Fatalf("ranges %v", ranges)
			}
			last = r.End()
			for c := r.Offset / ChunkBytes; c*ChunkBytes < r.End(); c++ {
				got[c] = true
			}
		}
		for c := range want {
			if got[c] != (want[c] > since) {
				t.Fatalf("epoch %d: chunk %d of epoch %d, since %d: %v", epoch, c, want[c], since, got[c])
			}
		}
	}
}

func FuzzMapPage(f *testing.F) {
	cm := changeMap{tag: 7}
	page := make([]byte, mapPageBytes)
	cm.sealPage(page, 3)
	f.Add(page)
	f.Add(make([]byte, mapPageBytes))
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		if checkMapPage(b, 3, 7) == nil {
			cm.sealPage(b, 3)
			if !bytes.Equal(b, before) {
				t.Fatal("accepted a page that would not be written so")
			}
		}
	})
}
