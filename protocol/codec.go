package protocol

import (
	"encoding/binary"
	"errors"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // what frameCodec leaves to it
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/mem"

	"blockferry/proto"
)

// ServerOptions are what a gRPC server needs for the Replication service:
// messages of up to MaxMessageBytes, frames taken over with one copy, and
// room for a fast network. Its other services work as ever. The memory of
// frames is bounded by how many messages a session has in hand, about a dozen
// of MaxFramesBytes.
func ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ForceServerCodecV2(frameCodec{}), grpc.MaxRecvMsgSize(MaxMessageBytes),
		grpc.ReadBufferSize(wireBufferBytes), grpc.WriteBufferSize(wireBufferBytes),
		grpc.InitialWindowSize(wireWindowBytes), grpc.InitialConnWindowSize(wireWindowBytes),
		experimental.BufferPool(wirePool{}),
	}
}

// DialOptions are the same for a client of it.
func DialOptions() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessageBytes)),
		grpc.WithReadBufferSize(wireBufferBytes), grpc.WithWriteBufferSize(wireBufferBytes),
		grpc.WithInitialWindowSize(wireWindowBytes), grpc.WithInitialConnWindowSize(wireWindowBytes),
	}
}

const (
	wireBufferBytes = 128 << 10
	wireWindowBytes = 4 << 20
)

// wirePool keeps the memory of the wire's own pieces without making them zeros
// each time, as gRPC's does.
type wirePool struct{}

// wirePieceBytes is what gRPC cuts messages into.
const wirePieceBytes = 16 << 10

var wirePieces = sync.Pool{New: func() any { b := make([]byte, wirePieceBytes); return &b }}

func (wirePool) Get(n int) *[]byte {
	if n > wirePieceBytes || n <= wirePieceBytes/4 {
		return mem.DefaultBufferPool().Get(n)
	}
	b := wirePieces.Get().(*[]byte)
	*b = (*b)[:n]
	return b
}

func (wirePool) Put(b *[]byte) {
	if cap(*b) != wirePieceBytes {
		mem.DefaultBufferPool().Put(b)
		return
	}
	wirePieces.Put(b)
}

// frameCodec is protobuf's codec, but for frames: their payloads go out from
// where they were read, and come in to where they can be written from.
type frameCodec struct{}

// Name is that of protobuf: on the wire both are the same.
func (frameCodec) Name() string { return "proto" }

var protobuf = encoding.GetCodecV2("proto")

// The two fields around the bytes of frames: FromPrimary.frames, Frames.data.
const (
	tagFrames = 3<<3 | 2
	tagData   = 1<<3 | 2
)

// Marshal implements encoding.CodecV2. A bundle is gRPC's from then on.
func (frameCodec) Marshal(v any) (mem.BufferSlice, error) {
	m, ok := v.(*proto.FromPrimary)
	if !ok {
		return protobuf.Marshal(v)
	}
	w, ok := m.Message.(*proto.FromPrimary_Bundle)
	if !ok {
		return protobuf.Marshal(v)
	}
	b := w.Bundle.(*bundle)
	inner := binary.AppendUvarint([]byte{tagData}, uint64(b.bytes))
	head := binary.AppendUvarint([]byte{tagFrames}, uint64(len(inner)+b.bytes))
	out := mem.BufferSlice{mem.SliceBuffer(append(head, inner...))}
	// Each piece holds the memory it lies in; gRPC frees it when it was sent.
	memory := mem.NewBuffer(&b.memory, freeMemory{b.pool})
	defer memory.Free()
	var data mem.Buffer
	if b.data != nil {
		data = mem.NewBuffer(&b.data.b, freeLent{b.data})
		defer data.Free()
	}
	// Headers and packed payloads follow one another in memory.
	var from, to int
	for _, f := range b.frames {
		to += FrameHeaderBytes
		if at, ok := within(b.data, f.Payload); ok {
			out = append(out, memory.Slice(from, to), data.Slice(at, at+len(f.Payload)))
			from = to
		} else {
			to += len(f.Payload)
		}
	}
	if from < to {
		out = append(out, memory.Slice(from, to))
	}
	return out, nil
}

// within says where in data a payload begins that kept its capacity.
func within(data *lent, payload []byte) (at int, ok bool) {
	if data == nil || len(payload) == 0 {
		return 0, false
	}
	at = cap(data.b) - cap(payload)
	return at, at >= 0 && at+len(payload) <= len(data.b) && &data.b[at] == &payload[0]
}

// freeMemory and freeLent are what gRPC gives memory back to.
type (
	freeMemory struct{ pool *framePool }
	freeLent   struct{ data *lent }
)

func (f freeMemory) Get(n int) *[]byte { b := make([]byte, n); return &b }
func (f freeMemory) Put(b *[]byte)     { f.pool.put(*b) }
func (f freeLent) Get(n int) *[]byte   { b := make([]byte, n); return &b }
func (f freeLent) Put(*[]byte)         { f.data.release() }

// Unmarshal implements encoding.CodecV2. Frames worth it become a bundle;
// anything that is not as this program would send it is left to protobuf, and
// to those who say what is wrong with it.
func (frameCodec) Unmarshal(data mem.BufferSlice, v any) error {
	if m, ok := v.(*proto.FromPrimary); ok {
		r := data.Reader()
		b, err := readBundle(r)
		_ = r.Close()
		if err == nil {
			m.Message = &proto.FromPrimary_Bundle{Bundle: b}
			return nil
		}
	}
	return protobuf.Unmarshal(data, v)
}

var errNoBundle = errors.New("not frames in one message")

// smallFrames is below what a message is not worth memory of its own.
const smallFrames = 64 << 10

// What raw payloads lie in on arrival, and the rest of their messages.
var (
	arrived       sync.Pool // of *lent, frameMemoryBytes each
	arrivedFrames framePool
)

func arrivedMemory() *lent {
	m, ok := arrived.Get().(*lent)
	if !ok {
		m = &lent{b: make([]byte, frameMemoryBytes), back: func(m *lent) { arrived.Put(m) }}
	}
	return m.lend()
}

func readBundle(r *mem.Reader) (_ *bundle, err error) {
	if r.Remaining() < smallFrames || !field(r, tagFrames) || !field(r, tagData) || r.Remaining() > MaxFramesBytes {
		return nil, errNoBundle
	}
	b := &bundle{bytes: r.Remaining(), memory: arrivedFrames.get(), pool: &arrivedFrames, data: arrivedMemory()}
	defer func() {
		if err != nil {
			b.free()
		}
	}()
	at, end := 0, int64(-1) // of what lies in data, and of the volume's range it ends with
	for r.Remaining() > 0 {
		head, err := b.take(r, FrameHeaderBytes)
		if err != nil {
			return nil, err
		}
		f, n, err := parseHeader(head)
		switch {
		case err != nil:
			return nil, err
		case n > r.Remaining():
			return nil, errNoBundle
		case f.Kind == FrameData && f.Codec == CodecNone:
			// It keeps its capacity: the next may follow right behind it.
			f.Payload = b.data.b[at : at+n]
			if _, err := r.Read(f.Payload); err != nil {
				return nil, err
			}
			at, end = at+n, f.Range().End()
		case n > 0:
			if f.Payload, err = b.take(r, n); err != nil {
				return nil, err
			}
		case f.Length <= applyFill && f.Offset == end && at+int(f.Length)+r.Remaining() <= len(b.data.b):
			// A few zeros are cheaper written along than on their own.
			clear(b.data.b[at : at+int(f.Length)])
			at, end = at+int(f.Length), f.Range().End()
		}
		b.frames = append(b.frames, f)
	}
	return b, nil
}

// field skips the head of a field that takes all the rest.
func field(r *mem.Reader, tag byte) bool {
	if t, err := r.ReadByte(); err != nil || t != tag {
		return false
	}
	n, err := binary.ReadUvarint(r)
	return err == nil && n == uint64(r.Remaining())
}

// take reads n bytes into memory, which has room for a whole message.
func (b *bundle) take(r *mem.Reader, n int) ([]byte, error) {
	if n > r.Remaining() || n > cap(b.memory)-len(b.memory) {
		return nil, errNoBundle
	}
	at := len(b.memory)
	b.memory = b.memory[:at+n]
	_, err := r.Read(b.memory[at:])
	return b.memory[at : at+n : at+n], err
}
