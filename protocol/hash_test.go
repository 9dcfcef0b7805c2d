package protocol

import (
	"bytes"
	"testing"
)

func TestHasherSeesEveryBitAndTheKey(t *testing.T) {
	key := bytes.Repeat([]byte{3}, HashKeyBytes)
	h, err := NewHasher(key)
	if err != nil {
		t.Fatal(err)
	}
	block := make([]byte, BlockSize)
	seen := map[[HashBytes]byte]int{h.Sum(block): -1, h.Sum(block[:BlockSize/2]): -2, h.Sum(nil): -3}
	for bit := range len(block) * 8 {
		block[bit/8] ^= 1 << (bit % 8)
		if other, dup := seen[h.Sum(block)]; dup {
			t.Fatalf("bits %d and %d give the same checksum", bit, other)
		}
		seen[h.Sum(block)] = bit
		block[bit/8] ^= 1 << (bit % 8)
	}
	if len(seen) != 3+len(block)*8 {
		t.Fatalf("%d checksums", len(seen))
	}
	key[0] ^= 1
	other, _ := NewHasher(key)
	if h.Sum(block) == other.Sum(block) || other.Sum(block) == ([HashBytes]byte{}) {
		t.Error("the key does not matter")
	}
	if _, err := NewHasher(key[1:]); err == nil {
		t.Error("a short key was taken")
	}
}

func TestAppendSumsCutsIntoPieces(t *testing.T) {
	h, err := NewHasher(make([]byte, HashKeyBytes))
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, UnitSize+3*BlockSize)
	for i := range data {
		data[i] = byte(i >> 8)
	}
	got := h.AppendSums([]byte{1}, data, UnitSize)
	first, second := h.Sum(data[:UnitSize]), h.Sum(data[UnitSize:])
	if want := append(append([]byte{1}, first[:]...), second[:]...); !bytes.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
	if n := len(h.AppendSums(nil, data, BlockSize)); n != 19*HashBytes {
		t.Errorf("%d bytes for 19 blocks", n)
	}
	if n := testing.AllocsPerRun(10, func() { got = h.AppendSums(got[:0], data, BlockSize) }); n > 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkHasher(b *testing.B) {
	h, _ := NewHasher(make([]byte, HashKeyBytes))
	data := make([]byte, 1<<20)
	for name, piece := range map[string]int{"64KiB": UnitSize, "4KiB": BlockSize} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			var sums []byte
			for b.Loop() {
				sums = h.AppendSums(sums[:0], data, piece)
			}
		})
	}
}

// Checksums of a whole batch are appended to one another thousands of times.
func TestHashMakesRoomOnce(t *testing.T) {
	h, err := NewHasher(make([]byte, HashKeyBytes))
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 1<<20)
	if n := testing.AllocsPerRun(5, func() { h.AppendSums(nil, data, BlockSize) }); n > 2 {
		t.Errorf("%v allocations for the checksums of %d blocks", n, len(data)/BlockSize)
	}
}
