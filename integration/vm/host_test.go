package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// Guests of a Host beside another count as that one's.
func TestHostsShareTheirLimit(t *testing.T) {
	t.Parallel()
	log := filepath.Join(t.TempDir(), "log")
	m := Machine{
		Shared: func(Guest) Mount { return Mount{} },
		Command: func(Guest) []string {
			return []string{"/bin/sh", "-c", "echo begin >> " + log + "; sleep 0.2; echo end >> " + log}
		},
	}
	first, err := NewHost(m, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second, err := NewHost(m, 2, first)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	var all sync.WaitGroup
	for _, h := range []*Host{first, second, second} {
		all.Go(func() {
			if result, err := h.Run(t.Context(), Spec{}); !errors.Is(err, ErrNoEnd) || !result.Retried {
				t.Errorf("%+v, %v", result, err) // what runs here is no guest, so it leaves no end mark
			}
		})
	}
	all.Wait()
	if text, err := os.ReadFile(log); err != nil || string(text) != strings.Repeat("begin\nend\n", 6) {
		t.Errorf("not one after another: %q, %v", text, err)
	}
}

// A machine that knows no networks refuses one, and boots nothing.
func TestNetworkIsRefused(t *testing.T) {
	t.Parallel()
	h, err := NewHost(Machine{}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	_, err = h.WithSet(t.Context(), []Spec{{Name: "x"}}, func(context.Context, *Set) error { return errors.New("used") })
	if err == nil || !strings.Contains(err.Error(), "guests [x]: guests of this kind join no network") {
		t.Error(err)
	}
}

// Guests are on the taps of their network, of which nobody else sees anything.
func TestNetworkIsItsGuestsOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a network needs root")
	}
	log := filepath.Join(t.TempDir(), "log")
	h, err := NewHost(Machine{
		Card: "card", Shared: func(Guest) Mount { return Mount{} },
		Command: func(g Guest) []string {
			return []string{"/bin/sh", "-c", "ip -o link > " + log + "; echo tap=" + g.Tap}
		},
	}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	links := func() string {
		text, err := os.ReadFile(log)
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	_, err = h.WithSet(t.Context(), []Spec{{Name: "a"}, {Name: "b"}}, func(_ context.Context, s *Set) error {
		for i, m := range s.Members {
			m.Boot()
			if _, err := m.Wait(); !errors.Is(err, ErrNoEnd) { // as above
				t.Error(err)
			}
			if got := links(); !strings.Contains(got, "guest1") || !strings.Contains(got, "guest2") {
				t.Errorf("a guest of the network does not see both taps: %s", got)
			}
			if got, want := m.Output(), fmt.Sprintf("tap=guest%d\n", i+1); got != want {
				t.Errorf("%s says '%s', want '%s'", m.Name, got, want)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if result, err := h.Run(t.Context(), Spec{}); !errors.Is(err, ErrNoEnd) {
		t.Errorf("%+v, %v", result, err)
	}
	if got := links(); strings.Contains(got, "guest1") {
		t.Errorf("a guest without it sees the network: %s", got)
	}
}

// What a set is used for is done once more if a guest hung, and for nothing else.
func TestSetIsTriedOnceMore(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a network needs root")
	}
	h, err := NewHost(Machine{
		Card: "card", Shared: func(Guest) Mount { return Mount{} },
		Command: func(Guest) []string { return []string{"/bin/true"} },
	}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for name, c := range map[string]struct {
		use   func(*Set) error
		times int
	}{
		"never booted":   {func(s *Set) error { s.Members[0].Boot(); return s.Members[0].Answers() }, 2},
		"failed":         {func(*Set) error { return errors.New("failed") }, 1},
		"its power went": {func(s *Set) error { s.Members[0].Boot(); s.Members[0].Cut(); return nil }, 1},
	} {
		times := 0
		again, err := h.WithSet(t.Context(), []Spec{{Name: "a"}}, func(_ context.Context, s *Set) error { times++; return c.use(s) })
		if times != c.times || again != (c.times == 2) || errors.Is(err, ErrNoEnd) != (c.times == 2) {
			t.Errorf("%s: %d times, again %v, %v", name, times, again, err)
		}
	}
	if left, _ := os.ReadDir(h.Dir()); len(left) != 1 { // its lock
		t.Errorf("left behind: %v", left)
	}
}

// Each Host sweeps what killed ones left, and must never take another's
// folder for such, however new it is.
func TestHostsBeginTogether(t *testing.T) {
	t.Parallel()
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			for range 50 {
				h, err := NewHost(Machine{}, 1, nil)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := os.Stat(filepath.Join(h.Dir(), lockName)); err != nil {
					t.Error(err)
				}
				if err := h.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}

func TestWhatAKilledHostLeftIsRemoved(t *testing.T) {
	place := t.TempDir()
	left, inUse := filepath.Join(place, dirPrefix+"1"), filepath.Join(place, dirPrefix+"2")
	for _, dir := range []string{left, inUse} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		lock, err := lockFile(filepath.Join(dir, lockName), os.O_CREATE)
		if err != nil {
			t.Fatal(err)
		}
		if dir == left {
			lock.Close()
		} else {
			defer lock.Close()
		}
	}
	sweep(place)
	if _, err := os.Stat(left); err == nil {
		t.Error("left behind")
	}
	if _, err := os.Stat(inUse); err != nil {
		t.Error("in use, yet removed")
	}
}
