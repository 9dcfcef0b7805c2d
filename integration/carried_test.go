package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/status"
	"blockferry/integration/uml"
	"blockferry/protocol"
)

// A replica's disk is carried to another machine, with its last epoch
// committed and not applied. There `recover` alone, without configuration or agent,
// under another device path, makes it the file system of that epoch. Carried back
// untouched it goes on; carried back after a mount it is compared in full.
func TestIdentityCarriedReplica(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 300 << 20}}, Modules: []string{"loop"}, Timeout: 5 * time.Minute}, func(t *testing.T) {
		ssd, ebs := ubd(0), ubd(1)
		kept := filepath.Join(uml.Dir, "kept") // from one boot to the next
		config := fmt.Sprintf("volumes:\n  data:\n    device: %s\n    size: 128MiB\n    interval: 1h\n    replicas:\n      ebs:\n"+
			"        device: %s\n        compression: none\n        journal: 96MiB\n", ssd, ebs)
		switch uml.Boot() {
		case 0: // at home
			c := newCLI(t, config)
			c.must(t, "create")
			c.start(t)
			v := c.await(t, "up to date", time.Minute, upToDate)
			mkfs(t, "ext4", v.Path)
			writeFile(t, v.Path, "first", 1<<20)
			c.must(t, "sync", "--timeout", "60s")
			writeFile(t, v.Path, "last", 48<<20)
			if err := os.WriteFile(kept, fmt.Appendf(nil, "%x", imageDigest(t, v.Path, 128<<20)), 0o600); err != nil {
				t.Fatal(err)
			}
			c.killWhen(t, ebs, "committed", func(s protocol.ReplicaStatus) bool { return s.Committed != s.Applied })
			writeFile(t, v.Path, "lost", 1<<20)
			unix.Sync()
			t.Fatal(uml.Reboot())
		case 1: // on another machine
			if s := peek(t, ebs); s.Committed == s.Applied {
				t.Fatalf("nothing waits in the journal: %+v", s)
			}
			loop := strings.TrimSpace(run(t, "losetup", "--find", "--show", ebs))
			out := run(t, blockferry(t), "--config", "/none", "--socket", "/none", "recover", loop)
			if !strings.Contains(out, "can be mounted") {
				t.Errorf("recover: %s", out)
			}
			want, err := os.ReadFile(kept)
			if err != nil {
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%x", imageDigest(t, loop, 128<<20)); got != string(want) {
				t.Errorf("it holds %s, the last committed epoch was %s", got, want)
			}
			run(t, "e2fsck", "-fn", loop)
			dir := mustMount(t, "ext4", loop, "ro")
			if names := listed(t, dir); names != "first last" {
				t.Errorf("files: %s", names)
			}
			mustUnmount(t, dir)
			run(t, "losetup", "--detach", loop)
			t.Fatal(uml.Reboot())
		}
		// At home again.
		c := newCLI(t, config)
		c.start(t)
		c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "verify")
		if log := c.logText(t); plans(log, "full")+plans(log, "compare") > 0 || plans(log, "incremental") == 0 {
			t.Error("replication did not go on where it was")
		}
		c.must(t, "down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Error(err)
		}

		// Away once more, and written to there.
		run(t, c.binary, "recover", ebs)
		dir := mustMount(t, "ext4", ebs, "")
		if names := listed(t, dir); names != "first last lost" {
			t.Errorf("files: %s", names)
		}
		if err := os.WriteFile(dir+"/elsewhere", []byte("elsewhere"), 0o600); err != nil {
			t.Fatal(err)
		}
		mustUnmount(t, dir)
		c = newCLI(t, config)
		c.start(t)
		c.await(t, "up to date", time.Minute, upToDate)
		c.must(t, "verify")
		if log := c.logText(t); plans(log, "compare") != 1 {
			t.Errorf("a replica that was mounted elsewhere: %d comparisons", plans(log, "compare"))
		}
		c.must(t, "down")
		c.kill(t)
		run(t, c.binary, "recover", ebs)
		dir = mustMount(t, "ext4", ebs, "ro")
		if names := listed(t, dir); names != "first last lost" {
			t.Errorf("after the comparison: %s", names)
		}
	})
}

func peek(t *testing.T, path string) protocol.ReplicaStatus {
	t.Helper()
	disk, err := blockdev.OpenFile(path, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	s, err := protocol.PeekReplica(disk)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// writeFile mounts an ext4, puts a file of noise there and unmounts it.
func writeFile(t *testing.T, device, name string, size int) {
	t.Helper()
	dir := mustMount(t, "ext4", device, "")
	noise := make([]byte, size)
	for i := range noise {
		noise[i] = byte(mix(uint64(i)<<8 | uint64(len(name))))
	}
	if err := os.WriteFile(filepath.Join(dir, name), noise, 0o600); err != nil {
		t.Fatal(err)
	}
	mustUnmount(t, dir)
}

// listed is the names of a folder's files.
func listed(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.Name() != "lost+found" {
			names = append(names, e.Name())
		}
	}
	return strings.Join(names, " ")
}

// An automatic restore never guesses: it waits while a replica is missing
// that may be newer, takes no disk for blank that isn't, and no disk whose label
// alone is gone.
func TestIdentityBlankIsAPositiveFinding(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 300 << 20}, {Size: 300 << 20}}, Modules: []string{"loop"}, Timeout: 5 * time.Minute}, func(t *testing.T) {
		ssd, ebs := ubd(0), ubd(1)
		table := fmt.Sprintf("0 %d linear %s 0", sectors(t, ubd(2)), ubd(2))
		late := dmCreate(t, "late", table)
		config := strings.Replace(oneReplica(ssd, ebs), "    interval:", "    restore: auto\n    size: 64MiB\n    interval:", 1) + "      two:\n        device: " + late + "\n"
		c := newCLI(t, config)
		c.must(t, "create")
		c.start(t)
		// Two replicas need not be up to date at one moment.
		following := func(v status.Volume) bool {
			for _, r := range v.Replicas {
				if r.Connection != "Connected" || r.Position == nil {
					return false
				}
			}
			return v.Up && len(v.Replicas) == 2
		}
		v := c.await(t, "replicated to both", time.Minute, following)
		noise(t, v.Path, 0, 16<<20, 1)
		c.must(t, "sync", "--timeout", "60s")
		want := imageDigest(t, v.Path, 64<<20)
		stop := func() {
			t.Helper()
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Error(err)
			}
		}
		c.must(t, "down")
		stop()

		// The label alone is gone: unknown, not blank.
		disk, err := os.OpenFile(ssd, os.O_WRONLY|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := disk.WriteAt(alignedBuffer(1<<20), 0); err != nil {
			t.Fatal(err)
		}
		disk.Close()
		before := digest(t, ssd)
		c.start(t)
		c.await(t, "refused", time.Minute, func(v status.Volume) bool {
			return strings.Contains(v.Reason, ssd+" holds content that is not zero")
		})
		time.Sleep(3 * time.Second) // as long as it takes to try again
		c.refused(t, 3, []string{"not blank"}, "restore")
		stop()
		if digest(t, ssd) != before {
			t.Fatal("a disk without its label was written to")
		}

		// Another disk, with a file system.
		mkfs(t, "ext4", ssd)
		unix.Sync()
		before = digest(t, ssd)
		c.start(t)
		c.await(t, "refused", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Reason, "ext4") })
		time.Sleep(3 * time.Second)
		stop()
		if digest(t, ssd) != before {
			t.Fatal("a foreign disk was overwritten by an automatic restore")
		}

		// Blank, while one replica is away that may be the newer.
		zeroDisk(t, ssd)
		run(t, "dmsetup", "remove", "late")
		c.start(t)
		c.await(t, "waiting for the other replica", time.Minute, func(v status.Volume) bool {
			return strings.Contains(v.Reason, "'two' is not open") && strings.Contains(v.Reason, "may be newer")
		})
		time.Sleep(3 * time.Second)
		c.await(t, "still waiting", time.Minute, func(v status.Volume) bool { return !v.Up && strings.Contains(v.Reason, "may be newer") })
		run(t, "dmsetup", "create", "late", "--table", table)
		c.await(t, "restored by itself once both are there", 2*time.Minute, following)
		if imageDigest(t, v.Path, 64<<20) != want {
			t.Error("what was restored is not what was replicated")
		}
		c.must(t, "verify", "--replica", "two")
		c.must(t, "down")
		c.kill(t)
	})
}
