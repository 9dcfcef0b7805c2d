package transport

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// DeadPath is how long a connection may be without a sign of life from the
// other machine before it is given up: what was sent and not acknowledged, or,
// while nothing is under way, probes.
const DeadPath = 10 * time.Second

const (
	dialLimit  = 5 * time.Second
	probeAfter = 3 * time.Second // of silence
	probeEvery = 2 * time.Second
)

const unixPrefix = "unix:"

// network splits an address of the configuration.
func network(address string) (network, where string) {
	if path, ok := strings.CutPrefix(address, unixPrefix); ok {
		return "unix", path
	}
	return "tcp", address
}

func dial(ctx context.Context, address string) (net.Conn, error) {
	kind, where := network(address)
	d := net.Dialer{Timeout: dialLimit, KeepAliveConfig: keepAlive, Control: control}
	return d.DialContext(ctx, kind, where)
}

// umask is held while the process's is another.
var umask sync.Mutex

// Listen opens where others connect to. A Unix socket is its owner's alone, and
// one that a killed program left behind is replaced.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	kind, where := network(address)
	c := net.ListenConfig{KeepAliveConfig: keepAlive, Control: control} // connections inherit the options
	if kind == "unix" {
		if err := removeStale(where); err != nil {
			return nil, err
		}
		umask.Lock() // it is the process's: two at once would restore each other's
		defer umask.Unlock()
		old := unix.Umask(0o177)
		defer unix.Umask(old)
	}
	return c.Listen(ctx, kind, where)
}

func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%s is there and is no socket (%s); it is left as it is", path, info.Mode())
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		return fmt.Errorf("another program answers on %s", path)
	}
	return os.Remove(path)
}

// The number of probes does not count: TCP_USER_TIMEOUT decides.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: probeAfter, Interval: probeEvery, Count: 9}

func control(network, _ string, c syscall.RawConn) error {
	if network == "unix" {
		return nil
	}
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(DeadPath.Milliseconds()))
	}); e != nil {
		return e
	}
	return os.NewSyscallError("TCP_USER_TIMEOUT", err)
}

func inode(info fs.FileInfo) any {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return [2]uint64{s.Dev, s.Ino}
	}
	return nil
}
