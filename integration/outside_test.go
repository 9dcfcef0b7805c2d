package integration

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// With the SSD lost, a replica that was mounted elsewhere (a mount alone
// replays the file system's log) is still the only copy: it is restored from on
// the operator's word, and not without it.
func TestRestoreFromReplicaMountedElsewhere(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 300 << 20}}, Timeout: 3 * time.Minute}, func(t *testing.T) {
		c := newCLI(t, oneReplica(ubd(0), ubd(1)))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		mkfs(t, "ext4", v.Path)
		dir := mustMount(t, "ext4", v.Path, "")
		if err := os.WriteFile(dir+"/before", []byte("before"), 0o600); err != nil {
			t.Fatal(err)
		}
		mustUnmount(t, dir)
		c.must(t, "sync")
		c.must(t, "down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		zeroDisk(t, ubd(0))
		c.must(t, "recover", ubd(1))
		dir = mustMount(t, "ext4", ubd(1), "")
		if err := os.WriteFile(dir+"/elsewhere", []byte("elsewhere"), 0o600); err != nil {
			t.Fatal(err)
		}
		mustUnmount(t, dir)

		c.refused(t, 3, []string{"written to by something else", "--accept-changes"}, "recover", ubd(1))
		c.start(t)
		c.await(t, "without a copy to restore from", time.Minute, func(v status.Volume) bool {
			return v.Disk == "Diskless" && len(v.Replicas) == 1 && v.Replicas[0].Disk == "Inconsistent"
		})
		c.refused(t, 3, nil, "restore")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		c.must(t, "recover", "--accept-changes", ubd(1))
		c.start(t)
		c.await(t, "blank", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Advice, "restore") })
		c.must(t, "restore")
		c.await(t, "up to date again", time.Minute, upToDate)
		dir = mustMount(t, "ext4", v.Path, "")
		for _, name := range []string{"before", "elsewhere"} {
			if content, err := os.ReadFile(dir + "/" + name); err != nil || string(content) != name {
				t.Errorf("%s: %q, %v", name, content, err)
			}
		}
		mustUnmount(t, dir)
		c.must(t, "sync")
		c.must(t, "verify")
		c.must(t, "down")
	})
}
