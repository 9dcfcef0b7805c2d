package protocol

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
)

// The change map holds, for every chunk of ChunkBytes of the volume, the epoch
// that last may have changed it, in the low 63 bits; the highest bit says that the chunk
// never held data and reads as zeros (of a consistent replica: its first full epoch made
// that true), and so does an entry of 0, which no epoch since touched. It is
// an array of pages of 4 KiB, little-endian:
//
//	 0        4     8             16                24          28        32
//	+--------+-----+-------------+-----------------+-----------+---------+----------------------
//	| "BFCM" | v=2 | page index  | tag of the      | 0         | crc32c  | 508 entries, u64 each
//	|        |     | u64         | replica u64     |           |         | chunk 508*index + i
//	+--------+-----+-------------+-----------------+-----------+---------+----------------------
//
// The checksum covers the page with its own field 0. Formatting writes every
// page; a page of zeros is a damaged page. What a damaged page held counts as changed.
//
// An epoch brings a copy from its position to a later cut, and touches all that the
// primary's tracker named between the two, also what was found equal by comparing and
// zeros over zeros: other copies may hold a cut in between, at which it was
// something else. So the map answers for every cut of its line since the map's base,
// whether this copy was ever there or not. Pages of version 1 do not: what they hold counts
// as changed until an epoch touches them, and as changed by that one from then on.
const (
	// ChunkBytes is the grain of the change map.
	ChunkBytes = 256 << 10

	mapPageBytes   = 4096
	mapHeaderBytes = 32
	mapPageEntries = (mapPageBytes - mapHeaderBytes) / 8
	mapMagic       = 0x4d434642 // "BFCM" read as a little-endian u32
	mapVersion     = 2
	mapOldest      = 1   // epochs that touched nothing but what differed
	mapBatchPages  = 256 // read and written at once
)

// mapZeros is the bit in an entry that says that the chunk reads as zeros.
const mapZeros mapEntry = 1 << 63

// mapEntry is what the map says of a chunk.
type mapEntry uint64

func (e mapEntry) epoch() uint64 { return uint64(e &^ mapZeros) }
func (e mapEntry) zeros() bool   { return e == 0 || e&mapZeros != 0 }

// touch is the entry after an epoch; data: it put some there. A copy that switched to
// another line may go on with lower numbers; the map must not forget what it says of the
// image before.
func (e mapEntry) touch(epoch uint64, data bool) mapEntry {
	now := mapEntry(max(e.epoch(), epoch))
	if e.zeros() && !data {
		now |= mapZeros
	}
	return now
}

func mapChunks(sizeBytes int64) int64 { return (sizeBytes + ChunkBytes - 1) / ChunkBytes }

func mapPages(sizeBytes int64) int64 {
	return (mapChunks(sizeBytes) + mapPageEntries - 1) / mapPageEntries
}

// touched collects which chunks an epoch touches. It takes about
// 300 bytes for every 127 MiB of the volume that an epoch touches at all.
type touched struct {
	sizeBytes int64
	pages     map[int64]*touchedPage
	zeroRun   Range // the zero frames seen last, joined
}

// touchedPage has one bit per chunk of a map page.
type touchedPage struct {
	data [8]uint64 // some of it written
	zero [8]uint64 // some of it zeroed
	all  [8]uint64 // all of it zeroed, by one run of zero frames
	same [8]uint64 // some of it compared, and left out where it was equal
}

func newTouched(sizeBytes int64) *touched {
	return &touched{sizeBytes: sizeBytes, pages: map[int64]*touchedPage{}}
}

func (t *touched) page(chunk int64) (*touchedPage, int, uint64) {
	p := t.pages[chunk/mapPageEntries]
	if p == nil {
		p = new(touchedPage)
		t.pages[chunk/mapPageEntries] = p
	}
	i := chunk % mapPageEntries
	return p, int(i / 64), 1 << (i % 64)
}

// add notes a frame. The frame lies within the volume.
func (t *touched) add(f Frame) {
	r := f.Range()
	first, last := r.Offset/ChunkBytes, (r.End()-1)/ChunkBytes
	if f.Kind == FrameData {
		for c := first; c <= last; c++ {
			p, i, bit := t.page(c)
			p.data[i] |= bit
		}
		return
	}
	if t.zeroRun.End() == r.Offset && t.zeroRun.Length > 0 {
		t.zeroRun.Length += r.Length
	} else {
		t.zeroRun = r
	}
	for c := first; c <= last; c++ {
		p, i, bit := t.page(c)
		p.zero[i] |= bit
		if t.zeroRun.Offset <= c*ChunkBytes && t.zeroRun.End() >= min((c+1)*ChunkBytes, t.sizeBytes) {
			p.all[i] |= bit
		}
	}
}

// compared notes a range that was compared.
func (t *touched) compared(r Range) {
	for c := r.Offset / ChunkBytes; c <= (r.End()-1)/ChunkBytes; c++ {
		p, i, bit := t.page(c)
		p.same[i] |= bit
	}
}

// has reports whether anything in the range was written, in whole chunks.
func (t *touched) has(r Range) bool {
	for c := r.Offset / ChunkBytes; c <= (r.End()-1)/ChunkBytes; c++ {
		if p := t.pages[c/mapPageEntries]; p != nil {
			i := c % mapPageEntries
			if (p.data[i/64]|p.zero[i/64])&(1<<(i%64)) != 0 {
				return true
			}
		}
	}
	return false
}

// looked is has, or that something in the range was compared.
func (t *touched) looked(r Range) bool {
	for c := r.Offset / ChunkBytes; c <= (r.End()-1)/ChunkBytes; c++ {
		if p := t.pages[c/mapPageEntries]; p != nil && p.same[c%mapPageEntries/64]&(1<<(c%mapPageEntries%64)) != 0 {
			return true
		}
	}
	return t.has(r)
}

// takeNew moves what f touches to t and returns it if some was not there.
func (t *touched) takeNew(o *touched) (added *touched) {
	for index, p := range o.pages {
		have := t.pages[index]
		if have == nil {
			have = new(touchedPage)
			t.pages[index] = have
		}
		var fresh uint64
		for i := range p.data {
			fresh |= p.data[i]&^have.data[i] | p.zero[i]&^have.zero[i]
			have.data[i] |= p.data[i]
			have.zero[i] |= p.zero[i]
			have.all[i] |= p.all[i]
		}
		if fresh != 0 {
			if added == nil {
				added = newTouched(t.sizeBytes)
			}
			added.pages[index] = p
		}
	}
	return added
}

// changeMap reads and writes the pages of a replica's map. It holds no state
// and is used by one writer at a time.
type changeMap struct {
	store Store
	lay   layout
	tag   uint64
}

func (m changeMap) pageOffset(index int64) int64 { return m.lay.changeMap.offset + index*mapPageBytes }

// sealPage fills in a page's header; its entries are in place.
func (m changeMap) sealPage(b []byte, index int64) {
	le := binary.LittleEndian
	clear(b[:mapHeaderBytes])
	le.PutUint32(b, mapMagic)
	le.PutUint32(b[4:], mapVersion)
	le.PutUint64(b[8:], uint64(index))
	le.PutUint64(b[16:], m.tag)
	le.PutUint32(b[28:], crc32c(b[:mapPageBytes]))
}

// checkMapPage says what is wrong with a page, nil when it is sound, and of
// which version it is. It leaves the page as it is.
func checkMapPage(b []byte, index int64, tag uint64) (version uint32, err error) {
	le := binary.LittleEndian
	if len(b) != mapPageBytes {
		return 0, fmt.Errorf("%d bytes, want %d", len(b), mapPageBytes)
	}
	if got := le.Uint32(b); got != mapMagic {
		return 0, fmt.Errorf("magic %#x, want %#x", got, uint32(mapMagic))
	}
	sum := crc32c(b[:28])
	sum = crc32cUpdate(sum, []byte{0, 0, 0, 0})
	sum = crc32cUpdate(sum, b[mapHeaderBytes:])
	if got := le.Uint32(b[28:]); got != sum {
		return 0, fmt.Errorf("checksum %#x, computed %#x", got, sum)
	}
	version = le.Uint32(b[4:])
	if version < mapOldest || version > mapVersion || le.Uint32(b[24:]) != 0 {
		return 0, fmt.Errorf("version %d, this program reads versions up to %d", version, mapVersion)
	}
	if i, t := le.Uint64(b[8:]), le.Uint64(b[16:]); i != uint64(index) || t != tag {
		return 0, fmt.Errorf("page %d of replica %x, want page %d of %x", i, t, index, tag)
	}
	return version, nil
}

// writeAll rewrites every page. Each chunk gets the epoch, but those that zeros
// (may be nil) knows as wholly zeroed and without data, which get 0.
func (m changeMap) writeAll(epoch uint64, zeros *touched) error {
	le := binary.LittleEndian
	chunks := mapChunks(m.lay.size)
	buf := make([]byte, min(m.lay.mapPageCount, mapBatchPages)*mapPageBytes)
	for first := int64(0); first < m.lay.mapPageCount; first += mapBatchPages {
		n := min(mapBatchPages, m.lay.mapPageCount-first)
		for index := first; index < first+n; index++ {
			b := buf[(index-first)*mapPageBytes:][:mapPageBytes]
			var p *touchedPage
			if zeros != nil {
				p = zeros.pages[index]
			}
			for i := range int64(mapPageEntries) {
				e := epoch
				if index*mapPageEntries+i >= chunks || p != nil && (p.all[i/64]&^p.data[i/64])>>(i%64)&1 != 0 {
					e = 0
				}
				le.PutUint64(b[mapHeaderBytes+8*i:], e)
			}
			m.sealPage(b, index)
		}
		if _, err := m.store.WriteAt(buf[:n*mapPageBytes], m.pageOffset(first)); err != nil {
			return fmt.Errorf("%s: change map at %d: %w", m.store.Name(), m.pageOffset(first), err)
		}
	}
	return nil
}

// update gives the epoch, if theirs is not later, to every chunk that was touched. It
// reports pages found damaged; all their chunks get the epoch.
func (m changeMap) update(t *touched, epoch uint64) (damaged []string, err error) {
	le := binary.LittleEndian
	indexes := make([]int64, 0, len(t.pages))
	for index := range t.pages {
		indexes = append(indexes, index)
	}
	slices.Sort(indexes)
	var buf []byte
	for len(indexes) > 0 {
		n := 1
		for n < len(indexes) && n < mapBatchPages && indexes[n] == indexes[0]+int64(n) {
			n++
		}
		if len(buf) < n*mapPageBytes {
			buf = make([]byte, n*mapPageBytes)
		}
		b, at := buf[:n*mapPageBytes], m.pageOffset(indexes[0])
		if _, err := m.store.ReadAt(b, at); err != nil {
			return damaged, fmt.Errorf("%s: change map at %d: %w", m.store.Name(), at, err)
		}
		for k, index := range indexes[:n] {
			page := b[k*mapPageBytes:][:mapPageBytes]
			version, err := checkMapPage(page, index, m.tag)
			if err != nil {
				damaged = append(damaged, fmt.Sprintf("change map page at %d: %s", m.pageOffset(index), err))
			}
			for i := range int64(mapPageEntries) {
				entry := page[mapHeaderBytes+8*i:]
				switch {
				case index*mapPageEntries+i >= mapChunks(m.lay.size):
					le.PutUint64(entry, 0)
				case err != nil:
					le.PutUint64(entry, epoch)
				case version < mapVersion:
					le.PutUint64(entry, uint64(mapEntry(le.Uint64(entry)).touch(epoch, false)))
				}
			}
			p := t.pages[index]
			for w := range p.data {
				for set := p.data[w] | p.zero[w] | p.same[w]; set != 0; set &= set - 1 {
					i := bits.TrailingZeros64(set)
					entry := page[mapHeaderBytes+8*(64*w+i):]
					le.PutUint64(entry, uint64(mapEntry(le.Uint64(entry)).touch(epoch, p.data[w]>>i&1 != 0)))
				}
			}
			m.sealPage(page, index)
		}
		if _, err := m.store.WriteAt(b, at); err != nil {
			return damaged, fmt.Errorf("%s: change map at %d: %w", m.store.Name(), at, err)
		}
		indexes = indexes[n:]
	}
	return damaged, nil
}

// changedSince lists the chunks that may have changed after an epoch, joined.
func (m changeMap) changedSince(epoch uint64) (out []Range, damaged []string, err error) {
	return m.ranges(func(e mapEntry, version uint32) bool { return version < mapVersion || e.epoch() > epoch })
}

// ranges lists the chunks whose entry, in a page of a version, is picked, joined; those of
// damaged pages always are.
func (m changeMap) ranges(pick func(e mapEntry, version uint32) bool) (out []Range, damaged []string, err error) {
	buf := make([]byte, min(m.lay.mapPageCount, mapBatchPages)*mapPageBytes)
	chunks := mapChunks(m.lay.size)
	for first := int64(0); first < m.lay.mapPageCount; first += mapBatchPages {
		n := min(mapBatchPages, m.lay.mapPageCount-first)
		if _, err := m.store.ReadAt(buf[:n*mapPageBytes], m.pageOffset(first)); err != nil {
			return nil, damaged, fmt.Errorf("%s: change map at %d: %w", m.store.Name(), m.pageOffset(first), err)
		}
		for index := first; index < first+n; index++ {
			b := buf[(index-first)*mapPageBytes:][:mapPageBytes]
			version, bad := checkMapPage(b, index, m.tag)
			if bad != nil {
				damaged = append(damaged, fmt.Sprintf("change map page at %d: %s", m.pageOffset(index), bad))
			}
			for i := range int64(mapPageEntries) {
				chunk := index*mapPageEntries + i
				if chunk >= chunks {
					break
				}
				if bad == nil && !pick(mapEntry(binary.LittleEndian.Uint64(b[mapHeaderBytes+8*i:])), version) {
					continue
				}
				r := Range{chunk * ChunkBytes, min(ChunkBytes, m.lay.size-chunk*ChunkBytes)}
				if k := len(out) - 1; k >= 0 && out[k].End() == r.Offset {
					out[k].Length += r.Length
				} else {
					out = append(out, r)
				}
			}
		}
	}
	return out, damaged, nil
}
