package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/dm"
	"blockferry/cmd/blockferry/status"
)

// The dead-man's tests with the built binary: agent and dead-man's service in
// a control group each, as their units have them, and a volume whose base is read
// from a slow disk, so that a cut's window lasts.

const cgroupRoot = "/sys/fs/cgroup"

// defaultStall is the default of stall-limit. Beyond it a device may stay
// suspended for as long as a busy guest takes to run who resumes.
const (
	defaultStall = time.Second
	stallRoom    = time.Second
	often        = 300 * time.Millisecond // from one cut to the next
)

type deadManTest struct {
	*cli
	t       *testing.T
	ctl     *dm.Control
	socket  string
	service *exec.Cmd
	history history
	writer  *writer
	spans   *suspendWatch
	reads   *lateReads
}

// deadManGuest runs fn on a volume that is up to date and written to; then it
// checks that nothing was lost and nothing void was committed.
func deadManGuest(t *testing.T, stallLimit, interval time.Duration, withService bool, fn func(d *deadManTest)) {
	disks := []disk{{Size: 192 << 20}, {Size: 192 << 20}}
	inGuest(t, guest{Disks: disks, Modules: []string{"dm-delay"}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		if err := unix.Mount("cgroup2", cgroupRoot, "cgroup2", 0, ""); err != nil {
			t.Fatal(err)
		}
		reads := newLateReads(t, "slow")
		config := fmt.Sprintf("volumes:\n  data:\n    device: %s\n    size: 32MiB\n    interval: %s\n    stall-limit: %s\n    replicas:\n      ebs:\n        device: %s\n",
			reads.disk, interval, stallLimit, ubd(1))
		d := &deadManTest{cli: newCLI(t, config), t: t, ctl: mapper(t), socket: filepath.Join(t.TempDir(), "dead-man.sock"), reads: reads}
		d.inside = d.inGroup("agent")
		d.agentFlags = []string{"--dead-man-socket", d.socket}
		d.must(t, "create")
		if withService {
			d.startService()
		}
		d.start(t)
		v := d.await(t, "up to date", time.Minute, upToDate)
		d.history = history{Seed: 21, Size: sectors(t, v.Path) * sector, MaxBytes: 64 << 10, Span: 4 << 20, Pause: 5 * time.Millisecond}
		d.writer = startWriter(t, v.Path, d.history, 1)
		t.Cleanup(func() { // should all of it have failed; the writer's end waits for it
			if info, err := d.ctl.Info("data"); err == nil && info.Suspended {
				cleanup("dmsetup", "resume", "data")
			}
		})
		d.writer.awaitWrites(t, 50)
		d.spans = watchSuspends(t, "data")
		fn(d)
		reads.end()
		d.finish()
	})
}

// inGroup is how a program is started in a control group.
func (d *deadManTest) inGroup(name string) []string {
	d.t.Helper()
	dir := filepath.Join(cgroupRoot, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		d.t.Fatal(err)
	}
	return []string{"/bin/sh", "-c", `echo $$ >` + dir + `/cgroup.procs && exec "$0" "$@"`}
}

// startService starts the dead-man's service in its own control group.
func (d *deadManTest) startService() {
	d.t.Helper()
	line := append(d.inGroup("dead-man"), d.binary, "dead-man", "--listen", d.socket)
	s := exec.Command(line[0], line[1:]...)
	s.Stdout, s.Stderr = d.log, d.log
	before := d.count("dead-man serves")
	if err := s.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = s.Process.Kill(); _ = s.Wait() })
	d.service = s
	d.awaitLog("dead-man serves", before+1)
}

// count says how many lines of the log hold all words.
func (d *deadManTest) count(words ...string) int {
	n := 0
	for line := range strings.Lines(d.logText(d.t)) {
		all := true
		for _, w := range words {
			all = all && strings.Contains(line, w)
		}
		if all {
			n++
		}
	}
	return n
}

func (d *deadManTest) awaitLog(word string, n int) {
	d.t.Helper()
	for deadline := time.Now().Add(40 * time.Second); d.count(word) < n; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			d.t.Fatalf("the log does not say '%s' %d times", word, n)
		}
	}
}

// voidCut is what the log says of a cut that failed.
const voidCut = "cut failed; its epoch is void"

// awaitCut waits for a cut that is whole.
func (d *deadManTest) awaitCut() {
	d.t.Helper()
	d.awaitLog(" msg=cut ", d.count(" msg=cut ")+1)
}

// pid is the dead-man that the agent last said it has.
func (d *deadManTest) pid() int {
	d.t.Helper()
	all := regexp.MustCompile(`the dead-man's service (?:is not there|looks after).* pid=(\d+)`).FindAllStringSubmatch(d.logText(d.t), -1)
	if len(all) == 0 {
		d.t.Fatal("the agent names no dead-man")
	}
	pid, _ := strconv.Atoi(all[len(all)-1][1])
	return pid
}

// inWindow sends a signal while the volume is suspended and returns how long
// it stayed so.
func (d *deadManTest) inWindow(pid int, signal syscall.Signal) time.Duration {
	d.t.Helper()
	awaitSuspended(d.t, d.ctl, "data", true, 20*time.Second)
	if err := unix.Kill(pid, signal); err != nil {
		d.t.Fatal(err)
	}
	return awaitSuspended(d.t, d.ctl, "data", false, 20*time.Second)
}

// finish stops the writer, checks that all it wrote is on the replica, that no
// copy but the first was a full one, and that no void epoch was committed.
func (d *deadManTest) finish() {
	t := d.t
	t.Helper()
	last := d.writer.stop(t)
	d.must(t, "sync", "--timeout", "60s")
	d.must(t, "verify")
	text := d.logText(d.t)
	if full, compared := plans(text, "full"), plans(text, "compare"); full != 1 || compared != 0 {
		t.Errorf("not incremental: %d full copies, %d comparisons", full, compared)
	}
	void := regexp.MustCompile(voidCut+`.* epoch=(\d+) `).FindAllStringSubmatch(text, -1)
	for _, v := range void {
		if strings.Contains(text, "{Epoch:"+v[1]+" ") {
			t.Errorf("epoch %s is void and was committed", v[1])
		}
	}
	d.must(t, "down")
	if err := d.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	d.must(t, "recover", ubd(1))
	judgeDevice(t, ubd(1), d.history, last, last)
	t.Logf("suspended %d times, %s in the longest, p50 %s; %d cuts, %d void", d.spans.count(), d.spans.longest(), d.spans.median(), d.count(" msg=cut "), len(void))
}

// mustHold fails if the device was ever suspended for longer than promised.
func (d *deadManTest) mustHold() {
	d.t.Helper()
	if n := d.spans.longest(); n > defaultStall+stallRoom {
		d.t.Errorf("suspended for %s, the limit is %s", n, defaultStall)
	}
}

// Promise: an agent that is stopped while the volume is suspended stops
// writers no longer than the stall limit, and its cut is void.
func TestDeadManAgentStopped(t *testing.T) {
	deadManGuest(t, defaultStall, often, true, func(d *deadManTest) {
		d.reads.begin(120, "data-base")
		for hits, tries := 0, 0; hits < 3; tries++ {
			if tries == 20 {
				t.Fatal("the window was never hit")
			}
			void := d.count(voidCut, "stall limit passed")
			took := d.inWindow(d.agent.Process.Pid, unix.SIGSTOP)
			d.writer.awaitWrites(t, 20) // the agent is still stopped
			if took > defaultStall/2 {
				// Long after the deadline it may suspend once more.
				time.Sleep(200 * time.Millisecond)
			}
			if err := d.agent.Process.Signal(unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			if took < defaultStall/2 {
				continue // it had asked for the resume already
			}
			hits++
			t.Logf("resumed %s after the agent was stopped", took)
			d.awaitLog("stall limit passed", void+1)
			d.awaitCut()
		}
		d.mustHold()
	})
}

// Promise: whoever kills the agent's whole control group does not kill the
// dead-man, which resumes at once. The next agent goes on where that one was.
func TestDeadManAgentsGroupKilled(t *testing.T) {
	// A limit that is no help.
	deadManGuest(t, 30*time.Second, often, true, func(d *deadManTest) {
		d.reads.begin(120, "data-base")
		for range 3 {
			d.awaitCut()
			for deadline := time.Now().Add(time.Minute); d.pid() != d.service.Process.Pid; d.awaitCut() {
				// On a machine so busy that the service did not answer in time
				// the agent has a child for a while, in its own group.
				if time.Now().After(deadline) {
					t.Fatal("the service does not look after suspends")
				}
			}
			awaitSuspended(t, d.ctl, "data", true, 20*time.Second)
			if err := os.WriteFile(filepath.Join(cgroupRoot, "agent", "cgroup.kill"), []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
			took := awaitSuspended(t, d.ctl, "data", false, 20*time.Second)
			<-d.ended
			d.cli.agent = nil
			d.writer.awaitWrites(t, 5)
			if took > 5*time.Second { // not at the limit
				t.Errorf("resumed %s after the agent's group was killed", took)
			}
			t.Logf("resumed %s after the agent's group was killed", took)
			d.start(t)
			d.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		}
	})
}

// Promise: a dead-man that is killed while the volume is suspended stops
// nobody: the agent resumes, the cut is void, the next has another dead-man.
func TestDeadManKilled(t *testing.T) {
	// The next cut, which would end a suspend that was left, comes late.
	deadManGuest(t, defaultStall, 2500*time.Millisecond, false, func(d *deadManTest) {
		d.reads.begin(120, "data-base")
		if d.count("level=WARN", "the dead-man's service is not there", "systemctl") != 1 {
			t.Error("no warning that the service is missing")
		}
		kill := func(what string) {
			t.Helper()
			first := d.pid()
			d.awaitCut()
			for void, tries := d.count(voidCut, "the dead-man is gone"), 0; d.count(voidCut, "the dead-man is gone") == void; tries++ {
				if tries == 20 {
					t.Fatal("the window was never hit")
				}
				first = d.pid()
				t.Logf("%s: resumed %s after the dead-man was killed", what, d.inWindow(first, unix.SIGKILL))
				d.writer.awaitWrites(t, 5)
				d.awaitCut()
			}
			if d.pid() == first {
				t.Errorf("%s: the same dead-man, %d", what, first)
			}
		}
		kill("the agent's own")
		d.startService()
		d.awaitLog("the dead-man's service looks after", 1)
		kill("the service")
		_ = d.service.Wait()
		if d.count("level=WARN", "the dead-man's service is not there") < 2 {
			t.Error("no warning that the service is gone")
		}
		d.startService()
		d.awaitLog("the dead-man's service looks after", 2)
		d.mustHold()

		// Both at once, the agent stopped: the next service finds the volume.
		d.awaitCut()
		awaitSuspended(t, d.ctl, "data", true, 20*time.Second)
		d.agent.Process.Signal(unix.SIGSTOP)
		d.service.Process.Kill()
		_ = d.service.Wait()
		d.startService()
		awaitSuspended(t, d.ctl, "data", false, time.Second)
		d.writer.awaitWrites(t, 5)
		d.agent.Process.Signal(unix.SIGCONT)
		d.awaitCut()
	})
}

// Promise: the agent does not wait for a dead-man that hangs.
func TestDeadManStopped(t *testing.T) {
	deadManGuest(t, defaultStall, often, true, func(d *deadManTest) {
		d.reads.begin(120, "data-base")
		service := d.service.Process.Pid
		for tries := 1; ; tries++ {
			gone := d.count(voidCut, "the dead-man is gone")
			took := d.inWindow(service, unix.SIGSTOP)
			t.Logf("resumed %s after the dead-man was stopped", took)
			d.awaitLog("the dead-man's service is not there", tries)
			d.awaitCut() // with one of its own
			if n := d.count(voidCut, "the dead-man is gone") - gone; n != 1 || d.pid() == service {
				t.Errorf("%d cuts are void; the next had dead-man %d, the one stopped is %d", n, d.pid(), service)
			}
			// Woken in the middle of another's window it does what it was
			// asked to do long ago.
			awaitSuspended(t, d.ctl, "data", true, 20*time.Second)
			if err := unix.Kill(service, unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			d.awaitLog("the dead-man's service looks after", tries+1)
			d.awaitCut()
			if d.count(voidCut, "somebody else resumed it") > 0 {
				break
			}
			if tries == 3 {
				t.Fatal("whoever woke up in the window was not noticed")
			}
		}
		d.mustHold()
	})
}

// lockedAndSpared checks that the service does not depend on a disk, on the memory
// that others leave, or on the CPUs that they leave.
func (d *deadManTest) lockedAndSpared() {
	d.t.Helper()
	proc := fmt.Sprintf("/proc/%d/", d.service.Process.Pid)
	text, err := os.ReadFile(proc + "status")
	if err != nil {
		d.t.Fatal(err)
	}
	adjust, err := os.ReadFile(proc + "oom_score_adj")
	if err != nil {
		d.t.Fatal(err)
	}
	kib := func(key string) int {
		m := regexp.MustCompile(key + `:\s+(\d+) kB`).FindSubmatch(text)
		if m == nil {
			d.t.Fatalf("no %s in %s", key, text)
		}
		n, _ := strconv.Atoi(string(m[1]))
		return n
	}
	resident, locked := kib("VmRSS"), kib("VmLck")
	d.t.Logf("the dead-man's service: %d KiB resident, %d KiB of addresses locked, oom_score_adj %s", resident, locked, strings.TrimSpace(string(adjust)))
	if locked < resident || resident > 64<<10 || strings.TrimSpace(string(adjust)) != "-1000" {
		d.t.Error("its memory is not locked or too large, or the kernel may take it")
	}
	realTime(d.t, d.service.Process.Pid)
}

// realTime fails unless every thread of a process is real-time.
func realTime(t *testing.T, pid int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("no threads of process %d: %v", pid, err)
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(filepath.Base(task))
		if err != nil {
			t.Fatal(err)
		}
		a, err := unix.SchedGetAttr(tid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil || a.Policy != unix.SCHED_RR || a.Priority != 1 {
			t.Errorf("thread %d of dead-man %d: %+v, %v, want SCHED_RR, priority 1", tid, pid, a, err)
		}
	}
}

// The dead-man's service can be restarted at any time: a cut under way is
// waited for, and the next has the new one.
func TestDeadManRestarted(t *testing.T) {
	// A busy guest must not void a cut here.
	deadManGuest(t, 20*time.Second, often, true, func(d *deadManTest) {
		d.reads.begin(120, "data-base")
		d.lockedAndSpared()
		void := d.count(voidCut)
		for i := range 6 {
			d.awaitCut()
			if i%2 == 0 {
				awaitSuspended(t, d.ctl, "data", true, 20*time.Second)
			}
			old := d.service
			for range 2 { // a second signal makes it no more impatient
				if err := old.Process.Signal(unix.SIGTERM); err != nil {
					t.Fatal(err)
				}
				time.Sleep(20 * time.Millisecond)
				if i%2 != 0 {
					break // it has ended
				}
			}
			if err := old.Wait(); err != nil {
				t.Errorf("the service ended with %v", err)
			}
			d.startService()
			d.awaitLog(fmt.Sprint("the dead-man's service looks after suspends\" volume=data socket=", d.socket, " pid=", d.service.Process.Pid), 1)
			d.awaitCut()
		}
		// The next service may find a window under way that the agent's own
		// dead-man looks after.
		if err := d.service.Process.Signal(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		_ = d.service.Wait()
		d.reads.begin(800, "data-base")
		d.awaitCut()
		awaitSuspended(t, d.ctl, "data", true, 20*time.Second)
		d.startService()
		if info, err := d.ctl.Info("data"); err != nil || !info.Suspended {
			t.Logf("the window ended while the service began: %v", err)
		}
		d.reads.end()
		d.awaitCut()
		if n := d.count(voidCut) - void; n != 0 {
			t.Errorf("%d cuts are void", n)
		}
	})
}
