package integration

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

// Epochs in these tests are made by sync alone, and travel as they are.
func spillConfig(ssd, ebs, spill string) string {
	return fmt.Sprintf("volumes:\n  data:\n    device: %s\n    size: 96MiB\n    interval: 1h\n    replicas:\n      ebs:\n"+
		"        device: %s\n        compression: none\n        journal: 16MiB\n        spill: %s\n        spill-limit: 128MiB\n", ssd, ebs, spill)
}

// imageDigest is of a device's first size bytes.
func imageDigest(t *testing.T, path string, size int64) (sum [sha256.Size]byte) {
	t.Helper()
	h := sha256.New()
	err := readDirectTo(path, size, func(_ int64, piece []byte) error {
		_, err := h.Write(piece)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// killWhen begins a sync and kills the agent as soon as the replica's disk, or
// something else, is in a state.
func (c *cli) killWhen(t *testing.T, replica, what string, ready func(protocol.ReplicaStatus) bool) {
	t.Helper()
	sync := exec.CommandContext(t.Context(), c.binary, "--config", c.config, "--socket", c.socket, "sync", "--timeout", "60s")
	if err := sync.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sync.Wait() }()
	disk, err := blockdev.OpenFile(replica, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if s, err := protocol.PeekReplica(disk); err == nil && ready(s) {
			c.kill(t)
			return
		}
	}
	_ = sync.Process.Kill()
	t.Fatal("within a minute not ", what)
}

func allocatedBytes(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func copyFile(t *testing.T, from, to string, size int64) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.CopyN(out, in, size); err != nil {
		t.Fatal(err)
	}
}

// An epoch larger than the journal goes by the spill file. The agent dies in
// its middle and once it is committed; the disk alone is not the replica then,
// and with the file it is, elsewhere as well as for a restore.
func TestIdentitySpill(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 160 << 20}, {Size: 220 << 20}}, Modules: []string{"loop"}, Timeout: 5 * time.Minute}, func(t *testing.T) {
		ssd, ebs := ubd(0), ubd(1)
		const size = 96 << 20
		mkfs(t, "ext4", ubd(2))
		shelf := mustMount(t, "ext4", ubd(2), "")
		file := filepath.Join(shelf, "data-ebs")
		c := newCLI(t, spillConfig(ssd, ebs, file))
		if out := c.must(t, "check"); !strings.Contains(out, file) {
			t.Errorf("check does not look at the spill file: %s", out)
		}
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		if n := allocatedBytes(t, file); n > 64<<10 {
			t.Errorf("the unused spill file takes %d bytes", n)
		}
		noise(t, v.Path, 0, 64<<20, 1)
		c.must(t, "sync", "--timeout", "60s")
		if plans(c.logText(t), "incremental") == 0 {
			t.Error("the epoch did not go by the journal")
		}
		c.must(t, "verify")
		c.await(t, "applied, the spill file empty again", time.Minute, func(status.Volume) bool { return allocatedBytes(t, file) < 64<<10 })
		first := imageDigest(t, v.Path, size)

		// In the middle of an epoch: the replica is what it was.
		noise(t, v.Path, 16<<20, 72<<20, 2)
		c.killWhen(t, ebs, "spilled", func(protocol.ReplicaStatus) bool { return allocatedBytes(t, file) > 20<<20 })
		c.must(t, "recover", ebs)
		if imageDigest(t, ebs, size) != first {
			t.Error("an epoch that was not committed changed the replica")
		}
		c.start(t)
		c.await(t, "up to date", time.Minute, upToDate)
		c.must(t, "sync", "--timeout", "60s")

		// Committed, and not applied.
		noise(t, v.Path, 8<<20, 80<<20, 3)
		second := imageDigest(t, v.Path, size)
		c.killWhen(t, ebs, "committed", func(s protocol.ReplicaStatus) bool {
			return s.Committed != s.Applied && allocatedBytes(t, file) > 20<<20
		})
		carried := strings.TrimSpace(run(t, "losetup", "--find", "--show", ebs))
		before := digest(t, ebs)
		other := filepath.Join(shelf, "other")
		name := filepath.Base(file)
		c.refused(t, 3, []string{name, "--spill", "bring the spill file back"}, "recover", carried)
		c.refused(t, 3, []string{other, "no such file"}, "recover", "--spill", other, carried)
		copyFile(t, file, other, 30<<20)
		c.refused(t, 3, []string{other}, "recover", "--spill", other, carried)
		flipBit(t, other, 20<<20)
		c.refused(t, 3, []string{other, "checksum"}, "recover", "--spill", other, carried)
		if err := os.Remove(other); err != nil {
			t.Fatal(err)
		}
		if digest(t, ebs) != before {
			t.Fatal("a refusal wrote to the replica")
		}
		run(t, "losetup", "--detach", carried)

		// The SSD is lost too, and the spill file not there yet.
		mustUnmount(t, shelf)
		apart := func(v status.Volume) bool {
			return len(v.Replicas) == 1 && strings.Contains(v.Replicas[0].Reason, file) && strings.Contains(v.Replicas[0].Advice, "bring its spill file back")
		}
		c.start(t)
		c.await(t, "up, without a part of its replica", time.Minute, func(v status.Volume) bool { return v.Up && apart(v) })
		c.must(t, "down", "--force")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		zeroDisk(t, ssd)
		c.start(t)
		c.await(t, "blank, without a part of its replica", time.Minute, func(v status.Volume) bool { return v.Disk == "Diskless" && apart(v) })
		c.refused(t, 3, []string{file}, "restore")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := unix.Mount(ubd(2), shelf, "ext4", 0, ""); err != nil {
			t.Fatal(err)
		}
		c.must(t, "recover", "--spill", file, ebs)
		if imageDigest(t, ebs, size) != second {
			t.Error("the replica and its spill file are not the committed epoch")
		}
		c.start(t)
		c.await(t, "blank", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Advice, "restore") })
		c.must(t, "restore")
		c.await(t, "up to date again", time.Minute, upToDate)
		if imageDigest(t, v.Path, size) != second {
			t.Error("the restored volume is not the committed epoch")
		}
		noise(t, v.Path, 0, 64<<20, 4)
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "verify")
		c.must(t, "down")
	})
}

// A spill file where it would be lost with the machine, or would wait for the
// volume that waits for it, is refused by name; the replica goes on without.
func TestIdentitySpillPlace(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 160 << 20}}}, func(t *testing.T) {
		ssd, ebs := ubd(0), ubd(1)
		memory := filepath.Join(t.TempDir(), "spill") // the guest's temporary folders are in its memory
		c := newCLI(t, spillConfig(ssd, ebs, memory))
		c.refused(t, 3, nil, "check")
		if out, _, _ := c.try(t, "check"); !strings.Contains(out, memory) || !strings.Contains(out, "tmpfs") {
			t.Errorf("check: %s", out)
		}
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date, with a word on the spill file", time.Minute, func(v status.Volume) bool {
			return upToDate(v) && strings.Contains(v.Replicas[0].Reason, "tmpfs")
		})
		if _, err := os.Stat(memory); err == nil {
			t.Error("the spill file was made all the same")
		}
		noise(t, v.Path, 0, 64<<20, 1)
		c.refused(t, 6, nil, "sync", "--timeout", "5s")
		c.await(t, "behind, with the reason", time.Minute, func(v status.Volume) bool {
			return strings.Contains(v.Replicas[0].Reason, "journal") && strings.Contains(v.Replicas[0].Reason, "tmpfs") && v.Replicas[0].Disk != "Inconsistent"
		})
		c.must(t, "down", "--force")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Error(err)
		}

		// On the volume itself.
		c = newCLI(t, spillConfig(ssd, ebs, "/mnt/none"))
		c.start(t)
		v = c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		mkfs(t, "ext4", v.Path)
		dir := mustMount(t, "ext4", v.Path, "")
		on := newCLI(t, spillConfig(ssd, ebs, filepath.Join(dir, "spill")))
		if out, _, code := on.try(t, "check"); code != 3 || !strings.Contains(out, "the disk of the volume") {
			t.Errorf("check, exit code %d: %s", code, out)
		}
		mustUnmount(t, dir)
	})
}
