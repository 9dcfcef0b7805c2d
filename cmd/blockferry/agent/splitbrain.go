package agent

import (
	"fmt"
	"slices"
	"time"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/proto"
	"blockferry/protocol"
)

// This file is about volumes that were written at two nodes. Both go on serving what
// they serve, neither sends anything, and the operator decides.

// otherSeen is how long another primary counts that was heard of: it comes every ten
// seconds or so.
const otherSeen = time.Minute

// otherPrimary is a node that came as this volume's primary.
type otherPrimary struct {
	node   string
	reason string
	seen   time.Time
}

// isPeer says whether a node has replicas of the volume.
func (m *managed) isPeer(node string) bool {
	return slices.ContainsFunc(m.config.Replicas, func(r *config.Replica) bool { return r.Address != "" && r.Peer == node })
}

// mayAsk says whether a node may be primary of the volume in this one's place.
func (m *managed) mayAsk(node string) bool {
	return m.isPeer(node) || slices.Contains(m.config.Peers, node)
}

// primaryHere refuses a node that is primary of a volume that is primary here, too,
// and tells it how far this one is.
func (p *peers) primaryHere(node string, a protocol.Admission) error {
	for _, m := range p.agent.volumes {
		m.mu.Lock()
		r, id := m.running, m.uuid
		m.mu.Unlock()
		if !m.mayAsk(node) {
			continue
		}
		if r == nil {
			if err := m.roles.primaryDown(node, a); err != nil {
				return err
			}
			continue
		}
		if id != volume.UUID(a.VolumeUUID) {
			continue
		}
		mine := r.primary.Lineage()
		if !a.Restore {
			m.heardOf(node, (&protocol.TwoPrimariesError{Mine: mine, Theirs: a.Lineage}).Reason())
		}
		return &protocol.RefusedError{Reason: proto.Reason_REASON_PRIMARY, Lineage: mine,
			Message: fmt.Sprintf("volume '%s' (%s) is written at node '%s', too", m.config.Name, id, p.node.Name)}
	}
	return nil
}

// primaryDown is primaryHere for a volume that is not up. One that the caller left
// behind is told so, and no split brain: it does not come up. A nil s is no such volume.
func (s *switching) primaryDown(node string, a protocol.Admission) error {
	if s == nil || a.Restore {
		return nil
	}
	if r, id, _ := s.look(); r != rolePrimary || id != volume.UUID(a.VolumeUUID) {
		return nil
	}
	mine, err := s.onDisk()
	if err != nil || len(mine) == 0 {
		return nil // it never was, or nobody knows
	}
	here := fmt.Sprintf("volume '%s' is primary at node '%s', too, and not up there", s.config.Name, s.agent.options.Config.Node.Name)
	if kind := protocol.Compare(mine, a.Lineage).Kind; kind == protocol.Same || protocol.Superseded(mine, a.Lineage) {
		return &protocol.RefusedError{Reason: proto.Reason_REASON_STORAGE,
			Message: fmt.Sprintf("%s: node '%s' took over from it; to have it follow, there: blockferry secondary %s (--force, if it holds writes that no other node has)", here, node, s.config.Name)}
	}
	return &protocol.RefusedError{Reason: proto.Reason_REASON_PRIMARY, Lineage: mine, Message: here}
}

func (m *managed) heardOf(node, reason string) {
	m.mu.Lock()
	news := m.other == nil || m.other.node != node || m.other.reason != reason || time.Since(m.other.seen) > otherSeen
	m.other = &otherPrimary{node, reason, time.Now()}
	m.mu.Unlock()
	if news {
		m.log.Warn("another primary", "node", node, "reason", reason)
		m.agent.hub.publish(m.config.Name, "", "split-brain", "node "+node+": "+reason)
		for _, r := range m.config.Replicas {
			if r.Peer == node {
				m.tellSplit(r.Name, true, reason)
			}
		}
	}
}

// otherWords says that another node came as primary lately, and what to do; "": none.
func (m *managed) otherWords() (reason, advice string) {
	m.mu.Lock()
	o := m.other
	m.mu.Unlock()
	if o == nil || time.Since(o.seen) > otherSeen {
		return "", ""
	}
	return "node '" + o.node + "': " + o.reason, m.twoPrimariesAdvice()
}

// twoPrimariesAdvice names what ends it: at the node whose writes are given up, both
// commands.
func (m *managed) twoPrimariesAdvice() string {
	return "nothing is sent either way, and writes go on; at the node whose writes are given up, with its file systems unmounted: blockferry secondary --force " + m.config.Name +
		", then blockferry discard " + m.config.Name + "; what only it has is saved first"
}

// adviseSplit is about a replica that was written on its own; c is at another node if it
// has an address.
func (m *managed) adviseSplit(c *config.Replica) string {
	name := m.config.Name
	if c.Address == "" && m.roles.at() == roleSecondary {
		return "to give up what only that copy has, which is saved first: blockferry discard --replica " + c.Name + " " + name
	}
	if c.Address == "" {
		// A restore overwrites the volume, and keeps nothing of it.
		return "writes go on and are marked; to give up what only that copy has, which is saved first: blockferry discard --replica " + c.Name + " " + name +
			"; if it is the one that counts: blockferry down " + name + ", then blockferry restore --force --from " + c.Name + " " + name +
			", which overwrites what only the volume has, and saves nothing of it"
	}
	discard := "writes go on and are marked; to give up what only that copy has, which is saved first, at node '" + c.Peer + "': blockferry discard " + name
	if !m.config.Switches() {
		return discard // no role changes here
	}
	return discard +
		"; if it is the one that counts: blockferry secondary --force " + name + " here, then blockferry primary " + name + " there"
}

// giveUp is the operator's word for a copy that is here: of a volume that is only a
// replica, or the replica named of one that is written here.
func (a *Agent) giveUp(name, replica string) (string, error) {
	v, err := a.options.Config.Volume(name)
	if err != nil {
		return "", err
	}
	if a.peers != nil {
		for _, s := range a.peers.volumes {
			if s.config != v || s.roles != nil && s.roles.at() != roleSecondary {
				continue
			}
			if replica == "" {
				return s.replica.giveUp(a.options.Config.RescueDir)
			}
			if s.roles == nil {
				return "", exit.Errorf(exit.Usage, "volume '%s' is only a replica here: --replica is for the node that writes it", v.Name)
			}
			return s.roles.managed.giveUp(replica)
		}
	}
	m, err := a.one(v.Name)
	if err != nil {
		return "", err
	}
	return m.giveUp(replica)
}

// giveUp is the operator's word for a replica beside the volume.
func (m *managed) giveUp(replica string) (string, error) {
	a, v := m.agent, m.config
	if replica == "" {
		return "", exit.Errorf(exit.Refused, "volume '%s' is written here, nothing of it is given up; to give up what one of its replicas has: --replica", v.Name)
	}
	c, err := v.Replica(replica)
	if err != nil {
		return "", err
	}
	for _, l := range m.replicas {
		if l.config == c {
			message, err := l.giveUp(a.options.Config.RescueDir)
			if err == nil {
				m.replicaOpened(c.Name) // it is tried again at once
			}
			return message, err
		}
	}
	return "", exit.Errorf(exit.Refused, "replica '%s' of volume '%s' is at node '%s': there: blockferry discard %[2]s", c.Name, v.Name, c.Peer)
}

func (l *localReplica) giveUp(rescueDir string) (string, error) {
	l.mu.Lock()
	r, reason := l.replica, l.reason
	l.mu.Unlock()
	if r == nil {
		return "", exit.Errorf(exit.Refused, "%s is not open: %s", l.config.Device, reason)
	}
	st := r.Status()
	if st.Committed.IsZero() {
		return "", exit.Errorf(exit.Refused, "%s holds nothing that could be given up", l.config.Device)
	}
	if err := r.GiveUp(st.Committed); err != nil {
		return "", exit.Mark(exit.Refused, err)
	}
	until := "until then the word holds"
	if err := l.keepWord(st.ReplicaUUID, &st.Committed); err != nil {
		until = "until then, or the agent's end, the word holds (" + err.Error() + ")"
	}
	l.log.Warn("given up by the operator", "position", st.Committed.String(), "rescue", rescueDir)
	return fmt.Sprintf("%s: what %s has at %v gives way to the line of the node that writes it; what only this copy has is saved in %s first; %s",
		l.volume.Name, l.config.Device, st.Committed, rescueDir, until), nil
}
