package blockdev

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctlRange makes one of the requests that take {start, length} in bytes.
func ioctlRange(fd int, request uint, offset, length int64) error {
	arg := [2]uint64{uint64(offset), uint64(length)}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&arg)))
	if errno != 0 {
		return errno
	}
	return nil
}
