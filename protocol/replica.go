package protocol

import (
	"context"
	"errors"
	"fmt"
)

// ErrJournalFull says that an epoch doesn't fit into the journal, also after
// everything before it was applied. The replica keeps its image; the way out
// is a larger journal or an in-place epoch.
var ErrJournalFull = errors.New("journal full")

// ErrJournalDamaged says that epochs which were acknowledged can't be read
// back from the journal. See JournalDamage.
var ErrJournalDamaged = errors.New("journal damaged")

// ErrNeedsFull says that only a full epoch can follow: the replica is blank or
// inconsistent, was changed outside, or went another way than the volume.
var ErrNeedsFull = errors.New("needs a full sync")

// ErrSums says that what arrived is not what the sender says it sent.
var ErrSums = errors.New("frames missing or changed on the way")

// ErrNotConsistent says that a replica holds no image to read.
var ErrNotConsistent = errors.New("replica holds no consistent image")

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
	MaxAppendBytes = 8 << 20
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
	State            DiskState
	Reason           string // of an inconsistent state, in words
	NeedsFull        bool
	Committed        Position
	Applied          Position
	Lineage          Lineage // up to Committed
	CutUnixNanos     int64   // of Committed
	PendingEpochs    int     // committed, not yet applied
	JournalBytes     int64
	JournalFreeBytes int64 // room for one epoch's frames once everything before it is applied: see JournalFree
	Warnings         []string
	Err              error // the fault after which the replica must be opened again
}

// OpenOptions changes how a replica is opened.
type OpenOptions struct {
	// DropDamagedJournal accepts the loss of acknowledged epochs that the
	// journal can't give back: the replica falls back to the image it has, or
	// is inconsistent if it has none.
	DropDamagedJournal bool
}

// Replica is a copy of a volume on a Store.
type Replica struct{ store Store }

var errTODO = fmt.Errorf("not built yet")

// OpenReplica opens a formatted device and applies what was committed.
func OpenReplica(store Store, o OpenOptions) (*Replica, error) { return nil, errTODO }

// Status never blocks on the device.
func (r *Replica) Status() ReplicaStatus { return ReplicaStatus{} }

// JournalFree is the room for frames that Append has without waiting, bytes.
func (r *Replica) JournalFree() int64 { return 0 }

// Begin starts an epoch or a new attempt at one; what was appended for an
// epoch that was not committed is dropped.
func (r *Replica) Begin(ctx context.Context, s EpochStart) error { return errTODO }

// Append takes whole frames of the open epoch and owns their memory from then
// on. stream (0 to MaxStreams-1) is which of the sender's streams they came
// by. It may be called for several streams at once.
func (r *Replica) Append(ctx context.Context, stream int, frames []byte) error { return errTODO }

// Commit decides the open epoch: once it returns nil the epoch is durable and
// may be acknowledged.
func (r *Replica) Commit(ctx context.Context, c EpochCommit) error { return errTODO }

// Abort drops the open epoch, if there is one.
func (r *Replica) Abort() error { return errTODO }

// WaitApplied returns when the data area holds at least the epoch.
func (r *Replica) WaitApplied(ctx context.Context, epoch uint64) error { return errTODO }

// ReadData reads what the open epoch's frames are laid over: the committed image
// if the replica is consistent, otherwise whatever is there. It waits until
// all committed epochs are applied.
func (r *Replica) ReadData(ctx context.Context, p []byte, offset int64) error { return errTODO }

// ChangedSince lists, ascending, the ranges that may have changed between an
// epoch of the replica's lineage and its applied position. It may name too
// much, never too little; when the map doesn't reach back, the error is
// ErrTrackingLost.
func (r *Replica) ChangedSince(ctx context.Context, epoch uint64) ([]Range, error) {
	return nil, errTODO
}

// Hold waits until the data area holds the last committed epoch and keeps
// this image until Release: epochs can still be committed, but they wait in
// the journal.
func (r *Replica) Hold(ctx context.Context) (*Image, error) { return nil, errTODO }

// Image is one committed epoch of a replica, held for reading.
type Image struct{ r *Replica }

// Position is the epoch the image holds.
func (i *Image) Position() Position { return Position{} }

// Lineage is the image's; its last point is Position.
func (i *Image) Lineage() Lineage { return nil }

// CutUnixNanos is the wall clock of the image's cut, for people only.
func (i *Image) CutUnixNanos() int64 { return 0 }

// ReadAt reads from the image; offsets and lengths are multiples of BlockSize.
func (i *Image) ReadAt(p []byte, offset int64) (int, error) { return 0, errTODO }

// DataRanges lists, ascending and without overlap, the ranges that may hold
// anything but zeros.
func (i *Image) DataRanges() ([]Range, error) { return nil, errTODO }

// Release lets the image go. It may be called more than once.
func (i *Image) Release() {}

// Close stops the background apply and waits for it; what is left is applied
// by the next OpenReplica. The store stays open.
func (r *Replica) Close() error { return nil }
