package integration

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// A replica's disk may be away, fail, and come back: the volume and the other
// replica go on, status says why it is behind and what to do, and what it
// missed is sent without a full copy.
func TestReplicaComesAndGoes(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 300 << 20}, {Size: 300 << 20}}, Timeout: 5 * time.Minute}, func(t *testing.T) {
		table := fmt.Sprintf("0 %d linear %s 0", sectors(t, ubd(2)), ubd(2))
		broken := fmt.Sprintf("0 %d error", sectors(t, ubd(2)))
		late := dmCreate(t, "late", table)
		c := newCLI(t, oneReplica(ubd(0), ubd(1))+"      two:\n        device: "+late+"\n        compression: zstd\n")
		c.must(t, "create")
		run(t, "dmsetup", "remove", "late")
		c.start(t)
		replica := func(v status.Volume, name string) status.Replica {
			for _, r := range v.Replicas {
				if r.Name == name {
					return r
				}
			}
			t.Fatalf("no replica %s in %+v", name, v)
			return status.Replica{}
		}
		v := c.await(t, "replicated to the one that is there", time.Minute, func(v status.Volume) bool {
			return v.Up && replica(v, "ebs").Disk == "UpToDate" && replica(v, "two").Advice != ""
		})
		if two := replica(v, "two"); !strings.Contains(two.Reason, "/dev/mapper/late") || !strings.Contains(two.Advice, "attach the disk") || two.Disk != "DUnknown" {
			t.Errorf("a replica that is away: %+v", two)
		}
		h := history{Seed: 14, Size: sectors(t, v.Path) * 512, MaxBytes: 64 << 10, Span: 16 << 20}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 100)
		c.refused(t, 6, []string{"two"}, "sync", "--timeout", "3s")
		c.refused(t, 3, []string{"in use"}, "down")

		run(t, "dmsetup", "create", "late", "--table", table)
		c.await(t, "up to date on both", 2*time.Minute, func(v status.Volume) bool {
			return replica(v, "two").Position != nil && replica(v, "two").Connection == "Connected"
		})
		c.must(t, "sync", "--timeout", "60s")

		dmSwap(t, "late", broken)
		v = c.await(t, "aware of the broken disk", time.Minute, func(v status.Volume) bool {
			return replica(v, "two").Connection != "Connected" && replica(v, "two").Reason != ""
		})
		if v.Role != "Primary" || !v.Up {
			t.Errorf("a broken replica took the volume with it: %+v", v)
		}
		w.awaitWrites(t, 100)
		epoch := replica(v, "ebs").Position.Epoch
		c.await(t, "going on to the other replica", time.Minute, func(v status.Volume) bool {
			return replica(v, "ebs").Position.Epoch > epoch+1
		})
		dmSwap(t, "late", table)
		c.await(t, "connected again", 2*time.Minute, func(v status.Volume) bool { return replica(v, "two").Connection == "Connected" })
		last := w.stop(t)
		out := c.must(t, "sync", "--timeout", "90s")
		if !strings.Contains(out, "ebs") || !strings.Contains(out, "two") {
			t.Errorf("sync: %s", out)
		}
		c.must(t, "verify")

		// A new disk in its place: formatted alone, while the volume is up.
		dmSwap(t, "late", broken)
		w = startWriter(t, v.Path, h, last+1)
		c.await(t, "aware that the disk is lost", time.Minute, func(v status.Volume) bool { return replica(v, "two").Connection != "Connected" })
		zeroDisk(t, ubd(2))
		dmSwap(t, "late", table)
		c.await(t, "told to format the new disk", time.Minute, func(v status.Volume) bool {
			return strings.Contains(replica(v, "two").Advice, "create --replica two data")
		})
		c.refused(t, 3, []string{"in use"}, "create", "--replica", "ebs", "--discard-my-data")
		c.must(t, "create", "--replica", "two")
		c.await(t, "up to date on the new disk", 2*time.Minute, func(v status.Volume) bool { return replica(v, "two").Connection == "Connected" })
		w.awaitWrites(t, 20)
		last = w.stop(t)
		c.must(t, "sync", "--timeout", "90s")
		c.refused(t, 3, []string{"holds a replica", "--discard-my-data"}, "create", "--replica", "two")
		c.must(t, "down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		for _, d := range []string{ubd(1), late} {
			c.must(t, "recover", d)
			judgeDevice(t, d, h, last, last)
		}
	})
}

// The SSD is lost while the volume is up, and its machine lives on: the volume
// goes down by force, soon, and is restored onto the disk that comes in its place.
func TestDiskLostWhileUp(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 300 << 20}}, Timeout: 5 * time.Minute}, func(t *testing.T) {
		table := fmt.Sprintf("0 %d linear %s 0", sectors(t, ubd(0)), ubd(0))
		ssd := dmCreate(t, "ssd", table)
		c := newCLI(t, oneReplica(ssd, ubd(1)))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 15, Size: sectors(t, v.Path) * 512, MaxBytes: 64 << 10, Span: 16 << 20}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 200)
		synced := w.acked()
		c.must(t, "sync")
		w.awaitWrites(t, 20)
		dmSwap(t, "ssd", fmt.Sprintf("0 %d error", sectors(t, ubd(0))))
		<-w.done // its writes fail: they do not hang
		if w.err == nil {
			t.Fatal("the writer saw no error")
		}
		issued := w.issued()
		begun := time.Now()
		c.refused(t, 3, nil, "restore") // it is up
		c.must(t, "down", "--force")
		if took := time.Since(begun); took > 30*time.Second {
			t.Errorf("down --force took %v", took)
		}
		if _, err := os.Stat(v.Path); err == nil {
			t.Errorf("%s is still there", v.Path)
		}
		zeroDisk(t, ubd(0))
		dmSwap(t, "ssd", table)
		if out := c.must(t, "restore"); !strings.Contains(out, "epoch") {
			t.Errorf("restore names no epoch: %s", out)
		}
		v = c.await(t, "up to date again", time.Minute, upToDate)
		judgeDevice(t, v.Path, h, synced, issued)
		c.must(t, "sync")
		c.must(t, "verify")
		c.must(t, "down")
	})
}

// Promise 5: an SSD that was away while the volume lived on elsewhere does not
// become writable again behind the replica's back.
func TestStaleDiskIsRefused(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 300 << 20}, {Size: 300 << 20}}, Timeout: 5 * time.Minute}, func(t *testing.T) {
		on := func(disk string) string { return fmt.Sprintf("0 %d linear %s 0", sectors(t, disk), disk) }
		old, fresh := ubd(0), ubd(2)
		ssd := dmCreate(t, "ssd", on(old))
		c := newCLI(t, oneReplica(ssd, ubd(1)))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 16, Size: sectors(t, v.Path) * 512, MaxBytes: 64 << 10, Span: 16 << 20}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 100)
		k := w.stop(t)
		c.must(t, "sync")
		dmSwap(t, "ssd", fmt.Sprintf("0 %d error", sectors(t, old)))
		c.must(t, "down", "--force")
		dmSwap(t, "ssd", on(fresh))
		c.must(t, "restore")
		w = startWriter(t, v.Path, h, k+1)
		w.awaitWrites(t, 100)
		k = w.stop(t)
		c.must(t, "sync")
		c.must(t, "down")

		dmSwap(t, "ssd", on(old))
		before := digest(t, old)
		c.refused(t, 3, []string{"out of date", "ebs"}, "up")
		v = c.await(t, "refused, with what to do", time.Minute, func(v status.Volume) bool {
			return !v.Up && strings.Contains(v.Advice, "restore --force --from ebs")
		})
		if digest(t, old) != before {
			t.Error("the stale disk was written to")
		}
		c.must(t, "restore", "--force", "--from", "ebs")
		v = c.await(t, "up to date from the replica", time.Minute, upToDate)
		judgeDevice(t, v.Path, h, k, k)
		c.must(t, "down")
	})
}
