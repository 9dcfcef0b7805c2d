package agent

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/progress"
	"blockferry/proto"
	"blockferry/protocol"
)

// progressEvery is how often a restore tells how far it is.
const progressEvery = 100 * time.Millisecond

// restoreProgress is how far a restore is, in bytes.
type restoreProgress struct {
	replica     string
	done, total atomic.Uint64
}

// restored is what a volume that comes up after a restore has to know.
type restored struct {
	cut   uint64
	eraID volume.UUID
}

// restoreVolume is the operator's command. Interrupted it stops; repeated it
// goes on where it stopped.
func (m *managed) restoreVolume(ctx context.Context, from string, force bool, send func(*proto.Progress) error) error {
	if !m.op.TryLock() {
		return exit.Errorf(exit.Refused, "volume '%s' is being brought up, taken down or restored at this moment; see 'blockferry status'", m.config.Name)
	}
	defer m.op.Unlock()
	if err := m.notSecondary(); err != nil { // since it was asked
		return err
	}
	return m.restoreHere(ctx, from, force, send)
}

// restoreHere fills the disk from a replica and brings the volume up; op is
// held. send may be nil.
func (m *managed) restoreHere(ctx context.Context, from string, force bool, send func(*proto.Progress) error) error {
	plan, err := m.planRestore(ctx, from, force)
	if err != nil {
		return err
	}
	begun := time.Now()
	state := &restoreProgress{replica: plan.from.config.Name}
	state.total.Store(uint64(plan.status.SizeBytes))
	m.mu.Lock()
	m.progress = state
	m.mu.Unlock()
	m.set(stageRestoring, "from replica '"+state.replica+"'", "")
	done, err := m.fill(ctx, plan, state, send, force)
	m.mu.Lock()
	m.progress = nil
	m.mu.Unlock()
	if err != nil {
		m.log.Error("restore failed", "error", err)
		m.set(stageBlank, "a restore failed: "+err.Error(), "blockferry restore "+m.config.Name+" goes on where it stopped")
		var mismatch *protocol.RestoreMismatchError
		if errors.As(err, &mismatch) {
			return exit.Mark(exit.Differs, err)
		}
		return err
	}
	message := m.outcome(plan, begun)
	m.log.Info("restored", "outcome", message)
	m.agent.hub.publish(m.config.Name, state.replica, "restored", message)
	if err := m.bringUp(&done); err != nil {
		if m.at() == stageRestoring {
			m.set(stageStarting, err.Error(), "")
		}
		return fmt.Errorf("%s; it is restored, but not up: %w", message, err)
	}
	if send == nil {
		return nil
	}
	return send(&proto.Progress{Finished: true, Message: message})
}

// outcome says which point in time came back, and what is lost as far as that
// is known.
func (m *managed) outcome(p restorePlan, begun time.Time) string {
	at := time.Unix(0, p.status.CutUnixNanos).UTC()
	lost := begun.Sub(at)
	return fmt.Sprintf("%s: restored epoch %d (%v) from replica '%s', cut at %s, %s, what holds data compared, in %s; writes after the cut are lost: at most %s, the time from the cut to the restore",
		m.config.Name, p.status.Committed.Epoch, p.status.Committed, p.from.config.Name, at.Format("2006-01-02 15:04:05.000 UTC"),
		config.FormatSize(p.status.SizeBytes), progress.FormatDuration(time.Since(begun)), progress.FormatDuration(lost))
}

// fill formats the disk, unless a restore is resumed, and copies the image.
func (m *managed) fill(ctx context.Context, p restorePlan, state *restoreProgress, send func(*proto.Progress) error, force bool) (r restored, err error) {
	at, err := pathsOf(m.config)
	if err == nil {
		err = p.stillThat(at.device)
	}
	if err != nil {
		return r, err
	}
	var disk fillable
	switch {
	case m.config.Attach:
		disk, err = m.openForRestore(p, at.device)
	case p.resume:
		disk, err = openLabelled(at.device)
	default:
		if err = m.formatForRestore(p, at, force); err == nil {
			disk, err = openLabelled(at.device)
		}
	}
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	if err := p.stillThat(at.device); err != nil { // now it is held
		return r, err
	}
	codec, _, err := compression(p.from.config)
	if err != nil {
		return r, err
	}
	old, err := protocol.DecodeSourceState(disk.State())
	if err != nil {
		return r, err
	}
	last := time.Time{}
	lineage, err := protocol.RestoreTo(ctx, protocol.LocalClient(m.agent.receiver), protocol.RestoreConfig{
		VolumeUUID: disk.UUID(), Replica: p.from.config.Name, SizeBytes: p.status.SizeBytes, Target: disk, From: old.Restore, Codec: codec,
		Save: func(s protocol.RestoreState) error { return saveRestore(disk, s) },
		Progress: func(at protocol.RestoreProgress) {
			state.done.Store(uint64(at.DoneBytes))
			if send == nil || time.Since(last) < progressEvery && at.DoneBytes < at.TotalBytes {
				return
			}
			last = time.Now()
			// A command that went away ends ctx.
			_ = send(&proto.Progress{Phase: at.Phase, DoneBytes: uint64(at.DoneBytes), TotalBytes: uint64(at.TotalBytes)})
		},
	})
	if err != nil {
		return r, err
	}
	finished, err := protocol.FinishRestore(protocol.SourceState{Restore: &protocol.RestoreState{Replica: p.from.config.Name, Lineage: lineage}})
	if err != nil {
		return r, err
	}
	encoded, err := finished.Encode()
	if err != nil {
		return r, err
	}
	r.cut = lineage.Tip().Epoch
	if l, ok := disk.(labelled); ok {
		r.eraID = l.Label().EraID
	}
	return r, disk.SetState(encoded)
}

// fillable is a disk that is filled, with the place of its volume's state.
type fillable interface {
	blockdev.Device
	UUID() volume.UUID
	State() []byte
	SetState(state []byte) error
	Close() error
}

// labelled is one that holds a label.
type labelled struct{ *volume.Offline }

func openLabelled(device string) (fillable, error) {
	o, err := openOffline(device)
	return labelled{o}, err
}

func (l labelled) UUID() volume.UUID { return l.Label().UUID }
func (l labelled) State() []byte     { return l.Label().State }

func saveRestore(disk fillable, s protocol.RestoreState) error {
	encoded, err := protocol.SourceState{Restore: &s}.Encode()
	if err != nil {
		return err
	}
	return disk.SetState(encoded)
}

// formatForRestore makes the disk one that says 'half restored' before its
// first byte is written. The volume keeps its UUID and its size.
func (m *managed) formatForRestore(p restorePlan, at diskPaths, force bool) error {
	state, err := protocol.BeginRestore(p.from.config.Name, p.status.Lineage).Encode()
	if err != nil {
		return err
	}
	v := m.config
	_, err = volume.Format(volume.FormatOptions{
		Device: at.device, CowDevice: at.cow, MetaDevice: at.metadata,
		SizeBytes: p.status.SizeBytes, EraBlockBytes: v.EraBlockBytes, CowBytes: p.layout.Volume.CowBytes, TailBytes: p.layout.Volume.TailBytes,
		UUID: p.status.VolumeUUID, State: state, Overwrite: force || p.overwrite,
		Check: func(disk *blockdev.File) error {
			if err := p.stillThat(disk.Name()); err != nil || force || !p.overwrite {
				return err
			}
			return p.stillBegun(disk)
		},
	})
	return err
}
