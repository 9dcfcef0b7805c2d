package integration

import (
	"bytes"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// A volume grows, and its file system after it: what is on it stays, its replica follows, and is
// what the volume is, to the last block.
func TestResize(t *testing.T) {
	inGuest(t, guest{Memory: "1000M", Disks: []disk{{Size: 400 << 20}, {Size: 400 << 20}}, Modules: []string{"loop"}, Timeout: 3 * time.Minute}, func(t *testing.T) {
		ssd, ebs := ubd(0), ubd(1)
		config := func(size string) []byte {
			return fmt.Appendf(nil, "volumes:\n  data:\n    device: %s\n    size: %s\n    interval: 500ms\n    replicas:\n      ebs:\n        device: %s\n", ssd, size, ebs)
		}
		c := newCLI(t, string(config("64MiB")))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		mkfs(t, "ext4", v.Path)
		dir := mustMount(t, "ext4", v.Path, "")
		kept := bytes.Repeat([]byte("kept "), 2<<20)
		if err := os.WriteFile(dir+"/kept", kept, 0o600); err != nil {
			t.Fatal(err)
		}
		mustUnmount(t, dir)
		c.refused(t, 3, []string{"the volume has to be down"}, "resize")
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		for _, size := range []string{"1GiB", "150MiB"} {
			if err := os.WriteFile(c.config, config(size), 0o600); err != nil {
				t.Fatal(err)
			}
			if size == "1GiB" {
				c.refused(t, 3, []string{ssd, "needs a disk of"}, "resize")
			}
		}
		c.must(t, "resize")
		c.must(t, "resize")
		before := len(c.logText(t))
		c.start(t)
		v = c.await(t, "up to date and larger", time.Minute, func(v status.Volume) bool { return upToDate(v) && v.SizeBytes == 150<<20 })
		if got := sectors(t, v.Path) * sector; got != 150<<20 {
			t.Fatalf("%s has %d bytes", v.Path, got)
		}
		dir = mustMount(t, "ext4", v.Path, "")
		run(t, "resize2fs", v.Path)
		if err := os.WriteFile(dir+"/more", bytes.Repeat([]byte("more "), 12<<20), 0o600); err != nil { // than there was room for
			t.Fatal(err)
		}
		if got, err := os.ReadFile(dir + "/kept"); err != nil || !bytes.Equal(got, kept) {
			t.Errorf("what was kept is another (%v)", err)
		}
		mustUnmount(t, dir)
		c.syncAndSettle(t, ebs)
		if out, err := checkCopy(t, "ext4", ebs, 150<<20); err != nil {
			t.Errorf("the replica: %v\n%s", err, out)
		}
		c.must(t, "verify")
		if n := plans(c.logText(t)[before:], "full"); n > 0 {
			t.Errorf("%d full copies", n)
		}
		c.must(t, "down")
	})
}
