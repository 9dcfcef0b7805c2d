package attach

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/bpf"
	"blockferry/blockdev/deadman"
)

// deadmanVar makes this test binary a dead-man; the value is the folder of its notes.
const deadmanVar = "BLOCKFERRY_TEST_DEADMAN"

func TestMain(m *testing.M) {
	var err error
	switch {
	case os.Getenv(deadmanVar) != "":
		err = deadman.Run(os.Stdin, os.Getenv(deadmanVar))
	case os.Getenv(freezerVar) != "":
		err = freezeAndWait(os.Getenv(freezerVar))
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func newGuard(notes string) (*deadman.Guard, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return deadman.NewGuard(deadman.GuardOptions{Notes: notes, Command: []string{"/usr/bin/env", "-u", freezerVar, deadmanVar + "=" + notes, self}})
}

// rig is a loop device, and what is needed to attach it.
type rig struct {
	t       testing.TB
	device  string
	options Options
	number  uint64 // of the last cut
}

// newRig makes a device of the given size; a blank one.
func newRig(t testing.TB, size int64) *rig { return newRigOn(t, blocktest.Loop(t, size)) }

func newRigOn(t testing.TB, device string) *rig {
	t.Helper()
	pin := blocktest.PinDir(t)
	g, err := newGuard(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	r := &rig{t: t, device: device}
	r.options = Options{Name: "data", Device: r.device, StateFile: filepath.Join(t.TempDir(), "state"), PinDir: pin, Guard: g,
		StallLimit: 10 * time.Second, Log: slog.New(slog.NewTextHandler(testLog{t}, nil))}
	return r
}

type testLog struct{ t testing.TB }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Helper()
	l.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

// open attaches until the test ends, or Close.
func (r *rig) open() *Attached {
	r.t.Helper()
	a, err := Open(r.options)
	if err != nil {
		r.t.Fatal(err)
	}
	var once sync.Once
	r.t.Cleanup(func() { once.Do(func() { a.Close() }) })
	return a
}

// refused says that Open fails with an error of a kind, which names what stands
// in the way, and leaves no state file.
func (r *rig) refused(kind error, words ...string) {
	r.t.Helper()
	a, err := Open(r.options)
	if err == nil {
		a.Close()
		r.t.Fatalf("attached, want a refusal that names %v", words)
	}
	for _, w := range words {
		if !errors.Is(err, kind) || !bytes.Contains([]byte(err.Error()), []byte(w)) {
			r.t.Errorf("want %v and '%s': %v", kind, w, err)
		}
	}
	if _, err := os.Stat(r.options.StateFile); err == nil {
		r.t.Error("refused, and yet there is a state file")
	}
}

// base seals a cut without an image.
func (r *rig) base(a *Attached) uint64 {
	r.t.Helper()
	var err error
	for range 20 { // the statistics may not stand still for it
		r.number++
		if _, err = a.Cut(r.t.(interface{ Context() context.Context }).Context(), r.number, Want{}); err == nil {
			return r.number
		}
	}
	r.t.Fatal(err)
	return 0
}

func (r *rig) cut(a *Attached, since uint64) (*Cut, error) {
	r.number++
	return a.Cut(r.t.(interface{ Context() context.Context }).Context(), r.number, Want{View: true, Since: since, Force: true})
}

// mustCut takes one that is valid; void ones are tried again.
func (r *rig) mustCut(a *Attached, since uint64) *Cut {
	r.t.Helper()
	c, err := r.cut(a, since)
	for try := 0; err != nil && try < 5 && !errors.Is(err, ErrTrackingLost) && !errors.Is(err, ErrUser); try++ {
		r.t.Logf("again: %v", err)
		c, err = r.cut(a, since)
	}
	if errors.Is(err, bpf.ErrUncovered) {
		lostEvents.Add(1)
		r.t.Skipf("begun anew: %v", err)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

// lostEvents counts the cuts of tests for which the kernel had lost events.
var lostEvents atomic.Int64

// unlessLost runs a test again in which events were lost, and said to be. If they
// are each time it fails.
func unlessLost(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	for range 5 {
		before := lostEvents.Load()
		t.Run("try", test)
		if lostEvents.Load() == before {
			return
		}
	}
	t.Error("events were lost each time")
}

// image is a copy of the device, brought up to date cut by cut.
type image struct {
	t    testing.TB
	path string
	at   uint64
}

// newImage copies the live device after a cut without a view.
func (r *rig) newImage(a *Attached) *image {
	r.t.Helper()
	file, err := os.CreateTemp("/dev/shm", "blockferry-image-*")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { os.Remove(file.Name()) })
	defer file.Close()
	i := &image{r.t, file.Name(), r.base(a)}
	if err := file.Truncate(a.Size()); err != nil {
		r.t.Fatal(err)
	}
	i.copy(a, file, []blockdev.Extent{{Offset: 0, Length: a.Size()}})
	return i
}

func (i *image) copy(from io.ReaderAt, to *os.File, list []blockdev.Extent) {
	i.t.Helper()
	buffer := blockdev.AlignedBuffer(1 << 20)
	for _, e := range list {
		for at := e.Offset; at < e.End(); at += int64(len(buffer)) {
			b := buffer[:min(int64(len(buffer)), e.End()-at)]
			if _, err := from.ReadAt(b, at); err != nil {
				i.t.Fatal(err)
			}
			if allZero(b) {
				if err := unix.Fallocate(int(to.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, int64(len(b))); err != nil {
					i.t.Fatal(err)
				}
				continue
			}
			if _, err := to.WriteAt(b, at); err != nil {
				i.t.Fatal(err)
			}
		}
	}
}

// apply brings it from its cut to a later one and releases that.
func (i *image) apply(c *Cut) {
	i.t.Helper()
	list, err := c.Changed(i.at)
	if err != nil {
		i.t.Fatal(err)
	}
	file, err := os.OpenFile(i.path, os.O_RDWR, 0)
	if err != nil {
		i.t.Fatal(err)
	}
	defer file.Close()
	i.copy(c.View(), file, list)
	if err := errors.Join(c.Valid(), c.Release()); err != nil {
		i.t.Fatal(err)
	}
	i.at = c.Number()
}

// mounted hands a copy's files to fn, after its log was replayed; the copy is
// checked before and after.
func (i *image) mounted(kind string, fn func(dir string)) {
	i.t.Helper()
	copyPath := i.path + ".copy"
	defer os.Remove(copyPath)
	blocktest.Command(i.t, "cp", "--sparse=always", i.path, copyPath)
	options := "noatime"
	if kind == "xfs" {
		options = "nouuid,noatime"
	}
	dir := i.t.TempDir()
	blocktest.Command(i.t, "mount", "-o", "loop,"+options, "-t", kind, copyPath, dir)
	func() {
		defer blocktest.Command(i.t, "umount", dir)
		fn(dir)
	}()
	if kind == "xfs" {
		blocktest.Command(i.t, "xfs_repair", "-n", copyPath)
	} else {
		blocktest.Command(i.t, "e2fsck", "-fn", copyPath)
	}
}

// fileWriter writes numbered blocks to a file of its own, each acknowledged before
// the next is issued, round and round.
type fileWriter struct {
	seed   uint32
	blocks int64
	direct bool
	acked  atomic.Uint64
	gap    atomic.Int64 // the longest that a write took
}

const writtenBlock = 4096

// fill makes the content of write k.
func (w *fileWriter) fill(b []byte, k uint64) {
	for at := 0; at < len(b); at += 8 {
		binary.LittleEndian.PutUint64(b[at:], k<<16^uint64(w.seed)<<8^uint64(at/8))
	}
	binary.LittleEndian.PutUint64(b[0:], k)
	binary.LittleEndian.PutUint32(b[8:], crc32.ChecksumIEEE(b[12:])^w.seed)
}

// place is where write k goes.
func (w *fileWriter) place(k uint64) int64 {
	return int64(k*7919%uint64(w.blocks)) * writtenBlock
}

func (w *fileWriter) run(path string, stopping *atomic.Bool, pause time.Duration) error {
	flags := os.O_RDWR | os.O_CREATE
	if w.direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	b := blockdev.AlignedBuffer(writtenBlock)
	for k := uint64(1); !stopping.Load(); k++ {
		w.fill(b, k)
		start := time.Now()
		if _, err := f.WriteAt(b, w.place(k)); err != nil {
			return err
		}
		w.gap.Store(max(w.gap.Load(), int64(time.Since(start))))
		w.acked.Store(k)
		time.Sleep(pause)
	}
	return nil
}

// judge finds the K for which the file holds all writes up to K and none after.
func (w *fileWriter) judge(path string) (uint64, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	if size := w.blocks * writtenBlock; int64(len(content)) < size {
		content = append(content, make([]byte, size-int64(len(content)))...)
	}
	found := make([]uint64, w.blocks)
	var newest uint64
	want := make([]byte, writtenBlock)
	for i := range found {
		b := content[int64(i)*writtenBlock:][:writtenBlock]
		if allZero(b) {
			continue
		}
		k := binary.LittleEndian.Uint64(b)
		if w.fill(want, k); !bytes.Equal(want, b) || w.place(k) != int64(i)*writtenBlock {
			return 0, fmt.Errorf("%s: block %d holds what no write left there", path, i)
		}
		found[i], newest = k, max(newest, k)
	}
	for i := range found {
		// The last write to block i among those up to newest.
		last := uint64(0)
		for k := newest; k > 0 && k+uint64(w.blocks) > newest; k-- {
			if w.place(k) == int64(i)*writtenBlock {
				last = k
				break
			}
		}
		if found[i] != last {
			return 0, fmt.Errorf("%s: torn: it holds write %d, and in block %d write %d in place of %d", path, newest, i, found[i], last)
		}
	}
	return newest, nil
}

// writers are several, in a folder.
type writers struct {
	t        testing.TB
	list     []*fileWriter
	dir      string
	stopping atomic.Bool
	group    sync.WaitGroup
}

func startWriters(t testing.TB, dir string, direct bool, pause time.Duration) *writers {
	w := &writers{t: t, dir: dir}
	for seed := range uint32(2) {
		f := &fileWriter{seed: seed + 1, blocks: 997, direct: direct}
		w.list = append(w.list, f)
		w.group.Go(func() {
			if err := f.run(w.name(f), &w.stopping, pause); err != nil {
				t.Errorf("writer: %v", err)
			}
		})
	}
	t.Cleanup(w.stop)
	return w
}

func (w *writers) name(f *fileWriter) string {
	return filepath.Join(w.dir, fmt.Sprint("file ", f.seed))
}

func (w *writers) stop() {
	w.stopping.Store(true)
	w.group.Wait()
}

func (w *writers) acked() (list []uint64) {
	for _, f := range w.list {
		list = append(list, f.acked.Load())
	}
	return list
}

// await waits until each has gone on by so many writes.
func (w *writers) await(n uint64) {
	w.t.Helper()
	before := w.acked()
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(time.Millisecond) {
		done := true
		for i, k := range w.acked() {
			done = done && k >= before[i]+n
		}
		if done {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatal("the writers do not go on")
		}
	}
}

// judge judges each one's file in dir: all that was acknowledged before, nothing
// after the end that is given.
func (w *writers) judge(dir string, atLeast, atMost []uint64) {
	w.t.Helper()
	for i, f := range w.list {
		k, err := f.judge(filepath.Join(dir, filepath.Base(w.name(f))))
		if err != nil {
			w.t.Fatal(err)
		}
		if k < atLeast[i] || k > atMost[i]+1 {
			w.t.Fatalf("writer %d: the image holds the writes up to %d, want %d to %d", f.seed, k, atLeast[i], atMost[i]+1)
		}
	}
}
