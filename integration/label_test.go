package integration

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"strings"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
)

// labelSlot is where a slot of the label begins, as in blockdev/volume/label.go.
func labelSlot(slot uint64) int64 { return int64(slot%2) * 512 << 10 }

// labelNumber is the number of the label that counts.
func labelNumber(t *testing.T, device string) uint64 {
	t.Helper()
	f, err := blockdev.OpenFile(device, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := volume.ReadLabel(f)
	if err != nil || l.Damage != "" {
		t.Fatal(l, err)
	}
	return l.Sequence
}

// flushesOf is how many flushes a disk has done.
func flushesOf(t *testing.T, disk string) uint64 {
	t.Helper()
	path := "/sys/block/" + strings.TrimPrefix(disk, "/dev/") + "/stat"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n, ok := blockdev.StatField(text, 16)
	if !ok {
		t.Fatalf("%s holds '%s': no count of flushes", path, text)
	}
	return n
}

// Whoever takes a volume over that is up makes the label it goes by durable: the
// flush of its last write may have failed.
func TestUpKeepsTheLabel(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 96 << 20}, {Size: 64 << 20}}}, func(t *testing.T) {
		// The marks elsewhere: their commits flush, too.
		format(t, volume.FormatOptions{Device: ubd(0), MetaDevice: ubd(1), SizeBytes: testSize})
		o := volume.Options{Device: ubd(0), MetaDevice: ubd(1)}
		if err := up(t, mapper(t), o).Close(); err != nil {
			t.Fatal(err)
		}
		number, before := labelNumber(t, ubd(0)), flushesOf(t, ubd(0))
		up(t, mapper(t), o)
		written, flushed := labelNumber(t, ubd(0))-number, flushesOf(t, ubd(0))-before
		if flushed <= written {
			t.Errorf("%d labels were written, and %d flushed: the one that was there was not", written, flushed)
		}
	})
}

// An agent that was killed between the two writes that say that the volume takes
// discards leaves that in one slot, below a volume that is up. The next completes it.
func TestDiscardsAreInBothSlots(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}, Modules: []string{"loop"}}, func(t *testing.T) {
		device, _ := thinDisk(t, 128<<20)
		format(t, volume.FormatOptions{Device: device, SizeBytes: testSize})
		o := volume.Options{Device: device}
		if err := up(t, mapper(t), o).Close(); err != nil {
			t.Fatal(err)
		}
		f, err := blockdev.OpenFile(device, blockdev.OpenOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		head := func(slot uint64) []byte {
			b := alignedBuffer(blockdev.BlockSize)
			if _, err := f.ReadAt(b, labelSlot(slot)); err != nil {
				t.Fatal(err)
			}
			return b
		}
		const version, length, sum, flags, discards = 8, 12, 16, 120, 8
		older := labelNumber(t, device) - 1
		b := head(older)
		if n := binary.LittleEndian.Uint32(b[length:]); n != blockdev.BlockSize || b[version] != 3 || b[flags]&discards == 0 {
			t.Fatalf("a label of %d bytes, version %d, flags %#x: this test checks nothing", n, b[version], b[flags])
		}
		b[version], b[flags] = 1, b[flags]&^discards
		clear(b[sum : sum+4])
		binary.LittleEndian.PutUint32(b[sum:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
		if _, err := f.WriteAt(b, labelSlot(older)); err != nil {
			t.Fatal(err)
		}
		if n := labelNumber(t, device); n != older+1 {
			t.Fatalf("label %d counts, want %d", n, older+1)
		}
		up(t, mapper(t), o)
		var got []string
		for slot := range uint64(2) {
			b := head(slot)
			got = append(got, fmt.Sprint(b[version], b[flags]&discards != 0))
		}
		if got[0] != "3 true" || got[1] != "3 true" {
			t.Errorf("version, and discards, of the slots: %v", got)
		}
	})
}
