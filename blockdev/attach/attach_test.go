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
