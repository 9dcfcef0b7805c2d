package vm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Guests of one CPU are spread over the machine's; others run on all of them.
func TestGuestsAreKeptOnOneCPU(t *testing.T) {
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		t.Fatal(err)
	}
	for _, oneCPU := range []bool{true, false} {
		dir, guests := t.TempDir(), 2*may.Count()
		h, err := NewHost(Machine{
			OneCPU: oneCPU, Shared: func(Guest) Mount { return Mount{} },
			Command: func(g Guest) []string { // it says where it may run, and ends when all have
				script := `[ -e $1 ] || grep Cpus_allowed_list /proc/self/status >$1; until [ $(ls $2 | wc -l) = $3 ]; do sleep 0.01; done`
				return []string{"/bin/sh", "-c", script, "guest", filepath.Join(dir, g.Spec.Name), dir, fmt.Sprint(guests)}
			},
		}, guests, nil)
		if err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for n := range guests {
			all.Go(func() {
				if result, err := h.Run(t.Context(), Spec{Name: fmt.Sprint(n)}); !errors.Is(err, ErrNoEnd) {
					t.Errorf("%+v, %v", result, err) // what runs here is no guest, so it leaves no end mark
				}
			})
		}
		all.Wait()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
		places := map[string]int{}
		for n := range guests {
			text, err := os.ReadFile(filepath.Join(dir, fmt.Sprint(n)))
			if err != nil {
				t.Error(err)
			}
			places[string(text)]++
		}
		want := 1
		if oneCPU {
			want = may.Count()
		}
		if len(places) != want || len(cpus.guests) != may.Count() {
			t.Errorf("one CPU: %v; %d guests on %v, of which are left %v", oneCPU, guests, places, cpus.guests)
		}
		for place, n := range places {
			if n != guests/want {
				t.Errorf("%d guests of %d on %s", n, guests, place)
			}
		}
	}
	for cpu, n := range cpus.guests {
		if n != 0 {
			t.Errorf("%d guests count on CPU %d after their end", n, cpu)
		}
	}
}
