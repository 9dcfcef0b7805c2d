package protocol

import (
	"context"
	"errors"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"blockferry/proto"
)

const (
	// restoreChunkBytes is how much one message of a restore describes as
	// data, restoreReads how many are read at once.
	restoreChunkBytes = 1 << 20
	restoreReads      = 8
)

// Restore reads a replica's committed image back; see the .proto file. The
// image is held: a primary may still send epochs, which wait in the journal.
func (r *Receiver) Restore(req *proto.RestoreRequest, stream proto.Replication_RestoreServer) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	name, err := r.admitRestore(ctx, req)
	if err != nil {
		return err
	}
	s, other, err := r.acquire(req.VolumeUuid, name)
	if err != nil {
		return status.Error(codes.NotFound, err.Error())
	}
	defer s.users.Done()
	defer context.AfterFunc(s.ctx, cancel)()
	if other {
		return status.Errorf(codes.FailedPrecondition, "replica %q holds volume %x, asked for is %x", s.key.name, s.key.volume, clip(string(req.VolumeUuid)))
	}
	codec := CodecNone
	if req.Codec != "" {
		if codec, err = ParseCodec(req.Codec); err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
	}
	var hasher *Hasher
	if len(req.HashKey) > 0 {
		if hasher, err = NewHasher(req.HashKey); err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
	}
	img, err := s.rep.Hold(ctx)
	switch {
	case errors.Is(err, ErrNotConsistent):
		return status.Errorf(codes.FailedPrecondition, "replica %q: %v", s.key.name, err)
	case err != nil:
		return status.Errorf(codes.Unavailable, "replica %q: %v", s.key.name, err)
	}
	defer img.Release()
	if req.Expected != nil {
		want, err := positionFromProto(req.Expected)
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		if want != img.Position() {
			return status.Errorf(codes.FailedPrecondition, "replica %q holds %v, the restore began with %v: begin it anew", s.key.name, img.Position(), want)
		}
	}
	from := int64(req.FromOffset)
	if req.FromOffset > uint64(s.size) || from%BlockSize != 0 {
		return status.Errorf(codes.InvalidArgument, "restore from %d in a volume of %d bytes: want a multiple of %d", req.FromOffset, s.size, BlockSize)
	}
	data, err := img.DataRanges()
	if err != nil {
		return status.Errorf(codes.DataLoss, "replica %q: %v", s.key.name, err)
	}
	pieces := restorePieces(data, from, s.size)
	var dataBytes int64
	for _, p := range pieces {
		if !p.zero {
			dataBytes += p.Length
		}
	}
	err = stream.Send(&proto.RestoreChunk{Message: &proto.RestoreChunk_Header{Header: &proto.RestoreHeader{
		Lineage: img.Lineage().Proto(), SizeBytes: uint64(s.size), DataBytes: uint64(dataBytes), CutUnixNanos: img.CutUnixNanos(),
	}}})
	if err != nil {
		return err
	}
	meta := FrameMeta{Epoch: img.Position().Epoch, Attempt: 1}
	reader := restoreReader{img: img, meta: meta, codec: codec, hasher: hasher, frames: &r.frames}
	_, local := stream.(localServer[proto.RestoreRequest, proto.RestoreChunk])
	var frames uint64
	err = inOrder(ctx, restoreReads, pieces, reader.read, func(reply restoreReply) error {
		if reply.err != nil {
			return status.Errorf(codes.DataLoss, "replica %q: %v", s.key.name, reply.err)
		}
		frames += reply.frames
		err := stream.Send(reply.chunk)
		if f := reply.chunk.GetFrames(); f != nil && !local {
			r.frames.put(f.Data) // encoded by now
		}
		return err
	})
	if err != nil {
		return err
	}
	return stream.Send(&proto.RestoreChunk{Message: &proto.RestoreChunk_End{End: &proto.RestoreEnd{Frames: frames}}})
}

// restorePiece is what one message of a restore describes.
type restorePiece struct {
	Range
	zero bool
}

// restorePieces covers the volume from an offset: data in chunks, what is
// between as zeros.
func restorePieces(data []Range, from, size int64) []restorePiece {
	var out []restorePiece
	zeros := func(end int64) {
		for from < end {
			n := min(end-from, MaxZeroFrameBytes)
			out = append(out, restorePiece{Range{from, n}, true})
			from += n
		}
	}
	for _, d := range cleanRanges(data, size) {
		zeros(d.Offset)
		for from < d.End() {
			n := min(d.End()-from, restoreChunkBytes)
			out = append(out, restorePiece{Range{from, n}, false})
			from += n
		}
	}
	zeros(size)
	return out
}

type restoreReply struct {
	chunk  *proto.RestoreChunk
	frames uint64
	err    error
}

// restoreReader makes the messages of one restore, in several goroutines.
type restoreReader struct {
	img     *Image
	meta    FrameMeta
	codec   Codec
	hasher  *Hasher // nil: the data itself is asked for
	frames  *framePool
	scratch sync.Pool // of *restoreScratch
}

type restoreScratch struct {
	data       []byte // restoreChunkBytes
	compressor *Compressor
}

func (r *restoreReader) read(p restorePiece) (reply restoreReply) {
	s, ok := r.scratch.Get().(*restoreScratch)
	if !ok {
		s = &restoreScratch{data: make([]byte, restoreChunkBytes)}
		if s.compressor, reply.err = NewCompressor(r.codec); reply.err != nil {
			return reply
		}
	}
	defer r.scratch.Put(s)
	if r.hasher != nil {
		sums := &proto.RestoreSums{Offset: uint64(p.Offset), Length: uint32(p.Length), Zero: p.zero}
		if !p.zero {
			buf := s.data[:p.Length]
			if _, err := r.img.ReadAt(buf, p.Offset); err != nil {
				return restoreReply{err: err}
			}
			sums.UnitHashes = r.hasher.AppendSums(nil, buf, UnitSize)
		}
		return restoreReply{chunk: &proto.RestoreChunk{Message: &proto.RestoreChunk_Sums{Sums: sums}}}
	}
	var out []byte
	if p.zero {
		out = AppendZeroFrames(nil, r.meta, p.Range)
	} else {
		buf := s.data[:p.Length]
		if _, err := r.img.ReadAt(buf, p.Offset); err != nil {
			return restoreReply{err: err}
		}
		out = AppendFrames(r.frames.get(), r.meta, p.Offset, buf, s.compressor)
	}
	reply.chunk = &proto.RestoreChunk{Message: &proto.RestoreChunk_Frames{Frames: &proto.Frames{Data: out}}}
	for fr := NewFrameReader(out); fr.More(); reply.frames++ {
		if _, err := fr.NextHeader(); err != nil { // only to count what was just made
			return restoreReply{err: err}
		}
	}
	return reply
}

// inOrder does work on every item, several at once, and takes the results in
// the items' order. At most parallel results wait to be taken.
func inOrder[T, R any](ctx context.Context, parallel int, items []T, work func(T) R, take func(R) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	queue := make(chan chan R, parallel-1)
	go func() {
		defer close(queue)
		for _, it := range items {
			c := make(chan R, 1)
			select {
			case queue <- c:
				go func() { c <- work(it) }()
			case <-ctx.Done():
				return
			}
		}
	}()
	var err error
	for c := range queue {
		r := <-c // also after an error: nothing may still be at work when we return
		if err == nil {
			if err = ctx.Err(); err == nil {
				err = take(r)
			}
		}
		if err != nil {
			cancel()
		}
	}
	if err == nil {
		err = ctx.Err()
	}
	return err
}
