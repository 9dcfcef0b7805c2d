package deadman

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
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

func (r *frozenRig) sweepOnce() (again time.Duration) {
	return (&sweeper{r.notes, kernelFreezer{}, bootTime, slog.New(slog.NewTextHandler(&r.log, nil))}).sweep()
}

// sweep says whether a note has a writer still.
func (r *frozenRig) sweep() (busy bool) { return r.sweepOnce() == deadmanRecheck }

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
			for deadline := time.Now().Add(20 * time.Second); r.sweep() && time.Now().Before(deadline); { // the agent may be at it, too
				time.Sleep(time.Millisecond)
			}
			if !r.isFrozen() {
				t.Error("the agent, or the next dead-man, thaws an administrator's freeze")
			}
			if err := blocktest.Thaw(r.dir); err != nil || r.note() != "" {
				t.Errorf("%v, a note is left: %s", err, r.note())
			}
		})
	}
}

// A dead-man that is killed or stopped while the kernel is still freezing is
// waited for: only then there is something to thaw, and it won't.
func TestEndedInTheMiddleOfTheFreeze(t *testing.T) {
	t.Run("killed", func(t *testing.T) { endedInTheFreeze(t, unix.SIGKILL) })
	t.Run("stopped", func(t *testing.T) { endedInTheFreeze(t, unix.SIGSTOP) })
}

func endedInTheFreeze(t *testing.T, signal unix.Signal) {
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
	defer unix.Kill(pid, unix.SIGKILL) // before its guard waits for it
	ended := make(chan string, 1)
	go func() {
		for deadline := time.Now().Add(5 * time.Second); !strings.Contains(r.note(), noteFreezing) && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(100 * time.Millisecond)
		ended <- fmt.Sprint(unix.Kill(pid, signal), r.note())
	}()
	if err := r.guard.Freeze(); !errors.Is(err, ErrLate) {
		t.Errorf("ended in the middle of its freeze: %v", err)
	}
	text, signalled := strings.CutPrefix(<-ended, "<nil>")
	if n, err := readNote(strings.NewReader(text)); !signalled || err != nil || n.entries[0].state != noteFreezing || n.entries[0].written < 0 {
		t.Fatalf("ended: %s: %v", text, err)
	}
	if err := r.guard.Resume(func() error { return r.guard.Thaw(f) }); !errors.Is(err, ErrLate) {
		t.Error(err)
	}
	swept := make(chan bool, 1)
	go func() { swept <- r.sweep() }()
	select {
	case busy := <-swept:
		if !busy {
			t.Error("it is thought dead while the kernel is at its freeze")
		}
	case <-time.After(5 * time.Second): // the kernel has it wait, until what is below is thawed
		t.Error("it is thawed while the kernel is at its freeze")
	}
	thawed = true
	if err := blocktest.Thaw(under); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- os.WriteFile(filepath.Join(r.dir, "f"), []byte("x"), 0o600) }()
	select {
	case err := <-written:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		_ = blocktest.Thaw(r.dir)
		t.Fatalf("it stays frozen: %s", r.note())
	}
	// That it is thawed is noted right after. What somebody else freezes from then on is not
	// thawed any more.
	for deadline := time.Now().Add(20 * time.Second); strings.Contains(r.note(), noteFreezing) || strings.Contains(r.note(), noteFrozen); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it is thawed, and its note says otherwise: %s", r.note())
		}
	}
	if err := blocktest.Freeze(r.dir); err != nil {
		t.Fatal(err)
	}
	r.sweep()
	if !r.isFrozen() {
		t.Error("an administrator's freeze is thawed")
	}
	if err := blocktest.Thaw(r.dir); err != nil {
		t.Fatal(err)
	}
	_ = unix.Kill(pid, unix.SIGKILL)
	for deadline := time.Now().Add(20 * time.Second); r.note() != ""; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("nobody looks after it: %s", r.note())
		}
	}
}

// notes writes a note, by hand, in the place of all that are there.
func (r *frozenRig) write(text string) (name string) {
	r.t.Helper()
	names, _ := filepath.Glob(filepath.Join(r.notes, notePrefix+"*"))
	for _, name := range names {
		os.Remove(name)
	}
	name = filepath.Join(r.notes, notePrefix+"x")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
	return name
}

// killedFreeze leaves the file system frozen and returns its note, and what had
// been written to the device before.
func (r *frozenRig) killedFreeze() (note string, before int64) {
	r.t.Helper()
	f := r.arm(30 * time.Second)
	e, err := entryOf(f)
	if err == nil {
		e.stat, err = os.Open(sysfs(e.number) + "/stat")
	}
	if err != nil {
		r.t.Fatal(err)
	}
	defer e.stat.Close()
	before = e.writtenNow()
	if err := r.guard.Freeze(); err != nil {
		r.t.Fatal(err)
	}
	r.killed()
	note = r.note()
	if !strings.Contains(note, "\n"+noteFrozen) || before < 0 || !r.isFrozen() {
		r.t.Fatalf("not frozen: this test checks nothing: %s", note)
	}
	return note, before
}

// freezingOf is the note as it was while the kernel was at it.
func freezingOf(t *testing.T, text string, written int64) string {
	t.Helper()
	n, err := readNote(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return strings.NewReplacer(fmt.Sprintf("%-8s", noteFrozen), noteFreezing, fmt.Sprintf("%20d", n.entries[0].written), fmt.Sprintf("%20d", written)).Replace(text)
}

// A freeze is left alone by every note that does not prove it, and the same
// freeze is thawed by the one that does.
func TestNotesThatProveNothing(t *testing.T) {
	r := newFrozenRig(t, blocktest.FileSystem(t, "ext4", blocktest.Loop(t, 64<<20)))
	text, before := r.killedFreeze()
	n, err := readNote(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	e := n.entries[0]
	with := func(old, new string) string {
		t.Helper()
		changed := strings.Replace(text, old, new, 1)
		if changed == text {
			t.Fatalf("no '%s' in the note: %s", old, text)
		}
		return changed
	}
	for name, text := range map[string]string{
		"empty":           "",
		"no note":         "junk\n",
		"another version": with("freeze 2 ", "freeze 1 "),
		"another boot":    with(n.boot, strings.Repeat("0", len(n.boot))),
		"another disk":    with(fmt.Sprintf(" %s %d ", e.number, e.sequence), fmt.Sprintf(" %s %d ", e.number, e.sequence+1)),
		"torn":            text[:len(text)-3],
		"armed":           with(fmt.Sprintf("%-8s", noteFrozen), fmt.Sprintf("%-8s", noteArmed)),
		"thawed":          with(fmt.Sprintf("%-8s", noteFrozen), fmt.Sprintf("%-8s", noteThawed)),
		"not counted":     with(fmt.Sprintf("%20d", e.written), fmt.Sprintf("%20d", -1)),
		"frozen before":   freezingOf(t, text, e.written),
	} {
		r.write(text)
		if r.sweep() || r.note() != "" || !r.isFrozen() {
			t.Errorf("%s: thawed %v, left: %q", name, !r.isFrozen(), r.note())
		}
	}
	r.write(freezingOf(t, text, before))
	old := &sweeper{r.notes, kernelFreezer{}, func() time.Duration { return bootTime() + freezingAge }, slog.New(slog.DiscardHandler)}
	if old.sweep() != 0 || !r.isFrozen() {
		t.Error("too old: thawed")
	}
	// Whoever may write there is not therefore believed.
	if err := os.Chown(r.write(text), 65534, -1); err != nil {
		t.Fatal(err)
	}
	if r.sweep() || !r.isFrozen() {
		t.Error("somebody else's note: thawed")
	}
	name := r.write(text)
	elsewhere := filepath.Join(t.TempDir(), "note")
	if err := errors.Join(os.Rename(name, elsewhere), os.Symlink(elsewhere, name)); err != nil {
		t.Fatal(err)
	}
	if r.sweep() || !r.isFrozen() {
		t.Error("a link to a note: thawed")
	}
	r.write(text)
	if r.sweep() || r.isFrozen() {
		t.Error("the very note: not thawed")
	}
}

// A note of another version proves nothing, but what it may have left frozen is
// named before it is gone.
func TestNoteOfAnotherVersion(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), notePrefix+"old"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("blockferry freeze 1 b007 17 1000\nfrozen   7:0 5 \"/srv/a \\\"b\\\"\"\nfreezing 7:1 6 - \"/srv/c\"\narmed    7:2 7 \"/srv/d\"\nthawed   7:3 8 \"/srv/e\"\nfrozen   7:4 9 \"/srv/tor"); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s := &sweeper{freezer: kernelFreezer{}, now: bootTime, log: slog.New(slog.NewJSONHandler(&out, nil))}
	if !s.one(f) {
		t.Error("it is kept")
	}
	var said struct {
		Level, Msg, Error string
		Points            []string `json:"file-systems"`
	}
	if err := json.Unmarshal(out.Bytes(), &said); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	if want := []string{`/srv/a "b"`, "/srv/c"}; said.Level != "WARN" || !slices.Equal(said.Points, want) || !strings.Contains(said.Msg, "fsfreeze --unfreeze") || !strings.Contains(said.Error, "version 2") {
		t.Errorf("it says %+v; want %q", said, want)
	}
}

// A dead-man that is killed when the kernel has frozen, and before it could note
// that, is proved by what the freeze wrote.
func TestKilledBeforeItNotedTheFreeze(t *testing.T) {
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			r := newFrozenRig(t, blocktest.FileSystem(t, kind, blocktest.Loop(t, 320<<20)))
			for range 2 { // the second time it had nothing to write but that
				text, before := r.killedFreeze()
				r.write(freezingOf(t, text, before))
				if r.sweep() || r.isFrozen() {
					t.Errorf("not thawed: %s", r.log.text())
				}
				_ = r.guard.Resume(func() error { return nil })
			}
		})
	}
}

// An agent whose dead-man does not answer thaws what that froze for it: the
// same file system, and not before it asked.
func TestAgentThawsItsOwnWindow(t *testing.T) {
	r := newFrozenRig(t, blocktest.FileSystem(t, "ext4", blocktest.Loop(t, 64<<20)))
	armed := bootTime()
	text, _ := r.killedFreeze()
	n, err := readNote(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	e := n.entries[0]
	f, err := os.Open(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := &sweeper{r.notes, kernelFreezer{}, bootTime, slog.New(slog.DiscardHandler)}
	id := fmt.Sprintf(" %s %d ", e.number, e.sequence)
	for name, c := range map[string]struct {
		since time.Duration
		text  string
	}{
		"an earlier window":   {bootTime() + time.Millisecond, text},
		"another file system": {armed, strings.Replace(text, id, fmt.Sprintf(" 0:%s %d ", strings.Replace(e.number, ":", "", 1), e.sequence), 1)},
		"another disk":        {armed, strings.Replace(text, id, fmt.Sprintf(" %s %d ", e.number, e.sequence+1), 1)},
	} {
		r.write(c.text)
		if err := s.thawSince(c.since, f); err != nil || !r.isFrozen() {
			t.Errorf("%s: %v, frozen: %v", name, err, r.isFrozen())
		}
	}
	r.write(text)
	if err := s.thawSince(armed, f); err != nil || r.isFrozen() {
		t.Errorf("its own: %v, frozen: %v", err, r.isFrozen())
	}
	_ = r.guard.Resume(func() error { return nil })
}

// Without a folder for notes nothing is frozen; a cut leaves none there.
func TestNoFreezeWithoutANote(t *testing.T) {
	a := newAgent(t)
	dir := t.TempDir()
	a.armMounts(10*time.Second, "ARMED", dir)
	a.say("FREEZE", "FROZEN")
	a.say("RESUME", "IN-TIME")
	if left, err := os.ReadDir(a.notes); err != nil || len(left) != 0 {
		t.Errorf("left in the folder of notes: %v, %v", left, err)
	}
	if err := os.RemoveAll(a.notes); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.notes, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.armMounts(time.Second, "ERROR a note of the freeze", dir)
}

// The service looks at notes when it begins and when an agent comes, which may
// have lost a dead-man of its own.
func TestServiceLooksAtNotes(t *testing.T) {
	folder := t.TempDir()
	note := filepath.Join(folder, notePrefix+"x")
	write := func() {
		t.Helper()
		if err := os.WriteFile(note, []byte("junk\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	looked := func(when string) {
		t.Helper()
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			if _, err := os.Stat(note); err != nil {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: not looked at", when)
			}
		}
	}
	write()
	s := startService(t, filepath.Join(folder, "s"))
	looked("it begins")
	write()
	s.guard(GuardOptions{})
	looked("an agent comes")
}

// What a killed dead-man froze is thawed wherever it is mounted by then: only in
// another mount namespace, or nowhere for a while.
func TestThawsWhereverItIsMounted(t *testing.T) {
	device := blocktest.Loop(t, 64<<20)
	r := newFrozenRig(t, blocktest.FileSystem(t, "ext4", device))
	holder := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ready && read l")
	stdin, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	end := sync.OnceFunc(func() { stdin.Close(); _ = holder.Wait() })
	defer end()
	if _, err := stdout.Read(make([]byte, 16)); err != nil {
		t.Fatal(err)
	}
	r.killedFreeze()
	f, err := os.Open(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	thaw := sync.OnceFunc(func() { _ = kernelFreezer{}.thaw(f) })
	defer thaw()
	frozen := func() bool { return errors.Is(kernelFreezer{}.freeze(f), unix.EBUSY) }
	if err := unix.Unmount(r.dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if r.sweep() || frozen() {
		t.Errorf("mounted in another namespace: not thawed: %s", r.log.text())
	}
	thaw()
	if err := unix.Mount(device, r.dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	end()

	r.guard = realGuardAt(t, r.notes)
	r.killedFreeze()
	g, err := os.Open(r.dir) // keeps it as the agent's descriptor would
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	if err := unix.Unmount(r.dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if r.sweepOnce() != sweepAgain || r.note() == "" || !strings.Contains(r.log.text(), "mounted nowhere") {
		t.Errorf("mounted nowhere: it is not tried again: note '%s', log %s", r.note(), r.log.text())
	}
	if err := unix.Mount(device, r.dir, "ext4", 0, ""); err != nil {
		_ = kernelFreezer{}.thaw(g)
		t.Fatal(err)
	}
	if r.sweepOnce() != 0 || r.note() != "" || r.isFrozen() {
		t.Errorf("mounted again: not thawed: note '%s', log %s", r.note(), r.log.text())
	}
}
