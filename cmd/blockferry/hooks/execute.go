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
	// grace is between SIGTERM and SIGKILL.
	grace = 2 * time.Second
	// maxLines of a hook are logged.
	maxLines = 200
	// drain is how long output is read on after a hook's group was ended: what
	// left the group may hold the pipe.
	drain = time.Second
)

// execute runs a command in a process group of its own, which ends with it: at
// the latest after timeout, when ctx ends, or when this process is killed. say is
// told each line it writes, to either output; last is the last of them. The error
// says how it ended, nil: with status 0 and in time.
func execute(ctx context.Context, command, env []string, timeout time.Duration, say func(string)) (last string, err error) {
	out, in, err := os.Pipe()
	if err != nil {
		return "", err
	}
	read := make(chan string, 1)
	go func() { read <- lines(out, say) }()
	ended := make(chan error, 1)
	go func() {
		// The kernel ends the command with the thread that started it.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		ended <- group(ctx, command, env, timeout, in)
	}()
	err = <-ended
	_ = in.Close()
	_ = out.SetReadDeadline(time.Now().Add(drain))
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

// group starts the command and waits until it and its group have ended.
func group(ctx context.Context, command, env []string, timeout time.Duration, out *os.File) error {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = env, "/", out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	limit := time.NewTimer(timeout)
	defer limit.Stop()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("could not be started: %w", err)
	}
	pid := cmd.Process.Pid
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
	case <-limit.C:
		why = fmt.Errorf("did not end within %v", timeout)
	case <-ctx.Done():
		why = fmt.Errorf("was ended: %w", ctx.Err())
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
	<-exited
	err := cmd.Wait()
	var status *exec.ExitError
	switch {
	case why != nil:
		return why
	case errors.As(err, &status):
		return fmt.Errorf("ended with %s", status)
	}
	return err
}
