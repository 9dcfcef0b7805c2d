package volume

import (
	"bufio"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// fakeDevices are devices that can be suspended.
type fakeDevices struct {
	mu        sync.Mutex
	suspended map[string]bool
	resumed   []string
	fail      int // so many resumes fail
}

func (f *fakeDevices) resume(name string) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail > 0 {
		f.fail--
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

// agent talks to a dead-man that runs in this process.
type agent struct {
	t       *testing.T
	devices *fakeDevices
	slept   atomic.Int64 // added to the dead-man's clock
	in      *io.PipeWriter
	out     *bufio.Scanner
	ended   chan error
}

func newAgent(t *testing.T) *agent {
	t.Helper()
	in, toIn := io.Pipe()
	fromOut, out := io.Pipe()
	a := &agent{t: t, devices: &fakeDevices{suspended: map[string]bool{}}, in: toIn, out: bufio.NewScanner(fromOut), ended: make(chan error, 1)}
	d := &deadman{resumer: a.devices, out: out, now: func() time.Duration { return bootTime() + time.Duration(a.slept.Load()) }}
	go func() { a.ended <- d.run(in) }()
	t.Cleanup(func() {
		toIn.Close()
		fromOut.Close()
	})
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
		a.devices.resumed = nil
		a.say("RESUME", "IN-TIME")
		if !slices.Equal(a.devices.resumed, []string{"vol-base", "vol"}) {
			t.Fatalf("resumed %v, want inner to outer", a.devices.resumed)
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
		a.devices.fail = 2 // it tries again
		a.in.Close()
		if err := <-a.ended; err != nil {
			t.Fatal(err)
		}
		if !a.devices.running() {
			t.Fatalf("armed %v: ended with the device suspended", armed)
		}
	}
}

func TestDeadManIsLateWhenItCanNotResume(t *testing.T) {
	a := newAgent(t)
	a.say("ARM 10000 vol", "ARMED")
	a.devices.fail = 1
	a.say("RESUME", "LATE resume failed: resume does not work; today")
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

func TestStatField(t *testing.T) {
	line := []byte("     100        2     300        4   55      6      777 8\n")
	for n, want := range map[int]uint64{1: 100, 7: 777, 8: 8} {
		if got, ok := statField(line, n); !ok || got != want {
			t.Errorf("field %d: %d, %v", n, got, ok)
		}
	}
	if _, ok := statField(line, 9); ok {
		t.Error("there is a ninth field")
	}
	if got, ok := statField([]byte("1 23"), 2); !ok || got != 23 {
		t.Errorf("%d, %v", got, ok)
	}
}

func TestSnapshotStatus(t *testing.T) {
	for status, want := range map[string]bool{"16/4096 0": true, "0/32760 0 ": true, "Invalid": false, "Overflow": false,
		"Merge failed": false, "Unknown": false, "": false, " ": false, "4096": false} {
		if got := snapshotWhole(status); got != want {
			t.Errorf("'%s': %v", status, got)
		}
	}
}

func TestEraStatus(t *testing.T) {
	s, err := parseEraStatus("8 17/1279 2 23")
	if err != nil || s != (eraStatus{17, 1279, 2, 23}) {
		t.Errorf("%+v, %v", s, err)
	}
	if s, err := parseEraStatus("8 17/1279 2 -"); err != nil || s.snapshot != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	for _, bad := range []string{"Error", "Fail", "", "8 17/1279 2", "8 17 2 -", "8 17/1279 x -", "8 17/1279 2 0", "8 17/1279 2 x"} {
		if s, err := parseEraStatus(bad); err == nil {
			t.Errorf("'%s' was taken: %+v", bad, s)
		}
	}
}

func TestCheckKernel(t *testing.T) {
	for release, fit := range map[string]bool{"6.1.176": true, "5.12.0-rc1": true, "5.11.22": false, "4.19.0-amd64": false, "5.12": true, "x": false} {
		if err := CheckKernel(release, false); (err == nil) != fit {
			t.Errorf("%s: %v", release, err)
		}
	}
	if err := CheckKernel("4.19.0", true); err != nil {
		t.Error(err)
	}
}
