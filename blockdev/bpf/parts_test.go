package bpf

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev"
)

// fakeDisk shows statistics as a disk does; nothing else can hold a request
// between the count and the statistics for as long as a test needs.
type fakeDisk struct {
	t      *testing.T
	dir    string
	counts []uint64
	*ledger
}

func newFakeDisk(t *testing.T) *fakeDisk {
	d := &fakeDisk{t: t, dir: t.TempDir(), counts: make([]uint64, 2*slotWords)}
	d.shows(0, 0)
	if err := os.Mkdir(filepath.Join(d.dir, "queue"), 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(d.dir, "queue/iostats"), "1\n")
	put(t, filepath.Join(d.dir, "inflight"), "       3        0\n")
	var err error
	if d.ledger, err = openLedger(d.dir, d.counts, true); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.close)
	return d
}

// after does something before a later look.
func (d *fakeDisk) after(looks int, do func()) {
	d.look = func() {
		if looks--; looks == 0 {
			do()
		}
	}
}

// shows writes it in place and at once, as a file of sysfs changes.
func (d *fakeDisk) shows(written, discarded uint64) {
	d.t.Helper()
	f, err := os.OpenFile(filepath.Join(d.dir, "stat"), os.O_WRONLY|os.O_CREATE, 0o600)
	if err == nil {
		_, err = fmt.Fprintf(f, "%8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d %8d\n", 1, 2, 3, 4, 5, 6, written, 8, 9, 10, 11, 12, 13, discarded, 15)
		f.Close()
	}
	if err != nil {
		d.t.Error(err)
	}
}

func TestLedger(t *testing.T) {
	d := newFakeDisk(t)
	d.counts[slotEnded], d.counts[slotWords+slotEnded], d.counts[slotEnded+1] = 100, 50, 7
	d.shows(1150, 8)
	begin, err := d.begin()
	if err != nil || begin != (sectors{1000, 1}) {
		t.Fatalf("begins with a lead of %+v, %v", begin, err)
	}
	if why := d.agree(begin); why != "" {
		t.Errorf("nothing happened: %s", why)
	}
	for what, c := range map[string]struct {
		written, discarded uint64
		patient            bool // waits for what is in between
		says               string
	}{
		"a write that was not seen":                       {1151, 8, false, "by 512 bytes written and 0 discarded"},
		"a discard that was not seen":                     {1150, 9, false, "by 0 bytes written and 512 discarded"},
		"a write the statistics leave out":                {1149, 8, true, "by -512 bytes"},
		"one not seen, and a discard that they leave out": {1151, 7, false, "by 512 bytes written and -512 discarded"},
	} {
		d.shows(c.written, c.discarded)
		start := time.Now()
		if why := d.agree(begin); !strings.Contains(why, c.says) {
			t.Errorf("%s: %q, want %q", what, why, c.says)
		}
		if waited := time.Since(start) >= agreePatience; waited != c.patient && c.patient {
			t.Errorf("%s: it did not wait", what)
		}
	}
	// A request that was counted reaches the statistics in time.
	d.shows(1150, 8)
	d.counts[slotEnded] += 8
	d.after(3, func() { d.shows(1158, 8) })
	if why := d.agree(begin); why != "" {
		t.Errorf("a request in between: %s", why)
	}
	// One in between does not hide a loss of the same size.
	d.counts[slotEnded] += 8
	d.shows(1158+8, 8)
	d.after(3, func() { d.shows(1158+16, 8) })
	if why := d.agree(begin); !strings.Contains(why, "by 4096 bytes written") {
		t.Errorf("a loss, and a request in between: %q", why)
	}
}

// With writers stopped both sides are compared exactly; other users of the disk
// are waited for, and what is in between of theirs never passes for all right.
func TestLedgerStopped(t *testing.T) {
	d := newFakeDisk(t)
	given := leads{{1000, 0}, {1000, 0}}
	reset := func(written, ended, begun uint64) {
		d.look = nil
		clear(d.counts)
		d.counts[slotEnded], d.counts[slotBegun] = ended, begun
		d.shows(written, 0)
	}
	both := [sides]bool{true, true}
	check := func(what string, want [sides]bool, lead leads, known [sides]bool) {
		t.Helper()
		now, ok, agrees, err := d.leadsStopped(given)
		if err != nil || agrees != want || ok != known || known[ended] && now[ended] != lead[ended] || known[begun] && now[begun] != lead[begun] {
			t.Errorf("%s: agrees %v, leads %v known %v, %v; want %v, %v, %v", what, agrees, now, ok, err, want, lead, known)
		}
	}
	reset(1100, 100, 100)
	check("nothing is lost", both, given, both)
	reset(1100, 92, 100)
	check("a completion was lost", [sides]bool{false, true}, leads{{1008, 0}, {1000, 0}}, both)
	reset(1100, 100, 92)
	check("a begin was lost", [sides]bool{true, false}, leads{{1000, 0}, {1008, 0}}, both)
	reset(1100, 92, 92)
	check("both were lost", [sides]bool{}, leads{{1008, 0}, {1008, 0}}, both)
	reset(1092, 100, 100)
	check("the statistics left one out", [sides]bool{}, leads{{992, 0}, {992, 0}}, both)
	reset(1100, 100, 164)
	check("another user's write has begun", [sides]bool{true, false}, leads{{1000, 0}, {936, 0}}, both)
	reset(1100, 100, 116)
	d.counts[slotEnded] = 100
	d.after(4, func() { d.shows(1108, 0) })
	check("a completion was lost, and another user's hides it at first", [sides]bool{}, leads{{1008, 0}, {992, 0}}, both)
	reset(1100, 100, 100)
	d.look = func() { d.shows(1100, 0); put(t, filepath.Join(d.dir, "inflight"), "0 7\n") }
	check("another user's write is in flight", [sides]bool{true, false}, given, [sides]bool{true, false})

	d.requests = false
	reset(1100, 100, 100)
	check("of bios: something is in flight", [sides]bool{}, leads{}, [sides]bool{})
	d.patience = time.Hour
	d.after(30*fewestLooks, func() { put(t, filepath.Join(d.dir, "inflight"), "12 0\n") })
	check("of bios: something is in flight at first, reads do not count", both, given, both)
	reset(1108, 100, 100)
	d.after(4, func() { d.counts[slotEnded], d.counts[slotBegun] = 108, 108 })
	check("of bios: another user's has ended and is not counted yet", [sides]bool{true, false}, leads{{1000, 0}, {1008, 0}}, both)
}

// A request between count and statistics at the begin does not make a loss
// later.
func TestLedgerBegin(t *testing.T) {
	d := newFakeDisk(t)
	d.shows(1000, 0)
	d.counts[slotEnded] = 8
	d.after(3, func() {
		d.shows(1008, 0)
		d.after(3, func() { d.shows(1007, 0) }) // the next one
	})
	if begin, err := d.begin(); err != nil || begin.written != 1000 {
		t.Errorf("begins with a lead of %+v, %v", begin, err)
	}
}

func TestLedgerNeedsStatistics(t *testing.T) {
	d := newFakeDisk(t)
	put(t, filepath.Join(d.dir, "queue/iostats"), "0\n")
	if err := d.kept(); err == nil || !strings.Contains(err.Error(), "queue/iostats") {
		t.Errorf("switched off: %v", err)
	}
	if err := os.WriteFile(filepath.Join(d.dir, "stat"), []byte("1 2 3 4 5 6 7 8 9 10 11\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if why := d.agree(sectors{}); !strings.Contains(why, "less than 14 fields") {
		t.Errorf("an old kernel's statistics: %q", why)
	}
}

func TestSetsAgainstMaps(t *testing.T) {
	for seed := range uint64(2000) {
		rng := rand.New(rand.NewPCG(seed, 8))
		random := func() (s []entry, bits map[int64]bool) {
			bits = map[int64]bool{}
			for range rng.IntN(6) {
				e := entry{uint32(rng.IntN(5)), rng.Uint64() & rng.Uint64()}
				if rng.IntN(4) == 0 {
					e.word = ^uint64(0)
				}
				s = append(s, e)
				for b := range int64(64) {
					if e.word>>b&1 != 0 {
						bits[int64(e.index)*64+b] = true
					}
				}
			}
			return s, bits
		}
		a, both := random()
		b, more := random()
		for bit := range more {
			both[bit] = true
		}
		length := rng.Int64N(330) * 4096
		x := extents{grain: 4096, length: length - 512}
		s := union(normal(a), normal(b))
		for _, e := range s {
			x.add(e.index, e.word)
			if s.word(e.index) != e.word {
				t.Fatalf("seed %d: word %d is %x", seed, e.index, s.word(e.index))
			}
		}
		for i, e := range x.list {
			if e.End() > x.length || i > 0 && e.Offset <= x.list[i-1].End() {
				t.Fatalf("seed %d: %v within %d", seed, x.list, x.length)
			}
		}
		got := grainsOf(x.list)
		for bit := range int64(64 * 6) {
			if want := both[bit] && bit*4096 < x.length; got[bit] != want {
				t.Fatalf("seed %d: block %d is named: %v", seed, bit, got[bit])
			}
		}
	}
}

func TestGrainBoundsMemory(t *testing.T) {
	for _, c := range []struct{ length, want int64 }{
		{4096, 4096}, {4 << 40, 4096}, {4<<40 + 4096, 8192}, {16 << 40, 16384},
	} {
		if got := grainOf(c.length); got != c.want {
			t.Errorf("%d bytes in grains of %d, want %d", c.length, got, c.want)
		}
	}
}

// A volume with larger grains names whole ones.
func TestLargerGrain(t *testing.T) {
	x := extents{grain: 8192, length: 5 * 4096}
	x.add(0, 0b110)
	if len(x.list) != 1 || x.list[0] != (blockdev.Extent{Offset: 8192, Length: 3 * 4096}) {
		t.Errorf("%v", x.list)
	}
}
