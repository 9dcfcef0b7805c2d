package integration

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
)

// A node is cut off and goes on, with a disk beside it; then its machine is lost, and its SSD comes back
// blank. Another node has taken over meanwhile. Restored from that disk, which is newer than what the other took over
// from, it is left as it is until the operator gives up what only it has: that is saved, and it follows.
func TestFailbackRestored(t *testing.T) {
	inGuest(t, guest{Memory: "1200M", Disks: []disk{{Size: twinDisk}, {Size: twinDisk}, {Size: twinDisk}}, Modules: []string{"veth"}, Timeout: 6 * time.Minute}, failedBack)
}

func failedBack(t *testing.T) {
	ssd, ebs := ubd(0), ubd(2)
	w := madeTwins(t, ssd, ubd(1), "", "stall-limit: 20s")
	w.a.edit(t, "    replicas:\n", "    replicas:\n      ebs: {device: "+ebs+"}\n")
	w.a.must(t, "create", "--replica", "ebs")
	w.b.start(t)
	w.a.start(t)
	v := w.a.await(t, "up to date on both", 2*time.Minute, upToDate)
	h := history{Seed: 61, Size: twinVolume, MaxBytes: 64 << 10, Span: 8 << 20, Pause: 5 * time.Millisecond}
	load := startWriter(t, v.Path, h, 1)
	load.awaitWrites(t, 20)
	w.a.must(t, "sync", "--wait", "--timeout", "60s") // what was written so far is at both
	w.wire.ip("link set wire down")
	w.b.await(t, "aware of the cut link", time.Minute, func(v status.Volume) bool { return v.FedBy == "" && v.Position != nil })
	load.awaitWrites(t, 60) // which b does not get
	last := load.stop(t)
	w.a.await(t, "all beside it", time.Minute, func(v status.Volume) bool {
		r := replicaNamed(t, v, "ebs")
		return r.Disk == "UpToDate" && r.BehindBytes != nil && *r.BehindBytes == 0
	})
	w.a.kill(t)
	removeStack(t, "data")
	zeroDisk(t, ssd)
	w.a.must(t, "recover", ebs)
	judgeDevice(t, ebs, h, last, last)
	only := bytesOf(t, ebs, 0)

	w.b.must(t, "primary", "--force")
	v = w.b.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
	if got := judgeDevice(t, v.Path, h, 20, last); got.Partial || got.K >= last-10 {
		t.Fatalf("b took over with %+v of %d writes", got, last)
	}
	common := bytesOf(t, v.Path, 0)
	run(t, "dd", "if=/dev/urandom", "of="+v.Path, "bs=64k", "count=24", "oflag=direct", "conv=notrunc", "status=none")
	run(t, "dd", "if=/dev/urandom", "of="+v.Path, "bs=64k", "count=24", "seek=400", "oflag=direct", "conv=notrunc", "status=none")

	// Its device can't be beside b's, in one kernel.
	w.a.edit(t, "  data:", "  was:")
	w.wire.ip("link set wire up")
	w.a.start(t)
	w.a.await(t, "blank", time.Minute, func(v status.Volume) bool { return v.Stage == "blank" })
	w.a.refused(t, 3, []string{"written at node 'node-b'", "two primaries"}, "restore")
	w.a.refused(t, 3, []string{"restored epoch", "it is restored, but not up", "out of date"}, "restore", "--from", "ebs")
	if v := w.a.await(t, "out of date", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Reason, "out of date") }); v.Up {
		t.Errorf("%+v", v)
	}
	before := len(w.b.logText(t))
	w.a.must(t, "secondary", "--force")
	w.b.await(t, "aware of it", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Replicas[0].Reason, "split brain") })
	at := peek(t, ssd).DataOffset
	if !bytes.Equal(bytesOf(t, ssd, at), only) {
		t.Error("the restored disk does not hold what the disk beside it held, and nobody gave that up")
	}
	if out := w.a.must(t, "rescue", "list"); out != "" {
		t.Errorf("rescue files before: %s", out)
	}
	w.a.must(t, "discard")
	w.b.await(t, "up to date", 2*time.Minute, upToDate)
	w.b.must(t, "sync", "--wait", "--timeout", "60s")
	w.b.must(t, "verify")
	if log := w.b.logText(t)[before:]; plans(log, "full") > 0 || plans(log, "compare") == 0 {
		t.Error("it did not come back by a comparison")
	}
	now := bytesOf(t, v.Path, 0)
	file, _, _ := strings.Cut(w.a.must(t, "rescue", "list"), ": ")
	stopAll(t, w.a)
	w.a.must(t, "recover", ssd)
	if !bytes.Equal(bytesOf(t, ssd, at), now) {
		t.Error("a's disk is not what b's is")
	}
	rescued(t, w.a, file, common, only, now)
	stopAll(t, w.b)
}

// bytesOf are those of a twins' volume that begins at an offset of a device.
func bytesOf(t *testing.T, device string, at int64) []byte {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := alignedBuffer(twinVolume)
	defer unix.Munmap(b)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	return bytes.Clone(b)
}
