package volume

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
)

func TestInspectFindsBlankOnlyWhatIs(t *testing.T) {
	const size = 16 << 20
	put := func(at int64, b string) func(*blocktest.Memory) {
		return func(d *blocktest.Memory) {
			block := make([]byte, 4096)
			copy(block[at%4096:], b)
			d.WriteAt(block, at&^4095)
		}
	}
	for _, c := range []struct {
		name string
		do   func(*blocktest.Memory)
		want Content
		why  string
	}{
		{"zeros", func(*blocktest.Memory) {}, Blank, "1000 sampled places are zero"},
		{"label", func(d *blocktest.Memory) { writeLabel(d, sampleLabel(t)) }, Labelled, "label of volume"},
		{"bad label", put(0, labelMagic), Unknown, "damaged"},
		{"bad label, slot B", put(slotStride, labelMagic), Unknown, "damaged"},
		{"xfs", put(0, "XFSB"), Foreign, "XFS"},
		{"ext4", put(1080, "\x53\xef"), Foreign, "ext4"},
		{"lvm", put(512, "LABELONE"), Foreign, "LVM"},
		{"md", put(4096, "\xfc\x4e\x2b\xa9"), Foreign, "md RAID"},
		{"swap", put(4086, "SWAPSPACE2"), Foreign, "swap"},
		{"gpt", put(512, "EFI PART"), Foreign, "GPT"},
		{"mbr", put(510, "\x55\xaa"), Foreign, "MBR"},
		{"end", put(size-1, "x"), Foreign, "byte 16777215"},
		{"label's place", put(slotStride+5000, "x"), Foreign, "content"},
		{"read fails", func(d *blocktest.Memory) { d.FailAt(blocktest.OpRead, 1, errors.New("no")) }, Unknown, "no"},
		{"late read fails", func(d *blocktest.Memory) { d.FailAt(blocktest.OpRead, 900, errors.New("no")) }, Unknown, "no"},
	} {
		d := blocktest.NewMemory(size)
		c.do(d)
		got, why := Inspect(d)
		if got != c.want || !strings.Contains(why, c.why) {
			t.Errorf("%s: got %s, '%s'; want %s, '%s'", c.name, got, why, c.want, c.why)
		}
	}
}

// Content in the middle is found when it is at all common: a place of every
// thousandth of the device is looked at.
func TestInspectSamplesTheWhole(t *testing.T) {
	const size = 64 << 20
	for _, at := range []int64{2 << 20, 30 << 20, 60 << 20} {
		d := blocktest.NewMemory(size)
		block := make([]byte, size/1000*3&^4095)
		for i := range block {
			block[i] = 1
		}
		d.WriteAt(block, at)
		if got, why := Inspect(d); got != Foreign {
			t.Errorf("content at %d: %s, %s", at, got, why)
		}
	}
}

// A program that has the disk for a moment is waited for where that is asked.
func TestFormatWaits(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(disk, nil, 0o600), os.Truncate(disk, 64<<20)); err != nil {
		t.Fatal(err)
	}
	holder, err := blockdev.OpenFile(disk, blockdev.OpenOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Format(FormatOptions{Device: disk}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a disk in use: %v, want EBUSY", err)
	}
	closed := make(chan error, 1)
	time.AfterFunc(200*time.Millisecond, func() { closed <- holder.Close() })
	if _, err := Format(FormatOptions{Device: disk, Wait: time.Minute}); err != nil {
		t.Error(err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}
