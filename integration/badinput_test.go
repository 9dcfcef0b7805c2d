package integration

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// digest is a disk's content in short.
func digest(t *testing.T, path string) [sha256.Size]byte {
	t.Helper()
	h := sha256.New()
	if err := readDirect(path, func(_ int64, b []byte) error { h.Write(b); return nil }); err != nil {
		t.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// create refuses whatever could cost somebody's data or could not work, says
// why and what to do, and writes nothing then.
func TestCreateRefusesAndWritesNothing(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 96 << 20}, {Size: 96 << 20}, {Size: 96 << 20}, {Size: 8 << 20}}}, func(t *testing.T) {
		a, b, withFS, small := ubd(0), ubd(1), ubd(2), ubd(3)
		mkfs(t, "ext4", withFS)
		run(t, "sync")
		link := filepath.Join(t.TempDir(), "other-name")
		if err := os.Symlink(a, link); err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
		before := map[string][sha256.Size]byte{}
		for _, d := range []string{a, b, withFS, small} {
			before[d] = digest(t, d)
		}
		const refusedCode, usage, missing = 3, 2, 7
		for _, c := range []struct {
			name     string
			ssd, ebs string
			extra    string
			code     int
			words    []string
			args     []string
		}{
			{"the same disk by two names", a, link, "", refusedCode, []string{"is the same disk as " + a, "two different disks"}, nil},
			{"the same disk twice", a, a, "", usage, []string{"is already the device of volume 'data'"}, nil},
			{"no such disk", "/dev/nowhere", b, "", missing, []string{"/dev/nowhere", "can't be opened", "attach it"}, nil},
			{"no such replica", a, "/dev/nowhere", "", missing, []string{"/dev/nowhere", "replica 'ebs'"}, nil},
			{"not a device", a, "/proc", "", missing, []string{"/proc"}, nil},
			{"a file system on the volume's disk", withFS, b, "", refusedCode, []string{withFS, "ext4", "nothing was written", "--force"}, nil},
			{"a file system on the replica's disk", a, withFS, "", refusedCode, []string{withFS, "ext4", "--force"}, nil},
			{"a replica that is too small", a, small, "", refusedCode, []string{small, "needs", "8388608"}, nil},
			{"a disk that is too small", small, b, "", refusedCode, []string{small, "bytes"}, nil},
			{"a size that does not fit", a, b, "\n    size: 95MiB", refusedCode, []string{"needs a disk of", "100663296"}, nil},
			{"too small, forced", a, small, "", refusedCode, []string{small, "needs"}, []string{"--force"}},
			{"another volume's name", a, b, "", usage, []string{"no volume 'dta' is configured; did you mean 'data'?"}, []string{"dta"}},
		} {
			t.Run(c.name, func(t *testing.T) {
				yaml := oneReplica(c.ssd, c.ebs)
				if c.extra != "" {
					yaml = strings.Replace(yaml, "\n    interval: 500ms", "\n    interval: 500ms"+c.extra, 1)
				}
				cli := newCLI(t, yaml)
				cli.refused(t, c.code, c.words, append([]string{"create"}, c.args...)...)
			})
		}
		t.Run("mounted", func(t *testing.T) {
			mustMount(t, "ext4", withFS, "ro,noload")
			newCLI(t, oneReplica(a, withFS)).refused(t, refusedCode, []string{withFS, "in use", "mounted on", "unmount"}, "create", "--force")
			newCLI(t, oneReplica(withFS, b)).refused(t, refusedCode, []string{withFS, "in use"}, "create", "--force")
		})
		for d, want := range before {
			if digest(t, d) != want {
				t.Errorf("%s was written to", d)
			}
		}
		t.Run("twice", func(t *testing.T) {
			cli := newCLI(t, oneReplica(a, b))
			cli.must(t, "create", "--dry-run")
			if digest(t, a) != before[a] || digest(t, b) != before[b] {
				t.Error("a dry run wrote something")
			}
			cli.must(t, "create")
			after := digest(t, a)
			cli.refused(t, refusedCode, []string{"holds", "--discard-my-data"}, "create")
			cli.refused(t, refusedCode, []string{"holds", "--discard-my-data"}, "create", "--force")
			if digest(t, a) != after {
				t.Error("a refused create wrote something")
			}
			cli.must(t, "create", "--discard-my-data")
			if digest(t, a) == after {
				t.Error("--discard-my-data changed nothing")
			}
		})
	})
}

// What an agent finds wrong is said by status, with what to do; it never
// writes to what it does not know.
func TestAgentRefuses(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 96 << 20}, {Size: 96 << 20}, {Size: 96 << 20}}}, func(t *testing.T) {
		ssd, ebs, spare := ubd(0), ubd(1), ubd(2)
		c := newCLI(t, oneReplica(ssd, ebs))
		c.refused(t, 5, []string{"does not answer", "start it"}, "status")

		t.Run("nothing created", func(t *testing.T) {
			c := newCLI(t, oneReplica(ssd, ebs))
			c.start(t)
			v := c.await(t, "looked at", 30*time.Second, func(v status.Volume) bool { return v.Disk == "Diskless" })
			if v.Up || !strings.Contains(v.Advice, "create") && !strings.Contains(v.Advice, "restore") {
				t.Errorf("%+v", v)
			}
			c.refused(t, 3, []string{"data"}, "restore")
			c.refused(t, 3, []string{"data"}, "up")
			c.refused(t, 3, []string{"not up"}, "sync")
			c.refused(t, 2, []string{"did you mean 'data'?"}, "up", "dat")
			c.refused(t, 2, []string{"did you mean 'ebs'?"}, "restore", "--from", "ebz")
			second := newCLI(t, oneReplica(ssd, ebs))
			second.socket = c.socket
			second.refused(t, 3, []string{"another agent answers on"}, "agent")
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
		})
		t.Run("foreign content", func(t *testing.T) {
			mkfs(t, "ext4", spare)
			run(t, "sync")
			before := digest(t, spare)
			c := newCLI(t, oneReplica(spare, ebs))
			c.start(t)
			v := c.await(t, "looked at", 30*time.Second, func(v status.Volume) bool { return strings.Contains(v.Reason, "ext") })
			if v.Up || v.Advice == "" || v.Role != "Unknown" {
				t.Errorf("%+v", v)
			}
			c.refused(t, 3, []string{spare}, "restore")
			c.refused(t, 3, []string{spare}, "up")
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
			if digest(t, spare) != before {
				t.Error("the agent wrote to a foreign disk")
			}
		})
		t.Run("volume in use", func(t *testing.T) {
			c := newCLI(t, oneReplica(ssd, ebs))
			c.must(t, "create")
			c.start(t)
			v := c.await(t, "up to date", time.Minute, upToDate)
			c.must(t, "check")
			c.refused(t, 3, []string{"in use"}, "create", "--force")
			held, err := os.Open(v.Path)
			if err != nil {
				t.Fatal(err)
			}
			c.refused(t, 3, []string{"in use", fmt.Sprint(os.Getpid())}, "down")
			held.Close()
			// A second agent elsewhere may not touch the volume.
			second := newCLI(t, oneReplica(ssd, ebs))
			second.start(t)
			second.await(t, "refused", 30*time.Second, func(v status.Volume) bool {
				return !v.Up && strings.Contains(v.Reason, "another agent")
			})
			if err := second.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
			// SIGTERM leaves the volume up, the next agent adopts it.
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
			if _, err := os.Stat(v.Path); err != nil {
				t.Errorf("after SIGTERM: %v", err)
			}
			c.start(t)
			again := c.await(t, "up to date", time.Minute, upToDate)
			if again.UUID != v.UUID || again.Position.Epoch < v.Position.Epoch {
				t.Errorf("adopted %+v, was %+v", again.Position, v.Position)
			}
			c.refused(t, 3, []string{"is not blank"}, "restore")
			c.must(t, "pause")
			c.await(t, "paused", 10*time.Second, func(v status.Volume) bool { return v.Paused })
			c.refused(t, 6, nil, "sync", "--timeout", "1s")
			c.must(t, "resume")
			c.must(t, "sync", "--timeout", "30s")
			out := c.must(t, "events", "--now", "--json")
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if len(lines) < 3 || !strings.Contains(lines[len(lines)-1], `"kind":"now"`) {
				t.Errorf("events: %s", out)
			}
			c.must(t, "down")
			c.await(t, "down", 10*time.Second, func(v status.Volume) bool { return !v.Up })
			c.must(t, "up")
			c.await(t, "up to date", time.Minute, upToDate)
			c.must(t, "down")
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
		})
	})
}
