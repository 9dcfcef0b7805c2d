package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
	"blockferry/protocol"
)

// replicaPatience is how long a restore waits for replicas that the agent has
// not looked at yet.
const replicaPatience = 15 * time.Second

// restorePlan is what a restore is going to do.
type restorePlan struct {
	from   *localReplica
	status protocol.ReplicaStatus // of it
	// seen is the disk that was looked at, begun the restore that was begun on it (nil: none).
	seen  blockdev.Identity
	begun *protocol.RestoreState
	// resume: the disk holds the beginning of this very restore.
	resume bool
	// overwrite: the disk holds the beginning of another restore.
	overwrite bool
	layout    layout.Plan
}

// planRestore decides from which replica the disk is filled, and that it may
// be. It writes nothing.
func (m *managed) planRestore(ctx context.Context, from string, force bool) (restorePlan, error) {
	var p restorePlan
	if from != "" {
		if _, err := m.config.Replica(from); err != nil {
			return p, err
		}
	}
	if up, err := m.stackExists(); err != nil {
		return p, err
	} else if up {
		return p, exit.Errorf(exit.Refused, "volume '%s' is up: its disk %s is not blank; take it down first if it is to be filled anew", m.config.Name, m.config.Device)
	}
	named := from != ""
	seen, started, begun, err := m.diskForRestore(force)
	if err != nil {
		return p, err
	}
	if started != nil && from == "" {
		// It may have another name since; then the furthest is looked for anew.
		if _, err := m.config.Replica(started.Replica); err == nil {
			from = started.Replica
		}
	}
	if p.from, p.status, err = m.choose(ctx, from); err != nil {
		return p, err
	}
	if from == "" {
		if err := m.askRemotes(ctx, p.from, p.status); err != nil {
			return p, err
		}
	}
	if !named {
		if err := m.sameVolume(begun, p.from, p.status.VolumeUUID); err != nil {
			return p, err
		}
	}
	p.seen, p.begun = seen, started
	p.resume = started != nil && started.Replica == p.from.config.Name && started.Lineage.Equal(p.status.Lineage)
	p.overwrite = started != nil && !p.resume
	if m.config.Attach {
		return p, m.sameSize(p.status.SizeBytes)
	}
	p.layout, err = m.layoutFor(p.status.SizeBytes)
	return p, err
}

// stillThat refuses what is at path unless it is the disk that was looked at: while replicas
// were asked another may have come under its name.
func (p restorePlan) stillThat(path string) error {
	now, err := udev.Look(path)
	if err == nil && !udev.Same(p.seen, now) {
		err = exit.Errorf(exit.Refused, "%s is another disk than the one that was looked at before; nothing was written to it; see that the right one is attached, then repeat the restore", path)
	}
	return err
}

// stillBegun refuses a disk that is to be overwritten, unasked, for the restore begun on it,
// unless it holds that.
func (p restorePlan) stillBegun(disk *blockdev.File) error {
	label, err := volume.ReadLabel(disk)
	if err != nil {
		return err
	}
	if s, err := protocol.DecodeSourceState(label.State); err != nil || s.Restore == nil || s.Restore.Replica != p.begun.Replica || !s.Restore.Lineage.Equal(p.begun.Lineage) {
		return exit.Errorf(exit.Refused, "%s no longer holds the restore from replica '%s' that was begun on it; nothing was written; repeat the restore", disk.Name(), p.begun.Replica)
	}
	return nil
}

// diskForRestore refuses a disk that holds what is not to be lost, and says which it looked at.
// A restore that was begun on it is returned, with its volume.
func (m *managed) diskForRestore(force bool) (seen blockdev.Identity, begun *protocol.RestoreState, of volume.UUID, err error) {
	path := m.config.Device
	disk, err := udev.Open(path, blockdev.OpenOptions{Exclusive: true})
	if errors.Is(err, fs.ErrNotExist) {
		return seen, nil, of, exit.Errorf(exit.Prerequisite, "%s is not there; attach the disk", path)
	}
	if err != nil {
		return seen, nil, of, exit.Mark(exit.Refused, err)
	}
	defer disk.Close()
	if seen, err = udev.Look(disk.Name()); err != nil { // held: no other can be there
		return seen, nil, of, exit.Mark(exit.Refused, err)
	}
	content, why := volume.Inspect(disk)
	if m.config.Attach {
		if s, of, err := m.attachedRestore(); s != nil || err != nil {
			return seen, s, of, err
		}
	} else if content == volume.Labelled {
		label, err := volume.ReadLabel(disk)
		if err != nil {
			return seen, nil, of, err
		}
		if s, err := protocol.DecodeSourceState(label.State); err == nil && s.Restore != nil {
			return seen, s.Restore, label.UUID, nil
		}
	}
	if content == volume.Foreign {
		if err := notAReplica(disk); err != nil {
			return seen, nil, of, exit.Errorf(exit.Refused, "%w; nothing was written; check the paths in the configuration; if that copy may be lost, overwrite the disk's last MiB first", err)
		}
	}
	if content != volume.Blank && !force {
		return seen, nil, of, exit.Errorf(exit.Refused, "%s is not blank: %s; nothing was written; if that may be lost, repeat with --force", path, why)
	}
	return seen, nil, of, nil
}

// sameSize refuses a device for an attached volume, which is as large as its
// device, unless that is the replica's size.
func (m *managed) sameSize(size int64) error {
	f, err := udev.Open(m.config.Device, blockdev.OpenOptions{})
	if err != nil {
		return exit.Mark(exit.Prerequisite, err)
	}
	defer f.Close()
	if f.Size() != size {
		return exit.Errorf(exit.Refused, "%s has %d bytes, the volume has %d, and an attached volume is as large as its device; use a partition of that size", m.config.Device, f.Size(), size)
	}
	return nil
}

// sameVolume refuses a replica of another volume than the one of which a restore
// was begun on the disk (zero: none was) or that was up before.
func (m *managed) sameVolume(begun volume.UUID, r *localReplica, of volume.UUID) error {
	m.mu.Lock()
	up := m.uuid
	m.mu.Unlock()
	for _, known := range []struct {
		what string
		uuid volume.UUID
	}{{m.config.Device + " holds the beginning of", begun}, {"volume '" + m.config.Name + "' was, when it was last up,", up}} {
		if !known.uuid.IsZero() && known.uuid != of {
			return exit.Errorf(exit.Refused, "%s volume %s, replica '%s' on %s holds volume %s; check the paths in the configuration, or say with --from %[3]s that this one is right",
				known.what, known.uuid, r.config.Name, r.config.Device, of)
		}
	}
	return nil
}

// choose takes the replica that is furthest. Without a name every replica has
// to be there, as one that is missing may be the furthest, and to be of the same
// volume: positions of two volumes say nothing of each other.
func (m *managed) choose(ctx context.Context, name string) (*localReplica, protocol.ReplicaStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, replicaPatience)
	defer cancel()
	var best, first *localReplica
	var have protocol.ReplicaStatus
	var of volume.UUID // first's
	var missing, blank []string
	for _, r := range m.replicas {
		if name != "" && r.config.Name != name {
			continue
		}
		r.settled(ctx)
		s, open, reason, _ := r.status()
		if open && first == nil {
			first, of = r, s.VolumeUUID
		}
		switch {
		case open && of != s.VolumeUUID:
			return nil, have, exit.Errorf(exit.Refused, "volume '%s': replica '%s' on %s holds volume %s, replica '%s' on %s holds volume %s; check the paths in the configuration, or say with --from which one is right",
				m.config.Name, first.config.Name, first.config.Device, of, r.config.Name, r.config.Device, volume.UUID(s.VolumeUUID))
		case !open:
			missing = append(missing, fmt.Sprintf("'%s' is not open (%s)", r.config.Name, reason))
			continue
		case s.State == protocol.DiskBlank: // it never held anything newer
			blank = append(blank, fmt.Sprintf("'%s' is blank", r.config.Name))
			continue
		case s.State != protocol.DiskConsistent:
			missing = append(missing, fmt.Sprintf("'%s' holds no whole image, it is %s", r.config.Name, s.State))
			continue
		case s.Strayed != "" && name == "":
			missing = append(missing, fmt.Sprintf("'%s' at %v holds blocks of no cut (%s)", r.config.Name, s.Committed, s.Strayed))
			continue
		case best == nil:
			best, have = r, s
			continue
		}
		switch relation := protocol.Compare(s.Lineage, have.Lineage); relation.Kind {
		case protocol.Same, protocol.Behind:
		case protocol.Ahead:
			best, have = r, s
		default:
			return nil, have, exit.Errorf(exit.Refused, "volume '%s': replicas '%s' (%v) and '%s' (%v) are %v; say with --from which one is right",
				m.config.Name, r.config.Name, s.Lineage, best.config.Name, have.Lineage, relation)
		}
	}
	if best == nil {
		return nil, have, exit.Errorf(exit.Refused, "volume '%s': there is nothing to restore from: %s", m.config.Name, strings.Join(append(missing, blank...), ", "))
	}
	if len(missing) > 0 {
		return nil, have, exit.Errorf(exit.Refused, "volume '%s': replica %s and may be newer than '%s' (%v); attach it, or say with --from %s that this one is right",
			m.config.Name, strings.Join(missing, ", "), best.config.Name, have.Committed, best.config.Name)
	}
	return best, have, nil
}

// layoutFor divides the disk for a volume of a size that is given.
func (m *managed) layoutFor(size int64) (layout.Plan, error) {
	v := *m.config
	v.SizeBytes = size
	sizes := map[string]int64{}
	for _, u := range v.DiskUses() {
		f, err := udev.Open(u.Path, blockdev.OpenOptions{})
		if errors.Is(err, fs.ErrNotExist) && u.Path != v.Device && u.Path != v.MetadataDevice && u.Path != v.CowDevice {
			continue // a replica that is away keeps nobody from a restore
		}
		if err != nil {
			return layout.Plan{}, err
		}
		sizes[u.Path] = f.Size()
		f.Close()
	}
	for _, r := range v.Local() {
		if sizes[r.Device] == 0 {
			sizes[r.Device] = 1 << 62
		}
	}
	return layout.Make(&v, sizes)
}
