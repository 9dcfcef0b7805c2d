package deadman

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// far is a deadline that no test lives to see.
const far = time.Hour

func (s *testService) hold(device string, until time.Duration) *Lease {
	s.t.Helper()
	l, err := HoldLease(GuardOptions{Socket: s.socket}, device, "uuid-"+device, until)
	if err != nil {
		s.t.Fatal(err)
	}
	return l
}

func (s *testService) note(device string) bool {
	_, err := os.Stat(leasePath(filepath.Dir(s.socket), device))
	return err == nil
}

// awaitStrike waits for the next device that fails.
func (s *testService) awaitStrike(want string) {
	s.t.Helper()
	select {
	case got := <-s.devices.struck:
		if got != want {
			s.t.Fatalf("%s fails, want %s", got, want)
		}
	case <-time.After(30 * time.Second):
		s.t.Fatalf("%s does not fail; log: %s", want, s.log.text())
	}
}

// await waits until what is true.
func await(t *testing.T, what string, true func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !true(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

func (f *fakeDevices) fails(name string) (is bool) {
	f.set(func() { is = f.failing[name] })
	return is
}

func mustEnd(t *testing.T, what string, err error) {
	t.Helper()
	if !errors.Is(err, ErrLeaseEnded) {
		t.Errorf("%s: %v, want ErrLeaseEnded", what, err)
	}
}

func TestLeaseEndsWithNobodyThere(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	until := BootTime() + 300*time.Millisecond
	l := s.hold("vol", until) // and no connection is left open
	if !s.note("vol") {
		t.Fatal("nothing is noted")
	}
	s.awaitStrike("vol")
	if now := BootTime(); now < until {
		t.Errorf("%s too early", until-now)
	}
	await(t, "the note stays", func() bool { return !s.note("vol") })
	mustEnd(t, "extend", l.Extend(BootTime()+far))
	_, err := HoldLease(GuardOptions{Socket: s.socket}, "vol", "uuid-vol", BootTime()+far)
	mustEnd(t, "hold anew while everything fails", err)
	if err := l.Release(); err != nil {
		t.Errorf("release: %v", err)
	}
	if text := s.log.text(); !strings.Contains(text, "level=ERROR") || !strings.Contains(text, "everything on it fails") {
		t.Errorf("its log: %s", text)
	}
	// The volume is down, and up again.
	s.devices.set(func() { s.devices.failing["vol"] = false; s.devices.sequence["vol"]++ })
	if err := s.hold("vol", BootTime()+far).Extend(BootTime() + 2*far); err != nil {
		t.Error(err)
	}
}

// inTime runs f with a deadline, and again with one later from now if that passed
// meanwhile: this machine may be slow.
func inTime(t *testing.T, f func(device string, first time.Duration) error) (device string, first time.Duration) {
	t.Helper()
	for room := 500 * time.Millisecond; ; room *= 4 {
		device, first = "vol-"+room.String(), BootTime()+room
		if err := f(device, first); BootTime() < first || room > 10*time.Second {
			if err != nil {
				t.Fatal(err)
			}
			return device, first
		}
	}
}

func TestLeaseIsExtended(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	const more = 200 * time.Millisecond
	device, first := inTime(t, func(device string, first time.Duration) error {
		l, err := HoldLease(GuardOptions{Socket: s.socket}, device, "uuid-"+device, first)
		if err != nil {
			return err
		}
		return errors.Join(l.Extend(first+more), l.Extend(first-more)) // the last shortens nothing
	})
	await(t, "no deadline is kept", func() bool { return s.devices.fails(device) })
	if now := BootTime(); now < first+more {
		t.Errorf("%s too early", first+more-now)
	}
}

func TestLeaseIsReleased(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	device, first := inTime(t, func(device string, first time.Duration) error {
		l, err := HoldLease(GuardOptions{Socket: s.socket}, device, "uuid-"+device, first)
		if err == nil {
			err = l.Release()
		}
		if err == nil && s.note(device) {
			t.Error("it is noted still")
		}
		if err == nil {
			mustEnd(t, "extend", l.Extend(BootTime()+far))
		}
		return err
	})
	s.hold("next", max(first, BootTime())+200*time.Millisecond)
	await(t, "no deadline is kept", func() bool { return s.devices.fails("next") })
	if s.devices.fails(device) {
		t.Error("a released device fails")
	}
}

// A later device of the same name is left alone.
func TestLeaseIsOfOneDevice(t *testing.T) {
	folder := t.TempDir()
	n := leaseNote{device: "vol", identity: identity{"uuid-vol", "253:0", 7}, holder: "h", until: BootTime()}
	if err := n.write(folder); err != nil {
		t.Fatal(err)
	}
	s := startService(t, filepath.Join(folder, "s")) // its device has another sequence
	await(t, "its note stays", func() bool { return !s.note("vol") })
	if s.devices.fails("vol") || !strings.Contains(s.log.text(), "that is gone") {
		t.Errorf("another device fails: %v; log: %s", s.devices.fails("vol"), s.log.text())
	}
	if _, err := HoldLease(GuardOptions{Socket: s.socket}, "vol", "uuid-other", BootTime()+far); err == nil || errors.Is(err, ErrLeaseEnded) {
		t.Errorf("held for a device with another uuid: %v", err)
	}
}

// What is struck in vain is gone meanwhile, and the next device has a lease, too.
func TestLeaseOfTheNextDevice(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	s.devices.set(func() { s.devices.sequence["vol"], s.devices.notNow = 1, 1<<30 })
	s.hold("vol", BootTime()+50*time.Millisecond)
	await(t, "it fails all the same", func() bool { return strings.Contains(s.log.text(), "can't be made to fail") })
	s.devices.set(func() { s.devices.sequence["vol"]++; s.devices.notNow = 0 })
	until := BootTime() + 500*time.Millisecond
	s.hold("vol", until)
	s.awaitStrike("vol")
	if now := BootTime(); now < until {
		t.Errorf("%s too early", until-now)
	}
	await(t, "its note stays", func() bool { return !s.note("vol") })
}

// A new agent takes a lease over; the one before has it no more.
func TestLeaseIsTakenOver(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	before := s.hold("vol", BootTime()+far)
	after := s.hold("vol", BootTime()+far)
	mustEnd(t, "extend by the one before", before.Extend(BootTime()+3*far))
	if err := errors.Join(before.Release(), after.Extend(BootTime()+2*far)); err != nil || !s.note("vol") {
		t.Errorf("%v, noted %v", err, s.note("vol"))
	}
}

// The machine was paused: whoever asks first has it struck.
func TestLeaseCountsPauses(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	a, b := s.hold("a", BootTime()+far), s.hold("b", BootTime()+far)
	s.slept.Store(int64(2 * far)) // no timer notices that
	mustEnd(t, "extend", a.Extend(BootTime()+10*far))
	s.awaitStrike("a")
	_, err := HoldLease(GuardOptions{Socket: s.socket}, "b", "uuid-b", BootTime()+10*far)
	mustEnd(t, "take over", err)
	s.awaitStrike("b")
	if err := b.Release(); err != nil {
		t.Error(err)
	}
}

func TestLeaseOutlivesTheService(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	s := startService(t, socket)
	held, released := s.hold("held", BootTime()+far), s.hold("released", BootTime()+far)
	extended, first := inTime(t, func(device string, first time.Duration) error {
		l, err := HoldLease(GuardOptions{Socket: s.socket}, device, "uuid-"+device, first)
		if err == nil {
			err = l.Extend(BootTime() + far)
		}
		return err
	})
	if err := released.Release(); err != nil {
		t.Fatal(err)
	}
	s.stop()
	if !s.hasStopped(30 * time.Second) {
		t.Fatal("it does not end while it holds a lease")
	}
	passed := leaseNote{device: "passed", identity: identity{uuid: "uuid-passed", number: "253:0"}, holder: "h", until: BootTime()}
	if err := passed.write(filepath.Dir(socket)); err != nil { // while nobody was there
		t.Fatal(err)
	}
	time.Sleep(first - BootTime())
	unread := map[string]string{"torn": "blockferry lease 1", "later": "blockferry lease 2 boot", "empty": "", "foreign": "", "struck": ""}
	for device, text := range unread {
		if err := os.WriteFile(leasePath(filepath.Dir(socket), device), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.devices.set(func() { s.devices.failing["struck"] = true })
	next := startServiceOf(t, socket, s.devices)
	await(t, "a deadline that passed is forgotten", func() bool { return next.devices.fails("passed") })
	for device := range unread {
		if device != "foreign" {
			await(t, device+": its lease can't be read, and it does not fail", func() bool { return next.devices.fails(device) })
		}
	}
	if next.devices.fails("foreign") {
		t.Error("a device fails that is none of ours")
	}
	await(t, "a note of what fails stays", func() bool { return !next.note("torn") })
	_, err := HoldLease(GuardOptions{Socket: socket}, "later", "uuid-later", BootTime()+far)
	mustEnd(t, "hold what can't be read", err)
	if next.devices.fails("held") || next.devices.fails("released") || next.devices.fails(extended) {
		t.Error("one fails whose deadline has not passed")
	}
	if err := held.Extend(BootTime() + 2*far); err != nil {
		t.Error(err)
	}
	mustEnd(t, "extend what was released", released.Extend(BootTime()+2*far))
	if text := next.log.text(); !strings.Contains(text, "torn") {
		t.Errorf("nobody is told of a note that can't be read: %s", text)
	}
}

// The service is away for a moment: whoever extends waits for it.
func TestLeaseWaitsForTheService(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	s := startService(t, socket)
	l := s.hold("vol", BootTime()+far)
	s.stop()
	if !s.hasStopped(30 * time.Second) {
		t.Fatal("it does not end")
	}
	start := time.Now()
	if err := l.Extend(BootTime() + far); !errors.Is(err, ErrNoService) || time.Since(start) > 2*leasePatience {
		t.Errorf("without a service: %v after %s", err, time.Since(start))
	}
	if _, err := HoldLease(GuardOptions{}, "vol", "uuid-vol", BootTime()+far); !errors.Is(err, ErrNoService) {
		t.Errorf("without a socket: %v", err)
	}
	// One that ends before it answers, and the one after it.
	dying, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	extended := make(chan error, 1)
	go func() { extended <- l.Extend(BootTime() + 2*far) }()
	conn, err := dying.Accept()
	if err = errors.Join(err, dying.Close()); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	startServiceOf(t, socket, s.devices)
	if err := <-extended; err != nil {
		t.Errorf("extended while the service starts: %v", err)
	}
}

// One device hangs: what is in flight on it does not end. Others don't wait for
// it, nor does its agent.
func TestLeaseOfADeviceThatHangs(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	hang := make(chan struct{})
	s.devices.set(func() { s.devices.hang["hangs"] = hang; s.devices.notNow = 3 }) // it tries again
	l := s.hold("hangs", BootTime()+100*time.Millisecond)
	await(t, "nobody is told", func() bool { return strings.Contains(s.log.text(), "in flight") })
	s.hold("other", BootTime()+100*time.Millisecond)
	s.awaitStrike("other")
	mustEnd(t, "extend", l.Extend(BootTime()+far))
	if err := l.Release(); err != nil || !s.note("hangs") {
		t.Errorf("%v, noted %v: its end is not sure yet", err, s.note("hangs"))
	}
	s.stop()
	if s.hasStopped(200 * time.Millisecond) {
		t.Error("ended in the middle of a strike: what it holds back gets through")
	}
	close(hang)
	s.awaitStrike("hangs")
	if !s.hasStopped(30 * time.Second) {
		t.Error("does not end after it")
	}
	if text := s.log.text(); !strings.Contains(text, "can't be made to fail") {
		t.Errorf("its log: %s", text)
	}
}

// Whatever ends a stop of writers after the deadline lets nothing through.
func TestLeaseEndsInAStop(t *testing.T) {
	for how, end := range map[string]func(a *agent){
		"asked":  func(a *agent) { a.say("RESUME", "LATE the lease of vol has ended") },
		"closed": func(a *agent) { a.in.Close() },
		"limit":  func(*agent) {},
	} {
		a := newAgent(t)
		is, _, _ := a.devices.identify("vol")
		n := leaseNote{device: "vol", identity: is, holder: "h", until: BootTime() + far}
		if err := n.write(a.notes); err != nil {
			t.Fatal(err)
		}
		a.say("ARM "+map[bool]string{true: "500", false: "50000"}[how == "limit"]+" vol-base vol", "ARMED")
		a.devices.suspend("vol-base", "vol")
		a.devices.set(func() { a.devices.notNow = 2 })
		a.slept.Store(int64(2 * far))
		if how == "asked" {
			a.say("RESUME", "ERROR resume failed: the lease of vol has ended")
			a.devices.set(func() { a.devices.notNow = 0 })
		}
		end(a)
		await(t, how+": it stays suspended", a.devices.running)
		if got := a.devices.resumedSoFar(); !a.devices.fails("vol") || slices.Contains(got, "vol") {
			t.Errorf("%s: fails %v, resumed %v", how, a.devices.fails("vol"), got)
		}
	}
}

// Nobody is to be stopped when the deadline comes.
func TestArmRefusesNearADeadline(t *testing.T) {
	a := newAgent(t)
	a.devices.set(func() { a.devices.sequence["vol"] = 1 })
	is, _, _ := a.devices.identify("vol")
	n := leaseNote{device: "vol", identity: is, holder: "h", until: BootTime() + 30*time.Second}
	if err := n.write(a.notes); err != nil {
		t.Fatal(err)
	}
	a.say("ARM 40000 vol-base vol", "REFUSED the lease of vol ends in")
	a.say("ARM 100 vol-base vol", "ARMED")
	a.say("RESUME", "LATE") // nobody had suspended
	a.slept.Store(int64(time.Minute))
	a.say("ARM 100 vol", "REFUSED the lease of vol has ended")
	if a.devices.fails("vol") {
		t.Error("an arm makes it fail: it might wait for that")
	}
	a.devices.set(func() { a.devices.sequence["vol"]++ })
	a.say("ARM 40000 vol", "ARMED") // it is of another device
	a.say("RESUME", "LATE")
	if a.devices.fails("vol") {
		t.Error("another device fails")
	}
	a.say("LEASE vol h 1 uuid-vol", "ERROR a lease is held by the dead-man's service alone")
}

// A guard that was refused keeps its dead-man.
func TestGuardIsRefusedNearADeadline(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	g := s.guard(GuardOptions{})
	l := s.hold("vol", BootTime()+30*time.Second)
	for range 5 {
		if err := g.Arm(40*time.Second, "vol"); err == nil || !strings.Contains(err.Error(), "sooner than the stall limit") {
			t.Fatalf("armed near the deadline: %v", err)
		}
	}
	if err := l.Extend(BootTime() + far); err != nil {
		t.Fatal(err)
	}
	if err := s.devices.cut(t, g); err != nil {
		t.Error(err)
	}
}

// Nor does the agent resume in a dead dead-man's place, nor the next service.
func TestLeaseEndsWithoutADeadMan(t *testing.T) {
	a := newAgent(t)
	write := func(until time.Duration) {
		is, _, _ := a.devices.identify("vol")
		n := leaseNote{device: "vol", identity: is, holder: "h", until: until}
		if err := n.write(a.notes); err != nil {
			t.Fatal(err)
		}
	}
	g := newTestGuard(t, GuardOptions{Notes: a.notes, Command: shell("read l; echo ARMED; read l; exit")})
	g.fence.devices = a.devices
	stop := func() (rescued bool, err error) {
		mustArm(t, g, time.Second)
		a.devices.suspend("vol")
		g.fence.now = func() time.Duration { return g.armed + g.limit }
		err = g.Resume(func() error { rescued = true; _, err := a.devices.resume("vol"); return err })
		return rescued, err
	}
	write(BootTime() - time.Second)
	if _, err := stop(); !errors.Is(err, ErrLate) || errors.Is(err, ErrStopped) || !a.devices.fails("vol") || len(a.devices.resumedSoFar()) > 0 {
		t.Errorf("%v, fails %v, resumed %v", err, a.devices.fails("vol"), a.devices.resumedSoFar())
	}
	a.devices.set(func() { a.devices.failing["vol"] = false; a.devices.notNow = 1 })
	if rescued, err := stop(); rescued || !errors.Is(err, ErrStopped) {
		t.Errorf("what can't be made to fail is resumed: %v, %v", rescued, err)
	}
	a.devices.set(func() { a.devices.failing["vol"] = false })
	a.devices.suspend("vol")
	o := orphansOf(t, a)
	o.await(t.Context(), o.resume())
	if !a.devices.fails("vol") || len(a.devices.resumedSoFar()) > 0 {
		t.Errorf("the next service: fails %v, resumed %v", a.devices.fails("vol"), a.devices.resumedSoFar())
	}

	a.devices.set(func() { a.devices.failing["vol"] = false })
	write(BootTime() + far)
	if rescued, err := stop(); !rescued || !errors.Is(err, ErrLate) || errors.Is(err, ErrStopped) || a.devices.fails("vol") {
		t.Errorf("before its deadline: rescued %v, fails %v, %v", rescued, a.devices.fails("vol"), err)
	}
}

func TestLeaseRefuses(t *testing.T) {
	s := startService(t, filepath.Join(t.TempDir(), "s"))
	_, err := HoldLease(GuardOptions{Socket: s.socket}, "vol", "uuid-vol", BootTime())
	mustEnd(t, "a deadline that has passed", err)
	if _, err := HoldLease(GuardOptions{Socket: s.socket}, "vo l", "uuid-vol", BootTime()+far); err == nil || errors.Is(err, ErrNoService) {
		t.Errorf("a name with a space: %v", err)
	}
	conn, err := net.Dial("unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, line := range []string{"LEASE vol", "LEASE vol h x uuid-vol", "LEASE vol h -1 uuid-vol", "EXTEND vol h", "RELEASE"} {
		answer := make([]byte, 100)
		if _, err := conn.Write([]byte(line + "\n")); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(answer); err != nil || !strings.HasPrefix(string(answer[:n]), "ERROR") {
			t.Errorf("%s: '%s', %v", line, answer[:n], err)
		}
	}
	if s.note("vol") {
		t.Error("something is noted")
	}
}
