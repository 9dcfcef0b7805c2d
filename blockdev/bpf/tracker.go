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
	// Owner and Volume say whose this is: UnpinStale ends what its owner's
	// volumes have left behind. Volume has at most 128 bytes.
	Owner, Volume string
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
	loses               bool // events were lost before Open

	// mu guards what compares with the statistics.
	mu sync.Mutex
	verdict
	before  verdict // the last exchange with writers stopped
	rest    bool    // the last exchange was with writers stopped
	settled bool    // it was not, and yet nothing was lost up to it
	lost    string  // why the next Seal must fail
}

// verdict is what comparisons with the statistics have shown.
type verdict struct {
	base  reckoning
	sound [sides]bool // at each stop since the last seal that side had seen all
	gap   string      // at one of them neither had: why
}

// reckoning is what counts, statistics and misses are compared with: as they were
// when nothing was in between.
type reckoning struct {
	leads   leads
	known   [sides]bool // the leads
	misses  [sides]uint64
	trouble uint64
	again   uint64
	drained bool // the last Seal was of an exchange with writers stopped
}

// Open goes on with the tracking that is pinned, if it is of this boot, this
// disk and this range, and nothing was lost; otherwise it begins anew, and has the
// kernel keep the disk's statistics. It needs root, Linux 5.17 and the kernel's BTF.
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
		t.coverage.head.setOwner(target.Owner, target.Volume)
		return t, nil
	}
	if err := t.release(); err != nil {
		return nil, err
	}
	// Not before: what was pinned is worth nothing if they were off.
	if switched, err := blockdev.KeepStatistics(target.Device); err != nil {
		return nil, err
	} else if switched {
		t.fresh += "; the kernel did not keep statistics of the disk, with which what is tracked is compared: they were switched on"
	}
	if err := t.beginAnew(s); err != nil {
		return nil, err
	}
	return t, nil
}

// adopt takes what is pinned, or says why it can't be gone on with.
func (t *Tracker) adopt(s shapeOfMaps) (why string) {
	var err error
	t.kernel, err = openPinned(t.where.target.Pin, t.where.place.Requests, s)
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
	t.base.get(head)
	if why := t.lostForSure(); why != "" {
		t.loses = true
		return why
	}
	t.coverage.adopt()
	t.adopted = true
	t.adoptFirst, t.adoptTo, _ = t.coverage.bounds()
	return ""
}

func (t *Tracker) beginAnew(s shapeOfMaps) (err error) {
	names := programsOf(t.where.place.Requests)
	all := t.loses || startedAll(t.where.target.Pin, names)
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
	head.setOwner(t.where.target.Owner, t.where.target.Volume)
	head.put(headState, stateBare)
	if err := t.reckonAnew(); err != nil {
		return err
	}
	err = t.kernel.pin(t.where.target.Pin, names)
	if err == nil && all {
		err = t.kernel.startAll(t.where.target.Pin, names)
	}
	if err != nil {
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
	t.sound = [sides]bool{true, true}
	t.ledger, err = openLedger(t.where.place.Dir, memory[nameCounts], t.where.place.Requests)
	return err
}

// Adopted says whether the coverage goes on from what was pinned, and from which
// cut to which it reached then. What changed since its first cut is known; of
// the single cuts within, only that it is part of that.
func (t *Tracker) Adopted() (first, last uint64, ok bool) { return t.adoptFirst, t.adoptTo, t.adopted }

// Fresh says why tracking began anew at Open, "" if it did not.
func (t *Tracker) Fresh() string { return t.fresh }

// MarkedBytes is how much is marked and was not exchanged yet. It reads little
// more than the marks.
func (t *Tracker) MarkedBytes() int64 { return t.coverage.active.count() * t.where.grain }

// Exchange takes what is marked into the open set, while writes go on.
//
// It can take 256 Ki words of 64 grains before somebody calls Taken or Seal;
// beyond that, Taken and Changed name what was taken since the coverage began.
func (t *Tracker) Exchange() {
	t.coverage.exchange()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rest, t.settled = false, false
}

// ExchangeStopped is Exchange with writers stopped and nothing of theirs in
// flight: then the comparison with the disk's statistics, made here too, is exact.
// It allocates nothing, unless something was lost.
//
// false says that not every write was seen to complete since the last exchange
// with writers stopped, or since the last Seal: a block that an exchange took in
// between may have changed after that. Until the next such exchange only all that was
// taken since the last Seal, together, names what changed; whether it does Seal says.
func (t *Tracker) ExchangeStopped() (whole bool) {
	t.coverage.exchange()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rest, t.settled = true, false
	t.before = t.verdict
	return t.compareStopped()
}

// Unheld says that writers had not stopped for the last exchange, which was
// ExchangeStopped: what is in flight can look like what was lost, and hide it, so
// that its comparison is undone. What it took stays taken.
func (t *Tracker) Unheld() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rest {
		t.rest, t.verdict = false, t.before
	}
}

// Settled says whether Seal can tell that nothing was lost up to the last
// Exchange, with writes going on. If not, ExchangeStopped may know more. possible:
// it can be told of this disk, which has requests.
func (t *Tracker) Settled() (settled, possible bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.settled = t.settled || t.compare() == ""
	return t.settled, t.where.place.Requests
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
	var err error
	why := t.check()
	if t.lost != "" && why != t.lost {
		why = strings.TrimPrefix(why+"; "+t.lost, "; ")
	}
	if why == "" {
		err = t.coverage.seal(number, func(head header) {
			t.base.drained = t.rest
			t.base.put(head)
		})
		if err == nil {
			t.afterSeal()
		}
		return err
	}
	_, _, covered := t.coverage.bounds()
	t.coverage.end(why)
	if covered && t.lost == "" {
		// This kernel loses events. What begins is watched too from now on.
		err = t.kernel.startAll(t.where.target.Pin, programsOf(t.where.place.Requests))
	}
	if err = errors.Join(err, t.reckonAnew()); err != nil {
		t.lost = err.Error() // so that the next one fails too, and tries again
	} else {
		t.lost = ""
	}
	t.afterSeal()
	return fmt.Errorf("%w: cut %d of %s: %s", ErrUncovered, number, t.where.target.Device, why)
}

func (t *Tracker) afterSeal() {
	t.rest, t.settled, t.gap, t.sound = false, false, "", [sides]bool{true, true}
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

// Exact says whether Changed names nothing that was not written between the two
// cuts, begun before or completed after included. It may name more for cuts that an
// earlier process sealed, and for ones so old that they are not told apart any more.
func (t *Tracker) Exact(since, upTo uint64) bool { return t.coverage.exact(since, upTo) }

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
