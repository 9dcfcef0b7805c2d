package dm

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file holds the package's only unsafe code. The kernel copies what it
// needs from and to the buffers and keeps no pointer to them.

func ioctl(fd int, command uint, buffer []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(command), uintptr(unsafe.Pointer(unsafe.SliceData(buffer))))
	if errno != 0 {
		return errno
	}
	return nil
}

// dropRestart takes SA_RESTART from a signal's handler: a call that the signal
// interrupts then fails with EINTR.
func dropRestart(signal unix.Signal) error {
	// The kernel's sigaction: handler, flags, and two words more that stay as
	// they are. Signal sets have 8 bytes.
	var action [4]uintptr
	const setBytes = 8
	get := func(new, old *[4]uintptr) error {
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(signal), uintptr(unsafe.Pointer(new)), uintptr(unsafe.Pointer(old)), setBytes, 0, 0)
		if errno != 0 {
			return errno
		}
		return nil
	}
	if err := get(nil, &action); err != nil {
		return err
	}
	const saRestart = 0x10000000
	action[1] &^= saRestart
	return get(&action, nil)
}
