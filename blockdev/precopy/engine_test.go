package precopy

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/deadman"
)

// check compares what a cut holds with the disk at the stop, and that nothing
// beyond it changed since the base.
func check(t *testing.T, c *Cut, now, base []byte) {
	t.Helper()
	for _, e := range c.Extents() {
		got := make([]byte, e.Length)
		if _, err := c.ReadAt(got, e.Offset); err != nil {
			t.Fatal(err)
		}
		if i := firstDifference(got, now[e.Offset:e.End()]); i >= 0 {
			t.Fatalf("cut %d: byte %d is not as it was at the stop", c.Number(), e.Offset+int64(i))
		}
		copy(base[e.Offset:], got)
	}
	if i := firstDifference(base, now); i >= 0 {
		t.Fatalf("cut %d: byte %d changed since the base and is missing", c.Number(), i)
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// A cut under load is the disk as it was when writers stood still, in every
// byte, whatever round a block was read in.
func TestCutIsOneMoment(t *testing.T) {
	d := newDisk(32 << 20)
	m := newMarks(d.Size())
	g := &gate{disk: d}
	d.perRead = 50 * time.Microsecond
	e := newTestEngine(t, Options{Source: d, Tracker: m, Readers: 2, StallBudget: 4 * time.Millisecond})
	var w writers
	for seed := range uint64(2) {
		w.start(g, m, seed+1, 5*time.Millisecond)
	}
	defer w.stop()
	// The base: a cut without an image, then a full read, then a cut against it.
	if _, err := e.Mark(t.Context(), 1, g); err != nil {
		t.Fatal(err)
	}
	base := make([]byte, d.Size())
	if _, err := d.ReadAt(base, 0); err != nil {
		t.Fatal(err)
	}
	last, rounds, cuts := uint64(1), 0, 0
	for number := uint64(2); number < 25; number++ {
		// Some cuts fail: what they took must not be missing in the next.
		g.fail = nil
		if number%5 == 0 {
			g.fail = errors.New("not today")
		}
		before := w.count.Load()
		calls := 0
		g.prepare = func() { // so much that the first rounds can't be the last
			if calls++; calls > 2 {
				return
			}
			for at := range int64(150) {
				offset := (at*13 + int64(number)) % (d.Size() / block) * block
				g.RLock()
				d.write(offset, block, number<<8|uint64(calls))
				m.mark(offset, block)
				g.RUnlock()
			}
		}
		c, err := e.Cut(t.Context(), Request{Number: number, Since: last, Force: true}, g)
		if g.fail != nil {
			if !errors.Is(err, g.fail) {
				t.Fatalf("a stop that failed: %v", err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if w.count.Load() == before {
			t.Error("no writes during the cut: this test checks nothing")
		}
		rounds, cuts = rounds+c.Rounds(), cuts+1
		check(t, c, g.image, base)
		last = number
		if err := c.Release(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadAt(make([]byte, block), 0); err == nil || c.Valid() == nil {
			t.Error("read after its release")
		}
	}
	if rounds < cuts+cuts/2 {
		t.Errorf("%d rounds for %d cuts: this test checks little", rounds, cuts)
	}
}

// A slower replica's base is further back: the cut holds all since then.
func TestCutSinceAnOlderBase(t *testing.T) {
	d := newDisk(8 << 20)
	m := newMarks(d.Size())
	g := &gate{disk: d}
	e := newTestEngine(t, Options{Source: d, Tracker: m})
	var older *Cut
	write := func(at int64, n uint64) { d.write(at*block, block, n); m.mark(at*block, block) }
	if _, err := e.Mark(t.Context(), 1, g); err != nil {
		t.Fatal(err)
	}
	for number := uint64(2); number < 6; number++ {
		write(int64(number), number)
		if number == 4 {
			if _, err := e.Mark(t.Context(), number, g); err != nil {
				t.Fatal(err)
			}
			continue
		}
		c, err := e.Cut(t.Context(), Request{Number: number, Since: 1}, g)
		if err != nil {
			t.Fatal(err)
		}
		if older != nil {
			if _, err := older.ReadAt(make([]byte, block), 2*block); err == nil || errors.Is(err, ErrOutside) {
				t.Errorf("a released cut reads another's memory: %v", err)
			}
		}
		older = c
		if total := blockdev.Total(c.Extents()); total != int64(number-1)*block {
			t.Errorf("cut %d holds %d bytes since cut 1", number, total)
		}
		check(t, c, g.image, make([]byte, d.Size()))
		var outside = make([]byte, 2*block)
		if _, err := c.ReadAt(outside, int64(number)*block); !errors.Is(err, ErrOutside) {
			t.Errorf("beyond what it holds: %v", err)
		}
		if _, err := c.ReadAt(outside[:block], 0); !errors.Is(err, ErrOutside) {
			t.Errorf("what it does not hold: %v", err)
		}
		if _, err := e.Cut(t.Context(), Request{Number: 100, Since: 1}, g); err == nil {
			t.Error("a second cut before the first was released")
		}
		c.Release()
	}
	if _, err := e.Cut(t.Context(), Request{Number: 7, Since: 0}, g); !errors.Is(err, errUncovered) {
		t.Errorf("since before the coverage: %v", err)
	}
}

// prepared is an engine with a base and something written since.
func prepared(t *testing.T, o Options, size int64) (*Engine, *disk, *marks, *gate) {
	t.Helper()
	d := newDisk(size)
	m := newMarks(size)
	o.Source, o.Tracker = d, m
	e := newTestEngine(t, o)
	g := &gate{disk: d}
	if _, err := e.Mark(t.Context(), 1, g); err != nil {
		t.Fatal(err)
	}
	return e, d, m, g
}

func TestTooMuchForMemory(t *testing.T) {
	e, d, m, g := prepared(t, Options{MemoryBytes: 1 << 20}, 8<<20)
	d.write(0, 2<<20, 7) // zeros would need none
	m.mark(0, 2<<20)
	var much *TooMuchError
	_, err := e.Cut(t.Context(), Request{Number: 2, Since: 1, Force: true}, g)
	if !errors.As(err, &much) || !errors.Is(err, ErrTooMuch) || much.Reason != ReasonMemory || much.Bytes != 2<<20 || much.Limit != 1<<20 {
		t.Fatalf("%+v (%v)", much, err)
	}
	if g.stops != 0 {
		t.Error("writers were stopped for it")
	}
	// It is sent while writes go on, as a round; then it fits, and nothing was lost.
	if _, err := e.Mark(t.Context(), 3, g); err != nil {
		t.Fatal(err)
	}
	if all, err := m.Changed(1, 3); err != nil || blockdev.Total(all) != 2<<20 {
		t.Errorf("since 1: %v, %v", all, err)
	}
	m.mark(4<<20, 1<<20)
	c, err := e.Cut(t.Context(), Request{Number: 4, Since: 3}, g)
	if err != nil || blockdev.Total(c.Extents()) != 1<<20 {
		t.Fatalf("%v", err)
	}
}

// Too much for memory is sealed by who takes the cut in another way: the next one is
// read into memory again, and holds what changed since, nothing else.
func TestSealedWithoutTheEngine(t *testing.T) {
	e, d, m, g := prepared(t, Options{MemoryBytes: 1 << 20}, 8<<20)
	d.write(0, 2<<20, 7)
	m.mark(0, 2<<20)
	if _, err := e.Cut(t.Context(), Request{Number: 2, Since: 1}, g); !errors.Is(err, ErrTooMuch) {
		t.Fatal(err)
	}
	m.ExchangeStopped()
	if err := e.Seal(2); err != nil {
		t.Fatal(err)
	}
	if all, err := m.Changed(1, 2); err != nil || blockdev.Total(all) != 2<<20 {
		t.Errorf("since 1: %v, %v", all, err)
	}
	d.write(4<<20, block, 3)
	m.mark(4<<20, block)
	c, err := e.Cut(t.Context(), Request{Number: 3, Since: 2}, g)
	if err != nil || blockdev.Total(c.Extents()) != block {
		t.Fatalf("%v", err)
	}
}

// As much is written in each round as was read: it does not converge, and no
// writer is stopped for that. Force stops them for longer, within the limit.
func TestDoesNotConverge(t *testing.T) {
	e, d, m, g := prepared(t, Options{StallBudget: 5 * time.Millisecond, Rounds: 3, Readers: 1, StallLimit: 600 * time.Millisecond}, 8<<20)
	d.perRead = 2 * time.Millisecond
	n := uint64(0)
	g.prepare = func() {
		for at := int64(0); at < 100; at++ {
			n++
			d.write(at*2*block, block, n)
			m.mark(at*2*block, block)
		}
	}
	g.prepare()
	var much *TooMuchError
	_, err := e.Cut(t.Context(), Request{Number: 2, Since: 1}, g)
	if !errors.As(err, &much) || much.Reason != ReasonRounds || much.Rounds != 3 || much.Bytes < 100*block || much.Limit > 10*block {
		t.Fatalf("%+v (%v)", much, err)
	}
	if g.stops != 0 {
		t.Errorf("writers were stopped %d times for it", g.stops)
	}
	c, err := e.Cut(t.Context(), Request{Number: 3, Since: 1, Force: true}, g)
	if err != nil {
		t.Fatal(err)
	}
	if c.Stalled() < 200*time.Millisecond || g.stops != 1 || g.limit != 600*time.Millisecond || c.InsideBytes() != 100*block {
		t.Errorf("stalled %s in %d stops of at most %s, %d bytes", c.Stalled(), g.stops, g.limit, c.InsideBytes())
	}
	check(t, c, g.image, make([]byte, d.Size()))
	c.Release()
	// Not beyond the limit.
	d.perRead = 12 * time.Millisecond
	if _, err := e.Cut(t.Context(), Request{Number: 4, Since: 3, Force: true}, g); !errors.As(err, &much) || much.Reason != ReasonRounds || g.stops != 1 {
		t.Errorf("forced beyond the limit: %v (%d stops)", err, g.stops)
	}
}

// More is left once writers stand still than was marked before: a freeze writes
// back. It is let go at once and read in one more round, until that is enough.
func TestMoreIsLeftThanForetold(t *testing.T) {
	e, d, m, g := prepared(t, Options{StallBudget: 10 * time.Millisecond, Readers: 1}, 8<<20)
	d.perRead = time.Millisecond
	for range 3 { // so much has it measured
		m.mark(0, 64*block)
		m.mark(1<<20, block)
		c, err := e.Cut(t.Context(), Request{Number: e.o.Tracker.(*marks).newest + 1, Since: 1}, g)
		if err != nil {
			t.Fatal(err)
		}
		c.Release()
	}
	g.stops = 0
	dirty := int64(300)
	var begun, inVain int64
	g.after = func() {
		if g.stops == 1 {
			inVain = d.reads.Load() - begun
		}
	}
	g.draining = func() {
		begun = d.reads.Load()
		for at := range dirty {
			d.write(at*2*block, block, 7)
			m.mark(at*2*block, block)
		}
		dirty = 0
	}
	c, err := e.Cut(t.Context(), Request{Number: 10, Since: 1}, g)
	if err != nil {
		t.Fatal(err)
	}
	if g.stops != 2 || c.InsideBytes() != 0 || c.Stalled() > 200*time.Millisecond {
		t.Errorf("%d stops of %s, %d bytes inside", g.stops, c.Stalled(), c.InsideBytes())
	}
	if inVain != 0 {
		t.Errorf("%d reads while writers stood still in vain", inVain)
	}
	check(t, c, g.image, make([]byte, d.Size()))
	c.Release()
	g.draining = func() {
		for at := range int64(300) {
			m.mark(at*2*block, block)
		}
	}
	var much *TooMuchError
	if _, err := e.Cut(t.Context(), Request{Number: 11, Since: 10}, g); !errors.As(err, &much) || much.Bytes <= much.Limit {
		t.Errorf("again and again: %v", err)
	}
	if g.stops > 2+maxStops {
		t.Errorf("%d stops", g.stops)
	}
}

func TestCutIsVoid(t *testing.T) {
	e, d, m, g := prepared(t, Options{}, 8<<20)
	m.mark(0, block)
	// A mark made inside.
	d.perRead = 20 * time.Millisecond
	g.draining = func() {
		m.mark(4*block, block)
		time.AfterFunc(5*time.Millisecond, func() { m.mark(9*block, block) })
	}
	if _, err := e.Cut(t.Context(), Request{Number: 2, Since: 1}, g); !errors.Is(err, ErrWritten) {
		t.Errorf("written to inside: %v", err)
	}
	g.draining, d.perRead = nil, 0
	// Events were lost.
	m.lost = errors.New("3 sectors were written that no event named")
	if _, err := e.Cut(t.Context(), Request{Number: 3, Since: 1}, g); !errors.Is(err, errors.Join(m.lost)) && (err == nil || !strings.Contains(err.Error(), "3 sectors")) {
		t.Errorf("events lost: %v", err)
	}
	if _, err := e.Mark(t.Context(), 4, g); err != nil {
		t.Fatal(err)
	}
	// The disk fails, in a round and inside.
	m.mark(0, block)
	d.failing.Store(true)
	if _, err := e.Cut(t.Context(), Request{Number: 5, Since: 4}, g); err == nil || !strings.Contains(err.Error(), "input/output") {
		t.Errorf("a read that fails: %v", err)
	}
	d.failing.Store(false)
	g.draining = func() { m.mark(0, block); d.failing.Store(true) }
	if _, err := e.Cut(t.Context(), Request{Number: 6, Since: 4}, g); err == nil || !strings.Contains(err.Error(), "input/output") {
		t.Errorf("a read that fails inside: %v", err)
	}
	d.failing.Store(false)
	g.draining = nil
	ctx, cancel := context.WithCancel(t.Context())
	g.prepare = cancel
	if _, err := e.Cut(ctx, Request{Number: 7, Since: 4}, g); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	g.prepare = nil
	c, err := e.Cut(t.Context(), Request{Number: 8, Since: 4}, g)
	if err != nil || blockdev.Total(c.Extents()) != block {
		t.Errorf("after all that: %v", err)
	}
}

// What happens while writers are stopped allocates nothing, and touches no
// memory for the first time.
func TestInsideAllocatesNothing(t *testing.T) {
	e, d, m, g := prepared(t, Options{}, 64<<20)
	var least uint64 = 1 << 40 // others in this process may allocate meanwhile
	for number := uint64(2); number < 12; number++ {
		for at := range int64(300) {
			d.write(at*3*block, block, number)
			m.mark(at*3*block, block)
		}
		var taken *quietMarks
		g.draining = func() {
			// New places and known ones.
			for at := range int64(200) {
				m.mark((at*4+int64(number)*2000)*block%(60<<20), block)
			}
			taken = &quietMarks{marks: m}
			taken.Exchange() // the fake allocates, so it is done now
			e.o.Tracker = taken
		}
		stop := &counting{gate: g}
		c, err := e.Cut(t.Context(), Request{Number: number, Since: number - 1, Force: true}, stop)
		e.o.Tracker = m
		if err != nil {
			t.Fatal(err)
		}
		if c.InsideBytes() != 200*block {
			t.Fatalf("%d bytes inside", c.InsideBytes())
		}
		least = min(least, stop.mallocs)
		c.Release()
	}
	if least != 0 {
		t.Errorf("%d allocations", least)
	}
}

// quietMarks have exchanged already.
type quietMarks struct {
	*marks
	done bool
}

func (q *quietMarks) Exchange() {
	if !q.done {
		q.done = true
		q.marks.Exchange()
	}
}

func (q *quietMarks) ExchangeStopped() bool {
	q.Exchange()
	return true
}

// counting counts allocations inside.
type counting struct {
	*gate
	mallocs uint64
}

func (c *counting) Stop(ctx context.Context, limit time.Duration, inside func() error) (time.Duration, error) {
	return c.gate.Stop(ctx, limit, func() (err error) {
		var before, after runtime.MemStats
		deadman.Quiet(func() {
			runtime.ReadMemStats(&before)
			err = inside()
			runtime.ReadMemStats(&after)
		})
		c.mallocs = after.Mallocs - before.Mallocs
		return err
	})
}

// A process that ended between an exchange and its seal leaves marks that only
// the next seal makes known.
func TestExchangeOfAnEarlierProcess(t *testing.T) {
	e, _, m, g := prepared(t, Options{}, 8<<20)
	m.mark(3*block, block)
	m.Exchange()
	m.last = nil
	if _, err := e.Cut(t.Context(), Request{Number: 2, Since: 1}, g); !errors.Is(err, ErrNotWhole) {
		t.Errorf("without what was exchanged before: %v", err)
	}
	c, err := e.Cut(t.Context(), Request{Number: 3, Since: 1}, g)
	if err != nil || blockdev.Total(c.Extents()) != block {
		t.Errorf("the next: %v", err)
	}
}

func TestSpeedIsFitted(t *testing.T) {
	var s speed
	if got := s.foretell(10, 40<<10); got < 500*time.Microsecond || got > 5*time.Millisecond {
		t.Errorf("before the first read: %s", got)
	}
	disk := func(jobs int, bytes int64) time.Duration {
		return time.Duration(jobs)*400*time.Microsecond + time.Duration(bytes)*2
	}
	for range 10 {
		for _, o := range []struct {
			jobs  int
			bytes int64
		}{{1000, 1000 * block}, {500, 128 << 20}, {2000, 3000 * block}} {
			s.add(o.jobs, o.bytes, disk(o.jobs, o.bytes))
		}
	}
	for _, o := range []struct {
		jobs  int
		bytes int64
	}{{50, 50 * block}, {10, 2 << 20}, {300, 5 << 20}} {
		got, want := s.foretell(o.jobs, o.bytes), disk(o.jobs, o.bytes)
		if ratio := float64(got) / float64(want); ratio < 0.7 || ratio > 1.4 {
			t.Errorf("%d reads of %d bytes: foretold %s, take %s", o.jobs, o.bytes, got, want)
		}
	}
	// It becomes slower, and that counts soon.
	for range 3 {
		s.add(1000, 1000*block, 5*disk(1000, 1000*block))
	}
	if got, want := s.foretell(500, 500*block), 5*disk(500, 500*block); got < want*6/10 {
		t.Errorf("since it is slower: foretold %s, take %s", got, want)
	}
	// Only small reads, all alike.
	s = speed{}
	for range 20 {
		s.add(100, 100*block, 100*time.Millisecond)
	}
	if got := s.foretell(10, 10*block); got < 7*time.Millisecond || got > 13*time.Millisecond {
		t.Errorf("10 reads of 1 ms: %s", got)
	}
}

func TestOptionsAreChecked(t *testing.T) {
	d := newDisk(1 << 20)
	for _, o := range []Options{{MemoryBytes: 4096}, {MemoryBytes: 1<<20 + 1}, {StallBudget: time.Microsecond},
		{StallBudget: 2 * time.Second}, {Rounds: -1}} {
		o.Source, o.Tracker = d, newMarks(d.Size())
		if e, err := New(o); err == nil {
			e.Close()
			t.Errorf("%+v was taken", o)
		}
	}
	e := newTestEngine(t, Options{Source: d, Tracker: newMarks(d.Size()), StallLimit: 10 * time.Millisecond})
	if e.o.StallBudget != 5*time.Millisecond {
		t.Errorf("a stall limit of 10 ms, and the budget is %s", e.o.StallBudget)
	}
}

// What was freed, and reads as zeros, needs no memory: a cut may hold more of it than
// that, and is the disk at the stop all the same, also where something is written to it
// between two rounds or right before the stop.
func TestFreedSpaceNeedsNoMemory(t *testing.T) {
	d := newDisk(64 << 20)
	m := newMarks(d.Size())
	g := &gate{disk: d}
	const memory = 8 << 20
	e := newTestEngine(t, Options{Source: d, Tracker: m, MemoryBytes: memory, StallBudget: time.Second, StallLimit: 10 * time.Second})
	write := func(at, blocks int64, n uint64) { d.write(at*block, blocks*block, n); m.mark(at*block, blocks*block) }
	free := func(offset, length int64) {
		d.sectors(offset, length, func(from, to int64) { clear(d.content[from:to]) })
		m.mark(offset, length)
	}
	write(0, d.Size()/block, 1)
	if _, err := e.Mark(t.Context(), 1, g); err != nil {
		t.Fatal(err)
	}
	base := bytes.Clone(d.content)
	for number := uint64(2); number < 8; number += 2 {
		free(3<<20+5*block, 40<<20)
		for i := range int64(20) { // what lives on amid it, alone and in pairs
			write(900+i*391, 1+i%2, number<<8|uint64(i))
		}
		for i := range int64(50) { // and outside
			write(12000+i*17, 3, number<<8|uint64(i))
		}
		calls := 0
		g.prepare = func() {
			if calls++; calls == 2 { // after the first round
				write(2000, 40, number<<8|200)
				write(4000, 1, number<<8|201)
				free(13<<20, 2<<20) // once more
			}
		}
		g.draining = func() {
			write(2010, 3, number<<8|210)
			write(5000, 2, number<<8|211)
			write(15000, 1, number<<8|212)
			free(20<<20, 64<<10)
		}
		c, err := e.Cut(t.Context(), Request{Number: number, Since: number - 1}, g)
		if err != nil {
			t.Fatal(err)
		}
		if got := blockdev.Total(c.Extents()); got < 40<<20 {
			t.Errorf("cut %d holds %d bytes, more were freed", number, got)
		}
		check(t, c, g.image, base)
		if n, err := c.ReadAt(make([]byte, 3*block), 60<<20); n != 0 || !errors.Is(err, ErrOutside) {
			t.Errorf("beyond it: %d bytes, %v", n, err)
		}
		if err := c.Release(); err != nil {
			t.Fatal(err)
		}
		if e.pool.touched > memory {
			t.Errorf("%d bytes of memory were used", e.pool.touched)
		}
		g.prepare, g.draining = nil, nil
		write(0, d.Size()/block, number<<8) // the next frees what holds something
		base = bytes.Clone(d.content)
		if _, err := e.Mark(t.Context(), number+1, g); err != nil {
			t.Fatal(err)
		}
	}
	write(9, 1, 77)
	c, err := e.Cut(t.Context(), Request{Number: 9, Since: 7}, g)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Extents(); blockdev.Total(got) != block {
		t.Errorf("the next cut holds %v, one block was written", got)
	}
}

// To find out that what changed is no freed space takes little reading.
func TestTooMuchIsSeenSoon(t *testing.T) {
	d := newDisk(64 << 20)
	m := newMarks(d.Size())
	g := &gate{disk: d}
	const memory = 8 << 20
	e := newTestEngine(t, Options{Source: d, Tracker: m, MemoryBytes: memory})
	if _, err := e.Mark(t.Context(), 1, g); err != nil {
		t.Fatal(err)
	}
	d.write(0, 40<<20, 7)
	m.mark(0, 40<<20)
	var tooMuch *TooMuchError
	if _, err := e.Cut(t.Context(), Request{Number: 2, Since: 1}, g); !errors.As(err, &tooMuch) || tooMuch.Reason != ReasonMemory {
		t.Fatalf("40 MiB of data in 8 of memory: %v", err)
	}
	if n := d.reads.Load() * maxRead; n > memory/lookParts {
		t.Errorf("%d bytes were read to find that out", n)
	}
}
