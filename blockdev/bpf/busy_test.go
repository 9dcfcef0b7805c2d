package bpf

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// silence ends one of the programs, as lost events would.
func (t *Tracker) silence(tb testing.TB, program int) {
	tb.Helper()
	l := t.kernel.links[program]
	if err := errors.Join(l.Unpin(), l.Close()); err != nil {
		tb.Fatal(err)
	}
}

// openBoth opens a tracker that watches both what begins and what completes.
func openBoth(tb testing.TB, target Target) *Tracker {
	tb.Helper()
	t := open(tb, target)
	if err := t.kernel.startAll(target.Pin, programsOf(t.where.place.Requests)); err != nil {
		tb.Fatal(err)
	}
	return t
}

// speak begins it again.
func (t *Tracker) speak(tb testing.TB, program int) {
	tb.Helper()
	l, err := link.AttachTracing(link.TracingOptions{Program: t.kernel.programs[program]})
	if err != nil {
		tb.Fatal(err)
	}
	t.kernel.links[program] = l
}

// The first loss ends the coverage; from then on what begins is watched, also by
// processes that go on with it or begin anew, and a loss costs no coverage.
func TestFirstLoss(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	target := d.target(newPin(t))
	tracker := open(t, target)
	rng := rand.New(rand.NewPCG(5, 6))
	cut := covered(t, tracker, 1)
	lose := func() error {
		t.Helper()
		tracker.silence(t, 0)
		d.writes(t, rng, unix.O_DIRECT, 20, 4096, 4096)
		tracker.speak(t, 0)
		if err := tracker.kernel.links[0].Pin(target.Pin + "/" + programsOf(true)[0] + linkSuffix); err != nil {
			t.Fatal(err)
		}
		tracker.ExchangeStopped()
		cut++
		return tracker.Seal(cut)
	}
	watched := func() bool { return startedAll(target.Pin, programsOf(true)) }
	if watched() {
		t.Skip("events were lost already")
	}
	tracker.Void("a caller's reason")
	if cut = covered(t, tracker, cut+1); watched() {
		t.Error("a caller's reason is taken for a loss")
	}
	if err := lose(); !errors.Is(err, ErrUncovered) {
		t.Fatalf("the first loss: %v", err)
	}
	if !watched() {
		t.Fatal("what begins is not watched after a loss")
	}
	for _, what := range []string{"the second loss", "one after another process has gone on", "one after another has begun anew"} {
		cut = covered(t, tracker, cut+1)
		if err := lose(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if what == "the second loss" {
			cut++
			seal(t, tracker, cut)
		} else {
			tracker.Void("so that the next begins anew")
		}
		if err := tracker.Close(); err != nil {
			t.Fatal(err)
		}
		tracker = open(t, target)
	}
}

// So it does when a process finds a loss that came before it.
func TestLossFoundAtOpen(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	target := d.target(newPin(t))
	tracker := open(t, target)
	covered(t, tracker, 1)
	tracker.silence(t, 0)
	d.writes(t, rand.New(rand.NewPCG(5, 11)), unix.O_DIRECT, 3, 4096, 4096)
	tracker.speak(t, 0)
	err := tracker.kernel.links[0].Pin(target.Pin + "/" + programsOf(true)[0] + linkSuffix)
	if err := errors.Join(err, tracker.Close()); err != nil {
		t.Fatal(err)
	}
	tracker = open(t, target)
	if _, _, ok := tracker.Adopted(); ok || !startedAll(target.Pin, programsOf(true)) {
		t.Errorf("adopted %v: %s; what begins is watched: %v", ok, tracker.Fresh(), tracker.kernel.startedAll())
	}
	covered(t, tracker, 1)
}

// What completes unseen costs no coverage: between two cuts with writers stopped
// what began is all that changed. Only the rounds are worth nothing, and that is
// said once.
func TestLostCompletions(t *testing.T) {
	for name, newDisk := range map[string]func(testing.TB, int64) disk{"requests": newFastLoop, "bios": newZram} {
		for silent, what := range []string{"complete", "begin"} {
			t.Run(name+" "+what, func(t *testing.T) {
				d := newDisk(t, 64<<20)
				tracker := openBoth(t, d.target(newPin(t)))
				rng := rand.New(rand.NewPCG(5, 7))
				cut := covered(t, tracker, 1)
				write := func() map[int64]bool { return d.writes(t, rng, unix.O_DIRECT, 20, 4096, 4096) }
				before := write()
				tracker.silence(t, silent)
				touched := write()
				for b := range before {
					touched[b] = true
				}
				tracker.speak(t, silent)
				tracker.Exchange() // a round
				// Of bios what began unseen is not seen to end either.
				lost := what == "begin" && name == "bios"
				whole := tracker.ExchangeStopped()
				err := tracker.Seal(cut + 1)
				if lost {
					if !errors.Is(err, ErrUncovered) {
						t.Errorf("nothing was seen, and the seal says %v", err)
					}
					return
				}
				if whole != (what == "begin") {
					t.Errorf("whole: %v", whole)
				}
				if err != nil {
					t.Fatal(err)
				}
				list := changed(t, tracker, cut, cut+1)
				mustName(t, list, touched)
				if got := grainsOf(list); len(got) != len(touched) {
					t.Errorf("%d blocks named, want %d", len(got), len(touched))
				}
				// The next is as if nothing had been.
				touched = write()
				if whole := tracker.ExchangeStopped(); !whole {
					t.Error("the next one is not whole")
				}
				if err := tracker.Seal(cut + 2); err != nil {
					t.Fatal(err)
				}
				mustName(t, changed(t, tracker, cut+1, cut+2), touched)
				tracker.Exchange()
				if settled, _ := tracker.Settled(); settled && name == "bios" {
					t.Error("a disk without requests is said to be known while writes go on")
				} else if !settled && name == "requests" {
					t.Log("not settled") // events were lost
				}
			})
		}
	}
}

// Stops of cuts that are given up count, too: between any two of them one side is
// enough, and what neither saw is not made good by a later one.
func TestLossesBetweenStops(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	tracker := openBoth(t, d.target(newPin(t)))
	rng := rand.New(rand.NewPCG(5, 10))
	cut := covered(t, tracker, 1)
	touched := map[int64]bool{}
	stop := func(silent ...int) (whole bool) {
		t.Helper()
		for _, i := range silent {
			tracker.silence(t, i)
		}
		for b := range d.writes(t, rng, unix.O_DIRECT, 3, 4096, 4096) {
			touched[b] = true
		}
		for _, i := range silent {
			tracker.speak(t, i)
		}
		return tracker.ExchangeStopped()
	}
	for i, silent := range []int{0, 1, 0} {
		if whole := stop(silent); whole != (silent == 1) {
			t.Errorf("stop %d: whole %v", i, whole)
		}
	}
	if err := tracker.Seal(cut + 1); err != nil {
		t.Fatal(err)
	}
	mustName(t, changed(t, tracker, cut, cut+1), touched)
	if stop(0, 1) {
		t.Error("whole, and nothing was seen")
	}
	stop()
	if err := tracker.Seal(cut + 2); !errors.Is(err, ErrUncovered) {
		t.Errorf("nobody had seen what was written before an earlier stop: %v", err)
	}
	// Misses of one side, while the other has lost something.
	cut = covered(t, tracker, cut+3)
	stop(0)
	tracker.base.misses[begun]--
	if err := tracker.Seal(cut + 1); !errors.Is(err, ErrUncovered) || !strings.Contains(err.Error(), "1 of what begins") {
		t.Errorf("one side missed events, the other lost sectors: %v", err)
	}
	cut = covered(t, tracker, cut+2)
	stop()
	tracker.base.misses[begun]--
	if err := tracker.Seal(cut + 1); err != nil {
		t.Errorf("one side missed events, the other has seen all: %v", err)
	}
}

// After a cut that stopped nobody, what began is not enough: a write in flight at
// that cut began before it.
func TestLostCompletionsAfterAMark(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	target := d.target(newPin(t))
	tracker := openBoth(t, target)
	rng := rand.New(rand.NewPCG(5, 8))
	cut := covered(t, tracker, 1)
	for {
		if settled, possible := tracker.Settled(); settled && possible {
			break
		}
		t.Log("not settled") // events were lost
		cut = covered(t, tracker, cut+1)
	}
	tracker.Exchange()
	if err := tracker.Seal(cut + 1); err != nil {
		t.Fatal(err)
	}
	// Nor after another process has gone on with it.
	if err := tracker.Close(); err != nil {
		t.Fatal(err)
	}
	tracker = open(t, target)
	if _, _, ok := tracker.Adopted(); !ok {
		t.Fatal(tracker.Fresh())
	}
	tracker.silence(t, 0)
	d.writes(t, rng, unix.O_DIRECT, 3, 4096, 4096)
	if settled, possible := tracker.Settled(); settled || !possible {
		t.Error("it is said to be settled")
	}
	if tracker.ExchangeStopped() {
		t.Error("it is said to be whole")
	}
	if err := tracker.Seal(cut + 2); !errors.Is(err, ErrUncovered) || !strings.Contains(err.Error(), "12288 bytes") {
		t.Errorf("seal: %v", err)
	}
}

// Of a stop that did not hold nothing counts but the marks: not that a side agreed,
// as what was in flight may have hidden what it lost, nor the leads found then.
func TestStopThatDidNotHold(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	tracker := openBoth(t, d.target(newPin(t)))
	rng := rand.New(rand.NewPCG(5, 9))
	cut := covered(t, tracker, 1)
	tracker.silence(t, 0)
	for _, held := range []bool{true, false} {
		touched := d.writes(t, rng, unix.O_DIRECT, 3, 4096, 4096)
		if tracker.ExchangeStopped() {
			t.Error("it is said to be whole")
		}
		if held {
			cut++
			if err := tracker.Seal(cut); err != nil {
				t.Fatal(err) // what begins was seen
			}
			mustName(t, changed(t, tracker, cut-1, cut), touched)
			continue
		}
		tracker.Unheld()
		if settled, _ := tracker.Settled(); settled {
			t.Error("it is said to be settled")
		}
		tracker.Exchange()
		if err := tracker.Seal(cut + 1); !errors.Is(err, ErrUncovered) || !strings.Contains(err.Error(), "12288 bytes") {
			t.Errorf("seal: %v", err)
		}
	}
}

// What a process left that went on without one side is known to the next, and that
// a request began twice makes its count worth nothing.
func TestLostCompletionsAcrossProcesses(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	target := d.target(newPin(t))
	tracker := openBoth(t, target)
	rng := rand.New(rand.NewPCG(5, 9))
	cut := covered(t, tracker, 1)
	miss := func(again bool) map[int64]bool {
		t.Helper()
		tracker.silence(t, 0)
		touched := d.writes(t, rng, unix.O_DIRECT, 3, 4096, 4096)
		tracker.speak(t, 0)
		if again {
			tracker.kernel.memory[nameCounts][slotAgain]++
		}
		if err := tracker.kernel.links[0].Pin(target.Pin + "/" + programsOf(true)[0] + linkSuffix); err != nil {
			t.Fatal(err)
		}
		return touched
	}
	touched := miss(false)
	if err := tracker.Close(); err != nil {
		t.Fatal(err)
	}
	tracker = open(t, target)
	if _, _, ok := tracker.Adopted(); !ok {
		t.Fatal(tracker.Fresh())
	}
	if whole := tracker.ExchangeStopped(); whole {
		t.Error("whole")
	}
	if err := tracker.Seal(cut + 1); err != nil {
		t.Fatal(err)
	}
	mustName(t, changed(t, tracker, cut, cut+1), touched)
	miss(true)
	tracker.ExchangeStopped()
	if err := tracker.Seal(cut + 2); !errors.Is(err, ErrUncovered) {
		t.Errorf("a request that began twice: %v", err)
	}
	covered(t, tracker, cut+3)
	// Without a cut with writers stopped between it is lost for sure, and the next
	// process says so at once.
	tracker.Exchange()
	if err := tracker.Seal(cut + 100); err != nil {
		t.Fatal(err)
	}
	miss(false)
	if err := tracker.Close(); err != nil {
		t.Fatal(err)
	}
	tracker = open(t, target)
	if _, _, ok := tracker.Adopted(); ok || !strings.Contains(tracker.Fresh(), "statistics are ahead") {
		t.Errorf("adopted %v: %s", ok, tracker.Fresh())
	}
}

// busy are writers that write all the time, but while the gate is locked.
type busy struct {
	gate    sync.RWMutex
	end     chan struct{}
	writers sync.WaitGroup
}

func newBusy(t testing.TB, d disk, writers int) *busy {
	b := &busy{end: make(chan struct{})}
	for i := range writers {
		f := d.open(t, unix.O_DIRECT)
		b.writers.Go(func() {
			defer f.Close()
			rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), uint64(i)))
			for {
				select {
				case <-b.end:
					return
				default:
				}
				length := (rng.Int64N(32) + 1) * blockdev.BlockSize
				data := noise(rng, int(length))
				b.gate.RLock()
				_, err := f.WriteAt(data, rng.Int64N((d.size-length)/blockdev.BlockSize)*blockdev.BlockSize)
				b.gate.RUnlock()
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	t.Cleanup(b.stop)
	return b
}

func (b *busy) stop() {
	select {
	case <-b.end:
	default:
		close(b.end)
	}
	b.writers.Wait()
}

// On a disk that is written to all the time, but for the moments of the cuts,
// coverage begins, goes on, and is taken over by another process.
func TestBusyDisk(t *testing.T) {
	for name, newDisk := range map[string]func(testing.TB, int64) disk{"requests": newFastLoop, "bios": newZram} {
		t.Run(name, func(t *testing.T) { checkBusy(t, newDisk(t, 16<<20)) })
	}
}

// The same of a device that BLOCKFERRY_BPF_DEVICE names.
func TestBusyDevice(t *testing.T) {
	text := os.Getenv("BLOCKFERRY_BPF_DEVICE")
	if text == "" {
		t.Skip("no device was named")
	}
	var d disk
	if _, err := fmt.Sscan(text, &d.path, &d.size); err != nil {
		t.Fatal(err)
	}
	checkBusy(t, d)
}

func checkBusy(t *testing.T, d disk) {
	t.Helper()
	b := newBusy(t, d, 4)
	target := d.target(newPin(t))
	tracker := open(t, target)
	var image []uint64
	lost, begun, unseen := 0, uint64(0), 0
	const cuts = 12
	for cut := uint64(1); cut <= cuts; cut++ {
		for range 3 { // rounds
			time.Sleep(5 * time.Millisecond)
			tracker.Exchange()
		}
		if cut == cuts/2 {
			if err := tracker.Close(); err != nil {
				t.Fatal(err)
			}
			tracker = open(t, target)
			if _, last, ok := tracker.Adopted(); !ok || last != cut-1 {
				t.Fatalf("adopted to %d (%v): %s", last, ok, tracker.Fresh())
			}
		}
		b.gate.Lock()
		whole := tracker.ExchangeStopped()
		now := d.sums(t)
		b.gate.Unlock()
		err := tracker.Seal(cut)
		before := image
		image = now
		switch {
		case errors.Is(err, ErrUncovered):
			t.Logf("cut %d: %v", cut, err)
			lost, begun = lost+1, 0
			continue
		case err != nil:
			t.Fatal(err)
		case begun == 0:
			begun = cut
			continue
		}
		if !whole {
			unseen++
		}
		mustName(t, changed(t, tracker, cut-1, cut), differing(before, now))
	}
	t.Logf("%d of %d cuts were not covered, of %d not all were seen to complete", lost, cuts, unseen)
	if lost > cuts/3 {
		t.Error("a busy disk is not followed")
	}
}
