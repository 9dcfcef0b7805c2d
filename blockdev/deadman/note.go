package deadman

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// A note proves that a freeze is a dead-man's own, should that be killed in the
// middle of it. It stands, while file systems are armed, in a folder that
// outlives the process:
//
//	blockferry freeze 2 <boot id> <process> <milliseconds of this boot at FREEZE>
//	<state> <major:minor> <disk's sequence> <sectors written> "<mount point>"
//	...a line of each file system
//
// Version 1 had other fields. Each write replaces all of it by as many bytes. The
// states are those below.
// 'freezing' is written just before the kernel is asked. It and 'frozen' say how
// many sectors were ever written to the device then: nothing writes to what is
// frozen, and every freeze writes to it, so while that number is the same as at
// 'frozen' it is still this freeze, and while it is the same as at 'freezing' it
// was another before. Without statistics it is -1, and 'frozen' proves nothing.
//
// Its writer holds a lock on it. The kernel ends that with the process, but not
// before a freeze that is under way is done. A writer that is stopped (SIGSTOP) is
// as good as ended; once it goes on it finds its freeze gone.
const (
	noteArmed    = "armed"
	noteFreezing = "freezing"
	noteFrozen   = "frozen"
	noteThawed   = "thawed"

	noteVersion = 2
	notePrefix  = "freeze-"
	// freezingAge is for how long 'freezing' counts for a freeze that is found:
	// later it may have been thawed by hand, and be another.
	freezingAge = 10 * time.Minute
	// maxPathBytes of a mount point are noted, for people.
	maxPathBytes = 128
	// sweepAgain is the pause before what could not be thawed is tried again.
	sweepAgain = 30 * time.Second
	// sweepPatience is how long an agent looks whether a note's writer has ended.
	sweepPatience = 10 * time.Minute
)

type note struct {
	file    *os.File // locked
	path    string
	boot    string
	pid     int           // its writer's
	since   time.Duration // of this boot, at FREEZE
	entries []noteEntry
	text    []byte
}

type noteEntry struct {
	state    string
	number   string // the device's, "major:minor"
	sequence uint64
	written  int64 // sectors
	point    string
	stat     *os.File // nil: the kernel keeps no statistics
}

// newNote writes a note of what is armed.
func newNote(folder string, mounts []mount) (_ *note, err error) {
	if folder == "" {
		return nil, errors.New("no folder for a note of the freeze")
	}
	n := &note{pid: os.Getpid(), text: make([]byte, 0, maxLineBytes)}
	defer func() {
		if err != nil {
			n.close()
			err = fmt.Errorf("a note of the freeze: %w", err)
		}
	}()
	if n.boot, err = bootID(); err != nil {
		return nil, err
	}
	for _, m := range mounts {
		e, err := entryOf(m.file)
		if err != nil {
			return nil, err
		}
		e.stat, _ = os.Open(sysfs(e.number) + "/stat")
		n.entries = append(n.entries, e)
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, err
	}
	// Locked before it has the name that a sweep looks for.
	if n.file, err = os.CreateTemp(folder, "new-*"); err != nil {
		return nil, err
	}
	n.path = n.file.Name()
	if err := unix.Flock(int(n.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, err
	}
	if err := n.write(); err != nil {
		return nil, err
	}
	n.path = filepath.Join(folder, notePrefix+strings.TrimPrefix(filepath.Base(n.file.Name()), "new-"))
	return n, os.Rename(n.file.Name(), n.path)
}

func bootID() (string, error) {
	id, err := blockdev.BootID()
	return fmt.Sprintf("%x", id), err
}

// entryOf describes the file system that f is on.
func entryOf(f *os.File) (noteEntry, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return noteEntry{}, err
	}
	e := noteEntry{state: noteArmed, written: -1, point: f.Name()[:min(len(f.Name()), maxPathBytes)]}
	e.number = fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	var err error
	if e.sequence, err = sequenceOf(e.number); errors.Is(err, os.ErrNotExist) {
		err = nil // a file system of no block device's
	}
	return e, err
}

func sysfs(number string) string { return "/sys/dev/block/" + number }

// sequenceOf is the number of the disk among all of this boot, 0 if the kernel
// numbers none. os.ErrNotExist: there is no such device.
func sequenceOf(number string) (uint64, error) {
	dir, err := filepath.EvalSymlinks(sysfs(number))
	if err != nil {
		return 0, err
	}
	return sequenceAt(dir)
}

// sequenceAt is sequenceOf by the device's folder.
func sequenceAt(dir string) (n uint64, err error) {
	for _, d := range []string{dir, filepath.Dir(dir)} { // a partition's disk has it
		text, err := os.ReadFile(d + "/diskseq")
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			_, err = fmt.Sscan(string(text), &n)
		}
		if err != nil {
			return 0, fmt.Errorf("%s/diskseq: %w", d, err)
		}
		return n, nil
	}
	return 0, nil
}

// writtenNow is how many sectors were written to the device, -1 if that is not
// known.
func (e *noteEntry) writtenNow() int64 {
	if e.stat == nil {
		return -1
	}
	var b [512]byte
	n, err := e.stat.ReadAt(b[:], 0)
	sectors, ok := blockdev.StatField(b[:n], 7)
	if err != nil && !errors.Is(err, io.EOF) || !ok || sectors == 0 {
		return -1 // a file system is there: something was written, and not counted
	}
	return int64(sectors)
}

func (n *note) write() error {
	n.text = fmt.Appendf(n.text[:0], "blockferry freeze %d %s %d %20d\n", noteVersion, n.boot, n.pid, n.since.Milliseconds())
	for i := range n.entries {
		e := &n.entries[i]
		n.text = fmt.Appendf(n.text, "%-8s %s %d %20d %q\n", e.state, e.number, e.sequence, e.written, e.point)
	}
	_, err := n.file.WriteAt(n.text, 0)
	return err
}

// set notes a file system's state.
func (n *note) set(i int, state string) error {
	e := &n.entries[i]
	e.state = state
	if state == noteFreezing || state == noteFrozen {
		e.written = e.writtenNow()
	}
	return n.write()
}

// close ends a note that is of no use any more.
func (n *note) close() {
	for _, e := range n.entries {
		if e.stat != nil {
			e.stat.Close()
		}
	}
	if n.file != nil {
		os.Remove(n.path)
		n.file.Close()
	}
}

// openNote opens a note, which has to be a file of this process's user.
func openNote(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err = unix.Fstat(int(f.Fd()), &st); err == nil && (st.Mode&unix.S_IFMT != unix.S_IFREG || int(st.Uid) != os.Geteuid()) {
		err = fmt.Errorf("%s is no file of user %d", name, os.Geteuid())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func noteText(f io.ReaderAt) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, 0, 2*maxDevices*(maxPathBytes*4+64)))
}

// mayBeFrozen are the mount points that a note may have left frozen, as far as one
// of another version, or a torn one, tells: each is at the end of its line.
func mayBeFrozen(f io.ReaderAt) (points []string) {
	text, _ := noteText(f) // it was read a moment ago
	for line := range strings.Lines(string(text)) {
		state, rest, _ := strings.Cut(line, " ")
		_, point, found := strings.Cut(rest, `"`)
		if point, err := strconv.Unquote(`"` + strings.TrimSpace(point)); found && err == nil && state != noteArmed && state != noteThawed {
			points = append(points, point)
		}
	}
	return points
}

// readNote parses a note.
func readNote(f io.ReaderAt) (*note, error) {
	text, err := noteText(f)
	if err != nil {
		return nil, err
	}
	n := &note{}
	version, ms := 0, int64(0)
	head, rest, _ := strings.Cut(string(text), "\n")
	if _, err := fmt.Sscanf(head, "blockferry freeze %d %s %d %d", &version, &n.boot, &n.pid, &ms); err != nil || version != noteVersion {
		return nil, fmt.Errorf("'%s' begins no note of a freeze, version %d", head, noteVersion)
	}
	n.since = time.Duration(ms) * time.Millisecond
	for line := range strings.Lines(rest) {
		var e noteEntry
		if _, err := fmt.Sscanf(line, "%s %s %d %d %q", &e.state, &e.number, &e.sequence, &e.written, &e.point); err != nil {
			return nil, fmt.Errorf("'%s' is no line of a note of a freeze: %w", strings.TrimSpace(line), err)
		}
		n.entries = append(n.entries, e)
	}
	return n, nil
}

// proves says why a freeze that is found now may not be thawed by this note,
// "" if it may. Its writer has ended.
func (n *note) proves(e *noteEntry, now time.Duration) string {
	sequence, err := sequenceOf(e.number)
	switch {
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return "whether another disk is in its place can't be told: " + err.Error()
	case e.sequence != sequence:
		return "another disk is in its place"
	case e.state == noteFreezing && now-n.since > freezingAge:
		return "too long ago: the freeze that is there may be another"
	}
	e.stat, _ = os.Open(sysfs(e.number) + "/stat")
	if e.stat != nil {
		defer e.stat.Close()
	}
	written := e.writtenNow()
	switch same := written >= 0 && written == e.written; {
	case e.state == noteFrozen && !same:
		return "something was written since: the freeze that is there may be another"
	case e.state == noteFreezing && same:
		return "no freeze wrote to it: the one that is there was there before"
	}
	return ""
}

// sweeper thaws what killed dead-men left frozen.
type sweeper struct {
	folder  string
	freezer freezer
	now     func() time.Duration
	log     *slog.Logger
}

func (s *sweeper) notes() []string {
	if s.folder == "" {
		return nil
	}
	names, _ := filepath.Glob(filepath.Join(s.folder, notePrefix+"*")) // the pattern is well-formed
	return names
}

// sweep looks at all notes once, and says when to look again: after deadmanRecheck
// if some have a writer that lives, or that the kernel has not ended yet, after
// sweepAgain if something could not be thawed, 0 for never.
func (s *sweeper) sweep() (again time.Duration) {
	for _, name := range s.notes() {
		f, err := openNote(name)
		if err != nil {
			continue // it has ended, or is none
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			again = deadmanRecheck
			if n, err := readNote(f); err == nil && stopped(n.pid) {
				s.one(f)
			}
		} else if s.one(f) {
			os.Remove(name)
		} else if again == 0 {
			again = sweepAgain
		}
		f.Close()
	}
	return again
}

// stopped says that every thread of a process is. One that the kernel is at is not.
func stopped(pid int) bool {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, thread := range threads {
		text, err := os.ReadFile(thread)
		state := text[bytes.LastIndexByte(text, ')')+1:] // behind its name
		if err != nil || !bytes.HasPrefix(state, []byte(" T")) && !bytes.HasPrefix(state, []byte(" t")) {
			return false
		}
	}
	return len(threads) > 0
}

// until sweeps until no note is left that asks for more, and again at each wake.
func (s *sweeper) until(stop <-chan struct{}, wake <-chan struct{}) {
	for {
		var again <-chan time.Time
		if pause := s.sweep(); pause > 0 {
			again = time.After(pause)
		}
		select {
		case <-stop:
			return
		case <-wake:
		case <-again:
		}
	}
}

// one thaws what a note proves, and notes that, lest it be done twice; done: the
// note is of no use any more.
func (s *sweeper) one(f *os.File) (done bool) {
	n, err := readNote(f)
	if err != nil {
		s.log.Warn("a note of a freeze can't be read and is removed; should a file system that it names be frozen it is left so, thaw it with 'fsfreeze --unfreeze' if nobody needs it frozen",
			"note", f.Name(), "error", err, "file-systems", mayBeFrozen(f))
		return true
	}
	if boot, err := bootID(); err != nil || boot != n.boot {
		return err == nil
	}
	done, n.file = true, f
	dealt := func(e *noteEntry) {
		e.state = noteThawed
		_ = n.write() // it is removed in a moment, unless its writer is only stopped
	}
	for i := range n.entries {
		e := &n.entries[i]
		if e.state != noteFreezing && e.state != noteFrozen {
			continue
		}
		if why := n.proves(e, s.now()); why != "" {
			s.log.Warn("a dead-man was killed or stopped while it had frozen a file system; should it be frozen now it is left so, thaw it with 'fsfreeze --unfreeze' if nobody needs it frozen",
				"file-system", e.point, "device", e.number, "reason", why)
			dealt(e)
			continue
		}
		switch err := s.thaw(e); {
		case err == nil:
			s.log.Warn("a dead-man was killed or stopped while it had frozen a file system; it is thawed", "file-system", e.point, "device", e.number)
			dealt(e)
		case errors.Is(err, unix.EINVAL): // it is not frozen
			dealt(e)
		default:
			s.log.Warn("a file system may be frozen since its dead-man was killed; thaw it with 'fsfreeze --unfreeze'", "file-system", e.point, "device", e.number, "error", err)
			done = false
		}
	}
	return done
}

// thaw thaws by any mount of the file system.
func (s *sweeper) thaw(e *noteEntry) error {
	device, err := blockdev.Node(e.number)
	if err != nil {
		return err // the device is gone
	}
	mounts, _, err := blockdev.Usage(device)
	if err != nil {
		return err
	}
	errs := []error{errors.New("it is mounted nowhere")}
	for _, m := range mounts {
		if m.Number != e.number {
			continue
		}
		f, err := os.OpenFile(m.Path(), os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if is, err := entryOf(f); err == nil && is.number == e.number {
			err = s.freezer.thaw(f)
			f.Close()
			return err
		}
		f.Close()
	}
	return errors.Join(errs...)
}

// Thaw thaws the file systems that files are on which, by its note, a dead-man
// froze in the window under way: for Resume, should that dead-man not answer.
// Anybody else's freeze is left alone. One that the kernel has not finished is
// thawed by whoever asked for it or, if that was killed, from here later on.
func (g *Guard) Thaw(files ...*os.File) error {
	s := &sweeper{g.options.Notes, kernelFreezer{}, bootTime, g.options.Log}
	var errs []error
	for _, f := range files {
		errs = append(errs, s.thawSince(g.armed, f))
	}
	go func() { // ends by itself: not even Close is to keep it from its work
		for end := s.now() + sweepPatience; s.now() < end; {
			pause := s.sweep()
			if pause == 0 {
				return
			}
			time.Sleep(pause)
		}
	}()
	return errors.Join(errs...)
}

// thawSince thaws what was frozen since a time of this boot, whether the note's
// writer lives or not.
func (s *sweeper) thawSince(since time.Duration, f *os.File) error {
	is, err := entryOf(f)
	if err != nil {
		return err
	}
	for _, name := range s.notes() {
		file, err := openNote(name)
		if err != nil {
			continue
		}
		n, err := readNote(file)
		file.Close()
		if err != nil || n.since < since.Truncate(time.Millisecond) {
			continue
		}
		for _, e := range n.entries {
			if e.number != is.number || e.sequence != is.sequence || e.state != noteFrozen {
				continue
			}
			if err := s.freezer.thaw(f); err != nil && !errors.Is(err, unix.EINVAL) {
				return fmt.Errorf("thaw %s: %w", f.Name(), err)
			}
		}
	}
	return nil
}
