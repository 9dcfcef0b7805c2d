package attach

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
)

// A cut stops writers for little longer than a freeze that does nothing, of the
// same file system under the same load, the two in turn.
func TestStallBesideABareFreeze(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		for kind, modes := range map[string][]bool{"ext4": {true}, "xfs": {false}} {
			for _, direct := range modes {
				t.Run(fmt.Sprintf("%s direct=%v", kind, direct), func(t *testing.T) {
					r := newRig(t, 320<<20)
					dir := blocktest.FileSystem(t, kind, r.device)
					a := r.open()
					w := startWriters(t, dir, direct, time.Millisecond)
					w.await(100)
					last := r.base(a)
					var bare, cut, gapBare, gapCut []time.Duration
					gap := func(f func()) time.Duration {
						for _, f := range w.list {
							f.gap.Store(0)
						}
						f()
						w.await(3)
						longest := int64(0)
						for _, f := range w.list {
							longest = max(longest, f.gap.Load())
						}
						return time.Duration(longest)
					}
					for range 9 {
						w.await(50)
						blocktest.Command(t, "sync", "-f", dir)
						gapBare = append(gapBare, gap(func() {
							start := time.Now()
							if err := blocktest.Freeze(dir); err != nil {
								t.Fatal(err)
							}
							if err := blocktest.Thaw(dir); err != nil {
								t.Fatal(err)
							}
							bare = append(bare, time.Since(start))
						}))
						w.await(50)
						gapCut = append(gapCut, gap(func() {
							c := r.mustCut(a, last)
							cut = append(cut, c.Stalled())
							last = c.Number()
							c.Release()
						}))
					}
					middle := func(list []time.Duration) time.Duration {
						slices.Sort(list)
						return list[len(list)/2]
					}
					t.Logf("stopped: bare %s (max %s), cut %s (max %s), ratio %.2f; writers' longest gap: bare %s (max %s), cut %s (max %s), ratio %.2f",
						middle(bare), bare[len(bare)-1], middle(cut), cut[len(cut)-1], float64(middle(cut))/float64(middle(bare)),
						middle(gapBare), gapBare[len(gapBare)-1], middle(gapCut), gapCut[len(gapCut)-1], float64(middle(gapCut))/float64(middle(gapBare)))
					// The machine may be busy with others: room beyond the aim of 1.3.
					if middle(cut) > 3*middle(bare)+20*time.Millisecond {
						t.Errorf("stopped for %s, a bare freeze for %s", middle(cut), middle(bare))
					}
				})
			}
		}
	})
}
