package main

import "testing"

// A page that is written twice in a run has changed once; what an earlier run wrote is not
// counted again.
func TestChanged(t *testing.T) {
	c := &changing{}
	c.records = []record{{file: 0, first: 3, last: 3}, {file: 0, first: 2, last: 4}, {file: 1, first: 3, last: 3}}
	if got := c.changed(); got != 4*lagPage {
		t.Errorf("%v bytes changed", got)
	}
	c.records = append(c.records, record{file: 0, first: 3, last: 4})
	if got := c.changed(); got != 2*lagPage {
		t.Errorf("%v bytes changed in the second run", got)
	}
}

// Rows are of either side per GiB, and blockferry's own stand beside the ratios.
func TestIncrementalRows(t *testing.T) {
	m := &measured{}
	m.addIncremental("x", "a load", []usage{{cpu: 2, own: 3, rss: 40}}, []usage{{cpu: 8, own: 4, rss: 10}})
	for name, want := range map[string]float64{"x/cpu": 0.25, "x/cpu-blockferry": 2, "x/own-cpu": 0.75, "x/own-cpu-blockferry": 3, "x/rss": 4, "x/rss-blockferry": 40} {
		if r := m.row(name); r == nil || r.Median != want {
			t.Errorf("%s: %+v, want %v", name, r, want)
		}
	}
	if len(m.Rows) != 6 {
		t.Errorf("%d rows", len(m.Rows))
	}
}
