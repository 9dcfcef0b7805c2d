package protocol

import (
	"sync"
	"sync/atomic"

	"blockferry/proto"
)

// lent is memory that several hold at once, each by one reference. The last
// to let go gives it back; whoever reads it later finds something else there.
type lent struct {
	b    []byte
	refs atomic.Int32
	back func(*lent)
}

// poison, set by tests, is told memory that nobody may use any more.
var poison func([]byte)

// lend hands memory out with one reference.
func (m *lent) lend() *lent {
	m.refs.Store(1)
	return m
}

// hold is one more reference, for one who has one.
func (m *lent) hold() *lent {
	if m != nil && m.refs.Add(1) < 2 {
		panic("protocol: memory is held that was given back")
	}
	return m
}

// release gives a reference up; nil is nobody's memory.
func (m *lent) release() {
	if m == nil {
		return
	}
	switch n := m.refs.Add(-1); {
	case n < 0:
		panic("protocol: memory is given back twice")
	case n == 0:
		if poison != nil {
			poison(m.b)
		}
		m.back(m)
	}
}

// buffers is a fixed number of equal pieces of memory to lend. The one that
// came back last goes out first: it is in the processor's cache, and what is
// never needed is never made.
type buffers struct {
	size int
	room chan struct{} // holds one for each buffer that is not lent
	mu   sync.Mutex
	free []*lent
}

func newBuffers(count, size int) *buffers {
	s := &buffers{size: size, room: make(chan struct{}, count)}
	for range count {
		s.room <- struct{}{}
	}
	return s
}

// lend is for one who took from room.
func (s *buffers) lend() *lent {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.free)
	if n == 0 {
		return (&lent{b: make([]byte, s.size), back: s.back}).lend()
	}
	m := s.free[n-1]
	s.free = s.free[:n-1]
	return m.lend()
}

func (s *buffers) back(m *lent) {
	s.mu.Lock()
	s.free = append(s.free, m)
	s.mu.Unlock()
	s.room <- struct{}{}
}

// framePool is the memory of headers and packed payloads. What is not given
// back is the garbage collector's.
type framePool struct{ pool sync.Pool }

// frameMemoryBytes holds a whole message; most touch little of it.
const frameMemoryBytes = MaxFramesBytes + 64<<10

func (p *framePool) get() []byte {
	if b, ok := p.pool.Get().(*[]byte); ok {
		return (*b)[:0]
	}
	return make([]byte, 0, frameMemoryBytes)
}

func (p *framePool) put(b []byte) {
	if cap(b) >= frameMemoryBytes {
		if poison != nil {
			poison(b)
		}
		p.pool.Put(&b)
	}
}

// bundle is one Frames message in memory: whole frames in order. Their raw
// payloads may lie where they were read; all else lies in one piece of a
// framePool. It belongs to one goroutine at a time, the last of which frees it.
type bundle struct {
	frames []Frame
	bytes  int // on the wire
	memory []byte
	pool   *framePool // of memory; nil: the garbage collector's
	data   *lent      // what payloads lie in, of which the bundle has a reference; may be nil
	summed bool       // by this process, and data did not move since: its checksums need no second look
}

// message is how it is sent.
func (b *bundle) message() *proto.FromPrimary {
	return &proto.FromPrimary{Message: &proto.FromPrimary_Bundle{Bundle: b}}
}

// isFrames says that a message holds frames.
func isFrames(m *proto.FromPrimary) bool {
	_, ok := m.GetMessage().(*proto.FromPrimary_Bundle)
	return ok || m.GetFrames() != nil
}

// bundleOf is what a Frames message holds, however it came, with the frames'
// headers checked. The error wraps ErrBadFrame.
func bundleOf(m *proto.FromPrimary) (*bundle, error) {
	if w, ok := m.Message.(*proto.FromPrimary_Bundle); ok {
		return w.Bundle.(*bundle), nil
	}
	return parseBundle(m.GetFrames().GetData())
}

// parseBundle is of the frames in wire, whose memory it shares; with an error
// it is of those before the bad one.
func parseBundle(wire []byte) (*bundle, error) {
	b := &bundle{bytes: len(wire)}
	for r := NewFrameReader(wire); r.More(); {
		f, err := r.NextHeader()
		if err != nil {
			return b, err
		}
		b.frames = append(b.frames, f)
	}
	return b, nil
}

// free gives the memory back. A bundle that nobody frees is the garbage
// collector's, but for what it holds of data.
func (b *bundle) free() {
	if b.pool != nil {
		b.pool.put(b.memory)
	}
	b.data.release()
	b.frames, b.memory, b.pool, b.data = nil, nil, nil, nil
}

// add appends the frames that say 'the volume holds data at offset', cut as
// AppendFrames cuts. data lies in 'in', if that is not nil: raw payloads then
// stay there, and the bundle holds it.
func (b *bundle) add(m FrameMeta, offset int64, data []byte, c *Compressor, in *lent) {
	for len(data) > 0 {
		n, zero := frameSpan(data)
		at := len(b.memory)
		if zero {
			b.memory = AppendZeroFrames(b.memory, m, Range{offset, int64(n)})
			b.note(m, FrameZero, CodecNone, offset, n, at, b.memory[len(b.memory):])
		} else {
			b.addData(m, offset, data[:n], c, in)
		}
		b.bytes += len(b.memory) - at
		offset += int64(n)
		data = data[n:]
	}
}

func (b *bundle) addData(m FrameMeta, offset int64, data []byte, c *Compressor, in *lent) {
	at := len(b.memory)
	var header [FrameHeaderBytes]byte
	b.memory = append(b.memory, header[:]...) // its place
	codec, payload := CodecNone, data
	if c != nil {
		b.memory, codec = c.appendTo(b.memory, data)
	}
	switch {
	case codec != CodecNone:
		payload = b.memory[at+FrameHeaderBytes:]
	case in == nil:
		b.memory = append(b.memory[:at+FrameHeaderBytes], data...)
		payload = b.memory[at+FrameHeaderBytes:]
	default:
		// It keeps its capacity: a writer may go on with what lies behind it.
		b.memory = b.memory[:at+FrameHeaderBytes]
		b.bytes += len(data)
		if b.data == nil {
			b.data = in.hold()
		}
	}
	appendHeader(b.memory[:at], m, FrameData, codec, offset, int64(len(data)), payload)
	b.note(m, FrameData, codec, offset, len(data), at, payload)
}

// note adds the frame whose header stands in memory at 'at'. When memory has
// to grow, what was noted before stays where it was.
func (b *bundle) note(m FrameMeta, kind FrameKind, codec Codec, offset int64, length, at int, payload []byte) {
	b.frames = append(b.frames, Frame{FrameMeta: m, Kind: kind, Codec: codec, Offset: offset, Length: int64(length),
		Header: b.memory[at : at+FrameHeaderBytes : at+FrameHeaderBytes], Payload: payload})
}
