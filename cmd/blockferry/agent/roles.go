package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/cmd/blockferry/layout"
	"blockferry/proto"
	"blockferry/protocol"
)

// role is what a volume is at this node.
type role int

const (
	roleUnknown role = iota // its disk was not looked at yet
	rolePrimary
	roleSecondary
)

// switching is a volume that can be primary and secondary here: one disk, with a
// label at its front and the tail of a replica at its end. The label says which of the two
// it is; the configuration does only before there is one. The disk is used by the
// managed volume or by the replica, never by both.
type switching struct {
	agent   *Agent
	config  *config.Volume
	log     *slog.Logger
	managed *managed
	copy    *secondary
	lease   *keeper  // nil: the volume has no lease
	cascade *cascade // nil: it has no replicas beside it

	// op is held while the role changes. It is taken before managed.op.
	op sync.Mutex

	fails fails // belongs to who holds managed.op

	keeping sync.Mutex // held while what was heard is written down; taken before mu

	mu      sync.Mutex
	role    role
	uuid    volume.UUID // zero: not known
	decided decision
	heard   map[string]heard
	// overtaken is what a node said last, beside which the primary's disk here is not written.
	overtaken map[string]heard
	keptAt    time.Time        // when heard was written down last
	taking    protocol.Lineage // what the copy here holds while it takes over; nil: it does not
	rising    bool             // it comes up as primary, or tries to
	waits     hooks.Event      // op is held until this hook ends; "": for none
	change    chan struct{}    // closed and replaced when role or uuid change
	woken     chan struct{}    // room for one: its disk came or went
}

func newSwitching(m *managed, c *secondary) *switching {
	s := &switching{agent: m.agent, config: m.config, log: m.log, managed: m, copy: c, heard: map[string]heard{}, overtaken: map[string]heard{}, change: make(chan struct{}), woken: make(chan struct{}, 1)}
	m.roles, c.roles = s, s
	c.replica.parked = true
	s.cascade = newCascade(m, c.replica)
	if s.config.AutoPromote {
		s.lease = newKeeper(m.agent, s)
	}
	return s
}

// wake has the disk looked at if its role is not known yet. A nil s does nothing.
func (s *switching) wake() {
	if s == nil {
		return
	}
	select {
	case s.woken <- struct{}{}:
	default:
	}
}

// at is the role; a volume that has but one is primary.
func (s *switching) at() role {
	if s == nil {
		return rolePrimary
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.role
}

// decision is the operator's word on a primary's disk that is down. It counts for one try, or
// until the volume of a copy that took over is up.
type decision int

const (
	undecided   decision = iota // it comes up when every other node answers, and none stands against it
	toBePrimary                 // those that do not answer do not count
	forced                      // whatever other nodes say
)

// forcedIf is what 'primary' decides.
func forcedIf(force bool) decision {
	if force {
		return forced
	}
	return toBePrimary
}

// decide sets it. A nil s does nothing.
func (s *switching) decide(word decision) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.decided = word
}

// promote has other nodes hear of a primary while the copy here takes over from at; nil
// ends that.
func (s *switching) promote(at protocol.Lineage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taking = at.Clone()
}

// rise has other nodes hear of a volume that comes up, or not any more. A nil s does
// nothing.
func (s *switching) rise(rising bool) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rising = rising
}

func (s *switching) set(r role, uuid volume.UUID) {
	s.mu.Lock()
	if !uuid.IsZero() {
		s.uuid = uuid
	}
	s.role = r
	close(s.change)
	s.change = make(chan struct{})
	s.mu.Unlock()
	if r == roleSecondary {
		s.copy.replica.unpark()
	} else {
		s.managed.wake()
	}
}

// know notes the volume's id once it is known: the agent may have begun before the disk
// had a label.
func (s *switching) know(uuid volume.UUID) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.uuid != uuid {
		s.uuid = uuid
		close(s.change)
		s.change = make(chan struct{})
	}
}

// look is the role, the volume's id, and what is closed when one changes.
func (s *switching) look() (role, volume.UUID, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.role, s.uuid, s.change
}

// run finds out the role, and listens to the other nodes while it is secondary,
// until ctx ends.
func (s *switching) run(ctx context.Context) {
	for s.at() == roleUnknown {
		s.op.Lock()
		r, uuid, err := s.read()
		if err == nil {
			s.log.Info("role", "secondary", r == roleSecondary)
			s.set(r, uuid)
		} else {
			s.managed.set(stageAbsent, err.Error(), "attach the disk; "+s.agent.disks.whenThere(s.config.Device))
		}
		s.op.Unlock()
		if err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-s.woken:
		case <-time.After(retryEvery):
		}
	}
	if r, uuid, _ := s.look(); r == roleSecondary {
		if err := s.recallHeard(uuid); err != nil {
			s.log.Warn("what other nodes said before this start is not known", "error", err)
		}
	}
	var listening sync.WaitGroup
	defer func() {
		listening.Wait()
		if s.at() == roleSecondary {
			s.keepHeard()
		}
	}()
	for _, node := range s.config.Peers {
		if s.config.AddressOf(node) != "" {
			listening.Go(func() { s.listen(ctx, node, backoff{least: tellEvery, most: retryPeer}) })
		}
	}
}

// read asks the disk for the role.
func (s *switching) read() (role, volume.UUID, error) {
	disk, err := udev.Open(s.config.Device, blockdev.OpenOptions{})
	if words, _ := s.agent.disks.missing(s.config.Device); words != "" && err != nil {
		return roleUnknown, volume.UUID{}, errors.New(words)
	}
	if err != nil {
		return roleUnknown, volume.UUID{}, err
	}
	defer disk.Close()
	first := rolePrimary
	if s.config.BeginsSecondary {
		first = roleSecondary
	}
	label, err := volume.ReadLabel(disk)
	switch {
	case errors.Is(err, volume.ErrNoLabel):
		return first, volume.UUID{}, nil
	case errors.Is(err, volume.ErrBadLabel):
		return rolePrimary, volume.UUID{}, nil // which is refused, in words
	case err != nil:
		return roleUnknown, volume.UUID{}, err
	}
	state, err := protocol.DecodeSourceState(label.State)
	if err == nil && state.Secondary {
		return roleSecondary, label.UUID, nil
	}
	return rolePrimary, label.UUID, nil
}

// label makes a disk that holds no volume yet a secondary's. It gets its replica's
// tail next.
func (s *switching) label(disk *blockdev.File, size int64, uuid volume.UUID) (protocol.FormatOptions, error) {
	state, err := protocol.SourceState{Secondary: true}.Encode()
	if err != nil {
		return protocol.FormatOptions{}, err
	}
	l, err := volume.FormatOn(disk, uuid, layout.Switching(s.config, size), state)
	if err != nil {
		return protocol.FormatOptions{}, exit.Errorf(exit.Refused, "%w; it needs a larger disk", err)
	}
	s.know(uuid)
	return layout.OnLabelled(l), nil
}

// settle brings a change of role to its end that was cut off: the label says
// secondary, so the disk becomes a replica, or stays one.
func settle(disk blockdev.Device) error {
	o, err := volume.OfflineOn(disk)
	if errors.Is(err, volume.ErrNoLabel) {
		return nil
	}
	if err != nil {
		return err
	}
	label := o.Label()
	state, err := protocol.DecodeSourceState(label.State)
	if err != nil {
		return err
	}
	if !state.Secondary {
		return fmt.Errorf("the label of %s says that volume %s is primary here", disk.Name(), label.UUID)
	}
	st, err := protocol.PeekReplica(disk)
	switch {
	case err == nil && st.VolumeUUID == protocol.AnyVolume:
		return nil
	case err == nil && st.VolumeUUID == label.UUID && st.TookOver.IsZero():
		return stoodDown(o)
	case err != nil && !errors.Is(err, protocol.ErrNoSuperblock):
		return err
	case err != nil && len(state.Effective()) == 0:
		return err // it was to be formatted, or both superblocks are lost
	}
	// Whether it may stray was decided before the label said secondary.
	outside, err := o.ChangedOutside("")
	if err == nil {
		_, err = standDown(disk, o, nil, outside, true)
	}
	return err
}

// standDown makes a disk whose volume is down a replica. follow is the history
// of the node to follow, if that is known; outside what ChangedOutside said.
func standDown(disk blockdev.Device, o *volume.Offline, follow protocol.Lineage, outside string, stray bool) (*protocol.Holding, error) {
	label := o.Label()
	h, err := protocol.StandDown(offlineState{o}, disk, protocol.StandDownOptions{
		Format: layout.OnLabelled(&label), Follow: follow, Outside: outside, Stray: stray,
		ChangedSince: func(epoch uint64) ([]protocol.Range, error) {
			extents, err := o.ChangedSince(epoch)
			if errors.Is(err, volume.ErrTrackingLost) {
				return nil, fmt.Errorf("%w: %w", protocol.ErrTrackingLost, err)
			}
			return ranges(extents), err
		},
	})
	if err == nil {
		err = stoodDown(o)
	}
	return h, err
}

// stoodDown takes from a label what the disk held as primary: the superblocks say what
// it holds from now on. Were both lost later, what the label says would be too old, and
// taken for a stand-down that was cut off.
func stoodDown(o *volume.Offline) error {
	label := o.Label()
	state, err := protocol.DecodeSourceState(label.State)
	if err != nil || len(state.Effective()) == 0 {
		return err
	}
	raw, err := protocol.SourceState{Secondary: true}.Encode()
	if err != nil {
		return err
	}
	return o.SetState(raw)
}

// takeOverState is the label of a disk whose replica takes over: with the state
// tracking begins.
type takeOverState struct{ *volume.Offline }

func (s takeOverState) Load() ([]byte, error) { return s.Label().State, nil }

func (s takeOverState) Save(state []byte) error {
	next, err := protocol.DecodeSourceState(state)
	if err != nil {
		return err
	}
	return s.BeginAt(next.Lineage.Tip().Epoch, state)
}

// standing is what other nodes are told of the volume; false: nothing is known.
func (s *switching) standing(node string) (*proto.Standing, bool) {
	r, uuid, _ := s.look()
	s.mu.Lock()
	taking, rising := s.taking, s.rising || len(s.taking) > 0
	s.mu.Unlock()
	if r == roleSecondary && len(taking) > 0 {
		// Nothing tells yet that another primary is left behind, such as one that boots
		// after it was fenced: it has to wait.
		return &proto.Standing{Primary: true, Serving: true, Lineage: taking.Proto(), Whole: true}, true
	}
	if r == roleSecondary {
		st, open, _, _ := s.copy.replica.status()
		if !open || st.VolumeUUID != uuid {
			return nil, false
		}
		return &proto.Standing{Lineage: st.Lineage.Proto(), Whole: st.State == protocol.DiskConsistent && !st.NeedsFull, Strayed: st.Strayed}, true
	}
	m := s.managed
	m.mu.Lock()
	running := m.running // after rising was read: one of both says it
	m.mu.Unlock()
	if running == nil {
		// It is down, and comes up as primary when it does.
		l, err := s.onDisk()
		return &proto.Standing{Primary: true, Serving: rising || m.leftUp(), Lineage: l.Proto(), Whole: true}, err == nil
	}
	out := &proto.Standing{Primary: true, Serving: true, Lineage: running.primary.Lineage().Proto(), Whole: true}
	reports := running.primary.Status().Replicas
	for _, c := range s.config.Replicas {
		for i := range reports {
			if c.Peer == node && reports[i].Name == c.Name && reports[i].Epoch > 0 {
				out.BehindBytes = &reports[i].LagBytes
			}
		}
	}
	return out, true
}

// leftUp says whether the stack is there, though it is not managed, and may be written.
func (m *managed) leftUp() bool {
	if m.agent.dm == nil {
		return false
	}
	if m.config.Attach {
		exists, err := m.stackExists()
		return exists || err != nil
	}
	return mayBeWritten(m.agent.dm, m.config.Name)
}

// onDisk is the history that the label tells.
func (s *switching) onDisk() (protocol.Lineage, error) {
	state, err := s.stateOnDisk()
	return state.Effective(), err
}

// cutOnDisk is the last cut that the label tells of; the zero Position: of none.
func (s *switching) cutOnDisk() (protocol.Position, error) {
	state, err := s.stateOnDisk()
	return state.Lineage.Tip(), err
}

func (s *switching) stateOnDisk() (protocol.SourceState, error) {
	disk, err := udev.Open(s.config.Device, blockdev.OpenOptions{})
	if err != nil {
		return protocol.SourceState{}, err
	}
	defer disk.Close()
	label, err := volume.ReadLabel(disk)
	if err != nil {
		return protocol.SourceState{}, err
	}
	return protocol.DecodeSourceState(label.State)
}
