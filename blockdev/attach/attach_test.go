package attach

import (
	"fmt"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
)

// The image of a cut, taken while files are written to, mounts and holds of each
// writer all up to some write and nothing after, and no less than was
// acknowledged before the cut.
func TestCutIsOneMoment(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		for _, kind := range []string{"ext4", "xfs"} {
			for _, direct := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s direct=%v", kind, direct), func(t *testing.T) {
					r := newRig(t, 320<<20)
					dir := blocktest.FileSystem(t, kind, r.device)
					a := r.open()
					w := startWriters(t, dir, direct, 200*time.Microsecond)
					w.await(500)
					i := r.newImage(a)
					for range 3 {
						w.await(300)
						before := w.acked()
						c := r.mustCut(a, i.at)
						after := w.acked()
						s := a.Stats()
						t.Logf("stalled %s, %d rounds (%d bytes), %d bytes inside", c.Stalled(), s.Rounds, s.RoundBytes, s.InsideBytes)
						w.await(100)
						i.apply(c)
						i.mounted(kind, func(dir string) { w.judge(dir, before, after) })
					}
					w.stop()
				})
			}
		}
	})
}

// The same on a disk without requests that is written to all the time: when it is
// attached, by the first process and by the next, and at every cut.
func TestBusyDiskWithoutRequests(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		r := newRigOn(t, blocktest.Zram(t, 160<<20))
		dir := blocktest.FileSystem(t, "ext4", r.device)
		w := startWriters(t, dir, true, 0)
		w.await(500)
		a := r.open()
		i := r.newImage(a)
		if s := a.Stats(); s.LongestStall == 0 {
			t.Error("the first cut stopped nobody: it knows nothing of such a disk")
		}
		for round := range 4 {
			if round == 2 {
				a.tracker.Exchange() // and it ends: what it took is known only with all that is kept
				if err := a.Close(); err != nil {
					t.Fatal(err)
				}
				if a = r.open(); a.TrackingLost() != "" {
					t.Fatal(a.TrackingLost())
				}
			}
			w.await(300)
			before := w.acked()
			c := r.mustCut(a, i.at)
			after := w.acked()
			if exact := c.ChangedExact(i.at); exact != (round != 2) {
				t.Errorf("round %d: the answer is said to be exact: %v", round, exact)
			}
			w.await(100)
			i.apply(c)
			i.mounted("ext4", func(dir string) { w.judge(dir, before, after) })
		}
		w.stop()
	})
}
