package protocol

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
)

// A frame is one piece of an epoch: the same bytes on the wire and in the
// journal. All numbers are little-endian.
//
//	 0        4    5    6     7    8         12        16
//	+--------+----+----+-----+----+---------+---------+----------------+
//	| "BFFR" | v=1|kind|codec| 0  | attempt | round   | epoch u64      |
//	+--------+----+----+-----+----+---------+---------+----------------+
//	 24               32        36        40          44          48
//	+----------------+---------+---------+-----------+-----------+---------
//	| offset u64     | length  | payload | payload   | header    | payload
//	| bytes          | bytes   | bytes   | crc32c    | crc32c    | bytes
//	+----------------+---------+---------+-----------+-----------+---------
//
// The header's checksum covers bytes 0 to 43. Offset and length are multiples
// of BlockSize; length counts uncompressed bytes. Zero and discard frames have
// no payload (and payload crc 0).
const (
	// FrameHeaderBytes is the size of a frame's header.
	FrameHeaderBytes = 48
	// MaxDataFrameBytes is the most a data frame may hold, uncompressed.
	MaxDataFrameBytes = 1 << 20
	// MaxZeroFrameBytes is the longest range one zero or discard frame covers.
	MaxZeroFrameBytes = 1 << 30
	// DefaultDataFrameBytes is where AppendFrames cuts data.
	DefaultDataFrameBytes = 256 << 10

	frameMagic   = 0x52464642 // "BFFR" read as a little-endian u32
	frameVersion = 1
)

// FrameKind says what a frame does to its range.
type FrameKind uint8

const (
	FrameData    FrameKind = 1 // the range holds the payload
	FrameZero    FrameKind = 2 // the range reads as zeros
	FrameDiscard FrameKind = 3 // the range is not needed; a replica makes it zeros
)

// ErrBadFrame is what every fault found in frames wraps.
var ErrBadFrame = errors.New("bad frame")

// castagnoli is the table of crc32c; it is never changed.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crc32c(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

func crc32cUpdate(sum uint32, b []byte) uint32 { return crc32.Update(sum, castagnoli, b) }

// FrameMeta is what all frames of one round share. For one block the highest
// (attempt, round) of an epoch counts, whatever the order of arrival; within a
// round that comes by one stream, the last.
type FrameMeta struct {
	Epoch   uint64
	Attempt uint32
	Round   uint32
}

// Frame is a decoded header. Header and Payload share memory with the bytes
// it was parsed from.
type Frame struct {
	FrameMeta
	Kind    FrameKind
	Codec   Codec
	Offset  int64 // bytes from the volume's start
	Length  int64 // bytes, uncompressed
	Header  []byte
	Payload []byte
}

// Range is what the frame covers.
func (f Frame) Range() Range { return Range{f.Offset, f.Length} }

func appendHeader(dst []byte, m FrameMeta, kind FrameKind, codec Codec, offset, length int64, payload []byte) []byte {
	at := len(dst)
	dst = binary.LittleEndian.AppendUint32(dst, frameMagic)
	dst = append(dst, frameVersion, byte(kind), byte(codec), 0)
	dst = binary.LittleEndian.AppendUint32(dst, m.Attempt)
	dst = binary.LittleEndian.AppendUint32(dst, m.Round)
	dst = binary.LittleEndian.AppendUint64(dst, m.Epoch)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(offset))
	dst = binary.LittleEndian.AppendUint32(dst, uint32(length))
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(payload)))
	dst = binary.LittleEndian.AppendUint32(dst, crc32c(payload))
	return binary.LittleEndian.AppendUint32(dst, crc32c(dst[at:]))
}

// AppendFrames appends to dst the frames that say 'the volume holds data at
// offset': zero frames for runs of zero blocks, data frames of at most
// DefaultDataFrameBytes for the rest, compressed by c (nil: not compressed)
// where that makes them smaller. Offset and len(data) are multiples of
// BlockSize; anything else is a mistake in the caller and panics.
func AppendFrames(dst []byte, m FrameMeta, offset int64, data []byte, c *Compressor) []byte {
	if offset < 0 || offset%BlockSize != 0 || len(data)%BlockSize != 0 {
		panic(fmt.Sprintf("protocol: frames of %d bytes at %d: not multiples of %d", len(data), offset, BlockSize))
	}
	for len(data) > 0 {
		n, zero := frameSpan(data)
		if zero {
			dst = AppendZeroFrames(dst, m, Range{offset, int64(n)})
		} else {
			dst = appendDataFrame(dst, m, offset, data[:n], c)
		}
		offset += int64(n)
		data = data[n:]
	}
	return dst
}

// frameSpan is how many bytes at the front of data one frame takes, and
// whether they are zeros.
func frameSpan(data []byte) (n int, zero bool) {
	zero = allZero(data[:BlockSize])
	n = BlockSize
	for n < len(data) && (zero || n < DefaultDataFrameBytes) && allZero(data[n:n+BlockSize]) == zero {
		n += BlockSize
	}
	return n, zero
}

// AppendZeroFrames appends the frames that make a range zeros.
func AppendZeroFrames(dst []byte, m FrameMeta, r Range) []byte {
	for r.Length > 0 {
		n := min(r.Length, MaxZeroFrameBytes)
		dst = appendHeader(dst, m, FrameZero, CodecNone, r.Offset, n, nil)
		r.Offset += n
		r.Length -= n
	}
	return dst
}

func appendDataFrame(dst []byte, m FrameMeta, offset int64, data []byte, c *Compressor) []byte {
	at := len(dst)
	var header [FrameHeaderBytes]byte
	dst = append(dst, header[:]...) // its place; filled in below
	codec := CodecNone
	if c != nil {
		dst, codec = c.appendTo(dst, data)
	}
	if codec == CodecNone {
		dst = append(dst[:at+FrameHeaderBytes], data...)
	}
	appendHeader(dst[:at], m, FrameData, codec, offset, int64(len(data)), dst[at+FrameHeaderBytes:])
	return dst
}

// allZero reports whether b holds only zeros: it does if its first byte is
// one and it equals itself moved on by one byte.
func allZero(b []byte) bool {
	return b[0] == 0 && bytes.Equal(b[:len(b)-1], b[1:])
}

// FrameReader walks over whole frames lying one after another. It allocates
// nothing: frames share memory with the bytes given.
type FrameReader struct {
	b  []byte
	at int
}

// NewFrameReader walks over b.
func NewFrameReader(b []byte) *FrameReader { return &FrameReader{b: b} }

// More reports whether bytes are left.
func (r *FrameReader) More() bool { return r.at < len(r.b) }

// Next checks and returns the next frame: header and payload checksums, known
// kind and codec, limits, alignment. Errors wrap ErrBadFrame and name the
// position; the reader then stays where it is.
func (r *FrameReader) Next() (Frame, error) { return r.next(Frame.checkPayload) }

// NextHeader is Next without the check of the payload's checksum, for one who
// leaves that to whoever stores it.
func (r *FrameReader) NextHeader() (Frame, error) {
	return r.next(func(Frame) error { return nil })
}

func (r *FrameReader) next(check func(Frame) error) (Frame, error) {
	f, err := parseFrame(r.b[r.at:])
	if err == nil {
		err = check(f)
	}
	if err != nil {
		return Frame{}, fmt.Errorf("%w at byte %d of %d: %s", ErrBadFrame, r.at, len(r.b), err)
	}
	r.at += FrameHeaderBytes + len(f.Payload)
	return f, nil
}

func parseFrame(b []byte) (Frame, error) {
	f, payload, err := parseHeader(b)
	if err != nil {
		return Frame{}, err
	}
	rest := b[FrameHeaderBytes:]
	if len(rest) < payload {
		return Frame{}, fmt.Errorf("payload of %d bytes, only %d left", payload, len(rest))
	}
	f.Payload = rest[:payload:payload]
	return f, nil
}

// parseHeader is the frame at the front of b without its payload, of which it
// returns the length.
func parseHeader(b []byte) (Frame, int, error) {
	bad := func(format string, args ...any) (Frame, int, error) { return Frame{}, 0, fmt.Errorf(format, args...) }
	if len(b) < FrameHeaderBytes {
		return bad("%d bytes left, a header has %d", len(b), FrameHeaderBytes)
	}
	h := b[:FrameHeaderBytes:FrameHeaderBytes]
	le := binary.LittleEndian
	if got := le.Uint32(h); got != frameMagic {
		return bad("magic %#x, want %#x", got, uint32(frameMagic))
	}
	if got, want := le.Uint32(h[44:]), crc32c(h[:44]); got != want {
		return bad("header checksum %#x, computed %#x", got, want)
	}
	if h[4] != frameVersion || h[7] != 0 {
		return bad("version %d (reserved %d), this program reads version %d", h[4], h[7], frameVersion)
	}
	f := Frame{
		FrameMeta: FrameMeta{Epoch: le.Uint64(h[16:]), Attempt: le.Uint32(h[8:]), Round: le.Uint32(h[12:])},
		Kind:      FrameKind(h[5]),
		Codec:     Codec(h[6]),
		Length:    int64(le.Uint32(h[32:])),
		Header:    h,
	}
	offset, payload := le.Uint64(h[24:]), int64(le.Uint32(h[36:]))
	limit := int64(MaxZeroFrameBytes)
	switch f.Kind {
	case FrameData:
		limit = MaxDataFrameBytes
		switch {
		case f.Codec > CodecZstd:
			return bad("unknown codec %d", f.Codec)
		case f.Codec == CodecNone && payload != f.Length, f.Codec != CodecNone && (payload == 0 || payload >= f.Length):
			return bad("payload of %d bytes for %d bytes with codec %d", payload, f.Length, f.Codec)
		}
	case FrameZero, FrameDiscard:
		if f.Codec != CodecNone || payload != 0 {
			return bad("kind %d with codec %d and %d payload bytes, want none", f.Kind, f.Codec, payload)
		}
	default:
		return bad("unknown kind %d", f.Kind)
	}
	if f.Length == 0 || f.Length%BlockSize != 0 || f.Length > limit {
		return bad("length %d, want a multiple of %d up to %d", f.Length, BlockSize, limit)
	}
	if offset%BlockSize != 0 || offset > uint64(1<<62) {
		return bad("offset %d, want a multiple of %d", offset, BlockSize)
	}
	f.Offset = int64(offset)
	return f, int(payload), nil
}

func (f Frame) checkPayload() error {
	if got, want := binary.LittleEndian.Uint32(f.Header[40:]), crc32c(f.Payload); got != want {
		return fmt.Errorf("payload checksum %#x, computed %#x (volume offset %d)", got, want, f.Offset)
	}
	return nil
}

// StreamSum is what one stream of an epoch carried, as its sender says: the
// number of frames and the SHA-256 over their headers in order.
type StreamSum struct {
	Frames uint64
	Digest [sha256.Size]byte
}

// StreamDigest adds up a StreamSum. It is for one goroutine at a time.
type StreamDigest struct {
	frames uint64
	sum    hash.Hash
}

// NewStreamDigest begins with no frames.
func NewStreamDigest() *StreamDigest { return &StreamDigest{sum: sha256.New()} }

// Clone is a digest that goes on separately.
func (d *StreamDigest) Clone() *StreamDigest {
	c, err := d.sum.(hash.Cloner).Clone()
	if err != nil {
		panic(fmt.Sprintf("protocol: SHA-256 can't be cloned: %v", err))
	}
	return &StreamDigest{d.frames, c}
}

// Add counts one frame by its header.
func (d *StreamDigest) Add(header []byte) {
	d.frames++
	d.sum.Write(header)
}

// AddFrames counts all frames of b, whole frames one after another as
// AppendFrames makes them.
func (d *StreamDigest) AddFrames(b []byte) error {
	for r := NewFrameReader(b); r.More(); {
		f, err := r.Next()
		if err != nil {
			return err
		}
		d.Add(f.Header)
	}
	return nil
}

// Sum is what was added so far.
func (d *StreamDigest) Sum() StreamSum {
	s := StreamSum{Frames: d.frames}
	d.sum.Sum(s.Digest[:0])
	return s
}
