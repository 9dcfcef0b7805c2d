package blocktest

import (
	"math/rand/v2"
	"slices"

	"blockferry/blockdev"
)

// cachedWrite is one write: length bytes at offset, zeros when data is nil.
type cachedWrite struct {
	offset, length int64
	data           []byte
}

func (w cachedWrite) end() int64 { return w.offset + w.length }

func (w cachedWrite) apply(pages map[int64][]byte) {
	if w.data == nil {
		for _, b := range blocksIn(pages, w.offset, w.length) {
			delete(pages, b)
		}
		return
	}
	for at := int64(0); at < w.length; at += blockdev.BlockSize {
		pages[(w.offset+at)/blockdev.BlockSize] = w.data[at : at+blockdev.BlockSize]
	}
}

// applyTorn applies some of the write's sectors.
func (w cachedWrite) applyTorn(pages map[int64][]byte, rng *rand.Rand) {
	var blocks []int64
	if w.data == nil { // elsewhere it is all zeros already
		blocks = blocksIn(pages, w.offset, w.length)
	} else {
		for at := w.offset; at < w.end(); at += blockdev.BlockSize {
			blocks = append(blocks, at/blockdev.BlockSize)
		}
	}
	for _, b := range blocks {
		page := make([]byte, blockdev.BlockSize)
		copy(page, pages[b])
		for s := 0; s < blockdev.BlockSize; s += blockdev.SectorSize {
			if rng.IntN(2) == 0 {
				continue
			}
			sector := page[s : s+blockdev.SectorSize]
			if w.data == nil {
				clear(sector)
			} else {
				copy(sector, w.data[b*blockdev.BlockSize-w.offset+int64(s):])
			}
		}
		pages[b] = page
	}
}

// without is what is left of a write where another does not cover it.
func (w cachedWrite) without(other cachedWrite) []cachedWrite {
	if other.end() <= w.offset || w.end() <= other.offset {
		return []cachedWrite{w}
	}
	var left []cachedWrite
	if n := other.offset - w.offset; n > 0 {
		left = append(left, w.part(0, n))
	}
	if n := w.end() - other.end(); n > 0 {
		left = append(left, w.part(w.length-n, n))
	}
	return left
}

func (w cachedWrite) part(from, length int64) cachedWrite {
	p := cachedWrite{offset: w.offset + from, length: length}
	if w.data != nil {
		p.data = w.data[from : from+length]
	}
	return p
}

// blocksIn lists, in ascending order, the blocks of a range that have a page,
// in a time that does not grow with a range much larger than the pages.
func blocksIn(pages map[int64][]byte, offset, length int64) []int64 {
	first, end := offset/blockdev.BlockSize, (offset+length)/blockdev.BlockSize
	var blocks []int64
	if end-first > int64(len(pages)) {
		for b := range pages {
			if first <= b && b < end {
				blocks = append(blocks, b)
			}
		}
		slices.Sort(blocks)
		return blocks
	}
	for b := first; b < end; b++ {
		if pages[b] != nil {
			blocks = append(blocks, b)
		}
	}
	return blocks
}
