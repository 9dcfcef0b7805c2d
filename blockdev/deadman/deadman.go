package deadman

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/dm"
)

// The dead-man ends a stop of writers when the process that wanted it does not
// come back. One line each way, over a Unix socket:
//
//	ARM <limit in ms> <device> <device> ...   inner to outer; the agent suspends them
//	    -> ARMED, REFUSED <why> for the sake of a lease, or ERROR <why>
//	ARM-MOUNTS <limit in ms> <count>          so many descriptors come along, one of each file system
//	    -> ARMED, or ERROR <why>
//	FREEZE                                    after ARM-MOUNTS: the dead-man freezes them
//	    -> FROZEN; or BUSY <which>, LATE <why> or ERROR <why>, then none is frozen by it
//	RESUME
//	    -> IN-TIME or LATE <why>; or ERROR <why> if some may not be resumed
//	LEASE <device> <holder> <deadline in ns of this boot> <uuid>      the service alone: see deadline.go
//	EXTEND <device> <holder> <deadline in ns of this boot>
//	    -> HELD, ENDED <why> or ERROR <why>
//	RELEASE <device> <holder>
//	    -> RELEASED or ERROR <why>
//
// From ARMED on it resumes by itself once the limit has passed, and goes on
// looking every 100 ms until RESUME has fetched its LATE: the other side may
// have been stopped just before it suspended. When the connection closes it
// resumes and ends. IN-TIME says that the limit had not passed at RESUME and
// that the outermost device was still suspended then, or each file system
// frozen, so that nobody else had resumed it either: what was read in between
// was read under the stop.
//
// A device whose lease has ended is made to fail in place of being resumed, and
// none is armed whose lease might end meanwhile. A lease belongs to no connection.
//
// A file system is frozen by the dead-man itself: whether a freeze is the
// agent's or somebody else's could not be told by looking, and somebody else's
// is never thawed. It is named by a descriptor: the same mount point may lead
// elsewhere in another mount namespace, or nowhere. A note (see there) is written
// first, so that a later dead-man can thaw what a killed one froze.
const (
	deadmanRecheck = 100 * time.Millisecond
	// deadmanLastTries bounds how often a dead-man without an agent tries.
	deadmanLastTries = 600
	maxLineBytes     = 4096
	maxDevices       = 16
	// MaxLimit bounds what the dead-man takes for a limit.
	MaxLimit = time.Minute
)

// resumer resumes a device that is suspended and leaves any other alone; held
// says which it was. A device that does not exist is no error.
type resumer interface {
	resume(name string) (held bool, err error)
	// ready says before anything is suspended whether resume would work.
	ready() error
}

// Run is the whole life of a dead-man that one agent started: it serves the
// Unix socket (Guard's other end of it) until that closes. It is the only
// thing its process should do. The process is locked in memory, real-time where
// that is permitted, and ignores the signals that end an agent. In the folder notes it writes what it freezes, and
// thaws what a killed dead-man noted there; without one it freezes nothing.
func Run(socket *os.File, notes string) error {
	// An answer that nobody takes must not end it: there may be devices to resume.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := becomeDeadMan(log); err != nil {
		return err
	}
	conn, err := net.FileConn(socket)
	if err != nil {
		return fmt.Errorf("dead-man: it is started by an agent, at the end of a socket: %w", err)
	}
	defer conn.Close()
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("dead-man: a %T, want a Unix socket", conn)
	}
	mapper := dmResumer{log: log}
	defer mapper.close()
	_ = mapper.ready() // at ARM it is tried again
	fence := &striker{notes, &mapper, bootTime}
	in := &inbox{conn: unixConn}
	defer in.close()
	done := make(chan struct{})
	defer close(done)
	left := &sweeper{notes, kernelFreezer{}, bootTime, log}
	go left.until(done, nil)
	return (&deadman{resumer: &mapper, freezer: kernelFreezer{}, now: bootTime, out: conn, inbox: in, notes: notes, fence: fence}).run(in)
}

// becomeDeadMan makes this process one that waits for nothing.
func becomeDeadMan(log *slog.Logger) error {
	rush(log)
	debug.SetGCPercent(-1) // it allocates some hundred bytes a cut
	debug.SetMemoryLimit(64 << 20)
	// A kernel short of memory should take anybody else. Not every place allows it.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	return LockMemory()
}

// LockMemory keeps every page the process has touched in memory, now and from
// now on, so that it needs no disk it has itself suspended.
func LockMemory() error {
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		return fmt.Errorf("lock memory: %w", err)
	}
	return nil
}

// bootTime runs on while the machine sleeps.
func bootTime() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		panic(err) // the clock is there since Linux 2.6.39
	}
	return time.Duration(t.Nano())
}

// dmResumer resumes device-mapper's devices. A kernel without device-mapper
// has none; it is opened at the first ARM that needs it.
type dmResumer struct {
	log     *slog.Logger // nil: the default one
	mu      sync.Mutex
	control *dm.Control
}

func (r *dmResumer) ready() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.control != nil {
		return nil
	}
	var err error
	r.control, err = dm.Open()
	return err
}

func (r *dmResumer) close() {
	if r.control != nil {
		r.control.Close()
	}
}

func (r *dmResumer) resume(name string) (held bool, err error) {
	info, err := r.control.Info(name)
	if err != nil || !info.Suspended || !info.HasActive {
		return false, err
	}
	return true, r.control.Resume(name)
}

func (r *dmResumer) identify(name string) (is identity, how condition, err error) {
	info, err := r.control.Info(name)
	if err != nil || !info.Exists {
		return identity{}, condition{}, err
	}
	is = identity{uuid: info.UUID, number: info.Dev()}
	if !info.HasActive { // some kernels number it with its first table
		return is, condition{}, nil
	}
	if is.sequence, err = sequenceOf(is.number); err != nil {
		return identity{}, condition{}, fmt.Errorf("which device %s is can't be told: %w", name, err)
	}
	table, err := r.control.Table(name)
	return is, condition{dm.Failing(table), info.Suspended}, err
}

func (r *dmResumer) fail(name string) error {
	return r.control.Fail(name, func(err error) {
		log := r.log
		if log == nil {
			log = slog.Default()
		}
		log.Error("a volume fails, and its disk was not flushed before", "volume", name, "error", err)
	})
}

// deadman serves one agent's guard: one stop of writers at a time.
type deadman struct {
	resumer  resumer
	freezer  freezer
	now      func() time.Duration
	out      io.Writer
	inbox    *inbox
	stopping <-chan struct{} // closed: end as soon as nothing is armed; may be nil
	notes    string          // folder
	fence    *striker
	leases   *deadlines // nil: it is no service

	holds    holds         // of devices
	devices  []string      // inner to outer; of the last ARM
	mounts   []mount       // of the last ARM-MOUNTS
	note     *note         // of mounts
	armed    bool          // from ARM to the answer to RESUME
	deadline time.Duration // on now's clock
	safe     time.Duration // before that the lease of devices can't have ended
	late     string        // why it is late; "" while in time
}

func (d *deadman) run(in io.Reader) error {
	defer func() { d.holds.close() }()
	lines := make(chan string)
	ended := make(chan error, 1)
	done := make(chan struct{})
	defer close(done)
	go func() { // ends with in, at the latest one line after this function
		scanner := bufio.NewScanner(in)
		scanner.Buffer(make([]byte, maxLineBytes), maxLineBytes)
		for scanner.Scan() {
			select {
			case lines <- scanner.Text():
			case <-done:
				return
			}
		}
		ended <- scanner.Err()
	}()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	stopping := d.stopping
	for {
		switch {
		case d.armed:
			timer.Reset(d.wait())
		case stopping == nil && d.stopping != nil:
			return d.leave()
		default:
			timer.Stop()
		}
		select {
		case <-stopping:
			stopping = nil
		case line := <-lines:
			if err := d.answer(line); err != nil {
				return errors.Join(err, d.leave())
			}
		case <-timer.C:
			d.look()
		case err := <-ended:
			return errors.Join(err, d.leave())
		}
	}
}

func (d *deadman) wait() time.Duration {
	if d.late != "" {
		return deadmanRecheck
	}
	return max(d.deadline-d.now(), 0)
}

// look resumes what is armed once its time is over.
func (d *deadman) look() {
	if !d.armed || d.late == "" && d.now() < d.deadline {
		return
	}
	d.checkTime()
	_, _ = d.resumeAll() // tried again while armed; RESUME's own try is answered
}

// checkTime notes that the limit has passed.
func (d *deadman) checkTime() {
	if d.late == "" && d.now() >= d.deadline {
		d.late = "the stall limit passed"
	}
}

func (d *deadman) answer(line string) error {
	command, rest, _ := strings.Cut(line, " ")
	switch command {
	case "ARM", "ARM-MOUNTS":
		arm := d.arm
		if command == "ARM-MOUNTS" {
			arm = d.armMounts
		}
		err := arm(strings.Fields(rest))
		if errors.Is(err, errNear) {
			return d.say("REFUSED " + err.Error())
		}
		if err != nil {
			return d.say("ERROR " + err.Error())
		}
		return d.say("ARMED")
	case "FREEZE":
		return d.say(d.freeze())
	case "LEASE", "EXTEND", "RELEASE":
		return d.say(d.leases.answer(command, strings.Fields(rest)))
	case "RESUME":
		if !d.armed {
			return d.say("ERROR not armed")
		}
		d.checkTime()
		gone, err := d.resumeAll()
		if err != nil {
			if d.late == "" {
				d.late = "resume failed: " + err.Error()
			}
			return d.say("ERROR resume failed: " + err.Error()) // and is tried again
		}
		if d.late == "" {
			d.late = gone
		}
		d.disarm()
		if d.late != "" {
			return d.say("LATE " + d.late)
		}
		return d.say("IN-TIME")
	}
	return d.say("ERROR what is '" + command + "'?")
}

func (d *deadman) arm(fields []string) error {
	if len(fields) < 2 || len(fields) > maxDevices+1 {
		return fmt.Errorf("ARM wants a limit and 1 to %d devices", maxDevices)
	}
	limit, err := d.limit(fields[0])
	if err != nil {
		return err
	}
	if err := d.resumer.ready(); err != nil {
		return err
	}
	if d.safe, err = d.fence.mayStop(fields[len(fields)-1], limit); err != nil {
		return err
	}
	if d.holds.file == nil {
		d.holds, _ = openHolds(d.notes)
	}
	d.holds.share(fields[1:])
	d.begin(limit, fields[1:], nil)
	return nil
}

func (d *deadman) limit(field string) (time.Duration, error) {
	if d.armed {
		return 0, errors.New("already armed")
	}
	ms, err := strconv.ParseInt(field, 10, 32)
	limit := time.Duration(ms) * time.Millisecond
	if err != nil || limit <= 0 || limit > MaxLimit {
		return 0, fmt.Errorf("'%s' is no limit in ms up to %d", field, MaxLimit.Milliseconds())
	}
	return limit, nil
}

func (d *deadman) begin(limit time.Duration, devices []string, mounts []mount) {
	d.devices, d.mounts, d.late, d.armed = devices, mounts, "", true
	d.deadline = d.now() + limit
}

// resumeAll resumes what is suspended, unless its lease has ended, and thaws what
// is frozen; gone says what was not any more though it should have been.
func (d *deadman) resumeAll() (gone string, err error) {
	var errs []error
	for i, name := range d.devices {
		top := i == len(d.devices)-1  // the inner ones the agent resumes itself as part of a cut
		if top && d.now() >= d.safe { // no file is read before, lest it need memory
			ended, err := d.fence.overdue(name)
			if ended || err != nil {
				errs = append(errs, err)
				d.late = "the lease of " + name + " has ended, or can't be read: everything on it fails"
				continue // one that runs may be suspended yet, and is looked at again
			}
		}
		held, err := d.resumer.resume(name)
		if err != nil {
			errs = append(errs, err)
		}
		if top && !held {
			gone = name + " was not suspended any more: somebody else resumed it"
		}
	}
	if len(d.mounts) > 0 {
		gone, err = d.thaw()
		errs = append(errs, err)
	}
	return gone, errors.Join(errs...)
}

func (d *deadman) disarm() {
	d.armed = false
	d.holds.drop()
	for _, m := range d.mounts {
		m.file.Close()
	}
	d.mounts = nil
	if d.note != nil {
		d.note.close()
		d.note = nil
	}
}

// leave resumes for the last time: the agent is gone, or can't be spoken to.
func (d *deadman) leave() error {
	var err error
	for range deadmanLastTries {
		if _, err = d.resumeAll(); err == nil {
			d.disarm()
			return nil
		}
		time.Sleep(deadmanRecheck)
	}
	return fmt.Errorf("dead-man: devices may stay suspended, or file systems frozen: %w", err)
}

func (d *deadman) say(line string) error {
	line = strings.ReplaceAll(line, "\n", "; ")
	line = line[:min(len(line), maxLineBytes-1)] // what the other side takes
	_, err := io.WriteString(d.out, line+"\n")
	return err
}
