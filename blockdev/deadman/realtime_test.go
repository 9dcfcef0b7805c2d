package deadman

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// serviceVar makes this test binary a dead-man's service; the value is its socket.
	serviceVar = "BLOCKFERRY_TEST_DEADMAN_SERVICE"
	// threadsVar makes it a process that makes threads once it is real-time.
	threadsVar = "BLOCKFERRY_TEST_THREADS"
	newThreads = 20
)

func serveAt(socket string) error {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	return Serve(context.Background(), l, func(string) bool { return false }, slog.New(slog.NewTextHandler(os.Stderr, nil)), func() { fmt.Println("ready") })
}

// makeThreads makes threads, by threads old and new, says so and stays until its
// standard input ends.
func makeThreads() error {
	if err := goRealTime(); err != nil {
		return err
	}
	made := make(chan struct{})
	for range newThreads {
		go func() {
			runtime.LockOSThread() // another has to run the rest
			made <- struct{}{}
			select {}
		}()
	}
	for range newThreads {
		<-made
	}
	fmt.Println("ready")
	_, _ = os.Stdin.Read(make([]byte, 1))
	return nil
}

// policies are those of a process' threads, with how many have each.
func policies(t *testing.T, pid int) map[string]int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]int{}
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		a, err := unix.SchedGetAttr(tid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		all[fmt.Sprintf("policy %d priority %d", a.Policy, a.Priority)]++
	}
	return all
}

// mustHave fails unless all threads of a process have one policy.
func mustHave(t *testing.T, pid int, policy, priority uint32) {
	t.Helper()
	want := fmt.Sprintf("policy %d priority %d", policy, priority)
	all := policies(t, pid)
	if len(all) != 1 || all[want] == 0 {
		t.Errorf("threads: %v, want %s alone", all, want)
	}
	t.Log(all)
}

// grants says who may make itself real-time, as the words that start it, whatever
// the test itself is.
var grants = []struct {
	name     string
	words    []string
	realTime bool
}{
	{"by CAP_SYS_NICE", []string{"chrt", "--other", "0", "prlimit", "--rtprio=0:0"}, true},
	// As in the dead-man's unit.
	{"by LimitRTPRIO=1", []string{"chrt", "--other", "0", "prlimit", "--rtprio=1:1", "setpriv", "--bounding-set=-sys_nice"}, true},
	{"by nobody", []string{"chrt", "--other", "0", "prlimit", "--rtprio=0:0", "setpriv", "--bounding-set=-sys_nice"}, false},
}

// needRealTime skips where nobody may be real-time.
func needRealTime(t *testing.T) {
	t.Helper()
	if out, err := exec.Command("chrt", "--rr", "1", "true").CombinedOutput(); err != nil {
		t.Skipf("nothing can be real-time here: %v, %s", err, out)
	}
}

// ownProgram is this test binary as something else: with its standard error in a
// file, as started by words.
func ownProgram(t *testing.T, variable, value, log string, words ...string) []string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	line := []string{"/bin/sh", "-c", `exec "$@" 2>"$0"`, log}
	return append(append(line, words...), "/usr/bin/env", variable+"="+value, self)
}

// start runs a program until it says that it is ready. It ends with the test.
func start(t *testing.T, line []string) *exec.Cmd {
	t.Helper()
	c := exec.Command(line[0], line[1:]...)
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	said := make([]byte, 100)
	if n, err := out.Read(said); err != nil || string(said[:n]) != "ready\n" {
		t.Fatalf("it said '%s', %v", said[:n], err)
	}
	return c
}

// Every thread is real-time, and those that come later.
func TestNewThreadsAreRealTime(t *testing.T) {
	needRealTime(t)
	c := start(t, ownProgram(t, threadsVar, "1", os.DevNull))
	mustHave(t, c.Process.Pid, unix.SCHED_RR, 1)
	n := 0
	for _, of := range policies(t, c.Process.Pid) {
		n += of
	}
	if n < newThreads {
		t.Errorf("%d threads: this test checks nothing", n)
	}
}

// A dead-man is real-time, a child of the agent as well as the service, where that
// is permitted; else it serves all the same, and says so.
func TestDeadManIsRealTime(t *testing.T) {
	needRealTime(t)
	for _, g := range grants {
		policy, priority := uint32(unix.SCHED_NORMAL), uint32(0)
		if g.realTime {
			policy, priority = unix.SCHED_RR, 1
		}
		if out, err := exec.Command(g.words[0], append(g.words[1:], "true")...).CombinedOutput(); err != nil {
			t.Logf("%s: not here: %v, %s", g.name, err, out)
			continue
		}
		check := func(t *testing.T, guard *Guard, log string) {
			t.Helper()
			for range 3 { // it serves
				if err := guard.ArmMounts(time.Minute, mustOpen(t, t.TempDir())); err != nil {
					t.Fatal(err)
				}
				if err := guard.Resume(func() error { return errors.New("not called") }); !errors.Is(err, ErrLate) {
					t.Fatalf("nothing was frozen, and the answer is: %v", err)
				}
			}
			mustHave(t, guard.Pid(), policy, priority)
			said, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			if warned := strings.Count(string(said), "no real-time priority"); warned != map[bool]int{false: 1}[g.realTime] {
				t.Errorf("it warns %d times:\n%s", warned, said)
			}
		}
		t.Run("child "+g.name, func(t *testing.T) {
			notes, log := t.TempDir(), filepath.Join(t.TempDir(), "log")
			guard := newTestGuard(t, GuardOptions{Notes: notes, Command: ownProgram(t, deadmanVar, notes, log, g.words...)})
			check(t, guard, log)
		})
		t.Run("service "+g.name, func(t *testing.T) {
			socket, log := filepath.Join(t.TempDir(), "socket"), filepath.Join(t.TempDir(), "log")
			service := start(t, ownProgram(t, serviceVar, socket, log, g.words...))
			guard := newTestGuard(t, GuardOptions{Socket: socket, Command: shell("exit")})
			if guard.Pid() != service.Process.Pid {
				t.Fatalf("dead-man %d, want the service, %d", guard.Pid(), service.Process.Pid)
			}
			check(t, guard, log)
		})
	}
}

// Who starts it may have given it another priority, which it keeps.
func TestDeadManKeepsAGivenPriority(t *testing.T) {
	needRealTime(t)
	notes, log := t.TempDir(), filepath.Join(t.TempDir(), "log")
	guard := newTestGuard(t, GuardOptions{Notes: notes, Command: ownProgram(t, deadmanVar, notes, log, "chrt", "--fifo", "7")})
	if err := guard.ArmMounts(time.Minute, mustOpen(t, notes)); err != nil {
		t.Fatal(err)
	}
	mustHave(t, guard.Pid(), unix.SCHED_FIFO, 7)
	_ = guard.Resume(func() error { return nil })
}

func mustOpen(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
