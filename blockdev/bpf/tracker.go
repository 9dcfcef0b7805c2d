package bpf

import (
	"errors"

	"blockferry/blockdev"
)

// ErrUncovered says that what changed is not known: events were lost, or the
// question reaches back before the coverage. The error says why. It means 'use
// another source', never 'nothing changed'.
var ErrUncovered = errors.New("not covered by fine tracking")

// Target is what to track.
type Target struct {
	// Device is the path of a whole disk or a partition.
	Device string
	// Offset and Length are the volume's bytes on it, multiples of
	// blockdev.BlockSize. Extents are relative to Offset.
	Offset, Length int64
	// Pin is a folder of the volume's own on a bpffs; it is made if need be.
	Pin string
}

// Tracker follows the changes of one volume. Its methods may be called from
// several goroutines; Exchange never waits for another one but a second
// Exchange and, for microseconds, Forget and Seal.
type Tracker struct{}

// Open goes on with the tracking that is pinned, if it is of this boot, this
// disk and this range, and nothing was lost; otherwise it begins anew.
func Open(Target) (*Tracker, error) { return nil, errors.ErrUnsupported }

// Adopted says whether the coverage goes on from what was pinned, and from which
// cut to which.
func (t *Tracker) Adopted() (first, last uint64, ok bool) { return 0, 0, false }

// Fresh says why tracking began anew at Open, "" if it did not.
func (t *Tracker) Fresh() string { return "" }

// GrainBytes is the size of a block that is marked as one.
func (t *Tracker) GrainBytes() int64 { return blockdev.BlockSize }

// MarkedBytes is how much is marked and was not exchanged yet.
func (t *Tracker) MarkedBytes() int64 { return 0 }

// Exchange takes what is marked into the open set. It allocates nothing. An
// error means that the statistics could not be read; what is marked was taken all
// the same, and Seal decides.
func (t *Tracker) Exchange() error { return errors.ErrUnsupported }

// Taken is what the last Exchange took, ascending and disjoint.
func (t *Tracker) Taken() []blockdev.Extent { return nil }

// AppendTaken is Taken without allocating: it appends to list within its
// capacity, and says whether that was enough.
func (t *Tracker) AppendTaken(list []blockdev.Extent) ([]blockdev.Extent, bool) { return list, false }

// Seal says that all that was exchanged since the last Seal changed before cut
// number, which is higher than any before. It checks that nothing was lost until
// now; ErrUncovered says what was, and that the next Seal begins a new coverage.
func (t *Tracker) Seal(number uint64) error { return errors.ErrUnsupported }

// Covered says between which cuts Changed has an answer.
func (t *Tracker) Covered() (first, last uint64, ok bool) { return 0, 0, false }

// Changed is what changed after cut since and before cut upTo, ascending and
// disjoint: at least that. ErrUncovered if it is not known.
func (t *Tracker) Changed(since, upTo uint64) ([]blockdev.Extent, error) { return nil, ErrUncovered }

// Forget says that nobody will ask for what changed before cut upTo.
func (t *Tracker) Forget(upTo uint64) {}

// Void ends the coverage, for a reason that only the caller can know. The next
// Seal begins a new one.
func (t *Tracker) Void(reason string) {}

// Close lets go of the tracker; tracking goes on in the kernel.
func (t *Tracker) Close() error { return nil }

// Remove ends the tracking and closes.
func (t *Tracker) Remove() error { return nil }
