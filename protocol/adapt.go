package protocol

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// packing chooses how a session's data is packed, by which side is the slower:
// while workers mostly wait for the link, or for a replica that stores what comes,
// a stronger codec is tried, and while they mostly pack, a quicker one. It stays if
// a byte of the volume then costs the workers clearly less time, packing and waiting
// together: they are a fixed number, so that is throughput, whatever reading takes.
// While they mostly read, or compare, nothing is changed.
//
// Where a trial failed, or what was kept is taken back, the next one that way has to
// wait longer, so that data or a link that changes all the time costs little.
//
// Whole rounds are judged, with the time until the replica has stored them; so is
// what the middle of a long one costs, when all that lies between is full.
//
// Only what is measured decides. Methods may be called from several goroutines at once.
type packing struct {
	mu     sync.Mutex
	codecs []Codec // from the quickest to the one that packs best
	at     int     // of them, in use

	whole   packCost  // of rounds since the last decision
	counts  bool      // the present round does
	settle  int64     // bytes on the wire until its middle begins
	middle  packCost  // since then
	midway  bool      // it was judged: as a whole the round does not count
	workers int       // that it had
	since   time.Time // when all of it had been sent; zero: it is not, or all is stored

	trial  *packWay // the last change, if that is one
	before float64  // nanoseconds that a byte cost until it
	last   *packWay // the trial that was kept last
	// The two ways to go.
	stronger, quicker packWay
}

// packWay is a way to go, stronger or quicker, and how long not to.
type packWay struct {
	by    int           // codecs
	pause int           // the last rest, in lengths of the trial before it
	rest  time.Duration // work until the next trial that way may begin
}

// longer lets the next trial wait twice as long as it had to.
func (w *packWay) longer(trial packCost) {
	w.pause = min(max(packMinPause, 2*w.pause), packMaxPause)
	w.rest = time.Duration(w.pause) * trial.total
}

const (
	// packRoundBytes: rounds below it are over at once either way, and do not count.
	packRoundBytes = 4 << 20
	// packStretchBytes of data are judged at least; zeros do not count.
	packStretchBytes = 24 << 20
	// On the wire: what fills all that is between, and how much of what follows
	// is the middle of a round.
	packSettleBytes = 16 << 20
	packMiddleBytes = 32 << 20
	// packGain is what a byte may cost at most after a change, of what it did before.
	packGain = 7.0 / 8
	// A way that failed rests for so many times what the trial took, at first and
	// at most: trials take no more than that part of the time.
	packMinPause, packMaxPause = 4, 32
)

// packCost is how long workers took for data.
type packCost struct {
	codec Codec
	bytes int64 // packed, or let pass; not zeros
	wire  int64 // what became of them
	// Of total, which includes reading and comparing: packing, and waiting for the
	// link, that is for buffers, the limit, the window, the stream and the last of a round.
	pack, link, total time.Duration
}

func (c *packCost) add(o packCost) {
	c.bytes += o.bytes
	c.wire += o.wire
	c.pack += o.pack
	c.link += o.link
	c.total += o.total
}

// newPacking begins with a codec; known are those that the replica can unpack.
func newPacking(first Codec, known []string) *packing {
	p := &packing{stronger: packWay{by: 1}, quicker: packWay{by: -1}}
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		if c == CodecNone || slices.Contains(known, c.String()) {
			p.codecs = append(p.codecs, c)
		}
	}
	p.at = max(0, slices.Index(p.codecs, first))
	return p
}

// strongest is the one that packs best.
func (p *packing) strongest() Codec { return p.codecs[len(p.codecs)-1] }

// codec is what the next batch is packed with.
func (p *packing) codec() Codec {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.codecs[p.at]
}

// packChoice is what is packed with from now on, and why; empty: nothing was decided.
type packChoice struct {
	codec Codec
	why   string
}

// begin is called before a round of so many bytes, for so many workers.
func (p *packing) begin(bytes int64, workers int, now time.Time) packChoice {
	choice := p.stored(now)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.counts, p.workers, p.midway = bytes >= packRoundBytes, workers, false
	p.settle, p.middle = packSettleBytes, packCost{}
	return choice
}

// spent counts what a worker's batch cost.
func (p *packing) spent(c packCost) packChoice {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.counts || c.codec != p.codecs[p.at] { // begun before the last change
		return packChoice{}
	}
	p.whole.add(c)
	if p.settle > 0 {
		p.settle -= c.wire
		return packChoice{}
	}
	if p.middle.add(c); p.middle.wire < packMiddleBytes {
		return packChoice{}
	}
	p.midway = true
	return p.judge(&p.middle)
}

// sent is called after a round; failed: it does not count.
func (p *packing) sent(now time.Time, failed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.counts || failed {
		p.since = time.Time{}
		if failed {
			p.whole = packCost{}
		}
		return
	}
	p.since = now
}

// stored is called when the replica has all that was sent.
func (p *packing) stored(now time.Time) packChoice {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since.IsZero() {
		return packChoice{}
	}
	wait := time.Duration(p.workers) * now.Sub(p.since)
	p.since = time.Time{}
	p.whole.add(packCost{link: wait, total: wait})
	switch {
	case p.midway:
		p.whole = packCost{}
	case p.whole.bytes >= packStretchBytes:
		return p.judge(&p.whole)
	}
	return packChoice{}
}

// judge decides by a sample, which begins anew then.
func (p *packing) judge(sample *packCost) packChoice {
	sum := *sample
	*sample = packCost{}
	why := p.decide(sum, float64(sum.pack+sum.link)/float64(sum.bytes))
	return packChoice{p.codecs[p.at], why}
}

func (p *packing) decide(sum packCost, cost float64) string {
	if trial := p.trial; trial != nil {
		p.trial = nil
		compared := fmt.Sprintf("%.2f ns a byte, %.2f before", cost, p.before)
		if cost > p.before*packGain {
			trial.longer(sum)
			p.move(-trial.by)
			return "back, the trial cost " + compared
		}
		if p.last != nil && p.last != trial {
			p.last.longer(sum)
		} else {
			p.stronger.pause, p.quicker.pause = 0, 0
		}
		p.last = trial
		return "stays, it costs " + compared
	}
	p.stronger.rest -= sum.total
	p.quicker.rest -= sum.total
	switch {
	case 2*sum.link > sum.total && p.at+1 < len(p.codecs) && p.stronger.rest <= 0:
		p.trial = &p.stronger
	case 2*sum.pack > sum.total && p.at > 0 && p.quicker.rest <= 0:
		p.trial = &p.quicker
	default:
		return ""
	}
	p.before = cost
	p.move(p.trial.by)
	return fmt.Sprintf("tried: of %v of work %v went by packing, %v by waiting for the link",
		sum.total.Round(time.Millisecond), sum.pack.Round(time.Millisecond), sum.link.Round(time.Millisecond))
}

func (p *packing) move(by int) {
	p.at += by
	p.settle, p.whole, p.middle = packSettleBytes, packCost{}, packCost{}
}

// packed counts what a worker's batch cost.
func (l *Link) packed(p *packer) {
	if l.packing == nil {
		return
	}
	p.cost.bytes, p.cost.total = int64(p.codec.given), time.Since(p.begun)
	l.chose(l.packing.spent(p.cost))
}

func (l *Link) chose(c packChoice) {
	if c.why != "" && l.cfg.Packing != nil {
		l.cfg.Packing(c.codec, c.why)
	}
}

// roundBegins and roundEnds are around what SendRound does.
func (l *Link) roundBegins(bytes int64) {
	if l.packing != nil {
		batches := (bytes + int64(l.cfg.BatchBytes) - 1) / int64(l.cfg.BatchBytes)
		l.chose(l.packing.begin(bytes, int(min(batches, int64(l.cfg.Batches))), time.Now()))
	}
}

func (l *Link) roundEnds(err error) {
	if l.packing == nil {
		return
	}
	l.packing.sent(time.Now(), err != nil)
	l.mu.Lock()
	all := l.granted == l.left
	l.mu.Unlock()
	if all {
		l.allStored()
	}
}

// allStored is called when the replica has granted anew, or answered what came after,
// all that was sent.
func (l *Link) allStored() {
	if l.packing != nil {
		l.chose(l.packing.stored(time.Now()))
	}
}
