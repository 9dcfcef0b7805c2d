package load

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// The demo is only worth something if it can fail: each test damages an image
// that the judge had called good.

func TestJudgeFindsTheMoment(t *testing.T) {
	const s = time.Second
	l := &Ledger{keys: map[string][]version{
		"a": {{1 * s, 2 * s}, {5 * s, 6 * s}, {9 * s, Never}},
		"b": {{3 * s, 4 * s}, {7 * s, 8 * s}},
	}}
	for _, c := range []struct {
		name          string
		found         map[string]int
		after, before time.Duration
		torn          string
	}{
		{"all", map[string]int{"a": 3, "b": 2}, 9 * s, Never, ""},
		{"all that is durable", map[string]int{"a": 2, "b": 2}, 7 * s, Never, ""},
		{"in the middle", map[string]int{"a": 1, "b": 1}, 3 * s, 6 * s, ""},
		{"during a write", map[string]int{"a": 2, "b": 1}, 5 * s, 8 * s, ""},
		{"nothing", nil, 0, 2 * s, ""},
		{"a later write of another key", map[string]int{"a": 1, "b": 2}, 7 * s, 6 * s, "no single point"},
		{"one key lost", map[string]int{"a": 2}, 5 * s, 4 * s, "no single point"},
		{"from the future", map[string]int{"a": 4}, 0, Never, "only 3"},
	} {
		m, err := l.Judge(c.found)
		switch {
		case c.torn != "":
			if err == nil || !strings.Contains(err.Error(), c.torn) {
				t.Errorf("%s: %v, want %q", c.name, err, c.torn)
			}
		case err != nil:
			t.Errorf("%s: %v", c.name, err)
		case m.After != c.after || m.Before != c.before:
			t.Errorf("%s: between %v and %v, want %v and %v", c.name, m.After, m.Before, c.after, c.before)
		}
	}
}

// loaded runs the demo's writers on an ordinary folder until there is enough of
// each of the kinds named, and of all.
func loaded(t *testing.T, kinds ...string) *Load {
	t.Helper()
	l := &Load{Dir: t.TempDir(), Ledger: NewLedger()}
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() { cancel(); _ = l.Wait() })
	if err := l.Start(ctx); err != nil {
		t.Fatal(err)
	}
	enough := func() bool {
		records, _ := l.Ledger.Totals()
		l.Ledger.mu.Lock()
		defer l.Ledger.mu.Unlock()
		for _, kind := range kinds {
			of := 0
			for key := range l.Ledger.keys {
				if strings.HasPrefix(key, kind) {
					of++
				}
			}
			if of < 20 {
				return false
			}
		}
		return records >= 200
	}
	for !enough() {
		if l.Ledger.Now() > time.Minute {
			records, _ := l.Ledger.Totals()
			t.Fatalf("only %d writes", records)
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if err := l.Wait(); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *Load) verdict() error {
	found, err := ReadBack(l.Dir)
	if err != nil {
		return err
	}
	_, err = l.Ledger.Judge(found)
	return err
}

func TestDamageIsSeen(t *testing.T) {
	pages, log, files := "pages/2", segmentName(0, 0), "files/"
	l := loaded(t, pages+"#", log+"@", files)
	if err := l.verdict(); err != nil {
		t.Fatalf("an undamaged image: %v", err)
	}
	found, err := ReadBack(l.Dir)
	if err != nil {
		t.Fatal(err)
	}
	var last time.Duration // when the last write of all was issued
	for _, versions := range l.Ledger.keys {
		last = max(last, versions[len(versions)-1].issued)
	}
	// A key in the file that was written, and not by the last write of all: an image
	// without that is good.
	overwritten := func(prefix string) string {
		for _, key := range slices.Sorted(maps.Keys(found)) {
			if strings.HasPrefix(key, prefix) && found[key] >= 1 && l.Ledger.keys[key][0].committed < last {
				return key
			}
		}
		t.Fatalf("no %s was written", prefix)
		return ""
	}
	damage := func(name, file string, change func([]byte) []byte) {
		t.Helper()
		path := filepath.Join(l.Dir, file)
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, change(slices.Clone(before)), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := l.verdict(); err == nil {
			t.Errorf("%s was not seen", name)
		}
		if err := os.WriteFile(path, before, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	page := func(b []byte, key string) []byte {
		_, number, _ := strings.Cut(key, "#")
		at := 0
		for _, digit := range number {
			at = at*10 + int(digit-'0')
		}
		return b[at*pageBytes : (at+1)*pageBytes]
	}
	key := overwritten(pages + "#")
	damage("a torn page", pages, func(b []byte) []byte { clear(page(b, key)[2048:]); return b })
	damage("a lost page", pages, func(b []byte) []byte { clear(page(b, key)); return b })
	damage("a page from elsewhere", pages, func(b []byte) []byte {
		sealBlock(page(b, key), "another key", 1)
		return b
	})
	damage("a page from the future", pages, func(b []byte) []byte {
		sealBlock(page(b, key), key, found[key]+5)
		return b
	})
	damage("a damaged log", log, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	damage("a log cut short", log, func(b []byte) []byte { return b[:len(b)/2] })
	name := overwritten(files)
	damage("a torn file", name, func(b []byte) []byte { return b[:len(b)-8] })
	damage("an empty file", name, func(b []byte) []byte { return nil })
	if err := l.verdict(); err != nil {
		t.Errorf("after all was put back: %v", err)
	}
}

// A volume whose device vanished must not look as if all was well.
func TestWritersReportTheirFailure(t *testing.T) {
	l := &Load{Dir: t.TempDir(), Ledger: NewLedger()}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := l.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(l.Dir, "files")); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	for {
		l.mu.Lock()
		failed := l.failed
		l.mu.Unlock()
		if failed != nil {
			if !errors.Is(failed, os.ErrNotExist) {
				t.Error(failed)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no failure reported")
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	l.Wait()
}
