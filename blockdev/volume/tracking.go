package volume

import (
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/dm"
	"blockferry/blockdev/era"
)

// checkTracking decides whether the era metadata is the one that the label's
// cuts belong to, and begins tracking anew if not.
func (v *Volume) checkTracking() error {
	l := &v.label
	live := v.devices[roleEra].HasActive
	wantBlock := v.options.EraBlockBytes
	if wantBlock == 0 {
		wantBlock = l.EraBlockBytes
	}
	if wantBlock != l.EraBlockBytes {
		if live {
			return fmt.Errorf("era blocks can change from %d to %d bytes only while the volume is down", l.EraBlockBytes, wantBlock)
		}
		if need := EraMetadataBytes(l.Areas.Data.Length, wantBlock); need > l.Areas.Meta.Length {
			return fmt.Errorf("era blocks of %d bytes need a metadata area of %d bytes, it has %d", wantBlock, need, l.Areas.Meta.Length)
		}
		v.lost = fmt.Sprintf("era blocks change from %d to %d bytes", l.EraBlockBytes, wantBlock)
	}
	owner, why, err := v.judgeMetadata(live)
	if err != nil {
		return err
	}
	if !owner.IsZero() && owner != l.UUID {
		return fmt.Errorf("%w: the era metadata on %s belongs to volume %s, want %s", ErrOtherVolume, v.meta.Name(), owner, l.UUID)
	}
	if why != "" && v.lost == "" {
		v.lost = why
	}
	if v.lost == "" {
		return nil
	}
	v.log.Warn("tracking begins anew: replicas will be compared in full", "reason", v.lost)
	// The label first: from here on no answer comes from the old metadata,
	// wherever this is interrupted.
	if err := v.changeLabel(func(l *Label) {
		l.EraID, l.Cuts, l.EraBlockBytes, l.Identity = NewUUID(), nil, wantBlock, identityOf(v.disk)
		l.MetaFormatted = live
	}); err != nil {
		return err
	}
	if live {
		return writeMetaID(v.meta, l)
	}
	return freshMetadata(v.meta, l)
}

// judgeMetadata says whose the era metadata is and, if it can't be used, why.
func (v *Volume) judgeMetadata(live bool) (owner UUID, lost string, err error) {
	l := &v.label
	at := l.Areas.Meta.Offset
	id, err := readAux(v.meta, at)
	switch {
	case errors.Is(err, errNoAux):
		if l.MetaElsewhere && !live {
			if content, why := Inspect(v.meta); content != Blank {
				return UUID{}, "", fmt.Errorf("%w: the metadata device is not this volume's and not blank: %s", ErrOtherVolume, why)
			}
		}
		return UUID{}, "the era metadata has no identity: it was replaced or emptied", nil
	case err != nil:
		return UUID{}, "", err
	case id.volume != l.UUID || id.kind != kindMeta:
		return id.volume, "the era metadata area holds something else", nil
	case id.era != l.EraID:
		return id.volume, "the era metadata is not the one the label was written for", nil
	}
	head := blockdev.AlignedBuffer(blockdev.BlockSize)
	if _, err := v.meta.ReadAt(head, at+auxIDBytes); err != nil {
		return UUID{}, "", fmt.Errorf("%s: read the era metadata: %w", v.meta.Name(), err)
	}
	if firstNonzero(head) < 0 {
		if !l.MetaFormatted {
			return id.volume, "", nil // the kernel will; nothing was written through it yet
		}
		return id.volume, "the era metadata was emptied", nil
	}
	super, err := era.ReadSuperblock(section{v.meta, at + auxIDBytes}, 0)
	if err != nil && live {
		// The kernel has its own in memory, and each status ends in a commit.
		if _, err = v.eraStatus(); err == nil {
			super, err = era.ReadSuperblock(section{v.meta, at + auxIDBytes}, 0)
		}
	}
	damaged := func(err error) (UUID, string, error) {
		return id.volume, fmt.Sprintf("the era metadata on %s, from byte %d, is damaged: %s", v.meta.Name(), at+auxIDBytes, err), nil
	}
	blocks := (l.Areas.Data.Length + l.EraBlockBytes - 1) / l.EraBlockBytes
	switch {
	case err != nil:
		return damaged(err)
	case super.DataBlockSize != l.EraBlockBytes || int64(super.Blocks) != blocks:
		return id.volume, fmt.Sprintf("the era metadata tracks %d blocks of %d bytes, want %d of %d", super.Blocks, super.DataBlockSize, blocks, l.EraBlockBytes), nil
	case len(l.Cuts) > 0 && super.CurrentEra < l.Cuts[len(l.Cuts)-1].Era:
		return id.volume, fmt.Sprintf("the era metadata went back in time: it is in era %d, the last cut began era %d", super.CurrentEra, l.Cuts[len(l.Cuts)-1].Era), nil
	}
	if live {
		return id.volume, "", nil // it is being written to
	}
	// All of it: the kernel goes on with a tree that is damaged somewhere, and
	// then no question is ever answered again.
	if _, err := era.ChangedInactive(section{v.meta, at + auxIDBytes}, 1); err != nil {
		return damaged(err)
	}
	return id.volume, "", nil
}

// section reads a device from an offset on.
type section struct {
	device blockdev.Device
	offset int64
}

func (s section) ReadAt(p []byte, offset int64) (int, error) {
	return s.device.ReadAt(p, s.offset+offset)
}

// eraStatus is era's status line.
type eraStatus struct {
	usedBlocks, totalBlocks uint64
	era                     uint32
	snapshot                uint64 // block of the held metadata snapshot, 0: none
}

func parseEraStatus(line string) (eraStatus, error) {
	var s eraStatus
	bad := fmt.Errorf("era's status is '%s'", line)
	fields := strings.Fields(line)
	if len(fields) != 4 {
		return s, bad
	}
	used, total, found := strings.Cut(fields[1], "/")
	var errs [4]error
	s.usedBlocks, errs[0] = strconv.ParseUint(used, 10, 64)
	s.totalBlocks, errs[1] = strconv.ParseUint(total, 10, 64)
	number, err := strconv.ParseUint(fields[2], 10, 32)
	s.era, errs[2] = uint32(number), err
	if fields[3] != "-" {
		s.snapshot, errs[3] = strconv.ParseUint(fields[3], 10, 64)
		if s.snapshot == 0 {
			return s, bad
		}
	}
	if !found || errors.Join(errs[:]...) != nil {
		return s, bad
	}
	return s, nil
}

// eraAnswers refuses to speak to an era device that is suspended: it would
// not answer until somebody resumes it.
func (v *Volume) eraAnswers() error {
	info, err := v.ctl.Info(deviceName(v.options.Name, roleEra))
	switch {
	case err != nil:
		return err
	case !info.HasActive:
		return fmt.Errorf("%s has no table: is the volume up?", info.Name)
	case info.Suspended:
		return fmt.Errorf("%s is suspended by somebody else: resume it with 'dmsetup resume %s'", info.Name, info.Name)
	}
	return nil
}

func (v *Volume) eraStatus() (eraStatus, error) {
	name := deviceName(v.options.Name, roleEra)
	if err := v.eraAnswers(); err != nil {
		return eraStatus{}, err
	}
	targets, err := v.ctl.Status(name)
	if err != nil {
		return eraStatus{}, err
	}
	if len(targets) != 1 || targets[0].Type != "era" {
		return eraStatus{}, fmt.Errorf("%s has the targets '%v', want one era", name, targets)
	}
	s, err := parseEraStatus(targets[0].Params)
	if err != nil {
		return s, fmt.Errorf("%s: %w", name, err)
	}
	v.countStats(func(t *Stats) {
		t.MetaUsedBlocks, t.MetaTotalBlocks, t.Era = s.usedBlocks, s.totalBlocks, s.era
	})
	return s, nil
}

// beginEra begins an era, with writes going on, and says which one is the present
// then. A cut that follows may count from it as well as from one begun with writers
// stopped, who then need not wait for its commits:
//   - The kernel says so when every write that it looks at from then on is marked in
//     that era or a later one.
//   - A write that it had looked at before may bear an older mark, and land later. It
//     is one of the top device, whose suspend waits for it: the cut has it.
//   - A write between this and the suspend is in the cut, and named as changed after
//     it, too: more than need be. What changed before the cut is asked of marks that
//     are taken later, which have it as well.
func (v *Volume) beginEra() (uint32, error) {
	if err := v.eraAnswers(); err != nil {
		return 0, err
	}
	if err := v.ctl.Message(deviceName(v.options.Name, roleEra), 0, "checkpoint"); err != nil {
		return 0, err
	}
	status, err := v.eraStatus()
	return status.era, err
}

// heldSnapshot is the block of the metadata snapshot that was just taken.
func (v *Volume) heldSnapshot() (uint64, error) {
	status, err := v.eraStatus()
	if err == nil && status.snapshot == 0 {
		err = fmt.Errorf("%s has no metadata snapshot though it took one", deviceName(v.options.Name, roleEra))
	}
	return status.snapshot, err
}

// dropMetadataSnapshot drops the metadata snapshot if there is one. It would
// outlive the device, and the next cut could not take its own.
func (v *Volume) dropMetadataSnapshot() error {
	status, err := v.eraStatus()
	if err != nil || status.snapshot == 0 {
		return err
	}
	return v.ctl.Message(deviceName(v.options.Name, roleEra), 0, "drop_metadata_snap")
}

// baseToLinear ends what may be left of a frozen view. One call suspends,
// exchanges the table and resumes: nobody can be stopped in between. Writes
// wait while it waits for what is in flight: at most for patience, then the
// error is ErrNoDrain and the base is as it was.
func (v *Volume) baseToLinear(patience time.Duration) error {
	name := deviceName(v.options.Name, roleBase)
	table, err := v.ctl.Table(name)
	if err != nil {
		return err
	}
	want, err := v.table(roleBase)
	if err != nil {
		return err
	}
	if len(table) == 1 && table[0] == want {
		return v.ctl.Clear(name)
	}
	if err := v.ctl.Load(name, []dm.Target{want}); err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	start := time.Now()
	defer func() { v.stopped("release", time.Since(start)) }()
	stop := nudgeAfter(v.ctl, patience)
	for range suspendTries {
		if err = v.ctl.Resume(name); err == nil || stop.fired() {
			break
		}
		// Some kernels drop the waiting table when they are interrupted.
		if err = errors.Join(v.ctl.Load(name, []dm.Target{want}), err); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if fired := stop.end(); err != nil {
		if fired {
			err = fmt.Errorf("%w: %s had writes in flight for %s: %w", ErrNoDrain, name, patience, err)
		}
		return errors.Join(err, v.ctl.Clear(name))
	}
	return nil
}

// removeSnapshot removes the frozen view's device if there is one.
func (v *Volume) removeSnapshot() error {
	err := v.ctl.Remove(deviceName(v.options.Name, roleSnap))
	if errors.Is(err, dm.ErrNotExist) {
		return nil
	}
	return err
}
