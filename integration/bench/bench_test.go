package main

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"blockferry/integration/uml"
)

func TestMain(m *testing.M) {
	uml.Init()
	if uml.Inside() || os.Getenv(roomVar) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// One figure from end to end, as short as can be, so that the benchmarks go on
// working; what it measures means nothing.
func TestBenchRuns(t *testing.T) {
	once = true
	r, err := run(t.Context(), figures[figureIndex("cut-stall")], true)
	if errors.Is(err, uml.ErrNoGuest) && os.Getenv("BLOCKFERRY_REQUIRE_GUEST") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]row{}
	for _, row := range r.Rows {
		rows[row.Name] = row
	}
	for _, name := range []string{"idle/cut-p50", "idle/release-p99", "load/both-p99", "outside/longest-write"} {
		if got := rows[name].Values; len(got) != 1 || got[0] <= 0 {
			t.Errorf("%s: %v", name, got)
		}
	}
	if cut, both := rows["load/cut-p50"].Median, rows["load/both-p50"].Median; both < cut {
		t.Errorf("all stops together %v ms, one of them %v", both, cut)
	}
	dir := t.TempDir()
	for range 2 { // the second takes the first's place
		if err := keep(t.Context(), dir, r); err != nil {
			t.Fatal(err)
		}
	}
	var kept report
	text, err := os.ReadFile(filepath.Join(dir, reportJSON))
	if err == nil {
		err = json.Unmarshal(text, &kept)
	}
	if err != nil || len(kept.Figures) != 1 || len(kept.Figures[0].Rows) != len(r.Rows) {
		t.Errorf("kept %+v, %v", kept, err)
	}
	page, err := os.ReadFile(filepath.Join(dir, reportPage))
	for _, want := range []string{"make bench FIGURE=cut-stall QUICK=1", "idle/cut-p50", r.Date, kept.Machine.CPU} {
		if err != nil || !strings.Contains(string(page), want) {
			t.Errorf("the page does not say %q (%v):\n%s", want, err, page)
		}
	}
}

// Likewise on this machine's kernel. Nothing is left of its disks, also when it
// is ended in the middle.
func TestBenchRunsNatively(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loop devices need root")
	}
	once = true
	f := figures[figureIndex("native-control")]
	left := func() (files []string) {
		paths, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, path := range paths {
			// A file without a name.
			if text, _ := os.ReadFile(path); strings.Contains(string(text), "/#") {
				files = append(files, path+": "+strings.TrimSpace(string(text)))
			}
		}
		return files
	}
	before := left()
	r, err := run(t.Context(), f, true)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Rows) != len(loads) || !r.Native || len(r.Rows[0].Theirs) != 1 {
		t.Errorf("measured %+v", r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := run(ctx, f, true)
		ended <- err
	}()
	for deadline := time.Now().Add(20 * time.Second); len(left()) < len(before)+len(f.disks); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("its loop devices did not appear")
		}
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("it was ended in the middle, and says it is done")
	}
	// The last to close a device detaches it a moment later.
	for deadline := time.Now().Add(5 * time.Second); !slices.Equal(left(), before); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("loop devices are left: %q, before there were %q", left(), before)
		}
	}
}

// The link of the figures over one has the delay and the rate that they name: more may be,
// on a busy machine, never less.
func TestBenchRunsOverALink(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip(err)
	}
	once = true
	r, err := run(t.Context(), figures[figureIndex("stream-over-5ms")], true)
	if err != nil {
		t.Fatal(err)
	}
	if trip, _ := r.Extra["round trip ms"].(float64); trip < 5 {
		t.Errorf("a round trip of %v ms", r.Extra["round trip ms"])
	}
	if len(r.Rows) != 4 {
		t.Fatalf("measured %+v", r.Rows)
	}
	for _, row := range r.Rows[2:] {
		for side, took := range map[string]float64{"ours": row.Ours[0], "plain TCP": row.Theirs[0]} {
			if least := float64(16<<20)/cappedRate - 0.02; took < least {
				t.Errorf("%s, %s: 16 MiB in %v s, on a link that takes %v s for them", row.Name, side, took, least)
			}
		}
	}
}

func TestRows(t *testing.T) {
	m := &measured{}
	m.add(row{Name: "rate", Ours: []float64{1, 2, 8}, Theirs: []float64{2, 2, 4}, Goal: &goal{AtLeast: 0.95}})
	m.add(row{Name: "time", Ours: []float64{1, 2, 8}, Theirs: []float64{3, 4, 4}, Inverse: true, Goal: &goal{AtLeast: 2.5}})
	m.add(row{Name: "alone", Unit: "ms", Ours: []float64{1, 2, 8, 9}, Goal: &goal{AtMost: 4}})
	for i, want := range []struct {
		median float64
		text   string
	}{
		{1, "rate: 1.00 (median of 3, from 0.500 to 2.00), wanted at least 0.950: "},
		{2, "time: 2.00 (median of 3, from 0.500 to 3.00), wanted at least 2.50, MISSED: "},
		{5, "alone: 5.00 ms (median of 4, from 1.00 to 9.00), wanted at most 4.00, MISSED: "},
	} {
		if r := m.Rows[i]; r.Median != want.median || r.String() != want.text {
			t.Errorf("median %v, '%s'; want %v, '%s'", r.Median, r.String(), want.median, want.text)
		}
	}
	if err := m.check(); err != nil {
		t.Error(err)
	}
	for _, bad := range []row{{Ours: []float64{1, 1, 1, 1}, Theirs: []float64{1, 1, 1, 0}}, {}, {Ours: []float64{math.NaN()}}, {Ours: []float64{-1}}} {
		n := &measured{}
		n.add(bad)
		if n.check() == nil {
			t.Errorf("%+v passed for a measurement", n.Rows)
		}
	}
}
