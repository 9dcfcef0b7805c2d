package integration

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// A snapshot of a replica's disk, under writes: the command finds the epoch that it is told, and
// replication goes on into the journal meanwhile. One that hangs, or needs more room than the journal
// has, costs lag, and nothing is lost.
func TestSnapshot(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 200 << 20}, {Size: 200 << 20}}, Timeout: 3 * time.Minute}, func(t *testing.T) {
		const journal = 32 << 20
		ssd, ebs := ubd(0), ubd(1)
		c := newCLI(t, fmt.Sprintf("volumes:\n  data:\n    device: %s\n    size: %d\n    interval: 200ms\n    cow: 60MiB\n    replicas:\n      ebs:\n        device: %s\n        journal: %d\n", ssd, oddVolumeBytes, ebs, journal))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 71, Size: oddVolumeBytes, MaxBytes: 32 << 10, Pause: 5 * time.Millisecond}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 100)
		before := w.acked()
		c.must(t, "sync", "--timeout", "60s")
		dir := t.TempDir()
		image, at := filepath.Join(dir, "image"), filepath.Join(dir, "epoch")
		script := `echo $BLOCKFERRY_EPOCH > ` + at + `.new; mv ` + at + `.new ` + at + `; while [ ! -e ` + dir + `/go ]; do sleep 0.1; done
			dd status=none if=$BLOCKFERRY_DEVICE of=` + image + ` bs=4096 count=$((BLOCKFERRY_SIZE_BYTES / 4096)) iflag=direct`
		var out bytes.Buffer
		cmd := exec.CommandContext(t.Context(), c.binary, "--config", c.config, "--socket", c.socket, "snapshot", "data", "ebs", "--limit", "2m", "--", "/bin/sh", "-c", script)
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var epoch uint64
		c.await(t, "held", time.Minute, func(status.Volume) bool {
			b, err := os.ReadFile(at)
			if err == nil {
				epoch, err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
			}
			return err == nil
		})
		after := w.issued() // what it holds was written before
		c.refused(t, 3, []string{"held already"}, "snapshot", "data", "ebs", "--", "/bin/true")
		c.await(t, "further, with epochs in its journal", time.Minute, func(v status.Volume) bool {
			return v.Replicas[0].Position.Epoch > epoch && waitingEpochs(v.Replicas[0]) >= 2
		})
		if err := os.WriteFile(dir+"/go", nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%v: %s", err, out.String())
		}
		t.Logf("%s", out.String())
		file, err := os.Open(image) // in memory, so not as a device
		if err != nil {
			t.Fatal(err)
		}
		got, err := judgeImage(io.NewSectionReader(file, 0, h.Size), h)
		file.Close()
		if err != nil || got.Latest < before || got.K > after {
			t.Fatalf("the image of epoch %d holds the writes up to %d, should be between %d and %d: %v", epoch, got.K, before, after, err)
		}
		t.Logf("held at epoch %d: writes up to %d, of %d to %d", epoch, got.K, before, after)
		c.refused(t, 6, []string{"held for 2s, the limit"}, "snapshot", "data", "ebs", "--limit", "2s", "--", "/bin/sleep", "600")
		// More is written than the journal has room for.
		full := exec.CommandContext(t.Context(), c.binary, "--config", c.config, "--socket", c.socket, "snapshot", "data", "ebs", "--", "/bin/sleep", "600")
		if err := full.Start(); err != nil {
			t.Fatal(err)
		}
		v = c.await(t, "behind", time.Minute, func(v status.Volume) bool { // it goes on until the journal takes no more
			r := v.Replicas[0]
			return waitingEpochs(r) > 0 && r.BehindBytes != nil && *r.BehindBytes > 4<<20
		})
		t.Logf("behind by %d KiB: %s", *v.Replicas[0].BehindBytes>>10, v.Replicas[0].Reason)
		if err := full.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = full.Wait()
		c.await(t, "held no more", time.Minute, func(v status.Volume) bool { return waitingEpochs(v.Replicas[0]) < 0 })
		last := w.stop(t)
		c.syncAndSettle(t, ebs)
		judgeDevice(t, ebs, h, last, last)
		c.must(t, "verify")
		if n := plans(c.logText(t), "full"); n != 1 {
			t.Errorf("%d full copies", n)
		}
		c.must(t, "down")
	})
}

var waitingWords = regexp.MustCompile(`held at epoch \d+ for a snapshot; (\d+) later epochs wait`)

// waitingEpochs is how many epochs wait while the replica's disk is held; -1: it is not.
func waitingEpochs(r status.Replica) int {
	m := waitingWords.FindStringSubmatch(r.Reason)
	if m == nil {
		return -1
	}
	n, _ := strconv.Atoi(m[1])
	return n
}
