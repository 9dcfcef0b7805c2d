package integration

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// history is an endless sequence of numbered writes to a device, all of which
// follow from its fields. Because it can be told again at any time, any image
// of the device can be judged without a log of what was written.
type history struct {
	Seed uint64
	Size int64 // of the device, in bytes; a multiple of 512
	// At is where on the device the history's part of it begins, if it has only a
	// part: Size bytes.
	At int64
	// MaxBytes is the largest write, at most maxWriteBytes; default that.
	MaxBytes int64
	// Span, if set, keeps all writes within the device's first Span bytes.
	Span int64
	// Pause is how long the writer waits after each write.
	Pause time.Duration
	// FlushEvery, if set, has the writer flush after every so many writes.
	FlushEvery uint64
}

const (
	sector        = 512
	maxWriteBytes = 4 << 20
)

// operation is one numbered write. A zero operation writes zeros.
type operation struct {
	Offset, Length int64
	Zero           bool
}

// mix is a bijection that spreads bits (splitmix64's finisher).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// op is the k-th write, k from 1. Lengths are 512 B to MaxBytes, small ones
// more often; one write in 16 is of zeros; one in 4 is aligned to 512 bytes
// only, the others to 4096.
func (h history) op(k uint64) operation {
	r := mix(h.Seed ^ mix(k))
	draw := func(n uint64) uint64 { r = mix(r); return r % n }
	largest := h.MaxBytes
	if largest == 0 {
		largest = maxWriteBytes
	}
	span := h.Size
	if h.Span != 0 {
		span = min(span, h.Span)
	}
	largest = min(largest, span)
	align := int64(4096)
	if draw(4) == 0 || span < 4096 {
		align = sector
	}
	// Up to 64 KiB mostly; one write in 64 may be as large as allowed.
	limit := min(largest, 64<<10)
	if draw(64) == 0 {
		limit = largest
	} else if draw(2) == 0 {
		limit = min(largest, 4096)
	}
	length := (int64(draw(uint64(limit))) + align) / align * align
	length = min(length, span/align*align)
	offset := int64(draw(uint64((span-length)/align+1))) * align
	return operation{Offset: offset, Length: length, Zero: draw(16) == 0}
}

// fillSector makes the content of one sector as write k leaves it: seed,
// number and place in front, then noise that follows from them.
func (h history) fillSector(into []byte, k uint64, index int64) {
	binary.LittleEndian.PutUint64(into[0:], h.Seed)
	binary.LittleEndian.PutUint64(into[8:], k)
	binary.LittleEndian.PutUint64(into[16:], uint64(index))
	noise := mix(h.Seed^mix(k)^uint64(index)<<20) | 1
	for at := 24; at < sector; at += 8 {
		noise ^= noise << 13
		noise ^= noise >> 7
		noise ^= noise << 17
		binary.LittleEndian.PutUint64(into[at:], noise)
	}
}

// fill makes the content of operation k.
func (h history) fill(buffer []byte, k uint64, op operation) {
	if op.Zero {
		clear(buffer[:op.Length])
		return
	}
	for at := int64(0); at < op.Length; at += sector {
		h.fillSector(buffer[at:at+sector], k, (op.Offset+at)/sector)
	}
}

// sectorNumber says which write a sector's content is from: 0 for zeros. An
// error means that no write of this history left it so.
func (h history) sectorNumber(content []byte, index int64, scratch []byte) (uint64, error) {
	if allZero(content) {
		return 0, nil
	}
	k := binary.LittleEndian.Uint64(content[8:])
	h.fillSector(scratch, k, index)
	if string(scratch) != string(content) {
		return 0, fmt.Errorf("sector %d holds what no write left there (seed %#x, number %d, place %d in its head)", index,
			binary.LittleEndian.Uint64(content), k, binary.LittleEndian.Uint64(content[16:]))
	}
	return k, nil
}

// writer writes a history, each write acknowledged before the next is issued.
type writer struct {
	issuedK, ackedK, flushedK atomic.Uint64
	slowest                   atomic.Int64 // the longest that a write took, in nanoseconds
	stopping                  atomic.Bool
	done                      chan struct{}
	err                       error // valid after done
	// first is the number of its first write, begun when each was begun, ended when
	// it was acknowledged; valid after done.
	first        uint64
	begun, ended []time.Time
}

// startWriter begins to write a history at number from (1 for a fresh device)
// with O_DIRECT. It ends with the test, or by stop.
func startWriter(t *testing.T, device string, h history, from uint64) *writer {
	t.Helper()
	file, err := os.OpenFile(device, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	w := &writer{done: make(chan struct{}), first: from}
	w.issuedK.Store(from - 1)
	w.ackedK.Store(from - 1)
	w.flushedK.Store(from - 1)
	go func() {
		defer close(w.done)
		w.err = errors.Join(w.writeAll(file, h, from), file.Close())
	}()
	t.Cleanup(func() { w.stopping.Store(true); <-w.done })
	return w
}

func (w *writer) writeAll(file *os.File, h history, from uint64) error {
	buffer := alignedBuffer(maxWriteBytes)
	for k := from; !w.stopping.Load(); k++ {
		op := h.op(k)
		h.fill(buffer, k, op)
		w.begun = append(w.begun, time.Now())
		w.issuedK.Store(k)
		if _, err := file.WriteAt(buffer[:op.Length], h.At+op.Offset); err != nil {
			return fmt.Errorf("write %d: %w", k, err)
		}
		w.ended = append(w.ended, time.Now())
		w.ackedK.Store(k)
		w.slowest.Store(max(w.slowest.Load(), int64(time.Since(w.begun[len(w.begun)-1]))))
		if h.FlushEvery > 0 && k%h.FlushEvery == 0 {
			if err := file.Sync(); err != nil {
				return fmt.Errorf("flush after write %d: %w", k, err)
			}
			w.flushedK.Store(k)
		}
		if h.Pause > 0 {
			time.Sleep(h.Pause)
		}
	}
	return nil
}

// acked is the last write that was acknowledged: an image cut from now on
// holds it. issued is the last one begun: an image cut by now holds none
// after it.
func (w *writer) acked() uint64  { return w.ackedK.Load() }
func (w *writer) issued() uint64 { return w.issuedK.Load() }

// flushed is the last write that survives a power cut in any case, if all
// before the writer's first did.
func (w *writer) flushed() uint64 { return w.flushedK.Load() }

// awaitWrites waits until n more writes are acknowledged.
func (w *writer) awaitWrites(t *testing.T, n uint64) {
	t.Helper()
	for goal := w.acked() + n; w.acked() < goal; {
		select {
		case <-w.done:
			t.Fatalf("writer ended after write %d: %v", w.acked(), w.err)
		default:
			time.Sleep(time.Millisecond)
		}
	}
}

// takeSlowest is the longest that a write took since it was last asked.
func (w *writer) takeSlowest() time.Duration { return time.Duration(w.slowest.Swap(0)) }

// stop ends the writer after the write in progress and returns the last one's
// number. A failed write fails the test.
func (w *writer) stop(t *testing.T) uint64 {
	t.Helper()
	w.stopping.Store(true)
	<-w.done
	if w.err != nil {
		t.Fatalf("writer: %v", w.err)
	}
	return w.acked()
}

// verdict is what an image of a history turned out to hold.
type verdict struct {
	// K: all writes up to K are in, none after. The writes from there to
	// Latest, if any, were of zeros onto zeros: they may be in as well.
	K, Latest uint64
	// Partial: of write K+1, which was in progress, some sectors are in. Only
	// a write of more than 4096 bytes may be seen so.
	Partial bool
}

// judgeImage finds the K for which an image holds all of a history's writes up
// to K and none after; an error says that there is none: the image is torn.
func judgeImage(image io.ReaderAt, h history) (verdict, error) {
	found := make([]uint64, h.Size/sector) // per sector, the write it is from
	var newest uint64
	buffer := alignedBuffer(1 << 20)
	scratch := make([]byte, sector)
	for offset := int64(0); offset < h.Size; offset += int64(len(buffer)) {
		piece := buffer[:min(int64(len(buffer)), h.Size-offset)]
		if n, err := image.ReadAt(piece, offset); n < len(piece) {
			return verdict{}, fmt.Errorf("read %d bytes at %d: %w", len(piece), offset, err)
		}
		for at := int64(0); at < int64(len(piece)); at += sector {
			index := (offset + at) / sector
			k, err := h.sectorNumber(piece[at:at+sector], index, scratch)
			if err != nil {
				return verdict{}, err
			}
			found[index] = k
			newest = max(newest, k)
		}
	}
	return h.judge(found, newest)
}

// judge retells the history up to the newest write seen, then as far as zero
// writes, which leave no number, may have followed.
func (h history) judge(found []uint64, newest uint64) (verdict, error) {
	want := make([]uint64, len(found))
	wrong := 0 // sectors where found differs from want
	for _, k := range found {
		if k != 0 {
			wrong++
		}
	}
	apply := func(k uint64) {
		op := h.op(k)
		value := k
		if op.Zero {
			value = 0
		}
		for i := op.Offset / sector; i < (op.Offset+op.Length)/sector; i++ {
			if want[i] != found[i] {
				wrong--
			}
			want[i] = value
			if want[i] != found[i] {
				wrong++
			}
		}
	}
	// partial says whether the write in progress explains all that is wrong.
	partial := func(k uint64) bool {
		op := h.op(k)
		if wrong == 0 || op.Length <= 4096 {
			return false
		}
		explained := 0
		for i := op.Offset / sector; i < (op.Offset+op.Length)/sector; i++ {
			if found[i] == want[i] {
				continue
			}
			if found[i] != k && !(op.Zero && found[i] == 0) {
				return false
			}
			explained++
		}
		return explained == wrong
	}
	k := uint64(0)
	for ; k+1 < newest; k++ {
		apply(k + 1)
	}
	for ; wrong > 0 || k < newest; k++ {
		isPartial := partial(k + 1)
		if k >= newest && !isPartial && !h.op(k+1).Zero {
			return verdict{}, h.torn(found, want, wrong, newest)
		}
		apply(k + 1)
		if isPartial && wrong > 0 {
			return verdict{K: k, Latest: k, Partial: true}, nil
		}
	}
	return verdict{K: k, Latest: h.latest(found, k)}, nil
}

// latest skips the zero writes after k that changed nothing.
func (h history) latest(found []uint64, k uint64) uint64 {
	for ; ; k++ {
		op := h.op(k + 1)
		if !op.Zero {
			return k
		}
		for _, from := range found[op.Offset/sector : (op.Offset+op.Length)/sector] {
			if from != 0 {
				return k
			}
		}
	}
}

func (h history) torn(found, want []uint64, wrong int, newest uint64) error {
	for i := range found {
		if found[i] != want[i] {
			return fmt.Errorf("torn: newest write %d, %d sectors do not fit, first sector %d holds write %d, should hold %d",
				newest, wrong, i, found[i], want[i])
		}
	}
	return errors.New("torn")
}

// judgeDevice judges a device, read with O_DIRECT, and checks that its K lies
// between the given bounds, inclusive.
func judgeDevice(t *testing.T, device string, h history, atLeast, atMost uint64) verdict {
	t.Helper()
	file, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	v, err := judgeImage(io.NewSectionReader(file, h.At, h.Size), h)
	if err != nil {
		t.Fatalf("%s: %v", device, err)
	}
	if v.Latest < atLeast || v.K > atMost {
		t.Fatalf("%s holds the writes up to %d, should be between %d and %d", device, v.K, atLeast, atMost)
	}
	return v
}

// readDirect hands a device's content to fn piece by piece.
func readDirect(device string, fn func(offset int64, piece []byte) error) error {
	file, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	return readDirectTo(device, size, fn)
}

// readDirectTo is readDirect for the device's first size bytes.
func readDirectTo(device string, size int64, fn func(offset int64, piece []byte) error) error {
	file, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	buffer := alignedBuffer(1 << 20)
	defer unix.Munmap(buffer)
	for offset := int64(0); offset < size; offset += int64(len(buffer)) {
		piece := buffer[:min(int64(len(buffer)), size-offset)]
		if n, err := file.ReadAt(piece, offset); n < len(piece) {
			return fmt.Errorf("%s: read %d bytes at %d: %w", device, len(piece), offset, err)
		}
		if err := fn(offset, piece); err != nil {
			return err
		}
	}
	return nil
}

// alignedBuffer is memory that O_DIRECT takes. It is never given back.
func alignedBuffer(size int) []byte {
	buffer, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	return buffer
}

func allZero(b []byte) bool {
	for ; len(b) >= 8; b = b[8:] {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

func tryCommand(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}
