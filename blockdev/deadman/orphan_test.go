package deadman

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/dm"
)

// mapperOf shows fake devices as a mapper does.
type mapperOf struct{ *fakeDevices }

func (m mapperOf) List() (names []string, err error) {
	m.set(func() { names = slices.Sorted(maps.Keys(m.suspended)) })
	return names, nil
}

func (m mapperOf) Info(name string) (info dm.Info, err error) {
	m.set(func() { info = dm.Info{UUID: "uuid-" + name, Suspended: m.suspended[name], HasActive: true} })
	return info, nil
}

func (m mapperOf) Resume(name string) error {
	held, err := m.resume(name)
	if err == nil && !held {
		err = errors.New("resumed though it was not suspended")
	}
	return err
}

// resumedSoFar is in which order they were.
func (f *fakeDevices) resumedSoFar() (names []string) {
	f.set(func() { names = slices.Clone(f.resumed) })
	return names
}

func orphansOf(t *testing.T, a *agent) *orphans {
	t.Helper()
	h, err := openHolds(a.notes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.close)
	ours := func(uuid string) bool { return !strings.HasSuffix(uuid, "foreign") }
	return &orphans{devices: mapperOf{a.devices}, ours: ours, holds: h, fence: a.fence, log: slog.New(slog.DiscardHandler), now: bootTime}
}

// A service that starts in the middle of a window of another dead-man leaves it.
func TestOrphansOfTheLivingAreLeft(t *testing.T) {
	a := newAgent(t)
	a.say("ARM 50000 inner held", "ARMED")
	a.devices.suspend("inner", "held", "left", "foreign")
	o := orphansOf(t, a)
	if held := o.resume(); !slices.Equal(held, []string{"held", "inner"}) {
		t.Fatalf("held are %v", held)
	}
	if got := a.devices.resumedSoFar(); !slices.Equal(got, []string{"left"}) {
		t.Fatalf("resumed %v, want the one that was left", got)
	}
	a.say("RESUME", "IN-TIME")

	// Nobody's any more: the agent suspended it when it had given up.
	a.devices.suspend("held")
	held, got := o.resume(), a.devices.resumedSoFar()
	if len(held) != 0 || got[len(got)-1] != "held" {
		t.Fatalf("held are %v, resumed %v", held, got)
	}
}

// A dead-man that was killed holds nothing, and one that is stopped not for ever.
func TestOrphansOfTheStoppedAreResumed(t *testing.T) {
	a := newAgent(t)
	a.say("ARM 50000 stopped", "ARMED")
	a.devices.suspend("stopped")
	o := orphansOf(t, a)
	held := o.resume()
	times := []time.Duration{0, MaxLimit, MaxLimit + 1} // it begins; a look in time; one that is late
	o.now = func() time.Duration {
		now := times[0]
		times = times[min(1, len(times)-1):]
		return now
	}
	o.await(context.Background(), held)
	if got := a.devices.resumedSoFar(); !slices.Equal(got, []string{"stopped"}) {
		t.Fatalf("resumed %v", got)
	}
}

// An arm waits for a look that is under way, but not for long.
func TestArmWaitsForALook(t *testing.T) {
	a := newAgent(t)
	o := orphansOf(t, a)
	if !o.holds.alone("vol", func() { a.say("ARM 50000 vol", "ARMED") }) {
		t.Fatal("nobody held it")
	}
	a.devices.suspend("vol")
	a.say("RESUME", "IN-TIME")
}

// A volume whose lease has ended, and whose disk takes long to be flushed before it fails,
// keeps no other's writers waiting: neither one that runs on nor one that fails, too.
func TestOrphansWaitForNoOther(t *testing.T) {
	a := newAgent(t)
	flush := make(chan struct{})
	a.devices.set(func() { a.devices.flush["a-slow"] = flush })
	for _, name := range []string{"a-slow", "b-ended", "c-torn"} {
		is, _, _ := a.devices.identify(name)
		n := leaseNote{device: name, identity: is, holder: "h", until: BootTime() - time.Second}
		if err := n.write(a.notes); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(leasePath(a.notes, "c-torn"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	a.devices.suspend("a-slow", "b-ended", "c-torn", "left")
	o := orphansOf(t, a)
	left := o.resume()
	if got := a.devices.resumedSoFar(); !slices.Equal(got, []string{"left"}) || !slices.Equal(left, []string{"a-slow", "b-ended", "c-torn"}) {
		t.Fatalf("resumed %v, left %v", got, left)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		o.await(t.Context(), left)
	}()
	struck := []string{<-a.devices.struck, <-a.devices.struck}
	if slices.Sort(struck); !slices.Equal(struck, []string{"b-ended", "c-torn"}) {
		t.Errorf("%v fail while the flush of another goes on", struck)
	}
	close(flush)
	<-done
	if !a.devices.fails("a-slow") || !a.devices.running() || len(a.devices.resumedSoFar()) != 1 {
		t.Errorf("fails %v, resumed %v", a.devices.fails("a-slow"), a.devices.resumedSoFar())
	}
}
