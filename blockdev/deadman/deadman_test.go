package deadman

import (
	"bufio"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeDevices are devices that can be suspended.
type fakeDevices struct {
	mu        sync.Mutex
	suspended map[string]bool
	resumed   []string
	broken    int   // so many resumes fail
	missing   error // there is no device-mapper

	failing  map[string]bool // everything on it fails
	sequence map[string]uint64
	notNow   int                      // so many fails don't work
	hang     map[string]chan struct{} // fail waits for its end, unless the device is suspended
	flush    map[string]chan struct{} // fail waits for its end
	looks    map[string]chan struct{} // identify waits until it was received from twice
	struck   chan string              // each that fails, if there is room
}

func (f *fakeDevices) resume(name string) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken > 0 {
		f.broken--
		return false, errors.New("resume does not work\ntoday")
	}
	if !f.suspended[name] {
		return false, nil
	}
	f.suspended[name] = false
	f.resumed = append(f.resumed, name)
	return true, nil
}

func (f *fakeDevices) suspend(names ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, name := range names {
		f.suspended[name] = true
	}
}

func (f *fakeDevices) running() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.suspended {
		if s {
			return false
		}
	}
	return true
}

// set changes or reads its fields.
func (f *fakeDevices) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeDevices) ready() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.missing
}

// newDevices are devices none of which is suspended.
func newDevices() *fakeDevices {
	return &fakeDevices{suspended: map[string]bool{}, failing: map[string]bool{}, sequence: map[string]uint64{}, hang: map[string]chan struct{}{}, flush: map[string]chan struct{}{}, looks: map[string]chan struct{}{}, struck: make(chan string, 100)}
}

func (f *fakeDevices) identify(name string) (identity, condition, error) {
	f.mu.Lock()
	looks := f.looks[name]
	f.mu.Unlock()
	if looks != nil {
		looks <- struct{}{}
		looks <- struct{}{}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return identity{"uuid-" + name, "253:0", f.sequence[name]}, condition{f.failing[name], f.suspended[name]}, nil
}

// fail lets nothing through that was held back: it is none of resumed.
func (f *fakeDevices) fail(name string) error {
	f.mu.Lock()
	hang, flush, held := f.hang[name], f.flush[name], f.suspended[name]
	f.mu.Unlock()
	if hang != nil && !held {
		<-hang
	}
	if flush != nil {
		<-flush
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.notNow > 0 {
		f.notNow--
		return errors.New("no table could be loaded")
	}
	f.failing[name], f.suspended[name] = true, false
	select {
	case f.struck <- name:
	default:
	}
	return nil
}

// agent talks to a dead-man that runs in this process.
type agent struct {
	t       *testing.T
	devices *fakeDevices
	mounts  *fakeMounts
	notes   string
	slept   atomic.Int64 // added to the dead-man's clock
	fence   *striker
	in      *net.UnixConn
	out     *bufio.Scanner
	ended   chan error
}

func newAgent(t *testing.T) *agent {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range pair {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		ends[i] = c.(*net.UnixConn)
	}
	a := &agent{t: t, devices: newDevices(), mounts: &fakeMounts{frozen: map[string]bool{}}, notes: t.TempDir(),
		in: ends[0], out: bufio.NewScanner(ends[0]), ended: make(chan error, 1)}
	in := &inbox{conn: ends[1]}
	now := func() time.Duration { return bootTime() + time.Duration(a.slept.Load()) }
	a.fence = &striker{a.notes, a.devices, now}
	d := &deadman{resumer: a.devices, freezer: a.mounts, out: ends[1], inbox: in, notes: a.notes, now: now, fence: a.fence}
	go func() { a.ended <- d.run(in) }()
	return a
}

func (a *agent) say(line, want string) {
	a.t.Helper()
	if _, err := io.WriteString(a.in, line+"\n"); err != nil {
		a.t.Fatal(err)
	}
	if !a.out.Scan() || !strings.HasPrefix(a.out.Text(), want) {
		a.t.Fatalf("%s: got '%s', want '%s'", line, a.out.Text(), want)
	}
}

func (a *agent) awaitRunning(within time.Duration) {
	a.t.Helper()
	for deadline := time.Now().Add(within); !a.devices.running(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			a.t.Fatalf("still suspended after %s", within)
		}
	}
}

func TestDeadManInTime(t *testing.T) {
	a := newAgent(t)
	for range 3 {
		a.say("ARM 10000 vol-base vol", "ARMED")
		a.devices.suspend("vol", "vol-base")
		a.devices.set(func() { a.devices.resumed = nil })
		a.say("RESUME", "IN-TIME")
		var resumed []string
		a.devices.set(func() { resumed = a.devices.resumed })
		if !slices.Equal(resumed, []string{"vol-base", "vol"}) {
			t.Fatalf("resumed %v, want inner to outer", resumed)
		}
	}
}

func TestDeadManResumesAtItsDeadline(t *testing.T) {
	a := newAgent(t)
	a.say("ARM 50 vol-base vol", "ARMED")
	a.devices.suspend("vol", "vol-base")
	a.awaitRunning(5 * time.Second)
	a.say("RESUME", "LATE the stall limit passed")
	// The next one is in time again.
	a.say("ARM 10000 vol", "ARMED")
	a.devices.suspend("vol")
	a.say("RESUME", "IN-TIME")
}

// An agent that was stopped between arming and suspending suspends when the
// dead-man has already acted.
func TestDeadManResumesWhatIsSuspendedLate(t *testing.T) {
	a := newAgent(t)
	a.say("ARM 10 vol", "ARMED")
	for range 3 {
		time.Sleep(60 * time.Millisecond)
		a.devices.suspend("vol")
		a.awaitRunning(5 * time.Second)
	}
	a.devices.suspend("vol")
	a.say("RESUME", "LATE")
	if !a.devices.running() {
		t.Fatal("LATE was said before the device was resumed")
	}
}

// The machine slept: the limit has passed though no timer has fired.
func TestDeadManCountsSleep(t *testing.T) {
	a := newAgent(t)
	a.say("ARM 50000 vol", "ARMED")
	time.Sleep(100 * time.Millisecond) // its timer was set by the old clock
	a.slept.Store(int64(time.Minute))
	a.say("RESUME", "LATE")
}

func TestDeadManResumesWhenTheAgentEnds(t *testing.T) {
	for _, armed := range []bool{true, false} {
		a := newAgent(t)
		a.say("ARM 50000 vol", "ARMED")
		if !armed {
			a.devices.suspend("vol")
			a.say("RESUME", "IN-TIME")
		}
		a.devices.suspend("vol")
		a.devices.set(func() { a.devices.broken = 2 }) // it tries again
		a.in.Close()
		if err := <-a.ended; err != nil {
			t.Fatal(err)
		}
		if !a.devices.running() {
			t.Fatalf("armed %v: ended with the device suspended", armed)
		}
	}
}

// It says so at once, since the agent may be able to, and goes on trying.
func TestDeadManCanNotResume(t *testing.T) {
	a := newAgent(t)
	a.say("ARM 10000 vol", "ARMED")
	a.devices.set(func() { a.devices.broken = 1 })
	a.devices.suspend("vol")
	a.say("RESUME", "ERROR resume failed: resume does not work; today")
	a.awaitRunning(5 * time.Second)
	a.say("RESUME", "LATE resume failed: resume does not work; today")
}

// A kernel without device-mapper has no device to resume; it may get one later.
func TestDeadManWithoutDeviceMapper(t *testing.T) {
	a := newAgent(t)
	a.devices.set(func() { a.devices.missing = errors.New("no such device") })
	a.say("ARM 10000 vol", "ERROR no such device")
	a.devices.set(func() { a.devices.missing = nil })
	a.say("ARM 10000 vol", "ARMED")
}

func TestDeadManRefuses(t *testing.T) {
	a := newAgent(t)
	a.say("RESUME", "ERROR not armed")
	a.say("ARM x vol", "ERROR")
	a.say("ARM 0 vol", "ERROR")
	a.say("ARM 100000 vol", "ERROR")
	a.say("ARM 100", "ERROR")
	a.say("HELLO", "ERROR")
	a.say("ARM 10000 vol", "ARMED")
	a.say("ARM 10000 vol", "ERROR already armed")
	a.devices.suspend("vol")
	a.say("RESUME", "IN-TIME")
}

// Somebody else resumed: an operator, or a dead-man that was stopped in an
// earlier window and woke up in this one. What was read since is no one moment.
func TestDeadManNoticesWhoeverResumes(t *testing.T) {
	a := newAgent(t)
	a.say("ARM 10000 vol-base vol", "ARMED")
	a.devices.suspend("vol-base", "vol")
	a.devices.resume("vol")
	a.say("RESUME", "LATE vol was not suspended any more")
	// The inner one is resumed by the agent itself as part of a cut.
	a.say("ARM 10000 vol-base vol", "ARMED")
	a.devices.suspend("vol")
	a.say("RESUME", "IN-TIME")
}
