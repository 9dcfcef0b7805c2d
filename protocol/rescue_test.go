package protocol

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blockferry/blockdev/blocktest"
)

func rescueInfo() RescueInfo {
	return RescueInfo{VolumeUUID: testUUID, ReplicaUUID: [16]byte{5}, SizeBytes: testVolumeSize, Lineage: line(1, 3, 2, 9), Common: line(2, 4).Tip()}
}

// noisyDevice is a volume's size of noise.
func noisyDevice(t testing.TB, seed uint64) *blocktest.Memory {
	t.Helper()
	d := blocktest.NewMemory(testVolumeSize)
	b := make([]byte, testVolumeSize)
	rng := testRand(seed)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	_, err := d.WriteAt(b, 0)
	must(t, err)
	must(t, d.Flush())
	return d
}

func content8(t testing.TB, d io.ReaderAt) []byte {
	t.Helper()
	b := make([]byte, testVolumeSize)
	_, err := d.ReadAt(b, 0)
	must(t, err)
	return b
}

// What is saved comes back, to the byte and nowhere else, and no file replaces
// another.
func TestRescueRoundTrip(t *testing.T) {
	dir := t.TempDir()
	from, to := noisyDevice(t, 1), noisyDevice(t, 2)
	seen := map[string]bool{}
	for seed := range uint64(20) {
		rng := testRand(seed)
		var ranges []Range
		for range rng.IntN(20) {
			n := (1 + rng.Int64N(300)) * BlockSize
			ranges = append(ranges, Range{rng.Int64N((testVolumeSize-n)/BlockSize) * BlockSize, n})
		}
		ranges = uniteRanges(ranges, nil)
		path, err := WriteRescue(dir, rescueInfo(), ranges, from)
		must(t, err)
		if seen[path] {
			t.Fatalf("%s came twice", path)
		}
		seen[path] = true
		r, err := OpenRescue(path)
		must(t, err)
		if got := uniteRanges(r.Extents(), nil); !equalRanges(got, ranges) {
			t.Fatalf("extents %v, want %v", got, ranges)
		}
		if r.Info.Common != rescueInfo().Common || !r.Info.Lineage.Equal(rescueInfo().Lineage) || r.Info.ReplicaUUID != rescueInfo().ReplicaUUID {
			t.Fatalf("%+v came back as %+v", rescueInfo(), r.Info)
		}
		want := content8(t, to)
		for _, x := range ranges {
			copy(want[x.Offset:x.End()], content8(t, from)[x.Offset:x.End()])
		}
		must(t, r.Apply(testUUID, to))
		must(t, r.Close())
		after := to.PowerCut(rng) // durable, not only written
		if at := firstDifference(content8(t, after), want); at >= 0 {
			t.Fatalf("differs at %d", at)
		}
		to = after
	}
	files, err := os.ReadDir(dir)
	must(t, err)
	if len(files) != len(seen) {
		t.Errorf("%d files for %d rescues", len(files), len(seen))
	}
}

func equalRanges(a, b []Range) bool {
	for i := range a {
		if i >= len(b) || a[i] != b[i] {
			return false
		}
	}
	return len(a) == len(b)
}

// A file that is cut short, longer, or changed in any byte that counts is refused by its
// name and the place, and nothing of it is written.
func TestRescueDamageIsRefused(t *testing.T) {
	dir := t.TempDir()
	from, to := noisyDevice(t, 1), noisyDevice(t, 2)
	path, err := WriteRescue(dir, rescueInfo(), []Range{{8192, 8192}, {1 << 20, 4096}}, from)
	must(t, err)
	whole, err := os.ReadFile(path)
	must(t, err)
	refused := func(what string, b []byte) {
		t.Helper()
		damaged := filepath.Join(dir, "damaged.rescue")
		must(t, os.WriteFile(damaged, b, 0o600))
		writes := to.Count(blocktest.OpWrite)
		r, err := OpenRescue(damaged)
		if err == nil {
			err = r.Apply(testUUID, to)
			must(t, r.Close())
		}
		if !errors.Is(err, ErrRescueFile) && !errors.Is(err, ErrNewerFormat) || !strings.Contains(err.Error(), damaged+" at ") {
			t.Fatalf("%s: %v", what, err)
		}
		if to.Count(blocktest.OpWrite) != writes {
			t.Fatalf("%s: refused after something was written", what)
		}
	}
	for n := 0; n < len(whole); n += 1 + n/20 {
		refused("cut short", whole[:n])
	}
	refused("longer", append(bytes.Clone(whole), 0))
	for at := 0; at < len(whole); at += 1 + at/50 {
		b := bytes.Clone(whole)
		b[at] ^= 0x10
		refused("flipped", b)
	}
	for at := len(whole) - 2*rescueIndexBytes; at < len(whole); at++ {
		b := bytes.Clone(whole)
		b[at] ^= 0x20
		refused("index flipped", b)
	}
	r, err := OpenRescue(path)
	must(t, err)
	defer r.Close()
	if err := r.Apply([16]byte{8}, to); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("applied to another volume: %v", err)
	}
	if err := r.Apply(testUUID, blocktest.NewMemory(testVolumeSize+4096)); err == nil {
		t.Error("applied to a volume of another size")
	}
}

// Blocks that can't be read leave no file that could be taken for a rescue.
func TestRescueFailsWithoutAFile(t *testing.T) {
	dir := t.TempDir()
	from := noisyDevice(t, 1)
	from.FailAt(blocktest.OpRead, 1, errors.New("broken on purpose"))
	if path, err := WriteRescue(dir, rescueInfo(), []Range{{0, 4096}, {8192, 4096}}, from); err == nil {
		t.Fatalf("written to %s", path)
	}
	bad := rescueInfo()
	bad.Common = line(2, 10).Tip()
	if path, err := WriteRescue(dir, bad, nil, from); err == nil {
		t.Fatalf("a common position outside the history: written to %s", path)
	}
	files, err := os.ReadDir(dir)
	must(t, err)
	if len(files) > 0 {
		t.Errorf("left: %v", files)
	}
	if _, err := WriteRescue(filepath.Join(dir, "none"), rescueInfo(), nil, from); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no folder: %v", err)
	}
}

// Whatever a file holds, reading it ends in an error or in extents that lie, in order, within
// the volume, and applying it writes those and nothing else, or nothing.
func FuzzRescue(f *testing.F) {
	const size = 64 << 10
	dir, d, info := f.TempDir(), noisyDevice(f, 1), rescueInfo()
	info.SizeBytes = size
	for _, ranges := range [][]Range{nil, {{0, 4096}}, {{4096, 4096}, {16384, 8192}}, {{size - 4096, 4096}}} {
		path, err := WriteRescue(dir, info, ranges, d)
		must(f, err)
		b, err := os.ReadFile(path)
		must(f, err)
		f.Add(b)
	}
	// What writes none of: extents twice, in no order, beyond the end, of nothing, of half a block.
	for _, extents := range [][]Range{{{8192, 4096}, {8192, 4096}}, {{8192, 4096}, {0, 4096}}, {{size, 4096}}, {{-4096, 4096}}, {{0, 0}, {0, 8192}}, {{0, 512}, {512, 7680}}} {
		var data int64
		var index []byte
		for _, x := range extents {
			data += x.Length
			index = binary.LittleEndian.AppendUint64(index, uint64(x.Offset))
			index = binary.LittleEndian.AppendUint32(index, uint32(x.Length))
			index = binary.LittleEndian.AppendUint32(index, crc32c(make([]byte, x.Length)))
		}
		b := append(info.header(uint64(len(extents)), uint64(data), crc32c(index)), make([]byte, data)...)
		f.Add(append(b, index...))
	}
	look := func(t *testing.T, b []byte) {
		r, err := readRescue("fuzz", bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		must(t, r.Info.check())
		var end int64
		for i, x := range r.Extents() {
			if x.Length <= 0 || x.Offset < end || x.End() > r.Info.SizeBytes || x.Length > rescueExtentBytes || x.Offset%BlockSize != 0 || x.Length%BlockSize != 0 {
				t.Fatalf("extent %v after %d of a volume of %d", x, end, r.Info.SizeBytes)
			}
			end = x.End()
			if data, err := r.Extent(i); err == nil && int64(len(data)) != x.Length {
				t.Fatalf("%d bytes of %v", len(data), x)
			}
		}
		if r.Info.SizeBytes != size {
			return
		}
		to := blocktest.NewMemory(size)
		if err := r.Apply(r.Info.VolumeUUID, to); err != nil {
			if to.Count(blocktest.OpWrite) > 0 {
				t.Fatalf("refused after something was written: %v", err)
			}
			return
		}
		want := blocktest.NewMemory(size)
		for i, x := range r.Extents() {
			data, err := r.Extent(i)
			must(t, err)
			_, err = want.WriteAt(data, x.Offset)
			must(t, err)
		}
		if !bytes.Equal(contentOf(t, to), contentOf(t, want)) {
			t.Fatal("applied is something else than it holds")
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		look(t, b)
		if len(b) < rescueHeaderBytes {
			return
		}
		// With the checksums set right a changed file gets further: the index's, then the header's.
		b = bytes.Clone(b)
		le := binary.LittleEndian
		if data := le.Uint64(b[64:]); data <= uint64(len(b)-rescueHeaderBytes) {
			le.PutUint32(b[72:], crc32c(b[rescueHeaderBytes+data:]))
		}
		clear(b[12:16])
		le.PutUint32(b[12:], crc32c(b[:rescueHeaderBytes]))
		look(t, b)
	})
}

func contentOf(t *testing.T, d *blocktest.Memory) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	_, err := d.ReadAt(b, 0)
	must(t, err)
	return b
}
