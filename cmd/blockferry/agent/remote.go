package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"time"

	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/status"
	"blockferry/cmd/blockferry/transport"
	"blockferry/proto"
	"blockferry/protocol"
)

// askPeer is how long another node has to say what its replica holds.
const askPeer = 15 * time.Second

// remoteStatus is where a replica at another node stands, as far as it is known
// here.
func (m *managed) remoteStatus(c *config.Replica, primary protocol.PrimaryStatus) status.Replica {
	s := status.Replica{Name: c.Name, Peer: c.Peer, Address: c.Address, Connection: "StandAlone", Replication: "Off", Disk: "DUnknown"}
	for i := range primary.Replicas {
		r := &primary.Replicas[i]
		if r.Name != c.Name {
			continue
		}
		m.transfer(&s, r)
		s.Reason = r.Reason
		if s.Disk = r.Disk; r.Disk == "Blank" {
			s.Disk = "Inconsistent"
		}
		if r.Epoch > 0 {
			s.Position = position(r.Generation, r.Epoch)
		}
		if s.Reason != "" && s.Advice == "" {
			s.Advice = m.adviseRemote(c, r.Cause, r.Connection == "Connected")
		}
	}
	return s
}

// adviseCause says what to do about a replica that is behind for a cause that is the
// same wherever it is; format is how it is formatted. "": for another.
func (m *managed) adviseCause(c *config.Replica, cause error, format string) string {
	var refused *protocol.PlanRefusedError
	split, primary := protocol.IsSplitBrain(cause)
	switch {
	case errors.Is(cause, protocol.ErrTrackingGone):
		// The kernel's metadata is damaged while it uses it; disks say nothing of that.
		return "if it stays so: blockferry down " + m.config.Name + ", then blockferry up " + m.config.Name + ", begins tracking anew"
	case errors.As(cause, &refused) && refused.Plan.Format:
		return "writes go on and are marked; only if what it holds may be lost, " + format
	case primary:
		return m.twoPrimariesAdvice()
	case split:
		return m.adviseSplit(c)
	}
	return ""
}

// adviseRemote says what to do about a replica at another node that is behind.
func (m *managed) adviseRemote(c *config.Replica, cause error, connected bool) string {
	const again = "; it is tried again by itself, writes go on and are marked"
	if advice := m.adviseCause(c, cause, "at node '"+c.Peer+"' with its agent stopped: blockferry create --discard-my-data "+m.config.Name); advice != "" {
		return advice
	}
	certs := "see 'blockferry certs show' here and at node '" + c.Peer + "'"
	fault := transport.FaultOf(cause)
	var refused *protocol.RefusedError
	if errors.As(cause, &refused) && refused.Reason == proto.Reason_REASON_WRONG_VOLUME {
		fault = transport.NotAllowed
	}
	switch {
	case fault == transport.OwnCertificate:
		return certs + "; to replace this node's: blockferry certs renew" + again
	case fault == transport.TheirCertificate:
		return certs + ", and whether " + c.Address + " leads to that node" + again
	case fault == transport.Unreachable:
		return "see whether node '" + c.Peer + "' is up, its agent runs and listens there, and nothing between stands in the way" + again
	case fault == transport.NotAllowed:
		return "name this node there in 'peers' of volume '" + m.config.Name + "', unless the reason says otherwise" + again
	case connected:
		return "if this goes on, see 'blockferry status' and the agent's log at node '" + c.Peer + "', and the way to it; writes go on and are marked"
	}
	return "see 'blockferry status' and the agent's log at node '" + c.Peer + "'" + again
}

// askRemotes refuses to restore from the best replica here while one at another
// node holds more, or may.
func (m *managed) askRemotes(ctx context.Context, best *localReplica, have protocol.ReplicaStatus) error {
	for _, r := range m.config.Replicas {
		if r.Address == "" {
			continue
		}
		l, err := m.remoteLineage(ctx, r, have.VolumeUUID)
		if grpcstatus.Code(err) == codes.FailedPrecondition {
			return exit.Errorf(exit.Refused, "volume '%s' is written at node '%s' (%w): restored here there would be two primaries; %s", m.config.Name, r.Peer, err, m.adviseFollow(r.Peer))
		}
		if err != nil {
			return exit.Errorf(exit.Refused, "volume '%s': replica '%s' did not say what it holds (%w) and may be newer than '%s' (%v); or say with --from %[4]s that this one is right",
				m.config.Name, r.Name, err, best.config.Name, have.Committed)
		}
		if relation := protocol.Compare(l, have.Lineage); len(l) > 0 && relation.Kind != protocol.Same && relation.Kind != protocol.Behind {
			return exit.Errorf(exit.Refused, "volume '%s': replica '%s' at node '%s' holds %v, '%s' here %v: it is %v; a replica at another node can't be restored from yet; say with --from %[5]s that this one is right",
				m.config.Name, r.Name, r.Peer, l.Tip(), best.config.Name, have.Committed, relation)
		}
	}
	return nil
}

// adviseFollow is for a disk that is blank while another node writes the volume.
func (m *managed) adviseFollow(node string) string {
	back := "to write it here again, first at node '" + node + "': blockferry "
	if !m.config.Switches() {
		return back + "down " + m.config.Name
	}
	return "to have this node follow: " + m.roles.copy.replica.formatCommand() + ", with the agent stopped; " + back + "secondary " + m.config.Name
}

// remoteLineage asks what a replica at another node holds; empty: nothing yet.
func (m *managed) remoteLineage(ctx context.Context, r *config.Replica, of volume.UUID) (protocol.Lineage, error) {
	ctx, cancel := context.WithTimeout(ctx, askPeer)
	defer cancel()
	// Checksums are asked for, and only the first words of the answer are read.
	key := make([]byte, protocol.HashKeyBytes)
	if _, err := rand.Read(key); err != nil {
		return nil, err
	}
	stream, err := m.agent.identity.Client(r.Peer, r.Address).Restore(ctx, &proto.RestoreRequest{VolumeUuid: of[:], Replica: r.Peer, HashKey: key})
	if err != nil {
		return nil, err
	}
	first, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	if first.GetHeader() == nil {
		return nil, fmt.Errorf("node '%s' did not answer as expected", r.Peer)
	}
	return protocol.LineageFromProto(first.GetHeader().Lineage)
}
