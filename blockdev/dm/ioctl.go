package dm

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ioctl is the package's only unsafe code. The kernel copies what it needs
// from and to the buffer and keeps no pointer to it.
func ioctl(fd int, command uint, buffer []byte) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(command), uintptr(unsafe.Pointer(unsafe.SliceData(buffer))))
	if errno != 0 {
		return errno
	}
	return nil
}
