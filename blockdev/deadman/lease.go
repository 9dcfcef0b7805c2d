package deadman

import (
	"errors"
	"time"
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
// be on the disk. Its methods may be called from several goroutines.
type Lease struct{}

// HoldLease has the dead-man's service at o.Socket hold the deadline until, a
// time of BootTime's, for a device-mapper device: the name and the uuid of a
// volume's outermost one. It takes the place of a deadline that is held for the
// device already, whoever asked for that. ErrLeaseEnded: until or the earlier
// deadline has passed. ErrNoService: nothing is held that was not before.
// Otherwise, once it has returned nil, the deadline outlives this process and
// the service's. It takes 2 seconds at most.
func HoldLease(o GuardOptions, device, uuid string, until time.Duration) (*Lease, error) {
	return nil, errors.ErrUnsupported
}

// Extend moves the deadline to until, a time of BootTime's; one that is no later
// changes nothing. ErrLeaseEnded: too late. After any other error, ErrNoService
// among them, the deadline is the earlier one or this one, and it may be that
// nobody holds it: call it again soon, and before the earlier deadline see to it
// that nothing is written. It takes 2 seconds at most.
func (l *Lease) Extend(until time.Duration) error { return errors.ErrUnsupported }

// Release ends it: the volume is down, or not written any more. After an error
// the deadline may still be held. One that has ended already is no error.
func (l *Lease) Release() error { return errors.ErrUnsupported }

// BootTime is the time since the machine started, suspended or not
// (CLOCK_BOOTTIME): what deadlines are given in.
func BootTime() time.Duration { return bootTime() }
