package bpf

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// Slots of counts, as in program/tracker.c; each side has one for sectors written
// and one for discarded.
const (
	slotEnded   = 0
	slotBegun   = 2
	slotStrange = 4
	slotFailed  = 5
	slotAgain   = 6
	slotTurn    = 7
	slotWords   = 8 // of one processor
)

// side is one of the two kinds of events, each of which marks and counts by itself.
type side int

const (
	ended side = iota // writes complete
	begun             // writes are issued
	sides = 2
)

const (
	// agreePatience is how long counts and statistics get to agree, in at least
	// fewestLooks.
	agreePatience = 10 * time.Millisecond
	// beginLook is how long both are watched before they are compared from there.
	beginLook   = 2 * time.Millisecond
	fewestLooks = 8
	// stopPatience is how long, with writers stopped, other users of the disk may keep
	// the looks from telling anything.
	stopPatience = time.Millisecond
)

// ledger compares the sectors that the programs counted with the disk's own
// statistics. Both only grow. By how much the statistics are ahead of a count is
// the count's lead: each lost event makes it larger for good. What is in between
// shifts it for a while. A request is counted before the statistics have it, on
// both sides, and so makes the lead smaller: for microseconds when it has ended, for as
// long as it takes when it has begun. A bio of a disk without requests that has
// ended is counted after the statistics, which some kernels let begin with it
// and others end with it: so of such disks nothing is known while writes go on.
// With writers stopped nothing is in between, and both leads are exact.
type ledger struct {
	counts   []uint64
	requests bool     // the disk has requests
	stat     *os.File // the disk's
	iostats  *os.File
	inflight *os.File
	buffer   [512]byte
	filled   int
	patience time.Duration // stopPatience
	look     func()        // of tests: before each look at both
}

func openLedger(dir string, counts []uint64, requests bool) (*ledger, error) {
	l := &ledger{counts: counts, requests: requests, patience: stopPatience}
	for path, file := range map[string]**os.File{"stat": &l.stat, "queue/iostats": &l.iostats, "inflight": &l.inflight} {
		f, err := os.Open(filepath.Join(dir, path))
		if err != nil {
			l.close()
			return nil, err
		}
		*file = f
	}
	return l, nil
}

func (l *ledger) close() {
	for _, f := range []*os.File{l.stat, l.iostats, l.inflight} {
		if f != nil {
			f.Close()
		}
	}
}

// sectors are written and discarded ones.
type sectors struct{ written, discarded uint64 }

func (a sectors) minus(b sectors) sectors {
	return sectors{a.written - b.written, a.discarded - b.discarded}
}

// leads are by how many sectors the statistics are ahead, by side.
type leads [sides]sectors

// counted is what the programs counted on a side; slots of processors come one
// after another.
func (l *ledger) counted(s side) sectors {
	slot := slotEnded
	if s == begun {
		slot = slotBegun
	}
	return sectors{l.sum(slot), l.sum(slot + 1)}
}

func (l *ledger) sum(slot int) (n uint64) {
	for i := slot; i < len(l.counts); i += slotWords {
		n += atomic.LoadUint64(&l.counts[i])
	}
	return n
}

// trouble is how often the programs met what they can't follow.
func (l *ledger) trouble() uint64 { return l.sum(slotStrange) + l.sum(slotFailed) }

// again is how many requests were taken back, to begin once more.
func (l *ledger) again() uint64 { return l.sum(slotAgain) }

// nextTurn has the programs no longer count the ends of bios that began before: with
// nothing in flight those were lost.
func (l *ledger) nextTurn() {
	for i := slotTurn; i < len(l.counts); i += slotWords {
		atomic.AddUint64(&l.counts[i], 1)
	}
}

// leads looks once; still says that nothing was counted on that side while the
// statistics were read, without which its lead says nothing. It allocates nothing
// unless it fails.
func (l *ledger) leads() (now leads, still [sides]bool, err error) {
	if l.look != nil {
		l.look()
	}
	before := leads{l.counted(ended), l.counted(begun)}
	statistics, err := l.statistics()
	if err != nil {
		return leads{}, [sides]bool{}, err
	}
	for s := range now {
		now[s], still[s] = statistics.minus(before[s]), before[s] == l.counted(side(s))
	}
	return now, still, nil
}

// leadsStopped is leads with writers stopped. Others may use the disk: it looks
// again until nothing is in between, at most fewestLooks times, or for patience until as
// many have told something of what has ended. agrees says of each
// side whether its lead was as given, and never further ahead by what can't be in
// between. A lead that never stood still is not known. It allocates nothing unless
// it fails.
func (l *ledger) leadsStopped(given leads) (now leads, known, agrees [sides]bool, err error) {
	var beyond [sides]bool
	start, told := time.Now(), 0
	for looks := 0; looks < fewestLooks || told < fewestLooks && time.Since(start) < l.patience; looks++ {
		lead, still, err := l.leads()
		if err != nil {
			return now, known, agrees, err
		}
		// What another user has in flight would hide a loss as long as it is.
		if writes, err := l.writesInFlight(); err != nil || writes != 0 {
			still = [sides]bool{ended: still[ended] && l.requests}
		}
		if still[ended] {
			told++
		}
		for s := range lead {
			if !still[s] {
				continue
			}
			smaller := l.requests || side(s) == begun // by what is in between, or larger
			agrees[s] = agrees[s] || lead[s] == given[s]
			beyond[s] = beyond[s] || smaller && lead[s].exceeds(given[s])
			if !known[s] || lead[s].exceeds(now[s]) == smaller {
				now[s], known[s] = lead[s], true
			}
		}
		if agrees == [sides]bool{true, true} {
			break // nothing at all is in flight
		}
	}
	for s := range agrees {
		agrees[s] = agrees[s] && !beyond[s]
	}
	return now, known, agrees, nil
}

// exceeds says whether any part is more than b's.
func (a sectors) exceeds(b sectors) bool {
	more := a.minus(b)
	return int64(more.written) > 0 || int64(more.discarded) > 0
}

// writesInFlight is how many writes the disk has begun and not ended.
func (l *ledger) writesInFlight() (n uint64, err error) {
	err = l.read(l.inflight, 2, &n)
	return n, err
}

func (l *ledger) statistics() (s sectors, err error) {
	// Both of one look at the file.
	if err = l.read(l.stat, 7, &s.written); err != nil {
		return s, err
	}
	return s, l.field(l.stat, 14, &s.discarded)
}

// read reads a file of numbers, and the n-th of them.
func (l *ledger) read(f *os.File, n int, to *uint64) (err error) {
	if l.filled, err = unix.Pread(int(f.Fd()), l.buffer[:], 0); err != nil {
		return fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return l.field(f, n, to)
}

func (l *ledger) field(f *os.File, n int, to *uint64) error {
	value, ok := blockdev.StatField(l.buffer[:l.filled], n)
	if !ok {
		return fmt.Errorf("%s has less than %d fields", f.Name(), n)
	}
	*to = value
	return nil
}

// kept says whether the kernel keeps the statistics.
func (l *ledger) kept() error {
	var b [8]byte
	n, err := unix.Pread(int(l.iostats.Fd()), b[:], 0)
	switch {
	case err != nil:
		return fmt.Errorf("read %s: %w", l.iostats.Name(), err)
	case n == 0 || b[0] != '1':
		return fmt.Errorf("the disk's statistics are switched off: write 1 to %s", l.iostats.Name())
	}
	return nil
}

// begin is the lead of what has ended on a disk with requests, from which a
// coverage can begin while writes go on: the largest that is seen for a while, as
// a request in between makes it smaller, never larger. One that is too small only
// finds a loss where there is none.
func (l *ledger) begin() (lead sectors, err error) {
	start, seen := time.Now(), 0
	for seen < fewestLooks || time.Since(start) < beginLook {
		now, still, err := l.leads()
		if err != nil {
			return sectors{}, err
		}
		if !still[ended] {
			if time.Since(start) > 10*agreePatience {
				return sectors{}, fmt.Errorf("%s: no moment in %s without writes", l.stat.Name(), 10*agreePatience)
			}
			continue
		}
		if seen++; seen == 1 || int64(now[ended].written-lead.written) > 0 {
			lead.written = now[ended].written
		}
		if seen == 1 || int64(now[ended].discarded-lead.discarded) > 0 {
			lead.discarded = now[ended].discarded
		}
	}
	return lead, nil
}

// agree compares what has ended on a disk with requests while writes go on; the
// answer is why it does not agree, or "". A request in between can hide a loss in
// one look: so it looks fewestLooks times at least, until one agrees, for
// agreePatience at most, and none may find the statistics further ahead.
func (l *ledger) agree(begin sectors) string {
	end := time.Now().Add(agreePatience)
	agrees := false
	for looks := 1; ; looks++ {
		lead, still, err := l.leads()
		more := lead[ended].minus(begin)
		switch {
		case err != nil:
			return err.Error()
		case still[ended] && lead[ended].exceeds(begin):
			return differenceOf(ended, more)
		case still[ended] && more == sectors{}:
			agrees = true
		}
		if looks < fewestLooks {
			continue
		}
		if agrees {
			return ""
		}
		if time.Now().After(end) {
			return differenceOf(ended, more)
		}
	}
}

func differenceOf(s side, more sectors) string {
	which := [sides]string{"complete", "begin"}[s]
	return fmt.Sprintf("the disk's statistics are ahead of what was seen to %s by %d bytes written and %d discarded",
		which, int64(more.written)*sectorSize, int64(more.discarded)*sectorSize)
}
