package protocol

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
)

// ErrJournalFull says that an epoch doesn't fit into the journal, also after
// everything before it was applied. The replica keeps its image; the way out
// is a larger journal or an in-place epoch.
var ErrJournalFull = errors.New("journal full")

// ErrJournalDamaged says that epochs which were acknowledged can't be read
// back from the journal. See JournalDamage.
var ErrJournalDamaged = errors.New("journal damaged")

// ErrUnreadable says that epochs which were acknowledged could not be read, for
// a reason that may pass: that is no damage, and nothing is dropped for it.
var ErrUnreadable = errors.New("can't be read at present")

// ErrNeedsFull says that only a full epoch can follow: the replica is blank or
// inconsistent, was changed outside, or went another way than the volume.
var ErrNeedsFull = errors.New("needs a full sync")

// ErrChangedOutside says that a replica was written to by somebody else while
// committed epochs waited in its journal.
var ErrChangedOutside = errors.New("changed outside")

// ErrNotForward says that an epoch does not lie ahead of what a replica holds.
var ErrNotForward = errors.New("not ahead of the replica")

// ErrSums says that what arrived is not what the sender says it sent.
var ErrSums = errors.New("frames missing or changed on the way")

// ErrStrayed says that a copy holds blocks that belong to no cut of the line it is
// to follow: they are overwritten only on the operator's word, and saved first.
var ErrStrayed = errors.New("strayed")

// ErrTookOver says that a replica became a primary's device: what it holds now
// is no cut.
var ErrTookOver = errors.New("took over as primary")

// ErrNotConsistent says that a replica holds no image to read.
var ErrNotConsistent = errors.New("replica holds no consistent image")

// ErrHeld says that a replica's device is held for somebody else.
var ErrHeld = errors.New("held already")

// ErrClosed says that a replica was closed.
var ErrClosed = errors.New("replica closed")

// Mode says where an epoch's frames go until its commit.
type Mode uint8

const (
	ModeJournal Mode = 1 // to the journal; the old image stays until commit
	ModeInPlace Mode = 2 // straight to the data area, labelled inconsistent until commit
)

// MaxStreams is how many streams may carry one epoch, MaxRounds how many
// rounds it may have, MaxAppendBytes how much one Append takes.
const (
	MaxStreams     = 16
	MaxRounds      = 64
	MaxAppendBytes = 4 << 20

	maxPendingEpochs = 16 // committed and not yet applied; Commit waits when there are more
	maxHeldEpochs    = 64 // the same while the device is held (HoldDevice)
)

// EpochStart announces an epoch.
type EpochStart struct {
	Epoch   uint64
	Attempt uint32
	Mode    Mode
	// Full says that the frames, together with ranges found equal by
	// comparison with ReadData, describe the whole volume, not changes since
	// the replica's position.
	Full bool
	// Lineage is the replica's once the epoch is committed, as far as it is
	// known yet: its tip's epoch is at least Epoch, and Commit may replace it.
	Lineage Lineage
	// Discard is the position that the replica is at and that the operator
	// allowed to be given up, though no copy of the epoch's lineage was ever there;
	// blocks that only this copy has go to a rescue file before the commit.
	// It is for ModeJournal. The frames describe all that differs from the replica's data,
	// or changed at either side since the two were the same. Zero: nothing is given up.
	Discard Position
	// Token names the epoch, should its session be lost: Interrupt then keeps it. Zero: it does not.
	Token token
	// CutUnixNanos is the wall clock of the cut, for people only.
	CutUnixNanos int64
}

// EpochCommit decides an epoch.
type EpochCommit struct {
	Epoch   uint64 // of EpochStart
	Attempt uint32 // of EpochStart
	// Streams[i] is what stream i carried; streams that carried nothing may be
	// left out at the end.
	Streams []StreamSum
	// Lineage is what the replica then holds; its tip's epoch is at least
	// Epoch. Nil: that of EpochStart.
	Lineage Lineage
	// CutUnixNanos is the wall clock of the last cut, for people only; 0: that
	// of EpochStart.
	CutUnixNanos int64
}

// ReplicaStatus is a snapshot of where a replica stands.
type ReplicaStatus struct {
	VolumeUUID       [16]byte
	ReplicaUUID      [16]byte
	SizeBytes        int64
	DataOffset       int64 // where on the disk the data begins, in bytes
	State            DiskState
	Reason           string // of an inconsistent state, in words
	NeedsFull        bool
	ChangedOutside   bool     // inconsistent because somebody else wrote to it
	Strayed          string   // why it holds blocks of no committed position; empty: it does not
	TookOver         Position // what it began as primary; zero: it did not
	GivenUp          Position // what the operator gave up of it, while it is just there (GiveUp)
	Committed        Position
	Applied          Position
	Lineage          Lineage // up to Committed
	CutUnixNanos     int64   // of Committed
	PendingEpochs    int     // committed, not yet applied
	JournalBytes     int64
	JournalFreeBytes int64  // room for frames right now
	JournalUsedBytes int64  // committed and not applied, with all that belongs to it
	SpilledBytes     int64  // in the spill file: of the open epoch, or of the last committed one
	SpillProblem     string // why the spill file can't be used, while an epoch that needs none can go on
	Kept             KeptStatus
	Held             Position // what the device is held at (HoldDevice); zero: it is not
	Rescued          string   // the last rescue file written since the replica was opened
	Warnings         []string
	Err              error // the fault after which the replica must be opened again
}

// OpenOptions changes how a replica is opened.
type OpenOptions struct {
	// DropJournal accepts the loss of acknowledged epochs that the journal
	// can't give back, or whose image was changed outside: the replica falls
	// back to the image it has, or is inconsistent if it has none.
	DropJournal bool
	// Spill is the replica's spill file, nil for none.
	Spill SpillFile
	// SpillLimitBytes is how much one epoch may spill; 0: nothing new is put
	// there, and the file is only read, if what is committed lies in it.
	SpillLimitBytes int64
	// RescueDir is a folder for rescue files. Empty: a copy that went its own
	// way is never overwritten.
	RescueDir string
	// TookOver opens a replica that has taken over all the same, for TakeOver to
	// be finished: see there.
	TookOver bool
}

// Replica is a copy of a volume on a Store: it holds the image of the last
// epoch applied, and in its journal those committed since. One epoch at a
// time is open; its frames come by Append, and Commit decides it. Meanwhile a goroutine
// applies the epochs before.
//
// Its memory is bounded: 5 journal segments and twice 7 runs of 1.25 MiB, and for each of up to 16
// pending epochs (64 while the device is held) about 2 MiB per TiB of volume that it touches; while others are fed from it,
// up to 64 MiB more.
//
// After a fault of the store every call returns it: close the replica and
// open it again, which finds out what is durable. All methods may be called
// from several goroutines at once.
type Replica struct {
	store Store
	lay   layout
	ring  ring
	cmap  changeMap
	dec   *Decompressor
	pool  sync.Pool  // scratch memory of Append
	runs  *sync.Pool // of the pipes
	stop  context.CancelFunc
	wg    sync.WaitGroup

	rescueDir  string
	spillFile  SpillFile
	spillLimit int64
	spill      SpillStore // nil: not open. Used by the open epoch, or by an apply, never by both

	epochMu ioMutex // held by Begin, Append, Commit, Abort: guards open
	open    *openEpoch

	superMu   ioMutex // held while a superblock is written: guards superKept
	superKept bool    // the copy that was read at the open is durable

	mu       sync.Mutex
	wake     chan struct{} // closed and replaced when anything below changes
	sb       superblock    // as it is on the device
	pending  []*pendingEpoch
	applying bool // the data area is being written by an apply
	inPlace  bool // ... or by an in-place epoch
	holds    int
	waiting  []*holdWaiter
	device   *Image   // of HoldDevice, also while that waits; nil: nobody asked
	spilling bool     // an epoch that goes on in the spill file is being committed
	commits  uint64   // epochs committed since it was opened
	applies  uint64   // ... and applied, those found pending counted in both
	brought  uint64   // bytes of the frames committed since it was opened, one at least for each epoch
	imaged   uint64   // ... and applied
	fine     *fineLog // what of them changed, to the block; nil: nobody asks
	usedEnd  uint64   // how far the open epoch has got in the journal
	spilled  int64    // bytes in the spill file
	noSpill  string   // why it can't be used
	rescued  string   // path of the last rescue file
	givenUp  Position
	kept     KeptStatus
	warnings []string
	fail     error
	closed   bool
}

// holdWaiter keeps applies from starting once its epoch is there.
type holdWaiter struct{ target uint64 }

// OpenReplica opens a formatted device, applies what was committed and drops
// what was not. Errors: ErrNoSuperblock, ErrJournalDamaged (a *JournalDamage)
// and ErrChangedOutside, and ErrTookOver, for which see OpenOptions, ErrUnreadable where another
// try may do, with ErrSpill if what is
// missing lies in the spill file; in these cases nothing
// was written. ctx bounds only the opening.
func OpenReplica(ctx context.Context, store Store, o OpenOptions) (*Replica, error) {
	sb, warnings, err := readSuperblocks(store)
	if err != nil {
		return nil, fmt.Errorf("open replica %w", err)
	}
	if p := sb.tookOver; !p.IsZero() && !o.TookOver {
		return nil, fmt.Errorf("open replica %s: %w as %v: it is no replica until it has stood down", store.Name(), ErrTookOver, p)
	}
	dec, err := NewDecompressor(applyWorkers)
	if err != nil {
		return nil, err
	}
	r := &Replica{rescueDir: o.RescueDir, store: store, lay: sb.layout, dec: dec, sb: *sb, runs: newRunPool(), epochMu: newIOMutex(), superMu: newIOMutex(), wake: make(chan struct{}), warnings: warnings}
	r.ring = ring{store: store, area: sb.layout.journal, tag: sb.tag(), spilled: r.openSpilled}
	r.spillFile, r.spillLimit = o.Spill, o.SpillLimitBytes
	r.cmap = changeMap{store, sb.layout, sb.tag()}
	r.pool.New = func() any { b := make([]byte, MaxDataFrameBytes); return &b }
	err = r.recover(ctx, o)
	if err == nil {
		err = r.keepSuper(r.sb)
	}
	if err != nil {
		r.closeSpill()
		return nil, fmt.Errorf("open replica: %w", err)
	}
	r.closeSpill()
	if r.mayDivert() {
		err := r.ensureSpill()
		if r.fail != nil {
			r.closeSpill()
			return nil, fmt.Errorf("open replica: %w", r.fail)
		}
		if err != nil { // the epochs that fit into the journal can do without
			r.warn([]string{err.Error()})
		}
	}
	applyCtx, stop := context.WithCancel(context.Background())
	r.stop = stop
	r.wg.Go(func() { r.applyLoop(applyCtx) })
	return r, nil
}

// ioMutex is a mutex that is held while a disk is waited for. Whoever waits for it
// waits for a channel, first come, first served: a test that lets one thing happen
// at a time can tell that nothing else goes on, as of a sync.Mutex it can't.
type ioMutex chan struct{}

func newIOMutex() ioMutex { return make(ioMutex, 1) }

func (m ioMutex) Lock()   { m <- struct{}{} }
func (m ioMutex) Unlock() { <-m }

// Close stops the background apply and waits for it; what is left is applied
// by the next OpenReplica. An open epoch is dropped. The store stays open.
func (r *Replica) Close() error {
	r.mu.Lock()
	r.closed = true
	r.notify()
	r.mu.Unlock()
	r.stop()
	r.wg.Wait()
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	r.dropOpen()
	r.closeSpill()
	return nil
}

// notify wakes everybody who waits; mu is held.
func (r *Replica) notify() {
	close(r.wake)
	r.wake = make(chan struct{})
}

// usable is why nothing more can be done, nil if something can; mu is held.
func (r *Replica) usable() error {
	if r.fail != nil {
		return r.fail
	}
	if r.closed {
		return ErrClosed
	}
	return nil
}

// wait calls ready, with mu held, until it says true or fails. While the
// replica is not usable that is the error.
func (r *Replica) wait(ctx context.Context, ready func() (bool, error)) error {
	for {
		r.mu.Lock()
		err := r.usable()
		var ok bool
		if err == nil {
			ok, err = ready()
		}
		wake := r.wake
		r.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// failed notes a fault after which memory and device may differ.
func (r *Replica) failed(err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail == nil {
		r.fail = fmt.Errorf("%w (open the replica again)", err)
		r.notify()
	}
	return r.fail
}

func (r *Replica) warn(texts []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range texts {
		if len(r.warnings) < 16 && !slices.Contains(r.warnings, t) {
			r.warnings = append(r.warnings, t)
		}
	}
}

// writeSuper makes the superblock durable as change leaves it, in one copy or
// in both, and calls then (may be nil) with mu held. Both copies are for what
// must not be forgotten when the newest copy is lost: that the data area is
// not whole any more.
func (r *Replica) writeSuper(copies int, change func(*superblock), then func()) error {
	r.superMu.Lock()
	defer r.superMu.Unlock()
	r.mu.Lock()
	sb, fail := r.sb, r.fail
	r.mu.Unlock()
	if fail != nil {
		return fail
	}
	if err := checkOwn(r.store, sb); err != nil {
		return r.failed(err)
	}
	if err := r.keepSuper(sb); err != nil {
		return r.failed(err)
	}
	change(&sb)
	for range copies {
		sb.sequence++
		if err := writeSuperblock(r.store, sb); err != nil {
			return r.failed(err)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sb = sb
	if then != nil {
		then()
	}
	r.notify()
	return nil
}

// keepSuper makes the copy durable that the replica was opened with, once: it may be
// in the disk's cache alone, as a flush that failed does not come again. Before
// that nothing is said to be held that only it says, and the other copy is not
// overwritten: a power cut could tear both. superMu is held, or nobody else has r.
func (r *Replica) keepSuper(sb superblock) error {
	if r.superKept {
		return nil
	}
	if err := writeSuperblock(r.store, sb); err != nil {
		return err
	}
	r.superKept = true
	return nil
}

// lineage is that of the last committed epoch; mu is held.
func (r *Replica) lineage() Lineage {
	if n := len(r.pending); n > 0 {
		return r.pending[n-1].commit.lineage
	}
	return r.sb.lineage
}

// needsFull reports whether only a full epoch may follow what is committed;
// mu is held.
func (r *Replica) needsFull() bool {
	for _, p := range r.pending {
		if p.commit.full {
			return false
		}
	}
	return r.sb.needFull || r.sb.state == DiskBlank
}

// strayed is why what is committed is no position of any line but its own,
// empty if it is one; mu is held.
func (r *Replica) strayed() string {
	if len(r.pending) > 0 {
		return ""
	}
	return r.sb.strayed
}

// Status never waits for the device.
func (r *Replica) Status() ReplicaStatus {
	r.mu.Lock()
	defer r.mu.Unlock()
	sb := &r.sb
	s := ReplicaStatus{VolumeUUID: sb.volume, ReplicaUUID: sb.replica, SizeBytes: r.lay.size, DataOffset: r.lay.dataOffset, State: sb.state, NeedsFull: r.needsFull(),
		Committed: r.lineage().Tip(), Applied: sb.applied, Lineage: r.lineage().Clone(), CutUnixNanos: sb.cutNanos,
		PendingEpochs: len(r.pending), JournalBytes: r.lay.journal.length, JournalFreeBytes: r.journalFree(),
		JournalUsedBytes: int64(sb.head.logical - sb.tail.logical), SpilledBytes: r.spilled, SpillProblem: r.noSpill,
		Strayed: r.strayed(), TookOver: sb.tookOver, Kept: r.kept, Held: r.heldAt(), Rescued: r.rescued, Warnings: slices.Clone(r.warnings), Err: r.fail}
	if r.givenUp == s.Committed {
		s.GivenUp = r.givenUp
	}
	if n := len(r.pending); n > 0 {
		s.CutUnixNanos = r.pending[n-1].commit.cutNanos
		s.State = DiskConsistent // with the journal laid over
	}
	if s.State == DiskInconsistent {
		s.ChangedOutside = sb.why == whyChangedOutside
		switch sb.why {
		case whyInPlace:
			s.Reason = fmt.Sprintf("an in-place sync to epoch %d has not ended", sb.inPlace.Epoch)
		case whyChangedOutside:
			s.Reason = "changed outside: written to by something else than blockferry"
		case whyJournalDamaged:
			s.Reason = "the journal was damaged while an epoch was being applied"
		}
	}
	return s
}

// JournalFree is the room for frames that Append has without waiting, in bytes.
func (r *Replica) JournalFree() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.journalFree()
}

func (r *Replica) journalFree() int64 {
	free := r.lay.journal.length - int64(max(r.usedEnd, r.sb.head.logical)-r.sb.tail.logical)
	// Segments are half full at least, and need up to 8 KiB around their body.
	return max(0, free-free/64-2*commitMaxBytes)
}

// WaitApplied returns when the data area holds at least the epoch, which was
// committed.
func (r *Replica) WaitApplied(ctx context.Context, epoch uint64) error {
	return r.wait(ctx, func() (bool, error) {
		for _, p := range r.pending {
			// After a change of history the epoch applied last may have a higher number.
			if p.position().Epoch <= epoch {
				return false, nil
			}
		}
		if r.sb.applied.Epoch < epoch {
			return false, fmt.Errorf("%s: epoch %d was not committed: the replica holds %s", r.store.Name(), epoch, r.lineage().Tip())
		}
		return !r.inPlace, nil
	})
}
