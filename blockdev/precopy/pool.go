package precopy

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

const (
	// maxRead is the most that is read at once, in bytes.
	maxRead = 256 << 10
	// keptBytes of memory stay with the engine between cuts.
	keptBytes = 64 << 20
	// zeroRun bytes of zeros, from a piece's beginning on, are kept as an extent.
	zeroRun = 64 << 10
)

var noContent [zeroRun]byte

// piece is a range of the device that stands in memory from at on.
type piece struct{ offset, length, at int64 }

func (p piece) end() int64 { return p.offset + p.length }

// pool is the memory of a cut. It is mapped once and touched as it is used.
type pool struct {
	limit   int64
	memory  []byte
	used    int64            // handed out
	touched int64            // of memory, from the front: using it faults no page
	pieces  []piece          // ascending, disjoint
	late    []piece          // handed out since the last merge; each within no other
	zeros   blockdev.Extents // read as such; where a piece is, that counts
}

// reset forgets what the pool holds; much memory is given back.
func (p *pool) reset() error {
	p.pieces, p.late, p.zeros, p.used = p.pieces[:0], p.late[:0], nil, 0
	if p.touched > keptBytes {
		return p.free()
	}
	return nil
}

func (p *pool) free() error {
	if p.memory == nil {
		return nil
	}
	err := unix.Munmap(p.memory)
	p.memory, p.touched = nil, 0
	return err
}

// touch makes sure that so many bytes more can be handed out without a page
// fault, and of lists that they need not grow.
func (p *pool) touch(more int64, entries int) error {
	if p.memory == nil {
		var err error
		if p.memory, err = unix.Mmap(-1, 0, int(p.limit), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE); err != nil {
			return fmt.Errorf("%d bytes of memory: %w", p.limit, err)
		}
	}
	if cap(p.late)-len(p.late) < entries {
		p.late = slices.Grow(p.late, entries)
		clear(p.late[len(p.late):cap(p.late)])
	}
	for want := min(p.used+more, p.limit); p.touched < want; p.touched += blockdev.BlockSize {
		p.memory[p.touched] = 0
	}
	return nil
}

// place gives every byte of the extents, which are normal, its memory: that
// which it has, or new. It appends the reads that fill it to jobs, and makes
// neither jobs nor the pool's own lists longer than they have room for; nothing
// is allocated. It says what new memory was missing, in bytes; with any
// missing, or jobs without room (full), nothing counts as placed.
func (p *pool) place(extents []blockdev.Extent, jobs []job) (_ []job, missing int64, full bool) {
	used, late := p.used, len(p.late)
	i := 0
	if len(extents) > 0 {
		i = p.find(extents[0].Offset)
	}
	add := func(offset, length, at int64) {
		for length > 0 && !full {
			n := min(length, maxRead)
			if len(jobs) == cap(jobs) {
				full = true
				return
			}
			jobs = append(jobs, job{offset, at, n})
			offset, at, length = offset+n, at+n, length-n
		}
	}
	for _, e := range extents {
		for at := e.Offset; at < e.End() && !full; {
			for i < len(p.pieces) && p.pieces[i].end() <= at {
				i++
			}
			if i < len(p.pieces) && p.pieces[i].offset <= at {
				has := p.pieces[i]
				n := min(e.End(), has.end()) - at
				add(at, n, has.at+at-has.offset)
				at += n
				continue
			}
			n := e.End() - at
			if i < len(p.pieces) {
				n = min(n, p.pieces[i].offset-at)
			}
			switch {
			case p.used+n > p.touched:
				missing += n
			case len(p.late) == cap(p.late):
				full = true
			default:
				p.late = append(p.late, piece{at, n, p.used})
				add(at, n, p.used)
				p.used += n
			}
			at += n
		}
	}
	if missing > 0 || full {
		p.used, p.late = used, p.late[:late]
		return jobs[:0], missing, full
	}
	return jobs, 0, false
}

// find is the first piece that ends after a place.
func (p *pool) find(offset int64) int {
	low, high := 0, len(p.pieces)
	for low < high {
		if mid := (low + high) / 2; p.pieces[mid].end() > offset {
			high = mid
		} else {
			low = mid + 1
		}
	}
	return low
}

// news is how many bytes of the extents, which are normal, have no memory yet,
// in how many pieces, and how many reads all of them take.
func (p *pool) news(extents []blockdev.Extent) (bytes int64, pieces, reads int) {
	i := 0
	if len(extents) > 0 {
		i = p.find(extents[0].Offset)
	}
	for _, e := range extents {
		for at := e.Offset; at < e.End(); {
			for i < len(p.pieces) && p.pieces[i].end() <= at {
				i++
			}
			n, has := e.End()-at, false
			if i < len(p.pieces) {
				if has = p.pieces[i].offset <= at; has {
					n = min(n, p.pieces[i].end()-at)
				} else {
					n = min(n, p.pieces[i].offset-at)
				}
			}
			if !has {
				bytes, pieces = bytes+n, pieces+1
			}
			reads += int((n + maxRead - 1) / maxRead)
			at += n
		}
	}
	return bytes, pieces, reads
}

// merge sorts in what was handed out lately.
func (p *pool) merge() {
	if len(p.late) == 0 {
		return
	}
	p.pieces = append(p.pieces, p.late...)
	p.late = p.late[:0]
	slices.SortFunc(p.pieces, func(a, b piece) int { return cmp.Compare(a.offset, b.offset) })
}

// upTo cuts extents where so much of them, a multiple of 4096, may have no memory yet.
func (p *pool) upTo(extents blockdev.Extents, bytes int64) (part, rest blockdev.Extents) {
	for i, e := range extents {
		news, _, _ := p.news(blockdev.Extents{e})
		if news <= bytes {
			bytes -= news
			continue
		}
		part, rest = slices.Clone(extents[:i]), slices.Clone(extents[i:])
		if bytes > 0 {
			part = append(part, blockdev.Extent{Offset: e.Offset, Length: bytes})
			rest[0] = blockdev.Extent{Offset: e.Offset + bytes, Length: e.Length - bytes}
		}
		return part, rest
	}
	return extents, nil
}

// dropZeros takes back the memory of what was handed out since the last merge, all of
// which was read by now, and is zeros; the rest moves together. It says how much that was.
func (p *pool) dropZeros() (freed int64) {
	if len(p.late) == 0 {
		return 0
	}
	var zeros []blockdev.Extent
	var moved []piece
	at := p.late[0].at
	for _, e := range p.late {
		for from := int64(0); from < e.length; from += zeroRun {
			n := min(zeroRun, e.length-from)
			content := p.memory[e.at+from : e.at+from+n]
			if bytes.Equal(content, noContent[:]) {
				zeros = append(zeros, blockdev.Extent{Offset: e.offset + from, Length: n})
				freed += n
				continue
			}
			if at != e.at+from {
				copy(p.memory[at:], content)
			}
			if last := len(moved) - 1; last >= 0 && moved[last].end() == e.offset+from && from > 0 {
				moved[last].length += n
			} else {
				moved = append(moved, piece{e.offset + from, n, at})
			}
			at += n
		}
	}
	if freed > 0 {
		p.late, p.used = append(p.late[:0], moved...), at
		p.zeros = blockdev.Union(p.zeros, blockdev.Normalize(zeros))
	}
	return freed
}

// extents is what the pool holds.
func (p *pool) extents() []blockdev.Extent {
	list := make([]blockdev.Extent, len(p.pieces))
	for i, e := range p.pieces {
		list[i] = blockdev.Extent{Offset: e.offset, Length: e.length}
	}
	return blockdev.Union(p.zeros, blockdev.Normalize(list))
}

// readAt copies out of the pool; n is how much it had in one stretch.
func (p *pool) readAt(b []byte, offset int64) (n int) {
	for n < len(b) {
		at := offset + int64(n)
		i := p.find(at)
		if i < len(p.pieces) && p.pieces[i].offset <= at {
			e := p.pieces[i]
			n += copy(b[n:], p.memory[e.at+at-e.offset:e.at+e.length])
			continue
		}
		z := sort.Search(len(p.zeros), func(i int) bool { return p.zeros[i].End() > at })
		if z == len(p.zeros) || p.zeros[z].Offset > at {
			return n
		}
		end := min(p.zeros[z].End(), offset+int64(len(b)))
		if i < len(p.pieces) {
			end = min(end, p.pieces[i].offset)
		}
		clear(b[n : end-offset])
		n = int(end - offset)
	}
	return n
}
