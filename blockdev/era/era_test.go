package era

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"blockferry/blockdev"
)

// mustEqual compares an answer with a set of data blocks, and its form with
// what is promised.
func mustEqual(t *testing.T, what string, got []blockdev.Extent, want []bool, blockSize int64) {
	t.Helper()
	if !slices.Equal(got, blockdev.Normalize(got)) {
		t.Fatalf("%s: extents are not ascending and disjoint: %v", what, got)
	}
	changed := make([]bool, len(want))
	for _, e := range got {
		if e.Offset%blockSize != 0 || e.Length%blockSize != 0 || e.End() > int64(len(want))*blockSize {
			t.Fatalf("%s: extent %v with data blocks of %d bytes", what, e, blockSize)
		}
		for b := e.Offset / blockSize; b < e.End()/blockSize; b++ {
			changed[b] = true
		}
	}
	for b := range want {
		if changed[b] != want[b] {
			t.Fatalf("%s: block %d changed: %v, want %v", what, b, changed[b], want[b])
		}
	}
}

func kernelImage(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open("testdata/" + name + ".img.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// writtenLog is, for each era, the data blocks written in it.
func writtenLog(t *testing.T, name string) map[uint32][]int64 {
	t.Helper()
	f, err := os.Open("testdata/" + name + ".written")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	log := map[uint32][]int64{}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var era uint32
		var block int64
		if _, err := fmt.Sscan(lines.Text(), &era, &block); err != nil {
			t.Fatal(err)
		}
		log[era] = append(log[era], block)
	}
	return log
}

// Promise 1, against what the kernel wrote: every write is in the answer, and
// since writes came one at a time, nothing else.
func TestKernelImages(t *testing.T) {
	for _, name := range []string{"small-in-use", "small-removed", "large-in-use"} {
		t.Run(name, func(t *testing.T) {
			r, log := bytes.NewReader(kernelImage(t, name)), writtenLog(t, name)
			super, err := ReadSuperblock(r, 0)
			if err != nil {
				t.Fatal(err)
			}
			if super.DataBlockSize != 64<<10 {
				t.Errorf("data blocks of %d bytes", super.DataBlockSize)
			}
			want := func(since, before uint32) []bool {
				changed := make([]bool, super.Blocks)
				for era, blocks := range log {
					for _, b := range blocks {
						changed[b] = changed[b] || since <= era && era < before
					}
				}
				return changed
			}
			for since := uint32(1); since <= super.CurrentEra; since++ {
				got, err := ChangedInactive(r, since)
				if err != nil {
					t.Fatal(err)
				}
				mustEqual(t, fmt.Sprintf("inactive, since %d", since), got, want(since, super.CurrentEra+1), super.DataBlockSize)
			}
			if super.MetadataSnapshot == 0 {
				if name != "small-removed" {
					t.Error("no metadata snapshot")
				}
				return
			}
			snap, err := ReadSuperblock(r, super.MetadataSnapshot)
			if err != nil {
				t.Fatal(err)
			}
			if snap.CurrentEra >= super.CurrentEra {
				t.Errorf("the snapshot is of era %d, the device in era %d", snap.CurrentEra, super.CurrentEra)
			}
			for since := uint32(1); since <= snap.CurrentEra; since++ {
				got, err := Changed(r, super.MetadataSnapshot, since)
				if err != nil {
					t.Fatal(err)
				}
				mustEqual(t, fmt.Sprintf("snapshot, since %d", since), got, want(since, snap.CurrentEra), super.DataBlockSize)
			}
		})
	}
}

// scattered is a set that differs for each seed, dense or thin.
func scattered(seed uint64, oneIn uint64) func(b uint32) bool {
	return func(b uint32) bool {
		x := (uint64(b)/3 + seed<<32 + 1) * 0x9e3779b97f4a7c15 // runs of three
		return (x^x>>29)%oneIn == 0
	}
}

func randomContent(rng *rand.Rand) content {
	c := content{blocks: rng.Uint32N(3000), era: 20 + rng.Uint32N(20), sectors: 128}
	if rng.IntN(4) == 0 {
		c.blocks = 33000 + rng.Uint32N(40000) // bitsets of several array blocks
	}
	era, thin := c.era, 1+rng.Uint64N(50)
	seed := rng.Uint64()
	c.digest = func(b uint32) uint32 {
		if scattered(seed, thin)(b) {
			return b % (era - 9)
		}
		return 0
	}
	for e := era - 9; e <= era; e++ {
		if rng.IntN(3) == 0 {
			// Some are from before the device was resized.
			bits := uint32(max(0, int(c.blocks)+rng.IntN(3)*(rng.IntN(201)-100)))
			c.sets = append(c.sets, set{e, bits, scattered(rng.Uint64(), 1+rng.Uint64N(50))})
		}
	}
	if n := len(c.sets); rng.IntN(2) == 0 && (n == 0 || c.sets[n-1].era < era) {
		c.current = &set{era, c.blocks, scattered(rng.Uint64(), 5)}
	}
	return c
}

func TestSyntheticImages(t *testing.T) {
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 1))
		c := randomContent(rng)
		order := rng
		if seed%2 == 0 {
			order = nil
		}
		im := newImage(700, order)
		im.fanout = []int{0, 2, 3, 10}[rng.IntN(4)]
		snapBlock, _ := im.alloc(super)
		for _, at := range []uint64{0, snapBlock} {
			im.write(c, at)
		}
		for _, since := range []uint32{0, 1, c.era - 10, c.era - 9, c.era - 8, c.era - 3, c.era} {
			what := fmt.Sprintf("seed %d, since %d", seed, since)
			got, err := ChangedInactive(im.reader(), since)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			mustEqual(t, what+", inactive", got, c.want(since, true), 64<<10)
			got, err = Changed(im.reader(), snapBlock, since)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			mustEqual(t, what+", snapshot", got, c.want(since, false), 64<<10)
		}
		if got, err := ChangedInactive(im.reader(), c.era+1); !errors.Is(err, ErrUnknown) {
			t.Fatalf("seed %d: since an era to come: %v, %v; want ErrUnknown", seed, got, err)
		}
	}
}

func TestChangedWantsSnapshot(t *testing.T) {
	if _, err := Changed(bytes.NewReader(kernelImage(t, "small-in-use")), 0, 1); !errors.Is(err, ErrUnknown) {
		t.Errorf("Changed of block 0: %v, want ErrUnknown", err)
	}
}
