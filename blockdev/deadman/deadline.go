package deadman

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// strikePatience is after how long it is said that a device does not fail yet.
	strikePatience = time.Second
	// strikeLogAgain is the pause before a strike that goes on failing is told again.
	strikeLogAgain = 30 * time.Second
)

// failer makes devices fail.
type failer interface {
	ready() error
	// identify says which device bears the name, the zero identity for none,
	// and how it is.
	identify(name string) (is identity, how condition, err error)
	fail(name string) error
}

// condition is a device's.
type condition struct {
	fails     bool // everything on it fails
	suspended bool // nothing is in flight; what comes is held
}

// striker makes devices fail whose deadline has passed.
type striker struct {
	folder  string // of notes
	devices failer
	now     func() time.Duration
}

// strike makes a note's device fail; struck is false if another device bears the
// name, or none.
func (s *striker) strike(n *leaseNote) (struck bool, err error) {
	if _, ours, err := s.look(n); err != nil || !ours {
		return false, err
	}
	return true, s.devices.fail(n.device)
}

// torn strikes a suspended device that has a note which is none: to resume it
// might break one promise, to leave it suspended another.
func (s *striker) torn(device string, err error) error {
	if err := s.devices.ready(); err != nil {
		return err
	}
	_, how, failed := s.devices.identify(device)
	switch {
	case failed != nil:
		return errors.Join(err, failed)
	case how.suspended:
		if failed := s.devices.fail(device); failed != nil {
			return errors.Join(err, failed)
		}
		return nil
	case how.fails:
		return nil
	}
	return err
}

// look says how a note's device is; ours is false if another bears the name, or
// none.
func (s *striker) look(n *leaseNote) (how condition, ours bool, err error) {
	how, ours, _, err = s.lookAt(n)
	return how, ours, err
}

// lookAt is look, and says which device it is.
func (s *striker) lookAt(n *leaseNote) (how condition, ours bool, is identity, err error) {
	if err := s.devices.ready(); err != nil {
		return condition{}, false, identity{}, err
	}
	is, how, err = s.devices.identify(n.device)
	return how, err == nil && n.identity.matches(is), is, err
}

// passed says that a device's deadline has passed, or can't be told; it strikes nothing.
func (s *striker) passed(device string) (bool, error) {
	n, err := leaseOf(s.folder, device)
	if errors.Is(err, errTorn) {
		return true, nil
	}
	return err == nil && n != nil && s.now() >= n.until, err
}

// overdue says that a device's deadline has passed: it must not be resumed, as
// what a suspend holds back would be written, nor after an error. A suspended one
// it strikes, which waits for a flush of its disk, for some seconds at most. A running
// one it leaves to the service's watch: that waits for what is in flight, and whoever waits there must neither
// have anything else to do nor be killed, which would let through what is held.
func (s *striker) overdue(device string) (ended bool, err error) {
	n, err := leaseOf(s.folder, device)
	if errors.Is(err, errTorn) {
		return true, s.torn(device, err)
	}
	if err != nil || n == nil || s.now() < n.until {
		return false, err
	}
	how, ours, err := s.look(n)
	if err == nil && ours && how.suspended {
		err = s.devices.fail(device)
	}
	if err != nil {
		err = fmt.Errorf("the lease of %s has ended, and it can't be made to fail: %w", device, err)
	}
	return ours, err
}

// errNear says that writers may not be stopped for so long.
var errNear = errors.New("the lease")

// mayStop refuses a stop that the deadline may fall into: a suspend that the agent
// breaks off after it would let through what it held back. It strikes nothing.
// Before safe the lease can't have ended, whatever becomes of its note: a lease
// that is taken meanwhile lasts longer than the limit, too.
func (s *striker) mayStop(device string, limit time.Duration) (safe time.Duration, err error) {
	safe = s.now() + limit
	n, err := leaseOf(s.folder, device)
	if errors.Is(err, errTorn) {
		return 0, fmt.Errorf("%w of %s has a note that can't be read: %w; take it down, then up", errNear, device, err)
	}
	if err != nil || n == nil {
		return safe, err
	}
	if _, ours, err := s.look(n); err != nil || !ours {
		return safe, err
	}
	if safe < n.until {
		return n.until, nil
	}
	if s.now() >= n.until {
		return 0, fmt.Errorf("%w of %s has ended: everything on it fails, as soon as nothing is in flight", errNear, device)
	}
	return 0, fmt.Errorf("%w of %s ends in %s, sooner than the stall limit of %s: it has to be renewed first, and to last longer than that", errNear, device, (n.until - s.now()).Round(time.Millisecond), limit)
}

// deadlines are those that a dead-man's service holds.
type deadlines struct {
	striker
	log *slog.Logger

	mu     sync.Mutex           // of what follows; held for no call
	of     map[string]*deadline // by device
	closed bool
	done   chan struct{} // closed with it
	under  sync.WaitGroup
}

// deadline is a device's, from the first lease of it on. Its lock is taken before
// deadlines.mu, and is held while the device is looked at and the note written: one
// device that hangs keeps no other's.
type deadline struct {
	mu sync.Mutex
	leaseNote
	alarm *alarm // nil: no lease is held
}

func newDeadlines(s striker, log *slog.Logger) *deadlines {
	return &deadlines{striker: s, log: log, of: map[string]*deadline{}, done: make(chan struct{})}
}

// lock returns a device's deadline, locked.
func (d *deadlines) lock(device string) (*deadline, error) {
	d.mu.Lock()
	l, closed := d.of[device], d.closed
	if l == nil && !closed {
		l = &deadline{}
		d.of[device] = l
	}
	d.mu.Unlock()
	if closed {
		return nil, errStopping
	}
	l.mu.Lock()
	return l, nil
}

// adopt holds what the notes say: those of the service before this one. What has
// passed meanwhile is struck at once, and so is a device of ours whose note can't be
// read: its deadline may have passed, and nothing else would end its writes.
func (d *deadlines) adopt(ours func(uuid string) bool) {
	paths, _ := filepath.Glob(filepath.Join(d.folder, leasePrefix+"*")) // the pattern is well-formed
	for _, path := range paths {
		n, err := readLease(path)
		if errors.Is(err, errOtherBoot) {
			os.Remove(path)
			continue
		}
		if err != nil {
			var failed error
			if n, failed = d.unread(strings.TrimPrefix(filepath.Base(path), leasePrefix), ours); failed == nil && n == nil {
				d.log.Warn("a note of a lease can't be read; no volume that is up and can be written has that name", "note", path, "error", err)
				continue
			} else if failed == nil {
				d.log.Error("a note of a lease can't be read, so the lease counts as ended", "volume", n.device, "note", path, "error", err)
			}
			err = failed
		}
		if err == nil {
			err = d.adoptOne(n)
		}
		if err != nil {
			d.log.Error("a lease that the dead-man before this one held is not held any more: nothing ends writes when it ends", "note", path, "error", err,
				"advice", "take the volume down, or renew its lease")
			continue
		}
		d.log.Info("a lease of the dead-man before this one is held on", "volume", n.device, "seconds", (n.until - d.now()).Seconds())
	}
}

// unread is a lease that ends now, of a device whose note can't be read; nil if there is
// no device of ours by that name, or it fails already.
func (d *deadlines) unread(device string, ours func(uuid string) bool) (*leaseNote, error) {
	if err := d.devices.ready(); err != nil {
		return nil, err
	}
	is, how, err := d.devices.identify(device)
	if err != nil || !ours(is.uuid) || how.fails {
		return nil, err
	}
	return &leaseNote{device: device, identity: is, holder: newHolder(), until: d.now()}, nil
}

func (d *deadlines) adoptOne(n *leaseNote) error {
	l, err := d.lock(n.device)
	if err != nil {
		return err
	}
	defer l.mu.Unlock()
	return d.begin(l, n)
}

// begin holds a deadline whose note is written, in the place of any other of
// that device. It is locked.
func (d *deadlines) begin(l *deadline, n *leaseNote) error {
	if l.alarm != nil {
		l.leaseNote = *n
		return l.alarm.set(n.until)
	}
	a, err := newAlarm()
	if err != nil {
		return err
	}
	if err := a.set(n.until); err != nil {
		a.close()
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		a.close()
		return errStopping
	}
	l.leaseNote, l.alarm = *n, a
	d.under.Go(func() { d.watch(l, a) })
	return nil
}

// end forgets a deadline, its note too. It is locked.
func (d *deadlines) end(l *deadline) {
	l.alarm.close()
	l.alarm = nil
	os.Remove(leasePath(d.folder, l.device))
}

// hold is LEASE.
func (d *deadlines) hold(n leaseNote) error {
	l, err := d.lock(n.device)
	if err != nil {
		return err
	}
	defer l.mu.Unlock()
	if n.until <= d.now() {
		return fmt.Errorf("%w: its deadline had passed before it was held", ErrLeaseEnded)
	}
	if err := d.devices.ready(); err != nil {
		return err
	}
	is, how, err := d.devices.identify(n.device)
	switch {
	case err != nil:
		return err
	case is == (identity{}):
		return fmt.Errorf("there is no device-mapper device '%s' whose lease could be held", n.device)
	case is.uuid != n.uuid:
		return fmt.Errorf("the device of that name has the uuid '%s', want '%s'", is.uuid, n.uuid)
	case how.fails:
		return fmt.Errorf("%w: everything on %s fails; take it down, then up", ErrLeaseEnded, n.device)
	}
	n.identity = is
	if l.alarm != nil && l.identity.matches(is) && l.until <= d.now() {
		_ = l.alarm.set(0) // should it not have fired yet
		return fmt.Errorf("%w: an earlier deadline of %s has passed", ErrLeaseEnded, n.device)
	}
	if err := n.write(d.folder); err != nil {
		return err
	}
	return d.begin(l, &n)
}

var errStopping = errors.New("the dead-man is stopping")

// extend is EXTEND.
func (d *deadlines) extend(device, holder string, until time.Duration) error {
	l, err := d.lock(device)
	if err != nil {
		return err
	}
	defer l.mu.Unlock()
	switch {
	case l.alarm == nil:
		return fmt.Errorf("%w: none is held for %s: its deadline passed, or it was released", ErrLeaseEnded, device)
	case l.holder != holder:
		return fmt.Errorf("%w: another process holds that of %s now", ErrLeaseEnded, device)
	case l.until <= d.now():
		_ = l.alarm.set(0) // should it not have fired yet
		return fmt.Errorf("%w: the deadline of %s has passed", ErrLeaseEnded, device)
	}
	// Taken down and up again it is another: this lease ends no writes to that.
	n := l.leaseNote
	how, ours, is, err := d.lookAt(&n)
	switch {
	case err != nil:
		return err
	case !ours:
		return fmt.Errorf("%w: another device bears the name %s now, or none", ErrLeaseEnded, device)
	case how.fails:
		return fmt.Errorf("%w: everything on %s fails; take it down, then up", ErrLeaseEnded, device)
	case until <= l.until:
		return nil
	}
	n.until, n.identity = until, is // it may have a number by now
	if err := n.write(d.folder); err != nil {
		return err
	}
	return d.begin(l, &n)
}

// release is RELEASE. What has passed is struck all the same.
func (d *deadlines) release(device, holder string) error {
	l, err := d.lock(device)
	if err != nil {
		return err
	}
	defer l.mu.Unlock()
	if l.alarm != nil && l.holder == holder && d.now() < l.until {
		d.end(l)
	}
	return nil
}

// watch strikes at the deadline. What it can't strike it tries again.
func (d *deadlines) watch(l *deadline, a *alarm) {
	told := time.Duration(0)
	for a.wait() {
		l.mu.Lock()
		n, due := l.leaseNote, l.alarm == a && d.now() >= l.until
		if !due && l.alarm == a {
			_ = a.set(l.until) // it rang for a deadline that was moved since
		}
		l.mu.Unlock()
		if !due {
			continue
		}
		log := d.log.With("volume", n.device)
		late := time.AfterFunc(strikePatience, func() {
			log.Error("the lease of a volume has ended; what is in flight on it, or the flush of its disk, does not end: writes that come are held and will fail then. Killed while something is in flight, the dead-man would let them through")
		})
		begun := d.now()
		struck, err := d.strike(&n)
		late.Stop()
		if err == nil {
			if struck {
				log.Error("the lease of a volume has ended: everything on it fails from now on; take it down, then up", "late-seconds", (begun - n.until).Seconds(), "took-seconds", (d.now() - begun).Seconds())
			} else {
				log.Info("the lease of a volume has ended that is gone")
			}
			l.mu.Lock()
			over := l.leaseNote == n // and no later device of that name has one
			if over && l.alarm == a {
				d.end(l)
			} else if over { // the service ends
				os.Remove(leasePath(d.folder, l.device))
			}
			l.mu.Unlock()
			if over {
				return
			}
			continue
		}
		if told == 0 || d.now()-told > strikeLogAgain {
			told = d.now()
			log.Error("the lease of a volume has ended, and it can't be made to fail: it may still be written; it is tried again", "error", err)
		}
		select {
		case <-d.done:
			return
		case <-time.After(deadmanRecheck):
			l.mu.Lock()
			if l.alarm == a {
				_ = a.set(0)
			}
			l.mu.Unlock()
		}
	}
}

// close ends the watch, after what is being struck. The notes stay.
func (d *deadlines) close() {
	d.mu.Lock()
	if !d.closed {
		d.closed = true
		close(d.done)
	}
	all := slices.Collect(maps.Values(d.of)) // none comes any more
	d.mu.Unlock()
	for _, l := range all {
		l.mu.Lock()
		if l.alarm != nil {
			d.log.Error("the dead-man stops while it holds a volume's lease: until the next one is there nothing ends writes when it ends",
				"volume", l.device, "seconds", (l.until - d.now()).Seconds())
			l.alarm.close()
			l.alarm = nil
		}
		l.mu.Unlock()
	}
	d.under.Wait()
}

// answer answers LEASE, EXTEND and RELEASE. Without deadlines it is a dead-man
// that an agent started.
func (d *deadlines) answer(command string, fields []string) string {
	if d == nil {
		return "ERROR a lease is held by the dead-man's service alone"
	}
	want := map[string]int{"LEASE": 4, "EXTEND": 3, "RELEASE": 2}[command]
	if len(fields) != want {
		return fmt.Sprintf("ERROR %s wants %d words", command, want)
	}
	var until time.Duration
	if want > 2 {
		var ns int64
		if _, err := fmt.Sscan(fields[2], &ns); err != nil || ns <= 0 {
			return "ERROR '" + fields[2] + "' is no time of this boot in ns"
		}
		until = time.Duration(ns)
	}
	var err error
	switch command {
	case "LEASE":
		err = d.hold(leaseNote{device: fields[0], holder: fields[1], until: until, identity: identity{uuid: fields[3]}})
	case "EXTEND":
		err = d.extend(fields[0], fields[1], until)
	case "RELEASE":
		if err = d.release(fields[0], fields[1]); err == nil {
			return "RELEASED"
		}
	}
	switch {
	case errors.Is(err, ErrLeaseEnded):
		return "ENDED " + strings.TrimPrefix(err.Error(), ErrLeaseEnded.Error()+": ")
	case err != nil:
		return "ERROR " + err.Error()
	}
	return "HELD"
}

// alarm rings at a time of CLOCK_BOOTTIME, which runs on while the machine
// sleeps: no timer of the runtime's does.
type alarm struct {
	fd   int
	file *os.File
}

func newAlarm() (*alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("a timer: %w", err)
	}
	return &alarm{fd, os.NewFile(uintptr(fd), "timer")}, nil
}

// set replaces the time; one that has passed rings at once. Not after close.
func (a *alarm) set(at time.Duration) error {
	next := unix.ItimerSpec{Value: unix.NsecToTimespec(max(at.Nanoseconds(), 1))} // 0 would stop it
	return unix.TimerfdSettime(a.fd, unix.TFD_TIMER_ABSTIME, &next, nil)
}

// wait returns false once the alarm is closed.
func (a *alarm) wait() bool {
	var n [8]byte
	_, err := a.file.Read(n[:])
	return err == nil
}

func (a *alarm) close() { a.file.Close() }

func newHolder() string { return strings.ToLower(rand.Text()) }
