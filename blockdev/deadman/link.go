package deadman

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// link is a guard's connection to one dead-man.
type link struct {
	conn   *net.UnixConn
	pid    int       // the dead-man's
	child  *exec.Cmd // nil: the service
	failed bool      // it is of no use any more
	// freezing: its answer to FREEZE has not come. The kernel may be at it, and
	// once it is done only this dead-man knows that it has to thaw.
	freezing bool
}

// connect connects to a dead-man's service.
func connect(socket string) (*link, error) {
	conn, err := net.DialTimeout("unix", socket, answerPatience)
	if err != nil {
		return nil, err
	}
	unix := conn.(*net.UnixConn)
	who, err := peer(unix)
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &link{conn: unix, pid: int(who.Pid)}, nil
}

// spawn starts a dead-man at the other end of a pair of sockets. This end is
// in this process alone, so it closes when this process ends, however it ends.
func spawn(command []string) (*link, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("a pair of sockets: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "dead-man"), os.NewFile(uintptr(pair[1]), "agent")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	c := exec.Command(command[0], command[1:]...)
	c.Stdin, c.Stdout, c.Stderr = theirs, theirs, os.Stderr
	c.Dir = "/"
	// A session of its own: no terminal's signals.
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		conn.Close()
		return nil, err
	}
	return &link{conn: conn.(*net.UnixConn), pid: c.Process.Pid, child: c}, nil
}

// end closes the connection and waits for the end of a process of its own. One
// that failed is not waited for: its devices were resumed without it.
func (l *link) end() error {
	l.conn.Close()
	if l.child == nil {
		return nil
	}
	if l.freezing {
		go func() { _ = l.child.Wait() }() // the closed connection ends it, after it has thawed
		return nil
	}
	if l.failed {
		_ = l.child.Process.Kill()
		_ = l.child.Wait() // how it ended was told before
		return nil
	}
	done := make(chan error, 1)
	go func() { done <- l.child.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(answerPatience):
		l.child.Process.Kill()
		return fmt.Errorf("the dead-man did not end by itself: %w", errors.Join(errors.New("killed"), <-done))
	}
}
