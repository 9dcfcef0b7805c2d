package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"blockferry/cmd/blockferry/status"
	"blockferry/proto"
)

// cli drives the built binary as a user would.
type cli struct {
	binary, config, socket string
	inside                 []string // command that starts the agent, none: directly
	agentFlags             []string
	agent                  *exec.Cmd
	log                    *os.File
	ended                  chan error
}

// newCLI writes a configuration and prepares to run commands with it.
func newCLI(t *testing.T, config string) *cli {
	t.Helper()
	dir := t.TempDir()
	c := &cli{binary: blockferry(t), config: filepath.Join(dir, "blockferry.yaml"), socket: filepath.Join(dir, "run", "s")}
	if err := os.WriteFile(c.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "agent.log"))
	if err != nil {
		t.Fatal(err)
	}
	c.log = log
	t.Cleanup(func() {
		if c.agent != nil {
			_ = c.agent.Process.Kill()
			<-c.ended
		}
		if t.Failed() {
			content, _ := os.ReadFile(log.Name())
			t.Logf("the agent's log:\n%s", content)
		}
	})
	return c
}

// try runs a command and returns both its outputs and its exit code.
func (c *cli) try(t *testing.T, args ...string) (out, errs string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), c.binary, append([]string{"--config", c.config, "--socket", c.socket}, args...)...)
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// must runs a command that has to end with 0.
func (c *cli) must(t *testing.T, args ...string) string {
	t.Helper()
	out, errs, code := c.try(t, args...)
	if code != 0 {
		t.Fatalf("blockferry %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	t.Logf("blockferry %s\n%s%s", strings.Join(args, " "), out, errs)
	return out
}

// refused runs a command that has to end with a code and say something.
func (c *cli) refused(t *testing.T, code int, words []string, args ...string) {
	t.Helper()
	out, errs, got := c.try(t, args...)
	if got != code {
		t.Errorf("blockferry %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), got, code, out, errs)
	}
	for _, w := range words {
		if !strings.Contains(errs, w) {
			t.Errorf("blockferry %s: '%s' is missing in: %s", strings.Join(args, " "), w, errs)
		}
	}
}

func (c *cli) start(t *testing.T) {
	t.Helper()
	line := slices.Concat(c.inside, []string{c.binary, "--config", c.config, "--socket", c.socket, "agent", "--verbose"}, c.agentFlags)
	c.agent = exec.Command(line[0], line[1:]...)
	c.agent.Stdout, c.agent.Stderr = c.log, c.log
	if err := c.agent.Start(); err != nil {
		t.Fatal(err)
	}
	c.ended = make(chan error, 1)
	go func(a *exec.Cmd) { c.ended <- a.Wait() }(c.agent)
}

// stop ends the agent by a signal and returns how it ended.
func (c *cli) stop(t *testing.T, signal os.Signal) error {
	t.Helper()
	if err := c.agent.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-c.ended:
		c.agent = nil
		return err
	case <-time.After(40 * time.Second):
		t.Fatal("the agent did not end")
		return nil
	}
}

// logText is all that the agents of this test have said.
func (c *cli) logText(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile(c.log.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// await asks for the status until it is as wanted.
func (c *cli) await(t *testing.T, what string, limit time.Duration, ok func(status.Volume) bool) status.Volume {
	t.Helper()
	last := ""
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		v, said, known := c.look(t)
		if known && ok(v) {
			return v
		}
		last = said
		select {
		case err := <-c.ended:
			c.ended <- err
			t.Fatalf("the agent ended: %v", err)
		default:
		}
	}
	t.Fatalf("not %s within %v:\n%s", what, limit, last)
	return status.Volume{}
}

// look asks the agent for its status once; false when there is none. The answer is
// what 'blockferry status --json' prints; to start that over and over would take
// most of a guest's only CPU from the agent.
func (c *cli) look(t *testing.T) (v status.Volume, said string, known bool) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+c.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	reply, err := proto.NewControlClient(conn).Status(t.Context(), &proto.StatusRequest{})
	if err != nil {
		return v, err.Error(), false
	}
	var d status.Document
	if json.Unmarshal(reply.Json, &d) != nil || len(d.Volumes) != 1 {
		return v, string(reply.Json), false
	}
	return d.Volumes[0], string(reply.Json), true
}

// plans counts in an agent's log the epochs that were brought over in a way.
func plans(log, action string) int { return strings.Count(log, " Action:"+action+" ") }

func upToDate(v status.Volume) bool {
	for _, r := range v.Replicas {
		if r.Disk != "UpToDate" || r.Position == nil {
			return false
		}
	}
	return v.Up && len(v.Replicas) > 0
}

func zeroDisk(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := sectors(t, path) * 512
	zeros := make([]byte, 1<<20)
	for at := int64(0); at < size; at += int64(len(zeros)) {
		if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), size-at)], at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

func oneReplica(ssd, ebs string) string {
	return fmt.Sprintf("volumes:\n  data:\n    device: %s\n    interval: 500ms\n    replicas:\n      ebs:\n        device: %s\n", ssd, ebs)
}

// The main path, as the manual tells it: create, write, sync, lose the disk,
// restore, go on incrementally.
func TestMainPath(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 400 << 20}, {Size: 400 << 20}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		ssd, ebs := ubd(0), ubd(1)
		c := newCLI(t, oneReplica(ssd, ebs))
		c.must(t, "check")
		c.must(t, "create")
		c.start(t)
		first := c.await(t, "up to date", time.Minute, upToDate)
		c.must(t, "status")

		h := history{Seed: 11, Size: sectors(t, first.Path) * 512, MaxBytes: 256 << 10, Span: 32 << 20}
		w := startWriter(t, first.Path, h, 1)
		w.awaitWrites(t, 200)
		acked := w.acked()
		if out := c.must(t, "sync", "--wait", "--timeout", "60s"); !strings.Contains(out, "ebs") {
			t.Errorf("sync names no replica: %s", out)
		}
		synced := c.await(t, "up to date", time.Minute, upToDate)
		w.awaitWrites(t, 50)
		last := w.stop(t)
		if last < acked {
			t.Fatal("the writer went backwards")
		}
		c.must(t, "sync")
		c.must(t, "verify")
		c.must(t, "down")
		if _, err := os.Stat(first.Path); err == nil {
			t.Errorf("%s is still there after down", first.Path)
		}
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}

		// The replica's disk alone holds the volume, from offset 0.
		c.must(t, "recover", ebs)
		judgeDevice(t, ebs, h.onDisk(t, ebs), last, last)

		zeroDisk(t, ssd)
		c.start(t)
		lost := c.await(t, "known to be blank", time.Minute, func(v status.Volume) bool { return v.Disk == "Diskless" })
		if lost.Up || !strings.Contains(lost.Advice, "blockferry restore data") {
			t.Errorf("a blank disk: up %v, advice %q", lost.Up, lost.Advice)
		}
		c.must(t, "status")
		out := c.must(t, "restore")
		if !strings.Contains(out, "epoch") {
			t.Errorf("restore does not name the epoch: %s", out)
		}
		again := c.await(t, "up to date", time.Minute, upToDate)
		c.must(t, "status")
		judgeDevice(t, again.Path, h, last, last)
		if again.UUID != first.UUID || again.Position.Epoch < synced.Position.Epoch {
			t.Errorf("before %s at %v, after the restore %s at %v", first.UUID, synced.Position, again.UUID, again.Position)
		}
		// It goes on, and does not send everything once more.
		w = startWriter(t, again.Path, h, last+1)
		w.awaitWrites(t, 50)
		last = w.stop(t)
		c.must(t, "sync")
		c.must(t, "verify")
		content := c.logText(t)
		if full, compared := plans(content, "full"), plans(content, "compare"); full != 1 || compared != 0 {
			t.Errorf("after the restore replication did not go on incrementally: %d full copies, %d comparisons", full, compared)
		}
		c.must(t, "down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		c.must(t, "recover", ebs)
		judgeDevice(t, ebs, h.onDisk(t, ebs), last, last)
	})
}

// onDisk is the history as a larger disk shows it: the same writes, judged on
// the volume's part only.
func (h history) onDisk(t *testing.T, path string) history {
	t.Helper()
	if size := sectors(t, path) * 512; size < h.Size {
		t.Fatalf("%s has %d bytes, the volume %d", path, size, h.Size)
	}
	return h
}

// kill ends the agent as a crash would.
func (c *cli) kill(t *testing.T) {
	t.Helper()
	if err := c.agent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-c.ended
	c.agent = nil
}

// killInRestore begins a restore, kills the agent once it has made progress and
// returns the command's exit code.
func (c *cli) killInRestore(t *testing.T) int {
	t.Helper()
	restore := exec.CommandContext(t.Context(), c.binary, "--config", c.config, "--socket", c.socket, "restore", "--json")
	progress, err := restore.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := restore.Start(); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 4096)
	for seen := ""; !strings.Contains(seen, `"done-bytes":`); {
		n, err := progress.Read(buffer)
		if seen += string(buffer[:n]); err != nil {
			t.Fatalf("the restore told no progress: %q, %v", seen, err)
		}
	}
	c.kill(t)
	_ = restore.Wait()
	return restore.ProcessState.ExitCode()
}

// A restore that was interrupted is never taken for a volume; it goes on
// where it stopped, by itself if it may.
func TestRestoreInterrupted(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 400 << 20}, {Size: 400 << 20}}, Timeout: 5 * time.Minute}, func(t *testing.T) {
		ssd, ebs := ubd(0), ubd(1)
		c := newCLI(t, oneReplica(ssd, ebs))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 13, Size: sectors(t, v.Path) * 512, MaxBytes: 1 << 20}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 300)
		last := w.stop(t)
		c.must(t, "down")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		zeroDisk(t, ssd)
		c.start(t)
		c.await(t, "known to be blank", time.Minute, func(v status.Volume) bool { return v.Disk == "Diskless" })
		if code := c.killInRestore(t); code != 5 {
			t.Errorf("restore, its agent gone: exit code %d, want 5", code)
		}
		c.start(t)
		half := c.await(t, "known to be half restored", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Reason, "did not end") })
		if half.Up || !strings.Contains(half.Advice, "blockferry restore data") {
			t.Errorf("a half restored disk: %+v", half)
		}
		c.refused(t, 3, []string{"did not end"}, "up")
		if _, err := os.Stat(v.Path); err == nil {
			t.Fatal("a half restored disk is up")
		}
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		auto := newCLI(t, strings.Replace(oneReplica(ssd, ebs), "    interval:", "    restore: auto\n    interval:", 1))
		auto.start(t)
		auto.await(t, "restored by itself", 2*time.Minute, upToDate)
		judgeDevice(t, v.Path, h, last, last)
		auto.must(t, "verify")
		auto.must(t, "down")
	})
}
