package volume

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/bpf"
	"blockferry/blockdev/precopy"
)

// still is a disk that nobody writes to, as a precopy.Stopper.
type still struct{}

func (still) Prepare(context.Context) error { return nil }
func (still) Stop(_ context.Context, _ time.Duration, inside func() error) (time.Duration, error) {
	return 0, inside()
}

// One epoch that is too large for memory gets a frozen view, and so says the log,
// once; the next is read into memory again, and only what changed in it.
func TestAnEpochTooLargeForMemory(t *testing.T) {
	const size = 16 << 20
	device := blocktest.Loop(t, size)
	tracker, err := bpf.Open(bpf.Target{Device: device, Length: size, Pin: filepath.Join(blocktest.PinDir(t), "pin")})
	if err != nil {
		t.Fatal(err)
	}
	defer tracker.Close()
	disk, err := blockdev.OpenFile(device, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	var log strings.Builder
	v := &Volume{log: slog.New(slog.NewTextHandler(&log, nil)), fine: &fineTracker{tracker: tracker}}
	v.engine, err = precopy.New(precopy.Options{Source: disk, Tracker: tracker, MemoryBytes: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer v.closePreCopy()
	file, err := os.OpenFile(device, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	write := func(offset, length int64) {
		t.Helper()
		content := blockdev.AlignedBuffer(int(length))
		for i := range content {
			content[i] = 7 // zeros would need no memory
		}
		if _, err := file.WriteAt(content, offset); err != nil {
			t.Fatal(err)
		}
	}
	number := uint64(0)
	// suspended is a cut as one with a view is for fine tracking.
	suspended := func() bool {
		tracker.ExchangeStopped()
		c := &Cut{volume: v, number: number}
		c.sealFine()
		return c.fine
	}
	for range 10 { // events may be lost: then once more
		number++
		if !suspended() {
			continue
		}
		write(0, 4<<20)
		number++
		_, err := v.engine.Cut(t.Context(), precopy.Request{Number: number, Since: number - 1}, still{})
		if !errors.Is(err, precopy.ErrTooMuch) {
			t.Logf("of 4 MiB: %v", err)
			continue
		}
		over := &Cut{volume: v, number: number, withView: true}
		if _, err := over.preCopy(t.Context(), Want{Since: number - 1, OnlyMemory: true}); !errors.Is(err, precopy.ErrTooMuch) || over.withView {
			t.Errorf("not to have a frozen view: %v, view %v", err, over.withView)
		}
		v.tooMuch = ""
		over.withView = true
		if done, err := over.preCopy(t.Context(), Want{Since: number - 1}); done || err != nil || !over.withView || !errors.Is(over.TooMuch(), precopy.ErrTooMuch) {
			t.Errorf("to have a frozen view: %v, %v, view %v, %v", done, err, over.withView, over.TooMuch())
		}
		if !suspended() {
			continue
		}
		write(8<<20, 4096)
		number++
		c, err := v.engine.Cut(t.Context(), precopy.Request{Number: number, Since: number - 1}, still{})
		if errors.Is(err, bpf.ErrUncovered) {
			t.Logf("of 4 KiB: %v", err)
			continue
		}
		if err != nil {
			t.Fatalf("the epoch after the large one: %v", err)
		}
		if got := c.Extents(); blockdev.Total(got) != 4096 || got[0].Offset != 8<<20 {
			t.Errorf("it holds %v", got)
		}
		v.noteImage(&Cut{volume: v, number: number}, nil)
		v.noteImage(&Cut{volume: v, number: number}, nil)
		text := log.String()
		if strings.Count(text, "cuts have a frozen view") != 1 || strings.Count(text, "cuts have no image") != 1 || strings.Count(text, "read into memory again") != 1 {
			t.Errorf("the log says:\n%s", text)
		}
		return
	}
	t.Fatal("events were lost each time")
}
