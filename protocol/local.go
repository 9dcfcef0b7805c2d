package protocol

import (
	"context"
	"errors"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"blockferry/proto"
)

// localMessages is how many messages are under way in each direction of a
// local stream; the window bounds their bytes.
const localMessages = 16

// LocalClient reaches a receiver of this process: the same calls and messages
// as over gRPC, handed over instead of encoded and copied. A message belongs
// to the other side once it was sent. Calls may be made from several
// goroutines at once.
func LocalClient(r *Receiver) proto.ReplicationClient { return localClient{r} }

type localClient struct{ receiver *Receiver }

func (c localClient) Replicate(ctx context.Context, _ ...grpc.CallOption) (grpc.BidiStreamingClient[proto.FromPrimary, proto.FromReplica], error) {
	s := newLocalStream[proto.FromPrimary, proto.FromReplica](ctx)
	go s.serve(func() error { return c.receiver.Replicate(localServer[proto.FromPrimary, proto.FromReplica]{s: s}) })
	return localCaller[proto.FromPrimary, proto.FromReplica]{s: s}, nil
}

func (c localClient) Restore(ctx context.Context, in *proto.RestoreRequest, _ ...grpc.CallOption) (grpc.ServerStreamingClient[proto.RestoreChunk], error) {
	s := newLocalStream[proto.RestoreRequest, proto.RestoreChunk](ctx)
	go s.serve(func() error {
		return c.receiver.Restore(in, localServer[proto.RestoreRequest, proto.RestoreChunk]{s: s})
	})
	return localCaller[proto.RestoreRequest, proto.RestoreChunk]{s: s}, nil
}

// Watch implements proto.ReplicationClient; a receiver has nothing to say of a
// volume's role.
func (c localClient) Watch(context.Context, *proto.WatchRequest, ...grpc.CallOption) (grpc.ServerStreamingClient[proto.Standing], error) {
	return nil, status.Error(codes.Unimplemented, "a receiver of this process is not watched")
}

// localStream is one call. The server's function ends it; the caller then
// still gets what was sent before.
type localStream[Up, Down any] struct {
	ctx    context.Context // the server's; ends with the caller's, and with the call
	cancel context.CancelFunc
	up     chan *Up
	closed chan struct{} // the caller sends no more
	once   sync.Once
	down   chan *Down
	ended  chan struct{} // closed after err is set; nothing is put into down any more
	err    error
}

func newLocalStream[Up, Down any](ctx context.Context) *localStream[Up, Down] {
	s := &localStream[Up, Down]{up: make(chan *Up, localMessages), down: make(chan *Down, localMessages),
		closed: make(chan struct{}), ended: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(ctx)
	return s
}

func (s *localStream[Up, Down]) serve(f func() error) {
	defer s.cancel()
	err := f()
	if err != nil {
		if _, ok := status.FromError(err); !ok {
			err = status.FromContextError(err).Err() // Unknown for all but a context's
		}
	}
	s.err = err
	close(s.ended)
}

// localCaller is the primary's end.
type localCaller[Up, Down any] struct {
	noMessages
	s *localStream[Up, Down]
}

func (c localCaller[Up, Down]) Context() context.Context     { return c.s.ctx }
func (c localCaller[Up, Down]) Header() (metadata.MD, error) { return nil, nil }
func (c localCaller[Up, Down]) Trailer() metadata.MD         { return nil }
func (c localCaller[Up, Down]) CloseSend() error {
	c.s.once.Do(func() { close(c.s.closed) })
	return nil
}

func (c localCaller[Up, Down]) Send(m *Up) error {
	select {
	case <-c.s.ended:
		return io.EOF // Recv says why
	default:
	}
	select {
	case <-c.s.ctx.Done():
		return io.EOF
	case c.s.up <- m:
		return nil
	}
}

func (c localCaller[Up, Down]) Recv() (*Down, error) {
	select {
	case m := <-c.s.down:
		return m, nil
	case <-c.s.ended:
	case <-c.s.ctx.Done():
	}
	select {
	case m := <-c.s.down: // sent before the end
		return m, nil
	default:
	}
	select {
	case <-c.s.ended:
	default: // the caller itself gave up; the server may still be busy
		return nil, status.FromContextError(c.s.ctx.Err()).Err()
	}
	if c.s.err == nil {
		return nil, io.EOF
	}
	return nil, c.s.err
}

// localServer is the receiver's end.
type localServer[Up, Down any] struct {
	noMessages
	s *localStream[Up, Down]
}

func (c localServer[Up, Down]) Context() context.Context     { return c.s.ctx }
func (c localServer[Up, Down]) SetHeader(metadata.MD) error  { return nil }
func (c localServer[Up, Down]) SendHeader(metadata.MD) error { return nil }
func (c localServer[Up, Down]) SetTrailer(metadata.MD)       {}

func (c localServer[Up, Down]) Send(m *Down) error {
	select {
	case <-c.s.ctx.Done():
		return status.FromContextError(c.s.ctx.Err()).Err()
	case c.s.down <- m:
		return nil
	}
}

func (c localServer[Up, Down]) Recv() (*Up, error) {
	select {
	case m := <-c.s.up:
		return m, nil
	case <-c.s.closed:
	case <-c.s.ctx.Done():
		return nil, status.FromContextError(c.s.ctx.Err()).Err()
	}
	select {
	case m := <-c.s.up: // sent before it was closed
		return m, nil
	default:
		return nil, io.EOF
	}
}

// noMessages is the untyped half of a gRPC stream, which nobody here uses.
type noMessages struct{}

var errUntyped = errors.New("a local stream takes typed messages only")

func (noMessages) SendMsg(any) error { return errUntyped }
func (noMessages) RecvMsg(any) error { return errUntyped }
