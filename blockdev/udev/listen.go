package udev

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// kernelGroup is the multicast group of what the kernel says itself; udevd speaks in
	// the second one.
	kernelGroup = 1
	// queueBytes is how much may wait to be read. A machine that starts has some hundred
	// messages of half a KiB.
	queueBytes = 1 << 20
)

// ErrLost says that events may have been missed: the kernel's queue was full, or one could
// not be understood. Look at every device, then go on listening.
var ErrLost = errors.New("events of devices were lost")

// Listener hears the kernel's events from its making on. One goroutine may call Next; Close
// may be called by any.
type Listener struct {
	socket *os.File
	closed atomic.Bool
	raw    syscall.RawConn
	buffer []byte
	extra  []byte
}

// Listen begins to listen. Nothing tells whether a container hears anything: in a user
// namespace of its own it may get none, so devices have to be looked at now and then, too.
func Listen() (*Listener, error) {
	fail := func(what string, err error) (*Listener, error) {
		return nil, fmt.Errorf("listen to events of devices: %s: %w", what, err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fail("socket", err)
	}
	socket := os.NewFile(uintptr(fd), "uevents")
	refuse := func(what string, err error) (*Listener, error) {
		socket.Close()
		return fail(what, err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		return refuse("credentials", err)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, queueBytes) != nil { // who may not has less room
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, queueBytes)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		return refuse("bind", err)
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return refuse("socket", err)
	}
	return &Listener{socket: socket, raw: raw, buffer: make([]byte, maxMessage+1), extra: make([]byte, unix.CmsgSpace(unix.SizeofUcred))}, nil
}

// Next waits for the next event of a block device. ErrLost: look at every device, then go
// on. Any other error is the end of listening; after Close it is os.ErrClosed.
func (l *Listener) Next() (Event, error) {
	for {
		n, extra, flags, from, err := l.receive()
		switch {
		case l.closed.Load():
			return Event{}, fmt.Errorf("listen to events of devices: %w", os.ErrClosed)
		case errors.Is(err, unix.ENOBUFS):
			// Until the queue is empty the kernel goes on dropping, and says so no second time.
			if err := l.drain(); err != nil {
				return Event{}, fmt.Errorf("listen to events of devices: %w", err)
			}
			return Event{}, fmt.Errorf("%w: more came than could be kept", ErrLost)
		case err != nil:
			return Event{}, fmt.Errorf("listen to events of devices: %w", err)
		}
		if !fromKernel(from, l.extra[:extra]) {
			continue // whoever sent that does not decide what is looked at
		}
		if flags&unix.MSG_TRUNC != 0 {
			return Event{}, fmt.Errorf("%w: one has more than %d bytes", ErrLost, maxMessage)
		}
		e, err := Parse(l.buffer[:n])
		if err != nil {
			return Event{}, fmt.Errorf("%w: %w", ErrLost, err)
		}
		if e.Block() {
			return e, nil
		}
	}
}

// receive waits for a message.
func (l *Listener) receive() (n, extra, flags int, from unix.Sockaddr, err error) {
	waited := l.raw.Read(func(fd uintptr) bool {
		for {
			n, extra, flags, from, err = unix.Recvmsg(int(fd), l.buffer, l.extra, unix.MSG_DONTWAIT)
			if !errors.Is(err, unix.EINTR) {
				return !errors.Is(err, unix.EAGAIN)
			}
		}
	})
	if waited != nil {
		err = waited
	}
	return n, extra, flags, from, err
}

// drain reads what is there.
func (l *Listener) drain() error {
	var err error
	read := l.raw.Read(func(fd uintptr) bool {
		for err = nil; err == nil || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EINTR); {
			_, _, _, _, err = unix.Recvmsg(int(fd), l.buffer, l.extra, unix.MSG_DONTWAIT)
		}
		return true
	})
	if read != nil {
		return read
	}
	if errors.Is(err, unix.EAGAIN) {
		return nil
	}
	return err
}

// fromKernel says whether the kernel sent a message: its port is 0, which no program has,
// its group the kernel's, and its credentials are no process's.
func fromKernel(from unix.Sockaddr, control []byte) bool {
	sender, ok := from.(*unix.SockaddrNetlink)
	if !ok || sender.Pid != 0 || sender.Groups != kernelGroup {
		return false
	}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil || len(messages) != 1 {
		return false
	}
	who, err := unix.ParseUnixCredentials(&messages[0])
	return err == nil && who.Pid == 0
}

// Close ends listening, and a Next that waits.
func (l *Listener) Close() error {
	l.closed.Store(true)
	return l.socket.Close()
}
