package bpf

import (
	"math/bits"
	"sync/atomic"
)

// marks is a bitmap with its summary. A word has the bits of 64 grains; eight
// words are a line, as in the processor's cache; a bit of the summary says that
// its line may hold bits. Somebody who looks for few bits in a large volume thus
// reads little more than the lines that hold them.
//
// The programs in the kernel set bits at any time: the grain's, then its line's.
type marks struct {
	words []uint64
	lines []uint64
}

const (
	wordBits  = 64
	lineWords = 8
)

// shape says how long the two parts are for so many grains. words is a
// multiple of what one word of the summary covers.
func shape(grains int64) (words, lines int64) {
	lines = (grains + wordBits*lineWords*wordBits - 1) / (wordBits * lineWords * wordBits)
	return lines * wordBits * lineWords, lines
}

// markMemory is what marks for so many grains need, in 8-byte words.
func markMemory(grains int64) int64 {
	words, lines := shape(grains)
	return words + lines
}

// marksOn uses memory of markMemory(grains) words.
func marksOn(memory []uint64, grains int64) marks {
	words, lines := shape(grains)
	return marks{memory[:words:words], memory[words : words+lines]}
}

// each calls visit with each word that has bits, ascending.
func (m marks) each(visit func(index uint32, word uint64)) {
	m.eachFrom(0, visit)
}

// eachFrom is each for the words from one on.
func (m marks) eachFrom(from uint32, visit func(index uint32, word uint64)) {
	for s := int(from) / (lineWords * wordBits); s < len(m.lines); s++ {
		for set := atomic.LoadUint64(&m.lines[s]); set != 0; set &= set - 1 {
			first := (s*wordBits + bits.TrailingZeros64(set)) * lineWords
			for i := first; i < first+lineWords; i++ {
				if w := atomic.LoadUint64(&m.words[i]); w != 0 && i >= int(from) {
					visit(uint32(i), w)
				}
			}
		}
	}
}

// count is the number of bits.
func (m marks) count() (n int64) {
	m.each(func(_ uint32, word uint64) { n += int64(bits.OnesCount64(word)) })
	return n
}

// mend sets the summary's bit of each line that has bits, whatever a process
// that was killed while it moved them has left.
func (m marks) mend() {
	for i := range m.words {
		if atomic.LoadUint64(&m.words[i]) != 0 {
			atomic.OrUint64(&m.lines[i/(lineWords*wordBits)], 1<<(i/lineWords%wordBits))
		}
	}
}

// takenLog is what exchanges took and nobody has fetched yet. Its memory is
// made and touched before, as an exchange must not allocate.
type takenLog struct {
	index []uint32
	word  []uint64
	used  int
	// last is where the entries of the last exchange begin. Within one exchange
	// they ascend.
	last int
	// exchanged says that there was an exchange, whether it took anything or not.
	exchanged bool
	// rest and lastRest are the first word that found no room here, in any
	// exchange and in the last: from there on all that is kept counts as taken.
	// noRest when all had room.
	rest, lastRest uint32
	near           uint64 // see exchangeLines
}

const noRest = ^uint32(0)

func newTakenLog(capacity int) *takenLog {
	l := &takenLog{index: make([]uint32, capacity), word: make([]uint64, capacity)}
	for i := range l.index {
		l.index[i], l.word[i] = 1, 1 // touch it
	}
	l.reset()
	return l
}

func (l *takenLog) reset() {
	l.used, l.last, l.exchanged = 0, 0, false
	l.rest, l.lastRest = noRest, noRest
}

func (l *takenLog) add(index uint32, word uint64) {
	if l.used == len(l.index) {
		l.rest, l.lastRest = min(l.rest, index), min(l.lastRest, index)
		return
	}
	l.index[l.used], l.word[l.used] = index, word
	l.used++
}

// exchange moves what is marked in active to kept and to the log. step, if
// given, is called before each operation that others can see: a test ends
// there, as a kill would. It must not be allowed to run twice at once.
//
// Killed anywhere, each bit is in active, in kept or in both. In the summary
// kept's bit comes first too, but active's has to go before its words are
// looked at: a bit that is set after that look sets it again, and one that was
// set before is seen. A kill in between leaves words that no summary tells of;
// mend, at the next start, finds them.
func exchange(active, kept marks, log *takenLog, step func()) {
	log.exchanged, log.last, log.lastRest = true, log.used, noRest
	var batch [batchLines]int
	n := 0
	for s := range active.lines {
		set := active.line(s)
		if set == 0 {
			continue
		}
		visible(step)
		if kept.line(s)&set != set {
			atomic.OrUint64(&kept.lines[s], set)
			visible(step)
		}
		atomic.AndUint64(&active.lines[s], ^set)
		for ; set != 0; set &= set - 1 {
			if n == len(batch) {
				exchangeLines(active, kept, log, batch[:n], step)
				n = 0
			}
			batch[n] = (s*wordBits + bits.TrailingZeros64(set)) * lineWords
			n++
		}
	}
	exchangeLines(active, kept, log, batch[:n], step)
}

// batchLines is how many lines are fetched at once.
const batchLines = 64

// exchangeLines does it for lines, each given by its first word. It reads all
// of them first: the processor fetches many lines at once when nothing waits
// for them, while each atomic operation waits for the one before.
func exchangeLines(active, kept marks, log *takenLog, lines []int, step func()) {
	var near uint64
	for _, first := range lines {
		near += atomic.LoadUint64(&active.words[first]) + atomic.LoadUint64(&kept.words[first])
	}
	log.near = near // so that the loads are not left out
	for _, first := range lines {
		for i := first; i < first+lineWords; i++ {
			w := atomic.LoadUint64(&active.words[i])
			if w == 0 {
				continue
			}
			visible(step)
			if atomic.LoadUint64(&kept.words[i])&w != w {
				atomic.OrUint64(&kept.words[i], w)
			}
			log.add(uint32(i), w)
			visible(step)
			atomic.AndUint64(&active.words[i], ^w)
		}
	}
}

func visible(step func()) {
	if step != nil {
		step()
	}
}

func (m marks) line(s int) uint64 { return atomic.LoadUint64(&m.lines[s]) }
