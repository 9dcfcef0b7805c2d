package transport

import (
	"fmt"
	"net"
	"path/filepath"
	"sync"
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

// Sockets that are opened at once leave the process's umask as it was.
func TestListenLeavesTheUmask(t *testing.T) {
	read := func() int {
		mask := unix.Umask(0o22)
		unix.Umask(mask)
		return mask
	}
	before, dir := read(), t.TempDir()
	defer unix.Umask(before)
	for round := range 500 {
		var opening sync.WaitGroup
		for i := range 8 {
			opening.Go(func() {
				l, err := Listen(t.Context(), unixPrefix+filepath.Join(dir, fmt.Sprintf("%d-%d", round, i)))
				if err != nil {
					t.Error(err)
					return
				}
				l.Close()
			})
		}
		opening.Wait()
		if after := read(); after != before {
			t.Fatalf("round %d: it was %#o and is %#o", round, before, after)
		}
	}
}
