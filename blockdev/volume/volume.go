package volume

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/deadman"
	"blockferry/blockdev/dm"
	"blockferry/blockdev/precopy"
)

const (
	// chunkBytes is the grain in which a frozen view keeps what is overwritten.
	chunkBytes        = 16 << 10
	defaultStallLimit = time.Second
)

// ErrTrackingLost says that what changed since a cut can't be known. It never
// means that nothing changed.
var ErrTrackingLost = errors.New("what changed since that cut is not known")

// ErrOtherVolume says that a device belongs to another volume, or is a copy
// of the right one.
var ErrOtherVolume = errors.New("not the device that was expected")

// Options say which volume Up puts up, and how.
type Options struct {
	Name   string // of the device applications open
	Device string // path of the disk
	// CowDevice and MetaDevice are where these areas are when they are not on
	// the disk.
	CowDevice, MetaDevice string
	// UUID is the volume's; zero: whatever the label says.
	UUID UUID
	// EraBlockBytes is the grain of tracking; 0: as the label says. Another
	// grain than the label's begins tracking anew.
	EraBlockBytes int64
	// StallLimit is how long writers may be stopped for a cut; 0: 1 s.
	StallLimit time.Duration
	// FinePins is a folder on a bpffs in which fine tracking is pinned; "": the
	// era tracks alone. Where the kernel can't track finely it is the same.
	FinePins string
	// FineOwner is bpf.Target's Owner.
	FineOwner string
	// RollEvery is how often an era is begun while fine tracking answers; 0: 1 min.
	RollEvery time.Duration
	// PreCopy has CutSince read into memory what changed, in rounds, the last
	// with writers stopped for about StallBudget (0: 20 ms), where fine tracking
	// knows what that is.
	PreCopy     bool
	StallBudget time.Duration
	// FreezeFilesystem freezes a mounted file system for each cut, so that an
	// image needs no log replay. It costs far longer stalls.
	FreezeFilesystem bool
	// AllowOldKernel takes kernels that lose tracking in a crash.
	AllowOldKernel bool
	// AllowOtherDisk takes a label that was written on a disk with another
	// identity; tracking begins anew.
	AllowOtherDisk bool
	Guard          *deadman.Guard
	// Hold is called by Up when the outermost device is there, and unless an earlier
	// process left it up, before anything can be written to it: whoever writes under a
	// lease has its deadline held (deadman.HoldLease). Its error is Up's. Nil: nothing is.
	Hold func() error
	Log  *slog.Logger // nil: discarded
}

func (o *Options) check() error {
	if o.StallLimit == 0 {
		o.StallLimit = defaultStallLimit
	}
	if o.RollEvery == 0 {
		o.RollEvery = defaultRollEvery
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case o.Name == "" || len(o.Name) > 100:
		return fmt.Errorf("a volume's name has 1 to 100 characters, not '%s'", o.Name)
	case o.StallLimit < 10*time.Millisecond || o.StallLimit > deadman.MaxLimit:
		return fmt.Errorf("volume %s: a stall limit of %s: want 10 ms to %s", o.Name, o.StallLimit, deadman.MaxLimit)
	case o.EraBlockBytes != 0 && checkEraBlock(o.EraBlockBytes) != nil:
		return fmt.Errorf("volume %s: %w", o.Name, checkEraBlock(o.EraBlockBytes))
	case o.Guard == nil:
		return fmt.Errorf("volume %s: no dead-man", o.Name)
	}
	return nil
}

// Volume is a volume that is up. Cut and what it returns belong to one
// goroutine at a time; everything else may be called from any.
type Volume struct {
	ctl     *dm.Control
	options Options
	log     *slog.Logger

	lock *blockdev.DeviceLock
	disk *blockdev.File // the disk itself: the label, nothing else
	cow  *blockdev.File // where the areas are: disk or a device of its own
	meta *blockdev.File
	data *blockdev.File // <name>-data, for reading live
	eras *blockdev.File // <name>-meta, for reading what changed
	stat *os.File       // the top device's statistics

	devices map[string]dm.Info // by role

	fine      *fineTracker    // nil: the era tracks alone
	engine    *precopy.Engine // nil: no pre-copy
	tooMuch   precopy.Reason  // why the last cut was not read into memory; "": it was
	newest    uint64          // cut of this process
	rollAsked atomic.Uint64   // how often RollNext was called
	rollDone  uint64          // of them, before the last whole cut that began an era
	goingDown bool

	labelMu sync.Mutex
	label   Label
	lost    string // why tracking began anew when the volume came up

	noDiscards string      // why the volume takes none, "": it does
	limits     *limitWatch // of discards; nil before the stack is open

	cutMu sync.Mutex
	cut   *Cut // not yet released

	statsMu sync.Mutex
	stats   Stats
}

// Stats are values kept at cuts; reading them asks the kernel nothing.
type Stats struct {
	Cuts, VoidCuts uint64
	// FineGaps counts cuts for which fine tracking had lost events.
	FineGaps uint64
	// Of all times in which writers were stopped, also those that ended a view.
	LongestStall, StalledTotal time.Duration
	// MetaUsedBlocks of MetaTotalBlocks (4 KiB each) of era metadata are in
	// use; when they are all used, applications' writes fail.
	MetaUsedBlocks, MetaTotalBlocks uint64
	Era                             uint32
}

// Stats returns the values of the last cut.
func (v *Volume) Stats() Stats {
	v.statsMu.Lock()
	defer v.statsMu.Unlock()
	return v.stats
}

func (v *Volume) countStats(f func(*Stats)) {
	v.statsMu.Lock()
	defer v.statsMu.Unlock()
	f(&v.stats)
}

// stopped counts a time in which writers were stopped, and why.
func (v *Volume) stopped(why string, length time.Duration) {
	v.countStats(func(s *Stats) {
		s.StalledTotal += length
		s.LongestStall = max(s.LongestStall, length)
	})
	v.log.Debug("writers stopped", "for", why, "seconds", length.Seconds())
}

// Name is the volume's name.
func (v *Volume) Name() string { return v.options.Name }

// Path is what applications open.
func (v *Volume) Path() string { return dm.NodePath(v.options.Name) }

// UUID is the volume's.
func (v *Volume) UUID() UUID { return v.labelNow().UUID }

// Size is the volume's size in bytes.
func (v *Volume) Size() int64 { return v.labelNow().Areas.Data.Length }

// TrackingLost is why Up began tracking anew, "" if it did not. Every
// question about earlier cuts is then answered by ErrTrackingLost.
func (v *Volume) TrackingLost() string { return v.lost }

func (v *Volume) labelNow() Label {
	v.labelMu.Lock()
	defer v.labelMu.Unlock()
	return v.label
}

// State is what SetState last kept.
func (v *Volume) State() []byte {
	return append([]byte(nil), v.labelNow().State...)
}

// SetState keeps up to MaxStateBytes in the label. It is durable on return;
// on an error the label holds the old or the new state.
func (v *Volume) SetState(state []byte) error {
	state = append([]byte(nil), state...)
	return v.changeLabel(func(l *Label) { l.State = state })
}

// ForgetCuts drops the table of cuts: every question about an earlier cut is
// answered by ErrTrackingLost. For what changes the volume's content beside
// its own stack.
func (v *Volume) ForgetCuts() error {
	if v.fine != nil {
		v.fine.tracker.Void("the table of cuts was dropped")
	}
	return v.changeLabel(func(l *Label) { l.Cuts = nil })
}

func (v *Volume) changeLabel(change func(*Label)) error {
	v.labelMu.Lock()
	defer v.labelMu.Unlock()
	next := v.label
	change(&next)
	if err := writeLabel(v.disk, &next); err != nil {
		return fmt.Errorf("volume %s: %w", v.options.Name, err)
	}
	v.label = next
	return nil
}

// ReadAt reads the live volume past every cache: torn while writes go on, yet
// never older than the last completed write.
func (v *Volume) ReadAt(p []byte, offset int64) (int, error) { return v.data.ReadAt(p, offset) }

// FlushSource makes everything written so far durable.
func (v *Volume) FlushSource() error { return v.data.Flush() }

// WrittenBytes is what was written to the volume or discarded on it since it
// came up. While the
// kernel keeps no statistics it is an error: a count that stands still must
// not pass for a volume that nobody writes to.
func (v *Volume) WrittenBytes() (uint64, error) {
	if err := keepStatistics(v.devices[roleTop]); err != nil {
		return 0, err
	}
	var buffer [512]byte
	return v.readWritten(buffer[:])
}

// readWritten reads the statistics into buffer; it does not allocate.
func (v *Volume) readWritten(buffer []byte) (uint64, error) {
	n, err := unix.Pread(int(v.stat.Fd()), buffer, 0)
	if err != nil {
		return 0, fmt.Errorf("volume %s: read its statistics: %w", v.options.Name, err)
	}
	written, ok := blockdev.StatField(buffer[:n], 7)
	discarded, and := blockdev.StatField(buffer[:n], 14)
	if !ok || !and {
		return 0, fmt.Errorf("volume %s: its statistics have no fields 7 and 14", v.options.Name)
	}
	return (written + discarded) * blockdev.SectorSize, nil
}

// Close gives the volume's devices and the lock back; the volume stays up.
// A cut that was not released is released first.
func (v *Volume) Close() error {
	v.cutMu.Lock()
	cut := v.cut
	v.cutMu.Unlock()
	var errs []error
	if cut != nil {
		errs = append(errs, cut.Release())
	}
	return errors.Join(append(errs, v.closeFiles())...)
}

func (v *Volume) closeFiles() error {
	errs := []error{v.closePreCopy(), v.closeFine()}
	seen := map[*blockdev.File]bool{}
	for _, f := range []*blockdev.File{v.data, v.eras, v.cow, v.meta, v.disk} {
		if f != nil && !seen[f] {
			seen[f] = true
			errs = append(errs, f.Close())
		}
	}
	if v.stat != nil {
		errs = append(errs, v.stat.Close())
	}
	if v.limits != nil {
		errs = append(errs, v.limits.close())
		v.limits = nil
	}
	if v.lock != nil {
		errs = append(errs, v.lock.Close())
	}
	return errors.Join(errs...)
}

// CheckKernel refuses kernels whose dm-era loses tracking in a crash.
func CheckKernel(release string, allowOld bool) error {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return fmt.Errorf("'%s' is no kernel release like 6.1.0", release)
	}
	if !allowOld && (major < 5 || major == 5 && minor < 12) {
		return fmt.Errorf("kernel %s loses track of changes in a crash (dm-era before 5.12): use a newer one, or allow it explicitly", release)
	}
	return nil
}

func kernelRelease() (string, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", err
	}
	return unix.ByteSliceToString(name.Release[:]), nil
}

// keepStatistics switches a device's statistics on. It is an error if they
// were off, as what they say is then too little.
func keepStatistics(info dm.Info) error {
	path := filepath.Join(queueDir(info), "iostats")
	now, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("statistics of %s: %w", info.Name, err)
	}
	if strings.TrimSpace(string(now)) == "1" {
		return nil
	}
	err = os.WriteFile(path, []byte("1"), 0)
	return errors.Join(fmt.Errorf("the statistics of %s were switched off: %s was %s; leave it at 1", info.Name, path, strings.TrimSpace(string(now))), err)
}
