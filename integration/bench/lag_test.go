package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"slices"
	"testing"
	"time"
)

// A write is late from when it is durable until a cut that holds it is
// committed, and a cut holds what was durable before it.
func TestLagByCuts(t *testing.T) {
	began := time.Now()
	at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	records := []record{{number: 1, durable: at(100)}, {number: 2, durable: at(250), last: 2, before: lagPage}, {number: 3, durable: at(450), before: 4 * lagPage}}
	commits := []committedCut{{at(200), at(500)}, {at(400), at(600)}}
	s := lagByCuts(records, commits, began, at(1000))
	want := []float64{0, 0, .1, .2, .3, .25, .15, .25, .35, .45} // at 0, 100, …
	behind := []float64{0, 0, 1, 4, 4, 4, 1, 1, 1, 1}            // pages
	if len(s.lag) != len(want) || len(s.behind) != len(behind) {
		t.Fatalf("%d samples, want %d", len(s.lag), len(want))
	}
	for i, lag := range s.lag {
		if diff := lag - want[i]; diff < -0.001 || diff > 0.001 {
			t.Errorf("after %d ms: %.3f, want %.3f", 100*i, lag, want[i])
		}
		if s.behind[i] != behind[i]*lagPage {
			t.Errorf("after %d ms: %v bytes, want %v pages", 100*i, s.behind[i], behind[i])
		}
	}
	if p := s.windows(2); len(p) != 2 || p[0] < .25 || p[0] > .3 || p[1] < .4 {
		t.Errorf("windows: %v", p)
	}
	if p := s.perSecond(); len(p) != 1 || p[0] != .45 {
		t.Errorf("per second: %v", p)
	}
}

// A stretch in which an epoch was void is told from the others, none is left out.
func TestVoidEpochsApart(t *testing.T) {
	began := time.Now()
	at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	var s sampled
	for i := range 40 { // ten each
		s.add(at(100*i), time.Duration(1+i/10)*time.Second, 0)
	}
	for _, c := range []struct {
		void          []int // ms
		whole, voided []float64
	}{
		{nil, []float64{1, 2, 3, 4}, nil},
		{[]int{1950, 1999}, []float64{1, 3, 4}, []float64{2}},
		{[]int{2000}, []float64{1, 2, 4}, []float64{3}},
		{[]int{-5, 4200}, []float64{2, 3}, []float64{1, 4}}, // while it began, and after the last sample
		{[]int{0, 1000, 2000, 3000}, nil, []float64{1, 2, 3, 4}},
	} {
		var void []voidEpoch
		for _, ms := range c.void {
			void = append(void, voidEpoch{At: at(ms)})
		}
		if whole, voided := s.apart(4, void); !slices.Equal(whole, c.whole) || !slices.Equal(voided, c.voided) {
			t.Errorf("void at %v ms: %v and apart %v, want %v and %v", c.void, whole, voided, c.whole, c.voided)
		}
	}
}

// What an agent's log says of cuts, commits and void epochs.
func TestCommitsOfLog(t *testing.T) {
	var s stand
	began := time.Now().Truncate(time.Second).UTC()
	say := func(ms int, rest string) {
		fmt.Fprintf(&s.log, `{"time":%q,"msg":%s}`+"\n", began.Add(time.Duration(ms)*time.Millisecond).Format(time.RFC3339Nano), rest)
	}
	say(100, `"cut","epoch":6,"stalled":10000000`)
	say(150, `"epoch committed","stats":{"epoch":6}`)
	say(200, `"cut","epoch":7,"stalled":20000000`)
	from := s.log.Len()
	say(300, `"epoch committed","stats":{"epoch":7}`)
	say(400, `"cut failed; its epoch is void","epoch":8,"error":"written to"`)
	say(500, `"cut","epoch":9,"stalled":0`)
	say(600, `"epoch void; it is sent again","epoch":9,"error":"can't be read"`)
	commits, void, err := s.commits(from)
	at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	if err != nil || len(commits) != 1 || !commits[0].cut.Equal(at(180)) || !commits[0].committed.Equal(at(300)) {
		t.Errorf("commits %v, %v", commits, err)
	}
	if len(void) != 2 || void[0].Epoch != 8 || !void[0].At.Equal(at(400)) || void[1].Epoch != 9 || void[1].Why != "can't be read" {
		t.Errorf("void: %+v", void)
	}
	say(700, `"epoch committed","stats":{"epoch":10}`)
	if _, _, err := s.commits(from); err == nil {
		t.Error("a commit without its cut has a time")
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

// The highest load is found from above and from below, also where writers are what
// can't.
func TestHighest(t *testing.T) {
	for _, c := range []struct {
		start, writers, replica, best, over float64
		tries                               int
	}{
		{100, 1000, 170, 156.25, 195.3125, 4},
		{100, 170, 1000, 156.25, 195.3125, 4},
		{100, 1000, 70, 64, 80, 3},
		{100, 1000, 100, 100, 125, 2},
		{1, 1e6, 1e6, 4.76837158203125, 0, sustainedTries}, // not any further
		{100, 1e6, 1, 0, 20.97152, sustainedTries},         // nothing near it
	} {
		tries := 0
		best, over, err := highest(c.start, func(wanted float64) (tried, error) {
			tries++
			return tried{Wanted: wanted, Wrote: min(wanted, c.writers), Growing: wanted > c.replica}, nil
		})
		if (err != nil) != (c.best == 0) || best.Wanted != c.best || math.Abs(over.Wanted-c.over) > 1e-9 || tries != c.tries {
			t.Errorf("%+v: %v, above it %v, after %d tries, %v", c, best.Wanted, over.Wanted, tries, err)
		}
	}
}

// Writers keep to their rate together, and remember writes in the order in which they
// became durable.
func TestNumberedWrites(t *testing.T) {
	n := &numbered{dir: t.TempDir(), pages: 256}
	if err := n.prepare(); err != nil {
		t.Fatal(err)
	}
	const rate = 8 << 20
	began := time.Now()
	if err := n.write(t.Context(), 300*time.Millisecond, rate); err != nil {
		t.Fatal(err)
	}
	if least := time.Duration(float64(n.bytes-lagFiles*lagBatch*lagPage) / rate * float64(time.Second)); time.Since(began) < least {
		t.Errorf("%d bytes in %v", n.bytes, time.Since(began))
	}
	files, bytes := map[int]int{}, int64(0)
	for i, r := range n.records {
		files[r.file]++
		if i > 0 && r.durable.Before(n.records[i-1].durable) || r.before != bytes {
			t.Fatalf("record %d: %+v after %d bytes and %+v", i, r, bytes, n.records[max(i, 1)-1])
		}
		bytes += r.bytes()
	}
	if len(files) != lagFiles || bytes != n.bytes {
		t.Errorf("%d bytes of %d are of records, in files %v", bytes, n.bytes, files)
	}
}

// A target holds a write when all of it is there, or something later is in
// its place; a file that was replaced is looked at anew.
func TestLagOfTarget(t *testing.T) {
	n, to := &numbered{dir: t.TempDir(), pages: 256, mixed: true}, &target{dir: t.TempDir()}
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
		lag, _, err := to.lag(n)
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
	if _, behind, err := to.lag(n); err != nil || behind != n.bytes {
		t.Errorf("%d bytes behind with nothing copied (%v), %d were written", behind, err, n.bytes)
	}
	duplicate()
	if lag := lag(); lag != 0 || to.arrived != len(n.records) {
		t.Errorf("%v behind with all copied, %d of %d there", lag, to.arrived, len(n.records))
	}
	// All but one page of a write of several.
	write()
	last := n.records[len(n.records)-1]
	for last.first == last.last { // of 256 some are not
		n.records, n.bytes = n.records[:len(n.records)-1], last.before
		last = n.records[len(n.records)-1]
	}
	duplicate()
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
	if _, behind, err := to.lag(n); err != nil || behind != last.bytes() {
		t.Errorf("%d bytes behind with the last write missing (%v), it has %d", behind, err, last.bytes())
	}
	if lag := lag(); lag <= 0 || to.arrived != len(n.records)-1 {
		t.Errorf("%v behind with one page missing, %d of %d there", lag, to.arrived, len(n.records))
	}
}
