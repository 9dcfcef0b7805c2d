package attach

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/deadman"
)

// freezerVar makes this test binary an agent that freezes what is on a device
// and stays in the freeze; the value is the limit, a colon, the device, a colon
// and the folder of its dead-man's notes.
const freezerVar = "BLOCKFERRY_TEST_FREEZER"

func freezeAndWait(value string) error {
	limitText, rest, _ := strings.Cut(value, ":")
	device, notes, _ := strings.Cut(rest, ":")
	limit, err := time.ParseDuration(limitText)
	if err != nil {
		return err
	}
	g, err := newGuard(notes)
	if err != nil {
		return err
	}
	a := &Attached{options: Options{Name: "data", Device: device, Guard: g}}
	if err := a.options.check(); err != nil && a.options.Log == nil {
		return err
	}
	a.log = a.options.Log
	if a.device, err = kernelName(device); err != nil {
		return err
	}
	f, err := newFreezer(a)
	if err != nil {
		return err
	}
	if f.list, err = fileSystems(device); err != nil {
		return err
	}
	_, err = f.Stop(context.Background(), limit, func() error {
		fmt.Println("inside", g.Pid())
		var line string
		_, _ = fmt.Scanln(&line) // the test says when to go on
		return nil
	})
	fmt.Println("ended:", err)
	return g.Close()
}

// frozenBy starts an agent and returns when it is in its freeze.
func frozenBy(t *testing.T, device string, limit time.Duration, notes string) (agent *exec.Cmd, out *bufio.Scanner, goOn func()) {
	t.Helper()
	for range 10 { // on a busy machine the freeze alone may take longer
		if agent, out, goOn = tryFreeze(t, device, limit, notes); strings.HasPrefix(out.Text(), "inside") {
			return agent, out, goOn
		}
	}
	t.Fatalf("the agent says '%s'", out.Text())
	return nil, nil, nil
}

func tryFreeze(t *testing.T, device string, limit time.Duration, notes string) (agent *exec.Cmd, out *bufio.Scanner, goOn func()) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	agent = exec.Command(self)
	agent.Env = append(os.Environ(), fmt.Sprintf("%s=%s:%s:%s", freezerVar, limit, device, notes))
	agent.Stderr = os.Stderr
	stdin, err := agent.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = agent.Process.Kill(); _ = agent.Wait() })
	out = bufio.NewScanner(stdout)
	out.Scan()
	return agent, out, func() { fmt.Fprintln(stdin, "on") }
}

// write writes to a file system and says how long that took.
func write(t *testing.T, dir string) <-chan time.Duration {
	done := make(chan time.Duration, 1)
	go func() {
		start := time.Now()
		if err := os.WriteFile(filepath.Join(dir, "written"), []byte("x"), 0o600); err != nil {
			t.Error(err)
		}
		done <- time.Since(start)
	}()
	return done
}

// Promise 6: an agent that is killed, or stopped, in the middle of a freeze does
// not leave the file system frozen.
func TestFreezeEndsWithTheAgent(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			device := blocktest.Loop(t, 320<<20)
			dir := blocktest.FileSystem(t, kind, device)

			agent, _, _ := frozenBy(t, device, 30*time.Second, t.TempDir())
			done := write(t, dir)
			time.Sleep(100 * time.Millisecond)
			select {
			case <-done:
				t.Fatal("written though it is frozen: this test checks nothing")
			default:
			}
			if err := agent.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			select {
			case <-done:
			case <-time.After(10 * time.Second):
				t.Fatal("its agent was killed, and it stays frozen")
			}

			const limit = 500 * time.Millisecond
			agent, out, goOn := frozenBy(t, device, limit, t.TempDir())
			if err := agent.Process.Signal(unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			select {
			case took := <-write(t, dir):
				if took > limit+2*time.Second {
					t.Errorf("frozen for %s, the limit is %s", took, limit)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("its agent was stopped, and it stays frozen")
			}
			if err := agent.Process.Signal(unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			goOn()
			if !out.Scan() || !strings.Contains(out.Text(), deadman.ErrLate.Error()) {
				t.Errorf("it was stopped beyond its limit, and says '%s'", out.Text())
			}
		})
	}
}

// Promise 6: when agent and dead-man are killed together in the middle of a
// freeze, the next dead-man thaws.
func TestFreezeEndsThoughBothAreKilled(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			device, notes := blocktest.Loop(t, 320<<20), t.TempDir()
			dir := blocktest.FileSystem(t, kind, device)
			agent, out, _ := frozenBy(t, device, 30*time.Second, notes)
			var deadMan int
			if _, err := fmt.Sscanf(out.Text(), "inside %d", &deadMan); err != nil {
				t.Fatal(err)
			}
			if err := agent.Process.Signal(unix.SIGSTOP); err != nil { // it is not to thaw either
				t.Fatal(err)
			}
			if err := errors.Join(unix.Kill(deadMan, unix.SIGKILL), agent.Process.Kill()); err != nil {
				t.Fatal(err)
			}
			_ = agent.Wait()
			done := write(t, dir)
			select {
			case <-done:
				t.Fatal("it was not frozen: this test checks nothing")
			case <-time.After(300 * time.Millisecond):
			}
			g, err := newGuard(notes)
			if err != nil {
				t.Fatal(err)
			}
			defer g.Close()
			select {
			case <-done:
			case <-time.After(10 * time.Second):
				_ = blocktest.Thaw(dir)
				t.Fatal("the next dead-man leaves it frozen")
			}
			for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				if left, _ := os.ReadDir(notes); len(left) == 0 {
					break
				} else if time.Now().After(deadline) {
					t.Fatalf("left: %v", left)
				}
			}
		})
	}
}

// Somebody else's freeze is not thawed, and there is no cut in it.
func TestOthersFreezeIsLeftAlone(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		r := newRig(t, 64<<20)
		dir := blocktest.FileSystem(t, "ext4", r.device)
		a := r.open()
		base := r.base(a)
		r.mustCut(a, base).Release()
		if err := blocktest.Freeze(dir); err != nil {
			t.Fatal(err)
		}
		if c, err := r.cut(a, base); !errors.Is(err, deadman.ErrFrozen) || !strings.Contains(err.Error(), dir) {
			t.Errorf("cut %v: %v", c, err)
		}
		if err := blocktest.Freeze(dir); !errors.Is(err, unix.EBUSY) {
			t.Errorf("it was thawed: %v", err)
		}
		if err := blocktest.Thaw(dir); err != nil {
			t.Fatal(err)
		}
		r.mustCut(a, base).Release()
		if s := a.Stats(); s.VoidCuts == 0 {
			t.Errorf("%+v", s)
		}
	})
}

// stopper is a freezer for one device, ready to stop.
func (r *rig) stopper(a *Attached) *freezer {
	r.t.Helper()
	var err error
	if a.freezer.list, err = fileSystems(r.device); err != nil {
		r.t.Fatal(err)
	}
	return a.freezer
}

// rawWrite writes to the device past its file system, in its last block.
func rawWrite(t *testing.T, device string, size int64) error {
	t.Helper()
	f, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := alignedBlock()
	b[0] = byte(time.Now().UnixNano())
	_, err = f.WriteAt(b, size-int64(len(b)))
	return err
}

// Whatever is written past the file system while that is frozen voids the cut.
func TestRawWriteVoidsTheCut(t *testing.T) {
	r := newRig(t, 64<<20)
	blocktest.FileSystem(t, "ext4", r.device)
	a := r.open()
	f := r.stopper(a)
	if _, err := f.Stop(t.Context(), 10*time.Second, func() error { return nil }); err != nil {
		t.Fatalf("with nothing written: %v", err)
	}
	_, err := f.Stop(t.Context(), 10*time.Second, func() error { return rawWrite(t, r.device, a.Size()) })
	if !errors.Is(err, ErrWritten) || !strings.Contains(err.Error(), r.device) {
		t.Errorf("the statistics name it: %v", err)
	}
	_, err = f.Stop(t.Context(), 10*time.Second, func() error {
		return errors.Join(rawWrite(t, r.device, a.Size()), errors.New("what was read is of no use"))
	})
	if !errors.Is(err, ErrWritten) {
		t.Errorf("what inside says counts for more: %v", err) // it would for a stop that held
	}
	_, err = f.Stop(t.Context(), 10*time.Second, func() error { return discard(r.device, a.Size()-1<<20, 64<<10) })
	if !errors.Is(err, ErrWritten) {
		t.Errorf("a discard: %v", err)
	}
}

// A write that is in flight on a frozen device may be half there.
func TestWriteInFlightVoidsTheCut(t *testing.T) {
	under := blocktest.FileSystem(t, "ext4", blocktest.Loop(t, 128<<20))
	file := filepath.Join(under, "disk")
	if err := os.WriteFile(file, make([]byte, 16<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, 16<<20)
	r.device = blocktest.LoopOver(t, file)
	r.options.Device = r.device
	a := r.open()
	f := r.stopper(a)
	if _, err := f.Stop(t.Context(), 10*time.Second, func() error { return nil }); err != nil {
		t.Fatalf("at rest: %v", err)
	}
	// The loop device's writes wait for the file system below it.
	done := make(chan error, 1)
	begin := func() error {
		if err := blocktest.Freeze(under); err != nil {
			return err
		}
		go func() { done <- rawWrite(t, r.device, a.Size()) }()
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			if n, err := f.writesInFlight(); err != nil || n > 0 {
				return err
			} else if time.Now().After(deadline) {
				return errors.New("nothing is in flight: this test checks nothing")
			}
		}
	}
	_, err := f.Stop(t.Context(), 10*time.Second, begin)
	if !errors.Is(err, ErrWritten) || !strings.Contains(err.Error(), "1 writes in flight") {
		t.Errorf("a write that began meanwhile: %v", err)
	}
	called := false
	_, err = f.Stop(t.Context(), 10*time.Second, func() error { called = true; return nil })
	if !errors.Is(err, ErrWritten) || !strings.Contains(err.Error(), "in flight") || called {
		t.Errorf("one write in flight: read %v, %v", called, err)
	}
	if err := blocktest.Thaw(under); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := f.Stop(t.Context(), 10*time.Second, func() error { return nil }); err != nil {
		t.Errorf("at rest again: %v", err)
	}
}

func alignedBlock() []byte {
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return b
}

// A freeze that failed and left something frozen says both.
func TestThawThatFailsIsTold(t *testing.T) {
	r := newRig(t, 64<<20)
	blocktest.FileSystem(t, "ext4", r.device)
	g, err := deadman.NewGuard(deadman.GuardOptions{Notes: t.TempDir(), Command: []string{"/bin/sh", "-c", "read l; echo ARMED; read l"}})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	r.options.Guard = g
	f := r.stopper(r.open())
	f.rescue = func() error { return errors.New("thaw it: input/output error") }
	_, err = f.Stop(t.Context(), time.Second, func() error { t.Error("called"); return nil })
	if !errors.Is(err, deadman.ErrLate) || !errors.Is(err, deadman.ErrStopped) || !strings.Contains(err.Error(), "thaw it: input/output error") || !strings.Contains(err.Error(), "in the middle of a freeze") {
		t.Errorf("its dead-man died, and it could not be thawed: %v", err)
	}
}
