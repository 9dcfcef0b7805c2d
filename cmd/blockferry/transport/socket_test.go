package transport

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// socketOptions are TCP_USER_TIMEOUT in ms, TCP_KEEPIDLE and TCP_KEEPINTVL in s.
func socketOptions(t *testing.T, c net.Conn) (user, idle, every int) {
	t.Helper()
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		for option, into := range map[int]*int{unix.TCP_USER_TIMEOUT: &user, unix.TCP_KEEPIDLE: &idle, unix.TCP_KEEPINTVL: &every} {
			n, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option)
			if err != nil {
				t.Error(err)
			}
			*into = n
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return user, idle, every
}
