package attach

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/bpf"
	"blockferry/blockdev/deadman"
	"blockferry/blockdev/precopy"
)

// ErrTrackingLost says that what changed since a cut can't be known. It never
// means that nothing changed.
var ErrTrackingLost = errors.New("what changed since that cut is not known")

// ErrOtherDevice says that a state file belongs to another device.
var ErrOtherDevice = errors.New("not the device that was expected")

// Tracker is what follows the device's changes.
type Tracker interface {
	precopy.Tracker
	// Fresh is why tracking began anew, "" if it goes on.
	Fresh() string
	// Forget says that nobody will ask for what changed before a cut.
	Forget(upTo uint64)
	// Exact says whether Changed names nothing that was not written in between.
	Exact(since, upTo uint64) bool
	// Void ends the coverage.
	Void(reason string)
	// Close lets go, tracking goes on. Remove ends it, too.
	Close() error
	Remove() error
}

var _ Tracker = (*bpf.Tracker)(nil)

// Options say which device to attach, and how.
type Options struct {
	Name   string // of the volume
	Device string // path of the disk or partition
	// StateFile keeps what the volume is and the caller's state. It is made if
	// it is not there; then the volume is a new one.
	StateFile string
	// PinDir is a folder on a bpffs; tracking is pinned in one of its own there.
	PinDir string
	// PinOwner is bpf.Target's Owner.
	PinOwner string
	// Keep are files and folders, there or to be, that this program needs while
	// it freezes: none may stand on the device.
	Keep  []string
	Guard *deadman.Guard
	// StallBudget is how long the reads within a freeze should take; 0: 20 ms.
	StallBudget time.Duration
	// StallLimit is how long a freeze may last, what the kernel takes to freeze
	// included; then the dead-man thaws and the cut is void. 0: 1 s.
	StallLimit time.Duration
	Log        *slog.Logger // nil: discarded

	// openTracker stands in for bpf.Open in tests.
	openTracker func(bpf.Target) (Tracker, error)
}

func (o *Options) check() error {
	if o.StallLimit == 0 {
		o.StallLimit = time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.openTracker == nil {
		o.openTracker = openTracker
	}
	switch {
	case o.Name == "" || len(o.Name) > 100:
		return fmt.Errorf("a volume's name has 1 to 100 characters, not '%s'", o.Name)
	case o.StallLimit < 10*time.Millisecond || o.StallLimit > deadman.MaxLimit:
		return fmt.Errorf("volume %s: a stall limit of %s: want 10 ms to %s", o.Name, o.StallLimit, deadman.MaxLimit)
	case o.Guard == nil:
		return fmt.Errorf("volume %s: no dead-man", o.Name)
	case o.StateFile == "" || o.PinDir == "":
		return fmt.Errorf("volume %s: no place for its state file, or to pin its tracking", o.Name)
	}
	return nil
}

// Attached is a device in use, as a volume. Cut and what it returns belong to
// one goroutine at a time; everything else may be called from any.
type Attached struct {
	options Options
	log     *slog.Logger
	device  string // the kernel's name

	lock    *blockdev.DeviceLock
	disk    *blockdev.File
	tracker Tracker
	engine  *precopy.Engine
	freezer *freezer

	stateMu sync.Mutex
	state   state
	lost    string

	cutMu sync.Mutex
	self  selfWritten

	statsMu sync.Mutex
	stats   Stats
}

// Stats are values kept at cuts; reading them asks the kernel nothing.
type Stats struct {
	Cuts, VoidCuts uint64
	// Of all times in which writers were stopped.
	LongestStall, StalledTotal time.Duration
	// Of the last cut with an image: rounds read while writes went on, bytes
	// read in them, and bytes read within the freeze.
	Rounds                  int
	RoundBytes, InsideBytes int64
	// Frozen are the mount points that the last cut froze, one of each file
	// system.
	Frozen []string
}

func openTracker(t bpf.Target) (Tracker, error) {
	tracker, err := bpf.Open(t)
	if err != nil {
		return nil, err // not a nil one in an interface: whoever closes what is open would close it
	}
	return tracker, nil
}

// Open attaches a device. It refuses one that anything uses but file systems
// that can be frozen (ErrUser, which says what stands in the way), or that the
// state file, a folder of Keep or this program stand on, and one that is not
// the state file's (ErrOtherDevice). Then nothing was changed.
func Open(o Options) (*Attached, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	a := &Attached{options: o, log: o.Log.With("volume", o.Name)}
	if err := a.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("volume %s: attach: %w", o.Name, err), a.closeFiles())
	}
	return a, nil
}

// Check says what would keep Open from attaching a device with a new state file.
// It changes nothing.
func Check(device, stateFile string, keep []string) error {
	a := &Attached{options: Options{Device: device, StateFile: stateFile, Keep: keep}}
	_, err := a.look()
	if err == nil {
		_, err = stateOf(device)
	}
	return err
}

// look finds the file systems to freeze, and refuses any other user.
func (a *Attached) look() (list []fileSystem, err error) {
	o := &a.options
	if a.device, err = kernelName(o.Device); err != nil {
		return nil, err
	}
	if err := a.keptElsewhere(); err != nil {
		return nil, err
	}
	if list, err = fileSystems(o.Device); err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, notHeld(o.Device)
	}
	return list, nil
}

// pinName is of the tracking, not only the volume: numbers of cuts go back when a
// restore goes back.
func (a *Attached) pinName() string {
	return hex.EncodeToString(a.state.UUID[:]) + "-" + hex.EncodeToString(a.state.Tracking[:])
}

func (a *Attached) open() (err error) {
	o := &a.options
	list, err := a.look()
	if err != nil {
		return err
	}
	if a.lock, err = blockdev.Lock(o.Device); err != nil {
		return err
	}
	if a.disk, err = blockdev.OpenFile(o.Device, blockdev.OpenOptions{}); err != nil {
		return err
	}
	if err := a.openState(); err != nil {
		return err
	}
	target := bpf.Target{Device: o.Device, Length: a.disk.Size(), Pin: filepath.Join(o.PinDir, a.pinName()),
		Owner: o.PinOwner, Volume: o.Name}
	if err := bpf.UnpinOthers(o.PinDir, hex.EncodeToString(a.state.UUID[:]), a.pinName()); err != nil {
		return err
	}
	if a.tracker, err = o.openTracker(target); err != nil {
		return err
	}
	if _, err := blockdev.ReadTraffic(o.Device); err != nil {
		return err
	}
	if fresh := a.tracker.Fresh(); fresh != "" {
		a.log.Info("fine tracking begins", "reason", fresh)
	}
	if a.lost == "" {
		a.lost = a.tracker.Fresh()
	} else if a.tracker.Fresh() == "" {
		a.tracker.Void(a.lost)
		_ = a.tracker.Seal(sealedNever) // says again why; the next cut begins anew
	}
	if a.lost != "" && a.lost != newDevice {
		a.log.Warn("tracking begins anew: replicas will be compared in full", "reason", a.lost)
	}
	a.engine, err = precopy.New(precopy.Options{Source: a.disk, Tracker: a.tracker,
		StallBudget: o.StallBudget, StallLimit: o.StallLimit})
	if err != nil {
		return err
	}
	if a.freezer, err = newFreezer(a); err != nil {
		return err
	}
	if len(list) == 0 {
		a.log.Warn("the device is not mounted: there is nothing to freeze, and a cut is void whenever something is written while it is read", "device", o.Device)
	}
	for _, f := range list {
		a.log.Info("attached", "device", "/dev/"+f.device, "type", f.kind, "mounted-on", f.points)
	}
	return nil
}

// keptElsewhere refuses when what this program needs stands on the device.
func (a *Attached) keptElsewhere() error {
	o := &a.options
	keep := append([]string{filepath.Dir(o.StateFile)}, o.Keep...)
	if self, err := os.Executable(); err == nil {
		keep = append(keep, self)
	}
	for _, path := range keep {
		on, err := standsOn(path, a.device)
		if err != nil {
			return err
		}
		if on != "" {
			return fmt.Errorf("%w: %s is on %s, and that on %s itself: whoever freezes it must not need it; keep it elsewhere", ErrUser, path, on, o.Device)
		}
	}
	return nil
}

// openState reads the state file, or makes one, and judges whether the device
// is the one it is of.
func (a *Attached) openState() error {
	o := &a.options
	now, err := stateOf(o.Device)
	if err != nil {
		return err
	}
	was, err := readState(o.StateFile)
	if err != nil {
		return err
	}
	if was == nil {
		rand.Read(now.UUID[:])
		now.UUID[6], now.UUID[8] = now.UUID[6]&0x0f|0x40, now.UUID[8]&0x3f|0x80
		a.lost = newDevice
	} else {
		if err := was.sameDevice(&now, o.Device, o.StateFile); err != nil {
			return err
		}
		now.Generation, now.UUID, now.State, now.Tracking = was.Generation, was.UUID, was.State, was.Tracking
		switch {
		case was.Boot != now.Boot:
			a.lost = "the machine was started anew since"
		case was.Sequence != now.Sequence:
			a.lost = fmt.Sprintf("the disk went and came back since (it was number %d of this boot, now it is %d)", was.Sequence, now.Sequence)
		}
	}
	a.state = now
	return a.changeState(func(*state) {})
}

// newDevice is why the tracking of a device without a state file begins.
const newDevice = "it was not attached before"

// sealedNever is no cut's number: it is below any.
const sealedNever = 0

func kernelName(path string) (string, error) {
	id, err := blockdev.Identify(path)
	if err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", id.Major, id.Minor))
	return filepath.Base(dir), err
}

// Name is the volume's name.
func (a *Attached) Name() string { return a.options.Name }

// Path is what applications have mounted, or open.
func (a *Attached) Path() string { return a.options.Device }

// UUID is the volume's.
func (a *Attached) UUID() [16]byte { return a.stateNow().UUID }

// Size is the device's size in bytes, rounded down to blockdev.BlockSize.
func (a *Attached) Size() int64 { return a.disk.Size() }

// TrackingLost is why Open began tracking anew, "" if it did not. Every
// question about earlier cuts is then answered by ErrTrackingLost.
func (a *Attached) TrackingLost() string { return a.lost }

// Stats returns the values of the last cut.
func (a *Attached) Stats() Stats {
	a.statsMu.Lock()
	defer a.statsMu.Unlock()
	return a.stats
}

func (a *Attached) countStats(f func(*Stats)) {
	a.statsMu.Lock()
	defer a.statsMu.Unlock()
	f(&a.stats)
}

func (a *Attached) stateNow() state {
	a.stateMu.Lock()
	defer a.stateMu.Unlock()
	return a.state
}

// State is what SetState last kept.
func (a *Attached) State() []byte { return bytes.Clone(a.stateNow().State) }

// SetState keeps up to MaxStateBytes in the state file. It is durable on
// return; on an error the file holds the old or the new state.
func (a *Attached) SetState(b []byte) error {
	b = bytes.Clone(b)
	if err := a.changeState(func(s *state) { s.State = b }); err != nil {
		return fmt.Errorf("volume %s: %w", a.options.Name, err)
	}
	return nil
}

func (a *Attached) changeState(change func(*state)) error {
	a.stateMu.Lock()
	defer a.stateMu.Unlock()
	next := a.state
	change(&next)
	next.Generation++
	if err := writeState(a.options.StateFile, &next); err != nil {
		return err
	}
	a.state = next
	return nil
}

// ReadAt reads the live device past every cache: torn while writes go on, yet
// never older than the last completed write.
func (a *Attached) ReadAt(p []byte, offset int64) (int, error) { return a.disk.ReadAt(p, offset) }

// FlushSource makes everything written so far durable.
func (a *Attached) FlushSource() error { return a.disk.Flush() }

// WrittenBytes is what was written to the device or discarded on it since it
// appeared, but for what thawing itself writes. While the kernel keeps no
// statistics it is an error.
func (a *Attached) WrittenBytes() (uint64, error) {
	t, err := blockdev.ReadTraffic(a.options.Device)
	if err != nil {
		return 0, err
	}
	return t.WrittenBytes + t.DiscardedBytes - a.self.bytes.Load(), nil
}

// Forget says that every replica holds cut number: nobody will ask for what
// changed before it.
func (a *Attached) Forget(number uint64) { a.tracker.Forget(number) }

// ForgetCuts ends the coverage, for a reason: every question about an earlier
// cut is answered by ErrTrackingLost. The next cut fails with it, too.
func (a *Attached) ForgetCuts(reason string) { a.tracker.Void(reason) }

// Mounts lists the mount points of the file systems that a cut would freeze now,
// one of each; none: the device is not mounted. ErrUser: something uses it that
// can't be frozen.
func (a *Attached) Mounts() ([]string, error) {
	list, err := fileSystems(a.options.Device)
	var points []string
	for _, f := range list {
		points = append(points, f.points[0])
	}
	return points, err
}

// Close gives the device back. Tracking goes on in the kernel, so that the next
// Open goes on where this one stopped. A cut that was not released is released.
func (a *Attached) Close() error { return a.closeFiles() }

// Remove ends tracking, too. The state file stays.
func (a *Attached) Remove() error {
	err := a.tracker.Remove()
	return errors.Join(err, a.closeFiles())
}

func (a *Attached) closeFiles() error {
	var errs []error
	if a.engine != nil {
		errs = append(errs, a.engine.Close())
		a.engine = nil
	}
	if a.freezer != nil {
		errs = append(errs, a.freezer.close())
	}
	if a.tracker != nil {
		errs = append(errs, a.tracker.Close())
	}
	if a.disk != nil {
		errs = append(errs, a.disk.Close())
	}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
	}
	return errors.Join(errs...)
}

// lost maps the tracker's word onto this package's.
func trackingLost(err error) error {
	if errors.Is(err, bpf.ErrUncovered) {
		return fmt.Errorf("%w: %w", ErrTrackingLost, err)
	}
	return err
}

var _ precopy.Stopper = (*freezer)(nil)
