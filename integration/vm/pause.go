package vm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// stopWait is how long the processes of a guest may take to stop: until then each may
// be in the middle of a call of the host's kernel.
const stopWait = 20 * time.Second

// Pause stops the guest between two of its instructions, and returns when nothing of it
// runs any more; Continue has it go on as if nothing had been. To it this is the machine's
// sleep: its clocks, of which all follow the host's, have gone on. What comes for it over
// the network meanwhile waits, as far as there is room.
func (m *Member) Pause() error {
	m.body.mu.Lock()
	process := m.body.process
	m.body.mu.Unlock()
	if process == nil || len(m.paused) > 0 {
		return fmt.Errorf("guest %s can't be paused: it is already, or does not run", m.Name)
	}
	var err error
	m.paused, err = stopAll(process.Pid)
	m.since = time.Now()
	if err != nil {
		return errors.Join(fmt.Errorf("pause guest %s: %w", m.Name, err), m.Continue())
	}
	return nil
}

// Continue ends a pause.
func (m *Member) Continue() error {
	paused := m.paused
	m.paused = nil
	slices.Reverse(paused) // what the guest's kernel asks comes before that
	return continueAll(paused)
}

// ContinueUnaware ends a pause in which the guest's clocks stood still, too, as under a
// hypervisor that stops a guest with them. It must have an OwnClock.
func (m *Member) ContinueUnaware() error {
	if len(m.paused) == 0 {
		return fmt.Errorf("guest %s is not paused", m.Name)
	}
	if err := m.body.hide(time.Since(m.since)); err != nil {
		return fmt.Errorf("guest %s, its clock: %w", m.Name, err)
	}
	return m.Continue()
}

// ownClock has what a clock that can stand still needs.
func (b *body) ownClock() (library string, err error) {
	if b.host.machine.OwnClock == nil {
		return "", fmt.Errorf("guest %s: guests of this kind have the host's clock", b.spec.Name)
	}
	if library, err = b.host.machine.OwnClock(b.host.dir); err == nil && b.clock == nil {
		b.clock, err = os.Create(filepath.Join(b.dir, "clock"))
		if err == nil {
			err = b.clock.Truncate(clockBytes)
		}
	}
	return library, err
}

// clockBytes is the size of the file, a number of 64 bits in the machine's order.
const clockBytes = 8

// hide has the guest's clock go further behind the host's.
func (b *body) hide(more time.Duration) error {
	if b.clock == nil {
		return errors.New("it is the host's")
	}
	word := make([]byte, clockBytes)
	if _, err := b.clock.ReadAt(word, 0); err != nil {
		return err
	}
	binary.NativeEndian.PutUint64(word, binary.NativeEndian.Uint64(word)+uint64(more))
	_, err := b.clock.WriteAt(word, 0)
	return err
}

// stopAll stops the processes that a guest is made of, the first one's pid being known:
// those in its PID namespace, but for the ones that it traces. Those are the guest's own
// processes, which do nothing while nobody answers their calls; and a signal of ours to
// one would come to light in the guest. It returns those that it stopped, also after an error.
func stopAll(first int) (stopped []int, err error) {
	stop := func(pid int) error {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			return fmt.Errorf("stop process %d: %w", pid, err)
		}
		stopped = append(stopped, pid)
		return awaitStopped(pid)
	}
	if err := stop(first); err != nil { // which makes the others, so there will be no more
		return stopped, err
	}
	others, err := companions(first)
	if err != nil {
		return stopped, err
	}
	for _, pid := range others {
		// One that has just ended is none.
		if err := stop(pid); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, os.ErrNotExist) {
			return stopped, err
		}
	}
	return stopped, nil
}

func continueAll(stopped []int) (err error) {
	for _, pid := range stopped {
		if e := unix.Kill(pid, unix.SIGCONT); e != nil && !errors.Is(e, unix.ESRCH) {
			err = errors.Join(err, fmt.Errorf("continue process %d: %w", pid, e))
		}
	}
	return err
}

// companions are the other processes of a guest that nobody traces.
func companions(first int) (pids []int, err error) {
	namespace := func(pid int) (string, error) { return os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)) }
	its, err := namespace(first)
	if err != nil {
		return nil, err
	}
	ours, err := namespace(os.Getpid())
	if err != nil || ours == its {
		return nil, errors.Join(err, fmt.Errorf("process %d has no PID namespace of its own", first))
	}
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, path := range all {
		pid, _ := strconv.Atoi(filepath.Base(path))
		if found, err := namespace(pid); err != nil || found != its || pid == first {
			continue
		}
		status, err := os.ReadFile(path + "/status")
		if err == nil && strings.Contains(string(status), "\nTracerPid:\t0\n") {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// awaitStopped returns when none of a process's threads runs, as all are stopped or have ended.
func awaitStopped(pid int) error {
	for end := time.Now().Add(stopWait); ; time.Sleep(time.Millisecond) {
		states, err := threadStates(pid)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(states, func(s byte) bool { return s != 'T' && s != 'Z' }) {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("process %d does not stop: its threads are %s", pid, states)
		}
	}
}

// threadStates are a letter for each thread, as in proc(5); of those that end meanwhile
// there is none.
func threadStates(pid int) (states []byte, err error) {
	if err := unix.Kill(pid, 0); err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		return nil, err
	}
	for _, path := range threads {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		// The name, in parentheses, may hold anything.
		if i := bytes.LastIndexByte(text, ')'); i >= 0 && i+2 < len(text) {
			states = append(states, text[i+2])
		}
	}
	return states, nil
}
