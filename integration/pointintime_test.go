package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

const (
	// cutsProven is how many points in time each of these tests looks at.
	cutsProven = 50
	// writerPause leaves the agent some of a guest's only CPU.
	writerPause = 5 * time.Millisecond
	// An odd volume: no multiple of 4 MiB, nor of era's blocks.
	oddVolumeBytes = 37<<20 + 3*4096
)

// onlyOnSync is a configuration under which nothing but `sync` takes a cut, so
// that a replica stands still while it is looked at.
// The areas are as large as the volume: a writer that overwrites all of it while
// one epoch is read must not void it.
func onlyOnSync(ssd, ebs string, size int64) string {
	return fmt.Sprintf("volumes:\n  data:\n    device: %s\n    size: %d\n    interval: 1h\n    cow: %d\n    replicas:\n      ebs:\n        device: %s\n        journal: %d\n", ssd, size, size+(8<<20), ebs, size+(32<<20))
}

// syncAndSettle takes a cut and returns when the replica's data area holds it.
func (c *cli) syncAndSettle(t *testing.T, replica string) {
	t.Helper()
	if _, errs, code := c.try(t, "sync", "--timeout", "60s"); code != 0 {
		t.Fatalf("sync: exit code %d: %s", code, errs)
	}
	device, err := blockdev.OpenFile(replica, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	var s protocol.ReplicaStatus
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if s, err = protocol.PeekReplica(device); err == nil && s.State == protocol.DiskConsistent && s.Applied == s.Committed {
			return
		}
	}
	t.Fatalf("%s is not settled: %+v, %v", replica, s, err)
}

// Promise 2: a replica holds exactly one point in time. A writer numbers its
// writes, each acknowledged before the next is issued; at every cut the
// replica's data area must hold all up to some number and none after.
func TestPointInTimeNumberedWrites(t *testing.T) {
	disks := []disk{{Size: pointInTimeDisk}, {Size: pointInTimeDisk}}
	inGuest(t, guest{Disks: disks, Timeout: 12 * time.Minute}, func(t *testing.T) { checkNumberedWrites(t, ubd(0), ubd(1), cutsProven, "snapshot") })
}

const pointInTimeDisk = 200 << 20

func checkNumberedWrites(t *testing.T, ssd, ebs string, cuts int, image string) {
	c := newCLI(t, strings.Replace(onlyOnSync(ssd, ebs, oddVolumeBytes), "    cow:", "    image: "+image+"\n    cow:", 1))
	wipe(t, ssd, pointInTimeDisk) // what another history left would be taken for this one's
	c.must(t, "create", "--discard-my-data")
	c.start(t)
	v := c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
	h := history{Seed: 2, Size: sectors(t, v.Path) * sector, Pause: 2 * time.Millisecond}
	if h.Size != oddVolumeBytes {
		t.Fatalf("the volume has %d bytes, want %d", h.Size, oddVolumeBytes)
	}
	w := startWriter(t, v.Path, h, 1)
	w.awaitWrites(t, 50)
	var k uint64
	for cut := range cuts {
		atLeast := w.acked()
		c.syncAndSettle(t, ebs)
		now := judgeDevice(t, ebs, h, atLeast, w.issued())
		if now.Partial {
			// The one write in progress may be cut between its bios; the
			// drain before a cut makes even that impossible for O_DIRECT.
			t.Logf("cut %d: write %d was in progress", cut, now.K+1)
		}
		if now.Latest < k {
			t.Fatalf("cut %d holds write %d, an earlier one held %d", cut, now.Latest, k)
		}
		k = now.K
	}
	last := w.stop(t)
	t.Logf("%d cuts, %d writes", cuts, last)
	if last < uint64(cuts)*10 {
		t.Errorf("only %d writes in %d cuts: that is no load", last, cuts)
	}
	c.syncAndSettle(t, ebs)
	judgeDevice(t, ebs, h, last, last)
	c.must(t, "verify")
	c.must(t, "down")
	if n := strings.Count(c.logText(t), `msg="read into memory"`); (n > cuts/2) != (image == "pre-copy") {
		t.Errorf("image: %s, and of some %d cuts %d were read into memory", image, cuts, n)
	}
}

// Promise 2 again, as a file system sees it: at every cut a copy of the
// replica mounts, and is clean.
func TestPointInTimeFilesystems(t *testing.T) {
	t.Parallel()
	// Again no round sizes; xfs takes nothing smaller.
	for kind, size := range map[string]int64{"ext4": 101<<20 + 4096, "xfs": 301<<20 + 4096} {
		t.Run(kind, func(t *testing.T) {
			inGuest(t, guest{Memory: "1800M", Disks: []disk{{Size: 1000 << 20}, {Size: 1000 << 20}}, Modules: []string{"loop"}, Timeout: 15 * time.Minute}, func(t *testing.T) {
				c := newCLI(t, onlyOnSync(ubd(0), ubd(1), size))
				c.must(t, "create")
				c.start(t)
				v := c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
				mkfs(t, kind, v.Path)
				dir := mustMount(t, kind, v.Path, "")
				stop, stopped := make(chan struct{}), make(chan error, 2)
				go func() { stopped <- churn(dir, stop, writerPause) }()
				go func() { stopped <- overwrite(dir+"/mixed", stop) }()
				for cut := range cutsProven {
					c.syncAndSettle(t, ubd(1))
					if out, err := checkCopy(t, kind, ubd(1), size); err != nil {
						t.Fatalf("cut %d: %v\n%s", cut, err, out)
					}
				}
				close(stop)
				for range 2 {
					if err := <-stopped; err != nil && !strings.Contains(err.Error(), "no space left") {
						t.Fatal(err)
					}
				}
				mustUnmount(t, dir)
				c.must(t, "down")
			})
		})
	}
}

// overwrite writes pieces of 512 B to 4 MiB to random places of a file of
// 64 MiB, and makes some durable, until stopped.
func overwrite(path string, stop chan struct{}) error { return overwriteIn(path, 64<<20, stop) }

func overwriteIn(path string, size int64, stop chan struct{}) error {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	h := history{Seed: 9, Size: size}
	buffer := make([]byte, maxWriteBytes)
	for k := uint64(1); ; k++ {
		select {
		case <-stop:
			return nil
		default:
		}
		op := h.op(k)
		h.fill(buffer, k, op)
		if _, err := file.WriteAt(buffer[:op.Length], op.Offset); err != nil {
			return err
		}
		time.Sleep(writerPause)
		if k%8 == 0 {
			if err := unix.Fdatasync(int(file.Fd())); err != nil {
				return err
			}
		}
	}
}
