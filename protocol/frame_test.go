package protocol

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
)

func testImage(rng *rand.Rand, blocks int) []byte {
	b := make([]byte, blocks*BlockSize)
	for at := 0; at < len(b); {
		n := min(len(b)-at, (1+rng.IntN(90))*BlockSize)
		switch rng.IntN(3) {
		case 0: // zeros
		case 1:
			copy(b[at:at+n], bytes.Repeat([]byte("all the same "), n/13+1))
		case 2:
			for k := at; k < at+n; k += 8 {
				binary.LittleEndian.PutUint64(b[k:], rng.Uint64())
			}
		}
		at += n
	}
	return b
}

func TestFramesBringTheImage(t *testing.T) {
	for _, codec := range []Codec{CodecNone, CodecS2, CodecZstd} {
		c, err := NewCompressor(codec)
		if err != nil {
			t.Fatal(err)
		}
		rng := rand.New(rand.NewPCG(3, uint64(codec)))
		for range 20 {
			want := testImage(rng, 1+rng.IntN(600))
			offset := rng.Int64N(1<<30) * BlockSize
			frames := AppendFrames([]byte("before"), FrameMeta{9, 8, 7}, offset, want, c)
			if string(frames[:6]) != "before" {
				t.Fatal("what was there is gone")
			}
			frames = frames[6:]
			got := bytes.Repeat([]byte{0xee}, len(want))
			kinds := map[FrameKind]int{}
			next := offset
			for r := NewFrameReader(frames); r.More(); {
				f, err := r.Next()
				if err != nil {
					t.Fatal(err)
				}
				if f.Offset != next || f.FrameMeta != (FrameMeta{9, 8, 7}) {
					t.Fatalf("frame %+v, want offset %d", f.FrameMeta, next)
				}
				if f.Kind == FrameData && f.Length > DefaultDataFrameBytes {
					t.Fatalf("data frame of %d bytes", f.Length)
				}
				next = f.Offset + f.Length
				kinds[f.Kind]++
				to := got[f.Offset-offset:][:f.Length]
				if f.Kind == FrameZero {
					clear(to)
					continue
				}
				d, _ := NewDecompressor(1)
				if err := d.Decode(to, f); err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(got, want) || next != offset+int64(len(want)) {
				t.Fatalf("%v: another image", codec)
			}
			zeros := 0
			for at := 0; at < len(want); at += BlockSize {
				if allZero(want[at : at+BlockSize]) {
					zeros++
				}
			}
			if max := len(want) - zeros*BlockSize + len(frames)/10 + 4096; len(frames) > max {
				t.Fatalf("%v: %d bytes of frames for %d bytes of which %d blocks are zeros", codec, len(frames), len(want), zeros)
			}
		}
		// What can be packed is.
		text := bytes.Repeat([]byte("blockferry "), 100*BlockSize/11+1)[:100*BlockSize]
		n := len(AppendFrames(nil, FrameMeta{}, 0, text, c))
		if packed := n < len(text)/4; packed != (codec != CodecNone) {
			t.Errorf("%v: %d bytes of text take %d", codec, len(text), n)
		}
	}
}

func TestFrameOfEveryBitFlipIsRefused(t *testing.T) {
	c, _ := NewCompressor(CodecS2)
	data := bytes.Repeat([]byte("0123456789abcdef"), BlockSize/16)
	good := AppendFrames(nil, FrameMeta{1, 2, 3}, 8192, data, c)
	good = AppendZeroFrames(good, FrameMeta{1, 2, 3}, Range{1 << 20, 1 << 20})
	read := func(b []byte) error {
		for r := NewFrameReader(b); r.More(); {
			if _, err := r.Next(); err != nil {
				return err
			}
		}
		return nil
	}
	if err := read(good); err != nil {
		t.Fatal(err)
	}
	for bit := range len(good) * 8 {
		bad := bytes.Clone(good)
		bad[bit/8] ^= 1 << (bit % 8)
		if err := read(bad); !errors.Is(err, ErrBadFrame) || !strings.Contains(err.Error(), "at byte") {
			t.Fatalf("bit %d flipped: %v", bit, err)
		}
	}
	whole := map[int]bool{0: true, len(good) - FrameHeaderBytes: true, len(good): true}
	for n := range good {
		if err := read(good[:n]); (err == nil) != whole[n] {
			t.Fatalf("cut to %d of %d bytes: %v", n, len(good), err)
		}
	}
}

// reseal makes a changed frame's checksums right again.
func reseal(b []byte) []byte {
	le := binary.LittleEndian
	le.PutUint32(b[40:], crc32c(b[FrameHeaderBytes:]))
	le.PutUint32(b[44:], crc32c(b[:44]))
	return b
}

// A frame with right checksums may still come from an enemy.
func TestFramesThatLieAreRefused(t *testing.T) {
	c, _ := NewCompressor(CodecZstd)
	le := binary.LittleEndian
	text := bytes.Repeat([]byte("blockferry  "), 2*BlockSize/12+1)[:2*BlockSize]
	change := map[string]func([]byte) []byte{
		"version":            func(b []byte) []byte { b[4] = 2; return b },
		"kind":               func(b []byte) []byte { b[5] = 4; return b },
		"codec":              func(b []byte) []byte { b[6] = 3; return b },
		"another codec":      func(b []byte) []byte { b[6] = byte(CodecS2); return b },
		"reserved":           func(b []byte) []byte { b[7] = 1; return b },
		"odd offset":         func(b []byte) []byte { le.PutUint64(b[24:], 512); return b },
		"negative offset":    func(b []byte) []byte { le.PutUint64(b[24:], 1<<63); return b },
		"no length":          func(b []byte) []byte { le.PutUint32(b[32:], 0); return b },
		"odd length":         func(b []byte) []byte { le.PutUint32(b[32:], 8191); return b },
		"too long":           func(b []byte) []byte { le.PutUint32(b[32:], MaxDataFrameBytes+BlockSize); return b },
		"longer than it is":  func(b []byte) []byte { le.PutUint32(b[32:], 3*BlockSize); return b },
		"shorter than it is": func(b []byte) []byte { le.PutUint32(b[32:], BlockSize); return b },
		"payload beyond end": func(b []byte) []byte { le.PutUint32(b[36:], 1<<30); return b },
		"no payload":         func(b []byte) []byte { le.PutUint32(b[36:], 0); return b[:FrameHeaderBytes] },
		"zero with payload":  func(b []byte) []byte { b[5], b[6] = byte(FrameZero), 0; return b },
		"raw, too short":     func(b []byte) []byte { b[6] = 0; return b },
	}
	d, _ := NewDecompressor(1)
	for name, f := range change {
		bad := reseal(f(AppendFrames(nil, FrameMeta{1, 1, 1}, 0, text, c)))
		got, err := NewFrameReader(bad).Next()
		if err == nil {
			err = d.Decode(make([]byte, got.Length), got)
		}
		if !errors.Is(err, ErrBadFrame) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A payload that would unpack to far more than its frame says is refused
// without taking the memory.
func TestBombsTakeNoMemory(t *testing.T) {
	const bomb = 2*MaxDataFrameBytes - BlockSize
	d, err := NewDecompressor(1)
	if err != nil {
		t.Fatal(err)
	}
	dst := make([]byte, BlockSize)
	for _, codec := range []Codec{CodecS2, CodecZstd} {
		c, err := NewCompressor(codec)
		if err != nil {
			t.Fatal(err)
		}
		payload, _ := c.appendTo(nil, make([]byte, bomb))
		f := Frame{Kind: FrameData, Codec: codec, Length: BlockSize, Payload: payload}
		if err := d.Decode(dst, f); !errors.Is(err, ErrBadFrame) { // also warms it up
			t.Fatalf("%v: %v", codec, err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range 8 {
			if err := d.Decode(dst, f); !errors.Is(err, ErrBadFrame) {
				t.Fatalf("%v: %v", codec, err)
			}
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > bomb {
			t.Errorf("%v: 8 bombs of %d bytes took %d bytes", codec, bomb, n)
		}
	}
}

func TestStreamDigestSeesOrderAndLoss(t *testing.T) {
	m := FrameMeta{1, 1, 1}
	a := AppendZeroFrames(nil, m, Range{0, 4096})
	b := AppendZeroFrames(nil, m, Range{4096, 4096})
	sum := func(frames ...[]byte) StreamSum {
		d := NewStreamDigest()
		for _, f := range frames {
			if err := d.AddFrames(f); err != nil {
				t.Fatal(err)
			}
		}
		return d.Sum()
	}
	ab := sum(a, b)
	if ab.Frames != 2 || ab != sum(append(bytes.Clone(a), b...)) {
		t.Error("the same frames, other sums")
	}
	if ab == sum(b, a) || ab == sum(a) || ab == sum(a, b, b) {
		t.Error("other frames, the same sum")
	}
}

// FuzzFrames feeds the reader and the decompressor anything: they must not
// crash, write beyond, or take memory by what the bytes claim.
func FuzzFrames(f *testing.F) {
	text := bytes.Repeat([]byte("seed of a fuzzer"), 2*BlockSize/16)
	for _, codec := range []Codec{CodecNone, CodecS2, CodecZstd} {
		c, err := NewCompressor(codec)
		if err != nil {
			f.Fatal(err)
		}
		b := AppendFrames(nil, FrameMeta{5, 1, 2}, 1<<20, text, c)
		f.Add(AppendZeroFrames(b, FrameMeta{5, 1, 2}, Range{0, 1 << 20}))
	}
	f.Add(appendHeader(nil, FrameMeta{1, 1, 1}, FrameDiscard, CodecNone, 0, 4096, nil))
	d, err := NewDecompressor(1)
	if err != nil {
		f.Fatal(err)
	}
	out := make([]byte, MaxDataFrameBytes+1)
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, sealed := range []bool{false, true} {
			if sealed {
				if len(b) < FrameHeaderBytes {
					return
				}
				b = reseal(bytes.Clone(b))
			}
			for r := NewFrameReader(b); r.More(); {
				fr, err := r.Next()
				if err != nil {
					if !errors.Is(err, ErrBadFrame) {
						t.Fatal(err)
					}
					break
				}
				if fr.Offset < 0 || fr.Offset%BlockSize != 0 || fr.Length <= 0 || fr.Length%BlockSize != 0 || fr.Length > MaxZeroFrameBytes {
					t.Fatalf("accepted %+v", fr)
				}
				if fr.Kind == FrameData {
					out[fr.Length] = 0xa5
					if err := d.Decode(out[:fr.Length], fr); err != nil && !errors.Is(err, ErrBadFrame) {
						t.Fatal(err)
					}
					if out[fr.Length] != 0xa5 {
						t.Fatal("written beyond the length")
					}
				}
			}
		}
	})
}

func BenchmarkAppendFrames(b *testing.B) {
	image := testImage(rand.New(rand.NewPCG(1, 1)), 1024)
	for _, codec := range []Codec{CodecNone, CodecS2, CodecZstd} {
		c, _ := NewCompressor(codec)
		b.Run(codec.String(), func(b *testing.B) {
			b.SetBytes(int64(len(image)))
			var buf []byte
			for b.Loop() {
				buf = AppendFrames(buf[:0], FrameMeta{1, 1, 1}, 0, image, c)
			}
		})
	}
}

// What does not shrink is soon not packed any more, and is tried again later.
func TestCompressorGivesUpForAWhile(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	noise := make([]byte, DefaultDataFrameBytes)
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	text := bytes.Repeat([]byte("text"), len(noise)/4)
	for _, codec := range []Codec{CodecS2, CodecZstd} {
		c := compressor(t, codec)
		packs := func() bool {
			_, with := c.appendTo(nil, text)
			return with == codec
		}
		if !packs() {
			t.Fatalf("%v: text is not packed", codec)
		}
		for range 2 * packJudgeBytes / len(noise) {
			c.appendTo(nil, noise)
		}
		if packs() {
			t.Errorf("%v: goes on trying after %d bytes of noise", codec, 2*packJudgeBytes)
		}
		for range packSkipBytes / len(text) {
			packs()
		}
		for range packJudgeBytes / len(text) {
			if !packs() {
				t.Fatalf("%v: text is not packed any more", codec)
			}
		}
		if !packs() {
			t.Errorf("%v: text that shrinks is let pass", codec)
		}
	}
}
