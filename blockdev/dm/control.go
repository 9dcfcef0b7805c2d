package dm

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	controlPath = "/dev/mapper/control"
	// removePatience is how long Remove waits for a device that something
	// (blkid after an event, most often) holds for a moment.
	removePatience = 5 * time.Second
	removePause    = 20 * time.Millisecond
)

// ErrNotExist: there is no device of that name.
var ErrNotExist = errors.New("no such device-mapper device")

// Control is the open control device. Its methods may be called from several
// goroutines at once.
type Control struct {
	file    *os.File
	signals chan os.Signal // never read: what counts is that they interrupt
}

// Open opens /dev/mapper/control, which needs root and the module dm-mod.
func Open() (*Control, error) {
	file, err := os.OpenFile(controlPath, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		err = makeControl()
		if err == nil {
			file, err = os.OpenFile(controlPath, os.O_RDWR, 0)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("device-mapper: %w; 'modprobe dm-mod' as root, then try again", err)
	}
	c := &Control{file: file}
	if err := c.catchInterrupts(); err != nil {
		file.Close()
		return nil, err
	}
	return c, nil
}

// Close closes the control device. Devices stay as they are.
func (c *Control) Close() error {
	signal.Stop(c.signals)
	return c.file.Close()
}

// Request is a call whose buffer stands ready: Do allocates nothing, so it
// may be used while the device under this very process is suspended. One
// goroutine at a time uses a Request.
type Request struct {
	control *Control
	command uint
	what    string
	initial []byte
	buffer  []byte
}

// Do makes the call. EINTR from a suspend means that the device is not
// suspended.
func (r *Request) Do() error {
	copy(r.buffer, r.initial)
	if err := ioctl(int(r.control.file.Fd()), r.command, r.buffer); err != nil {
		return &Error{What: r.what, Err: err}
	}
	return nil
}

// Error is a call that the kernel refused.
type Error struct {
	What string // the call and the device
	Err  error
}

func (e *Error) Error() string { return "device-mapper: " + e.What + ": " + e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// Is makes the kernel's 'no such device' ErrNotExist.
func (e *Error) Is(target error) bool {
	return target == ErrNotExist && errors.Is(e.Err, unix.ENXIO)
}

func (c *Control) request(command uint, what, name, uuid string, flags uint32, data []byte, room int) (*Request, error) {
	what = strings.TrimSpace(what + " " + name)
	b, err := encodeHeader(name, uuid, flags, max(len(data), room))
	if err != nil {
		return nil, fmt.Errorf("device-mapper: %s: %w", what, err)
	}
	copy(b[headerBytes:], data)
	return &Request{control: c, command: command, what: what, initial: b, buffer: append([]byte(nil), b...)}, nil
}

func (c *Control) do(command uint, what, name, uuid string, flags uint32, data []byte) (Info, error) {
	r, err := c.request(command, what, name, uuid, flags, data, 0)
	if err != nil {
		return Info{}, err
	}
	if err := r.Do(); err != nil {
		return Info{}, err
	}
	return decodeInfo(r.buffer)
}

// read makes a call whose answer has a length of its own.
func (c *Control) read(command uint, what, name string, flags uint32, data []byte) ([]byte, error) {
	for room := 16 << 10; room <= maxReplyBytes; room *= 4 {
		r, err := c.request(command, what, name, "", flags, data, room)
		if err != nil {
			return nil, err
		}
		if err := r.Do(); err != nil {
			return nil, err
		}
		if !bufferFull(r.buffer) {
			return r.buffer, nil
		}
	}
	return nil, fmt.Errorf("device-mapper: %s %s: the answer is longer than %d bytes", what, name, maxReplyBytes)
}

// Version is the kernel's device-mapper interface version.
func (c *Control) Version() ([3]uint32, error) {
	b, err := c.read(unix.DM_VERSION, "version", "", 0, nil)
	if err != nil {
		return [3]uint32{}, err
	}
	return [3]uint32{order.Uint32(b), order.Uint32(b[4:]), order.Uint32(b[8:])}, nil
}

// Targets lists the target types the kernel has loaded, with their versions.
// A module that is not loaded yet does not appear; loading a table of its
// type loads it.
func (c *Control) Targets() (map[string][3]uint32, error) {
	b, err := c.read(unix.DM_LIST_VERSIONS, "list of targets", "", 0, nil)
	if err != nil {
		return nil, err
	}
	return decodeVersions(b)
}

// List names all devices.
func (c *Control) List() ([]string, error) {
	b, err := c.read(unix.DM_LIST_DEVICES, "list", "", 0, nil)
	if err != nil {
		return nil, err
	}
	return decodeNames(b)
}

// Create makes a device without a table. An existing name or uuid is an error.
func (c *Control) Create(name, uuid string) (Info, error) {
	return c.do(unix.DM_DEV_CREATE, "create", name, uuid, 0, nil)
}

// Load puts a table into the device's inactive slot, in place of one that
// waits there. Nothing changes until Resume.
func (c *Control) Load(name string, targets []Target) error {
	data, err := encodeTargets(targets)
	if err != nil {
		return fmt.Errorf("device-mapper: load %s: %w", name, err)
	}
	r, err := c.request(unix.DM_TABLE_LOAD, "load", name, "", 0, data, 0)
	if err != nil {
		return err
	}
	order.PutUint32(r.initial[offsetTargets:], uint32(len(targets)))
	if err := r.Do(); err != nil {
		return fmt.Errorf("%w (table '%v'; the kernel log says more; is the target's module there?)", err, targets)
	}
	return nil
}

// Clear drops the table in the inactive slot; without one it does nothing.
func (c *Control) Clear(name string) error {
	_, err := c.do(unix.DM_TABLE_CLEAR, "clear", name, "", 0, nil)
	return err
}

// SuspendOptions says how a device is suspended. Without either, what is in
// flight is waited for and what comes later is held, in milliseconds.
type SuspendOptions struct {
	LockFS bool // freeze the file system mounted on it first; needs Flush
	Flush  bool // push back what targets hold queued
}

func (o SuspendOptions) flags() uint32 {
	flags := uint32(0)
	if !o.LockFS {
		flags |= unix.DM_SKIP_LOCKFS_FLAG
	}
	if !o.Flush {
		flags |= unix.DM_NOFLUSH_FLAG
	}
	return flags
}

// Suspend waits for what is in flight and holds what comes. EINTR means that
// the device is not suspended.
func (c *Control) Suspend(name string, options SuspendOptions) error {
	r, err := c.SuspendRequest(name, options)
	if err != nil {
		return err
	}
	return r.Do()
}

// SuspendRequest prepares Suspend.
func (c *Control) SuspendRequest(name string, options SuspendOptions) (*Request, error) {
	if options.LockFS && !options.Flush {
		return nil, fmt.Errorf("device-mapper: suspend %s: the kernel freezes no file system without flush", name)
	}
	return c.request(unix.DM_DEV_SUSPEND, "suspend", name, "", unix.DM_SUSPEND_FLAG|options.flags(), nil, 0)
}

// Resume takes the table in the inactive slot, if there is one, into use and
// lets I/O go on. A device that is not suspended is suspended first, without
// freezing its file system, all inside the one call: a caller killed there
// leaves the device running, with the old or the new table.
func (c *Control) Resume(name string) error {
	r, err := c.ResumeRequest(name)
	if err != nil {
		return err
	}
	return r.Do()
}

// ResumeRequest prepares Resume.
func (c *Control) ResumeRequest(name string) (*Request, error) {
	return c.request(unix.DM_DEV_SUSPEND, "resume", name, "", SuspendOptions{}.flags(), nil, 0)
}

// Message sends a message to the target at a sector of the device.
func (c *Control) Message(name string, sector uint64, message string) error {
	data, err := encodeMessage(sector, message)
	if err != nil {
		return fmt.Errorf("device-mapper: message to %s: %w", name, err)
	}
	r, err := c.request(unix.DM_TARGET_MSG, "message '"+message+"' to", name, "", 0, data, 0)
	if err != nil {
		return err
	}
	return r.Do()
}

// Remove removes a device that nobody has open. One that is busy is tried
// again for a few seconds; one that does not exist is ErrNotExist.
func (c *Control) Remove(name string) error {
	deadline := time.Now().Add(removePatience)
	for {
		_, err := c.do(unix.DM_DEV_REMOVE, "remove", name, "", 0, nil)
		if err == nil {
			removeNode(name)
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(removePause)
	}
}

// Info describes a device. One that does not exist is no error: Exists is
// false.
func (c *Control) Info(name string) (Info, error) {
	info, err := c.do(unix.DM_DEV_STATUS, "info", name, "", 0, nil)
	if errors.Is(err, ErrNotExist) {
		return Info{}, nil
	}
	return info, err
}

// Table reads the active table.
func (c *Control) Table(name string) ([]Target, error) {
	return c.tableStatus("table", name, unix.DM_STATUS_TABLE_FLAG)
}

// InactiveTable reads the table that waits for the next resume.
func (c *Control) InactiveTable(name string) ([]Target, error) {
	return c.tableStatus("inactive table", name, unix.DM_STATUS_TABLE_FLAG|unix.DM_QUERY_INACTIVE_TABLE_FLAG)
}

// Status asks the targets how they are; Params holds the answer. On a
// suspended era device it blocks until somebody resumes it.
func (c *Control) Status(name string) ([]Target, error) {
	return c.tableStatus("status", name, unix.DM_NOFLUSH_FLAG)
}

func (c *Control) tableStatus(what, name string, flags uint32) ([]Target, error) {
	b, err := c.read(unix.DM_TABLE_STATUS, what, name, flags, nil)
	if err != nil {
		return nil, err
	}
	targets, err := decodeTargets(b)
	if err != nil {
		return nil, fmt.Errorf("device-mapper: %s %s: %w", what, name, err)
	}
	return targets, nil
}
