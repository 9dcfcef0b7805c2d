package blocktest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"blockferry/blockdev"
)

// TestDevice is what every blockdev.Device passes. open gives a new writable
// device of 4 MiB to 1 GiB that reads as zeros or as anything else; TestDevice
// may close it, and open's own cleanup closes it otherwise.
func TestDevice(t *testing.T, open func(t *testing.T) blockdev.Device) {
	t.Run("names itself and its size", func(t *testing.T) {
		d := open(t)
		if d.Name() == "" {
			t.Error("no name")
		}
		if d.Size() < 4<<20 || d.Size()%blockdev.BlockSize != 0 {
			t.Errorf("size %d: the suite wants at least 4 MiB, and multiples of %d", d.Size(), blockdev.BlockSize)
		}
	})
	t.Run("reads what was written", func(t *testing.T) { readsWhatWasWritten(t, open(t)) })
	t.Run("takes memory at any address", func(t *testing.T) { takesAnyMemory(t, open(t)) })
	t.Run("refuses ranges", func(t *testing.T) { refusesRanges(t, open(t)) })
	t.Run("zeroes and discards", func(t *testing.T) { zeroesAndDiscards(t, open(t)) })
	t.Run("serves many at once", func(t *testing.T) { servesMany(t, open(t)) })
	t.Run("fails when closed", func(t *testing.T) { failsWhenClosed(t, open(t)) })
}

// pattern fills a buffer of n bytes that differs for each seed.
func pattern(n int, seed uint64) []byte {
	rng := rand.New(rand.NewPCG(seed, uint64(n)))
	b := blockdev.AlignedBuffer(n)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
	return b
}

func mustWrite(t *testing.T, d blockdev.Device, p []byte, offset int64) {
	t.Helper()
	if n, err := d.WriteAt(p, offset); err != nil || n != len(p) {
		t.Fatalf("write of %d bytes at %d: %d, %v", len(p), offset, n, err)
	}
}

func mustRead(t *testing.T, d blockdev.Device, p []byte, offset int64) {
	t.Helper()
	if n, err := d.ReadAt(p, offset); err != nil || n != len(p) {
		t.Fatalf("read of %d bytes at %d: %d, %v", len(p), offset, n, err)
	}
}

// mustHold checks one range of the device.
func mustHold(t *testing.T, d blockdev.Device, want []byte, offset int64) {
	t.Helper()
	got := blockdev.AlignedBuffer(len(want))
	copy(got, bytes.Repeat([]byte{0xa5}, len(got))) // what no read may leave
	mustRead(t, d, got, offset)
	if bytes.Equal(got, want) {
		return
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("%d bytes at %d: byte %d is %#x, want %#x", len(want), offset, i, got[i], want[i])
		}
	}
}

func readsWhatWasWritten(t *testing.T, d blockdev.Device) {
	const area = 4 << 20 // compared whole, so that a write astray is seen
	want := pattern(area, 1)
	mustWrite(t, d, want, 0)
	rng := rand.New(rand.NewPCG(2, 2))
	for i := range uint64(100) {
		n := (1 + rng.IntN(32)) * blockdev.BlockSize
		at := rng.IntN((area-n)/blockdev.BlockSize+1) * blockdev.BlockSize
		p := pattern(n, 10+i)
		mustWrite(t, d, p, int64(at))
		copy(want[at:], p)
	}
	mustHold(t, d, want, 0)
	if err := d.Flush(); err != nil {
		t.Fatalf("flush: %v", err)
	}
	mustHold(t, d, want, 0)

	last := d.Size() - blockdev.BlockSize
	p := pattern(blockdev.BlockSize, 3)
	mustWrite(t, d, p, last)
	mustHold(t, d, p, last)
	mustWrite(t, d, nil, d.Size()) // nothing, at the end, is within the device
	mustRead(t, d, nil, 0)
}

func takesAnyMemory(t *testing.T, d blockdev.Device) {
	for _, n := range []int{blockdev.BlockSize, 3 * blockdev.BlockSize, 2<<20 + blockdev.BlockSize} {
		for _, skew := range []int{1, 8, 256, 511, 512, 2048} {
			t.Run(fmt.Sprintf("%d bytes, %d beyond", n, skew), func(t *testing.T) {
				mem := blockdev.AlignedBuffer(n + blockdev.BlockSize)
				p := mem[skew : skew+n]
				want := pattern(n, uint64(skew))
				copy(p, want)
				mustWrite(t, d, p, blockdev.BlockSize)
				if !bytes.Equal(p, want) {
					t.Fatal("the write changed the caller's memory")
				}
				mustHold(t, d, want, blockdev.BlockSize)
				clear(mem)
				mustRead(t, d, p, blockdev.BlockSize)
				if !bytes.Equal(p, want) {
					t.Fatal("a read into this memory differs")
				}
				if mem[skew-1] != 0 || mem[skew+n] != 0 {
					t.Fatal("the read went beyond the caller's memory")
				}
			})
		}
	}
}

func refusesRanges(t *testing.T, d blockdev.Device) {
	const b = blockdev.BlockSize
	want := pattern(4*b, 1)
	mustWrite(t, d, want, 0)
	end := pattern(4*b, 2)
	mustWrite(t, d, end, d.Size()-4*b)
	for _, r := range []blockdev.Extent{
		{Offset: 1, Length: b}, {Offset: 512, Length: b}, {Offset: 0, Length: 512}, {Offset: 0, Length: b + 1},
		{Offset: -b, Length: b}, {Offset: d.Size(), Length: b}, {Offset: d.Size() - b, Length: 2 * b},
		{Offset: 1<<63 - b, Length: b},
	} {
		junk := bytes.Repeat([]byte{0x77}, int(r.Length))
		refused := func(op string, n int, err error) {
			t.Helper()
			if !errors.Is(err, blockdev.ErrRange) || n != 0 {
				t.Errorf("%s of %d at %d: %d, %v; want ErrRange", op, r.Length, r.Offset, n, err)
			}
		}
		n, err := d.WriteAt(junk, r.Offset)
		refused("write", n, err)
		n, err = d.ReadAt(junk, r.Offset)
		refused("read", n, err)
		if !bytes.Equal(junk, bytes.Repeat([]byte{0x77}, int(r.Length))) {
			t.Errorf("a refused read of %d at %d changed memory", r.Length, r.Offset)
		}
		refused("zero-out", 0, d.ZeroOut(r.Offset, r.Length))
		refused("discard", 0, d.Discard(r.Offset, r.Length))
	}
	refusedLength := d.ZeroOut(0, -b)
	if !errors.Is(refusedLength, blockdev.ErrRange) {
		t.Errorf("zero-out of a negative length: %v; want ErrRange", refusedLength)
	}
	mustHold(t, d, want, 0)
	mustHold(t, d, end, d.Size()-4*b)
}

func zeroesAndDiscards(t *testing.T, d blockdev.Device) {
	const b = blockdev.BlockSize
	want := pattern(64*b, 1)
	mustWrite(t, d, want, 0)
	for _, r := range []blockdev.Extent{{Offset: b, Length: b}, {Offset: 5 * b, Length: 16 * b}, {Offset: 40 * b, Length: 0}} {
		if err := d.ZeroOut(r.Offset, r.Length); err != nil {
			t.Fatalf("zero-out: %v", err)
		}
		clear(want[r.Offset:r.End()])
	}
	mustHold(t, d, want, 0)
	// What was zeroed takes new data.
	p := pattern(2*b, 2)
	mustWrite(t, d, p, 6*b)
	copy(want[6*b:], p)
	mustHold(t, d, want, 0)

	err := d.Discard(32*b, 8*b)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Fatalf("discard: %v", err)
	}
	mustHold(t, d, want[:32*b], 0)
	mustHold(t, d, want[40*b:], 40*b)
	if err != nil {
		mustHold(t, d, want, 0)
	}
	p = pattern(8*b, 3)
	mustWrite(t, d, p, 32*b)
	mustHold(t, d, p, 32*b)

	all := pattern(4<<20, 4)
	mustWrite(t, d, all, 0)
	if err := d.ZeroOut(0, d.Size()); err != nil {
		t.Fatalf("zero-out of all: %v", err)
	}
	clear(all)
	mustHold(t, d, all, 0)
	mustHold(t, d, make([]byte, b), d.Size()-b)
}

func servesMany(t *testing.T, d blockdev.Device) {
	const workers, stretch = 8, 64 * blockdev.BlockSize
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for w := range workers {
		wg.Go(func() {
			base := int64(w) * stretch
			mem := blockdev.AlignedBuffer(stretch + blockdev.BlockSize)
			for round := range uint64(10) {
				want := pattern(stretch, uint64(w)*100+round)
				got := mem[w : w+stretch] // most of them by way of a bounce buffer
				if _, err := d.WriteAt(want, base); err != nil {
					errs <- err
					return
				}
				if round%4 == 0 {
					if err := d.Flush(); err != nil {
						errs <- err
						return
					}
				}
				if _, err := d.ReadAt(got, base); err != nil {
					errs <- err
					return
				}
				if !bytes.Equal(got, want) {
					errs <- fmt.Errorf("worker %d, round %d read something else than it wrote", w, round)
					return
				}
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
}

func failsWhenClosed(t *testing.T, d blockdev.Device) {
	p := pattern(blockdev.BlockSize, 1)
	if err := d.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
	_, readErr := d.ReadAt(p, 0)
	_, writeErr := d.WriteAt(p, 0)
	for op, err := range map[string]error{
		"read": readErr, "write": writeErr, "flush": d.Flush(), "zero-out": d.ZeroOut(0, blockdev.BlockSize),
		"discard": d.Discard(0, blockdev.BlockSize), "close": d.Close(),
	} {
		if err == nil {
			t.Errorf("%s of a closed device succeeded", op)
		}
	}
}
