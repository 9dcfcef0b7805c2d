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
// does not come back. One line each way, over pipes:
//
//	ARM <limit in ms> <device> <device> ...   inner to outer
//	    -> ARMED, or ERROR <why>
//	RESUME
//	    -> IN-TIME, or LATE <why>
//
// From ARMED on it resumes by itself once the limit has passed, and goes on
// looking every 100 ms until RESUME has fetched its LATE: the other side may
// have been stopped just before it suspended. When the pipe closes it resumes
// and ends. IN-TIME says that from ARMED to RESUME nothing was resumed by
// anybody but on request, so what was read in between was read under the
// suspend.
const (
	deadmanRecheck = 100 * time.Millisecond
	// deadmanLastTries bounds how often a dead-man without an agent tries.
	deadmanLastTries = 600
	maxLineBytes     = 4096
	maxDevices       = 16
	// maxStallLimit bounds what the dead-man takes for a limit.
	maxStallLimit = time.Minute
)

// resumer resumes a device that is suspended and leaves any other alone. A
// device that does not exist is no error.
type resumer interface {
	resume(name string) error
}

// RunDeadMan is the dead-man's whole life: it reads requests from r and
// answers on w until r ends. It is the only thing its process should do. The
// process is locked in memory and ignores the signals that end an agent.
func RunDeadMan(r io.Reader, w io.Writer) error {
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT)
	debug.SetGCPercent(-1) // it allocates some hundred bytes a cut
	debug.SetMemoryLimit(64 << 20)
	// A kernel short of memory should take anybody else. Not every place allows it.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
	if err := LockMemory(); err != nil {
		return err
	}
	control, err := dm.Open()
	if err != nil {
		return err
	}
	defer control.Close()
	return (&deadman{resumer: dmResumer{control}, now: bootTime, out: w}).run(r)
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

func (r dmResumer) resume(name string) error {
	info, err := r.control.Info(name)
	if err != nil || !info.Suspended || !info.HasActive {
		return err
	}
	return r.control.Resume(name)
}

type deadman struct {
	resumer resumer
	now     func() time.Duration
	out     io.Writer

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
	for {
		if d.armed {
			timer.Reset(d.wait())
		} else {
			timer.Stop()
		}
		select {
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
	_ = d.resumeAll() // tried again while armed; RESUME's own try is answered
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
		if err := d.resumeAll(); err != nil && d.late == "" {
			d.late = "resume failed: " + err.Error()
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

func (d *deadman) resumeAll() error {
	var errs []error
	for _, name := range d.devices {
		if err := d.resumer.resume(name); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// leave resumes for the last time: the agent is gone, or can't be spoken to.
func (d *deadman) leave() error {
	var err error
	for range deadmanLastTries {
		if err = d.resumeAll(); err == nil {
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
