package deadman

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/blocktest"
)

// deadmanVar makes this test binary a dead-man; the value is the folder of its notes.
const deadmanVar = "BLOCKFERRY_TEST_DEADMAN"

func TestMain(m *testing.M) {
	var err error
	if notes, socket := os.Getenv(deadmanVar), os.Getenv(serviceVar); notes != "" {
		err = Run(os.Stdin, notes)
	} else if socket != "" {
		err = serveAt(socket)
	} else if os.Getenv(threadsVar) != "" {
		err = makeThreads()
	} else {
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// fakeMounts are file systems that can be frozen, by the name they are opened by.
type fakeMounts struct {
	mu     sync.Mutex
	frozen map[string]bool
	fail   error         // of the next thaw
	slow   time.Duration // what a freeze takes
}

func (f *fakeMounts) freeze(file *os.File) error {
	f.mu.Lock()
	slow := f.slow
	f.mu.Unlock()
	time.Sleep(slow)
	return f.swap(file, true, unix.EBUSY)
}

func (f *fakeMounts) thaw(file *os.File) error {
	f.mu.Lock()
	err := f.fail
	f.fail = nil
	f.mu.Unlock()
	if err != nil {
		return err
	}
	return f.swap(file, false, unix.EINVAL)
}

func (f *fakeMounts) swap(file *os.File, frozen bool, refused error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.frozen[file.Name()] == frozen {
		return refused
	}
	f.frozen[file.Name()] = frozen
	return nil
}

func (f *fakeMounts) isFrozen(name string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.frozen[name]
}

func (f *fakeMounts) awaitThawed(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		for deadline := time.Now().Add(5 * time.Second); f.isFrozen(name); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s stays frozen", name)
			}
		}
	}
}

// armMounts opens folders and has the dead-man armed with them.
func (a *agent) armMounts(limit time.Duration, want string, names ...string) {
	a.t.Helper()
	var fds []int
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			a.t.Fatal(err)
		}
		defer f.Close()
		fds = append(fds, int(f.Fd()))
	}
	line := fmt.Sprintf("ARM-MOUNTS %d %d\n", limit.Milliseconds(), len(names))
	if _, _, err := a.in.WriteMsgUnix([]byte(line), unix.UnixRights(fds...), nil); err != nil {
		a.t.Fatal(err)
	}
	if !a.out.Scan() || !strings.HasPrefix(a.out.Text(), want) {
		a.t.Fatalf("%s: got '%s', want '%s'", line, a.out.Text(), want)
	}
}

// folders are two whose names hold a blank and a line's end.
func folders(t *testing.T) (one, two string) {
	t.Helper()
	one, two = filepath.Join(t.TempDir(), "a b"), filepath.Join(t.TempDir(), "c\nd")
	if err := errors.Join(os.Mkdir(one, 0o700), os.Mkdir(two, 0o700)); err != nil {
		t.Fatal(err)
	}
	return one, two
}

func TestDeadManFreezes(t *testing.T) {
	a := newAgent(t)
	one, two := folders(t)
	for range 3 {
		a.armMounts(10*time.Second, "ARMED", one, two)
		if a.mounts.isFrozen(one) {
			t.Fatal("frozen before FREEZE")
		}
		a.say("FREEZE", "FROZEN")
		if !a.mounts.isFrozen(one) || !a.mounts.isFrozen(two) {
			t.Fatal("not frozen")
		}
		a.say("RESUME", "IN-TIME")
		if a.mounts.isFrozen(one) || a.mounts.isFrozen(two) {
			t.Fatal("not thawed")
		}
	}
	a.say("ARM 10000 vol", "ARMED") // and devices again
	a.devices.suspend("vol")
	a.say("FREEZE", "ERROR")
	a.say("RESUME", "IN-TIME")
}

func TestDeadManThawsAtItsDeadline(t *testing.T) {
	a := newAgent(t)
	one, two := folders(t)
	a.armMounts(50*time.Millisecond, "ARMED", one, two)
	a.say("FREEZE", "FROZEN")
	a.mounts.awaitThawed(t, one, two)
	a.say("RESUME", "LATE the stall limit passed")
	// What the kernel takes too long to freeze is thawed at once.
	a.mounts.mu.Lock()
	a.mounts.slow = 100 * time.Millisecond
	a.mounts.mu.Unlock()
	for _, names := range [][]string{{one}, {one, two}} {
		a.armMounts(50*time.Millisecond, "ARMED", names...)
		a.say("FREEZE", "LATE the stall limit passed")
		if a.mounts.isFrozen(one) || a.mounts.isFrozen(two) {
			t.Error("frozen though late")
		}
		a.say("RESUME", "LATE the stall limit passed")
	}
	// An agent that was stopped before it asked gets no freeze at all.
	a.mounts.mu.Lock()
	a.mounts.slow = 0
	a.mounts.mu.Unlock()
	a.armMounts(10*time.Millisecond, "ARMED", one)
	time.Sleep(50 * time.Millisecond)
	a.say("FREEZE", "LATE the stall limit passed")
	if a.mounts.isFrozen(one) {
		t.Error("frozen though late")
	}
	a.say("RESUME", "LATE")
}

func TestDeadManThawsWhenTheAgentEnds(t *testing.T) {
	a := newAgent(t)
	one, two := folders(t)
	a.armMounts(10*time.Second, "ARMED", one, two)
	a.say("FREEZE", "FROZEN")
	a.mounts.mu.Lock()
	a.mounts.fail = errors.New("not today") // it tries again
	a.mounts.mu.Unlock()
	a.in.Close()
	if err := <-a.ended; err != nil {
		t.Fatal(err)
	}
	if a.mounts.isFrozen(one) || a.mounts.isFrozen(two) {
		t.Fatal("ended with a file system frozen")
	}
}

// Somebody else's freeze is left alone, at the deadline and at the end too;
// what the dead-man had frozen before it saw that is thawed.
func TestDeadManLeavesOthersFreeze(t *testing.T) {
	a := newAgent(t)
	one, two := folders(t)
	a.mounts.mu.Lock()
	a.mounts.frozen[two] = true
	a.mounts.mu.Unlock()
	a.armMounts(10*time.Second, "ARMED", one, two)
	a.say("FREEZE", "BUSY "+strings.ReplaceAll(two, "\n", "; "))
	a.say("RESUME", "LATE")
	a.armMounts(20*time.Millisecond, "ARMED", one, two)
	a.say("FREEZE", "BUSY")
	time.Sleep(50 * time.Millisecond)
	a.say("RESUME", "LATE")
	a.armMounts(10*time.Second, "ARMED", two)
	a.in.Close()
	if err := <-a.ended; err != nil {
		t.Fatal(err)
	}
	if a.mounts.isFrozen(one) || !a.mounts.isFrozen(two) {
		t.Errorf("its own is frozen: %v, the other's: %v", a.mounts.isFrozen(one), a.mounts.isFrozen(two))
	}
}

func TestDeadManNoticesWhoeverThaws(t *testing.T) {
	a := newAgent(t)
	one, two := folders(t)
	a.armMounts(10*time.Second, "ARMED", one, two)
	a.say("FREEZE", "FROZEN")
	a.mounts.mu.Lock()
	a.mounts.frozen[one] = false
	a.mounts.mu.Unlock()
	a.say("RESUME", "LATE "+one+" was not frozen any more")
	a.armMounts(10*time.Second, "ARMED", one)
	a.say("RESUME", "LATE "+one+" was not frozen")
}

func TestDeadManRefusesMounts(t *testing.T) {
	a := newAgent(t)
	one, _ := folders(t)
	a.say("FREEZE", "ERROR no file system is armed")
	a.say("ARM-MOUNTS 100 1", "ERROR")
	a.armMounts(0, "ERROR", one)
	if _, _, err := a.in.WriteMsgUnix([]byte("ARM-MOUNTS 100 2\n"), unix.UnixRights(0), nil); err != nil {
		t.Fatal(err)
	}
	if !a.out.Scan() || !strings.HasPrefix(a.out.Text(), "ERROR ARM-MOUNTS wants") {
		t.Errorf("one descriptor for two: %s", a.out.Text())
	}
	a.armMounts(10*time.Second, "ARMED", one)
	a.armMounts(10*time.Second, "ERROR already armed", one)
	a.say("FREEZE", "FROZEN")
	a.say("RESUME", "IN-TIME")
}

// realGuard has this test binary as its dead-man.
func realGuard(t *testing.T) *Guard {
	t.Helper()
	return realGuardAt(t, t.TempDir())
}

func realGuardAt(t *testing.T, notes string) *Guard {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return newTestGuard(t, GuardOptions{Notes: notes, Command: []string{"/usr/bin/env", deadmanVar + "=" + notes, self}})
}

// The kernel's own freeze, through the guard and a dead-man's process.
func TestGuardFreezes(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			dir := blocktest.FileSystem(t, kind, blocktest.Loop(t, 320<<20))
			g := realGuard(t)
			arm := func(limit time.Duration) {
				t.Helper()
				f, err := os.Open(dir)
				if err != nil {
					t.Fatal(err)
				}
				err = g.ArmMounts(limit, f)
				f.Close()
				if err != nil {
					t.Fatal(err)
				}
			}
			rescue := func() error {
				f, err := os.Open(dir)
				if err != nil {
					return err
				}
				defer f.Close()
				return g.Thaw(f)
			}
			noRescue := func() error { return errors.New("not called") }
			// writes says whether a write ends within a time.
			writes := func(within time.Duration) bool {
				done := make(chan error, 1)
				go func() { done <- os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600) }()
				select {
				case err := <-done:
					if err != nil {
						t.Error(err)
					}
					return true
				case <-time.After(within):
					return false
				}
			}
			arm(10 * time.Second)
			if err := g.Freeze(); err != nil {
				t.Fatal(err)
			}
			if writes(100 * time.Millisecond) {
				t.Error("written while frozen")
			}
			if err := g.Resume(noRescue); err != nil || !writes(5*time.Second) {
				t.Fatalf("in time: %v", err)
			}

			for limit := 300 * time.Millisecond; ; limit *= 2 { // on a busy machine a freeze alone takes long
				arm(limit)
				err := g.Freeze()
				if err == nil {
					break
				}
				_ = g.Resume(rescue)
				if !errors.Is(err, ErrLate) || limit > 10*time.Second {
					t.Fatal(err)
				}
			}
			if !writes(20 * time.Second) {
				t.Fatal("not thawed at the limit")
			}
			if err := g.Resume(noRescue); !errors.Is(err, ErrLate) {
				t.Errorf("past the limit: %v", err)
			}

			if err := blocktest.Freeze(dir); err != nil {
				t.Fatal(err)
			}
			arm(10 * time.Second)
			if err := g.Freeze(); !errors.Is(err, ErrFrozen) || !strings.Contains(err.Error(), dir) {
				t.Errorf("frozen by somebody else: %v", err)
			}
			if err := g.Resume(noRescue); !errors.Is(err, ErrLate) {
				t.Errorf("frozen by somebody else: %v", err)
			}
			if err := blocktest.Freeze(dir); !errors.Is(err, unix.EBUSY) {
				t.Errorf("somebody else's freeze did not last: %v", err)
			}
			if err := blocktest.Thaw(dir); err != nil {
				t.Fatal(err)
			}

			arm(10 * time.Second)
			if err := g.Freeze(); err != nil {
				t.Fatal(err)
			}
			if err := blocktest.Thaw(dir); err != nil {
				t.Fatal(err)
			}
			if err := g.Resume(noRescue); !errors.Is(err, ErrLate) || !strings.Contains(err.Error(), "somebody else thawed") {
				t.Errorf("thawed by somebody else: %v", err)
			}

			// The dead-man is killed: its agent thaws.
			arm(10 * time.Second)
			if err := g.Freeze(); err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(g.Pid(), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if err := g.Resume(rescue); !errors.Is(err, ErrLate) || !writes(5*time.Second) {
				t.Errorf("without a dead-man: %v", err)
			}

			// Its agent is killed: the dead-man thaws.
			arm(10 * time.Second)
			if err := g.Freeze(); err != nil {
				t.Fatal(err)
			}
			g.link.conn.Close()
			if !writes(5 * time.Second) {
				t.Error("without an agent: not thawed")
			}
			_ = g.Resume(rescue)
		})
	}
}

// A dead-man that hangs in the middle of a freeze is given up at the limit, and not killed: once the
// kernel is done it alone knows that it has to thaw.
func TestGuardGivesAFreezeUp(t *testing.T) {
	dir := t.TempDir()
	kernelDone, thawed := filepath.Join(dir, "done"), filepath.Join(dir, "thawed")
	g := newTestGuard(t, GuardOptions{Command: shell("trap '' PIPE; read l; echo ARMED; read l; while [ ! -e " + kernelDone + " ]; do sleep 0.02; done; echo FROZEN; while read l; do :; done; : > " + thawed)})
	f, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := g.ArmMounts(300*time.Millisecond, f); err != nil {
		t.Fatal(err)
	}
	if err := g.Freeze(); !errors.Is(err, ErrLate) {
		t.Errorf("no answer: %v", err)
	}
	rescued := false
	if err := g.Resume(func() error { rescued = true; return nil }); !errors.Is(err, ErrLate) || !rescued {
		t.Errorf("rescued %v: %v", rescued, err)
	}
	if err := g.Close(); err != nil { // its next arm does so, too
		t.Error(err)
	}
	if err := os.WriteFile(kernelDone, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	await(t, "it does not thaw what the kernel froze late", func() bool { _, err := os.Stat(thawed); return err == nil })
}
