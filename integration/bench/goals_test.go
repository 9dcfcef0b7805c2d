package main

import (
	"path"
	"strings"
	"testing"
)

func TestGoals(t *testing.T) {
	for _, c := range []struct{ figure, row, want string }{
		{"first-sync-vs-dd", "memory-disks", "at least 0.850"},
		{"first-sync-vs-dd", "memory-disks-whole", ""},
		{"tracked-vs-raw", "4k-fdatasync", "at least 0.900"},
		{"tracked-vs-raw-debian", "4k-qd16", "at least 0.950"},
		{"cut-stall", "load/both-p99", "at most 20.0"},
		{"cut-stall", "load/both-p50", ""},
		{"cut-stall-debian", "pre-copy/idle/both-p99", "at most 20.0"},
		{"sent-per-changed", "4MiB/sent", "at most 1.10"},
		{"sent-per-changed", "4MiB/read-from-ssd", ""},
		{"attach-cut-stall", "xfs-direct", "at most 1.30"},
		{"attach-cut-stall", "xfs-direct/own-stop", ""},
		{"attach-vs-raw-randwrite", "tracking/4k-fdatasync", "at least 0.900"},
		{"attach-vs-raw-randwrite", "tracking/4k-qd1", "at least 0.950"},
		{"lag-natively-4k", "blockferry-p99", "at most 2.00"},
		{"lag-natively-4k", "lsyncd-p99", ""},
		{"tracked-vs-drbd-a-debian", "4k-qd1/pre-copy-over-drbd-a", "at least 1.00"},
		{"tracked-vs-drbd-a-debian", "4k-qd1/pre-copy-over-raw", ""},
		{"tracked-vs-drbd-a", "tracking/4k-fdatasync-over-drbd-a", "at least 1.00"},
		{"tracked-vs-drbd-a-debian", "tracking/4k-qd1-over-drbd-alone", "at least 1.00"},
		{"tracked-vs-drbd-a", "tracking/4k-qd1-over-raw", ""},
		{"tracked-vs-drbd-a", "half-4k-qd1/snapshot-over-drbd-a-p50", "at most 1.00"},
		{"tracked-vs-drbd-a-debian", "half-4k-qd16/pre-copy-over-drbd-a-p99", "at most 1.00"},
		{"tracked-vs-drbd-a", "half-4k-qd1/snapshot-p50", ""},
		{"tracked-vs-drbd-a", "half-4k-qd1/snapshot-rate", ""},
		{"primary-to-first-write", "forced/pending", "at most 2.00"},
		{"primary-to-first-write", "forced/pending/journal", ""},
	} {
		if got := goalOf(c.figure, c.row).String(); got != c.want {
			t.Errorf("%s/%s: wanted '%s', is '%s'", c.figure, c.row, c.want, got)
		}
	}
	// A figure that is called otherwise by now would lose its goals, or reasons, in silence.
	some := func(fits func(figure string) bool) bool {
		for _, f := range figures {
			if fits(f.name) {
				return true
			}
		}
		return false
	}
	for _, g := range goals {
		name, _, _ := strings.Cut(g.rows, "/")
		if !some(func(figure string) bool { fits, err := path.Match(name, figure); return err == nil && fits }) {
			t.Errorf("%s: no figure is called so", g.rows)
		}
	}
	for _, r := range reasons {
		name, _, _ := strings.Cut(r.prefix, "/")
		if !some(func(figure string) bool { return strings.HasPrefix(figure, name) }) {
			t.Errorf("%s: no figure is called so", r.prefix)
		}
	}
}

// The page says what is wanted now of what was measured before, and why what falls
// short does.
func TestPageHoldsToGoals(t *testing.T) {
	r := report{Figures: []result{{Figure: "first-sync-vs-dd", About: "x", Rows: []row{
		{Name: "memory-disks", Ours: []float64{6}, Theirs: []float64{10}, Values: []float64{0.6}, Median: 0.6, Goal: &goal{AtLeast: 0.6}},
	}}}}
	page := r.page()
	for _, want := range []string{"| at least 0.850 | missed |", "- first-sync-vs-dd, memory-disks: 0.600, wanted at least 0.850. " + why("first-sync-vs-dd", "memory-disks")} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q:\n%s", want, page)
		}
	}
}

// The page says of a latency that its load was not reached, and how many cuts a percentile
// is of.
func TestPageSaysWhatRowsAreOf(t *testing.T) {
	one := func(name string, median float64) row {
		return row{Name: name, Values: []float64{median}, Median: median}
	}
	r := report{Figures: []result{
		{Figure: "latency", About: "x", Rows: []row{one("half-p50", 3), one("half-rate", 0.2), one("tenth-p99", 4), one("tenth-rate", 0.97), one("other-p50", 5)}},
		{Figure: "tracked-vs-drbd-a", About: "x", Rows: []row{one("half/a-p50", 3), one("half/a-rate", 0.2), one("half/b-p50", 3), one("half/b-rate", 0.5), one("half/a-over-b-p50", 6),
			one("tenth/a-rate", 0.99), one("tenth/b-rate", 0.3), one("tenth/a-over-b-p99", 7), one("slow/a-rate", 0.96), one("slow/b-rate", 1), one("slow/a-over-b-p99", 8)}},
		{Figure: "cut-stall", About: "x", Rows: []row{one("load/both-p99", 15)}, Extra: map[string]any{"load-cuts-per-run": []int{6, 8}, "other": []int{9}}},
	}}
	page := r.page()
	for _, want := range []string{
		"| half-p50: ; NOT AT THAT RATE: the writer reached 0.200 of what the bare one did | 3.00 |", "| tenth-p99:  | 4.00 |", "| other-p50:  | 5.00 |",
		"| half/b-p50: ; NOT AT THAT RATE: the writer reached 0.500 of what the bare one did | 3.00 |",
		"| half/a-over-b-p50: ; NOT AT THAT RATE: a reached 0.200 of what the bare one did, b reached 0.500 of what the bare one did | 6.00 |",
		"| tenth/a-over-b-p99: ; NOT AT THAT RATE: b reached 0.300 of what the bare one did | 7.00 |", "| slow/a-over-b-p99:  | 8.00 |",
		"\nCuts in each run: load 6 8. Of fewer",
	} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q:\n%s", want, page)
		}
	}
}

// Own stop and its parts are those of one stop.
func TestLongestStop(t *testing.T) {
	got := longestStop([]entry{{Drain: 1, Inside: 2, Resume: 3}, {Drain: 6, Inside: 0.5, Resume: 0.5}, {Drain: 2}})
	if got.Drain != 6 || got.stopped() != 7 {
		t.Errorf("the longest is %+v", got)
	}
}
