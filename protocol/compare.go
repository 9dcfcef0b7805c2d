package protocol

import (
	"bytes"
	"fmt"
	"math/bits"
	"slices"

	"blockferry/proto"
)

// readFunc reads len(p) bytes at an offset, all or an error. What over touches is not
// what was read.
type readFunc func(p []byte, at int64) (over []*touched, err error)

// differences answers a Compare: which units differ from what read gives, and
// the finer checksums of those. Ranges are the question's, checked already. The second
// result is how many bytes were read.
func differences(h *Hasher, c *proto.Compare, ranges []Range, read readFunc) (*proto.Differences, int64, error) {
	d := &proto.Differences{Id: c.Id, Units: make([]byte, (len(c.UnitHashes)/HashBytes+7)/8)}
	buf := make([]byte, min(maxReadBytes, longest(ranges)))
	var total int64
	unit := 0
	for _, r := range ranges {
		for at := r.Offset; at < r.End(); {
			b := buf[:min(int64(len(buf)), r.End()-at)]
			over, err := read(b, at)
			if err != nil {
				return nil, 0, err
			}
			total += int64(len(b))
			for len(b) > 0 {
				n := min(UnitSize, len(b))
				place := Range{at, int64(n)}
				at += int64(n)
				if slices.ContainsFunc(over, func(t *touched) bool { return t.has(place) }) {
					// It is not known: no block has this checksum, so each counts as another.
					d.Units[unit/8] |= 1 << (unit % 8)
					d.BlockHashes = append(d.BlockHashes, make([]byte, n/BlockSize*HashBytes)...)
					unit++
					b = b[n:]
					continue
				}
				sum := h.Sum(b[:n])
				if !bytes.Equal(sum[:], c.UnitHashes[unit*HashBytes:(unit+1)*HashBytes]) {
					d.Units[unit/8] |= 1 << (unit % 8)
					d.BlockHashes = h.AppendSums(d.BlockHashes, b[:n], BlockSize)
				}
				unit++
				b = b[n:]
			}
		}
	}
	return d, total, nil
}

// maxReadBytes is the largest single read of a comparison; a multiple of
// UnitSize, so that units are not cut.
const maxReadBytes = 1 << 20

func longest(ranges []Range) int64 {
	var n int64
	for _, r := range ranges {
		n = max(n, r.Length)
	}
	return n
}

// question makes a Compare about ranges whose content lies in data, one range
// after another.
func question(h *Hasher, id uint64, ranges []Range, data []byte) *proto.Compare {
	c := &proto.Compare{Id: id}
	for _, r := range ranges {
		c.Offsets = append(c.Offsets, uint64(r.Offset))
		c.Lengths = append(c.Lengths, uint32(r.Length))
		c.UnitHashes = h.AppendSums(c.UnitHashes, data[:r.Length], UnitSize)
		data = data[r.Length:]
	}
	return c
}

// resolve says, ascending, which 4 KiB blocks of the question's ranges differ,
// joined to ranges. data is the question's. An answer that does not fit the
// question is an error.
func resolve(h *Hasher, ranges []Range, data []byte, d *proto.Differences) ([]Range, error) {
	var out []Range
	hashes := d.BlockHashes
	unit, units := 0, 0
	for _, r := range ranges {
		units += int((r.Length + UnitSize - 1) / UnitSize)
	}
	if len(d.Units) != (units+7)/8 {
		return nil, fmt.Errorf("the answer to comparison %d has %d bytes for %d units", d.Id, len(d.Units), units)
	}
	if units%8 != 0 && bits.Len8(d.Units[len(d.Units)-1]) > units%8 {
		return nil, fmt.Errorf("the answer to comparison %d names units beyond %d", d.Id, units)
	}
	for _, r := range ranges {
		for off := int64(0); off < r.Length; off += UnitSize {
			n := min(UnitSize, r.Length-off)
			if d.Units[unit/8]&(1<<(unit%8)) != 0 {
				blocks := int(n / BlockSize)
				if len(hashes) < blocks*HashBytes {
					return nil, fmt.Errorf("the answer to comparison %d is cut short", d.Id)
				}
				for b := range blocks {
					at := off + int64(b)*BlockSize
					sum := h.Sum(data[at : at+BlockSize])
					if !bytes.Equal(sum[:], hashes[b*HashBytes:(b+1)*HashBytes]) {
						out = appendRange(out, Range{r.Offset + at, BlockSize})
					}
				}
				hashes = hashes[blocks*HashBytes:]
			}
			unit++
		}
		data = data[r.Length:]
	}
	if len(hashes) > 0 {
		return nil, fmt.Errorf("the answer to comparison %d has %d bytes too many", d.Id, len(hashes))
	}
	return out, nil
}
