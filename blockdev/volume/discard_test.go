package volume

import (
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
)

// Each marked block names the one behind it, once discards were let through.
func TestMarksNameTheBlockBehind(t *testing.T) {
	const b = 64 << 10
	l := &Label{EraBlockBytes: b}
	marks := []blockdev.Extent{{Offset: 0, Length: b}, {Offset: 2 * b, Length: 2 * b}, {Offset: 6 * b, Length: b}}
	if got := l.marked(marks); !reflect.DeepEqual(got, marks) {
		t.Errorf("without discards: %v", got)
	}
	l.Discards = true
	if got, want := l.marked(marks), []blockdev.Extent{{Offset: 0, Length: 5 * b}, {Offset: 6 * b, Length: 2 * b}}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if marks[0].Length != b || len(l.marked(nil)) != 0 {
		t.Error("what was asked about changed")
	}
}

// A queue that can't be told to split at most one era block off takes none.
func TestDiscardsThatCantBeSplitAreOff(t *testing.T) {
	for _, c := range []struct {
		limit, grain string
		off          string
	}{
		{"18446744073709551104\n", "4096\n", ""},
		{"512\n", "512\n", ""},
		{"4294966784\n", "65536\n", ""},
		{"4294966784\n", "1048576\n", "in pieces of 1048576 bytes"},
		{"4294966784\n", "24576\n", "in pieces of 24576 bytes"},
		{"512\n", "4096\n", "but at most 512"},
		{"0\n", "4096\n", "takes none"},
		{"4096\n", "0\n", "takes none"},
		{"4096\n", "", "no such file"},
		{"", "4096\n", "no such file"},
		{"many\n", "4096\n", "holds 'many'"},
	} {
		dir := t.TempDir()
		for name, text := range map[string]string{discardMax: c.limit, discardGrain: c.grain} {
			if text != "" {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}
		if got := discardsOff("disk", dir, discardMax, 64<<10); (got == "") != (c.off == "") || !strings.Contains(got, c.off) {
			t.Errorf("at most %q in pieces of %q: '%s', want '%s'", c.limit, c.grain, got, c.off)
		}
	}
}

// A label says that discards were let through, in a version that no earlier
// program reads; with watched places and without.
func TestLabelKeepsDiscards(t *testing.T) {
	d := blocktest.NewMemory(4 << 20)
	for _, places := range [][]WatchedPlace{nil, {{Offset: 64 << 10, Digest: [32]byte{31: 2}}}} {
		want := sampleLabel(t)
		want.Discards, want.Watch.Places = true, places
		b, err := want.encode()
		if err != nil || b[8] != 3 {
			t.Fatalf("version %d, %v", b[8], err)
		}
		if err := writeLabel(d, want); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadLabel(d); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
		// Neither without the other.
		for _, change := range []func(b []byte){func(b []byte) { b[8] = 2 }, func(b []byte) { b[120] &^= flagDiscards }} {
			b, err := want.encode()
			if err != nil {
				t.Fatal(err)
			}
			change(b)
			clear(b[16:20])
			le.PutUint32(b[16:], crc32.Checksum(b, castagnoli))
			if _, err := decodeLabel(b); !errors.Is(err, ErrBadLabel) {
				t.Errorf("flag and version disagree: %v", err)
			}
		}
	}
}
