package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/agent"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
	"blockferry/protocol"
)

// TestMain lets the test binary be the command, so that it can be killed.
func TestMain(m *testing.M) {
	if os.Getenv("BE_BLOCKFERRY") != "" {
		main()
	}
	os.Exit(m.Run())
}

var snapshotCut = time.Date(2026, 3, 4, 5, 6, 7, 80_000_000, time.UTC)

// copyHere is an agent with a copy at epoch 5 of another node's volume, until the test ends.
func copyHere(t *testing.T) (g []string, device string, content []byte) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("an agent needs root")
	}
	dir := t.TempDir()
	device = filepath.Join(dir, "disk")
	content = bytes.Repeat([]byte("what it holds. "), 1<<20/15+1)[:1<<20]
	o := protocol.FormatOptions{VolumeUUID: [16]byte{7}, SizeBytes: 1 << 20, JournalBytes: protocol.MinJournalBytes,
		Holds: &protocol.Holding{Lineage: protocol.Lineage{{Generation: protocol.Generation{1, 2}, Epoch: 5}}, CutUnixNanos: snapshotCut.UnixNano()}}
	if err := os.WriteFile(device, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(device, o.NeededBytes()); err != nil {
		t.Fatal(err)
	}
	disk, err := blockdev.OpenFile(device, blockdev.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := protocol.FormatReplica(disk, o); err != nil {
		t.Fatal(err)
	}
	if err := disk.Close(); err != nil {
		t.Fatal(err)
	}
	file, socket := filepath.Join(dir, "c.yaml"), filepath.Join(dir, "run", "s")
	text := fmt.Sprintf("node:\n  name: node-b\n  insecure: plaintext\n  listen: 127.0.0.1:7070\nvolumes:\n  data:\n    role: secondary\n    device: %s\n    peers: [node-a]\n", device)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	c.Node.Listen = "127.0.0.1:0" // whatever port is free
	var log bytes.Buffer
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- agent.Run(ctx, agent.Options{Config: c, Socket: socket, Log: slog.New(slog.NewTextHandler(&log, nil)), System: doctor.Live(), StateDir: dir})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the agent's log:\n%s", log.String())
		}
	})
	g = []string{"--config", file, "--socket", socket}
	awaitCopy(t, g, "open", func(s string) bool { return strings.Contains(s, "disk:Consistent") })
	return g, device, content
}

// awaitCopy asks for the status until it is as wanted.
func awaitCopy(t *testing.T, g []string, what string, ok func(string) bool) {
	t.Helper()
	var out, errs string
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		out, errs, _ = blockferry(t, append(g, "status")...)
		if ok(out) {
			return
		}
	}
	t.Fatalf("not %s: %s%s", what, out, errs)
}

func isHeld(s string) bool { return strings.Contains(s, "held at epoch 5 for a snapshot") }

// The command runs while the replica is held, is told as what, and its output is the output.
func TestSnapshotRunsTheCommand(t *testing.T) {
	g, device, content := copyHere(t)
	image := filepath.Join(t.TempDir(), "image")
	t.Setenv("BLOCKFERRY_REPLICA", "another")
	t.Setenv("MINE", "kept")
	script := `env | grep -e ^BLOCKFERRY_ -e ^MINE= | sort; "$0" "$@"; dd status=none if="$BLOCKFERRY_DEVICE" of="` + image + `" bs=4096 count=$((BLOCKFERRY_SIZE_BYTES / 4096)) skip=$((BLOCKFERRY_OFFSET_BYTES / 4096))`
	t.Setenv("BE_BLOCKFERRY", "1") // what it runs looks at the status
	out, errs, code := blockferry(t, append(g, append([]string{"snapshot", "data", "node-b", "--", "/bin/sh", "-c", script, os.Args[0]}, append(g, "status")...)...)...)
	if code != exit.OK {
		t.Fatalf("%d: %s%s", code, out, errs)
	}
	env, status, _ := strings.Cut(out, "MINE=kept\n")
	want := "BLOCKFERRY_DEVICE=" + device + "\nBLOCKFERRY_EPOCH=5\nBLOCKFERRY_EPOCH_TIME=2026-03-04T05:06:07.08Z\nBLOCKFERRY_GENERATION=01020000000000000000000000000000\n" +
		"BLOCKFERRY_OFFSET_BYTES=0\nBLOCKFERRY_REPLICA=node-b\nBLOCKFERRY_SIZE_BYTES=1048576\nBLOCKFERRY_VOLUME=data\n"
	if env != want {
		t.Errorf("its environment is\n%s, want\n%s", env, want)
	}
	if !isHeld(status) {
		t.Errorf("the status while it ran: %s", status)
	}
	if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the image that it took is another (%v)", err)
	}
	if !strings.Contains(errs, "was held at 01020000000000000000000000000000/5 for") {
		t.Errorf("it says: %s", errs)
	}
	awaitCopy(t, g, "let go", func(s string) bool { return !isHeld(s) })
	if _, errs, code := blockferry(t, append(g, "snapshot", "data", "node-b", "--", "/bin/sh", "-c", "exit 9")...); code != exit.Failed || !strings.Contains(errs, "the command ended with exit status 9") {
		t.Errorf("of a command that fails: %d: %s", code, errs)
	}
	awaitCopy(t, g, "let go", func(s string) bool { return !isHeld(s) }) // by the end of its stream
	if _, errs, code := blockferry(t, append(g, "snapshot", "data", "node-b", "--", "/no/such/program")...); code != exit.Failed || !strings.Contains(errs, "could not be started") {
		t.Errorf("of no command: %d: %s", code, errs)
	}
}

// A command that hangs is ended with what it started, and the replica goes on.
func TestSnapshotLimit(t *testing.T) {
	g, _, _ := copyHere(t)
	pid := filepath.Join(t.TempDir(), "pid")
	_, errs, code := blockferry(t, append(g, "snapshot", "data", "node-b", "--limit", "5s", "--", "/bin/sh", "-c", "sleep 600 & echo $! > "+pid+"; wait")...)
	if code != exit.Timeout || !strings.Contains(errs, "held for 5s, the limit") {
		t.Errorf("%d: %s", code, errs)
	}
	gone(t, pid)
	awaitCopy(t, g, "let go", func(s string) bool { return !isHeld(s) })
}

// gone waits until the process whose number is in a file has ended.
func gone(t *testing.T, file string) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		state, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(state), ") Z ") {
			return
		}
	}
	t.Errorf("process %d goes on", pid)
}

// While one snapshot is taken another is refused; when the command's own process is killed the replica
// goes on at once, long before its limit, and what was run is ended.
func TestSnapshotEndsWithItsCommand(t *testing.T) {
	g, _, _ := copyHere(t)
	pid := filepath.Join(t.TempDir(), "pid")
	cli := exec.Command(os.Args[0], append(g, "snapshot", "data", "node-b", "--limit", "10m", "--", "/bin/sh", "-c", "echo $$ > "+pid+"; exec sleep 600")...)
	cli.Env = append(os.Environ(), "BE_BLOCKFERRY=1")
	if err := cli.Start(); err != nil {
		t.Fatal(err)
	}
	defer cli.Process.Kill() //nolint:errcheck // it may have ended
	awaitCopy(t, g, "held", isHeld)
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if b, err := os.ReadFile(pid); err == nil && len(b) > 0 {
			break
		}
	}
	out, errs, code := blockferry(t, append(g, "snapshot", "data", "node-b", "--", "/bin/echo", "it was run")...)
	if code != exit.Refused || !strings.Contains(errs, "held already") || strings.Contains(out, "it was run") {
		t.Errorf("twice at once: %d: %s%s", code, out, errs)
	}
	if err := cli.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cli.Wait()
	awaitCopy(t, g, "let go", func(s string) bool { return !isHeld(s) })
	gone(t, pid)
	if _, errs, code := blockferry(t, append(g, "snapshot", "data", "node-b", "--", "/bin/true")...); code != exit.OK {
		t.Errorf("after it: %d: %s", code, errs)
	}
}

// What can't be held is refused, and nothing is run.
func TestSnapshotRefused(t *testing.T) {
	g, _, _ := copyHere(t)
	for _, c := range []struct {
		args []string
		code exit.Code
		want string
	}{
		{[]string{"data", "ebs", "--", "/bin/echo", "it was run"}, exit.Usage, "the copy at this node is called 'node-b'"},
		{[]string{"logs", "node-b", "--", "/bin/echo", "it was run"}, exit.Usage, "'logs'"},
		{[]string{"data", "node-b", "/bin/echo", "it was run"}, exit.Usage, "the command comes after '--'"},
		{[]string{"data", "--", "/bin/echo", "it was run"}, exit.Usage, "VOLUME or REPLICA is missing"},
		{[]string{"data", "node-b", "--"}, exit.Usage, "'-- COMMAND' is missing"},
		{[]string{"data", "node-b"}, exit.Usage, "'-- COMMAND' is missing"},
		{[]string{"data", "node-b", "--limit", "1h", "--", "/bin/echo", "it was run"}, exit.Usage, "--limit 1h0m0s: want 1s to 10m0s"},
	} {
		out, errs, code := blockferry(t, append(append([]string{}, g...), append([]string{"snapshot"}, c.args...)...)...)
		if code != c.code || !strings.Contains(errs, c.want) || strings.Contains(out, "it was run") {
			t.Errorf("%v: %d, want %d and '%s': %s%s", c.args, code, c.code, c.want, out, errs)
		}
	}
}

// When the agent ends the command is ended, and what it made does not count.
func TestSnapshotEndsWithTheAgent(t *testing.T) {
	var g []string
	type result struct {
		errs string
		code exit.Code
	}
	done := make(chan result, 1)
	pid := filepath.Join(t.TempDir(), "pid")
	if !t.Run("agent", func(t *testing.T) { // at its end the agent's
		g, _, _ = copyHere(t)
		go func() {
			var o, e bytes.Buffer
			code := run(context.Background(), append(g, "snapshot", "data", "node-b", "--", "/bin/sh", "-c", "echo $$ > "+pid+"; exec sleep 600"), streams{out: &o, err: &e})
			done <- result{e.String(), code}
		}()
		awaitCopy(t, g, "held", isHeld)
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if b, err := os.ReadFile(pid); err == nil && len(b) > 0 {
				break
			}
		}
	}) {
		t.FailNow()
	}
	select {
	case r := <-done:
		if r.code != exit.Unreachable {
			t.Errorf("%d: %s", r.code, r.errs)
		}
	case <-time.After(time.Minute):
		t.Fatal("the command goes on")
	}
	gone(t, pid)
}
