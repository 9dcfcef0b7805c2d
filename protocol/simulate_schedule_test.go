package protocol

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/fnv"
	"io"
	mathrand "math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing/synctest"
	"time"

	"blockferry/blockdev/blocktest"
)

// simSchedule makes a walk one and the same each time. Whoever is about to use a disk, to
// read a source or to receive a message stops at a turn, and nothing happens before all
// of the walk has stopped somewhere (synctest.Wait); then the seed says who goes on.
// What runs between two turns must come out the same in whatever order its goroutines
// do it: that is for the product to hold, and for TestSimulateAgain to find out.
//
// A goroutine that waits for a sync.Mutex whose holder has stopped would never be seen to
// have stopped: what is held that long is an ioMutex.
type simSchedule struct {
	seed    uint64
	mu      sync.Mutex
	rng     *mathrand.Rand
	turns   []*simTurn
	arrived chan struct{} // a turn came; holds one
	later   func()        // called after so many turns more
	in      int
	stop    chan struct{}

	hash  hash.Hash64 // of all that happened
	count int
	alike string // why the walk may not be the only one of its seed
	keep  bool   // also as lines
	lines []string
}

// simTurn is one who waits. The schedule calls ready and do, with its mutex held.
type simTurn struct {
	who   string
	at, n int64 // together with who different from those of all others
	ready func() bool
	do    func() string // says what came of it
	last  bool          // only when nobody else can go on
	done  chan struct{}
}

func (t *simTurn) order(o *simTurn) int {
	return cmp.Or(cmp.Compare(t.who, o.who), cmp.Compare(t.at, o.at), cmp.Compare(t.n, o.n))
}

func newSimSchedule(seed uint64, keep bool) *simSchedule {
	return &simSchedule{seed: seed, arrived: make(chan struct{}, 1), stop: make(chan struct{}), hash: fnv.New64a(), keep: keep}
}

// turn returns when t was done.
func (s *simSchedule) turn(t *simTurn) {
	t.done = make(chan struct{})
	s.mu.Lock()
	s.turns = append(s.turns, t)
	s.mu.Unlock()
	select {
	case s.arrived <- struct{}{}:
	default:
	}
	<-t.done
}

// settle returns when nothing goes on any more.
func (s *simSchedule) settle() {
	s.turn(&simTurn{who: "settle", last: true, do: func() string { return "" }})
}

// after has f called, once, after so many turns, when nothing goes on; nil: nothing is to be called any more.
func (s *simSchedule) after(turns int, f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.in, s.later = turns, f
}

// note adds to the trace; mu is held, or nobody else runs.
func (s *simSchedule) note(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	io.WriteString(s.hash, line)
	s.hash.Write([]byte{'\n'})
	s.count++
	if s.keep {
		s.lines = append(s.lines, line)
	}
}

// run gives turns until stop is closed.
func (s *simSchedule) run() {
	for {
		synctest.Wait()
		s.mu.Lock()
		if s.in--; s.in < 0 && s.later != nil {
			s.later()
			s.later = nil
		}
		t := s.choose()
		if t != nil {
			s.note("%s %d %d: %s", t.who, t.at, t.n, t.do())
			close(t.done)
		}
		s.mu.Unlock()
		if t != nil {
			continue
		}
		// All there is waits for the time.
		select {
		case <-s.arrived:
		case <-s.stop:
			return
		case <-time.After(simSlot / 4):
			panic(fmt.Sprintf("the walk of seed %d hangs", s.seed))
		}
	}
}

func (s *simSchedule) choose() *simTurn {
	slices.SortFunc(s.turns, (*simTurn).order)
	var can, last []int
	for i, t := range s.turns {
		if i > 0 && t.order(s.turns[i-1]) == 0 {
			s.alike = fmt.Sprintf("two turns are alike, %s %d %d: which comes first is not the seed's to say", t.who, t.at, t.n)
		}
		switch {
		case t.ready != nil && !t.ready():
		case t.last:
			last = append(last, i)
		default:
			can = append(can, i)
		}
	}
	if len(can) == 0 {
		can = last
	}
	if len(can) == 0 {
		return nil
	}
	i := can[s.rng.IntN(len(can))]
	t := s.turns[i]
	s.turns = slices.Delete(s.turns, i, i+1)
	return t
}

// simDisk is a disk that is used by turns. Memory alone is used at once.
type simDisk struct {
	*blocktest.Memory
	s    *simSchedule
	name string

	beforeFlush func() // called once, after flushesLeft more; nil: nothing is
	flushesLeft int
}

func (d *simDisk) turn(op string, at, n int64, do func() string) {
	d.s.turn(&simTurn{who: d.name + " " + op, at: at, n: n, do: do})
}

func simSum(b []byte) uint32 { return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)) }

func (d *simDisk) ReadAt(p []byte, at int64) (n int, err error) {
	d.turn("read", at, int64(len(p)), func() string {
		n, err = d.Memory.ReadAt(p, at)
		return fmt.Sprintf("%08x %v", simSum(p), err)
	})
	return n, err
}

func (d *simDisk) WriteAt(p []byte, at int64) (n int, err error) {
	d.turn("write", at, int64(len(p)), func() string {
		n, err = d.Memory.WriteAt(p, at)
		return fmt.Sprintf("%08x %v", simSum(p), err)
	})
	return n, err
}

func (d *simDisk) ZeroOut(at, n int64) (err error) {
	d.turn("zero", at, n, func() string {
		err = d.Memory.ZeroOut(at, n)
		return fmt.Sprint(err)
	})
	return err
}

func (d *simDisk) Flush() (err error) {
	// An epoch may be committed while the one before is applied: both flush.
	pc, _, _, _ := runtime.Caller(1)
	d.turn("flush by "+runtime.FuncForPC(pc).Name(), 0, 0, func() string {
		if d.flushesLeft--; d.flushesLeft < 0 && d.beforeFlush != nil {
			d.beforeFlush()
			d.beforeFlush = nil
		}
		err = d.Memory.Flush()
		return fmt.Sprint(err)
	})
	return err
}

// simView is a cut's image, read by turns.
type simView struct {
	s     *simSchedule
	image []byte
}

func (v simView) ReadAt(p []byte, at int64) (int, error) {
	v.s.turn(&simTurn{who: "source", at: at, n: int64(len(p)), do: func() string {
		copy(p, v.image[at:])
		return fmt.Sprintf("%08x", simSum(p))
	}})
	return len(p), nil
}

// Walks at the same time are told apart by their clocks: each begins in a slot of its
// own of the bubbles' year 2000. What is random to the product is drawn from its seed.
const (
	simSlot  = 100 * time.Hour
	simSlots = 64
)

var simRandom [simSlots]atomic.Pointer[mathrand.ChaCha8]

// simReader is crypto/rand's for the whole test binary: tests that are no walks get what
// they always get.
type simReader struct{ rest io.Reader }

func init() { rand.Reader = simReader{rand.Reader} }

func (r simReader) Read(p []byte) (int, error) {
	slot := time.Since(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)) / simSlot
	if slot >= 0 && slot < simSlots {
		if own := simRandom[slot].Load(); own != nil {
			return own.Read(p)
		}
	}
	return r.rest.Read(p)
}

// inSimSlot runs f at a time of the slot, 1 to simSlots-1, with what is random drawn from the seed.
func inSimSlot(slot int, seed uint64, f func()) {
	time.Sleep(time.Duration(slot)*simSlot + simSlot/4)
	simReseed(slot, seed, 0)
	defer simRandom[slot].Store(nil)
	f()
}

func simReseed(slot int, seed, move uint64) {
	var key [32]byte
	copy(key[:], fmt.Sprintf("%d %d", seed, move))
	simRandom[slot].Store(mathrand.NewChaCha8(key))
}

var errSimCut = errors.New("the link was cut")
