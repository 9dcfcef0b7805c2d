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
		e := mapEntry(binary.LittleEndian.Uint64(page[mapHeaderBytes+c%mapPageEntries*8:]))
		if w.checked++; e.epoch() != w.epoch || e.zeros() && !zero {
			w.faults = append(w.faults, fmt.Sprintf("data written at %d (zeros: %v) while the map names epoch %d (zeros: %v), not %d", offset, zero, e.epoch(), e.zeros(), w.epoch))
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
	want, data := make([]uint64, mapChunks(size)), make([]bool, mapChunks(size))
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
				want[c], data[c] = epoch, data[c] || f.Kind == FrameData
			}
		}
		same := Range{rng.Int64N(size/BlockSize-9) * BlockSize, BlockSize * (1 + rng.Int64N(9))}
		set.compared(same)
		for c := same.Offset / ChunkBytes; c*ChunkBytes < same.End(); c++ {
			want[c] = epoch
		}
		damaged, err := cm.update(set, epoch)
		if err != nil || len(damaged) > 0 {
			t.Fatal(damaged, err)
		}
		since := rng.Uint64N(epoch)
		changed, _, err := cm.changedSince(since)
		must(t, err)
		filled, _, err := cm.ranges(func(e mapEntry, _ uint32) bool { return !e.zeros() })
		must(t, err)
		isChanged, isFilled := chunksOf(t, size, changed), chunksOf(t, size, filled)
		for c := range want {
			if isChanged[c] != (want[c] > since) || isFilled[c] != data[c] {
				t.Fatalf("epoch %d: chunk %d of epoch %d, with data: %v; since %d: %v, with data: %v", epoch, c, want[c], data[c], since, isChanged[c], isFilled[c])
			}
		}
	}
}

// chunksOf are those within ranges, which ascend.
func chunksOf(t *testing.T, size int64, ranges []Range) []bool {
	t.Helper()
	out, last := make([]bool, mapChunks(size)), int64(-1)
	for _, r := range ranges {
		if r.Offset <= last || r.End() > size {
			t.Fatalf("ranges %v", ranges)
		}
		last = r.End()
		for c := r.Offset / ChunkBytes; c*ChunkBytes < r.End(); c++ {
			out[c] = true
		}
	}
	return out
}

// A page of version 1 does not name what was equal, or zeros over zeros, at epochs before:
// all of it counts as changed, and from the next epoch on as changed by that. What reads as
// zeros it tells.
func TestOlderMapPages(t *testing.T) {
	size := int64(2 * mapPageEntries * ChunkBytes)
	l, err := layoutFor(testOptions(size).NeededBytes(), testOptions(size))
	must(t, err)
	cm := changeMap{blocktest.NewMemory(l.deviceBytes), l, 42}
	must(t, cm.writeAll(0, nil))
	page := make([]byte, mapPageBytes)
	le := binary.LittleEndian
	le.PutUint64(page[mapHeaderBytes+8*5:], 3) // chunk 5 has data
	cm.sealPage(page, 0)
	le.PutUint32(page[4:], 1)
	le.PutUint32(page[28:], 0)
	le.PutUint32(page[28:], crc32c(page))
	_, err = cm.store.WriteAt(page, cm.pageOffset(0))
	must(t, err)
	expect := func(since uint64, whole bool, more ...int) {
		t.Helper()
		changed, damaged, err := cm.changedSince(since)
		must(t, err)
		got := chunksOf(t, size, changed)
		for c := range got {
			want := whole && c < mapPageEntries
			for _, m := range more {
				want = want || c == m
			}
			if got[c] != want || len(damaged) > 0 {
				t.Fatalf("since %d chunk %d: %v; %v", since, c, got[c], damaged)
			}
		}
		filled, _, err := cm.ranges(func(e mapEntry, _ uint32) bool { return !e.zeros() })
		must(t, err)
		if len(filled) == 0 || filled[0] != (Range{5 * ChunkBytes, ChunkBytes}) {
			t.Fatalf("with data: %v", filled)
		}
	}
	expect(100, true)
	touch := func(epoch uint64, r Range) {
		t.Helper()
		set := newTouched(size)
		set.compared(r)
		_, err := cm.update(set, epoch)
		must(t, err)
	}
	touch(7, Range{(mapPageEntries + 1) * ChunkBytes, BlockSize}) // the other page
	expect(100, true)
	expect(6, true, mapPageEntries+1)
	touch(8, Range{9 * ChunkBytes, BlockSize})
	expect(7, true)
	expect(8, false)
	touch(9, Range{9 * ChunkBytes, BlockSize})
	expect(8, false, 9)
}

func FuzzMapPage(f *testing.F) {
	cm := changeMap{tag: 7}
	page := make([]byte, mapPageBytes)
	cm.sealPage(page, 3)
	f.Add(page)
	f.Add(make([]byte, mapPageBytes))
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		if version, err := checkMapPage(b, 3, 7); err == nil && version == mapVersion {
			cm.sealPage(b, 3)
			if !bytes.Equal(b, before) {
				t.Fatal("accepted a page that would not be written so")
			}
		}
	})
}
