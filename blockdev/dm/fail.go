package dm

import (
	"errors"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// failTries bounds how often Fail tries again what somebody else undid.
const failTries = 20

const errorTarget = "error"

// Failing says of a table whether everything done to its device fails.
func Failing(table []Target) bool { return len(table) == 1 && table[0].Type == errorTarget }

// Fail puts a table in the place of the device's with which every read and write
// fails, those that a suspend holds back, too. A flush does not: the kernel's
// 'error' target answers it as done, and flushes nothing. So what the device wrote is
// flushed before, while it is suspended: no flush is acknowledged in vain. If that
// can't be done, or takes longer than 10 seconds, unflushed is called with the reason,
// and the device fails all the same.
// It waits for what is in flight, for as long as that takes, and what comes
// meanwhile is held, then fails. Only the end of the process makes the kernel
// let that through; the table that fails waits from before that on, and the next who
// resumes takes it. A device that fails already is left so, but resumed. A table
// that waits for a resume is replaced, also if there is no other yet.
func (c *Control) Fail(name string, unflushed func(error)) error {
	// The table first: nothing is held back while the kernel finds memory for
	// it, and whoever resumes from now on takes it into use.
	var errs []error
	for range failTries {
		done, err := c.fails(name)
		if done || err != nil {
			return err
		}
		err = quietly(func() error { return failOnce(c, name, flushPatience, unflushed) })
		if errors.Is(err, ErrNotExist) {
			return err
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	return fmt.Errorf("device-mapper: %s does not fail after %d tries: %w", name, failTries, errors.Join(errs...))
}

// fails says that the device fails, and holds nothing back.
func (c *Control) fails(name string) (bool, error) {
	info, err := c.do(unix.DM_DEV_STATUS, "info", name, "", 0, nil)
	if err != nil || info.Suspended || !info.HasActive || info.HasInactive {
		return false, err
	}
	table, err := c.Table(name)
	return Failing(table), err
}

// tables are a device's, and what it stands on.
type tables interface {
	Table(name string) ([]Target, error)
	InactiveTable(name string) ([]Target, error)
	Load(name string, targets []Target) error
	Suspend(name string, options SuspendOptions) error
	Resume(name string) error
	flushBeneath(name string) error
}

// failOnce loads its table even if that is in use: the resume would take any other
// that waits.
func failOnce(c tables, name string, patience time.Duration, unflushed func(error)) error {
	table, err := c.Table(name)
	writes := err == nil && size(table) > 0 && !Failing(table)
	if err == nil && size(table) == 0 { // it is being built
		table, err = c.InactiveTable(name)
	}
	if err != nil {
		return err
	}
	length := size(table)
	if length == 0 {
		return &Error{What: "fail " + name, Err: errors.New("it has no table yet")}
	}
	if err := c.Load(name, []Target{{Length: length, Type: errorTarget}}); err != nil {
		return err
	}
	if !writes {
		return c.Resume(name)
	}
	// Not left to the resume: interrupted there, many kernels drop the table that waits.
	if err := c.Suspend(name, SuspendOptions{}); err != nil {
		return err
	}
	lost := within(patience, func() error { return c.flushBeneath(name) })
	if err := c.Resume(name); err != nil {
		return err
	}
	if lost != nil {
		unflushed(fmt.Errorf("what was written to %s before it was made to fail may be lost by a power cut, also what is flushed from now on: %w", name, lost))
	}
	return nil
}

// size of a device, in sectors.
func size(table []Target) (sectors uint64) {
	for _, t := range table {
		sectors += t.Length
	}
	return sectors
}

// quietly runs f on a thread that no signal interrupts: a suspend that one ends
// lets everything through that it held back.
func quietly(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all, old unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &old); err != nil {
		return fmt.Errorf("device-mapper: block signals: %w", err)
	}
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil) }() // it worked a moment ago
	return f()
}
