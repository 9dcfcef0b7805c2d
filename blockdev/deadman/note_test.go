package deadman

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/blocktest"
)

// frozenRig is a file system, and the folder of its dead-men's notes.
type frozenRig struct {
	t          *testing.T
	dir, notes string
	guard      *Guard
	log        logBuffer
}

func newFrozenRig(t *testing.T, dir string) *frozenRig {
	r := &frozenRig{t: t, dir: dir, guard: realGuard(t)}
	r.notes = r.guard.options.Notes
	t.Cleanup(func() { _ = blocktest.Thaw(dir) }) // should it have been left frozen
	return r
}

// arm arms and returns what is to be frozen.
func (r *frozenRig) arm(limit time.Duration) *os.File {
	r.t.Helper()
	f, err := os.Open(r.dir)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { f.Close() })
	if err := r.guard.ArmMounts(limit, f); err != nil {
		r.t.Fatal(err)
	}
	return f
}

// killed kills the dead-man and waits for its end.
func (r *frozenRig) killed() {
	r.t.Helper()
	pid := r.guard.Pid()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		r.t.Fatal(err)
	}
	_ = r.guard.link.child.Wait()
}

func (r *frozenRig) sweep() (busy bool) {
	return (&sweeper{r.notes, kernelFreezer{}, bootTime, slog.New(slog.NewTextHandler(&r.log, nil))}).sweep()
}

func (r *frozenRig) note() string {
	names, _ := filepath.Glob(filepath.Join(r.notes, notePrefix+"*"))
	text := ""
	for _, name := range names {
		b, _ := os.ReadFile(name)
		text += string(b)
	}
	return text
}

// isFrozen says so, and leaves it as it is.
func (r *frozenRig) isFrozen() bool {
	r.t.Helper()
	err := blocktest.Freeze(r.dir)
	if err == nil {
		err = blocktest.Thaw(r.dir)
		if err == nil {
			return false
		}
	}
	if !errors.Is(err, unix.EBUSY) {
		r.t.Fatal(err)
	}
	return true
}

// A freeze is thawed by the note of the dead-man that was killed, and an
// administrator's is not, whatever a note says.
func TestNoteProvesOnlyItsOwnFreeze(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			r := newFrozenRig(t, blocktest.FileSystem(t, kind, blocktest.Loop(t, 320<<20)))
			frozen := func() {
				t.Helper()
				r.arm(30 * time.Second)
				if err := r.guard.Freeze(); err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(r.note(), "\nfrozen ") || !strings.Contains(r.note(), r.dir) {
					t.Fatalf("the note: %s", r.note())
				}
				r.killed()
				if !r.isFrozen() {
					t.Fatal("not frozen: this test checks nothing")
				}
			}
			next := func() {
				t.Helper()
				_ = r.guard.Resume(func() error { return nil })
				if text := r.note(); text != "" {
					t.Errorf("a note is left: %s", text)
				}
			}
			frozen()
			if r.sweep() || r.isFrozen() {
				t.Error("its own freeze is not thawed")
			}
			next()

			// By hand it is thawed, and frozen again.
			frozen()
			if err := errors.Join(blocktest.Thaw(r.dir), blocktest.Freeze(r.dir)); err != nil {
				t.Fatal(err)
			}
			if r.sweep() || !r.isFrozen() || !strings.Contains(r.log.text(), "fsfreeze --unfreeze") {
				t.Errorf("an administrator's freeze is thawed: %s", r.log.text())
			}
			next()

			// It was frozen before the dead-man came, which is killed then.
			f := r.arm(30 * time.Second)
			if err := r.guard.Freeze(); !errors.Is(err, ErrFrozen) {
				t.Fatal(err)
			}
			r.killed()
			if err := r.guard.Resume(func() error { return r.guard.Thaw(f) }); !errors.Is(err, ErrLate) {
				t.Error(err)
			}
			if r.sweep() || !r.isFrozen() {
				t.Error("the agent, or the next dead-man, thaws an administrator's freeze")
			}
			if err := blocktest.Thaw(r.dir); err != nil || r.note() != "" {
				t.Errorf("%v, a note is left: %s", err, r.note())
			}
		})
	}
}

// A dead-man that is killed while the kernel is still freezing is waited for:
// only then there is something to thaw.
func TestKilledInTheMiddleOfTheFreeze(t *testing.T) {
	under := blocktest.FileSystem(t, "ext4", blocktest.Loop(t, 256<<20))
	disk := filepath.Join(under, "disk")
	if err := os.WriteFile(disk, make([]byte, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	r := newFrozenRig(t, blocktest.FileSystem(t, "ext4", blocktest.LoopOver(t, disk)))
	f := r.arm(time.Second)
	if err := os.WriteFile(filepath.Join(r.dir, "f"), bytes.Repeat([]byte("x"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	// What it writes waits for what is below.
	if err := blocktest.Freeze(under); err != nil {
		t.Fatal(err)
	}
	thawed := false
	defer func() {
		if !thawed {
			_ = blocktest.Thaw(under)
		}
	}()
	pid := r.guard.Pid()
	killed := make(chan string, 1)
	go func() {
		for deadline := time.Now().Add(5 * time.Second); !strings.Contains(r.note(), noteFreezing) && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(100 * time.Millisecond)
		killed <- fmt.Sprint(unix.Kill(pid, unix.SIGKILL), r.note())
	}()
	if err := r.guard.Freeze(); !errors.Is(err, ErrLate) {
		t.Errorf("killed in the middle of its freeze: %v", err)
	}
	if text := <-killed; !strings.HasPrefix(text, "<nil>") || !strings.Contains(text, "\n"+noteFreezing) {
		t.Fatalf("killed: %s", text)
	}
	if err := r.guard.Resume(func() error { return r.guard.Thaw(f) }); !errors.Is(err, ErrLate) {
		t.Error(err)
	}
	if !r.sweep() {
		t.Error("it is thought dead while the kernel is at its freeze")
	}
	thawed = true
	if err := blocktest.Thaw(under); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); r.note() != ""; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("nobody looks after it: %s", r.note())
		}
	}
	if r.isFrozen() {
		t.Error("it stays frozen")
	}
}

// What is no note of this boot proves nothing; without a folder for notes
// nothing is frozen.
func TestNotesThatProveNothing(t *testing.T) {
	r := newFrozenRig(t, t.TempDir())
	for _, text := range []string{"", "junk\n", "blockferry freeze 2 00 0\n", fmt.Sprintf("blockferry freeze 1 %032x %20d\nfrozen 7:0 1 %20d \"/\"\n", 1, 0, 8)} {
		if err := os.WriteFile(filepath.Join(r.notes, notePrefix+"x"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if r.sweep() || r.note() != "" {
			t.Errorf("%q is left", text)
		}
	}
	a := newAgent(t)
	if err := os.RemoveAll(a.notes); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.notes, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.armMounts(time.Second, "ERROR a note of the freeze", r.dir)
}
