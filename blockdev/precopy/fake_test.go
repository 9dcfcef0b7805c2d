package precopy

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"blockferry/blockdev"
)

const block = blockdev.BlockSize

// disk is a device in memory. A write, or a read, is done sector by sector: who
// reads meanwhile sees it torn.
type disk struct {
	mu      [64]sync.Mutex // of sectors, taken one at a time
	content []byte
	perRead time.Duration // what a read takes at least
	failing atomic.Bool
	reads   atomic.Int64
}

func newDisk(size int64) *disk { return &disk{content: make([]byte, size)} }

func (d *disk) Name() string { return "disk" }
func (d *disk) Size() int64  { return int64(len(d.content)) }

func (d *disk) sectors(offset, length int64, f func(from, to int64)) {
	for at := offset; at < offset+length; at += 512 {
		m := &d.mu[at/512%64]
		m.Lock()
		f(at, at+512)
		m.Unlock()
	}
}

func (d *disk) ReadAt(p []byte, offset int64) (int, error) {
	d.reads.Add(1)
	if d.failing.Load() {
		return 0, errors.New("input/output error")
	}
	if d.perRead > 0 {
		time.Sleep(d.perRead)
	}
	d.sectors(offset, int64(len(p)), func(from, to int64) { copy(p[from-offset:], d.content[from:to]) })
	return len(p), nil
}

// write fills a range with a number.
func (d *disk) write(offset, length int64, number uint64) {
	d.sectors(offset, length, func(from, to int64) {
		for at := from; at < to; at += 8 {
			binary.LittleEndian.PutUint64(d.content[at:], number<<16|uint64(at/512)&0xffff)
		}
	})
}

// marks are a tracker in memory.
type marks struct {
	mu     sync.Mutex
	size   int64
	live   map[int64]bool // by block
	last   []blockdev.Extent
	open   []blockdev.Extent
	sealed map[uint64][]blockdev.Extent // what changed before a cut, since the one before
	first  uint64                       // 0: no coverage
	newest uint64
	lost   error // the next Seal says so
	unseen int   // so many stops say that completions were lost
	unheld int   // stops taken back
	// unsettled: nothing is known while writes go on, or, if blind, ever is.
	unsettled, blind bool
}

func newMarks(size int64) *marks {
	return &marks{size: size, live: map[int64]bool{}, sealed: map[uint64][]blockdev.Extent{}}
}

func (m *marks) mark(offset, length int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for at := offset / block; at*block < offset+length; at++ {
		m.live[at] = true
	}
}

func (m *marks) MarkedBytes() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return int64(len(m.live)) * block
}

func (m *marks) ExchangeStopped() (whole bool) {
	m.Exchange()
	m.mu.Lock()
	defer m.mu.Unlock()
	whole = m.unseen == 0
	m.unseen = max(0, m.unseen-1)
	return whole
}

func (m *marks) Unheld() { m.unheld++ }

func (m *marks) Settled() (settled, possible bool) { return !m.unsettled && !m.blind, !m.blind }

func (m *marks) Exchange() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.last = nil
	if len(m.live) == 0 {
		return // nothing allocated
	}
	for at := range m.live {
		m.last = append(m.last, blockdev.Extent{Offset: at * block, Length: block})
	}
	m.last = blockdev.Normalize(m.last)
	m.live = map[int64]bool{}
	m.open = blockdev.Union(m.open, m.last)
}

func (m *marks) Taken() []blockdev.Extent {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.last)
}

func (m *marks) AppendTaken(list []blockdev.Extent) ([]blockdev.Extent, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, e := range m.last {
		if len(list) == cap(list) {
			return list, i == len(m.last)
		}
		list = append(list, e)
	}
	return list, true
}

func (m *marks) Seal(number uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if number <= m.newest {
		return fmt.Errorf("sealed %d after %d", number, m.newest)
	}
	err := m.lost
	m.lost = nil
	m.newest = number
	if err != nil {
		m.first, m.open = 0, nil
		return err
	}
	if m.first == 0 {
		m.first = number
	}
	m.sealed[number], m.open = m.open, nil
	return nil
}

func (m *marks) Covered() (first, last uint64, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.first, m.newest, m.first != 0
}

var errUncovered = errors.New("not covered")

func (m *marks) Changed(since, upTo uint64) ([]blockdev.Extent, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.first == 0 || since < m.first || upTo > m.newest {
		return nil, errUncovered
	}
	var all []blockdev.Extent
	for number, e := range m.sealed {
		if number > since && number <= upTo {
			all = blockdev.Union(all, e)
		}
	}
	return all, nil
}

// gate is a Stopper: writers hold it for reading.
type gate struct {
	sync.RWMutex
	disk    *disk
	prepare func()
	// draining runs when writers are kept out, before inside.
	draining func()
	after    func() // inside has returned, writers are still out
	fail     error
	untried  bool
	late     error  // the same, when inside has run
	image    []byte // of the disk at the last stop
	stops    int
	limit    time.Duration
}

func (g *gate) Prepare(context.Context) error {
	if g.prepare != nil {
		g.prepare()
	}
	return nil
}

func (g *gate) Stop(_ context.Context, limit time.Duration, inside func() error) (time.Duration, error) {
	if g.untried {
		return 0, ErrUntried
	}
	start := time.Now()
	g.Lock()
	defer g.Unlock()
	g.stops++
	g.limit = limit
	if g.fail != nil {
		return time.Since(start), g.fail
	}
	if g.draining != nil {
		g.draining()
	}
	err := inside()
	stalled := time.Since(start)
	if g.after != nil {
		g.after()
	}
	g.image = slices.Clone(g.disk.content)
	if g.late != nil {
		return stalled, g.late
	}
	return stalled, err
}

// writers write to the disk until stop is called.
type writers struct {
	stopping atomic.Bool
	group    sync.WaitGroup
	count    atomic.Int64
}

func (w *writers) start(g *gate, m *marks, seed uint64, pause time.Duration) {
	w.group.Go(func() {
		r := rand.New(rand.NewPCG(seed, 1))
		for n := uint64(1); !w.stopping.Load(); n++ {
			length := (r.Int64N(8) + 1) * block
			offset := r.Int64N((g.disk.Size()-length)/block) * block
			g.RLock()
			g.disk.write(offset, length, n<<8|seed)
			m.mark(offset, length)
			g.RUnlock()
			w.count.Add(1)
			time.Sleep(pause)
		}
	})
}

func (w *writers) stop() {
	w.stopping.Store(true)
	w.group.Wait()
}

func newTestEngine(t *testing.T, o Options) *Engine {
	t.Helper()
	e, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}
