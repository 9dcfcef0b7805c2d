package deadman

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxConnections bounds what a dead-man's service serves at once; each
	// volume that is up has one. What comes beyond is closed, and its agent
	// starts a dead-man of its own.
	maxConnections = 128
	// sayPatience is how long an answer may take to be taken off the
	// dead-man's hands. It fits the socket's buffer, unless nobody reads.
	sayPatience = time.Second
	// acceptPause is the pause after an accept that failed (too many files).
	acceptPause = 100 * time.Millisecond
)

// Serve is the whole life of a dead-man that is a service of its own: it
// serves any number of agents' guards until ctx ends; then it returns as soon
// as nothing is stopped. It is the only thing its process should do, which is
// locked in memory, real-time where that is permitted, and ignores the signals that end others. Only processes of
// its own user, root, are answered. Devices that were left suspended and whose
// device-mapper UUID is ours are resumed first, unless another dead-man looks
// after them, or their lease has ended; then ready is called, and it is about to
// accept. What killed dead-men froze, of whom notes stand beside the socket, is
// thawed. The leases that the service before it held it holds on; those that ended
// meanwhile come first of all, and what fails for that is not waited for. The
// listener is closed.
func Serve(ctx context.Context, l *net.UnixListener, ours func(uuid string) bool, log *slog.Logger, ready func()) error {
	defer l.Close()
	// Caught to the end: a second signal must not end it any sooner.
	signal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT)
	signal.Ignore(unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	if err := becomeDeadMan(log); err != nil {
		return err
	}
	notes := filepath.Dir(l.Addr().String())
	mapper := dmResumer{log: log}
	defer mapper.close()
	s := &service{resumer: &mapper, freezer: kernelFreezer{}, now: bootTime, log: log, notes: notes,
		leases: newDeadlines(striker{notes, &mapper, bootTime}, log)}
	s.leases.adopt(ours)
	if err := mapper.ready(); err != nil {
		log.Info("no device-mapper yet; it is looked for when a volume needs it", "error", err)
	} else {
		h, err := openHolds(notes)
		if err != nil {
			log.Warn("whether a suspend is under way can't be told: one may be ended, and its cut void", "error", err)
		}
		o := &orphans{devices: mapper.control, ours: ours, holds: h, fence: &s.leases.striker, log: log, now: bootTime}
		left := o.resume()
		var looks sync.WaitGroup
		defer looks.Wait() // before the mapper is closed
		looks.Go(func() { o.await(ctx, left) })
	}
	ready()
	s.serve(l, ctx.Done())
	return nil
}

type service struct {
	resumer resumer
	freezer freezer
	now     func() time.Duration
	log     *slog.Logger
	notes   string // folder
	leases  *deadlines
}

// serve returns when stop is closed and nothing is armed. Leases are left to the
// next service.
func (s *service) serve(l *net.UnixListener, stop <-chan struct{}) {
	defer s.leases.close() // last: a stop under way may last
	var connections sync.WaitGroup
	defer connections.Wait()
	// An agent that comes may have lost a dead-man of its own.
	came := make(chan struct{}, 1)
	connections.Go(func() { (&sweeper{s.notes, s.freezer, s.now, s.log}).until(stop, came) })
	go func() {
		<-stop
		l.Close() // and removes the socket: agents look for the next one
	}()
	room := make(chan struct{}, maxConnections)
	for {
		conn, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			s.log.Warn("a connection was not accepted", "error", err)
			time.Sleep(acceptPause)
			continue
		}
		select {
		case room <- struct{}{}:
		default:
			s.log.Warn("a connection is refused: too many", "most", maxConnections)
			conn.Close()
			continue
		}
		select {
		case came <- struct{}{}:
		default:
		}
		connections.Go(func() {
			defer func() { <-room }()
			if err := s.one(conn, stop); err != nil {
				s.log.Warn("a connection ended", "error", err)
			}
		})
	}
}

// one serves one connection.
func (s *service) one(conn *net.UnixConn, stop <-chan struct{}) error {
	defer conn.Close()
	if _, err := peer(conn); err != nil {
		return err
	}
	in := &inbox{conn: conn}
	defer in.close()
	return (&deadman{resumer: s.resumer, freezer: s.freezer, now: s.now, out: patient{conn}, inbox: in, stopping: stop, notes: s.notes,
		fence: &s.leases.striker, leases: s.leases}).run(in)
}

// patient gives up on a reader that does not read: while it is waited for,
// nobody looks after the device.
type patient struct{ *net.UnixConn }

func (p patient) Write(b []byte) (int, error) {
	if err := p.SetWriteDeadline(time.Now().Add(sayPatience)); err != nil {
		return 0, err
	}
	return p.UnixConn.Write(b)
}

var _ io.Writer = patient{}

// peer is the process at a connection's other end, which has to be one of
// this process's user.
func peer(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var who *unix.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) { who, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, failed); err != nil {
		return nil, fmt.Errorf("who is at the other end: %w", err)
	}
	if int(who.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("process %d of user %d is at the other end, want user %d", who.Pid, who.Uid, os.Geteuid())
	}
	return who, nil
}
