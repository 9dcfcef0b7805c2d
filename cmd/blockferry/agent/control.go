package agent

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"google.golang.org/grpc"

	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/status"
	"blockferry/proto"
	"blockferry/protocol"
)

// control answers the commands. Errors leave it with their exit code.
type control struct {
	proto.UnimplementedControlServer
	agent *Agent
}

func (c control) Status(_ context.Context, r *proto.StatusRequest) (*proto.StatusReply, error) {
	d := status.Document{Version: c.agent.options.Version}
	var err error
	if d.Volumes, err = c.agent.statuses(r.Volume); err != nil {
		return nil, err
	}
	line, err := json.Marshal(d)
	return &proto.StatusReply{Json: line}, err
}

func (c control) Up(ctx context.Context, r *proto.VolumeRequest) (*proto.Done, error) {
	return c.done(ctx, r, (*managed).up)
}

func (c control) Down(ctx context.Context, r *proto.VolumeRequest) (*proto.Done, error) {
	return c.done(ctx, r, func(v *managed, ctx context.Context) (string, error) { return v.down(ctx, r.Force) })
}

func (c control) Pause(ctx context.Context, r *proto.VolumeRequest) (*proto.Done, error) {
	return c.done(ctx, r, (*managed).pause)
}

func (c control) Resume(ctx context.Context, r *proto.VolumeRequest) (*proto.Done, error) {
	return c.done(ctx, r, (*managed).resume)
}

// GiveUp is about copies that are here, whoever writes their volume.
func (c control) GiveUp(_ context.Context, r *proto.VolumeRequest) (*proto.Done, error) {
	message, err := c.agent.giveUp(r.Volume, r.Replica)
	if err != nil {
		return nil, err
	}
	return &proto.Done{Message: message}, nil
}

func (c control) Primary(ctx context.Context, r *proto.VolumeRequest) (*proto.Done, error) {
	return c.changeRole(ctx, r, func(s *switching, ctx context.Context, force bool) (string, error) {
		return s.primaryWithout(ctx, force, r.Fenced)
	})
}

func (c control) Secondary(ctx context.Context, r *proto.VolumeRequest) (*proto.Done, error) {
	return c.changeRole(ctx, r, (*switching).secondary)
}

func (c control) done(ctx context.Context, r *proto.VolumeRequest, do func(*managed, context.Context) (string, error)) (*proto.Done, error) {
	v, err := c.agent.one(r.Volume)
	if err != nil {
		return nil, err
	}
	ctx, end := c.agent.untilStop(ctx)
	defer end()
	message, err := do(v, ctx)
	if err != nil {
		return nil, err
	}
	return &proto.Done{Message: v.config.Name + ": " + message}, nil
}

func (c control) Sync(ctx context.Context, r *proto.SyncRequest) (*proto.SyncReply, error) {
	v, err := c.agent.one(r.Volume)
	if err != nil {
		return nil, err
	}
	ctx, end := c.agent.untilStop(ctx)
	defer end()
	if r.TimeoutMillis > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(r.TimeoutMillis)*time.Millisecond)
		defer cancel()
	}
	return v.sync(ctx)
}

func (c control) Verify(r *proto.VerifyRequest, stream grpc.ServerStreamingServer[proto.Progress]) error {
	v, err := c.agent.one(r.Volume)
	if err != nil {
		return err
	}
	ctx, end := c.agent.untilStop(stream.Context())
	defer end()
	return v.verify(ctx, r.Replica, r.Repair, stream.Send)
}

func (c control) RestoreVolume(r *proto.RestoreVolumeRequest, stream grpc.ServerStreamingServer[proto.Progress]) error {
	v, err := c.agent.one(r.Volume)
	if err != nil {
		return err
	}
	ctx, end := c.agent.untilStop(stream.Context())
	defer end()
	return v.restoreVolume(ctx, r.From, r.Force, stream.Send)
}

// Events sends the present state, then 'now', then what happens.
func (c control) Events(r *proto.EventsRequest, stream grpc.ServerStreamingServer[proto.Event]) error {
	// Listening begins before the state is taken: nothing falls between.
	events, end := c.agent.hub.listen()
	defer end()
	for _, e := range c.agent.present() {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	if !r.Follow {
		return nil
	}
	for {
		select {
		case <-stream.Context().Done():
			return nil
		case <-c.agent.stopping:
			return nil
		case e, ok := <-events:
			if !ok {
				return exit.Errorf(exit.Failed, "events came faster than they were read; begin again with the present state")
			}
			if err := stream.Send(e); err != nil {
				return err
			}
		}
	}
}

// ended says of a request that the agent's end broke off that it was that, and
// not its caller.
func (a *Agent) ended(err error) error {
	select {
	case <-a.stopping:
		if exit.Of(err) == exit.Interrupted || errors.Is(err, protocol.ErrStopped) {
			return exit.Errorf(exit.Unreachable, "the agent is ending: %w", err)
		}
	default:
	}
	return err
}

// wireUnary and wireStream give every error its code on the wire.
func (a *Agent) wireUnary(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	reply, err := handle(ctx, request)
	return reply, exit.ToWire(a.ended(err))
}

func (a *Agent) wireStream(server any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	return exit.ToWire(a.ended(handle(server, stream)))
}
