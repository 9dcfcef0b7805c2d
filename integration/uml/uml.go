// Package uml has guests that are User-Mode Linux: a real kernel with
// device-mapper, as an ordinary process, without KVM. It has one CPU, and no BPF
// tracing.
package uml

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"blockferry/integration/vm"
)

// Binary is the guest kernel's name, as the Debian package user-mode-linux
// installs it.
const Binary = "linux.uml"

// noise is what every guest's kernel says, to no use.
var noise = regexp.MustCompile(`(?m)^(SELinux: |mmapper_init - |Failed to initialize ubd device 0 :Couldn't determine|reboot: System halted).*\n`)

// NewHost makes a Host for at most limit guests at once. Their disks are
// /dev/ubda, /dev/ubdb and so on.
func NewHost(limit int) (*vm.Host, error) {
	if _, err := exec.LookPath(Binary); err != nil {
		return nil, fmt.Errorf("%w: install the package user-mode-linux (make deps)", vm.ErrNoGuest)
	}
	return vm.NewHost(vm.Machine{
		Command: command, OneCPU: true, Card: card, OwnClock: ownClock, Modules: "/usr/lib/uml/modules", Meanwhile: wakeOften, Noise: noise,
		Shared: func(b vm.Guest) vm.Mount { return vm.Mount{Kind: "hostfs", From: "hostfs", Data: b.Shared} },
	}, limit, nil)
}

func command(b vm.Guest) []string {
	args := append([]string{
		Binary, "mem=" + b.Spec.Memory, "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "init=" + b.Init,
		// Until init mounts its own /dev, the host's files there are visible.
		"devtmpfs.mount=0", "con=null", "con0=null,fd:1", "quiet", "uml_dir=" + b.Dir + "/",
	}, b.Env...)
	if b.Spec.KernelSilent {
		args = append(args, "loglevel=0")
	}
	for i, disk := range b.Disks {
		args = append(args, fmt.Sprintf("ubd%c=%s", 'a'+i, disk))
	}
	if b.Tap != "" {
		args = append(args, cardArg(b.Tap))
	}
	return args
}

// wakePause is how long a guest may stand still for want of its timer.
const wakePause = 2 * time.Second

// wakeOften keeps a guest from standing still for good. Now and then its
// kernel loses the one signal of its timer: then it idles at full speed, and
// waits for a timer that is not set. Any further signal of that kind gets it
// going again, and to a guest that is well it is one among hundreds.
func wakeOften(ctx context.Context, guest *os.Process) {
	ticker := time.NewTicker(wakePause)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		// Without its handler, as at the very beginning, the signal would end it.
		if ready, err := handles(guest.Pid, syscall.SIGALRM); err != nil {
			return // it has ended
		} else if ready && guest.Signal(syscall.SIGALRM) != nil {
			return
		}
	}
}

// handles says whether a process has a handler for a signal.
func handles(pid int, signal syscall.Signal) (bool, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false, err
	}
	_, after, found := strings.Cut(string(text), "\nSigCgt:")
	mask, _, _ := strings.Cut(after, "\n")
	caught, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64)
	if !found || err != nil {
		return false, fmt.Errorf("process %d: the signals that it catches are '%s'", pid, mask)
	}
	return caught>>(uint(signal)-1)&1 == 1, nil
}
