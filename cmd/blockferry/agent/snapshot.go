package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"

	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/proto"
	"blockferry/protocol"
)

// This file is about snapshots of a replica's disk by somebody else's means: the replica is
// held at an applied epoch while the operator's command runs, which is the command's own
// process. It ends with that, and in any case with its limit.

// Hold answers 'blockferry snapshot'.
func (c control) Hold(stream grpc.BidiStreamingServer[proto.HoldRequest, proto.Held]) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	limit := time.Duration(first.LimitMillis) * time.Millisecond
	if limit < hooks.MinTimeout || limit > hooks.MaxTimeout {
		return exit.Errorf(exit.Usage, "a limit of %v: want %v to %v", limit, hooks.MinTimeout, hooks.MaxTimeout)
	}
	l, err := c.agent.replicaHere(first.Volume, first.Replica)
	if err != nil {
		return err
	}
	ctx, end := c.agent.untilStop(stream.Context())
	defer end()
	release := make(chan struct{})
	go func() { // ends with the stream
		if r, err := stream.Recv(); err == nil && r.Release {
			close(release)
		}
	}()
	return l.hold(ctx, limit, func(as *proto.Held) error {
		as.Replica = first.Replica
		return stream.Send(as)
	}, release)
}

// replicaHere finds a replica whose disk is at this node: one beside the volume, or, by
// this node's name, the copy here of a volume that another node writes.
func (a *Agent) replicaHere(name, replica string) (*localReplica, error) {
	v, err := a.options.Config.Volume(name)
	if err != nil {
		return nil, err
	}
	var beside []*localReplica
	if i := slices.IndexFunc(a.volumes, func(m *managed) bool { return m.config == v }); i >= 0 {
		beside = a.volumes[i].replicas
	}
	for _, l := range beside {
		if l.config.Name == replica {
			return l, nil
		}
	}
	if v.Copy != nil && replica == a.peers.node.Name {
		i := slices.IndexFunc(a.peers.volumes, func(s *secondary) bool { return s.config == v })
		return a.peers.volumes[i].replica, nil
	}
	if v.Secondary() {
		return nil, exit.Errorf(exit.Usage, "volume '%s' has no replica '%s' here; the copy at this node is called '%s'", v.Name, replica, a.peers.node.Name)
	}
	c, err := v.Replica(replica)
	if err != nil {
		return nil, err
	}
	return nil, exit.Errorf(exit.Refused, "replica '%s' of volume '%s' is at node '%s', where it is called by that node's name; there: blockferry snapshot %[2]s %[3]s -- COMMAND", c.Name, v.Name, c.Peer)
}

// hold keeps the replica as it is until release is closed, which is told to held, too; and
// otherwise ends with an error: with ctx, with the limit, or when the disk is not the replica's any more.
func (l *localReplica) hold(ctx context.Context, limit time.Duration, held func(*proto.Held) error, release <-chan struct{}) error {
	r, ctx, done, err := l.use(ctx)
	if err != nil {
		return err
	}
	defer done()
	broken := func(err error) error {
		if e := context.Cause(ctx); errors.Is(e, errNotServed) {
			err = e
		}
		return fmt.Errorf("replica '%s' of volume '%s' on %s is not held: %w", l.config.Name, l.volume.Name, l.config.Device, err)
	}
	waiting, cancel := context.WithTimeout(ctx, limit)
	image, err := r.HoldDevice(waiting)
	cancel()
	switch {
	case err != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded):
		return exit.Errorf(exit.Timeout, "replica '%s' of volume '%s' could not be held within %v, the limit: somebody else reads it, or it has much to apply; try again later", l.config.Name, l.volume.Name, limit)
	case errors.Is(err, protocol.ErrHeld), errors.Is(err, protocol.ErrNotConsistent), errors.Is(err, protocol.ErrStrayed):
		return exit.Mark(exit.Refused, broken(err))
	case err != nil:
		return broken(err)
	}
	defer image.Release()
	at, st := image.Position(), r.Status()
	log := l.log.With("position", at.String())
	log.Info("held for a snapshot", "limit", limit)
	l.agent.hub.publish(l.volume.Name, l.config.Name, "snapshot-begun", at.String())
	begun, outcome := time.Now(), "done"
	defer func() {
		log.Info("not held any more", "outcome", outcome, "seconds", time.Since(begun).Seconds(), "waiting-epochs", r.Status().PendingEpochs)
		l.agent.hub.publish(l.volume.Name, l.config.Name, "snapshot-ended", outcome)
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	err = held(&proto.Held{Volume: l.volume.Name, Device: l.on.Path, Offset: uint64(st.DataOffset), SizeBytes: uint64(st.SizeBytes),
		Generation: at.Generation[:], Epoch: at.Epoch, CutUnixNanos: image.CutUnixNanos()})
	if err == nil {
		select {
		case <-release:
			err = image.Err()
		case <-timer.C:
			err = exit.Errorf(exit.Timeout, "replica '%s' of volume '%s' was held for %v, the limit, and goes on: what the command made may be of no one point in time", l.config.Name, l.volume.Name, limit)
		case <-ctx.Done():
			err = broken(ctx.Err())
		}
	}
	if err == nil {
		err = held(&proto.Held{Released: true})
	}
	if err != nil {
		outcome = err.Error()
	}
	return err
}

// errNotServed ends what uses a replica.
var errNotServed = errors.New("the agent lets go of the disk")

// use is the open replica, for as long as the context that it returns; done is called before
// the replica is closed.
func (l *localReplica) use(ctx context.Context) (r *protocol.Replica, during context.Context, done func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.replica == nil || l.letting == nil {
		return nil, nil, nil, exit.Errorf(exit.Refused, "replica '%s' of volume '%s' on %s is not open: %s", l.config.Name, l.volume.Name, l.config.Device,
			cmp.Or(l.reason, "it waits for its volume"))
	}
	during, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(l.letting, func() { cancel(errNotServed) })
	l.users.Add(1)
	return l.replica, during, func() {
		stop()
		cancel(nil)
		l.users.Done()
	}, nil
}

// allow lets others use the replica until the function that it returns, which waits for them.
func (l *localReplica) allow() (end func()) {
	letting, let := context.WithCancel(context.Background())
	l.mu.Lock()
	l.letting = letting
	l.mu.Unlock()
	return func() {
		l.mu.Lock()
		l.letting = nil
		l.mu.Unlock()
		let()
		l.users.Wait()
	}
}

// withHeld is a replica's reason in its status, before it that its disk is held.
func withHeld(reason string, st protocol.ReplicaStatus) string {
	if st.Held.IsZero() {
		return reason
	}
	held := fmt.Sprintf("its disk is held at epoch %d for a snapshot; %d later epochs wait in its journal, which has room for %s more",
		st.Held.Epoch, st.PendingEpochs, config.FormatSize(st.JournalFreeBytes))
	if reason != "" {
		held += "; " + reason
	}
	return held
}
