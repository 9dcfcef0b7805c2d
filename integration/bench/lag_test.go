package main

import (
	"context"
	"os"
	"testing"
	"time"
)

// A write is late from when it is durable until a cut that holds it is
// committed, and a cut holds what was durable before it.
func TestLagByCuts(t *testing.T) {
	began := time.Now()
	at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	records := []record{{number: 1, durable: at(100)}, {number: 2, durable: at(250)}, {number: 3, durable: at(450)}}
	commits := []committedCut{{at(200), at(500)}, {at(400), at(600)}}
	s := lagByCuts(records, commits, began, at(1000))
	want := []float64{0, 0, .1, .2, .3, .25, .15, .25, .35, .45} // at 0, 100, …
	if len(s.lag) != len(want) {
		t.Fatalf("%d samples, want %d", len(s.lag), len(want))
	}
	for i, lag := range s.lag {
		if diff := lag - want[i]; diff < -0.001 || diff > 0.001 {
			t.Errorf("after %d ms: %.3f, want %.3f", 100*i, lag, want[i])
		}
	}
	if p := s.windows(2); len(p) != 2 || p[0] < .25 || p[0] > .3 || p[1] < .4 {
		t.Errorf("windows: %v", p)
	}
	if p := s.perSecond(); len(p) != 1 || p[0] != .45 {
		t.Errorf("per second: %v", p)
	}
}

func TestGrowing(t *testing.T) {
	began := time.Now()
	at := func(s float64) time.Time { return began.Add(time.Duration(s * float64(time.Second))) }
	var steady, slower []committedCut
	for i := range 9 {
		steady = append(steady, committedCut{at(float64(i)), at(float64(i) + 1.2)})
		slower = append(slower, committedCut{at(float64(i)), at(float64(i) * 2)})
	}
	if growing(steady, began, at(10)) {
		t.Error("a replica that keeps up is said to fall behind")
	}
	if !growing(slower, began, at(10)) || !growing(nil, began, at(10)) {
		t.Error("a replica that falls behind is said to keep up")
	}
}

// A target holds a write when all of it is there, or something later is in
// its place; a file that was replaced is looked at anew.
func TestLagOfTarget(t *testing.T) {
	n, to := &numbered{dir: t.TempDir(), pages: 1024}, &target{dir: t.TempDir()}
	if err := n.prepare(); err != nil {
		t.Fatal(err)
	}
	duplicate := func() {
		t.Helper()
		for i := range lagFiles {
			content, err := os.ReadFile(lagFile(n.dir, i))
			if err == nil {
				err = os.WriteFile(lagFile(to.dir, i)+".new", content, 0o600)
			}
			if err == nil {
				err = os.Rename(lagFile(to.dir, i)+".new", lagFile(to.dir, i))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	lag := func() time.Duration {
		t.Helper()
		lag, err := to.lag(n)
		if err != nil {
			t.Fatal(err)
		}
		return lag
	}
	write := func() {
		t.Helper()
		if err := n.write(context.Background(), 50*time.Millisecond, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	duplicate()
	if lag := lag(); lag != 0 {
		t.Errorf("%v behind before any write", lag)
	}
	write()
	if lag := lag(); lag <= 0 || lag > 10*time.Second {
		t.Errorf("%v behind with nothing copied", lag)
	}
	duplicate()
	if lag := lag(); lag != 0 || to.arrived != len(n.records) {
		t.Errorf("%v behind with all copied, %d of %d there", lag, to.arrived, len(n.records))
	}
	// All but one page of a write of several.
	write()
	for n.records[len(n.records)-1].first == n.records[len(n.records)-1].last {
		write()
	}
	duplicate()
	last := n.records[len(n.records)-1]
	file, err := os.OpenFile(lagFile(to.dir, last.file), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	old := make([]byte, lagHead)
	sealPage(old, last.number-1)
	if _, err := file.WriteAt(old, int64(last.last)*lagPage); err != nil {
		t.Fatal(err)
	}
	if lag := lag(); lag <= 0 || to.arrived != len(n.records)-1 {
		t.Errorf("%v behind with one page missing, %d of %d there", lag, to.arrived, len(n.records))
	}
}
