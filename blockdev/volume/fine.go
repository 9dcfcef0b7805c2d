package volume

import (
	"path/filepath"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/bpf"
)

// defaultRollEvery is how old the newest entry in the table of cuts gets while
// fine tracking answers. The older it is, the more has to be compared when that
// ends; each roll makes the first write to each block wait for a commit.
const defaultRollEvery = time.Minute

// fineTracker says exactly what changed, as long as it knows. The era's marks
// are the truth below it: they survive the machine, and answer whatever this
// can't.
type fineTracker struct {
	tracker *bpf.Tracker
	covered bool      // the last cut was sealed
	rolled  time.Time // the era, at a cut
}

// openFine begins or goes on with fine tracking. Without it the volume works as
// well, only coarser.
func (v *Volume) openFine() {
	root := v.options.FinePins
	if root == "" {
		return
	}
	// Coverage is in numbers of cuts, and those are of one era metadata.
	name := v.label.UUID.String()
	keep := name + "-" + v.label.EraID.String()
	if err := bpf.UnpinOthers(root, name, keep); err != nil {
		v.log.Warn("pins of earlier tracking are left", "error", err)
	}
	t, err := bpf.Open(bpf.Target{
		Device: v.options.Device, Offset: v.label.Areas.Data.Offset, Length: v.label.Areas.Data.Length, Pin: filepath.Join(root, keep),
		Owner: v.options.FineOwner, Volume: v.options.Name,
	})
	if err != nil {
		v.log.Warn("no fine tracking; what the era marks is compared before it is sent", "error", err)
		return
	}
	v.fine = &fineTracker{tracker: t}
	if first, last, ok := t.Adopted(); ok {
		v.fine.covered = true
		v.log.Info("fine tracking goes on", "first-cut", first, "last-cut", last)
	} else {
		v.log.Info("fine tracking begins", "reason", t.Fresh())
	}
}

// rollNow says whether the next cut begins an era. While fine tracking answers
// that need not be; a cut without it needs one of its own.
func (v *Volume) rollNow() bool {
	f := v.fine
	return f == nil || !f.covered || v.rollAsked.Load() != v.rollDone || time.Since(f.rolled) >= v.options.RollEvery
}

// RollNext has the next cut that is taken from now on and is whole begin an era,
// whatever tracks what: the marks can then prove that nothing was written after it,
// if nothing was while it was taken.
func (v *Volume) RollNext() { v.rollAsked.Add(1) }

// Forget says that nobody will ask for what changed before a cut. It may be
// called at any time.
func (v *Volume) Forget(upTo uint64) {
	if v.fine != nil {
		v.fine.tracker.Forget(upTo)
	}
}

// sealFine closes the cut for fine tracking. What it does not know the era
// answers.
func (c *Cut) sealFine() {
	v := c.volume
	if v.fine == nil {
		return
	}
	seal := v.fine.tracker.Seal
	if v.engine != nil {
		seal = v.engine.Seal
	}
	err := seal(c.number)
	c.fine, v.fine.covered = err == nil, err == nil
	if err != nil {
		v.lostFine(c.number, err)
	}
}

// lostFine notes that fine tracking does not know what changed before a cut.
func (v *Volume) lostFine(number uint64, err error) {
	v.fine.covered = false
	v.log.Warn("fine tracking has a gap; what the era marks is compared before it is sent", "cut", number, "error", err)
	v.countStats(func(s *Stats) { s.FineGaps++ })
}

// Exact says whether Changed(since) names only blocks that were written.
func (c *Cut) Exact(since uint64) bool {
	if !c.fine {
		return false
	}
	return c.volume.fine.tracker.Exact(since, c.number)
}

// changedFine answers from fine tracking, if that knows.
func (c *Cut) changedFine(since uint64) ([]blockdev.Extent, bool) {
	if !c.fine {
		return nil, false
	}
	extents, err := c.volume.fine.tracker.Changed(since, c.number)
	if err != nil {
		return nil, false
	}
	return blockdev.Clip(extents, c.volume.Size()), true
}

// marks is the block of the metadata snapshot to read the era's marks from. It is
// taken when the cut is asked: outside of any barrier, so that it names too much.
func (c *Cut) marks() (uint64, error) {
	c.marksMu.Lock()
	defer c.marksMu.Unlock()
	if c.snapBlock != 0 {
		return c.snapBlock, nil
	}
	v := c.volume
	if err := v.eraAnswers(); err != nil {
		return 0, err
	}
	c.hasMarks = true
	if err := v.ctl.Message(deviceName(v.options.Name, roleEra), 0, "take_metadata_snap"); err != nil {
		return 0, err
	}
	var err error
	c.snapBlock, err = v.heldSnapshot()
	return c.snapBlock, err
}

// closeFine lets go of fine tracking. It goes on in the kernel, unless the
// stack is to go.
func (v *Volume) closeFine() error {
	f := v.fine
	v.fine = nil
	switch {
	case f == nil:
		return nil
	case v.goingDown:
		return f.tracker.Remove()
	}
	return f.tracker.Close()
}
