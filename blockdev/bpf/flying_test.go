package bpf

import (
	"errors"
	"math/rand/v2"
	"testing"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// The kernel uses a bio's memory again, so that one whose completion was lost looks
// as if it completed with another that has its place, of whatever kind. That makes up
// for no loss after the next cut.
func TestLostBioDoesNotHideAnother(t *testing.T) {
	d := newZram(t, 64<<20)
	rng := rand.New(rand.NewPCG(5, 12))
	f := d.open(t, unix.O_DIRECT)
	defer f.Close()
	write := func(offset int64) {
		t.Helper()
		if _, err := f.WriteAt(noise(rng, 4096), offset); err != nil {
			t.Fatal(err)
		}
	}
	// Where a bio lies is up to the kernel: of so many rounds one will do.
	const rounds = 40
	t.Run("that began unseen", func(t *testing.T) {
		tracker := openBoth(t, d.target(newPin(t)))
		cut := covered(t, tracker, 1)
		for round := range int64(rounds) {
			tracker.silence(t, 0)
			write(0) // its end is lost
			tracker.speak(t, 0)
			tracker.ExchangeStopped()
			if cut++; tracker.Seal(cut) != nil {
				cut = covered(t, tracker, cut+1)
				continue
			}
			tracker.silence(t, 1)
			at := (round + 1) * 8 * blockdev.BlockSize
			write(at) // its begin is
			tracker.speak(t, 1)
			tracker.ExchangeStopped()
			cut++
			if err := tracker.Seal(cut); !errors.Is(err, ErrUncovered) {
				t.Fatalf("round %d: what began unseen at %d was sealed (%v): %v", round, at, err, changed(t, tracker, cut-1, cut))
			}
			cut = covered(t, tracker, cut+1)
		}
	})
	t.Run("that ended unseen", func(t *testing.T) {
		tracker := openBoth(t, d.target(newPin(t)))
		cut := covered(t, tracker, 1)
		buffer := blockdev.AlignedBuffer(4096)
		for round := range rounds {
			tracker.silence(t, 0)
			write(0)
			tracker.speak(t, 0)
			tracker.ExchangeStopped()
			if cut++; tracker.Seal(cut) != nil {
				cut = covered(t, tracker, cut+1)
				continue
			}
			if _, err := f.ReadAt(buffer, 8192); err != nil {
				t.Fatal(err)
			}
			tracker.silence(t, 0)
			write(4096)
			tracker.speak(t, 0)
			if tracker.ExchangeStopped() {
				t.Fatalf("round %d: it is said to be whole, and the end of a write was lost", round)
			}
			if cut++; tracker.Seal(cut) != nil {
				cut = covered(t, tracker, cut+1)
			}
		}
	})
}
