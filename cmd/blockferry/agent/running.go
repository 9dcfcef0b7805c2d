package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"blockferry/blockdev/deadman"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/proto"
	"blockferry/protocol"
)

const (
	// stopSend is how long a stop of the agent waits for a last epoch.
	stopSend = 5 * time.Second
	// downSend is the same for a volume that is taken down, unless that is
	// forced.
	downSend = time.Minute
)

// running is the replication of a volume that is up.
type running struct {
	primary *protocol.Primary
	source  *source
	state   *labelState
	guard   *deadman.Guard
}

// replicate starts a volume's primary. Replicas of this machine are fed by the
// same calls as a peer's, without a socket in between.
func (m *managed) replicate(stack raised, take takeFunc, guard *deadman.Guard, state protocol.SourceState) (*running, error) {
	r := &running{source: &source{raised: stack, take: take}, state: &labelState{StateStore: keptState{stack}}, guard: guard}
	if m.config.Switches() {
		r.source.device = m.config.Device
	}
	c := protocol.PrimaryConfig{
		Volume: m.config.Name, VolumeUUID: stack.UUID(), Source: r.source, State: r.state,
		Interval: m.config.Interval, Events: m.withHooks(m.events()),
	}
	var err error
	if c.Replicas, err = m.fed(m.config.Replicas); err != nil {
		return nil, err
	}
	if r.primary, err = protocol.NewPrimary(c, state); err != nil {
		return nil, err
	}
	m.mu.Lock()
	paused := m.paused
	m.mu.Unlock()
	if paused { // before it was taken down; only the operator ends that
		err = r.primary.Pause("")
	}
	return r, err
}

// fed is how replicas are fed.
func (m *managed) fed(replicas []*config.Replica) (all []protocol.ReplicaConfig, err error) {
	for _, p := range replicas {
		codec, adapt, err := compression(p)
		if err != nil {
			return nil, err
		}
		policy, err := protocol.ParseSplitBrain(m.config.SplitBrain)
		if err != nil {
			return nil, err
		}
		one := protocol.ReplicaConfig{Name: p.Name, Link: protocol.LinkConfig{Codec: codec, Adapt: adapt}, CatchUpInPlace: p.InPlace, SplitBrain: policy}
		if p.Address != "" {
			// There it is known by the node it is at.
			one.Client, one.Link.Replica, one.RetryMax = m.agent.identity.Client(p.Peer, p.Address), p.Peer, retryPeer
		} else {
			one.Client, one.Link.BatchBytes = protocol.LocalClient(m.agent.receiver), protocol.LocalBatchBytes
		}
		if p.Rate != nil {
			one.Link.Pace = protocol.NewPace(func() int64 { return p.Rate.At(time.Now()) }, nil)
		}
		all = append(all, one)
	}
	return all, nil
}

// compression is what a replica's data is packed with, and whether that is only the beginning.
func compression(p *config.Replica) (codec protocol.Codec, adapt bool, err error) {
	if p.Compression == config.CompressionAuto {
		return protocol.CodecS2, true, nil
	}
	codec, err = protocol.ParseCodec(p.Compression)
	return codec, false, err
}

// stop ends replication and leaves the stack up.
func (r *running) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopSend)
	defer cancel()
	_, err := r.primary.Stop(ctx, nil)
	return err
}

// labelState is where the label is: in the stack or, once that is gone, on
// the disk.
type labelState struct{ protocol.StateStore }

// down takes the volume down. Its end is clean if the kernel's marks prove
// that nothing was written after the last cut.
func (m *managed) down(ctx context.Context, force bool) (string, error) {
	m.op.Lock()
	defer m.op.Unlock()
	if err := m.notSecondary(); err != nil { // since it was asked
		return "", err
	}
	m.roles.decide(undecided)
	if m.config.Attach {
		return m.detach(ctx, force)
	}
	m.mu.Lock()
	stack, _ := m.stack.(*volume.Volume)
	r := m.running
	m.mu.Unlock()
	if stack == nil {
		exists, err := m.stackExists()
		switch {
		case err != nil:
			return "", err
		case exists && !force:
			return "", exit.Errorf(exit.Refused, "volume '%s' is up but not managed: %s; to take it down without a last epoch: blockferry down --force %s (what is missing stays marked)",
				m.config.Name, m.why(), m.config.Name)
		case exists:
			// Its label says that an epoch is open, and keeps saying so.
			if err := volume.Down(m.agent.dm, m.config.Name); err != nil {
				return "", exit.Mark(exit.Refused, err)
			}
			m.set(stageDown, "taken down by the operator", "blockferry up "+m.config.Name)
			return "down; what replicas do not have stays marked", nil
		}
		m.set(stageDown, "taken down by the operator", "blockferry up "+m.config.Name)
		return "is down already", nil
	}
	if err := stack.Opened(); err != nil {
		return "", exit.Mark(exit.Refused, err)
	}
	stack.RollNext()
	patience := downSend
	if force {
		patience = stopSend // the disk may be gone
	}
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, _, err := r.primary.Drain(limited, force); err != nil && !force {
		return "", exit.Errorf(exit.Refused, "%w; to take it down all the same: blockferry down --force %s (what is missing stays marked)", err, m.config.Name)
	}
	clean, gone, err := m.sealAndStop(limited, stack, r)
	if err != nil && gone && force {
		m.forget()
		m.set(stageDown, "taken down by force: "+err.Error(), "blockferry up "+m.config.Name+", or, if its disk was lost, blockferry restore "+m.config.Name)
		return "down by force; its end could not be recorded on the disk: " + err.Error(), nil
	}
	if err != nil {
		// The stack may be there or not: the next look sorts it out.
		m.forget()
		m.set(stageStarting, err.Error(), "")
		m.wake()
		return "", exit.Mark(exit.Refused, err)
	}
	m.forget()
	m.set(stageDown, "taken down by the operator", "blockferry up "+m.config.Name)
	if !clean {
		return "down; something may have been written after the last cut, it stays marked", nil
	}
	return "down, cleanly", nil
}

// sealAndStop says whether the end is clean and whether the stack is gone,
// which it may be after an error, too.
func (m *managed) sealAndStop(ctx context.Context, stack *volume.Volume, r *running) (clean, gone bool, err error) {
	var disk *volume.Offline
	clean, err = r.primary.Stop(ctx, func() error {
		if err := stack.Down(); err != nil {
			return err
		}
		gone = true
		m.roles.keeps().unguard()
		var err error
		at, err := pathsOf(m.config)
		if err != nil {
			return err
		}
		if disk, err = volume.OpenOffline(at.device); err != nil {
			return err
		}
		if of := disk.Label().UUID; of != stack.UUID() { // the volume's own went, and this one is in its place
			return fmt.Errorf("%w: %s holds volume %s, this one is %s", volume.ErrOtherVolume, disk.Name(), of, stack.UUID())
		}
		r.state.StateStore = offlineState{disk}
		unwritten, why := disk.UnwrittenSince(r.source.last(), at.metadata)
		if !unwritten {
			m.log.Info("not a clean end", "reason", why)
		} else if err := disk.Remember(r.source.last()); err != nil {
			return err
		}
		r.source.seal(!unwritten)
		return nil
	})
	if disk != nil {
		err = errors.Join(err, disk.Close())
	}
	if !gone {
		err = errors.Join(err, stack.Close())
	}
	return clean, gone, errors.Join(err, r.guard.Close())
}

// forget drops what was closed already.
func (m *managed) forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stack, m.running = nil, nil
}

func (m *managed) wake() {
	select {
	case m.poke <- struct{}{}:
	default:
	}
}

func (m *managed) why() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reason
}

// primary is the volume's, or an error that says why there is none.
func (m *managed) primary() (*protocol.Primary, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.running == nil {
		return nil, exit.Errorf(exit.Refused, "volume '%s' is not up: %s; %s", m.config.Name, m.reason, m.advice)
	}
	return m.running.primary, nil
}

func (m *managed) pause(context.Context) (string, error) {
	p, err := m.primary()
	if err != nil {
		return "", err
	}
	return "paused; writes go on and are marked", m.setPaused(p.Pause(""), true)
}

func (m *managed) resume(context.Context) (string, error) {
	p, err := m.primary()
	if err != nil {
		return "", err
	}
	return "resumed", m.setPaused(p.Resume(""), false)
}

func (m *managed) setPaused(err error, paused bool) error {
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.paused = paused
	return nil
}

func (m *managed) sync(ctx context.Context) (*proto.SyncReply, error) {
	p, err := m.primary()
	if err != nil {
		return nil, err
	}
	epoch, committed, err := p.SyncNow(ctx)
	if err != nil {
		return nil, err
	}
	return &proto.SyncReply{Epoch: epoch, Committed: committed}, nil
}

// refusedPlans remembers by replica why none of its may be written, which is tried
// again and again: it is said once.
type refusedPlans struct {
	mu    sync.Mutex
	plans map[string]*refusedPlan
}

type refusedPlan struct {
	rule  string
	times int
}

// known notes a plan, and says whether the one before refused for the same reason.
func (r *refusedPlans) known(replica string, p protocol.Plan) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p.Action != protocol.Refuse {
		delete(r.plans, replica)
		return false
	}
	if r.plans == nil {
		r.plans = map[string]*refusedPlan{}
	}
	one := r.plans[replica]
	if one == nil || one.rule != p.Rule {
		one = &refusedPlan{rule: p.Rule}
		r.plans[replica] = one
	}
	one.times++
	return one.times > 1
}

func (r *refusedPlans) twice(replica string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.plans[replica] != nil && r.plans[replica].times > 1
}

// events logs and publishes what a primary does.
func (m *managed) events() protocol.PrimaryEvents {
	say := func(replica, kind, format string, args ...any) {
		m.agent.hub.publish(m.config.Name, replica, kind, fmt.Sprintf(format, args...))
	}
	var again refusedPlans
	return protocol.PrimaryEvents{
		Connected: func(replica string, plan protocol.Plan) {
			if again.known(replica, plan) {
				return
			}
			m.log.Info("replica connected", "replica", replica, "plan", plan.String())
			say(replica, "replica-connected", "%s", plan)
		},
		Disconnected: func(replica string, err error) {
			var refused *protocol.PlanRefusedError
			if errors.As(err, &refused) && again.twice(replica) {
				return
			}
			if errors.Is(err, context.Canceled) {
				m.log.Info("replica's session ended", "replica", replica)
			} else {
				m.log.Warn("replica disconnected", "replica", replica, "error", err)
			}
			say(replica, "replica-disconnected", "%v", err)
		},
		Cut: func(c protocol.CutInfo) {
			m.log.Debug("cut", "epoch", c.Epoch, "view", c.View, "stalled", c.Stalled)
		},
		CutFailed: func(epoch uint64, err error) {
			m.log.Warn("cut failed; its epoch is void", "epoch", epoch, "error", err)
			say("", "cut-failed", "epoch %d: %v", epoch, err)
		},
		Changed: func(replica string, c protocol.ChangedInfo) {
			m.log.Debug("changed", "replica", replica, "epoch", c.Epoch, "since", c.Since, "ranges", c.Ranges, "bytes", c.Bytes, "seconds", c.Took.Seconds())
		},
		Committed: func(replica string, e protocol.EpochStats) {
			m.log.Debug("epoch committed", "replica", replica, "stats", e)
			for _, l := range m.replicas {
				if l.config.Name == replica {
					l.committed()
				}
			}
			say(replica, "epoch-committed", "epoch %d", e.Epoch)
		},
		Void: func(replica string, epoch uint64, err error) {
			m.log.Warn("epoch void; it is sent again", "replica", replica, "epoch", epoch, "error", err)
			say(replica, "epoch-void", "epoch %d: %v", epoch, err)
		},
		Packing: func(replica string, now protocol.Codec, why string) {
			m.log.Debug("compression", "replica", replica, "with", now.String(), "why", why)
		},
		Behind: func(replica, reason string, cause error) {
			if reason == "" {
				m.log.Info("replica is not behind any more", "replica", replica)
				say(replica, "replica-caught-up", "")
				return
			}
			m.log.Warn("replica is behind", "replica", replica, "reason", reason)
			say(replica, "replica-behind", "%s", reason)
			if split, _ := protocol.IsSplitBrain(cause); split {
				say(replica, "split-brain", "%s", reason)
			}
		},
	}
}
