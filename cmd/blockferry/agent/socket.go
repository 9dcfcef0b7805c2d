package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/exit"
)

// Listen makes the socket of a program ("agent") that is chosen by a flag: only
// its owner may connect. A socket that a killed program left behind is
// replaced, one that answers is not. The function closes it.
func Listen(path, program, flag string) (*net.UnixListener, func(), error) {
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket == 0 {
		return nil, nil, exit.Errorf(exit.Refused, "%s is there and is no socket (%s); it is left as it is, choose another path with %s", path, info.Mode(), flag)
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, exit.Errorf(exit.Prerequisite, "the folder of the socket: %w; create it, or choose another with %s", err, flag)
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, nil, exit.Errorf(exit.Prerequisite, "the socket's lock: %w", err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, nil, exit.Errorf(exit.Refused, "another %s answers on %s; stop it first, or choose another socket with %s", program, path, flag)
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		lock.Close()
		return nil, nil, exit.Errorf(exit.Refused, "another program answers on %s; stop it first, or choose another socket with %s", path, flag)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		lock.Close()
		return nil, nil, fmt.Errorf("a stale socket: %w", err)
	}
	// Nobody may connect between bind and chmod, whatever the folder allows.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		lock.Close()
		return nil, nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, func() { l.Close(); lock.Close() }, nil
}
