package uml

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"blockferry/integration/vm"
)

// hostVar makes this test binary a Host with a guest that does not end by itself.
const hostVar = "BLOCKFERRY_TEST_HOST"

func TestMain(m *testing.M) {
	vm.Init()
	if os.Getenv(serveVar) != "" {
		fmt.Fprintln(os.Stderr, serveTests())
		os.Exit(1)
	}
	if os.Getenv(hostVar) != "" {
		h, err := NewHost(1)
		if err == nil {
			fmt.Println(h.Dir())
			_, err = h.Run(context.Background(), vm.Spec{Args: []string{"/bin/sh", "-c", "echo up; exec sleep 1000"}, Console: os.Stdout})
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func testHost(t *testing.T) *vm.Host {
	t.Helper()
	t.Parallel()
	h, err := NewHost(1)
	if errors.Is(err, vm.ErrNoGuest) && os.Getenv("BLOCKFERRY_REQUIRE_GUEST") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// A guest is woken by the signal of its timer, which must not reach a process
// that has no handler for it.
func TestWakeOften(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	begin := func(script string) *exec.Cmd {
		cmd := exec.Command("/bin/bash", "-c", script)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		go wakeOften(ctx, cmd.Process)
		return cmd
	}
	waits := begin("trap 'exit 7' ALRM; while :; do sleep 0.1; done")
	early := begin("exec sleep 6")
	defer cancel()
	timer := time.AfterFunc(20*time.Second, func() { _ = waits.Process.Kill() })
	defer timer.Stop()
	if err := waits.Wait(); waits.ProcessState.ExitCode() != 7 {
		t.Errorf("a process that waits for its timer's signal: %v", err)
	}
	time.Sleep(wakePause)
	_ = early.Process.Kill()
	if err := early.Wait(); early.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("a process without a handler: %v", err)
	}
}

func TestRunReportsTheProgramsExitStatus(t *testing.T) {
	h := testHost(t)
	result, err := h.Run(context.Background(), vm.Spec{Args: []string{"/bin/sh", "-c", "echo hello; exit 7"}})
	if err != nil || result.Exit != 7 || !strings.Contains(result.Output, "hello\n") || result.Retried {
		t.Errorf("%+v, %v", result, err)
	}
	if result, err := h.Run(context.Background(), vm.Spec{Args: []string{"/bin/sh", "-c", "kill -KILL $$"}}); err != nil || result.Exit == 0 {
		t.Errorf("killed: %+v, %v", result, err)
	}
}

func TestRunTriesAGuestWithoutAnEndMarkOnceMore(t *testing.T) {
	h := testHost(t)
	result, err := h.Run(context.Background(), vm.Spec{Args: []string{"/bin/sh", "-c", "echo attempt; sleep 0.3; echo c > /proc/sysrq-trigger"}})
	if !errors.Is(err, vm.ErrNoEnd) || !result.Retried || strings.Count(result.Output, "attempt\n") != 2 {
		t.Errorf("%+v, %v", result, err)
	}
	if left, _ := os.ReadDir(h.Dir()); len(left) != 1 { // its lock
		t.Errorf("left behind: %v", left)
	}
}

// Of the processes that a guest is made of none outlives its Host, not even when
// that is killed.
func TestGuestEndsWithItsHost(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root makes a PID namespace")
	}
	testHost(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	host := exec.Command(self)
	host.Env = append(os.Environ(), hostVar+"=1")
	host.Stderr = os.Stderr
	out, err := host.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	kill := sync.OnceFunc(func() { _ = host.Process.Kill(); _ = host.Wait() })
	defer kill()
	timer := time.AfterFunc(2*time.Minute, func() { _ = host.Process.Kill() })
	defer timer.Stop()
	lines := bufio.NewScanner(out)
	lines.Scan()
	dir := lines.Text()
	for lines.Scan() && strings.TrimSpace(lines.Text()) != "up" {
	}
	processes := func() (found []string) {
		all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, path := range all {
			if text, _ := os.ReadFile(path); strings.Contains(string(text), dir+"/") {
				found = append(found, filepath.Dir(path))
			}
		}
		return found
	}
	if dir == "" || len(processes()) < 2 {
		t.Fatalf("a guest in '%s' of the processes %v: this test checks nothing", dir, processes())
	}
	kill()
	defer os.RemoveAll(dir)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left := processes()
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left: %v", left)
		}
	}
}

// A program that waits for the kernel for good, as one does that writes to a
// device left suspended, is a finding and not tried again.
func TestRunGivesUpOnAStuckProgram(t *testing.T) {
	h := testHost(t)
	result, err := h.Run(context.Background(), vm.Spec{
		Timeout: time.Second, Disks: []vm.Disk{{Size: 1 << 20}}, Modules: []string{"dm-mod"},
		Args: []string{"/bin/sh", "-c", "dmsetup create x --table '0 2048 linear /dev/ubda 0' && dmsetup suspend x && exec dd if=/dev/zero of=/dev/mapper/x bs=4k count=1 oflag=direct"},
	})
	if err == nil || errors.Is(err, vm.ErrNoEnd) || result.Retried || !strings.Contains(result.Output, "task:dd") {
		t.Errorf("%+v, %v", result, err)
	}
}

// A disk that such a guest can't have is refused, and nothing is left of it.
func TestRunRefusesADisk(t *testing.T) {
	h := testHost(t)
	result, err := h.Run(context.Background(), vm.Spec{Name: "x", Disks: []vm.Disk{{Size: 1 << 20, NVMe: true}}, Args: []string{"/bin/true"}})
	if err == nil || errors.Is(err, vm.ErrNoEnd) || result.Retried || !strings.Contains(err.Error(), "guest x") {
		t.Errorf("%+v, %v", result, err)
	}
	if left, err := filepath.Glob(h.Dir() + "/guest-*"); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	h := testHost(t)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	began := time.Now()
	result, err := h.Run(ctx, vm.Spec{Args: []string{"/bin/sleep", "1000"}})
	if err == nil || result.Retried || time.Since(began) > 30*time.Second {
		t.Errorf("%+v, %v after %v", result, err, time.Since(began))
	}
}

// A service is stopped in order before the guest boots again.
func TestSystemdRunsTheProgram(t *testing.T) {
	h := testHost(t)
	result, err := h.Run(context.Background(), vm.Spec{Systemd: true, Disks: []vm.Disk{{Size: 1 << 20}},
		Files: map[string]string{
			"/etc/systemd/system/thing.service":             "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/usr/bin/say begun\nExecStop=/usr/bin/say ended\n",
			"/etc/systemd/system/guest.target.d/thing.conf": "[Unit]\nWants=thing.service\n",
		},
		Links: map[string]string{"/usr/bin/say": "/bin/echo"},
		Args: []string{"/bin/sh", "-c", "systemctl is-active systemd-udevd.service; udevadm settle; udevadm info /dev/ubda; " +
			"test $BLOCKFERRY_GUEST_BOOT = 1 && exit 7; echo '{\"reboot\":true}' > /run/guest/end.json; sync; systemctl poweroff; sleep 100"}})
	if err != nil || result.Exit != 7 || result.Retried || strings.Count(result.Output, "active\n") != 2 || !strings.Contains(result.Output, "DEVTYPE=disk") ||
		strings.Count(result.Output, "begun\n") != 2 || strings.Count(result.Output, "ended\n") != 1 {
		t.Errorf("%+v, %v", result, err)
	}
	t.Log(result.Elapsed)
}
