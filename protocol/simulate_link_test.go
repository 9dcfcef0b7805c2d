package protocol

import (
	"context"
	"fmt"
	"io"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	pb "google.golang.org/protobuf/proto"

	"blockferry/proto"
)

// simClient reaches a receiver by a link whose messages arrive by turns, and that can be
// cut: then some of what is under way still arrives, and each end gets to know in its own time.
type simClient struct {
	proto.ReplicationClient // Replicate alone is called
	s                       *simSchedule
	name                    string
	receiver                *Receiver
	wire                    bool // messages are encoded, as over gRPC
	stream                  *simStream
}

func (c *simClient) Replicate(ctx context.Context, _ ...grpc.CallOption) (grpc.BidiStreamingClient[proto.FromPrimary, proto.FromReplica], error) {
	t := &simStream{c: c, s: c.s, caller: ctx}
	t.ctx, t.cancel = context.WithCancel(context.Background())
	c.stream = t
	go func() {
		err := c.receiver.Replicate(simServer{s: t})
		t.s.mu.Lock()
		t.ended, t.err = true, err
		t.s.mu.Unlock()
		t.cancel()
	}()
	return simCaller{s: t}, nil
}

// simStream is one session. The schedule's mutex guards it.
type simStream struct {
	c      *simClient
	s      *simSchedule
	caller context.Context
	ctx    context.Context // the receiver's
	cancel context.CancelFunc

	up    []*proto.FromPrimary
	down  []*proto.FromReplica
	fresh []*proto.FromReplica // sent since the last turn
	lost  bool                 // it was cut: what is sent now does not arrive
	ended bool
	err   error // with which the receiver ended it
}

// cut cuts the link. The schedule's mutex is held.
func (t *simStream) cut() { t.lost = true }

// gone says that the caller is there no more, as the receiver will get to know.
func (t *simStream) gone() bool { return t.lost || t.caller.Err() != nil }

// order brings what goroutines of the receiver sent at the same time into an order.
func (t *simStream) order() {
	slices.SortStableFunc(t.fresh, func(a, b *proto.FromReplica) int {
		return int(simClass(a)) - int(simClass(b))
	})
	t.down = append(t.down, t.fresh...)
	t.fresh = nil
}

// simClass is of what the session, a comparison, and who waits for applies sends.
func simClass(m *proto.FromReplica) uint64 {
	switch {
	case m.GetDifferences() != nil:
		return 1 + m.GetDifferences().Id
	case m.GetApplied() != nil:
		return 1<<32 + m.GetApplied().Epoch
	}
	return 0
}

func simText(m any) string {
	switch m := m.(type) {
	case *proto.FromPrimary:
		if !isFrames(m) {
			return fmt.Sprintf("%T %s", m.GetMessage(), simBytes(m))
		}
		b, err := bundleOf(m)
		var all []byte
		for _, f := range b.frames {
			all = append(append(all, f.Header...), f.Payload...)
		}
		return fmt.Sprintf("%d frames, %08x %v", len(b.frames), simSum(all), err)
	case *proto.FromReplica:
		return fmt.Sprintf("%T %s", m.GetMessage(), simBytes(m))
	}
	return "none"
}

func simBytes(m pb.Message) string {
	b, err := pb.MarshalOptions{Deterministic: true}.Marshal(m)
	return fmt.Sprintf("%08x %v", simSum(b), err)
}

// simCaller is the primary's end.
type simCaller struct {
	noMessages
	s *simStream
}

func (c simCaller) Context() context.Context     { return c.s.caller }
func (c simCaller) Header() (metadata.MD, error) { return nil, nil }
func (c simCaller) Trailer() metadata.MD         { return nil }
func (c simCaller) CloseSend() error             { return nil }

func (c simCaller) Send(m *proto.FromPrimary) error {
	t := c.s
	if t.c.wire {
		var err error
		if m, err = simEncode(m); err != nil {
			return err
		}
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if !t.lost && !t.ended { // else Recv says so
		t.up = append(t.up, m)
	}
	return nil
}

// simEncode is what arrives when m was sent over gRPC.
func simEncode(m *proto.FromPrimary) (*proto.FromPrimary, error) {
	wire, err := frameCodec{}.Marshal(m)
	if err != nil {
		return nil, err
	}
	b := wire.Materialize()
	wire.Free()
	out := new(proto.FromPrimary)
	return out, frameCodec{}.Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, out)
}

func (c simCaller) Recv() (m *proto.FromReplica, err error) {
	t := c.s
	t.s.turn(&simTurn{who: t.c.name + " primary receives",
		ready: func() bool {
			t.order()
			return len(t.down) > 0 || t.ended || t.gone()
		},
		do: func() string {
			switch {
			case t.gone() && (len(t.down) == 0 || t.s.rng.IntN(4) == 0):
				if err = t.caller.Err(); err == nil {
					err = errSimCut
				}
			case len(t.down) > 0:
				m, t.down = t.down[0], t.down[1:]
			case t.err != nil:
				err = t.err
			default:
				err = io.EOF
			}
			return fmt.Sprintf("%s, %v", simText(m), err)
		}})
	return m, err
}

// simServer is the receiver's end.
type simServer struct {
	noMessages
	s *simStream
}

func (c simServer) Context() context.Context     { return c.s.ctx }
func (c simServer) SetHeader(metadata.MD) error  { return nil }
func (c simServer) SendHeader(metadata.MD) error { return nil }
func (c simServer) SetTrailer(metadata.MD)       {}

func (c simServer) Send(m *proto.FromReplica) error {
	t := c.s
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if err := t.ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	if !t.lost {
		t.fresh = append(t.fresh, m)
	}
	return nil
}

func (c simServer) Recv() (m *proto.FromPrimary, err error) {
	t := c.s
	t.s.turn(&simTurn{who: t.c.name + " replica receives",
		ready: func() bool { return len(t.up) > 0 || t.ended || t.gone() },
		do: func() string {
			switch {
			case t.ended:
				err = context.Canceled
			case t.gone() && (len(t.up) == 0 || t.s.rng.IntN(4) == 0):
				err = status.Error(codes.Unavailable, errSimCut.Error())
				if t.s.rng.IntN(2) == 0 { // else what has come is looked at first
					t.cancel()
				}
			default:
				m, t.up = t.up[0], t.up[1:]
			}
			return fmt.Sprintf("%s, %v", simText(m), err)
		}})
	return m, err
}
