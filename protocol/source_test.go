package protocol

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"
)

// memSource is a volume in memory whose writes are numbered: block b written
// by write k holds (b, k) and noise that follows from both. Its tracker names
// grains, not blocks; its views copy out what is overwritten.
type memSource struct {
	size  int64
	grain int64 // bytes of the tracker's grain

	mu      sync.Mutex
	blocks  []uint64            // which write each block holds
	marks   []uint64            // per grain: the newest cut after which it was written
	last    uint64              // number of the last write
	cut     uint64              // number of the last cut
	written uint64              // bytes
	images  map[uint64][]uint64 // blocks as they were at each cut
	view    *memCut
	viewMax int64 // a view overflows once so many bytes were read of it; 0: never
	// frozenMax makes views hold only what changed, and gives none when that is
	// more, unless that went on for three rounds. 0: views are whole. Below 0: never a view.
	frozenMax  int64
	noViews    int
	lastNoView error
	forgotten  uint64

	lostBefore uint64 // the tracker can't tell about cuts before this one
	cutErr     error
	validErr   func(cut uint64) error // a further reason to void a view
	flushErr   func(cut uint64) error
	flushed    map[uint64]int
	cuts       int
	views      int
	readDelay  time.Duration
	liveReads  int64
	released   int
}

func newMemSource(size, grain int64) *memSource {
	return &memSource{size: size, grain: grain, blocks: make([]uint64, size/BlockSize), marks: make([]uint64, (size+grain-1)/grain),
		images: map[uint64][]uint64{}, flushed: map[uint64]int{}}
}

// content is what block b holds after write k.
func content(dst []byte, b int64, k uint64) {
	if k == 0 || k%7 == 0 { // some writes are zeros
		clear(dst)
		return
	}
	var block [BlockSize]byte
	noise(&block, uint64(b)*0x9e3779b97f4a7c15+k, k)
	copy(dst, block[:])
}

// noise writes to its caller's own memory only: what becomes of that the race
// detector sees, each byte of it would take it minutes.
//
//go:norace
func noise(block *[BlockSize]byte, x, k uint64) {
	for i := 0; i < BlockSize; i += 16 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(block[i:], x)
		binary.LittleEndian.PutUint64(block[i+8:], k) // half of it packs well
	}
}

func (s *memSource) write(b int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last++
	if v := s.view; v != nil && v.overflow == nil {
		if _, ok := v.old[b]; !ok {
			v.old[b] = s.blocks[b]
		}
	}
	s.blocks[b] = s.last
	s.marks[b*BlockSize/s.grain] = s.cut + 1
	s.written += BlockSize
}

func (s *memSource) Size() int64 { return s.size }

func (s *memSource) WrittenBytes() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written, nil
}

// ReadAt is torn between blocks, as a live device is.
func (s *memSource) ReadAt(p []byte, off int64) (int, error) {
	for i := int64(0); i < int64(len(p)); i += BlockSize {
		s.mu.Lock()
		k := s.blocks[(off+i)/BlockSize]
		s.liveReads += BlockSize
		s.mu.Unlock()
		content(p[i:i+BlockSize], (off+i)/BlockSize, k)
		if i%(1<<16) == 0 {
			runtime.Gosched()
		}
	}
	return len(p), nil
}

func (s *memSource) Cut(ctx context.Context, epoch uint64, wish CutWish) (Cut, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view != nil {
		return nil, errors.New("a view is still held")
	}
	if epoch <= s.cut {
		return nil, fmt.Errorf("cut %d after cut %d", epoch, s.cut)
	}
	if s.cutErr != nil {
		return nil, s.cutErr
	}
	s.cut = epoch
	s.cuts++
	s.images[epoch] = append([]uint64(nil), s.blocks...)
	c := &memCut{s: s, epoch: epoch, written: s.written}
	if wish.View && s.frozenMax != 0 {
		c.since = wish.Since
		if n := totalBytes(s.changed(wish.Since)); n > s.frozenMax && (wish.LiveRounds < 3 || s.frozenMax < 0) {
			s.noViews++
			c.noView = fmt.Errorf("%d bytes changed since epoch %d, only %d can be frozen", n, wish.Since, s.frozenMax)
			s.lastNoView = c.noView
		}
	}
	if wish.View && c.noView == nil {
		s.views++
		c.old = map[int64]uint64{}
		s.view = c
	}
	return c, nil
}

func (s *memSource) image(epoch uint64) []uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.images[epoch]
}

// Forget implements Forgetter.
func (s *memSource) Forget(upTo uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgotten = max(s.forgotten, upTo)
}

// changed is what the tracker names; mu is held.
func (s *memSource) changed(since uint64) []Range {
	var out []Range
	for g, m := range s.marks {
		if m > since {
			out = append(out, Range{int64(g) * s.grain, s.grain})
		}
	}
	return out
}

type memCut struct {
	s        *memSource
	since    uint64
	noView   error
	epoch    uint64
	written  uint64
	read     int64
	old      map[int64]uint64
	overflow error
	released bool
}

func (c *memCut) Epoch() uint64 { return c.epoch }

func (c *memCut) View() io.ReaderAt {
	if c.old == nil {
		return nil
	}
	return memView{c}
}

func (c *memCut) NoView() error   { return c.noView }
func (c *memCut) WholeView() bool { return c.s.frozenMax == 0 }

type memView struct{ c *memCut }

func (v memView) ReadAt(p []byte, off int64) (int, error) {
	c := v.c
	if d := c.s.readDelay; d > 0 {
		time.Sleep(d)
	}
	for i := int64(0); i < int64(len(p)); i += BlockSize {
		b := (off + i) / BlockSize
		c.s.mu.Lock()
		if c.released {
			c.s.mu.Unlock()
			panic("a view is read after its release")
		}
		if c.read += BlockSize; c.s.viewMax > 0 && c.read > c.s.viewMax && c.overflow == nil {
			c.overflow = errors.New("the copy-on-write store is full")
		}
		k, ok := c.old[b]
		if !c.WholeView() && c.s.marks[b*BlockSize/c.s.grain] <= c.since {
			c.s.mu.Unlock()
			return 0, fmt.Errorf("block %d did not change after epoch %d: the view does not hold it", b, c.since)
		}
		if !ok {
			k = c.s.blocks[b] // wrong once the store is full: Valid tells
		}
		c.s.mu.Unlock()
		content(p[i:i+BlockSize], b, k)
	}
	return len(p), nil
}

func (c *memCut) Changed(since uint64) ([]Range, error) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if since < c.s.lostBefore {
		return nil, fmt.Errorf("epoch %d: %w", since, ErrTrackingLost)
	}
	if since < c.s.forgotten {
		return nil, fmt.Errorf("epoch %d was forgotten up to %d: %w", since, c.s.forgotten, ErrTrackingLost)
	}
	return c.s.changed(since), nil
}

func (c *memCut) Valid() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.s.validErr != nil {
		if err := c.s.validErr(c.epoch); err != nil {
			return err
		}
	}
	return c.overflow
}

func (c *memCut) FlushSource() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.s.flushed[c.epoch]++
	if c.s.flushErr != nil {
		return c.s.flushErr(c.epoch)
	}
	return nil
}

func (c *memCut) Stalled() time.Duration { return time.Millisecond }
func (c *memCut) WrittenBytes() uint64   { return c.written }
func (c *memCut) CutUnixNanos() int64    { return memCutNanos(c.epoch) }

// memCutNanos is when a cut was taken, by its number.
func memCutNanos(epoch uint64) int64 { return int64(epoch)*1000 + 7 }

func (c *memCut) Release() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	c.released = true
	c.s.released++
	if c.s.view == c {
		c.s.view = nil
	}
	return nil
}

// busy writes to random places, in bursts, until the test ends it.
func (s *memSource) busy(t *testing.T, seed uint64, pause time.Duration) (stop func()) {
	return s.busyWithin(t, seed, pause, s.size/BlockSize)
}

// busyWithin writes to the first blocks only.
func (s *memSource) busyWithin(t *testing.T, seed uint64, pause time.Duration, blocks int64) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 9))
		for ctx.Err() == nil {
			b := rng.Int64N(blocks)
			for range 1 + rng.IntN(20) {
				s.write(b)
				b = (b + 1) % blocks
			}
			time.Sleep(pause)
		}
	})
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

func testRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 77)) }
