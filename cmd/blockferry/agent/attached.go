package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"blockferry/blockdev"
	"blockferry/blockdev/attach"
	"blockferry/blockdev/deadman"
	"blockferry/blockdev/precopy"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/protocol"
)

// attached is a device in use as the agent uses it.
type attached struct{ *attach.Attached }

func (a attached) UUID() volume.UUID { return a.Attached.UUID() }

// freezable is an *attach.Attached.
type freezable interface {
	Cut(ctx context.Context, number uint64, want attach.Want) (*attach.Cut, error)
}

// takeFrozen cuts an attached device. Its view holds only what changed. When
// that is too much, or not known, or fstrim runs, the cut is one without.
func takeFrozen(a freezable, whenBusy string) takeFunc {
	return func(ctx context.Context, epoch uint64, wish protocol.CutWish) (cut, error) {
		want := attach.Want{View: wish.View, Since: wish.Since, Force: whenBusy == config.BusyStall && wish.LiveRounds >= forceAfter}
		c, err := a.Cut(ctx, epoch, want)
		var noView, busy error
		if errors.Is(err, precopy.ErrTooMuch) || errors.Is(err, attach.ErrDiscards) {
			busy = err
		}
		if wish.View && (busy != nil || errors.Is(err, attach.ErrTrackingLost)) {
			noView = err
			c, err = a.Cut(ctx, epoch, attach.Want{})
		}
		if errors.Is(err, attach.ErrDiscards) {
			return cut{}, fmt.Errorf("%w: %w", protocol.ErrPasses, err)
		}
		if err != nil {
			return cut{}, err
		}
		return cut{taken: c, view: c.View(), noView: noView, other: busy, exact: c.ChangedExact}, nil
	}
}

// bringUpAttached is bringUp for a device that is in use as it is; op is held.
func (m *managed) bringUpAttached() error {
	v := m.config
	if words, advice := m.agent.disks.missing(v.Device); words != "" {
		m.set(stageAbsent, words, advice)
		return exit.Errorf(exit.Refused, "%s", words)
	}
	switch kept, err := attach.ReadState(v.StateFile); {
	case errors.Is(err, fs.ErrNotExist):
		why, advice := "it was never attached: "+v.StateFile+" is not there", "to begin: blockferry attach "+v.Name+"; if the disk was lost: blockferry restore "+v.Name
		m.set(stageBlank, why, advice)
		return exit.Errorf(exit.Refused, "%s; %s", why, advice)
	case err != nil:
		return m.refuse(err)
	default:
		old, err := protocol.DecodeSourceState(kept.State)
		if err != nil {
			return m.refuse(err)
		}
		if old.Restore != nil {
			err := &unfinishedRestore{old.Restore}
			m.set(stageBlank, err.Error(), "to finish it: blockferry restore "+v.Name)
			return exit.Errorf(exit.Refused, "%w; to finish it: blockferry restore %s", err, v.Name)
		}
		if err := m.overtaken(kept.UUID, old.Effective()); err != nil {
			return m.refuse(err)
		}
	}
	if err := m.blankAttached(); err != nil {
		return err
	}
	pins := m.finePins()
	if pins == "" {
		return m.refuse(errors.New("what changes can't be tracked here; see the agent's log"))
	}
	deadMan := m.agent.options.DeadMan
	deadMan.Log = m.log
	guard, err := deadman.NewGuard(deadMan)
	if err != nil {
		return m.refuse(err)
	}
	device, err := pathOf(v.Device)
	if err != nil {
		return m.refuse(errors.Join(err, guard.Close()))
	}
	a, err := attach.Open(attach.Options{
		Name: v.Name, Device: device, StateFile: v.StateFile, PinDir: pins, PinOwner: m.agent.owner(), Keep: m.needed(),
		Guard: guard, StallBudget: v.StallBudget, StallLimit: v.StallLimit, Log: m.agent.log,
	})
	if err != nil {
		return m.refuse(errors.Join(err, guard.Close()))
	}
	state, err := m.begin(keptState{attached{a}})
	var r *running
	if err == nil {
		r, err = m.replicate(attached{a}, takeFrozen(a, v.WhenBusy), guard, state)
	}
	if err != nil {
		return m.refuse(errors.Join(err, a.Close(), guard.Close()))
	}
	m.nowUp(attached{a}, r)
	return nil
}

// blankAttached refuses a device that was attached before and is blank now: a new
// disk in the place of a lost one, or one that was wiped. To go on would wipe the
// replicas.
func (m *managed) blankAttached() error {
	disk, err := udev.Open(m.config.Device, blockdev.OpenOptions{})
	if err != nil {
		return m.refuse(err)
	}
	defer disk.Close()
	if err := notAReplica(disk); err != nil {
		return m.refuse(err)
	}
	if content, why := volume.Inspect(disk); content == volume.Blank {
		m.set(stageBlank, why, m.blankAdvice())
		return exit.Errorf(exit.Refused, "%s; %s", why, m.blankAdvice())
	}
	return nil
}

// needed is what the agent needs while writers are stopped.
func (m *managed) needed() []string {
	needed := []string{m.agent.options.Config.Path, filepath.Dir(m.agent.options.Socket), m.agent.options.DeadMan.Notes}
	if node := m.agent.options.Config.Node; node != nil && node.Certs != "" {
		needed = append(needed, node.Certs)
	}
	for _, r := range m.config.Replicas {
		if r.Spill != "" {
			needed = append(needed, filepath.Dir(r.Spill))
		}
	}
	return needed
}

// detach ends the replication of an attached device. Its users notice nothing.
func (m *managed) detach(ctx context.Context, force bool) (string, error) {
	m.mu.Lock()
	up, r := m.stack, m.running
	m.mu.Unlock()
	if up == nil {
		m.set(stageDown, "taken down by the operator", "blockferry up "+m.config.Name)
		return "is down already", nil
	}
	patience := downSend
	if force {
		patience = stopSend
	}
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, _, err := r.primary.Drain(limited, force)
	if err != nil && !force {
		return "", exit.Errorf(exit.Refused, "%w; to end replication all the same: blockferry down --force %s (what is missing stays marked)", err, m.config.Name)
	}
	if err := m.letGo(); err != nil {
		m.log.Warn("the volume was not let go cleanly", "error", err)
	}
	m.set(stageDown, "taken down by the operator", "blockferry up "+m.config.Name)
	if err != nil {
		return "down; replicas lack what was written last, it stays marked until the machine restarts", nil
	}
	return "down; what is written from now on stays marked until the machine restarts", nil
}

// attachedOffline is an attached device that is not in use, to be filled.
type attachedOffline struct{ *attach.Offline }

func (o attachedOffline) UUID() volume.UUID { return o.Offline.UUID() }

// openForRestore takes the device of an attached volume to fill it. An attached
// volume is as large as its device.
func (m *managed) openForRestore(p restorePlan, device string) (fillable, error) {
	v := m.config
	if p.resume {
		o, err := attach.OpenOffline(device, v.StateFile)
		return attachedOffline{o}, err
	}
	state, err := protocol.BeginRestore(p.from.config.Name, p.status.Lineage).Encode()
	if err != nil {
		return nil, err
	}
	o, err := attach.CreateOffline(device, v.StateFile, p.status.VolumeUUID, state)
	return attachedOffline{o}, err
}

// attachedRestore is the restore that was begun on an attached device, nil if
// there was none, and its volume.
func (m *managed) attachedRestore() (*protocol.RestoreState, volume.UUID, error) {
	device, err := pathOf(m.config.Device)
	if err != nil {
		return nil, volume.UUID{}, err
	}
	kept, same, err := attach.ReadStateOf(device, m.config.StateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, volume.UUID{}, nil
	}
	if err != nil || !same {
		return nil, kept.UUID, err
	}
	s, err := protocol.DecodeSourceState(kept.State)
	return s.Restore, kept.UUID, err
}
