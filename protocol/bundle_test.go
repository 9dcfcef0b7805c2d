package protocol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	pb "google.golang.org/protobuf/proto"

	"blockferry/blockdev/blocktest"
	"blockferry/proto"
)

// In every test of this package memory that was given back holds something
// else at once.
func init() { poison = func(b []byte) { fill(b, 0xdb) } }

// fill copies, as the race detector looks at a copy as a whole, and not byte by byte.
func fill(b []byte, with byte) {
	if len(b) > 0 {
		b[0] = with
	}
	for n := 1; n < len(b); n *= 2 {
		copy(b[n:], b[:n])
	}
}

// someData is text, noise and zeros in pieces of 4 to 300 KiB.
func someData(rng *rand.Rand, n int) []byte {
	out := make([]byte, 0, n+300<<10)
	for len(out) < n {
		piece := make([]byte, (1+rng.IntN(75))*BlockSize)
		switch rng.IntN(4) {
		case 0:
			copy(piece, bytes.Repeat([]byte("some text "), len(piece)/10))
		case 1, 2:
			for i := range piece {
				piece[i] = byte(rng.Uint32())
			}
		case 3: // zeros, mostly a few
			piece = piece[:min(len(piece), rng.IntN(20)*BlockSize)]
		}
		out = append(out, piece...)
	}
	return out[:n]
}

// lentOf is data in memory that counts how often it was given back.
func lentOf(data []byte, returned *atomic.Int32) *lent {
	return (&lent{b: bytes.Clone(data), back: func(*lent) { returned.Add(1) }}).lend()
}

// A bundle is on the wire what protobuf makes of the same frames, and comes
// out of it the same, however the network cuts it.
func TestBundleOnTheWire(t *testing.T) {
	meta := FrameMeta{Epoch: 7, Attempt: 2, Round: 3}
	for seed := range uint64(40) {
		rng := rand.New(rand.NewPCG(seed, 1))
		data := someData(rng, (1+rng.IntN(256))*BlockSize)
		codec := Codec(seed % 3)
		want := AppendFrames(nil, meta, 1<<20, data, compressor(t, codec))
		var returned atomic.Int32
		in := lentOf(data, &returned)
		b := &bundle{memory: (&framePool{}).get(), pool: &framePool{}}
		b.add(meta, 1<<20, in.b, compressor(t, codec), in)
		in.release()
		if b.bytes != len(want) {
			t.Fatalf("seed %d: a bundle of %d bytes, the frames have %d", seed, b.bytes, len(want))
		}
		lends := b.data != nil
		sent, err := frameCodec{}.Marshal(b.message())
		if err != nil {
			t.Fatal(err)
		}
		wire := sent.Materialize()
		if lends && returned.Load() != 0 {
			t.Fatalf("seed %d: memory was given back before it was sent", seed)
		}
		sent.Free()
		if returned.Load() != 1 {
			t.Fatalf("seed %d: memory was given back %d times after it was sent", seed, returned.Load())
		}
		plain, err := pb.Marshal(&proto.FromPrimary{Message: &proto.FromPrimary_Frames{Frames: &proto.Frames{Data: want}}})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(wire, plain) {
			t.Fatalf("seed %d: the wire has %d bytes other than protobuf's %d", seed, len(wire), len(plain))
		}
		var pieces mem.BufferSlice
		for rest := wire; len(rest) > 0; {
			n := min(len(rest), 1+rng.IntN(16<<10))
			pieces = append(pieces, mem.SliceBuffer(rest[:n]))
			rest = rest[n:]
		}
		var m proto.FromPrimary
		if err := (frameCodec{}).Unmarshal(pieces, &m); err != nil {
			t.Fatal(err)
		}
		_, taken := m.Message.(*proto.FromPrimary_Bundle)
		if large := len(wire) >= smallFrames; taken != large {
			t.Fatalf("seed %d: %d bytes arrived as a bundle: %v", seed, len(wire), taken)
		}
		got, err := bundleOf(&m)
		if err != nil {
			t.Fatal(err)
		}
		sameFrames(t, got, want)
		got.free()
	}
}

func sameFrames(t *testing.T, got *bundle, wire []byte) {
	t.Helper()
	want, err := parseBundle(wire)
	if err != nil {
		t.Fatal(err)
	}
	same := func(a, b Frame) bool {
		return a.FrameMeta == b.FrameMeta && a.Kind == b.Kind && a.Codec == b.Codec && a.Range() == b.Range() &&
			bytes.Equal(a.Header, b.Header) && bytes.Equal(a.Payload, b.Payload)
	}
	if got.bytes != want.bytes || !slices.EqualFunc(got.frames, want.frames, same) {
		t.Fatalf("%d frames of %d bytes came out other than the %d of %d that went in", len(got.frames), got.bytes, len(want.frames), want.bytes)
	}
}

func compressor(t testing.TB, codec Codec) *Compressor {
	t.Helper()
	c, err := NewCompressor(codec)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Whatever comes, the codec takes only what protobuf would read as the same
// frames, and leaves the rest to it.
func FuzzCodec(f *testing.F) {
	rng := rand.New(rand.NewPCG(3, 3))
	for _, codec := range []Codec{CodecNone, CodecS2} {
		wire, err := pb.Marshal(&proto.FromPrimary{Message: &proto.FromPrimary_Frames{Frames: &proto.Frames{
			Data: AppendFrames(nil, FrameMeta{1, 1, 1}, 0, someData(rng, 160<<10), compressor(f, codec))}}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire, uint16(5000))
	}
	f.Fuzz(func(t *testing.T, wire []byte, cut uint16) {
		at := min(int(cut), len(wire))
		var got, want proto.FromPrimary
		err := frameCodec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(wire[:at]), mem.SliceBuffer(wire[at:])}, &got)
		plain := pb.Unmarshal(wire, &want)
		w, ok := got.Message.(*proto.FromPrimary_Bundle)
		switch {
		case !ok && (err == nil) != (plain == nil):
			t.Fatalf("the codec says %v, protobuf %v", err, plain)
		case ok && plain != nil:
			t.Fatalf("the codec takes what protobuf refuses: %v", plain)
		case ok:
			b := w.Bundle.(*bundle)
			sameFrames(t, b, want.GetFrames().GetData())
			b.free()
		}
	})
}

// lateStore writes what memory holds a moment after it was asked to.
type lateStore struct {
	*blocktest.Memory
	writes atomic.Int64
}

func (s *lateStore) WriteAt(p []byte, off int64) (int, error) {
	s.writes.Add(1)
	time.Sleep(500 * time.Microsecond)
	return s.Memory.WriteAt(p, off)
}

// Memory is used again only when the last who reads it is done: the sender's
// by the replica of the same process and by gRPC, that of messages by the
// replica. At the end all of it is back.
func TestBulkMemory(t *testing.T) {
	const size = 24 << 20
	for _, way := range []string{"local", "wire", "plain-wire"} {
		for _, codec := range []Codec{CodecNone, CodecS2} {
			t.Run(fmt.Sprintf("%s/%v", way, codec), func(t *testing.T) {
				o := FormatOptions{VolumeUUID: testUUID, SizeBytes: size, JournalBytes: 2 * size}
				store := &lateStore{Memory: blocktest.NewMemory(o.NeededBytes())}
				rep, recv := servedReplicaOn(t, store, o)
				client := LocalClient(recv)
				switch way {
				case "wire":
					client = wireClient(t, recv, ServerOptions())
				case "plain-wire": // a replica without the codec
					client = wireClient(t, recv, []grpc.ServerOption{grpc.MaxRecvMsgSize(MaxMessageBytes)})
				}
				l, err := Connect(t.Context(), client, LinkConfig{VolumeUUID: testUUID, SizeBytes: size, Replica: "ebs",
					Codec: codec, BatchBytes: 1 << 20, Batches: 2}, line(1, 1))
				must(t, err)
				defer l.Close()
				for i, mode := range []Mode{ModeInPlace, ModeJournal} {
					epoch := uint64(i + 1)
					source := someData(rand.New(rand.NewPCG(1, epoch)), size)
					lineage := Lineage{{gen(1), epoch}}
					must(t, l.Begin(t.Context(), EpochStart{Epoch: epoch, Mode: mode, Full: true, Lineage: lineage}, false))
					_, err = l.SendRound(t.Context(), Round{Source: bytes.NewReader(source), Ranges: []Range{{0, size}}})
					must(t, err)
					must(t, l.Commit(t.Context(), lineage, 0))
					must(t, rep.WaitApplied(t.Context(), epoch))
					got := make([]byte, size)
					must(t, rep.ReadData(t.Context(), got, 0))
					if at := firstDifference(got, source); at >= 0 {
						t.Fatalf("mode %d: the replica differs from the source at %d: %#x instead of %#x", mode, at, got[at], source[at])
					}
				}
				// gRPC gives back what it sent some time after it was received.
				for end := time.Now().Add(10 * time.Second); len(l.buffers.room) < cap(l.buffers.room); time.Sleep(time.Millisecond) {
					if time.Now().After(end) {
						t.Fatalf("%d of %d buffers came back", len(l.buffers.room), cap(l.buffers.room))
					}
				}
			})
		}
	}
}

// pipeTo puts a bundle's frames into a volume full of nines, and returns what
// it then holds.
func pipeTo(t *testing.T, store *lateStore, b *bundle) []byte {
	t.Helper()
	got := bytes.Repeat([]byte{9}, int(store.Size()))
	_, err := store.Memory.WriteAt(got, 0)
	must(t, err)
	pipe := newWritePipe(store, 0, nil, newRunPool())
	for _, f := range b.frames {
		must(t, pipe.put(f, b.data))
	}
	must(t, pipe.letGo())
	b.free()
	must(t, pipe.drain())
	pipe.close()
	_, err = store.ReadAt(got, 0)
	must(t, err)
	return got
}

// overTheWire is the bundle as it arrives.
func overTheWire(t *testing.T, b *bundle) *bundle {
	t.Helper()
	sent, err := frameCodec{}.Marshal(b.message())
	must(t, err)
	wire := sent.Materialize()
	sent.Free()
	arrivedMemory().release() // that it goes to holds something else
	var m proto.FromPrimary
	must(t, frameCodec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(wire)}, &m))
	b, err = bundleOf(&m)
	must(t, err)
	if b.data == nil {
		t.Fatal("it did not arrive as a bundle")
	}
	return b
}

// What lies in one piece of memory is written in one piece, the few zeros in
// between too; many zeros are not written as data.
func TestRawRunsAreOneWrite(t *testing.T) {
	const size = 16 << 20
	for _, way := range []string{"local", "wire"} {
		data := make([]byte, 1<<20)
		fill(data, 1)
		clear(data[8*BlockSize : 16*BlockSize])                        // 32 KiB
		clear(data[100*BlockSize : 100*BlockSize+applyFill+BlockSize]) // more than applyFill
		var returned atomic.Int32
		in := lentOf(data, &returned)
		b := &bundle{memory: (&framePool{}).get(), pool: &framePool{}}
		b.add(FrameMeta{1, 1, 0}, BlockSize, in.b, nil, in)
		in.release()
		if way == "wire" {
			b = overTheWire(t, b)
		}
		store := &lateStore{Memory: blocktest.NewMemory(size)}
		got := pipeTo(t, store, b)
		want := bytes.Repeat([]byte{9}, size)
		copy(want[BlockSize:], data)
		if at := firstDifference(got, want); at >= 0 {
			t.Fatalf("%s: byte %d is %#x, want %#x", way, at, got[at], want[at])
		}
		if n := store.writes.Load(); n != 2 {
			t.Errorf("%s: %d writes, want one in front of the zeros and one behind", way, n)
		}
		if returned.Load() != 1 {
			t.Errorf("%s: memory was given back %d times", way, returned.Load())
		}
	}
}

// Frames that follow one another in the volume but not in memory, and zeros
// behind which something else lies, are not written as one piece.
func TestRawRunsEndWhereMemoryDoes(t *testing.T) {
	var returned atomic.Int32
	data := make([]byte, 8*BlockSize)
	for i := range data {
		data[i] = byte(1 + i/BlockSize)
	}
	in := lentOf(data, &returned)
	b := &bundle{}
	meta := FrameMeta{1, 1, 0}
	b.add(meta, 0, in.b[4*BlockSize:6*BlockSize], nil, in)
	b.add(meta, 2*BlockSize, in.b[:2*BlockSize], nil, in) // lies in front
	b.memory = AppendZeroFrames(b.memory, meta, Range{4 * BlockSize, BlockSize})
	b.note(meta, FrameZero, CodecNone, 4*BlockSize, BlockSize, len(b.memory)-FrameHeaderBytes, nil)
	b.add(meta, 5*BlockSize, in.b[6*BlockSize:], nil, in)
	in.release()
	got := pipeTo(t, &lateStore{Memory: blocktest.NewMemory(1 << 20)}, b)
	for i, want := range []byte{5, 6, 1, 2, 0, 7, 8, 9} {
		if got[i*BlockSize] != want || got[(i+1)*BlockSize-1] != want {
			t.Errorf("block %d holds %d, want %d", i, got[i*BlockSize], want)
		}
	}
}

// A bit that flips on the way is found on arrival, also where frames are
// written from where they arrived.
func TestBundleIsCheckedOnArrival(t *testing.T) {
	for _, mode := range []Mode{ModeInPlace, ModeJournal} {
		o := FormatOptions{VolumeUUID: testUUID, SizeBytes: 4 << 20, JournalBytes: 8 << 20}
		rep, _ := servedReplicaOn(t, blocktest.NewMemory(o.NeededBytes()), o)
		must(t, rep.Begin(t.Context(), EpochStart{Epoch: 1, Attempt: 1, Mode: mode, Full: true, Lineage: Lineage{{gen(1), 1}}}))
		var returned atomic.Int32
		in := lentOf(bytes.Repeat([]byte{1}, 1<<20), &returned)
		b := &bundle{memory: (&framePool{}).get(), pool: &framePool{}, summed: true}
		b.add(FrameMeta{1, 1, 0}, 0, in.b, nil, in)
		in.b[300<<10] ^= 4
		in.release()
		b = overTheWire(t, b)
		if err := rep.appendBundle(t.Context(), 0, b, nil); !errors.Is(err, ErrBadFrame) {
			t.Errorf("mode %d: %v", mode, err)
		}
		b.free()
	}
}

// servedReplicaOn is a replica on a blank store, and who serves it as "ebs".
func servedReplicaOn(t testing.TB, store Store, o FormatOptions) (*Replica, *Receiver) {
	t.Helper()
	if err := FormatReplica(store, o); err != nil {
		t.Fatal(err)
	}
	rep, err := OpenReplica(context.Background(), store, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	recv := NewReceiver(ReceiverConfig{WindowBytes: 8 << 20})
	if err := recv.Add("ebs", rep); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		recv.Close()
		_ = rep.Close()
	})
	return rep, recv
}

// wireClient reaches a receiver by TCP on this machine.
func wireClient(t testing.TB, recv *Receiver, options []grpc.ServerOption) proto.ReplicationClient {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(options...)
	proto.RegisterReplicationServer(server, recv)
	go func() { _ = server.Serve(lis) }()
	conn, err := grpc.NewClient(lis.Addr().String(), append(DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		server.Stop()
	})
	return proto.NewReplicationClient(conn)
}
