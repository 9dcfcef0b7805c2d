package bpf

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Slots of counts, as in program/tracker.c.
const (
	slotWritten = iota
	slotDiscarded
	slotStrange
	slotFull
	slotFailed
	slotWords = 8 // of one processor
)

const (
	// agreePatience is how long counts and statistics get to agree, in at least
	// fewestLooks.
	agreePatience = 10 * time.Millisecond
	// beginLook is how long both are watched before they are compared from there.
	beginLook   = 2 * time.Millisecond
	fewestLooks = 8
)

// ledger compares the sectors that the programs counted with the disk's own
// statistics. Both only grow, and the programs count a request before the kernel
// does: so of what the statistics are ahead (the lead), a loss makes more, and
// a request between the two makes less. With no loss and nothing in between the
// lead is what it was at the begin.
type ledger struct {
	counts  []uint64
	stat    *os.File // the disk's
	iostats *os.File
	buffer  [512]byte
	look    func() // of tests: before each look at both
}

func openLedger(dir string, counts []uint64) (*ledger, error) {
	stat, err := os.Open(filepath.Join(dir, "stat"))
	if err != nil {
		return nil, err
	}
	iostats, err := os.Open(filepath.Join(dir, "queue/iostats"))
	if err != nil {
		stat.Close()
		return nil, err
	}
	return &ledger{counts: counts, stat: stat, iostats: iostats}, nil
}

func (l *ledger) close() {
	l.stat.Close()
	l.iostats.Close()
}

// sectors are written and discarded ones.
type sectors struct{ written, discarded uint64 }

func (a sectors) minus(b sectors) sectors {
	return sectors{a.written - b.written, a.discarded - b.discarded}
}

// counted is what the programs counted; slots of processors come one after
// another.
func (l *ledger) counted() sectors {
	return sectors{l.sum(slotWritten), l.sum(slotDiscarded)}
}

func (l *ledger) sum(slot int) (n uint64) {
	for i := slot; i < len(l.counts); i += slotWords {
		n += atomic.LoadUint64(&l.counts[i])
	}
	return n
}

// trouble is how often the programs met what they can't follow.
func (l *ledger) trouble() uint64 { return l.sum(slotStrange) + l.sum(slotFull) + l.sum(slotFailed) }

// lead is by how many sectors the statistics are ahead of the counts; still says
// that nothing was counted while they were read, without which it says nothing.
// It allocates nothing unless it fails.
func (l *ledger) lead() (lead sectors, still bool, err error) {
	if l.look != nil {
		l.look()
	}
	before := l.counted()
	statistics, err := l.statistics()
	if err != nil {
		return sectors{}, false, err
	}
	return statistics.minus(before), before == l.counted(), nil
}

func (l *ledger) statistics() (sectors, error) {
	n, err := unix.Pread(int(l.stat.Fd()), l.buffer[:], 0)
	if err != nil {
		return sectors{}, fmt.Errorf("read %s: %w", l.stat.Name(), err)
	}
	var s sectors
	field, value, within := 0, uint64(0), false
	for _, b := range l.buffer[:n] {
		if b >= '0' && b <= '9' {
			value, within = value*10+uint64(b-'0'), true
			continue
		}
		if !within {
			continue
		}
		switch field++; field {
		case 7:
			s.written = value
		case 14:
			s.discarded = value
		}
		value, within = 0, false
	}
	if field < 14 {
		return sectors{}, fmt.Errorf("%s has %d fields, want at least 14", l.stat.Name(), field)
	}
	return s, nil
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

// begin is the lead from which a coverage counts: the largest that is seen for a
// while, as a request in between makes it smaller, never larger. One that is
// too small only finds a loss where there is none.
func (l *ledger) begin() (lead sectors, err error) {
	start, seen := time.Now(), 0
	for seen < fewestLooks || time.Since(start) < beginLook {
		now, still, err := l.lead()
		if err != nil {
			return sectors{}, err
		}
		if !still {
			if time.Since(start) > 10*agreePatience {
				return sectors{}, fmt.Errorf("%s: no moment in %s without writes", l.stat.Name(), 10*agreePatience)
			}
			continue
		}
		if seen++; seen == 1 || int64(now.written-lead.written) > 0 {
			lead.written = now.written
		}
		if seen == 1 || int64(now.discarded-lead.discarded) > 0 {
			lead.discarded = now.discarded
		}
	}
	return lead, nil
}

// verdict of a comparison.
type verdict int

const (
	unclear verdict = iota // something is in between: look again
	agrees
	differs
)

// compare looks once; more is by what the statistics are further ahead.
func (l *ledger) compare(begin sectors) (v verdict, more sectors, err error) {
	lead, still, err := l.lead()
	more = lead.minus(begin)
	switch {
	case err != nil, !still:
		return unclear, more, err
	case more == sectors{}:
		return agrees, more, nil
	case int64(more.written) > 0 || int64(more.discarded) > 0:
		return differs, more, nil
	}
	return unclear, more, nil
}

// agree compares until both agree, for agreePatience at most; the answer is why
// they do not, or "".
func (l *ledger) agree(begin sectors) string {
	end := time.Now().Add(agreePatience)
	for looks := 1; ; looks++ {
		v, more, err := l.compare(begin)
		switch {
		case err != nil:
			return err.Error()
		case v == agrees:
			return ""
		case v == differs || looks >= fewestLooks && time.Now().After(end):
			return differenceOf(more)
		}
	}
}

func differenceOf(more sectors) string {
	return fmt.Sprintf("the disk's statistics are ahead of what was seen by %d bytes written and %d discarded",
		int64(more.written)*sectorSize, int64(more.discarded)*sectorSize)
}
