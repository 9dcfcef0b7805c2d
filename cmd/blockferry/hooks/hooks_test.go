package hooks

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
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

// pid is the number that a hook wrote.
func (r *rig) pid(name string) int {
	r.t.Helper()
	pid, err := strconv.Atoi(strings.TrimSpace(r.file(name)))
	if err != nil {
		r.t.Fatal(err)
	}
	return pid
}

// dead says that a process has ended; whoever inherits it may not reap it.
func dead(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || bytes.Contains(stat, []byte(") Z"))
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
		BehindSeconds: &seconds, BehindBytes: &n, Reason: "two\nlines\x00 an\xffd " + strings.Repeat("é", 2000)})
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
	if got := oneLine("a" + strings.Repeat("\xff", maxValue-1)); got != "a" { // each would become three bytes
		t.Errorf("%d bytes of what is no text", len(got))
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
	short := newRig(t, 3*time.Second, map[Event]string{FencePeer: fmt.Sprintf(`trap "echo asked >$1/asked" TERM; `+hang, "a")})
	if err := short.runner.Run(t.Context(), FencePeer, Info{}); err == nil || !strings.Contains(err.Error(), "did not end within 3s") {
		t.Errorf("a hook that hangs: %v", err)
	}
	await(t, "ended: a", func() bool { return dead(short.pid("a")) })
	if short.file("asked") != "asked\n" {
		t.Error("it was not asked to end first")
	}
	r := newRig(t, time.Minute, map[Event]string{
		UnfencePeer: `sleep 1000 & echo $! >"$1/b"; exit 0`, BeforePromote: `sleep 1000 & echo $! >"$1/c"; wait`,
	})
	gone := func(name string) {
		t.Helper()
		await(t, "ended: "+name, func() bool { return dead(r.pid(name)) })
	}
	if err := r.runner.Run(t.Context(), UnfencePeer, Info{}); err != nil {
		t.Error(err)
	}
	gone("b")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.runner.Run(ctx, BeforePromote, Info{}) }()
	await(t, "it runs", func() bool { return strings.HasSuffix(r.file("c"), "\n") })
	cancel()
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "was ended") {
		t.Errorf("cancelled: %v", err)
	}
	gone("c")
}

// A hook does not outlive a process that is killed. What the hook has started does:
// who runs hooks may not rely on more than is documented.
func TestEndsWithItsProcess(t *testing.T) {
	const folder = "BLOCKFERRY_TEST_HOOK_FOLDER"
	if dir := os.Getenv(folder); dir != "" { // this is the process
		r := New("", "data", map[Event][]string{FencePeer: {"/bin/sh", "-c", `sleep 1000 & echo $! >"$1/child"; echo $$ >"$1/pid"; wait`, "hook", dir}}, time.Minute, slog.New(slog.DiscardHandler))
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
	child := r.pid("child")
	defer unix.Kill(child, unix.SIGKILL)
	await(t, "the hook has ended", func() bool { return dead(r.pid("pid")) })
	if dead(child) {
		t.Error("what it started was killed, too: docs/hooks.md says otherwise")
	}
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
	if pid := r.pid("pid"); !dead(pid) {
		t.Errorf("process %d runs on", pid)
	}
	r.runner.Tell(Behind, Info{Replica: "far", Epoch: 99})
	r.runner.mu.Lock()
	if len(r.runner.told)+len(r.runner.active) > 0 {
		t.Errorf("after the end it keeps %v, %v", r.runner.told, r.runner.active)
	}
	r.runner.mu.Unlock()
	if err := r.runner.Run(t.Context(), Behind, Info{}); err == nil || !strings.Contains(err.Error(), "was not run") {
		t.Errorf("a hook run after the end: %v", err)
	}
}

// The end waits for what Run runs, too.
func TestCloseEndsRun(t *testing.T) {
	r := newRig(t, time.Minute, map[Event]string{BeforePromote: `trap "" TERM; echo $$ >"$1/pid"; while :; do sleep 0.1; done`})
	ended := make(chan error, 1)
	go func() { ended <- r.runner.Run(t.Context(), BeforePromote, Info{}) }()
	await(t, "it runs", func() bool { return strings.HasSuffix(r.file("pid"), "\n") })
	r.runner.Close()
	if pid := r.pid("pid"); !dead(pid) {
		t.Errorf("process %d runs on", pid)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "was ended") {
		t.Errorf("it was closed: %v", err)
	}
}

// Whose turn comes late, because another replica's hook hangs until its time is
// over, is told all the same.
func TestToldAfterOneThatHangs(t *testing.T) {
	r := newRig(t, time.Second, map[Event]string{Behind: `trap "" TERM; echo $BLOCKFERRY_REPLICA >>"$1/ran"; [ $BLOCKFERRY_REPLICA = near ] || while :; do sleep 0.1; done`})
	r.runner.Tell(Behind, Info{Replica: "far"})
	await(t, "the first runs", func() bool { return r.file("ran") == "far\n" })
	r.runner.Tell(Behind, Info{Replica: "near"})
	await(t, "the second ran", func() bool { return r.file("ran") == "far\nnear\n" })
	// What the end keeps from being run is in the log.
	r.runner.Tell(Behind, Info{Replica: "far"})
	await(t, "it runs", func() bool { return strings.Count(r.file("ran"), "far") == 2 })
	r.runner.Tell(Behind, Info{Replica: "near"})
	await(t, "the other waits", func() bool {
		r.runner.mu.Lock()
		defer r.runner.mu.Unlock()
		return len(r.runner.active) == 2 && len(r.runner.told) == 0
	})
	r.runner.Close()
	if log := r.logged(); !strings.Contains(log, "was not run") || strings.Count(r.file("ran"), "near") > 1 {
		t.Errorf("ran %q, logged %s", r.file("ran"), log)
	}
}

// A hook that not even SIGKILL ends, as in a disk that does not answer, keeps
// nobody waiting; until it is gone no other of its event runs. Here another process
// that traces it keeps its end to itself.
func TestStuckInTheKernel(t *testing.T) {
	const traced = "BLOCKFERRY_TEST_TRACED"
	if s := os.Getenv(traced); s != "" { // this is that process
		runtime.LockOSThread()
		pid, _ := strconv.Atoi(s)
		if err := unix.PtraceSeize(pid); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("traced")
		_, _ = os.Stdin.Read(make([]byte, 1)) // until it is closed
		os.Exit(0)
	}
	r := newRig(t, time.Minute, map[Event]string{FencePeer: `if [ -e "$1/pid" ]; then exit 0; fi; echo $$ >"$1/pid"; exec sleep 1000`})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- r.runner.Run(ctx, FencePeer, Info{}) }()
	await(t, "it runs", func() bool { return strings.HasSuffix(r.file("pid"), "\n") })
	tracer := exec.Command(os.Args[0], "-test.run=^TestStuckInTheKernel$")
	tracer.Env = append(os.Environ(), traced+"="+strings.TrimSpace(r.file("pid")))
	in, _ := tracer.StdinPipe()
	out, _ := tracer.StdoutPipe()
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	release := sync.OnceFunc(func() { _ = in.Close(); _ = tracer.Wait() })
	defer release()
	if line, _ := bufio.NewReader(out).ReadString('\n'); line != "traced\n" {
		t.Skipf("no process may be traced here: %s", line)
	}
	cancel()
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("SIGKILL did not end it, process %d", r.pid("pid"))) {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it is waited for without end")
	}
	if len(r.runner.turns[FencePeer]) != 1 {
		t.Error("the next one may run beside it")
	}
	release()
	if err := r.runner.Run(t.Context(), FencePeer, Info{}); err != nil {
		t.Errorf("after it is gone: %v", err)
	}
}

// A hook has neither the agent's umask nor its shelter when memory is short.
func TestNoShelter(t *testing.T) {
	defer unix.Umask(unix.Umask(0o077))
	const own = "/proc/self/oom_score_adj"
	if before, err := os.ReadFile(own); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(own, []byte("-100"), 0); err != nil {
		t.Logf("of the umask only: %v", err)
	} else {
		defer os.WriteFile(own, before, 0)
	}
	r := newRig(t, time.Minute, map[Event]string{AfterPromote: `umask >"$1/umask"; n=0; until grep -qx 0 /proc/$$/oom_score_adj || [ $n = 50 ]; do sleep 0.1; n=$((n+1)); done; cat /proc/$$/oom_score_adj >"$1/adj"`})
	if err := r.runner.Run(t.Context(), AfterPromote, Info{}); err != nil {
		t.Fatal(err)
	}
	if r.file("umask") != "0022\n" || strings.HasPrefix(r.file("adj"), "-") {
		t.Errorf("its umask is %q, its score %q", r.file("umask"), r.file("adj"))
	}
	if now := unix.Umask(0o077); now != 0o077 {
		t.Errorf("the agent's umask became %o", now)
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
