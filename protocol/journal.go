package protocol

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// The journal is a ring of segments. A segment has a logical offset that only
// grows; its physical place is this modulo the ring's length, and it may run
// over the ring's end. Each is a header of 4 KiB and a body, padded to 4 KiB;
// the next begins behind it. Little-endian:
//
//	 0  magic "BFJSEGM1"     8  version u32 = 1    12  crc32c of the header with this field 0
//	16  tag of the replica  24  sequence u64       32  logical offset u64
//	40  epoch u64           48  attempt u32        52  kind u8: 1 frames, 2 commit, 3 spill; 3 zeros
//	56  chain u32: header crc32c of the segment before
//	60  body length u32     64  body crc32c        68  frames u32
//	72  lowest round u32    76  highest round u32  80  zero to 4095
//
// The body of a frames segment is whole frames as they came (frame.go). A spill
// segment says that the epoch has more of them in the spill file (spill.go); its
// commit is the next. The body of a commit segment:
//
//	 0  frames of the epoch u64     8  segments of the epoch u64, without this one, with those in the spill file
//	16  cut, wall clock, ns u64    24  flags u32: 1 full      28  streams u16   30  lineage points u16
//	32  per stream: frames u64, SHA-256 [32]; then per point: generation [16], last epoch u64
//
// The chain makes a segment that was lost under a stale one of an earlier
// attempt visible: the superblock names the last segment's checksum.
const (
	segHeaderBytes = 4096
	// A body holds at least one frame of the largest size.
	segMaxBody     = MaxDataFrameBytes + 4096
	segMaxBytes    = segHeaderBytes + segMaxBody
	segMagic       = 0x314d4745534a4642 // "BFJSEGM1" read as a little-endian u64
	segVersion     = 1
	segFrames      = 1
	segCommit      = 2
	segSpill       = 3
	commitMaxBytes = 2 * 4096 // of a commit segment, header included
	journalWriters = 4        // segments being written at once
)

// segment is a decoded segment header.
type segment struct {
	at         cursor
	epoch      uint64
	attempt    uint32
	kind       uint8
	bodyLen    int
	bodyCRC    uint32
	frames     uint32
	minRound   uint32
	maxRound   uint32
	headerCRC  uint32
	bodyOffset int64 // on the device, for messages
}

func (s segment) bytes() int64 { return segHeaderBytes + roundUp(int64(s.bodyLen), BlockSize) }

// next is where the following segment is.
func (s segment) next() cursor {
	return cursor{s.at.logical + uint64(s.bytes()), s.at.sequence + 1, s.headerCRC}
}

// encode fills in the header at the front of b and sets s.headerCRC.
func (s *segment) encode(b []byte, tag uint64) {
	le := binary.LittleEndian
	b = b[:segHeaderBytes]
	clear(b)
	le.PutUint64(b, segMagic)
	le.PutUint32(b[8:], segVersion)
	le.PutUint64(b[16:], tag)
	le.PutUint64(b[24:], s.at.sequence)
	le.PutUint64(b[32:], s.at.logical)
	le.PutUint64(b[40:], s.epoch)
	le.PutUint32(b[48:], s.attempt)
	b[52] = s.kind
	le.PutUint32(b[56:], s.at.chain)
	le.PutUint32(b[60:], uint32(s.bodyLen))
	le.PutUint32(b[64:], s.bodyCRC)
	le.PutUint32(b[68:], s.frames)
	le.PutUint32(b[72:], s.minRound)
	le.PutUint32(b[76:], s.maxRound)
	s.headerCRC = crc32c(b)
	le.PutUint32(b[12:], s.headerCRC)
}

// decodeSegment checks a header that must stand at the cursor.
func decodeSegment(b []byte, at cursor, tag uint64) (segment, error) {
	le := binary.LittleEndian
	if len(b) != segHeaderBytes {
		return segment{}, fmt.Errorf("%d bytes, want %d", len(b), segHeaderBytes)
	}
	if got := le.Uint64(b); got != segMagic {
		return segment{}, fmt.Errorf("magic %#x, want %#x", got, uint64(segMagic))
	}
	sum := crc32c(b[:12])
	sum = crc32cUpdate(sum, []byte{0, 0, 0, 0})
	sum = crc32cUpdate(sum, b[16:])
	if got := le.Uint32(b[12:]); got != sum {
		return segment{}, fmt.Errorf("header checksum %#x, computed %#x", got, sum)
	}
	if v := le.Uint32(b[8:]); v != segVersion {
		return segment{}, fmt.Errorf("version %d, this program reads version %d", v, segVersion)
	}
	s := segment{
		at:        cursor{le.Uint64(b[32:]), le.Uint64(b[24:]), le.Uint32(b[56:])},
		epoch:     le.Uint64(b[40:]),
		attempt:   le.Uint32(b[48:]),
		kind:      b[52],
		bodyLen:   int(le.Uint32(b[60:])),
		bodyCRC:   le.Uint32(b[64:]),
		frames:    le.Uint32(b[68:]),
		minRound:  le.Uint32(b[72:]),
		maxRound:  le.Uint32(b[76:]),
		headerCRC: sum,
	}
	if t := le.Uint64(b[16:]); t != tag || s.at != at {
		return segment{}, fmt.Errorf("segment %+v of replica %x, want %+v of %x", s.at, t, at, tag)
	}
	if s.kind < segFrames || s.kind > segSpill || s.bodyLen <= 0 || s.bodyLen > segMaxBody {
		return segment{}, fmt.Errorf("kind %d with a body of %d bytes", s.kind, s.bodyLen)
	}
	return s, nil
}

// commitRecord is the body of a commit segment.
type commitRecord struct {
	frames   uint64
	segments uint64
	cutNanos int64
	full     bool
	streams  []StreamSum
	lineage  Lineage
}

func (c *commitRecord) append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint64(b, c.frames)
	b = le.AppendUint64(b, c.segments)
	b = le.AppendUint64(b, uint64(c.cutNanos))
	var flags uint32
	if c.full {
		flags = 1
	}
	b = le.AppendUint32(b, flags)
	b = le.AppendUint16(b, uint16(len(c.streams)))
	b = le.AppendUint16(b, uint16(len(c.lineage)))
	for _, s := range c.streams {
		b = append(le.AppendUint64(b, s.Frames), s.Digest[:]...)
	}
	for _, p := range c.lineage {
		b = appendPosition(b, p)
	}
	return b
}

func decodeCommit(b []byte) (*commitRecord, error) {
	le := binary.LittleEndian
	if len(b) < 32 {
		return nil, fmt.Errorf("commit record of %d bytes, want at least 32", len(b))
	}
	flags, streams, points := le.Uint32(b[24:]), int(le.Uint16(b[28:])), int(le.Uint16(b[30:]))
	if want := 32 + 40*streams + 24*points; streams > MaxStreams || points > MaxGenerations || flags > 1 || len(b) != want {
		return nil, fmt.Errorf("commit record of %d bytes with %d streams, %d points and flags %#x", len(b), streams, points, flags)
	}
	c := &commitRecord{frames: le.Uint64(b), segments: le.Uint64(b[8:]), cutNanos: int64(le.Uint64(b[16:])), full: flags == 1}
	b = b[32:]
	for range streams {
		s := StreamSum{Frames: le.Uint64(b)}
		copy(s.Digest[:], b[8:])
		c.streams = append(c.streams, s)
		b = b[40:]
	}
	for range points {
		c.lineage = append(c.lineage, readPosition(b))
		b = b[24:]
	}
	if len(c.lineage) == 0 {
		return nil, fmt.Errorf("commit record without a position")
	}
	return c, c.lineage.Check()
}

// ring maps logical offsets to the device.
type ring struct {
	store Store
	area  area
	tag   uint64
	spill bool // it is the segments of a spill file
	// spilled opens the spill file with a UUID, for readers of whole epochs; nil when there can be none
	spilled func(spill [16]byte) (ring, error)
}

// place is where on the device a logical offset is.
func (r ring) place(logical uint64) int64 {
	return r.area.offset + int64(logical%uint64(r.area.length))
}

// each calls do for the one or two stretches of the device that a piece of the ring takes.
func (r ring) each(b []byte, logical uint64, do func([]byte, int64) (int, error)) error {
	for len(b) > 0 {
		at := r.place(logical)
		n := min(int64(len(b)), r.area.offset+r.area.length-at)
		if _, err := do(b[:n], at); err != nil {
			if r.spill {
				return fmt.Errorf("%w %s at %d: %w", ErrSpill, r.store.Name(), at, err)
			}
			return fmt.Errorf("%s: journal at %d: %w", r.store.Name(), at, err)
		}
		b = b[n:]
		logical += uint64(n)
	}
	return nil
}

func (r ring) write(b []byte, logical uint64) error { return r.each(b, logical, r.store.WriteAt) }
func (r ring) read(b []byte, logical uint64) error {
	return r.each(b, logical, func(b []byte, at int64) (int, error) {
		n, err := r.store.ReadAt(b, at)
		if err != nil && at <= r.store.Size()-int64(len(b)) && !errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: %w", ErrUnreadable, err)
		}
		return n, err
	})
}

// rewrite writes again what is read between two logical offsets.
func (r ring) rewrite(from, to uint64) error {
	buf := make([]byte, min(to-from, segMaxBytes))
	for from < to {
		b := buf[:min(to-from, uint64(len(buf)))]
		if err := r.read(b, from); err != nil {
			return err
		}
		if err := r.write(b, from); err != nil {
			return err
		}
		from += uint64(len(b))
	}
	return nil
}

// readHeader reads and checks the header of the segment at the cursor.
func (r ring) readHeader(at cursor) (segment, error) {
	b := make([]byte, segHeaderBytes)
	if err := r.read(b, at.logical); err != nil {
		return segment{}, err
	}
	s, err := decodeSegment(b, at, r.tag)
	if err != nil {
		return segment{}, fmt.Errorf("%s: journal segment at %d: %w", r.store.Name(), r.place(at.logical), err)
	}
	s.bodyOffset = r.place(at.logical + segHeaderBytes)
	return s, nil
}

// readBody reads and checks a segment's body, into buf if that is large enough.
func (r ring) readBody(s segment, buf []byte) ([]byte, error) {
	need := roundUp(int64(s.bodyLen), BlockSize)
	if int64(cap(buf)) < need {
		buf = make([]byte, need)
	}
	b := buf[:need]
	if err := r.read(b, s.at.logical+segHeaderBytes); err != nil {
		return nil, err
	}
	b = b[:s.bodyLen]
	if got := crc32c(b); got != s.bodyCRC {
		return nil, fmt.Errorf("%s: journal segment at %d: body checksum %#x, computed %#x",
			r.store.Name(), r.place(s.at.logical), s.bodyCRC, got)
	}
	return b, nil
}

// segmentWriter writes one epoch's segments, a few at a time. It is for one
// goroutine; its memory is journalWriters+1 segments.
type segmentWriter struct {
	ring ring
	seg  segment // being filled
	buf  []byte  // header and body of seg
	next cursor
	done uint64 // segments handed to the writers
	back ring   // once the epoch goes on in the spill file: the journal,
	hole cursor // the place of the marker there,
	from cursor // and the first segment in the spill file
	free chan []byte
	runs *sync.Pool // what free's memory comes from
	wg   sync.WaitGroup
	mu   sync.Mutex
	err  error
}

func newSegmentWriter(r ring, at cursor, epoch uint64, attempt uint32, runs *sync.Pool) *segmentWriter {
	w := &segmentWriter{ring: r, next: at, runs: runs, free: make(chan []byte, journalWriters+1)}
	w.seg = segment{epoch: epoch, attempt: attempt}
	for range journalWriters + 1 {
		w.free <- nil // allocated when it is first needed
	}
	return w
}

func (w *segmentWriter) fault() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// endAfter is where the ring would be written to if n more bytes came.
func (w *segmentWriter) endAfter(n int) uint64 {
	if body := w.bodyLen(); body+n <= segMaxBody {
		return w.next.logical + segHeaderBytes + uint64(roundUp(int64(body+n), BlockSize))
	} else {
		return w.next.logical + 2*segHeaderBytes + uint64(roundUp(int64(body), BlockSize)+roundUp(int64(n), BlockSize))
	}
}

func (w *segmentWriter) bodyLen() int { return max(0, len(w.buf)-segHeaderBytes) }

// add appends one frame, as many bytes as it has. The caller has made sure
// that there is room in the ring.
func (w *segmentWriter) add(f Frame) error {
	n := FrameHeaderBytes + len(f.Payload)
	if w.buf != nil && w.bodyLen()+n > segMaxBody {
		if err := w.seal(segFrames); err != nil {
			return err
		}
	}
	w.start()
	if w.seg.frames == 0 {
		w.seg.minRound, w.seg.maxRound = f.Round, f.Round
	}
	w.seg.minRound, w.seg.maxRound = min(w.seg.minRound, f.Round), max(w.seg.maxRound, f.Round)
	w.seg.frames++
	w.buf = append(append(w.buf, f.Header...), f.Payload...)
	return nil
}

func (w *segmentWriter) start() {
	if w.buf != nil {
		return
	}
	b := <-w.free
	if b == nil {
		b = *w.runs.Get().(*[]byte)
	}
	w.buf = b[:segHeaderBytes]
	w.seg = segment{epoch: w.seg.epoch, attempt: w.seg.attempt}
}

// seal hands the segment being filled to a writer.
func (w *segmentWriter) seal(kind uint8) error {
	if w.buf == nil {
		return w.fault()
	}
	s := &w.seg
	s.at, s.kind = w.next, kind
	s.bodyLen = len(w.buf) - segHeaderBytes
	s.bodyCRC = crc32c(w.buf[segHeaderBytes:])
	s.encode(w.buf, w.ring.tag)
	used := len(w.buf)
	b := w.buf[:s.bytes()]
	clear(b[used:])
	w.buf, w.next = nil, s.next()
	w.done++
	at, to := s.at.logical, w.ring
	w.wg.Go(func() {
		if err := to.write(b, at); err != nil {
			w.mu.Lock()
			if w.err == nil {
				w.err = err
			}
			w.mu.Unlock()
		}
		w.free <- b[:cap(b)]
	})
	return w.fault()
}

// divert lets the epoch go on in the spill file.
func (w *segmentWriter) divert(to ring) error {
	if err := w.seal(segFrames); err != nil {
		return err
	}
	w.back, w.hole = w.ring, w.next
	w.from = cursor{0, w.next.sequence, w.next.chain}
	w.ring, w.next = to, w.from
	return nil
}

// revert ends the part in the spill file, when it is written (not flushed).
// What follows goes to the journal again, first the marker.
func (w *segmentWriter) revert() (spillPart, error) {
	err := w.seal(segFrames)
	w.wait()
	if err == nil {
		err = w.fault()
	}
	p := spillPart{first: w.from, end: w.next}
	w.ring, w.next = w.back, w.hole
	return p, err
}

// mark adds the marker for the part in the spill file.
func (w *segmentWriter) mark(p spillPart) error {
	w.start()
	w.buf = p.append(w.buf)
	return w.seal(segSpill)
}

// commit seals what is left, adds the commit segment and waits until all is
// written (not flushed).
func (w *segmentWriter) commit(c commitRecord) error {
	if err := w.seal(segFrames); err != nil {
		return err
	}
	c.segments = w.done
	w.start()
	w.buf = c.append(w.buf)
	err := w.seal(segCommit)
	w.wait()
	if err == nil {
		err = w.fault()
	}
	return err
}

// wait returns when no writer is at work.
func (w *segmentWriter) wait() { w.wg.Wait() }

// end waits and gives the memory back; the writer must not be used afterwards.
func (w *segmentWriter) end() {
	w.wait()
	if w.buf != nil {
		w.free <- w.buf[:cap(w.buf)]
	}
	close(w.free)
	for b := range w.free {
		if b != nil {
			w.runs.Put(&b)
		}
	}
}
