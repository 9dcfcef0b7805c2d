package bpf

import "fmt"

// What is lost, and what that costs.
//
// An event of either kind can be lost: a program is left out when it would
// run within itself on a processor, which the kernel counts. And a kernel was met (6.18,
// in a virtual machine) that at times tells nothing at all of what a processor does
// for some milliseconds, after a certain process ran there: no tracepoint of
// requests, softirqs or the scheduler, while the statistics go on and no miss is
// counted. What completes there meanwhile, in a softirq, is not seen. What begins is
// seen nearly always, as it begins where the writer runs.
//
// Between two moments at which nothing is in flight, what begins in between ends in
// between: so either side alone has marked all, if the sectors it counted are those of
// the statistics. Hence a cut with writers stopped, after another such, is covered
// when either agrees. A side that does not goes on from there, reckoned anew.
//
// To watch what begins costs each write about as much again. So on a disk with
// requests, where what completes tells all unless something is lost, it begins with
// the first loss, which ends the coverage, and then stays.
//
// A disk without requests is followed by the addresses of its bios, which the kernel
// uses again. Between two moments at which nothing is in flight that does no harm: each
// end that is counted, if not of the bio it is taken for, is that of one that began
// since then and has ended. What is left over at such a moment was lost, and counts no
// more: each time the side that completes does not agree the programs begin a new turn.
//
// Only what was seen to complete tells what an exchange while writes went on may
// have taken too early. When that side has lost something, such exchanges are
// worth nothing by themselves, but the marks of all of them together still are.

// compareStopped compares with writers stopped, and says whether all were seen to
// complete. mu is held.
func (t *Tracker) compareStopped() bool {
	b := &t.base
	now, known, agrees, err := t.ledger.leadsStopped(b.leads)
	again := t.ledger.again()
	for s := range agrees {
		agrees[s] = agrees[s] && b.known[s] && err == nil
	}
	watched := t.kernel.startedAll() // otherwise that count stands still, and agrees when it should not
	agrees[begun] = agrees[begun] && watched && b.drained && again == b.again
	if agrees == [sides]bool{} && t.gap == "" {
		switch {
		case err != nil:
			t.gap = err.Error()
		case !known[ended] && !known[begun]:
			t.gap = "the disk was written to all the time while writers were stopped"
		case !b.known[ended] && !b.drained:
			t.gap = "no cut before it had stopped writers"
		default:
			t.gap = differenceOf(ended, now[ended].minus(b.leads[ended]))
			if watched && b.drained {
				t.gap += ", " + differenceOf(begun, now[begun].minus(b.leads[begun]))
			}
		}
	}
	for s := range agrees {
		if !agrees[s] {
			b.leads[s], b.known[s], t.sound[s] = now[s], known[s] && err == nil && (watched || side(s) == ended), false
		}
	}
	if !agrees[ended] && b.known[ended] {
		t.ledger.nextTurn()
	}
	b.again = again
	return agrees[ended]
}

// compare says why it is not known, with writes going on, that all were seen to
// complete, or "".
func (t *Tracker) compare() string {
	switch {
	case !t.where.place.Requests:
		return "a disk without requests tells only with writers stopped whether all was seen"
	case !t.base.known[ended]:
		return "the disk's statistics could not be compared yet"
	}
	return t.ledger.agree(t.base.leads[ended])
}

// check says what speaks against having seen everything since the last Seal, or,
// before a coverage, since the last exchange; "": nothing. mu is held.
func (t *Tracker) check() string {
	if err := t.ledger.kept(); err != nil {
		return err.Error()
	}
	if n := t.ledger.trouble() - t.base.trouble; n != 0 {
		return fmt.Sprintf("%d events were missed, or named no sectors", n)
	}
	misses, err := t.kernel.misses()
	if err != nil {
		return err.Error()
	}
	var seen [sides]bool
	for s := range seen {
		seen[s] = misses[s] == t.base.misses[s]
	}
	_, _, covered := t.coverage.bounds()
	missed := fmt.Sprintf("%d events were missed of what completes and %d of what begins", misses[ended]-t.base.misses[ended], misses[begun]-t.base.misses[begun])
	switch {
	case !t.rest:
		if covered && t.gap != "" {
			return t.gap
		}
		if !seen[ended] {
			return missed
		}
		if !t.settled {
			if why := t.compare(); why != "" {
				return why
			}
		}
	case !covered: // it begins with the present leads
		if !(seen[ended] && t.base.known[ended]) && !(seen[begun] && t.base.known[begun]) {
			if t.gap == "" {
				return missed
			}
			return t.gap + "; " + missed
		}
	case t.gap != "":
		return t.gap
	case seen != [sides]bool{true, true}:
		if !(seen[ended] && t.sound[ended]) && !(seen[begun] && t.sound[begun]) {
			return missed
		}
	}
	t.base.misses = misses
	return ""
}

// lostForSure says what a process that goes on with what is pinned need not wait
// for the next cut to know, or "".
func (t *Tracker) lostForSure() string {
	b := &t.base
	if err := t.ledger.kept(); err != nil {
		return err.Error()
	}
	if n := t.ledger.trouble() - b.trouble; n != 0 {
		return fmt.Sprintf("%d events were missed, or named no sectors", n)
	}
	if !b.known[ended] || !t.where.place.Requests || b.drained && b.known[begun] {
		return "" // one side may have seen all
	}
	if lead, still, err := t.ledger.leads(); err == nil && still[ended] && lead[ended].exceeds(b.leads[ended]) {
		return differenceOf(ended, lead[ended].minus(b.leads[ended]))
	}
	return ""
}

// reckonAnew makes the present state the one to compare with from now on. After
// an exchange with writers stopped the leads are known.
func (t *Tracker) reckonAnew() (err error) {
	b := &t.base
	b.trouble, b.drained = t.ledger.trouble(), false
	if b.misses, err = t.kernel.misses(); err != nil {
		return err
	}
	if !t.rest {
		b.known = [sides]bool{}
		if t.where.place.Requests {
			// Without a still moment it is the next stop that tells.
			lead, err := t.ledger.begin()
			b.leads[ended], b.known[ended] = lead, err == nil
		}
	}
	b.put(t.coverage.head)
	return nil
}

const (
	flagKnown   = 1 // of the ended, twice that of the begun
	flagDrained = 4
)

// put writes it into the header, the flags last.
func (b *reckoning) put(head header) {
	flags := uint64(0)
	for s, lead := range b.leads {
		head.put(headBase+2*s, lead.written)
		head.put(headBase+2*s+1, lead.discarded)
		head.put(headBase+4+s, b.misses[s])
		if b.known[s] {
			flags |= flagKnown << s
		}
	}
	if b.drained {
		flags |= flagDrained
	}
	for i, word := range []uint64{b.trouble, b.again, flags} {
		head.put(headBase+6+i, word)
	}
}

func (b *reckoning) get(head header) {
	flags := head.get(headBase + 8)
	for s := range b.leads {
		b.leads[s] = sectors{head.get(headBase + 2*s), head.get(headBase + 2*s + 1)}
		b.misses[s] = head.get(headBase + 4 + s)
		b.known[s] = flags&(flagKnown<<s) != 0
	}
	b.trouble, b.again, b.drained = head.get(headBase+6), head.get(headBase+7), flags&flagDrained != 0
}
