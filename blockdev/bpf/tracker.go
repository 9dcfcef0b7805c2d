package bpf

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/cilium/ebpf"

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

// Tracker follows the changes of one volume. Its methods but Close and Remove
// may be called from several goroutines at once. Exchange waits for nothing
// but another Exchange and, for microseconds, whoever fetches what was taken.
type Tracker struct {
	where    where
	lock     *os.File // the folder
	kernel   *kernel
	ledger   *ledger
	coverage *coverage

	adopted             bool
	adoptFirst, adoptTo uint64
	fresh               string

	// mu guards what compares with the statistics.
	mu     sync.Mutex
	begin  sectors // the lead at the coverage's begin
	misses uint64  // and the misses
	agreed bool    // at the last exchange
	lost   string  // why the next Seal must fail
}

// Open goes on with the tracking that is pinned, if it is of this boot, this
// disk and this range, and nothing was lost; otherwise it begins anew. It
// needs root, Linux 5.17 and the kernel's BTF.
func Open(target Target) (_ *Tracker, err error) {
	w, err := find(target)
	if err != nil {
		return nil, err
	}
	t := &Tracker{where: w}
	if t.lock, err = lockPin(target.Pin); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("fine tracking of %s: %w", target.Device, err), t.Close())
		}
	}()
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, err
	}
	s := shapeOfMaps{w.grains(), cpus}
	if t.fresh = t.adopt(s); t.fresh == "" {
		return t, nil
	}
	if err := t.release(); err != nil {
		return nil, err
	}
	if err := t.beginAnew(s); err != nil {
		return nil, err
	}
	return t, nil
}

// adopt takes what is pinned, or says why it can't be gone on with.
func (t *Tracker) adopt(s shapeOfMaps) (why string) {
	var err error
	t.kernel, err = openPinned(t.where.target.Pin, programsOf(t.where.place.Requests), s)
	if errors.Is(err, errNothingPinned) {
		return "nothing was pinned"
	}
	if err != nil {
		return "what was pinned is not whole: " + err.Error()
	}
	head := header(t.kernel.memory[nameHeader])
	if head.get(headMagic) != headerMagic {
		return "what was pinned was never finished"
	}
	words, names := t.where.identity()
	for i := range words {
		if head.get(headIdentity+i) != words[i] {
			return "what was pinned is of " + names[i]
		}
	}
	if head.get(headState) != stateCovered {
		if why := head.reason(); why != "" {
			return "it had lost track: " + why
		}
		return "no cut had been sealed"
	}
	if err := t.prepare(); err != nil {
		return err.Error()
	}
	t.begin, t.misses = sectors{head.get(headBase), head.get(headBase + 1)}, head.get(headBase+2)
	if why := t.check(); why != "" {
		return why
	}
	t.coverage.adopt()
	t.adopted = true
	t.adoptFirst, t.adoptTo, _ = t.coverage.bounds()
	return ""
}

func (t *Tracker) beginAnew(s shapeOfMaps) (err error) {
	if err := unpin(t.where.target.Pin); err != nil {
		return fmt.Errorf("remove what was pinned: %w", err)
	}
	if t.kernel, err = load(t.where, s); err != nil {
		return err
	}
	if err := t.prepare(); err != nil {
		return err
	}
	head := t.coverage.head
	words, _ := t.where.identity()
	for i, word := range words {
		head.put(headIdentity+i, word)
	}
	head.put(headState, stateBare)
	if err := t.rebase(); err != nil {
		return err
	}
	if err := t.kernel.pin(t.where.target.Pin, programsOf(t.where.place.Requests)); err != nil {
		return errors.Join(err, unpin(t.where.target.Pin))
	}
	head.put(headMagic, headerMagic)
	return nil
}

// prepare makes what works on the maps.
func (t *Tracker) prepare() (err error) {
	memory, grains := t.kernel.memory, t.where.grains()
	t.coverage = newCoverage(marksOn(memory[nameActive], grains), marksOn(memory[nameKept], grains),
		header(memory[nameHeader]), t.where.grain, t.where.target.Length, takenWords)
	t.ledger, err = openLedger(t.where.place.Dir, memory[nameCounts])
	return err
}

// rebase makes the present state the one to compare with from now on.
func (t *Tracker) rebase() (err error) {
	if t.misses, err = t.trouble(); err != nil {
		return err
	}
	if t.begin, err = t.ledger.begin(); err != nil {
		return err
	}
	head := t.coverage.head
	head.put(headBase, t.begin.written)
	head.put(headBase+1, t.begin.discarded)
	head.put(headBase+2, t.misses)
	return nil
}

func (t *Tracker) trouble() (uint64, error) {
	misses, err := t.kernel.misses()
	return misses + t.ledger.trouble(), err
}

// check says what speaks against having seen everything, or "".
func (t *Tracker) check() string {
	if err := t.ledger.kept(); err != nil {
		return err.Error()
	}
	misses, err := t.trouble()
	if err != nil {
		return err.Error()
	}
	if misses != t.misses {
		return fmt.Sprintf("%d events were missed, or named no sectors", misses-t.misses)
	}
	if t.agreed {
		return ""
	}
	return t.ledger.agree(t.begin)
}

// Adopted says whether the coverage goes on from what was pinned, and from which
// cut to which it reached then. What changed since its first cut is known; of
// the single cuts within, only that it is part of that.
func (t *Tracker) Adopted() (first, last uint64, ok bool) { return t.adoptFirst, t.adoptTo, t.adopted }

// Fresh says why tracking began anew at Open, "" if it did not.
func (t *Tracker) Fresh() string { return t.fresh }

// GrainBytes is the size of a block that is marked as one.
func (t *Tracker) GrainBytes() int64 { return t.where.grain }

// MarkedBytes is how much is marked and was not exchanged yet. It reads little
// more than the marks.
func (t *Tracker) MarkedBytes() int64 { return t.coverage.active.count() * t.where.grain }

// Exchange takes what is marked into the open set. It allocates nothing, and so
// may be called with writers stopped: then the comparison with the disk's
// statistics, made here too, is exact. An error means that they could not be
// read; what is marked was taken all the same, and Seal decides.
//
// It can take 256 Ki words of 64 grains before somebody calls Taken or Seal;
// beyond that, Taken and Changed name what was taken since the coverage began.
func (t *Tracker) Exchange() error {
	t.coverage.exchange()
	t.mu.Lock()
	defer t.mu.Unlock()
	v, more, err := t.ledger.compare(t.begin)
	t.agreed = v == agrees
	if v == differs && t.lost == "" {
		t.lost = differenceOf(more)
	}
	return err
}

// Taken is what the last Exchange took, ascending and disjoint.
func (t *Tracker) Taken() []blockdev.Extent { return t.coverage.lastTaken() }

// AppendTaken is Taken without allocating, between an Exchange and whatever
// fetches what it took: it appends to list within its capacity, and says whether
// all had room.
func (t *Tracker) AppendTaken(list []blockdev.Extent) ([]blockdev.Extent, bool) {
	return t.coverage.appendTaken(list)
}

// Seal says that all that was exchanged since the last Seal changed before cut
// number, which is higher than any before, and nothing else did. It checks that
// nothing was lost; ErrUncovered says what was, and that the next Seal begins a new
// coverage.
func (t *Tracker) Seal(number uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	why := t.check()
	if t.lost != "" && why != t.lost {
		why = strings.TrimPrefix(why+"; "+t.lost, "; ")
	}
	t.agreed = false
	if why == "" {
		return t.coverage.seal(number)
	}
	t.coverage.end(why)
	if err := t.rebase(); err != nil {
		t.lost = err.Error() // so that the next one fails too, and tries again
	} else {
		t.lost = ""
	}
	return fmt.Errorf("%w: cut %d of %s: %s", ErrUncovered, number, t.where.target.Device, why)
}

// Covered says between which cuts Changed has an answer.
func (t *Tracker) Covered() (first, last uint64, ok bool) { return t.coverage.bounds() }

// Changed is what changed after cut since and before cut upTo, ascending and
// disjoint: at least that. ErrUncovered if it is not known.
func (t *Tracker) Changed(since, upTo uint64) ([]blockdev.Extent, error) {
	t.mu.Lock()
	why := t.lost
	t.mu.Unlock()
	if why != "" {
		return nil, fmt.Errorf("%w: %s: %s", ErrUncovered, t.where.target.Device, why)
	}
	return t.coverage.changed(since, upTo)
}

// Forget says that nobody will ask for what changed before cut upTo.
func (t *Tracker) Forget(upTo uint64) { t.coverage.forget(upTo) }

// Void ends the coverage, for a reason that only the caller can know. The next
// Seal returns ErrUncovered, the one after it begins a new coverage.
func (t *Tracker) Void(reason string) {
	t.coverage.end(reason)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lost == "" {
		t.lost = reason
	}
}

// release closes all but the lock.
func (t *Tracker) release() (err error) {
	if t.ledger != nil {
		t.ledger.close()
		t.ledger = nil
	}
	if t.kernel != nil {
		err = t.kernel.close()
		t.kernel = nil
	}
	return err
}

// Close lets go of the tracker; tracking goes on in the kernel.
// A second Close does nothing.
func (t *Tracker) Close() error {
	err := t.release()
	if t.lock != nil {
		err = errors.Join(err, t.lock.Close())
		t.lock = nil
	}
	return err
}

// Remove ends the tracking and closes.
func (t *Tracker) Remove() error {
	err := errors.Join(unpin(t.where.target.Pin), os.Remove(t.where.target.Pin))
	if err != nil {
		err = fmt.Errorf("end fine tracking of %s: %w", t.where.target.Device, err)
	}
	return errors.Join(err, t.Close())
}
