package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/protocol"
)

// lookAtLag is how often the lag of replicas is looked at for the hook 'behind'.
const lookAtLag = time.Second

// newHooks makes the runner of a volume's hooks.
func newHooks(a *Agent, v *config.Volume) *hooks.Runner {
	node := ""
	if n := a.options.Config.Node; n != nil {
		node = n.Name
	}
	h := v.Hooks
	return hooks.New(node, v.Name, h.Commands, h.Timeout, a.log.With("volume", v.Name))
}

// about is what a hook is told of a replica.
func (m *managed) about(replica string) hooks.Info {
	info := hooks.Info{Replica: replica, Device: m.path()}
	for _, r := range m.config.Replicas {
		if r.Name == replica {
			info.Peer = r.Peer
		}
	}
	return info
}

// path is what the application opens, "" while the volume is not up.
func (m *managed) path() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stack == nil {
		return ""
	}
	return m.stack.Path()
}

// upNow is what is up, nil if nothing is.
func (m *managed) upNow() raised {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stack
}

// watchLag runs 'behind' once when a replica is late, and once when it is not any
// more, until ctx ends.
func (m *managed) watchLag(ctx context.Context) {
	if !m.hooks.Has(hooks.Behind) {
		return
	}
	tick := time.NewTicker(lookAtLag)
	defer tick.Stop()
	lag := lagWatch{after: m.config.Hooks.BehindAfter.Seconds(), late: map[string]bool{}}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		p, err := m.primary()
		if err != nil {
			continue
		}
		for _, r := range lag.changed(p.Status().Replicas) {
			info := m.about(r.Name)
			info.Generation, info.Epoch, info.BehindSeconds, info.BehindBytes, info.Reason = r.Generation, r.Epoch, &r.LagSeconds, &r.LagBytes, r.Reason
			m.hooks.Tell(hooks.Behind, info)
		}
	}
}

// lagWatch remembers which replicas are late.
type lagWatch struct {
	after float64 // seconds
	late  map[string]bool
}

// changed lists the replicas that became late, or are not any more: half the
// lag ends it, lest it begin again and again. A lag that is only known to be no
// less, as after down and up, ends nothing.
func (l *lagWatch) changed(all []protocol.ReplicaReport) (found []protocol.ReplicaReport) {
	for _, r := range all {
		if late := l.late[r.Name]; !late && r.LagSeconds >= l.after || late && r.LagSeconds < l.after/2 && !r.LagIsMinimum {
			l.late[r.Name] = !late
			found = append(found, r)
		}
	}
	return found
}

// withHooks runs the hooks beside what the events do already.
func (m *managed) withHooks(e protocol.PrimaryEvents) protocol.PrimaryEvents {
	connected, committed := e.Connected, e.Committed
	var mu sync.Mutex
	came := map[string]bool{} // and holds what the volume does from its next commit on
	e.Committed = func(replica string, s protocol.EpochStats) {
		committed(replica, s)
		mu.Lock()
		first := came[replica]
		came[replica] = false
		mu.Unlock()
		if first {
			m.unfence(replica, fmt.Sprintf("it caught up with epoch %d", s.Epoch))
		}
	}
	e.Connected = func(replica string, plan protocol.Plan) {
		connected(replica, plan)
		m.tellSplit(replica, plan.Diverged, plan.String())
		mu.Lock()
		came[replica] = plan.Action != protocol.Refuse && plan.Action != protocol.Nothing
		mu.Unlock()
		if plan.Action == protocol.Nothing {
			m.unfence(replica, plan.String())
		}
	}
	behind := e.Behind
	e.Behind = func(replica, reason string, cause error) {
		behind(replica, reason, cause)
		if split, _ := protocol.IsSplitBrain(cause); split { // two primaries, too
			m.tellSplit(replica, true, reason)
		}
	}
	return e
}

// unfence runs 'unfence-peer' for a node whose replica follows again.
func (m *managed) unfence(replica, reason string) {
	if info := m.about(replica); info.Peer != "" {
		info.Reason = reason
		m.hooks.Tell(hooks.UnfencePeer, info)
	}
}

// tellSplit runs 'split-brain' when a replica is found to have gone its own way, or
// its node to be primary, too; once, until one of its sessions begins otherwise.
func (m *managed) tellSplit(replica string, split bool, reason string) {
	m.mu.Lock()
	known := m.split[replica]
	m.split[replica] = split
	m.mu.Unlock()
	if split && !known {
		info := m.about(replica)
		info.Reason = reason
		m.hooks.Tell(hooks.SplitBrain, info)
	}
}
