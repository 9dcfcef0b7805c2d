package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// step is something that a client had done: when it began, and when it was told that it is
// durable, by the guest's clock.
type step struct{ Begun, Told time.Time }

// told is what each client was told, one step after the other. The client n's step at index i
// is the number i+1 of that client.
type told map[int][]step

// judge compares what came back with what was told: held are, for each client, how many of its
// first steps are there. All that was told before the cut has to be, and nothing that was begun after it.
func (c told) judge(t *testing.T, what string, held map[int]int, cut time.Time) {
	t.Helper()
	steps, before, kept := 0, 0, 0
	for client, list := range c {
		n := held[client]
		kept, steps = kept+n, steps+len(list)
		if n > len(list)+1 { // one may have been under way, of which nobody was told
			t.Errorf("%s: client %d was told of %d steps, and %d are there", what, client, len(list), n)
			continue
		}
		for i, s := range list {
			if s.Told.Before(cut) {
				before++
			}
			switch {
			case i >= n && s.Told.Before(cut):
				t.Errorf("%s: client %d was told of step %d %v before the cut, and it is lost", what, client, i+1, cut.Sub(s.Told))
			case i < n && s.Begun.After(cut.Add(time.Millisecond)): // to which the time of a cut is told
				t.Errorf("%s: client %d began step %d %v after the cut, and it is there", what, client, i+1, s.Begun.Sub(cut))
			}
		}
	}
	for client, n := range held {
		if _, known := c[client]; !known && n > 1 {
			t.Errorf("%s: client %d was told nothing, and %d steps are there", what, client, n)
		}
	}
	t.Logf("MEASURED %s: of %d that were told %d were so before the cut, %d came back", what, steps, before, kept)
	if before < 20 {
		t.Errorf("%s: %d were told before the cut: that is no load", what, before)
	}
}

// save and loadTold carry it over a boot.
func (c told) save(t *testing.T, path string) {
	t.Helper()
	text, err := json.Marshal(c)
	if err == nil {
		err = os.WriteFile(path, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func loadTold(t *testing.T, path string) (c told) {
	t.Helper()
	if err := json.Unmarshal([]byte(mustRead(t, path)), &c); err != nil {
		t.Fatal(err)
	}
	return c
}

// recordSize is that of a record of keepRecords.
const recordSize = 4096

// startRecords begins to append numbered records to a file, each made durable. What it returns stops
// that, and says what was told.
func startRecords(path string) (stop func() (told, error)) {
	end := make(chan struct{})
	type outcome struct {
		list []step
		err  error
	}
	ended := make(chan outcome, 1)
	go func() {
		list, err := keepRecords(path, end)
		ended <- outcome{list, err}
	}()
	return func() (told, error) {
		close(end)
		o := <-ended
		return told{0: o.list}, o.err
	}
}

// keepRecords appends numbered records to a file, each made durable, until it is stopped.
func keepRecords(path string, stop <-chan struct{}) (list []step, err error) {
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	for n := int64(0); ; n++ {
		select {
		case <-stop:
			return list, nil
		case <-time.After(10 * time.Millisecond): // the agent shares the CPU
		}
		record := make([]byte, recordSize)
		copy(record, fmt.Sprintf("record %d\n", n+1))
		begun := time.Now()
		if _, err := file.WriteAt(record, n*recordSize); err != nil {
			return list, err
		}
		if err := unix.Fdatasync(int(file.Fd())); err != nil {
			return list, err
		}
		list = append(list, step{begun, time.Now()})
	}
}

// recordsIn is how many whole records a file begins with.
func recordsIn(t *testing.T, path string) (n int) {
	t.Helper()
	content := []byte(mustRead(t, path))
	for ; len(content) >= recordSize; n++ {
		want := make([]byte, recordSize)
		copy(want, fmt.Sprintf("record %d\n", n+1))
		if string(want) != string(content[:recordSize]) {
			return n
		}
		content = content[recordSize:]
	}
	return n
}

var cutTime = regexp.MustCompile(`cut at (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} UTC)`)

// cutSaid is the time of the cut that a restore says it went back to, to the millisecond below.
func cutSaid(t *testing.T, outcome string) time.Time {
	t.Helper()
	match := cutTime.FindStringSubmatch(outcome)
	if match == nil {
		t.Fatalf("it does not say when what came back was cut: %s", outcome)
	}
	at, err := time.Parse("2006-01-02 15:04:05.000 MST", match[1])
	if err != nil {
		t.Fatal(err)
	}
	return at
}
