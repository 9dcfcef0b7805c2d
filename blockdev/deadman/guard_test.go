package deadman

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// shell is a dead-man in a shell script.
func shell(text string) []string { return []string{"/bin/sh", "-c", text} }

// obedient is one that always answers as wanted.
const obedient = "while read l; do echo ARMED; read l; echo IN-TIME; done"

// logBuffer takes a log from several goroutines.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// take is text, and forgets it.
func (l *logBuffer) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.b.Reset()
	return l.b.String()
}

func newTestGuard(t *testing.T, o GuardOptions) *Guard {
	t.Helper()
	g, err := NewGuard(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !g.window.TryLock() {
			_ = g.exchange(nil) // a test that failed in the middle of a suspend
			return
		}
		g.window.Unlock()
		g.Close()
	})
	return g
}

func mustArm(t *testing.T, g *Guard, limit time.Duration) {
	t.Helper()
	if err := g.Arm(limit, "vol"); err != nil {
		t.Fatal(err)
	}
}

// cut is one suspend.
func (f *fakeDevices) cut(t *testing.T, g *Guard) error {
	t.Helper()
	mustArm(t, g, 10*time.Second)
	f.suspend("vol")
	return g.Resume(func() error { _, err := f.resume("vol"); return err })
}

func TestGuardBelievesOnlyInTime(t *testing.T) {
	for answer, want := range map[string]struct{ late, dead bool }{
		"echo IN-TIME":     {},
		"echo LATE slept":  {late: true},
		"echo IN-TIME-NOT": {late: true, dead: true},
		"exit":             {late: true, dead: true},
	} {
		g := newTestGuard(t, GuardOptions{Command: shell("while read l; do echo ARMED; read l; " + answer + "; done")})
		for range 2 { // the second time a dead one was started again
			mustArm(t, g, time.Second)
			rescued := false
			err := g.Resume(func() error { rescued = true; return nil })
			if rescued != want.dead || errors.Is(err, ErrLate) != want.late || (err != nil) != want.late {
				t.Errorf("%s: rescued %v, %v", answer, rescued, err)
			}
		}
	}
	g := newTestGuard(t, GuardOptions{Command: shell("exit")})
	for range 2 { // nobody is locked out after a failed arm
		if err := g.Arm(time.Second, "vol"); err == nil {
			t.Error("armed by a dead-man that does not answer")
		}
	}
}

// Two volumes' suspends overlap: there is no collection until both have ended,
// and then there is again.
func TestQuietTimesOverlap(t *testing.T) {
	setting := func() int {
		percent := debug.SetGCPercent(-1)
		debug.SetGCPercent(percent)
		return percent
	}
	before := setting()
	defer debug.SetGCPercent(before)
	for _, firstEndsFirst := range []bool{true, false} {
		end := []chan struct{}{make(chan struct{}), make(chan struct{})}
		ended := []chan struct{}{make(chan struct{}), make(chan struct{})}
		for i := range end {
			begun := make(chan struct{})
			go func() {
				defer close(ended[i])
				Quiet(func() {
					close(begun)
					<-end[i]
				})
			}()
			<-begun
		}
		one, other := 0, 1
		if !firstEndsFirst {
			one, other = 1, 0
		}
		close(end[one])
		<-ended[one]
		if p := setting(); p != -1 {
			t.Errorf("collections at %d %% while a device may be suspended", p)
		}
		close(end[other])
		<-ended[other]
		if p := setting(); p != before {
			t.Fatalf("collections at %d %% after all, want %d", p, before)
		}
	}
}

// A dead-man that is stopped is not waited for: devices are suspended.
func TestGuardWaitsNoLongerThanTheLimit(t *testing.T) {
	g := newTestGuard(t, GuardOptions{Command: shell("read l; echo ARMED; read l; exec sleep 60")})
	const limit = 300 * time.Millisecond
	start := time.Now() // the limit counts from within mustArm
	mustArm(t, g, limit)
	var after time.Duration
	err := g.Resume(func() error { after = time.Since(start); return nil })
	if !errors.Is(err, ErrLate) || after < limit || after > limit+2*time.Second {
		t.Errorf("rescued after %s, the limit is %s: %v", after, limit, err)
	}
	first := g.Pid()
	mustArm(t, g, time.Second)
	g.Resume(func() error { return nil })
	if g.Pid() == first {
		t.Error("the one that hung serves on")
	}
}

// What happens while devices are suspended allocates nothing.
func TestGuardResumesWithoutAllocation(t *testing.T) {
	g := newTestGuard(t, GuardOptions{Command: shell(obedient)})
	rescue := func() error { return nil }
	var least uint64 = 1 << 40 // others in this process may allocate meanwhile
	for range 20 {
		mustArm(t, g, 10*time.Second)
		var before, after runtime.MemStats
		var err error
		Quiet(func() {
			runtime.ReadMemStats(&before)
			err = g.Resume(rescue)
			runtime.ReadMemStats(&after)
		})
		if err != nil {
			t.Fatal(err)
		}
		least = min(least, after.Mallocs-before.Mallocs)
	}
	if least != 0 {
		t.Errorf("%d allocations", least)
	}
}

// testService is a dead-man's service in this process.
type testService struct {
	t       *testing.T
	socket  string
	devices *fakeDevices
	slept   atomic.Int64 // added to its clock
	log     logBuffer
	stopped chan struct{}
	stop    func()
}

func startService(t *testing.T, socket string) *testService {
	t.Helper()
	return startServiceOf(t, socket, newDevices())
}

// startServiceOf is startService, with devices that were there before.
func startServiceOf(t *testing.T, socket string, devices *fakeDevices) *testService {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	s := &testService{t: t, socket: socket, devices: devices, stopped: make(chan struct{})}
	stop := make(chan struct{})
	s.stop = sync.OnceFunc(func() { close(stop) })
	log := slog.New(slog.NewTextHandler(&s.log, nil))
	now := func() time.Duration { return bootTime() + time.Duration(s.slept.Load()) }
	inner := &service{resumer: s.devices, freezer: &fakeMounts{frozen: map[string]bool{}}, now: now, log: log, notes: filepath.Dir(socket),
		leases: newDeadlines(striker{filepath.Dir(socket), s.devices, now}, log)}
	inner.leases.adopt(func(uuid string) bool { return !strings.HasSuffix(uuid, "foreign") })
	go func() { inner.serve(l, stop); close(s.stopped) }()
	t.Cleanup(s.stop)
	return s
}

func (s *testService) hasStopped(within time.Duration) bool {
	select {
	case <-s.stopped:
		return true
	case <-time.After(within):
		return false
	}
}

func (s *testService) guard(o GuardOptions) *Guard {
	s.t.Helper()
	o.Socket = s.socket
	if o.Command == nil {
		o.Command = shell("echo unexpected; exit 1")
	}
	return newTestGuard(s.t, o)
}

// Each connection has a suspend of its own, and one that ends resumes only
// its own devices.
func TestServiceServesSeveralGuards(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	a, b := s.guard(GuardOptions{}), s.guard(GuardOptions{})
	for range 3 {
		if err := a.Arm(10*time.Second, "a"); err != nil {
			t.Fatal(err)
		}
		if err := b.Arm(10*time.Second, "b"); err != nil {
			t.Fatal(err)
		}
		s.devices.suspend("a", "b")
		for name, g := range map[string]*Guard{"a": a, "b": b} {
			if err := g.Resume(func() error { return errors.New("not called") }); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if err := a.Arm(10*time.Second, "a"); err != nil {
		t.Fatal(err)
	}
	if err := b.Arm(100*time.Millisecond, "b"); err != nil {
		t.Fatal(err)
	}
	s.devices.suspend("a", "b")
	a.link.conn.Close() // the agent is killed
	for deadline := time.Now().Add(5 * time.Second); !s.devices.running(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still suspended: %v", s.devices.suspended)
		}
	}
	if err := b.Resume(func() error { return nil }); !errors.Is(err, ErrLate) {
		t.Errorf("past its limit: %v", err)
	}
	if err := a.Resume(func() error { return nil }); !errors.Is(err, ErrLate) {
		t.Errorf("a connection that closed: %v", err)
	}
}

// Stopped, the service ends when nothing is armed, no sooner.
func TestServiceStops(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	s := startService(t, socket)
	idle, g := s.guard(GuardOptions{}), s.guard(GuardOptions{})
	mustArm(t, g, 10*time.Second)
	s.devices.suspend("vol")
	s.stop()
	if s.hasStopped(200 * time.Millisecond) {
		t.Fatal("ended in the middle of a suspend")
	}
	if err := g.Resume(func() error { return errors.New("not called") }); err != nil {
		t.Errorf("the suspend under way: %v", err)
	}
	if !s.hasStopped(5 * time.Second) {
		t.Fatal("does not end though nothing is armed")
	}
	// The next one is found at the next suspend, by both.
	next := startService(t, socket)
	for _, g := range []*Guard{idle, g} {
		if err := next.devices.cut(t, g); err != nil {
			t.Error(err)
		}
	}
	// Late, and not fetched yet: the agent may be about to suspend.
	mustArm(t, g, 10*time.Millisecond)
	next.stop()
	time.Sleep(50 * time.Millisecond)
	next.devices.suspend("vol")
	for deadline := time.Now().Add(5 * time.Second); !next.devices.running(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a device stays suspended")
		}
	}
	if next.hasStopped(100 * time.Millisecond) {
		t.Fatal("ended before LATE was fetched")
	}
	g.link.conn.Close() // the agent is killed
	_ = g.Resume(func() error { return nil })
	if !next.hasStopped(5 * time.Second) {
		t.Fatal("does not end though its agents are gone")
	}
}

func TestServiceRefuses(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	var open []net.Conn
	defer func() {
		for _, c := range open {
			c.Close()
		}
	}()
	ask := func(line string) (string, error) {
		c, err := net.Dial("unix", s.socket)
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write([]byte(line)); err != nil {
			return "", err
		}
		answer := make([]byte, 100)
		n, err := c.Read(answer)
		return string(answer[:n]), err
	}
	if answer, err := ask(strings.Repeat("x", 2*maxLineBytes) + "\n"); err == nil {
		t.Errorf("a line without end is answered '%s'", answer)
	}
	for range maxConnections {
		if answer, err := ask("HELLO\n"); err != nil || !strings.HasPrefix(answer, "ERROR") {
			t.Fatalf("'%s', %v", answer, err)
		}
	}
	if answer, err := ask("HELLO\n"); err == nil {
		t.Errorf("one too many is answered '%s'", answer)
	}
	if text := s.log.take(); !strings.Contains(text, "too many") || !strings.Contains(text, "token too long") {
		t.Errorf("its log: %s", text)
	}
	open[5].Close() // makes room
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if answer, err := ask("HELLO\n"); err == nil && strings.HasPrefix(answer, "ERROR") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no room again")
		}
	}
}

// Whoever gets at the socket all the same is refused, unless it is root's.
func TestServiceRefusesOtherUsers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	const nobody = 65534
	// Not t.TempDir: its parents are closed to others.
	dir, err := os.MkdirTemp("/tmp", "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := startService(t, filepath.Join(dir, "s"))
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(s.socket, 0o666)); err != nil {
		t.Fatal(err)
	}
	var conn net.Conn
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends as another user
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), nobody, ^uintptr(0)); errno != 0 {
			done <- errno
			return
		}
		var err error
		conn, err = net.Dial("unix", s.socket)
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	answer := make([]byte, 100)
	_, _ = conn.Write([]byte("ARM 100 vol\n"))
	if n, err := conn.Read(answer); err == nil {
		t.Errorf("another user is answered '%s'", answer[:n])
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if text := s.log.text(); strings.Contains(text, "of user 65534") {
			return
		} else if time.Now().After(deadline) {
			t.Fatalf("its log: %s", text)
		}
	}
}

// Without the service the agent has a dead-man of its own, and says so; the
// service is taken again as soon as it is there.
func TestGuardFindsTheService(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	log := &logBuffer{}
	for _, expected := range []bool{true, false} {
		g := newTestGuard(t, GuardOptions{Socket: socket, Command: shell(obedient), ServiceExpected: expected, Log: slog.New(slog.NewTextHandler(log, nil))})
		if text := log.take(); strings.Contains(text, "level=WARN") != expected || !strings.Contains(text, "systemctl") || !strings.Contains(text, socket) {
			t.Errorf("expected %v: %s", expected, text)
		}
		own := g.Pid()
		for range 2 {
			mustArm(t, g, time.Second)
			if err := g.Resume(func() error { return nil }); err != nil || g.Pid() != own {
				t.Errorf("dead-man %d, was %d: %v", g.Pid(), own, err)
			}
		}
		if text := log.take(); text != "" {
			t.Errorf("says it again: %s", text)
		}
		s := startService(t, socket)
		if err := s.devices.cut(t, g); err != nil || g.Pid() == own {
			t.Errorf("not with the service: %v", err)
		}
		if text := log.take(); !strings.Contains(text, "level=INFO") || !strings.Contains(text, fmt.Sprint("pid=", g.Pid())) {
			t.Errorf("back with the service: %s", text)
		}
		s.stop()
		s.hasStopped(5 * time.Second)
		mustArm(t, g, time.Second)
		if err := g.Resume(func() error { return nil }); err != nil {
			t.Error(err)
		}
		if text := log.take(); strings.Contains(text, "level=WARN") != expected {
			t.Errorf("without it again: %s", text)
		}
	}
}

// A service that takes connections but does not answer is left alone for a
// while: every cut would wait for it.
func TestGuardLeavesAServiceThatRefuses(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var taken atomic.Int64
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			taken.Add(1)
			c.Close()
		}
	}()
	g := newTestGuard(t, GuardOptions{Socket: socket, Command: shell(obedient)})
	for range 3 {
		mustArm(t, g, time.Second)
		if err := g.Resume(func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if n := taken.Load(); n != 2 {
		t.Errorf("it was asked %d times", n)
	}
}

// Nor does one that hangs hold every cut up.
func TestGuardLeavesAServiceThatHangs(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket) // nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g := newTestGuard(t, GuardOptions{Socket: socket, Command: shell(obedient)})
	start := time.Now()
	for range 3 {
		mustArm(t, g, time.Second)
		if err := g.Resume(func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(start); took < servicePatience || took > 2*servicePatience {
		t.Errorf("3 cuts took %s", took)
	}
}

// A dead-man whose freeze the kernel has not finished is left alone: killed, it
// would leave the file system frozen.
func TestFreezingDeadManIsNotKilled(t *testing.T) {
	done := filepath.Join(t.TempDir(), "thawed")
	g, err := NewGuard(GuardOptions{Command: []string{"/bin/bash", "-c", "read a; echo ARMED; read b; sleep 1.5; touch " + done}})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if err := g.ArmMounts(100*time.Millisecond, dir); err != nil {
		t.Fatal(err)
	}
	if err := g.Freeze(); !errors.Is(err, ErrLate) {
		t.Errorf("a freeze that takes too long: %v", err)
	}
	rescued := false
	if err := g.Resume(func() error { rescued = true; return nil }); !errors.Is(err, ErrLate) || !rescued {
		t.Errorf("resume: %v, rescued %v", err, rescued)
	}
	if err := g.Close(); err != nil {
		t.Error(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(done); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("it was killed before it could thaw")
		}
	}
}
