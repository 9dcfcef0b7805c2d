package deadman

import (
	"bufio"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

const (
	// leasePatience is how long a call about a lease may take, all tries together.
	leasePatience = 2 * time.Second
	// leaseAgain is the pause before a service that is not there is looked for
	// again: it is restarted 0.1 s after it ended.
	leaseAgain = 20 * time.Millisecond
)

// ErrLeaseEnded says that a lease's deadline has passed, that another process
// holds it now, or that it was released: it can't be extended. What became of
// the device its table tells: 'error' after the deadline.
var ErrLeaseEnded = errors.New("the lease has ended")

// ErrNoService says that the dead-man's service did not answer. Nothing else
// holds a lease: a dead-man of the agent's own may be killed with the agent.
var ErrNoService = errors.New("the dead-man's service does not answer")

// Lease is the deadline that the dead-man's service holds for a volume's
// outermost device. At the deadline everything on the device fails, whether
// this process lives or not; what was not acknowledged by then may or may not
// be on the disk. A write that is in flight then is acknowledged whenever the disk
// returns it, however late: a disk that hangs has to be fenced from outside. An
// attached device has none. Its methods may be called from several goroutines.
type Lease struct {
	socket, device, holder string
}

// HoldLease has the dead-man's service at o.Socket hold the deadline until, a
// time of BootTime's, for a device-mapper device: the name and the uuid of a
// volume's outermost one. It takes the place of a deadline that is held for the
// device already, whoever asked for that. ErrLeaseEnded: until or the earlier
// deadline has passed, or the device fails since. ErrNoService: there is no
// service. Once it has returned nil, the deadline outlives this process and the
// service's. It takes 2 seconds at most.
func HoldLease(o GuardOptions, device, uuid string, until time.Duration) (*Lease, error) {
	l := &Lease{o.Socket, device, newHolder()}
	if err := l.ask("HELD", "LEASE %s %s %d %s", device, l.holder, until.Nanoseconds(), uuid); err != nil {
		return nil, fmt.Errorf("hold the lease of %s: %w", device, err)
	}
	return l, nil
}

// Extend moves the deadline to until, a time of BootTime's; one that is no later
// changes nothing. ErrLeaseEnded: too late, or another device bears the name since.
// After any other error, ErrNoService
// among them, the deadline is the earlier one or this one, and it may be that
// nobody holds it: call it again soon, and before the earlier deadline see to it
// that nothing is written. It takes 2 seconds at most.
func (l *Lease) Extend(until time.Duration) error {
	if err := l.ask("HELD", "EXTEND %s %s %d", l.device, l.holder, until.Nanoseconds()); err != nil {
		return fmt.Errorf("extend the lease of %s: %w", l.device, err)
	}
	return nil
}

// Release ends it: the volume is down, or not written any more. After an error
// the deadline may still be held. One that has ended already is no error. It
// takes 2 seconds at most.
func (l *Lease) Release() error {
	if err := l.ask("RELEASED", "RELEASE %s %s", l.device, l.holder); err != nil {
		return fmt.Errorf("release the lease of %s: %w", l.device, err)
	}
	return nil
}

// ask has a line answered, by the next service if one ends meanwhile: each
// request may come twice.
func (l *Lease) ask(want, format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	if words := strings.Fields(format); len(strings.Split(line, " ")) != len(words) || strings.Contains(line, "\n") {
		return fmt.Errorf("'%s' can't be asked of the dead-man: a name with a space", line)
	}
	if l.socket == "" {
		return fmt.Errorf("%w: it has no socket; %s", ErrNoService, startAdvice)
	}
	end := time.Now().Add(leasePatience)
	for {
		answer, err := askOnce(l.socket, line, end)
		if err == nil && answer != "ERROR "+errStopping.Error() {
			if answer == want {
				return nil
			}
			if why, ended := strings.CutPrefix(answer, "ENDED "); ended {
				return fmt.Errorf("%w: %s", ErrLeaseEnded, why)
			}
			return fmt.Errorf("the dead-man answers '%s'", answer)
		}
		if err == nil {
			err = errStopping
		}
		if time.Until(end) < leasePatience/2 {
			return fmt.Errorf("%w on %s: %w; %s", ErrNoService, l.socket, err, startAdvice)
		}
		time.Sleep(leaseAgain)
	}
}

const startAdvice = "start it (systemctl enable --now blockferry-deadman)"

func askOnce(socket, line string, end time.Time) (string, error) {
	link, err := connect(socket)
	if err != nil {
		return "", err
	}
	defer link.conn.Close()
	if err := link.conn.SetDeadline(end); err != nil {
		return "", err
	}
	if _, err := link.conn.Write([]byte(line + "\n")); err != nil {
		return "", err
	}
	answer, err := bufio.NewReaderSize(link.conn, maxLineBytes).ReadString('\n')
	return strings.TrimSuffix(answer, "\n"), err
}

// FailEnded has everything on a device fail if the lease that is noted for it
// has ended, should the service not have done so: whoever resumes a device that
// a dead process left suspended calls it first. After an error the device must
// not be resumed. It returns after 2 seconds at most, with an error if what is in
// flight on the device has not ended by then: that is waited for behind it, and
// the device fails after that. Called again meanwhile it is an error, too. Until
// then nothing, a kill included, ends this process: if the service waits for the
// device, too, the kernel has it wait without an end; if not, its end would let
// through what the kernel holds.
func FailEnded(o GuardOptions, device string) error {
	mapper := &dmResumer{log: o.Log}
	s := &striker{o.notes(), mapper, bootTime}
	return s.failEnded(device, leasePatience, mapper.close)
}

// endings are FailEnded's strikes under way: one a note.
var endings sync.Map

func (s *striker) failEnded(device string, patience time.Duration, close func()) error {
	note := leasePath(s.folder, device)
	if _, busy := endings.LoadOrStore(note, true); busy {
		close()
		return fmt.Errorf("the lease of %s has ended, and what is in flight on it has not yet: it is not made to fail before that", device)
	}
	done := make(chan error, 1)
	go func() {
		defer close()
		defer endings.Delete(note)
		done <- s.strikeEnded(device, patience/2)
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		return fmt.Errorf("the lease of %s has ended, and what is in flight on it has not after %s: it is made to fail once that has", device, patience)
	}
}

// strikeEnded strikes what the service has not after a time.
func (s *striker) strikeEnded(device string, service time.Duration) error {
	ended, err := s.overdue(device)
	if err != nil || !ended {
		return err
	}
	n, err := leaseOf(s.folder, device)
	if errors.Is(err, errTorn) { // and everything on it fails
		return nil
	}
	if err != nil || n == nil { // the service has done it
		return err
	}
	for end := time.Now().Add(service); time.Now().Before(end); time.Sleep(leaseAgain) {
		if how, ours, err := s.look(n); err != nil || !ours || how.fails {
			return err
		}
	}
	_, err = s.strike(n)
	return err
}

// BootTime is the time since the machine started, suspended or not
// (CLOCK_BOOTTIME): what deadlines are given in.
func BootTime() time.Duration { return bootTime() }
