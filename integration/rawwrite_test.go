package integration

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
)

// Rule 8: a rescue system that mounts the SSD at its offset while the volume is
// down changes it without a mark. That is noticed at the next start: the
// replica is compared in full and ends up equal, in a new generation.
func TestIdentityRawWriteIsNoticed(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 640 << 20}, {Size: 640 << 20}}, Modules: []string{"loop"}, Timeout: 5 * time.Minute}, func(t *testing.T) {
		for _, kind := range []string{"ext4", "xfs"} {
			ssd, ebs := ubd(0), ubd(1)
			c := newCLI(t, strings.Replace(oneReplica(ssd, ebs), "    interval:", "    size: 320MiB\n    interval:", 1))
			c.must(t, "create", "--discard-my-data")
			c.start(t)
			v := c.await(t, "up to date", time.Minute, upToDate)
			mkfs(t, kind, v.Path)
			c.must(t, "down")
			// An ordinary stop and start notices nothing.
			c.must(t, "up")
			v = c.await(t, "up to date", time.Minute, upToDate)
			dir := mustMount(t, kind, v.Path, "")
			if err := os.WriteFile(dir+"/inside", []byte("inside"), 0o600); err != nil {
				t.Fatal(err)
			}
			mustUnmount(t, dir)
			c.must(t, "down")
			c.must(t, "up")
			v = c.await(t, "up to date", time.Minute, upToDate)
			log := c.logText(t)
			if strings.Contains(log, "changed outside") || plans(log, "compare") > 0 {
				t.Errorf("%s: a volume that only its own writers wrote to counts as changed outside", kind)
			}
			c.must(t, "down")

			disk, err := blockdev.OpenFile(ssd, blockdev.OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			label, err := volume.ReadLabel(disk)
			disk.Close()
			if err != nil {
				t.Fatal(err)
			}
			loop := strings.TrimSpace(run(t, "losetup", "--find", "--show", "--offset", strconv.FormatInt(label.Areas.Data.Offset, 10),
				"--sizelimit", strconv.FormatInt(label.Areas.Data.Length, 10), ssd))
			dir = mustMount(t, kind, loop, "")
			if err := os.WriteFile(dir+"/past", []byte(strings.Repeat("past it", 100_000)), 0o600); err != nil {
				t.Fatal(err)
			}
			mustUnmount(t, dir)
			run(t, "losetup", "--detach", loop)

			c.must(t, "up")
			again := c.await(t, "up to date", time.Minute, upToDate)
			if again.Position.Generation == v.Position.Generation {
				t.Errorf("%s: the generation goes on", kind)
			}
			c.must(t, "sync", "--timeout", "60s")
			c.must(t, "verify")
			log = c.logText(t)
			if !strings.Contains(log, "changed outside") || plans(log, "compare") != 1 {
				t.Errorf("%s: %d comparisons; nothing was noticed", kind, plans(log, "compare"))
			}
			c.must(t, "down")
			c.kill(t)
			c.must(t, "recover", ebs)
			dir = mustMount(t, kind, ebs, "")
			for _, name := range []string{"inside", "past"} {
				if _, err := os.Stat(dir + "/" + name); err != nil {
					t.Errorf("%s: on the replica: %v", kind, err)
				}
			}
			mustUnmount(t, dir)
			fsck(t, kind, ebs)
		}
	})
}
