package volume

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/dm"
)

// The dead-man resumes suspended devices when the process that suspended them
// does not come back. One line each way, over a Unix socket:
//
//	ARM <limit in ms> <device> <device> ...   inner to outer
//	    -> ARMED, or ERROR <why>
//	RESUME
//	    -> IN-TIME, or LATE <why>
//
// From ARMED on it resumes by itself once the limit has passed, and goes on
// looking every 100 ms until RESUME has fetched its LATE: the other side may
// have been stopped just before it suspended. When the connection closes it
// resumes and ends. IN-TIME says that the limit had not passed at RESUME and
// that the outermost device was still suspended then, so that nobody else had
// resumed it either: what was read in between was read under the suspend.
const (
	deadmanRecheck = 100 * time.Millisecond
	// deadmanLastTries bounds how often a dead-man without an agent tries.
	deadmanLastTries = 600
	maxLineBytes     = 4096
	maxDevices       = 16
	// maxStallLimit bounds what the dead-man takes for a limit.
	maxStallLimit = time.Minute
)

// resumer resumes a device that is suspended and leaves any other alone; held
// says which it was. A device that does not exist is no error.
type resumer interface {
	resume(name string) (held bool, err error)
}

// RunDeadMan is the whole life of a dead-man that one agent started: it reads
// requests from r and answers on w until r ends. It is the only thing its
// process should do. The process is locked in memory and ignores the signals
// that end an agent.
func RunDeadMan(r io.Reader, w io.Writer) error {
	// An answer that nobody takes must not end it: there may be devices to resume.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	control, err := becomeDeadMan()
	if err != nil {
		return err
	}
	defer control.Close()
	return (&deadman{resumer: dmResumer{control}, now: bootTime, out: w}).run(r)
}

// becomeDeadMan makes this process one that waits for nothing.
func becomeDeadMan() (*dm.Control, error) {
	debug.SetGCPercent(-1) // it allocates some hundred bytes a cut
	debug.SetMemoryLimit(64 << 20)
	// A kernel short of memory should take anybody else. Not every place allows it.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	if err := LockMemory(); err != nil {
		return nil, err
	}
	return dm.Open()
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

type dmResumer struct{ control *dm.Control }

func (r dmResumer) resume(name string) (held bool, err error) {
	info, err := r.control.Info(name)
	if err != nil || !info.Suspended || !info.HasActive {
		return false, err
	}
	return true, r.control.Resume(name)
}

// deadman serves one agent's guard: one suspend at a time.
type deadman struct {
	resumer  resumer
	now      func() time.Duration
	out      io.Writer
	stopping <-chan struct{} // closed: end as soon as nothing is armed; may be nil

	devices  []string      // inner to outer; of the last ARM
	armed    bool          // from ARM to the answer to RESUME
	deadline time.Duration // on now's clock
	late     string        // why it is late; "" while in time
}

func (d *deadman) run(in io.Reader) error {
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
	if d.late == "" {
		d.late = "the stall limit passed"
	}
	_, _ = d.resumeAll() // tried again while armed; RESUME's own try is answered
}

func (d *deadman) answer(line string) error {
	command, rest, _ := strings.Cut(line, " ")
	switch command {
	case "ARM":
		if err := d.arm(strings.Fields(rest)); err != nil {
			return d.say("ERROR " + err.Error())
		}
		return d.say("ARMED")
	case "RESUME":
		if !d.armed {
			return d.say("ERROR not armed")
		}
		if d.late == "" && d.now() >= d.deadline {
			d.late = "the stall limit passed"
		}
		held, err := d.resumeAll()
		switch {
		case d.late != "":
		case err != nil:
			d.late = "resume failed: " + err.Error()
		case !held:
			d.late = d.devices[len(d.devices)-1] + " was not suspended any more: somebody else resumed it"
		}
		d.armed = false
		if d.late != "" {
			return d.say("LATE " + d.late)
		}
		return d.say("IN-TIME")
	}
	return d.say("ERROR what is '" + command + "'?")
}

func (d *deadman) arm(fields []string) error {
	if d.armed {
		return errors.New("already armed")
	}
	if len(fields) < 2 || len(fields) > maxDevices+1 {
		return fmt.Errorf("ARM wants a limit and 1 to %d devices", maxDevices)
	}
	ms, err := strconv.ParseInt(fields[0], 10, 32)
	limit := time.Duration(ms) * time.Millisecond
	if err != nil || limit <= 0 || limit > maxStallLimit {
		return fmt.Errorf("'%s' is no limit in ms up to %d", fields[0], maxStallLimit.Milliseconds())
	}
	d.devices, d.late, d.armed = fields[1:], "", true
	d.deadline = d.now() + limit
	return nil
}

// resumeAll resumes what is suspended; held says whether the outermost was.
func (d *deadman) resumeAll() (held bool, err error) {
	var errs []error
	for _, name := range d.devices {
		if held, err = d.resumer.resume(name); err != nil {
			errs = append(errs, err)
		}
	}
	return held, errors.Join(errs...)
}

// leave resumes for the last time: the agent is gone, or can't be spoken to.
func (d *deadman) leave() error {
	var err error
	for range deadmanLastTries {
		if _, err = d.resumeAll(); err == nil {
			return nil
		}
		time.Sleep(deadmanRecheck)
	}
	return fmt.Errorf("dead-man: devices may stay suspended: %w", err)
}

func (d *deadman) say(line string) error {
	_, err := io.WriteString(d.out, strings.ReplaceAll(line, "\n", "; ")+"\n")
	return err
}
