package deadman

import (
	"errors"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"
)

// noteOf writes a note of the fake device 'vol'.
func noteOf(t *testing.T, a *agent, until time.Duration) {
	t.Helper()
	is, _, _ := a.devices.identify("vol")
	n := leaseNote{device: "vol", identity: is, holder: "h", until: until}
	if err := n.write(a.notes); err != nil {
		t.Fatal(err)
	}
}

// The lease has ended, and what is in flight on the device does not end: nobody
// but the service waits for that.
func TestNobodyElseWaitsForWhatIsInFlight(t *testing.T) {
	a := newAgent(t)
	hang := make(chan struct{})
	a.devices.set(func() { a.devices.hang["vol"] = hang })
	noteOf(t, a, BootTime()+far)
	a.say("ARM 50000 vol", "ARMED")
	a.slept.Store(int64(2 * far))
	a.say("RESUME", "LATE the lease of vol has ended")
	a.say("ARM 100 vol", "REFUSED the lease of vol has ended")
	orphansOf(t, a).resumeOne("vol")

	g := newTestGuard(t, GuardOptions{Notes: a.notes, Command: shell("read l; echo ARMED; read l; exit")})
	g.fence = a.fence // it slept
	mustArm(t, g, time.Second)
	rescued := false
	if err := g.Resume(func() error { rescued = true; return nil }); !errors.Is(err, ErrLate) || rescued {
		t.Errorf("the agent's resume: %v, rescued %v", err, rescued)
	}

	// An agent that comes makes it fail, and does not wait for that.
	closed := make(chan struct{})
	begun := time.Now()
	err := a.fence.failEnded("vol", 100*time.Millisecond, func() { close(closed) })
	if err == nil || !strings.Contains(err.Error(), "in flight") || a.devices.fails("vol") || time.Since(begun) > 10*time.Second {
		t.Errorf("an agent that comes: %v after %s", err, time.Since(begun))
	}
	if err := a.fence.failEnded("vol", time.Hour, func() {}); err == nil || !strings.Contains(err.Error(), "in flight") {
		t.Errorf("and again: %v", err)
	}
	close(hang)
	<-closed
	if err := a.fence.failEnded("vol", time.Hour, func() {}); err != nil || !a.devices.fails("vol") {
		t.Errorf("in the end: %v, fails %v", err, a.devices.fails("vol"))
	}
}

// What can't be told is not taken for another device.
func TestLeaseOfADeviceNotKnown(t *testing.T) {
	dir := t.TempDir()
	part := filepath.Join(dir, "part")
	if err := os.Mkdir(part, 0o700); err != nil {
		t.Fatal(err)
	}
	check := func(what string, want uint64, fails bool) {
		t.Helper()
		if n, err := sequenceAt(part); n != want || (err != nil) != fails {
			t.Errorf("%s: %d, %v", what, n, err)
		}
	}
	check("a kernel without", 0, false)
	path := filepath.Join(dir, "diskseq")
	if err := os.WriteFile(path, []byte("7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	check("its disk's", 7, false)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("nothing", 0, true)
	if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
		t.Fatal(err)
	}
	check("one that can't be read", 0, true)
	if _, err := sequenceOf("0:0"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no device: %v", err)
	}

	// A lease held before the device had a table, so no number, is its own after.
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	s.devices.set(func() { s.devices.sequence["vol"] = 0 })
	s.hold("vol", BootTime()+300*time.Millisecond)
	s.devices.set(func() { s.devices.sequence["vol"] = 9 })
	s.awaitStrike("vol")
	if (identity{uuid: "a", number: "253:0"}).matches(identity{uuid: "b", number: "253:0"}) {
		t.Error("another uuid is the same device")
	}
}

// A note that can't be told to be another boot's is not one.
func TestLeaseOfABootNotKnown(t *testing.T) {
	unread := errors.New("no more files")
	if err := ofBoot("a", "", unread); !errors.Is(err, unread) || errors.Is(err, errOtherBoot) {
		t.Errorf("the boot can't be read: %v", err)
	}
	if err := ofBoot("a", "b", nil); !errors.Is(err, errOtherBoot) {
		t.Errorf("another boot's: %v", err)
	}
	if err := ofBoot("a", "a", nil); err != nil {
		t.Errorf("this boot's: %v", err)
	}
}

// A device whose note can't be read is not resumed, nor left suspended.
func TestLeaseWhoseNoteIsTorn(t *testing.T) {
	a := newAgent(t)
	for _, text := range []string{"", "blockferry lease 1"} {
		if err := os.WriteFile(leasePath(a.notes, "vol"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		a.devices.set(func() { a.devices.failing["vol"], a.devices.notNow = false, 1 })
		a.devices.suspend("vol")
		o := orphansOf(t, a)
		left := o.resume()
		o.await(t.Context(), left) // one try is not enough
		if len(left) != 1 || !a.devices.running() || !a.devices.fails("vol") || len(a.devices.resumedSoFar()) > 0 {
			t.Errorf("'%s': left %v, running %v, fails %v, resumed %v", text, left, a.devices.running(), a.devices.fails("vol"), a.devices.resumedSoFar())
		}
	}
}

// While the lease can't have ended no file is read in a stop of writers.
func TestNoNoteIsReadInAStop(t *testing.T) {
	torn := func(a *agent) {
		if err := os.WriteFile(leasePath(a.notes, "vol"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a := newAgent(t)
	for _, held := range []bool{true, false} {
		if held {
			noteOf(t, a, BootTime()+far)
		} else if err := os.Remove(leasePath(a.notes, "vol")); err != nil {
			t.Fatal(err)
		}
		a.say("ARM 50000 vol", "ARMED")
		a.devices.suspend("vol")
		torn(a)
		a.say("RESUME", "IN-TIME")
		if held { // nor once the limit has passed
			noteOf(t, a, BootTime()+far)
			a.say("ARM 10 vol", "ARMED")
			torn(a)
			a.devices.suspend("vol")
			a.awaitRunning(30 * time.Second)
			a.say("RESUME", "LATE the stall limit passed")
		}
	}
	if a.devices.fails("vol") {
		t.Error("it fails")
	}
	a.say("ARM 50000 vol", "REFUSED the lease of vol has a note that can't be read")

	g := newTestGuard(t, GuardOptions{Notes: a.notes, Command: shell("read l; echo ARMED; read l; exit")})
	g.fence = a.fence
	mustArm(t, g, MaxLimit)
	a.devices.suspend("vol")
	rescued := false
	if err := g.Resume(func() error { rescued = true; _, err := a.devices.resume("vol"); return err }); !rescued || errors.Is(err, ErrStopped) || a.devices.fails("vol") {
		t.Errorf("rescued %v, fails %v: %v", rescued, a.devices.fails("vol"), err)
	}
}

// A lease of a device that was taken down, and up again, is none of the new one's.
func TestLeaseIsNotExtendedToAnother(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	l := s.hold("vol", BootTime()+far) // which has no number yet
	s.devices.set(func() { s.devices.sequence["vol"] = 1 })
	if err := l.Extend(BootTime() + 2*far); err != nil {
		t.Fatal(err)
	}
	s.devices.set(func() { s.devices.sequence["vol"] = 2 })
	mustEnd(t, "extend to another device", l.Extend(BootTime()+3*far))
	s.devices.set(func() { s.devices.sequence["vol"], s.devices.failing["vol"] = 1, true })
	mustEnd(t, "extend while everything fails", l.Extend(BootTime()+3*far))
}

// A device that can't even be looked at keeps no other's lease from ending.
func TestLeaseBesideADeviceThatHangs(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	l := s.hold("hangs", BootTime()+far)
	looks := make(chan struct{})
	s.devices.set(func() { s.devices.looks["hangs"] = looks })
	extended := make(chan error, 1)
	go func() { extended <- l.Extend(BootTime() + 2*far) }()
	<-looks
	s.hold("other", BootTime()+100*time.Millisecond)
	s.awaitStrike("other")
	s.devices.set(func() { delete(s.devices.looks, "hangs") })
	<-looks
	<-extended // in time or not
	s.stop()
	if !s.hasStopped(30*time.Second) || !strings.Contains(s.log.text(), "stops while it holds") {
		t.Errorf("its log: %s", s.log.text())
	}
}

// watched are devices that call at as one is made to fail.
type watched struct {
	*fakeDevices
	at func()
}

func (w watched) fail(name string) error {
	w.at()
	return w.fakeDevices.fail(name)
}

// While the agent makes a device fail in a dead dead-man's place, which may take a flush, it
// collects garbage.
func TestAStrikeIsNotQuiet(t *testing.T) {
	percent := func() int {
		p := debug.SetGCPercent(-1)
		debug.SetGCPercent(p)
		return p
	}
	before, during := percent(), 0
	a := newAgent(t)
	noteOf(t, a, BootTime()+far)
	g := newTestGuard(t, GuardOptions{Notes: a.notes, Command: shell("read l; echo ARMED; read l; exit")})
	g.fence = &striker{a.notes, watched{a.devices, func() { during = percent() }}, a.fence.now}
	mustArm(t, g, time.Second)
	a.slept.Store(int64(2 * far))
	Quiet(func() {
		a.devices.suspend("vol")
		if err := g.Resume(func() error { return nil }); !errors.Is(err, ErrLate) || errors.Is(err, ErrStopped) {
			t.Error(err)
		}
		if p := percent(); p != -1 {
			t.Errorf("and after it: %d", p)
		}
	})
	if !a.devices.fails("vol") || during != before || percent() != before {
		t.Errorf("fails %v; it is %d before, %d while it is made to, %d in the end", a.devices.fails("vol"), before, during, percent())
	}
}
