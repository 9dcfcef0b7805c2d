package hooks

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rig runs shell lines as hooks, in a folder of their own.
type rig struct {
	t      *testing.T
	dir    string
	runner *Runner

	mu  sync.Mutex
	log bytes.Buffer
}

func (r *rig) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.Write(p)
}

func (r *rig) logged() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.log.String()
}

func newRig(t *testing.T, timeout time.Duration, lines map[Event]string) *rig {
	t.Helper()
	r := &rig{t: t, dir: t.TempDir()}
	commands := map[Event][]string{}
	for e, line := range lines {
		commands[e] = []string{"/bin/sh", "-c", line, "hook", r.dir}
	}
	r.runner = New("node-a", "data", commands, timeout, slog.New(slog.NewTextHandler(r, nil)))
	t.Cleanup(r.runner.Close)
	return r
}

func (r *rig) file(name string) string {
	b, _ := os.ReadFile(filepath.Join(r.dir, name))
	return string(b)
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// A hook gets what is documented, what is not known is not there, and nothing of
// the agent's own environment is.
func TestEnvironment(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/run/agent")
	r := newRig(t, time.Minute, map[Event]string{Behind: `env >"$1/env"; pwd >"$1/pwd"; cat >"$1/in"`, AfterPromote: `env >"$1/little"`})
	seconds, n := 12.6, uint64(3<<40)
	err := r.runner.Run(t.Context(), Behind, Info{Device: "/dev/mapper/data", Replica: "far", Peer: "node-b", Generation: "abcd", Epoch: 7,
		BehindSeconds: &seconds, BehindBytes: &n, Reason: "two\nlines\x00 and " + strings.Repeat("é", 2000)})
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(r.file("env"), "\n")
	for _, want := range []string{"BLOCKFERRY_EVENT=behind", "BLOCKFERRY_NODE=node-a", "BLOCKFERRY_VOLUME=data", "BLOCKFERRY_DEVICE=/dev/mapper/data", "BLOCKFERRY_REPLICA=far",
		"BLOCKFERRY_PEER=node-b", "BLOCKFERRY_GENERATION=abcd", "BLOCKFERRY_EPOCH=7", "BLOCKFERRY_BEHIND_SECONDS=13", "BLOCKFERRY_BEHIND_BYTES=3298534883328"} {
		if !slices.Contains(got, want) {
			t.Errorf("no %s in %q", want, got)
		}
	}
	if i := slices.IndexFunc(got, func(s string) bool {
		return strings.HasPrefix(s, "BLOCKFERRY_REASON=two lines  and é") && len(s) <= maxValue+20
	}); i < 0 {
		t.Errorf("the reason in %q", got)
	}
	if strings.Contains(r.file("env"), "NOTIFY_SOCKET") || r.file("pwd") != "/\n" || r.file("in") != "" {
		t.Errorf("it got %q in %q, and %q to read", got, r.file("pwd"), r.file("in"))
	}
	if err := r.runner.Run(t.Context(), AfterPromote, Info{}); err != nil {
		t.Fatal(err)
	}
	for _, absent := range []string{"EPOCH", "BEHIND", "REASON", "PEER", "REPLICA", "GENERATION"} {
		if strings.Contains(r.file("little"), "BLOCKFERRY_"+absent) {
			t.Errorf("BLOCKFERRY_%s is set to nothing: %s", absent, r.file("little"))
		}
	}
}

// What a hook's end means.
func TestStatus(t *testing.T) {
	r := newRig(t, time.Minute, map[Event]string{
		BeforePromote: "echo one; echo 'the other node answers' >&2; exit 3", FencePeer: "kill -9 $$", AfterDemote: "exit 0",
	})
	err := r.runner.Run(t.Context(), BeforePromote, Info{})
	if err == nil || !strings.Contains(err.Error(), "volume 'data': hook before-promote (/bin/sh) ended with exit status 3: the other node answers") {
		t.Errorf("status 3: %v", err)
	}
	if log := r.logged(); !strings.Contains(log, `line=one`) || !strings.Contains(log, `line="the other node answers"`) {
		t.Errorf("what it said is not in the log: %s", log)
	}
	if err := r.runner.Run(t.Context(), FencePeer, Info{}); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("a signal: %v", err)
	}
	if err := r.runner.Run(t.Context(), AfterDemote, Info{}); err != nil {
		t.Errorf("status 0: %v", err)
	}
	if err := r.runner.Run(t.Context(), UnfencePeer, Info{}); err != nil || r.runner.Has(UnfencePeer) {
		t.Errorf("no hook: %v", err)
	}
	missing := New("", "data", map[Event][]string{FencePeer: {"/nowhere/fence"}}, 0, slog.New(slog.DiscardHandler))
	defer missing.Close()
	if err := missing.Run(t.Context(), FencePeer, Info{}); err == nil || !strings.Contains(err.Error(), "/nowhere/fence") {
		t.Errorf("a program that is not there: %v", err)
	}
}

// A hook that hangs is ended with all that it started, whether it heeds SIGTERM or
// not; so is what a hook that has ended leaves behind in its group.
func TestEndsWithItsGroup(t *testing.T) {
	hang := `(trap "" TERM; echo $$ >"$1/%s"; while :; do sleep 0.1; done) & wait`
	r := newRig(t, time.Second, map[Event]string{
		FencePeer: fmt.Sprintf(`trap "echo asked >$1/asked" TERM; `+hang, "a"), UnfencePeer: `sleep 1000 & echo $! >"$1/b"; exit 0`,
		BeforePromote: `sleep 1000 & echo $! >"$1/c"; wait`,
	})
	gone := func(name string) {
		t.Helper()
		pid, err := strconv.Atoi(strings.TrimSpace(r.file(name)))
		if err != nil {
			t.Fatal(err)
		}
		await(t, "ended: "+name, func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
	}
	if err := r.runner.Run(t.Context(), FencePeer, Info{}); err == nil || !strings.Contains(err.Error(), "did not end within 1s") {
		t.Errorf("a hook that hangs: %v", err)
	}
	gone("a")
	if r.file("asked") != "asked\n" {
		t.Error("it was not asked to end first")
	}
	if err := r.runner.Run(t.Context(), UnfencePeer, Info{}); err != nil {
		t.Error(err)
	}
	gone("b")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.runner.Run(ctx, BeforePromote, Info{}) }()
	await(t, "it runs", func() bool { return r.file("c") != "" })
	cancel()
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "was ended") {
		t.Errorf("cancelled: %v", err)
	}
	gone("c")
}

// A hook does not outlive a process that is killed.
func TestEndsWithItsProcess(t *testing.T) {
	const folder = "BLOCKFERRY_TEST_HOOK_FOLDER"
	if dir := os.Getenv(folder); dir != "" { // this is the process
		r := New("", "data", map[Event][]string{FencePeer: {"/bin/sh", "-c", `echo $$ >"$1/pid"; exec sleep 1000`, "hook", dir}}, time.Minute, slog.New(slog.DiscardHandler))
		_ = r.Run(context.Background(), FencePeer, Info{})
		return
	}
	r := &rig{t: t, dir: t.TempDir()}
	process := exec.Command(os.Args[0], "-test.run=^TestEndsWithItsProcess$")
	process.Env = append(os.Environ(), folder+"="+r.dir)
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "it runs", func() bool { return strings.HasSuffix(r.file("pid"), "\n") })
	_ = process.Process.Kill()
	_ = process.Wait()
	pid, _ := strconv.Atoi(strings.TrimSpace(r.file("pid")))
	await(t, "the hook has ended", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || bytes.Contains(stat, []byte(") Z")) // whoever inherits it may not reap it
	})
}

// Of each event one runs at a time; others wait their turn.
func TestOneAtATime(t *testing.T) {
	r := newRig(t, time.Minute, map[Event]string{FencePeer: `mkdir "$1/lock" || echo twice >>"$1/bad"; sleep 0.05; echo ran >>"$1/ran"; rmdir "$1/lock"`})
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() {
			if err := r.runner.Run(t.Context(), FencePeer, Info{}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if r.file("bad") != "" || strings.Count(r.file("ran"), "ran") != 5 {
		t.Errorf("ran %q, at once %q", r.file("ran"), r.file("bad"))
	}
	// Who has waited for its own limit gives up.
	slow := newRig(t, time.Second, map[Event]string{FencePeer: `exec sleep 1000`})
	slow.runner.turns[FencePeer] <- struct{}{}
	if err := slow.runner.Run(t.Context(), FencePeer, Info{}); err == nil || !strings.Contains(err.Error(), "was not run") {
		t.Errorf("after its wait: %v", err)
	}
	<-slow.runner.turns[FencePeer]
}

// Telling does not wait, keeps the newest, and forgets no replica; Close ends what
// runs.
func TestTell(t *testing.T) {
	r := newRig(t, time.Minute, map[Event]string{Behind: `echo $BLOCKFERRY_REPLICA $BLOCKFERRY_EPOCH >>"$1/ran"; while [ ! -e "$1/go" ]; do sleep 0.02; done`, SplitBrain: `echo $$ >"$1/pid"; exec sleep 1000`})
	r.runner.Tell(Behind, Info{Replica: "far", Epoch: 1})
	await(t, "it runs", func() bool { return r.file("ran") != "" })
	for n := range uint64(50) {
		r.runner.Tell(Behind, Info{Replica: "far", Epoch: 2 + n})
	}
	r.runner.Tell(Behind, Info{Replica: "near", Epoch: 9})
	if err := os.WriteFile(filepath.Join(r.dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	await(t, "the others ran", func() bool { return strings.Count(r.file("ran"), "\n") == 3 })
	if got := r.file("ran"); !strings.HasPrefix(got, "far 1\n") || !strings.Contains(got, "far 51\n") || !strings.Contains(got, "near 9\n") {
		t.Errorf("ran %q", got)
	}
	r.runner.Tell(SplitBrain, Info{})
	await(t, "it runs", func() bool { return strings.HasSuffix(r.file("pid"), "\n") })
	begun := time.Now()
	r.runner.Close()
	if took := time.Since(begun); took > 30*time.Second {
		t.Errorf("the end took %v", took)
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(r.file("pid")))
	if unix.Kill(pid, 0) != unix.ESRCH {
		t.Errorf("process %d runs on", pid)
	}
	r.runner.Tell(Behind, Info{Replica: "far", Epoch: 99})
	if strings.Contains(r.file("ran"), "99") {
		t.Error("a hook ran after the end")
	}
}

// Output without end costs neither memory nor the log, and a pipe that something
// outside the group holds open does not keep a hook from ending.
func TestOutput(t *testing.T) {
	r := newRig(t, time.Minute, map[Event]string{AfterPromote: `seq 5000; head -c 3000000 /dev/zero | tr '\0' x; echo; echo end; setsid sh -c 'echo $$ >"$1/pid"; exec sleep 1000' hook "$1" & while [ ! -s "$1/pid" ]; do sleep 0.02; done`})
	begun := time.Now()
	if err := r.runner.Run(t.Context(), AfterPromote, Info{}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 20*time.Second {
		t.Errorf("it took %v", took)
	}
	if n := strings.Count(r.logged(), "hook says"); n > maxLines+1 || !strings.Contains(r.logged(), "lines more") || len(r.logged()) > 100<<10 {
		t.Errorf("%d lines, %d bytes in the log", n, len(r.logged()))
	}
	pid, _ := strconv.Atoi(strings.TrimSpace(r.file("pid")))
	_ = unix.Kill(pid, unix.SIGKILL)
}
