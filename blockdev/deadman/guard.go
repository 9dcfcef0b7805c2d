package deadman

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// answerPatience is how long ARM's answer may take, and the end of a
	// dead-man's process; nothing is suspended meanwhile. A service gets
	// servicePatience: without it the cut goes on all the same.
	answerPatience  = 5 * time.Second
	servicePatience = time.Second
	// resumeGrace is how long after the stall limit RESUME's answer may come.
	// Then the agent resumes by itself.
	resumeGrace = 100 * time.Millisecond
	// serviceAgain is how long a service that did not answer is left alone.
	serviceAgain = 10 * time.Second
	// armTries: the first may find that the dead-man has ended, the second
	// that the service there now refuses.
	armTries = 3
)

// ErrLate says that the stall limit passed, that the dead-man died or that
// somebody else resumed while writers were stopped: what was done in that time
// is worth nothing.
var ErrLate = errors.New("the suspend did not hold until its end")

// ErrStopped says that neither the dead-man nor the agent could let writers go on:
// they may be stopped still.
var ErrStopped = errors.New("writers may still be stopped")

// ErrFrozen says that somebody else had frozen a file system. It was left so.
var ErrFrozen = errors.New("frozen by somebody else")

// GuardOptions says where a guard finds its dead-man.
type GuardOptions struct {
	// Socket is where a dead-man's service answers (Serve), "" for
	// none. It is looked for before each suspend.
	Socket string
	// Notes is the folder in which the dead-man notes what it freezes and which
	// leases it holds; "": beside Socket.
	Notes string
	// Command starts a dead-man while there is no service: its main must be
	// Run on its standard input, which is a socket. Its standard error is this
	// process's.
	Command []string
	// ServiceExpected has it logged as a warning when there is no service.
	ServiceExpected bool
	// Log is told when the dead-man changes; nil for nobody.
	Log *slog.Logger
}

func (o *GuardOptions) notes() string {
	if o.Notes == "" && o.Socket != "" {
		return filepath.Dir(o.Socket)
	}
	return o.Notes
}

// Guard is the agent's side of the dead-man: a connection to its service or to
// a process of its own, made again when it ended. It serves one stop of writers
// at a time: a suspend of devices, or a freeze of file systems.
type Guard struct {
	options GuardOptions
	fence   *striker

	window sync.Mutex // held from arm to resume
	mu     sync.Mutex // guards what follows
	link   *link
	closed bool

	// These belong to who holds window.
	armed    time.Duration // when that was, since boot
	limit    time.Duration // of the suspend
	deadline time.Time     // of the suspend
	notYet   time.Time     // the service is left alone until then
	lost     error         // FREEZE was not answered
	top      string        // the outermost device, "" of file systems
	resume   [7]byte       // requests that must not allocate
	freeze   [7]byte
	reply    [maxLineBytes]byte
}

// NewGuard finds or starts a dead-man.
func NewGuard(o GuardOptions) (*Guard, error) {
	if len(o.Command) == 0 {
		return nil, errors.New("the dead-man needs a command")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Notes = o.notes()
	g := &Guard{options: o, fence: &striker{o.Notes, &dmResumer{log: o.Log}, bootTime}}
	return g, g.ensure()
}

// Pid is the dead-man's process id, 0 when there is none.
func (g *Guard) Pid() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.link == nil {
		return 0
	}
	return g.link.pid
}

// Close lets the dead-man go, after a suspend that is under way. A process
// of the guard's own ends.
func (g *Guard) Close() error {
	g.window.Lock()
	defer g.window.Unlock()
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	return g.exchange(nil)
}

// ensure connects to the dead-man's service or, if it is not there, starts a
// dead-man of its own, unless there is one already.
func (g *Guard) ensure() error {
	g.mu.Lock()
	now, closed := g.link, g.closed
	g.mu.Unlock()
	if closed {
		return errors.New("the dead-man was let go")
	}
	if now != nil && now.failed {
		_ = g.exchange(nil)
		now = nil
	}
	if now != nil && now.child == nil {
		return nil
	}
	var missing error
	if g.options.Socket != "" && !time.Now().Before(g.notYet) {
		var l *link
		if l, missing = connect(g.options.Socket); missing == nil {
			g.options.Log.Info("the dead-man's service looks after suspends", "socket", g.options.Socket, "pid", l.pid)
			return g.exchange(l)
		}
	}
	if now != nil {
		return nil
	}
	l, err := spawn(g.options.Command)
	if err != nil {
		return fmt.Errorf("start the dead-man: %w", errors.Join(err, missing))
	}
	g.tell(l, missing)
	return g.exchange(l)
}

// tell logs that a dead-man of the agent's own had to be started; missing is
// why the service did not do, nil if it was left alone.
func (g *Guard) tell(l *link, missing error) {
	if g.options.Socket == "" {
		return
	}
	if missing == nil {
		missing = errors.New("it did not answer")
	}
	say := g.options.Log.Info
	if g.options.ServiceExpected {
		say = g.options.Log.Warn
	}
	say("the dead-man's service is not there; the agent starts a dead-man of its own: whatever kills the agent's whole control group kills both, "+
		"and a volume may stay suspended until the next agent; start the service (systemctl enable --now blockferry-deadman), it is taken at the next cut",
		"socket", g.options.Socket, "error", missing, "pid", l.pid)
}

// exchange puts another connection in the present one's place and ends that.
func (g *Guard) exchange(l *link) error {
	g.mu.Lock()
	old := g.link
	g.link = l
	g.mu.Unlock()
	if old == nil {
		return nil
	}
	return old.end()
}

// fail notes that the present connection is of no use any more; ensure makes
// another. A service that hangs, or fails right after it was connected to, is
// left alone for a while. It does not wait: devices may be suspended.
func (g *Guard) fail(err error, fresh bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.link == nil {
		return
	}
	g.link.failed = true
	if g.link.child == nil && (fresh || errors.Is(err, os.ErrDeadlineExceeded)) {
		g.notYet = time.Now().Add(serviceAgain)
	}
}

// Arm has the devices (inner to outer) resumed when limit passes or this
// process ends. After it returned nil, Resume must be called; until then
// nobody else is served.
func (g *Guard) Arm(limit time.Duration, devices ...string) error {
	top := ""
	if len(devices) > 0 {
		top = devices[len(devices)-1]
	}
	return g.arm(limit, fmt.Sprintf("ARM %d %s\n", limit.Milliseconds(), strings.Join(devices, " ")), nil, top)
}

// ArmMounts has the file systems that the given files are on, each only once,
// thawed when limit passes or this process ends, once Freeze has frozen them.
// After it returned nil, Resume must be called. The files may be closed when
// it returns.
func (g *Guard) ArmMounts(limit time.Duration, files ...*os.File) error {
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	err := g.arm(limit, fmt.Sprintf("ARM-MOUNTS %d %d\n", limit.Milliseconds(), len(files)), unix.UnixRights(fds...), "")
	runtime.KeepAlive(files)
	return err
}

func (g *Guard) arm(limit time.Duration, line string, rights []byte, top string) error {
	g.window.Lock()
	g.lost, g.top = nil, top
	var err error
	for try := range armTries {
		if err = g.ensure(); err != nil {
			break
		}
		g.armed, g.limit = bootTime(), limit
		// The dead-man's limit begins later than this one.
		g.deadline = time.Now().Add(limit)
		var answer []byte
		answer, err = g.ask([]byte(line), rights, time.Now().Add(g.patience()))
		if err == nil && string(answer) == "ARMED" {
			copy(g.resume[:], "RESUME\n")
			copy(g.freeze[:], "FREEZE\n")
			return nil
		}
		if why, refused := bytes.CutPrefix(answer, []byte("REFUSED ")); err == nil && refused {
			err = errors.New(string(why))
			break // no other dead-man would do it
		}
		if err == nil {
			err = fmt.Errorf("the dead-man answers '%s'", answer)
		}
		g.fail(err, try > 0)
	}
	g.window.Unlock()
	return fmt.Errorf("arm the dead-man: %w", err)
}

// Freeze has the dead-man freeze what ArmMounts named, all or nothing.
// ErrFrozen: somebody else had frozen one. ErrLate: it took longer than the
// limit, or the dead-man is dead. Whatever it returns, Resume must follow. It
// waits for the kernel, which no limit ends, at most until the limit and a
// tenth of a second; it allocates nothing unless it fails.
func (g *Guard) Freeze() error {
	answer, err := g.ask(g.freeze[:], nil, g.deadline.Add(resumeGrace))
	if err != nil {
		g.lost = err
		g.mu.Lock()
		if g.link != nil {
			g.link.freezing = errors.Is(err, os.ErrDeadlineExceeded)
		}
		g.mu.Unlock()
		return fmt.Errorf("%w: the dead-man is gone in the middle of a freeze: %w", ErrLate, err)
	}
	if string(answer) == "FROZEN" {
		return nil
	}
	if which, busy := bytes.CutPrefix(answer, []byte("BUSY ")); busy {
		return fmt.Errorf("%s is %w: it is left so, thaw it with 'fsfreeze --unfreeze' if nobody needs it frozen", which, ErrFrozen)
	}
	if why, late := bytes.CutPrefix(answer, []byte("LATE ")); late {
		return fmt.Errorf("%w: %s", ErrLate, why)
	}
	return fmt.Errorf("the dead-man answers '%s'", answer)
}

// Resume has the devices resumed and the file systems thawed. Its error is
// ErrLate when the dead-man was faster, or is dead; in the latter case rescue
// was called, which has to resume them. ErrStopped: that failed. It is called
// within Quiet.
func (g *Guard) Resume(rescue func() error) error {
	defer g.window.Unlock()
	limit := time.Now()
	if limit.Before(g.deadline) {
		limit = g.deadline
	}
	var answer []byte
	err := g.lost // its answer to FREEZE, should it come, is none to RESUME
	if err == nil {
		answer, err = g.ask(g.resume[:], nil, limit.Add(resumeGrace))
	}
	if why, late := bytes.CutPrefix(answer, []byte("LATE ")); err == nil && late {
		return fmt.Errorf("%w: %s", ErrLate, why)
	}
	if err == nil && string(answer) == "IN-TIME" {
		return nil
	}
	runs, rescued := g.ended()
	if !runs && rescued == nil {
		rescued = rescue()
	}
	if rescued != nil {
		rescued = fmt.Errorf("%w: %w", ErrStopped, rescued)
	}
	if err == nil {
		err = fmt.Errorf("the dead-man answers '%s'", answer)
	} else {
		err = fmt.Errorf("the dead-man is gone: %w", err)
	}
	g.fail(err, false)
	return errors.Join(fmt.Errorf("%w: %w", ErrLate, err), rescued)
}

// ended makes the outermost device fail if it is suspended and its lease has
// ended: what is held back must not be written. runs says that it has ended and
// the device was not suspended: a resume might wait for what is in flight, in the
// place of the dead-man that does so. With an error it must not be resumed.
func (g *Guard) ended() (runs bool, err error) {
	if g.top == "" || g.fence.now() < g.armed+g.limit { // until then the dead-man made sure, and no file is read
		return false, nil
	}
	over, err := g.fence.passed(g.top)
	if err != nil || !over {
		return false, err
	}
	loudly(func() { over, err = g.fence.overdue(g.top) }) // a flush may take seconds, and this stop is void
	if err != nil || !over {
		return false, err
	}
	_, how, err := g.fence.devices.identify(g.top)
	return !how.fails, err
}

func (g *Guard) patience() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.link != nil && g.link.child == nil {
		return servicePatience
	}
	return answerPatience
}

// ask sends a line, with descriptors if there are rights, and reads one; what
// it returns is valid until the next ask.
func (g *Guard) ask(line, rights []byte, deadline time.Time) ([]byte, error) {
	g.mu.Lock()
	l := g.link
	g.mu.Unlock()
	if l == nil {
		return nil, io.ErrClosedPipe
	}
	if err := l.conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	var err error
	if rights == nil {
		_, err = l.conn.Write(line)
	} else {
		_, _, err = l.conn.WriteMsgUnix(line, rights, nil)
	}
	if err != nil {
		return nil, err
	}
	for n := 0; n < len(g.reply); {
		m, err := l.conn.Read(g.reply[n:])
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

// noCollections counts the suspends under way in this process, of all guards.
var noCollections struct {
	sync.Mutex
	count   int
	percent int // the setting from before the first of them
}

// Quiet runs f without garbage collection. Those of several guards may overlap:
// the last to end restores the setting.
func Quiet(f func()) {
	quiet()
	defer unquiet()
	f()
}

// loudly runs f, within Quiet, as if that had ended.
func loudly(f func()) {
	unquiet()
	defer quiet()
	f()
}

func quiet() {
	n := &noCollections
	n.Lock()
	defer n.Unlock()
	if n.count == 0 {
		n.percent = debug.SetGCPercent(-1) // waits for a collection under way
	}
	n.count++
}

func unquiet() {
	n := &noCollections
	n.Lock()
	defer n.Unlock()
	if n.count--; n.count == 0 {
		debug.SetGCPercent(n.percent)
	}
}
