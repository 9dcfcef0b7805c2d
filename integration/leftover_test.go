package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// An agent that was killed while it built the stack, or took it down, leaves
// inner devices without the one that applications open. The next agent comes
// up all the same.
func TestStackLeftInPart(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 400 << 20}, {Size: 400 << 20}}, Timeout: 3 * time.Minute}, func(t *testing.T) {
		c := newCLI(t, oneReplica(ubd(0), ubd(1)))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 21, Size: sectors(t, v.Path) * 512, MaxBytes: 64 << 10, Span: 24 << 20}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 50)
		last := w.stop(t)
		c.kill(t)
		run(t, "dmsetup", "remove", "data") // the first step of a down
		c.start(t)
		c.await(t, "up again", 30*time.Second, upToDate)
		judgeDevice(t, v.Path, h, last, last)
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "verify")
		content := c.logText(t)
		if full, compared := plans(content, "full"), plans(content, "compare"); full != 1 || compared != 0 {
			t.Errorf("track was lost: %d full copies, %d comparisons", full, compared)
		}
		c.must(t, "down")
	})
}

// A device that was left suspended is resumed whatever else is wrong: here the
// disk's path is gone from the configuration's place.
func TestSuspendedWithItsPathGone(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 400 << 20}, {Size: 400 << 20}}, Timeout: 3 * time.Minute}, func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "ssd")
		if err := os.Symlink(ubd(0), link); err != nil {
			t.Fatal(err)
		}
		c := newCLI(t, oneReplica(link, ubd(1)))
		c.must(t, "create")
		c.start(t)
		c.await(t, "up to date", time.Minute, upToDate)
		c.kill(t)
		run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "data")
		if err := os.Remove(link); err != nil {
			t.Fatal(err)
		}
		c.start(t)
		c.await(t, "refused", 30*time.Second, func(v status.Volume) bool { return !v.Up && strings.Contains(v.Reason, link) })
		if info := run(t, "dmsetup", "info", "data"); !strings.Contains(info, "ACTIVE") {
			t.Errorf("the application still waits:\n%s", info)
			run(t, "dmsetup", "resume", "data")
		}
		c.must(t, "down", "--force")
	})
}

// The stack of a disk that went away and came back under another number can
// be taken down with the tool that says 'take the volume down'.
func TestStackOfAnotherDisk(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 400 << 20}, {Size: 400 << 20}, {Size: 400 << 20}}, Timeout: 3 * time.Minute}, func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "ssd")
		if err := os.Symlink(ubd(0), link); err != nil {
			t.Fatal(err)
		}
		c := newCLI(t, oneReplica(link, ubd(1)))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		c.kill(t)
		run(t, "dd", "if="+ubd(0), "of="+ubd(2), "bs=1M")
		if err := os.Remove(link); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(ubd(2), link); err != nil {
			t.Fatal(err)
		}
		c.start(t)
		c.await(t, "refused", 30*time.Second, func(v status.Volume) bool { return !v.Up && strings.Contains(v.Reason, "take the volume down") })
		holder, err := os.Open(v.Path)
		if err != nil {
			t.Fatal(err)
		}
		c.refused(t, 3, []string{"in use"}, "down", "--force")
		holder.Close()
		c.refused(t, 3, []string{"--force"}, "down")
		c.must(t, "down", "--force")
		c.must(t, "up")
		c.await(t, "up to date", time.Minute, upToDate)
		c.must(t, "verify")
		c.must(t, "down")
	})
}

// A restore begun from a replica that has another name now can be ended.
func TestRestoreFromRenamedReplica(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 400 << 20}, {Size: 400 << 20}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		ssd, ebs := ubd(0), ubd(1)
		c := newCLI(t, oneReplica(ssd, ebs))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 23, Size: sectors(t, v.Path) * 512, MaxBytes: 1 << 20}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 200)
		last := w.stop(t)
		c.must(t, "down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		zeroDisk(t, ssd)
		c.start(t)
		c.await(t, "known to be blank", time.Minute, func(v status.Volume) bool { return v.Disk == "Diskless" })
		c.killInRestore(t)
		renamed := newCLI(t, strings.Replace(oneReplica(ssd, ebs), "ebs:", "durable:", 1))
		renamed.start(t)
		renamed.await(t, "known to be half restored", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Reason, "did not end") })
		renamed.must(t, "restore") // as the advice says
		renamed.await(t, "up to date", time.Minute, upToDate)
		judgeDevice(t, v.Path, h, last, last)
		renamed.must(t, "down")
	})
}
