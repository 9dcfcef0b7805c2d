package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
	"blockferry/cmd/blockferry/status"
)

// Promise 2 of a device that is attached while in use: at every cut the replica is
// clean and holds a writer's numbered writes up to one and none after, also of cuts that
// are taken while the file system is trimmed.
func TestAttachedNumberedWrites(t *testing.T) {
	t.Parallel() // else its parts, which are, keep all guests waiting
	for kind, size := range map[string]int64{"ext4": 128 << 20, "xfs": 320 << 20} {
		t.Run(kind, func(t *testing.T) {
			onThisKernel(t)
			cuts := map[string]int{"ext4": 4, "xfs": 2}[kind] // every second one while it is trimmed
			ssd, ebs := blocktest.Loop(t, size), blocktest.Loop(t, 2*size+96<<20)
			dir := blocktest.FileSystem(t, kind, ssd)
			h := history{Seed: 21, Size: 24 << 20, MaxBytes: 1 << 20, Pause: 200 * time.Microsecond}
			path := filepath.Join(dir, "numbered")
			file, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			_, err = file.Write(make([]byte, h.Size))
			if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
				t.Fatal(err)
			}
			c := newCLI(t, fmt.Sprintf(`volumes:
  data:
    device: %s
    mode: attach
    state-file: %s
    interval: 1h
    stall-limit: 30s
    replicas:
      ebs: {device: %s, journal: %d}
`, ssd, filepath.Join(t.TempDir(), "state"), ebs, size+64<<20))
			c.must(t, "attach")
			c.start(t)
			c.await(t, "replicated", time.Minute, func(v status.Volume) bool {
				return v.Up && len(v.Replicas) == 1 && v.Replicas[0].Disk == "UpToDate"
			})
			w := startWriter(t, path, h, 1)
			var k uint64
			for cut := range cuts {
				w.awaitWrites(t, 50)
				trimmed := make(chan error, 1)
				go func() {
					defer close(trimmed)
					if cut%2 == 1 {
						if out, err := tryRun(t, "fstrim", dir); err != nil {
							trimmed <- fmt.Errorf("fstrim: %w\n%s", err, out)
						}
					}
				}()
				t.Cleanup(func() {
					for range trimmed { // until it has ended
					}
				})
				atLeast := w.acked()
				c.syncAndSettle(t, ebs)
				out, err := lookIntoCopy(t, kind, ebs, size, func(copied string) {
					now := judgeDevice(t, filepath.Join(copied, "numbered"), h, atLeast, w.issued())
					if now.Latest < k {
						t.Errorf("cut %d holds write %d, an earlier one held %d", cut, now.Latest, k)
					}
					k = now.K
				})
				if err != nil {
					t.Fatalf("cut %d: %v\n%s", cut, err, out)
				}
				if err := <-trimmed; err != nil {
					t.Error(err)
				}
			}
			if last := w.stop(t); last < uint64(cuts)*50 {
				t.Errorf("only %d writes in %d cuts: that is no load", last, cuts)
			}
			c.syncAndSettle(t, ebs)
			c.must(t, "verify")
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
		})
	}
}
