package vm

import (
	"errors"
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
	if result, err := h.Run(t.Context(), Spec{Name: "x", Network: &Network{}}); err == nil || !strings.Contains(err.Error(), "guest x: guests of this kind join no network") {
		t.Errorf("%+v, %v", result, err)
	}
}

// Guests are on the taps of their network, of which nobody else sees anything.
func TestNetworkIsItsGuestsOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a network needs root")
	}
	network, err := NewNetwork("bf-left", "bf-right")
	if err != nil {
		t.Fatal(err)
	}
	defer network.Close()
	log := filepath.Join(t.TempDir(), "log")
	h, err := NewHost(Machine{
		Networks: true, Shared: func(Guest) Mount { return Mount{} },
		Command: func(Guest) []string { return []string{"/bin/sh", "-c", "ip -o link > " + log} },
	}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	links := func(spec Spec) string {
		if result, err := h.Run(t.Context(), spec); !errors.Is(err, ErrNoEnd) {
			t.Errorf("%+v, %v", result, err) // as above
		}
		text, err := os.ReadFile(log)
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	for _, tap := range []string{"bf-left", "bf-right"} {
		if got := links(Spec{Network: network}); !strings.Contains(got, tap) {
			t.Errorf("a guest of the network does not see %s: %s", tap, got)
		}
		if got := links(Spec{}); strings.Contains(got, tap) {
			t.Errorf("a guest without it sees %s: %s", tap, got)
		}
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
