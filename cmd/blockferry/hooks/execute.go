package hooks

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// umask is the usual one of system services, not the agent's.
	umask = 0o022
	// grace is between SIGTERM and SIGKILL.
	grace = 2 * time.Second
	// maxLines of a hook are logged.
	maxLines = 200
	// Drain is how long output is read on after a command's group was ended: what
	// left the group may hold the pipe.
	Drain = time.Second
	// stuckAfter SIGKILL a command that has not ended is waited for no longer: a
	// disk that does not answer can keep it in the kernel for ever.
	stuckAfter = 5 * time.Second
)

// execute runs a command in a process group of its own, which is killed when the
// command ends: at the latest after timeout, or when ctx ends. When this process is
// killed the kernel kills the command, not what that has started. say is told each
// line it writes, to either output; last is the last of them. The error says how it
// ended, nil: with status 0 and in time; or that SIGKILL did not end it. gone is
// called once it has ended, perhaps long after that.
func execute(ctx context.Context, command, env []string, timeout time.Duration, say func(string), gone func()) (last string, err error) {
	out, in, err := os.Pipe()
	if err != nil {
		gone()
		return "", err
	}
	read := make(chan string, 1)
	go func() { read <- lines(out, say) }()
	ended := make(chan error, 1)
	go func() {
		// The kernel ends the command with the thread that started it. That ends
		// with this goroutine: nothing else may run with its umask.
		runtime.LockOSThread()
		ended <- group(ctx, command, env, timeout, in, gone)
	}()
	err = <-ended
	_ = in.Close()
	_ = out.SetReadDeadline(time.Now().Add(Drain))
	last = <-read
	_ = out.Close()
	return last, err
}

// lines hands on what is read until nobody can write any more.
func lines(r io.Reader, say func(string)) (last string) {
	b := bufio.NewReaderSize(r, 4*maxValue)
	for n := 0; ; n++ {
		raw, prefix, err := b.ReadLine()
		if err != nil {
			if n > maxLines {
				say(fmt.Sprintf("... %d lines more", n-maxLines))
			}
			return last
		}
		for prefix && err == nil { // the rest of what is too long
			_, prefix, err = b.ReadLine()
		}
		if last = oneLine(string(raw)); n < maxLines {
			say(last)
		}
	}
}

// group starts the command and waits until it has ended and its group was killed;
// the thread is its own.
func group(ctx context.Context, command, env []string, timeout time.Duration, out *os.File, gone func()) error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		gone()
		return fmt.Errorf("could not be started: a umask of its own: %w", err)
	}
	unix.Umask(umask)
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = env, "/", out, out
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("did not end within %v", timeout))
	defer cancel()
	err := RunGroup(ctx, cmd, gone)
	if errors.Is(err, errStuck) {
		err = fmt.Errorf("%w; no other hook of this event runs before it has ended", err)
	}
	return err
}

// errStuck is a command that not even SIGKILL has ended.
var errStuck = errors.New("SIGKILL did not end it")

// RunGroup runs a command in a process group of its own, which is killed when the command
// ends, or with two seconds' notice (SIGTERM) when ctx does. The error says how it ended, with ctx's cause if that
// was it, and wraps the *exec.ExitError of one that ended by itself. gone is called once it has ended, perhaps
// long after that. When the calling thread ends the kernel kills the command: it is locked by the caller.
func RunGroup(ctx context.Context, cmd *exec.Cmd, gone func()) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		gone()
		return fmt.Errorf("could not be started: %w", err)
	}
	pid := cmd.Process.Pid
	mayBeKilled(pid)
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		// Not reaped yet: its number, and so its group's, stays its own.
		for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
	}()
	var why error
	select {
	case <-exited:
	case <-ctx.Done():
		why = context.Cause(ctx)
		if errors.Is(why, context.Canceled) {
			why = fmt.Errorf("was ended: %w", why)
		}
	}
	if why != nil {
		_ = unix.Kill(-pid, unix.SIGTERM)
		patience := time.NewTimer(grace)
		defer patience.Stop()
		select {
		case <-exited:
		case <-patience.C:
		}
	}
	_ = unix.Kill(-pid, unix.SIGKILL)
	stuck := time.NewTimer(stuckAfter)
	defer stuck.Stop()
	select {
	case <-exited:
	case <-stuck.C:
		go func() {
			<-exited
			_ = cmd.Wait()
			gone()
		}()
		return fmt.Errorf("%w; %w, process %d, within %v: it hangs in the kernel, see /proc/%d/stack", why, errStuck, pid, stuckAfter, pid)
	}
	err := cmd.Wait()
	gone()
	var status *exec.ExitError
	switch {
	case why != nil:
		return why
	case errors.As(err, &status):
		return fmt.Errorf("ended with %w", status)
	}
	return err
}

// mayBeKilled takes from a process this one's shelter from the kernel's killer, if
// it has one: when memory is short a hook goes first.
func mayBeKilled(pid int) {
	if own, err := os.ReadFile("/proc/self/oom_score_adj"); err == nil && own[0] == '-' {
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("0"), 0) // it may have ended
	}
}
