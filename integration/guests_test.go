package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/integration/uml"
	"blockferry/integration/vm"
)

// tasks are what the guests of a set can be told to do, by name. Each runs as the test
// in its guest: what fails there fails the test.
type tasks map[string]func(t *testing.T, in json.RawMessage) any

// task is one with arguments and a result; both go as JSON.
func task[In, Out any](do func(t *testing.T, in In) Out) func(*testing.T, json.RawMessage) any {
	return func(t *testing.T, raw json.RawMessage) any {
		t.Helper()
		var in In
		if err := json.Unmarshal(raw, &in); err != nil {
			t.Fatal(err)
		}
		return do(t, in)
	}
}

// none is what a task takes that takes nothing, and says that says nothing.
type none struct{}

// member is a guest of a set.
type member struct {
	name string
	guest
}

// endTask ends a guest's part of the test; it is told whether the test has failed.
const endTask = "end"

// guests are a set of guests, to the test at the host.
type guests struct {
	t        *testing.T
	set      *uml.Set
	members  map[string]*vm.Member
	outcomes map[string]string // of those that ended by themselves
	systemd  bool              // they are run by it
	hung     error
	begun    time.Time
}

// logf says something with how long the guests have been there.
func (g *guests) logf(format string, args ...any) {
	g.t.Helper()
	g.t.Logf("%6.1fs "+format, append([]any{time.Since(g.begun).Seconds()}, args...)...)
}

// inGuests boots guests on a network of their own and runs script at the host, which
// tells them what to do (ask), may pause them, cut their power and boot them again. A
// script that failed because a guest hung is run once more, with new guests, and the log
// says so. It must be the first thing a test does. Tests that use it run in parallel.
func inGuests(t *testing.T, members []member, can tasks, script func(t *testing.T, g *guests)) {
	t.Helper()
	if uml.Inside() {
		t.Cleanup(func() { leaveOutcome(t) })
		serveTasks(t, can)
		return
	}
	of := mustHost(t, umlHost)
	if os.Geteuid() != 0 {
		t.Skip("a network needs root")
	}
	t.Parallel()
	outcomes := map[string]string{}
	var specs []uml.Spec
	for _, m := range members {
		spec := guestSpec(t.Name(), m.guest)
		spec.Name += " (" + m.name + ")"
		if spec.Console != nil {
			spec.Console = &prefixed{prefix: spec.Name + ": ", out: os.Stderr}
		}
		spec.Collect = func(dir string) error {
			text, err := os.ReadFile(filepath.Join(dir, outcomeFile))
			if err != nil {
				text = []byte("none: the test did not run in the guest")
			}
			outcomes[m.name] = string(text)
			return nil
		}
		specs = append(specs, spec)
	}
	again, err := of.WithSet(t.Context(), specs, func(_ context.Context, s *uml.Set) (err error) {
		g := &guests{t: t, set: s, members: map[string]*vm.Member{}, outcomes: outcomes, systemd: members[0].Systemd, begun: time.Now()}
		clear(outcomes)
		for i, m := range members {
			g.members[m.name] = s.Members[i]
		}
		defer func() {
			if g.hung != nil {
				_ = recover() // see must
				err = g.hung
			}
		}()
		defer g.end()
		g.must(vm.Each(s.Members, func(m *vm.Member) error { m.Boot(); return m.Answers() }))
		g.logf("all guests answer")
		script(t, g)
		return nil
	})
	if again {
		t.Log("RETRIED: a guest hung or never booted, this is the outcome of a second set of guests")
	}
	if errors.Is(err, uml.ErrNoGuest) && os.Getenv(requireVar) == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// must ends the script after an error: one that says that a guest hung is no finding.
func (g *guests) must(err error) {
	g.t.Helper()
	if errors.Is(err, vm.ErrNoEnd) {
		g.t.Log(err)
		g.hung = err
		panic(err)
	}
	if errors.Is(err, uml.ErrNoGuest) && os.Getenv(requireVar) == "" {
		g.t.Skip(err)
	}
	if err != nil {
		g.t.Fatal(err)
	}
}

const (
	// taskLimit is how long a task may take.
	taskLimit = 2 * time.Minute
	// endLimit is how long a guest may take to hear that it is to end.
	endLimit = 30 * time.Second
)

// ask has a guest do something; out, if set, gets what it says.
func (g *guests) ask(guest, task string, in, out any) {
	g.t.Helper()
	if err := g.members[guest].Call(taskLimit, task, in, out); err != nil {
		g.must(fmt.Errorf("guest %s, %s: %w", guest, task, err))
	}
}

// boot boots a guest again whose power was cut.
func (g *guests) boot(guest string) {
	g.t.Helper()
	m := g.members[guest]
	m.Boot()
	g.must(m.Answers())
}

// end lets all guests end their part, and shows what they have said.
func (g *guests) end() {
	g.t.Helper()
	failed := g.t.Failed() || g.hung != nil
	for name, m := range g.members {
		// One that does not run, or is paused, has no part in it any more.
		if err := m.Call(endLimit, endTask, failed, nil); err != nil {
			m.Cut()
		} else if exit, err := m.Wait(); g.hung == nil && (err != nil || exit != 0 || g.outcomes[name] != "pass") {
			g.t.Errorf("guest %s: exit status %d, outcome %s, %v", name, exit, g.outcomes[name], err)
		}
		g.t.Logf("guest %s's console:\n%s", name, strings.TrimSpace(m.Output()))
	}
}

// serveTasks is a guest's part: it does what it is told until it is told to end.
func serveTasks(t *testing.T, can tasks) {
	type job struct {
		name string
		in   json.RawMessage
		done chan error
		out  any
	}
	jobs := make(chan *job)
	served := make(chan error, 1)
	go func() {
		served <- vm.Serve(func(name string, in json.RawMessage) (any, error) {
			j := &job{name: name, in: in, done: make(chan error, 1)}
			jobs <- j
			err := <-j.done
			return j.out, err
		})
	}()
	do := func(j *job) {
		err := fmt.Errorf("'%s' failed; what the guest says tells why", j.name)
		defer func() { j.done <- err }()
		f, known := can[j.name]
		if !known {
			t.Fatalf("nobody here knows how to %s", j.name)
		}
		if j.out = f(t, j.in); !t.Failed() {
			err = nil
		}
	}
	for {
		select {
		case err := <-served:
			t.Fatal(err)
		case j := <-jobs:
			if j.name != endTask {
				do(j)
				continue
			}
			if string(j.in) == "true" {
				t.Error("the test has failed elsewhere")
			}
			j.done <- nil
			return
		}
	}
}
