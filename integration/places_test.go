package integration

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
)

// partition divides a disk into n equal primary partitions, whose paths it returns.
func partition(t *testing.T, disk string, n int) []string {
	t.Helper()
	const start = 2048
	each := (sectors(t, disk) - start) / int64(n) / start * start
	table := make([]byte, sector)
	copy(table[510:], "\x55\xaa")
	var paths []string
	for i := range n {
		entry := table[446+16*i:]
		entry[4] = 0x83
		binary.LittleEndian.PutUint32(entry[8:], uint32(start+int64(i)*each))
		binary.LittleEndian.PutUint32(entry[12:], uint32(each))
		paths = append(paths, fmt.Sprintf("%s%d", disk, i+1))
	}
	f, err := os.OpenFile(disk, os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(table, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.BLKRRPART, 0); err != nil {
		t.Fatalf("partitions of %s: %v", disk, err)
	}
	for _, p := range paths {
		awaitFile(t, p)
	}
	return paths
}

// Two replicas on partitions of one disk, which want one spill file by two
// names: check refuses that, and the agent lets only one of them have it.
func TestReplicasOnPartitions(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}, {Size: 260 << 20}, {Size: 96 << 20}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		parts := partition(t, ubd(1), 2)
		mkfs(t, "ext4", ubd(2))
		dir := mustMount(t, "ext4", ubd(2), "")
		link := filepath.Join(t.TempDir(), "link")
		if err := os.Symlink(dir, link); err != nil {
			t.Fatal(err)
		}
		yaml := func(one, two string) string {
			return fmt.Sprintf("volumes:\n  data:\n    device: %s\n    interval: 500ms\n    replicas:\n      one:\n        device: %s\n        journal: 16MiB\n        spill: %s/spill\n"+
				"      two:\n        device: %s\n        journal: 16MiB\n        spill: %s/spill\n", ubd(0), one, dir, two, link)
		}
		newCLI(t, yaml(ubd(1), parts[1])).refused(t, 3, []string{parts[1], "is the same disk as " + ubd(1)}, "create")
		c := newCLI(t, yaml(parts[0], parts[1]))
		c.must(t, "create")
		out, _, code := c.try(t, "check")
		if want := "the spill file of replica 'two' of volume 'data' is the same file as " + dir + "/spill, that of replica 'one'"; code != 3 || !strings.Contains(out, want) {
			t.Errorf("check of one spill file for two: exit code %d, '%s' is missing in:\n%s", code, want, out)
		}
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		said := 0
		for _, r := range v.Replicas {
			if strings.Contains(r.Reason, "spill") {
				said++
			}
		}
		if said != 1 {
			t.Errorf("%d replicas say that the spill file is another's: %+v", said, v.Replicas)
		}
		h := history{Seed: 51, Size: sectors(t, v.Path) * 512, MaxBytes: 256 << 10}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 100)
		last := w.stop(t)
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "verify")
		c.must(t, "down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		for _, p := range parts {
			if out, errs, code := c.try(t, "recover", "--spill", filepath.Join(dir, "spill"), p); code != 0 {
				t.Errorf("recover %s: %s%s", p, out, errs)
			}
			judgeDevice(t, p, h, last, last)
		}
		// A replica's disk that is mounted, for the spill file to be on it, is not served.
		mkfs(t, "ext4", parts[1])
		own := mustMount(t, "ext4", parts[1], "")
		c = newCLI(t, strings.Replace(yaml(parts[0], parts[1]), link+"/spill", own+"/spill", 1))
		c.start(t)
		c.await(t, "refused", 30*time.Second, func(v status.Volume) bool {
			return strings.Contains(v.Replicas[1].Reason, "mounted on "+own) && v.Replicas[0].Disk == "UpToDate"
		})
		if _, err := os.Stat(own + "/spill"); err == nil {
			t.Error("a spill file was made on the replica's own disk")
		}
		if out, _, code := c.try(t, "check"); code != 3 || !strings.Contains(out, "refuse "+parts[1]) {
			t.Errorf("check, a replica's disk mounted: exit code %d\n%s", code, out)
		}
		c.must(t, "down", "--force")
	})
}

// No decision reads a wall clock: when it jumps, by an hour or back by three, cuts,
// lags and limits go on as before.
func TestClockJumps(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}, {Size: 128 << 20}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		c := newCLI(t, oneReplica(ubd(0), ubd(1)))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 52, Size: sectors(t, v.Path) * 512, MaxBytes: 64 << 10, Span: 16 << 20, Pause: 5 * time.Millisecond}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 50)
		for _, jump := range []time.Duration{time.Hour, -3 * time.Hour} {
			before := c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Position != nil && v.Replicas[0].BehindSeconds != nil })
			now := unix.NsecToTimeval(time.Now().Add(jump).UnixNano())
			if err := unix.Settimeofday(&now); err != nil {
				t.Fatal(err)
			}
			worst := 0.0
			c.await(t, fmt.Sprintf("three epochs further after a jump of %v", jump), 40*time.Second, func(v status.Volume) bool {
				if s := v.Replicas[0].BehindSeconds; s != nil {
					worst = max(worst, *s)
				}
				p := v.Replicas[0].Position
				return p != nil && p.Generation == before.Position.Generation && p.Epoch >= before.Position.Epoch+3
			})
			if worst > 60 {
				t.Errorf("after a jump of %v the replica was said to be %.0f s behind", jump, worst)
			}
			c.must(t, "sync", "--timeout", "60s")
		}
		last := w.stop(t)
		c.must(t, "verify")
		if out := c.must(t, "down"); !strings.Contains(out, "cleanly") {
			t.Errorf("down: %s", out)
		}
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		if log := c.logText(t); strings.Contains(log, "void") {
			t.Error("an epoch was void")
		}
		c.must(t, "recover", ubd(1))
		judgeDevice(t, ubd(1), h, last, last)
	})
}
