package volume

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// answerPatience is how long an answer of the dead-man may take beyond
	// the stall limit before it counts as dead.
	answerPatience = 5 * time.Second
)

// ErrLate says that the stall limit passed, or that the dead-man died, while
// the volume was suspended: what was done in that time is worth nothing.
var ErrLate = errors.New("the suspend did not hold until its end")

// Guard is the agent's side of the dead-man, which it starts, and starts
// again when it died. It serves one suspend at a time.
type Guard struct {
	command []string

	window sync.Mutex // held from arm to resume
	mu     sync.Mutex // guards what follows
	child  *child
	closed bool

	request [64]byte // RESUME must not allocate
	reply   [maxLineBytes]byte
}

type child struct {
	command *exec.Cmd
	in      *os.File // to it
	out     *os.File // from it
}

// NewGuard starts the dead-man: the command, whose main must be RunDeadMan on
// its standard input and output. Its standard error is this process's.
func NewGuard(command ...string) (*Guard, error) {
	if len(command) == 0 {
		return nil, errors.New("the dead-man needs a command")
	}
	g := &Guard{command: command}
	return g, g.ensure()
}

// Pid is the dead-man's process id, 0 when it is not running.
func (g *Guard) Pid() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.child == nil {
		return 0
	}
	return g.child.command.Process.Pid
}

// Close ends the dead-man, after a suspend that is under way.
func (g *Guard) Close() error {
	g.window.Lock()
	defer g.window.Unlock()
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	return g.drop()
}

// ensure starts the dead-man if it does not run.
func (g *Guard) ensure() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.closed:
		return errors.New("the dead-man was ended")
	case g.child != nil:
		return nil
	}
	// Plain pipes: the write end is in this process alone, so it closes when
	// this process ends, however it ends.
	theirIn, in, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start the dead-man: %w", err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		theirIn.Close()
		in.Close()
		return fmt.Errorf("start the dead-man: %w", err)
	}
	command := exec.Command(g.command[0], g.command[1:]...)
	command.Stdin, command.Stdout, command.Stderr = theirIn, theirOut, os.Stderr
	command.Dir = "/"
	// A session of its own: no terminal's signals.
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = command.Start()
	theirIn.Close()
	theirOut.Close()
	if err != nil {
		in.Close()
		out.Close()
		return fmt.Errorf("start the dead-man: %w", err)
	}
	g.child = &child{command, in, out}
	return nil
}

// drop ends the dead-man, if there is one, and waits for it.
func (g *Guard) drop() error {
	g.mu.Lock()
	c := g.child
	g.child = nil
	g.mu.Unlock()
	if c == nil {
		return nil
	}
	c.in.Close()
	c.out.Close()
	done := make(chan error, 1)
	go func() { done <- c.command.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(answerPatience):
		c.command.Process.Kill()
		return fmt.Errorf("the dead-man did not end by itself: %w", errors.Join(errors.New("killed"), <-done))
	}
}

// arm has the devices (inner to outer) resumed when limit passes or this
// process ends. After it returned nil, resume must be called.
func (g *Guard) arm(limit time.Duration, devices ...string) error {
	g.window.Lock()
	line := fmt.Sprintf("ARM %d %s\n", limit.Milliseconds(), strings.Join(devices, " "))
	var err error
	for range 2 { // one that died since the last time is started again
		if err = g.ensure(); err != nil {
			break
		}
		var answer []byte
		answer, err = g.ask([]byte(line), answerPatience)
		if err == nil && string(answer) == "ARMED" {
			copy(g.request[:], "RESUME\n")
			return nil
		}
		if err == nil {
			err = fmt.Errorf("the dead-man answers '%s'", answer)
		}
		_ = g.drop() // the reason is in err
	}
	g.window.Unlock()
	return fmt.Errorf("arm the dead-man: %w", err)
}

// resume has the devices resumed. Its error is ErrLate when the dead-man was
// faster, or is dead; in the latter case nothing may have been resumed.
func (g *Guard) resume(limit time.Duration) (dead bool, err error) {
	defer g.window.Unlock()
	answer, err := g.ask(g.request[:len("RESUME\n")], limit+answerPatience)
	if err != nil {
		_ = g.drop()
		return true, fmt.Errorf("%w: the dead-man is gone: %w", ErrLate, err)
	}
	if why, late := bytes.CutPrefix(answer, []byte("LATE ")); late {
		return false, fmt.Errorf("%w: %s", ErrLate, why)
	}
	if string(answer) != "IN-TIME" {
		_ = g.drop()
		return true, fmt.Errorf("%w: the dead-man answers '%s'", ErrLate, answer)
	}
	return false, nil
}

// ask sends a line and reads one; what it returns is valid until the next ask.
func (g *Guard) ask(line []byte, patience time.Duration) ([]byte, error) {
	g.mu.Lock()
	c := g.child
	g.mu.Unlock()
	if c == nil {
		return nil, io.ErrClosedPipe
	}
	deadline := time.Now().Add(patience)
	if err := errors.Join(c.in.SetWriteDeadline(deadline), c.out.SetReadDeadline(deadline)); err != nil {
		return nil, err
	}
	if _, err := c.in.Write(line); err != nil {
		return nil, err
	}
	for n := 0; n < len(g.reply); {
		m, err := c.out.Read(g.reply[n:])
		if err != nil {
			return nil, err
		}
		n += m
		if g.reply[n-1] == '\n' {
			return g.reply[:n-1], nil
		}
	}
	return nil, errors.New("the answer is too long")
}

// quiet runs f without garbage collection. Only inside a suspend of this
// guard, so that two never restore each other's setting.
func quiet(f func()) {
	percent := debug.SetGCPercent(-1) // waits for a collection under way
	defer debug.SetGCPercent(percent)
	f()
}
