package era

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"blockferry/blockdev"
)

// damageable is an image with trees of two levels, an undigested writeset and
// a current one, and where its parts stand.
type damageable struct {
	*image
	content
	eraRoot, eraLeaf, eraBlock, setRoot, bitsRoot, bitsBlock uint64
}

func newDamageable() damageable {
	d := damageable{image: newImage(40, nil)}
	d.fanout = 2
	d.content = content{
		blocks: 5000, era: 9, sectors: 128,
		digest:  func(b uint32) uint32 { return b % 8 },
		sets:    []set{{8, 5000, scattered(1, 9)}},
		current: &set{9, 5000, scattered(2, 9)},
	}
	d.write(d.content, 0)
	d.eraRoot = le64(d.block(0), 208)
	d.eraLeaf = d.child(d.child(d.eraRoot, 0), 0)
	d.eraBlock = d.child(d.eraLeaf, 0)
	d.setRoot = le64(d.block(0), 200)
	d.bitsRoot = le64(d.block(d.setRoot), 32+8*201+4)
	d.bitsBlock = d.child(d.bitsRoot, 0)
	return d
}

// child is the i-th value of a node that holds block numbers.
func (d damageable) child(n uint64, i int) uint64 { return le64(d.block(n), 32+8*252+8*i) }

func (d damageable) setChild(n uint64, i int, to uint64) { put64(d.block(n), 32+8*252+8*i, to) }

// Promise 1: whatever is wrong with the metadata, there is no answer.
func TestDamageIsUnknown(t *testing.T) {
	for name, damage := range map[string]struct {
		says string
		do   func(d damageable) (block uint64)
	}{
		"magic":                  {"magic", func(d damageable) uint64 { put64(d.block(0), 32, 7); return 0 }},
		"version":                {"version 2", func(d damageable) uint64 { put32(d.block(0), 40, 2); return 0 }},
		"superblock elsewhere":   {"says it is block 3", func(d damageable) uint64 { put64(d.block(0), 8, 3); return 0 }},
		"data block size 0":      {"0 sectors", func(d damageable) uint64 { put32(d.block(0), 172, 0); return 0 }},
		"data block size odd":    {"9 sectors", func(d damageable) uint64 { put32(d.block(0), 172, 9); return 0 }},
		"data blocks huge":       {"no device is that large", func(d damageable) uint64 { put32(d.block(0), 172, 1<<32-8); put32(d.block(0), 180, 1<<32-1); return 0 }},
		"metadata block size":    {"metadata blocks of 16", func(d damageable) uint64 { put32(d.block(0), 176, 16); return 0 }},
		"more blocks than array": {"ends after 5 of 4219025", func(d damageable) uint64 { put32(d.block(0), 180, 1<<32-2); return 0 }},
		"fewer blocks than array": {"where", func(d damageable) uint64 {
			put32(d.block(0), 180, 1018)
			return 0
		}},
		"one block more":        {"928 values, want 929", func(d damageable) uint64 { put32(d.block(0), 180, 5001); return 0 }},
		"one block less":        {"928 values, want 927", func(d damageable) uint64 { put32(d.block(0), 180, 4999); return 0 }},
		"current era too small": {"it is only era 6", func(d damageable) uint64 { put32(d.block(0), 184, 6); return 0 }},
		"writeset of era to come": {"a writeset of era 10", func(d damageable) uint64 {
			put64(d.block(d.setRoot), 32, 10)
			return d.setRoot
		}},
		"array root beyond":      {"no such block", func(d damageable) uint64 { put64(d.block(0), 208, 40); return 0 }},
		"array root far beyond":  {"no such block", func(d damageable) uint64 { put64(d.block(0), 208, 1<<63); return 0 }},
		"array root is the head": {"pointed to twice", func(d damageable) uint64 { put64(d.block(0), 208, 0); return 0 }},
		"array root is the writesets": {"values of 12 bytes", func(d damageable) uint64 {
			put64(d.block(0), 208, d.setRoot)
			return 0
		}},
		"writeset tree is the array": {"pointed to twice", func(d damageable) uint64 {
			put64(d.block(0), 200, d.eraRoot)
			return 0
		}},
		"current writeset is an archived one": {"pointed to twice", func(d damageable) uint64 {
			put64(d.block(0), 192, d.bitsRoot)
			return 0
		}},
		"writeset without bitset": {"pointed to twice", func(d damageable) uint64 {
			put64(d.block(d.setRoot), 32+8*201+4, 0)
			return d.setRoot
		}},
		"bitset shorter": {"ends after 1 of 2", func(d damageable) uint64 {
			put32(d.block(d.setRoot), 32+8*201, 509*64+1)
			return d.setRoot
		}},
		"tree is a loop":     {"pointed to twice", func(d damageable) uint64 { d.setChild(d.eraRoot, 0, d.eraRoot); return d.eraRoot }},
		"child beyond":       {"no such block", func(d damageable) uint64 { d.setChild(d.eraRoot, 1, 40); return d.eraRoot }},
		"array block beyond": {"no such block", func(d damageable) uint64 { d.setChild(d.eraLeaf, 1, 1<<40); return d.eraLeaf }},
		"array block twice":  {"pointed to twice", func(d damageable) uint64 { d.setChild(d.eraLeaf, 1, d.eraBlock); return d.eraLeaf }},
		"array block skipped": {"block 5 of the array where 4 of 5", func(d damageable) uint64 {
			last := d.child(d.child(d.eraRoot, 1), 0)
			put64(d.block(last), 32, 5)
			return last
		}},
		"node elsewhere":     {"says it is block 39", func(d damageable) uint64 { put64(d.block(d.eraRoot), 8, 39); return d.eraRoot }},
		"node flags":         {"flags 3", func(d damageable) uint64 { put32(d.block(d.eraRoot), 4, 3); return d.eraRoot }},
		"leaf as inner node": {"", func(d damageable) uint64 { put32(d.block(d.eraLeaf), 4, 1); return d.eraLeaf }},
		"inner node as leaf": {"", func(d damageable) uint64 { put32(d.block(d.eraRoot), 4, 2); return d.eraRoot }},
		"node value size":    {"values of 4 bytes", func(d damageable) uint64 { put32(d.block(d.eraRoot), 24, 4); return d.eraRoot }},
		"node value size 0":  {"values of 0 bytes", func(d damageable) uint64 { put32(d.block(d.eraRoot), 24, 0); return d.eraRoot }},
		"node too many":      {"253 entries, want at most 252", func(d damageable) uint64 { put32(d.block(d.eraRoot), 16, 253); return d.eraRoot }},
		"node too large": {"only 254 fit", func(d damageable) uint64 {
			put32(d.block(d.eraRoot), 20, 255)
			return d.eraRoot
		}},
		"node huge": {"only 254 fit", func(d damageable) uint64 {
			put32(d.block(d.eraRoot), 16, 1<<32-1)
			put32(d.block(d.eraRoot), 20, 1<<32-1)
			return d.eraRoot
		}},
		"node without entries": {"it is empty", func(d damageable) uint64 { put32(d.block(d.eraLeaf), 16, 0); return d.eraLeaf }},
		"root without entries": {"it is empty", func(d damageable) uint64 { put32(d.block(d.eraRoot), 16, 0); return d.eraRoot }},
		"keys go back":         {"follows key", func(d damageable) uint64 { put64(d.block(d.eraLeaf), 32, 5); return d.eraLeaf }},
		"keys outside the parent's": {"want them from", func(d damageable) uint64 {
			put64(d.block(d.eraRoot), 32, 1)
			return d.eraRoot
		}},
		"keys beyond the parent's": {"want them from", func(d damageable) uint64 {
			put64(d.block(d.eraRoot), 40, 3)
			return d.eraRoot
		}},
		"array block elsewhere":  {"says it is block 39", func(d damageable) uint64 { put64(d.block(d.eraBlock), 16, 39); return d.eraBlock }},
		"array block value size": {"values of 8 bytes", func(d damageable) uint64 { put32(d.block(d.eraBlock), 12, 8); return d.eraBlock }},
		"array block room":       {"at most 1017", func(d damageable) uint64 { put32(d.block(d.eraBlock), 4, 1017); return d.eraBlock }},
		"array block short":      {"1017 values", func(d damageable) uint64 { put32(d.block(d.eraBlock), 8, 1017); return d.eraBlock }},
		"array block long":       {"1019 values", func(d damageable) uint64 { put32(d.block(d.eraBlock), 8, 1019); return d.eraBlock }},
		"era to come": {"era 10 for data block 5", func(d damageable) uint64 {
			put32(d.block(d.eraBlock), 24+4*5, 10)
			return d.eraBlock
		}},
		"bitset block": {"78 values, want 79", func(d damageable) uint64 { put32(d.block(d.bitsBlock), 8, 78); return d.bitsBlock }},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDamageable()
			d.seal(damage.do(d))
			got, err := ChangedInactive(d.reader(), 1)
			mustBeUnknown(t, got, err)
			if err != nil && !strings.Contains(err.Error(), damage.says) {
				t.Errorf("error %q does not say %q", err, damage.says)
			}
		})
	}
}

func mustBeUnknown(t *testing.T, got []blockdev.Extent, err error) {
	t.Helper()
	if !errors.Is(err, ErrUnknown) || got != nil {
		t.Errorf("%d extents, error %v; want none and ErrUnknown", len(got), err)
	} else if !strings.Contains(err.Error(), "block") {
		t.Errorf("error %q names no block", err)
	}
}

// An array may end early where a block of it ends, and all that is there is
// whole.
func TestShortArrayIsUnknown(t *testing.T) {
	im := newImage(20, nil)
	im.write(content{blocks: 2 * 1018, era: 3, sectors: 8, digest: func(uint32) uint32 { return 1 }}, 0)
	if _, err := ChangedInactive(im.reader(), 1); err != nil {
		t.Fatal(err)
	}
	put32(im.block(0), 180, 3*1018)
	im.seal(0)
	got, err := ChangedInactive(im.reader(), 1)
	mustBeUnknown(t, got, err)
}

// Any changed byte of any block that matters is seen by its checksum.
func TestChangedByteIsUnknown(t *testing.T) {
	d := newDamageable()
	used := 0
	rng := rand.New(rand.NewPCG(1, 1))
	for n, k := range d.kinds {
		if k == empty {
			continue
		}
		used++
		places := []int{0, 3, 4, 4095}
		for range 20 {
			places = append(places, rng.IntN(4096))
		}
		for _, at := range places {
			b := d.block(uint64(n))
			b[at] ^= 0x10
			got, err := ChangedInactive(d.reader(), 1)
			b[at] ^= 0x10
			if !errors.Is(err, ErrUnknown) || got != nil {
				t.Fatalf("byte %d of block %d changed: %d extents, error %v; want none and ErrUnknown", at, n, len(got), err)
			}
		}
	}
	if used < 15 {
		t.Fatalf("only %d blocks used", used)
	}
	if _, err := ChangedInactive(d.reader(), 1); err != nil {
		t.Fatal("the undamaged image:", err)
	}
}

func TestDeepTreeIsUnknown(t *testing.T) {
	d := newDamageable()
	// A chain of nodes with one child each is whole in every other respect.
	n := d.eraRoot
	for range maxTreeDepth {
		n = d.node(1, 8, []uint64{0}, [][]byte{bytes64(n)})
	}
	put64(d.block(0), 208, n)
	d.seal(0)
	got, err := ChangedInactive(d.reader(), 1)
	mustBeUnknown(t, got, err)
}

func TestTruncatedIsUnknown(t *testing.T) {
	d := newDamageable()
	last := 0
	for n, k := range d.kinds {
		if k != empty {
			last = n
		}
	}
	for n := range last + 1 {
		// With a size, and as something whose size is not known.
		for _, r := range []io.ReaderAt{
			io.NewSectionReader(d.reader(), 0, int64(n)*4096),
			sizeless{io.NewSectionReader(d.reader(), 0, int64(n)*4096)},
			sizeless{io.NewSectionReader(d.reader(), 0, int64(n)*4096+4095)},
		} {
			got, err := ChangedInactive(r, 1)
			mustBeUnknown(t, got, err)
		}
	}
}

type sizeless struct{ r io.ReaderAt }

func (s sizeless) ReadAt(p []byte, off int64) (int, error) { return s.r.ReadAt(p, off) }

// failing fails its k-th read, half done.
type failing struct {
	r  io.ReaderAt
	mu sync.Mutex
	k  int
}

func (f *failing) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	f.k--
	fail := f.k == -1
	f.mu.Unlock()
	if fail {
		n, _ := f.r.ReadAt(p[:len(p)/2], off)
		return n, iotest.ErrTimeout
	}
	return f.r.ReadAt(p, off)
}

func TestFailedReadIsUnknown(t *testing.T) {
	d := newDamageable()
	k := 0
	for ; ; k++ {
		got, err := ChangedInactive(&failing{r: d.reader(), k: k}, 1)
		if err == nil {
			break
		}
		mustBeUnknown(t, got, err)
		if !errors.Is(err, iotest.ErrTimeout) {
			t.Errorf("read %d failed, but the error is %v", k, err)
		}
	}
	if k < 5 {
		t.Errorf("only %d reads", k)
	}
}

// picky reads as direct I/O does.
type picky struct {
	t     *testing.T
	r     io.ReaderAt
	reads atomic.Int32
}

func (p *picky) ReadAt(b []byte, off int64) (int, error) {
	p.reads.Add(1)
	if off%4096 != 0 || len(b)%4096 != 0 || reflect.ValueOf(&b[0]).Pointer()%4096 != 0 {
		p.t.Errorf("read of %d bytes at %d into memory at %p", len(b), off, b)
	}
	return p.r.ReadAt(b, off)
}

func TestReadsFitDirectIO(t *testing.T) {
	for _, order := range []*rand.Rand{nil, rand.New(rand.NewPCG(1, 1))} {
		im := newImage(700, order)
		c := content{blocks: 60000, era: 3, sectors: 128, digest: func(b uint32) uint32 { return b % 3 },
			sets: []set{{3, 60000, scattered(1, 5)}}}
		im.write(c, 0)
		r := &picky{t: t, r: im.reader()}
		got, err := ChangedInactive(r, 2)
		if err != nil {
			t.Fatal(err)
		}
		mustEqual(t, "picky", got, c.want(2, false), 64<<10)
		// Of 66 blocks in use those of an array are read together where they
		// stand together.
		if n := r.reads.Load(); order == nil && n > 10 {
			t.Errorf("%d reads", n)
		}
	}
}

func FuzzChanged(f *testing.F) {
	base := newDamageable()
	f.Add([]byte{}, uint32(1))
	for n := range byte(20) {
		for _, at := range []uint16{4, 8, 16, 20, 24, 32, 172, 180, 184, 188, 192, 200, 208} {
			f.Add([]byte{n, byte(at), byte(at >> 8), 1, 0, 0, 0}, uint32(1))
			f.Add([]byte{n, byte(at), byte(at >> 8), 0xff, 0xff, 0xff, 0xff, n, byte(at) + 4, byte(at >> 8), 0, 0, 0, 0}, uint32(3))
		}
	}
	// Each record of 7 bytes changes a word of a block, whose checksum is
	// made right again: it must be taken for anything but good.
	f.Fuzz(func(t *testing.T, changes []byte, since uint32) {
		im := image{b: append([]byte{}, base.b...), kinds: base.kinds}
		for ; len(changes) >= 7; changes = changes[7:] {
			n := uint64(changes[0]) % uint64(len(im.kinds))
			at := (int(changes[1]) | int(changes[2])<<8) % 4093
			copy(im.block(n)[at:at+4], changes[3:7])
			im.seal(n)
		}
		got, err := ChangedInactive(im.reader(), since)
		if err != nil {
			mustBeUnknown(t, got, err)
			return
		}
		if s, err := ReadSuperblock(im.reader(), 0); err != nil {
			t.Fatalf("an answer from a superblock that reads as %v", err)
		} else if !reflect.DeepEqual(got, []blockdev.Extent(blockdev.Clip(got, s.TrackedBytes()))) && len(got) > 0 {
			t.Fatalf("extents %v of %d bytes", got, s.TrackedBytes())
		}
		if _, err := Changed(im.reader(), 1, since); !errors.Is(err, ErrUnknown) {
			t.Fatalf("a snapshot that is none: %v", err)
		}
	})
}

func ExampleErrUnknown() {
	_, err := ChangedInactive(strings.NewReader(strings.Repeat("not metadata", 1000)), 1)
	fmt.Println(errors.Is(err, ErrUnknown))
	// Output: true
}
