package integration

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/status"
)

// drain with a replica that is too slow for what is written: it prints where
// it stands, and at its limit what is lost. With a replica that follows it
// ends, the application running all the while, and takes the volume down only
// once that is gone.
func TestBootDrain(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 300 << 20}}, Modules: []string{"dm-delay"}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		size := sectors(t, ubd(1))
		table := func(ms int) string { return fmt.Sprintf("0 %d delay %s 0 0 %[2]s 0 %d", size, ubd(1), ms) }
		slow := dmCreate(t, "slow", table(0))
		c := newCLI(t, oneReplica(ubd(0), slow))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 21, Size: sectors(t, v.Path) * 512, MaxBytes: 64 << 10, Span: 32 << 20, Pause: 2 * time.Millisecond}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 100)

		dmSwap(t, "slow", table(4000))
		w.awaitWrites(t, 100)
		began := time.Now()
		out, errs, code := c.try(t, "drain", "--timeout", "5s")
		if took := time.Since(began); code != 6 || took < 5*time.Second || took > 20*time.Second {
			t.Errorf("drain to a slow replica: exit code %d after %v\n%s%s", code, took, out, errs)
		}
		lines := regexp.MustCompile(`(?m)^data: replica 'ebs' is [0-9.ms]+ and [0-9.]+[KM]iB behind, .+/s$`).FindAllString(errs, -1)
		if len(lines) < 2 { // one a second, on a machine that is not busy
			t.Errorf("%d lines of progress in 5 s:\n%s", len(lines), errs)
		}
		if !regexp.MustCompile(`(?m)^data: replica 'ebs' did not get there: if the disk goes now, the last [0-9.ms]+ and [0-9.]+[KM]iB of writes are lost`).MatchString(out) ||
			!strings.Contains(errs, "volume 'data' is not drained within 5s") {
			t.Errorf("at the limit:\n%s%s", out, errs)
		}
		t.Logf("at the limit:\n%s%s", out, errs)

		dmSwap(t, "slow", table(0))
		acked := w.acked()
		if out := c.must(t, "drain", "data"); !strings.Contains(out, "data: drained in ") {
			t.Errorf("drained: %s", out)
		}
		// Still up, and in use: drained all the same.
		out, errs, code = c.try(t, "drain", "--down")
		if code != 3 || !strings.Contains(out, "data: drained in ") || !strings.Contains(errs, fmt.Sprintf("process %d", os.Getpid())) {
			t.Errorf("drain --down of a volume in use: exit code %d\n%s%s", code, out, errs)
		}
		c.must(t, "pause")
		c.refused(t, 3, []string{"paused", "blockferry resume data"}, "drain")
		c.must(t, "resume")
		last := w.stop(t)
		if last <= acked {
			t.Error("the application was stopped by a drain")
		}
		if out := c.must(t, "drain", "--down"); !strings.Contains(out, "data: down, cleanly") {
			t.Errorf("drain --down: %s", out)
		}
		if out := c.must(t, "drain", "--down", "--timeout", "5s"); !strings.Contains(out, "data: nothing to drain, it is not up: down") {
			t.Errorf("drain of a volume that is down: %s", out)
		}
		// Paused, it is taken down all the same, with what is lost said, and stays paused.
		c.must(t, "up", "--wait")
		w = startWriter(t, v.Path, h, last+1)
		w.awaitWrites(t, 50)
		c.must(t, "sync")
		c.must(t, "pause")
		w.awaitWrites(t, 50)
		last = w.stop(t)
		out, errs, code = c.try(t, "drain", "--down", "--timeout", "30s")
		if code != 3 || !regexp.MustCompile(`(?m)^data: replica 'ebs' did not get there: if the disk goes now, the last [0-9.ms]+ and [0-9.]+[KM]iB of writes are lost`).MatchString(out) ||
			!strings.Contains(out, "data: down") || !strings.Contains(errs, "paused; blockferry resume data") {
			t.Errorf("drain --down of a paused volume: exit code %d\n%s%s", code, out, errs)
		}
		if _, err := os.Stat(v.Path); err == nil {
			t.Errorf("%s is there after drain --down while paused", v.Path)
		}
		c.must(t, "up", "--wait")
		if p := c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up }); !p.Paused || p.Replicas[0].Replication != "PausedSyncS" {
			t.Errorf("paused, down and up again: %+v", p)
		}
		c.must(t, "resume")
		c.must(t, "drain")
		// Past the limit it is taken down, too: the stop goes on in order, and what is missing stays marked.
		w = startWriter(t, v.Path, h, last+1)
		dmSwap(t, "slow", table(4000))
		w.awaitWrites(t, 100)
		last = w.stop(t)
		out, errs, code = c.try(t, "drain", "--down", "--timeout", "1s")
		if code != 6 || !strings.Contains(out, "are lost") || !strings.Contains(out, "data: down") {
			t.Errorf("drain --down past its limit: exit code %d\n%s%s", code, out, errs)
		}
		if _, err := os.Stat(v.Path); err == nil {
			t.Errorf("%s is there after drain --down", v.Path)
		}
		dmSwap(t, "slow", table(0))
		c.must(t, "up", "--wait", "--timeout", "60s")
		c.must(t, "drain")
		c.must(t, "drain", "--down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		c.refused(t, 5, []string{"does not answer"}, "drain", "--down")
		c.must(t, "recover", slow)
		judgeDevice(t, slow, h, last, last)
	})
}

// up --wait ends when the volume is up, at once where nobody but the operator
// can help, and at its limit where waiting may.
func TestBootUpWaits(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 200 << 20}, {Size: 200 << 20}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		// The disk is named by a link, as a configuration does: it comes late.
		ssd, ebs := t.TempDir()+"/ssd", ubd(1)
		attach := func() {
			t.Helper()
			if err := os.Symlink(ubd(0), ssd); err != nil {
				t.Fatal(err)
			}
		}
		attach()
		c := newCLI(t, oneReplica(ssd, ebs))
		c.must(t, "create")
		c.start(t)
		if out := c.must(t, "up", "--wait", "--timeout", "60s"); !strings.Contains(out, "data: up as /dev/mapper/data") {
			t.Errorf("up --wait: %s", out)
		}
		h := history{Seed: 22, Size: sectors(t, "/dev/mapper/data") * 512, MaxBytes: 1 << 20}
		w := startWriter(t, "/dev/mapper/data", h, 1)
		w.awaitWrites(t, 100)
		last := w.stop(t)
		c.must(t, "drain", "--down")
		c.must(t, "up", "--wait")
		c.must(t, "drain", "--down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		c.refused(t, 5, []string{"does not answer"}, "up", "--wait")

		// Somebody has the disk for a moment, as blkid may at boot.
		held, err := blockdev.OpenFile(ubd(0), blockdev.OpenOptions{Exclusive: true})
		if err != nil {
			t.Fatal(err)
		}
		c.start(t)
		c.await(t, "known to be in use", time.Minute, func(v status.Volume) bool { return v.Stage == "busy" })
		c.refused(t, 6, []string{"not up within 2s: busy", ssd + " is in use by", fmt.Sprintf("process %d (", os.Getpid()), "end what uses it"}, "up", "--wait", "--timeout", "2s")
		time.AfterFunc(2*time.Second, func() { held.Close() })
		c.must(t, "up", "--wait", "--timeout", "60s")
		judgeDevice(t, "/dev/mapper/data", h, last, last)
		c.must(t, "drain", "--down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}

		if err := os.Remove(ssd); err != nil {
			t.Fatal(err)
		}
		zeroDisk(t, ubd(0))
		c.start(t)
		c.await(t, "known to be absent", time.Minute, func(v status.Volume) bool { return v.Stage == "absent" })
		c.refused(t, 6, []string{"not up within 1s", "is not there", "attach the disk"}, "up", "--wait", "--timeout", "1s")
		if out := c.must(t, "drain", "--down"); !strings.Contains(out, "it is not up: absent") {
			t.Errorf("drain of an absent volume: %s", out)
		}
		attach()
		// Blank, and nobody restores it by itself: at once.
		began := time.Now()
		c.refused(t, 3, []string{"blank", "blockferry restore data"}, "up", "--wait", "--timeout", "60s")
		if took := time.Since(began); took > 30*time.Second {
			t.Errorf("a blank disk was waited for, %v", took)
		}
		if out := c.must(t, "drain"); !strings.Contains(out, "it is not up: blank") {
			t.Errorf("drain of a blank volume: %s", out)
		}
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		auto := newCLI(t, strings.Replace(oneReplica(ssd, ebs), "    interval:", "    restore: auto\n    interval:", 1))
		auto.start(t) // it does not answer yet
		out, errs, code := auto.try(t, "up", "--wait")
		if code != 0 || !strings.Contains(out, "data: up as") || !strings.Contains(errs, "restore ") {
			t.Errorf("up --wait through a restore: exit code %d\n%s%s", code, out, errs)
		}
		judgeDevice(t, "/dev/mapper/data", h, last, last)
		auto.must(t, "down")
	})
}
