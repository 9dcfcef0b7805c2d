package integration

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
)

// writeAt writes a block through a path, past the page cache.
func writeAt(t *testing.T, path string, offset int64, value byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := alignedBuffer(4096)
	copy(b, bytes.Repeat([]byte{value}, len(b)))
	if _, err := f.WriteAt(b, offset); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// Promise 1: a volume that is down counts as unwritten since a cut only if the
// kernel's marks prove it.
func TestOfflineProof(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 96 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0)})
		unwritten := func(cut uint64) (bool, string) {
			t.Helper()
			o, err := volume.OpenOffline(ubd(0))
			if err != nil {
				t.Fatal(err)
			}
			defer o.Close()
			return o.UnwrittenSince(cut, "")
		}
		session := func(work func(v *volume.Volume)) {
			t.Helper()
			v := up(t, ctl, volume.Options{Device: ubd(0)})
			work(v)
			if _, err := volume.OpenOffline(ubd(0)); err == nil {
				t.Error("a disk whose volume is up was opened beside it")
			}
			if err := v.Down(); err != nil {
				t.Fatal(err)
			}
		}
		session(func(v *volume.Volume) {
			writeAt(t, v.Path(), 1<<20, 1)
			mustRelease(t, mustCut(t, v, 1, false))
		})
		if ok, why := unwritten(1); !ok {
			t.Errorf("after a cut and nothing else: %s", why)
		}
		if ok, _ := unwritten(2); ok {
			t.Error("a cut that never was is proven")
		}
		// Coming up and going down, and reading, is no write.
		session(func(v *volume.Volume) {
			if err := readDirect(v.Path(), func(int64, []byte) error { return nil }); err != nil {
				t.Fatal(err)
			}
		})
		if ok, why := unwritten(1); !ok {
			t.Errorf("after it was only read: %s", why)
		}
		// One block written after the cut, in a later start too, is found.
		session(func(v *volume.Volume) { writeAt(t, v.Path(), 3<<20, 2) })
		if ok, why := unwritten(1); ok || !strings.Contains(why, "may have been written") {
			t.Errorf("after a write: %v, %s", ok, why)
		}
		session(func(*volume.Volume) {})
		if ok, _ := unwritten(1); ok {
			t.Error("a write is forgotten by a start")
		}
	})
}

// What is changed after a restore, and only that, is named as changed since
// the cut restored.
func TestTrackingAfterRestore(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 96 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		label := format(t, volume.FormatOptions{Device: ubd(0), State: []byte("half")})
		o, err := volume.OpenOffline(ubd(0))
		if err != nil {
			t.Fatal(err)
		}
		image := bytes.Repeat([]byte{7}, 1<<20)
		if _, err := o.WriteAt(image, 8<<20); err != nil {
			t.Fatal(err)
		}
		if _, err := o.WriteAt(image, o.Size()); !errors.Is(err, blockdev.ErrRange) {
			t.Errorf("written behind the volume's end: %v", err)
		}
		if err := errors.Join(o.Flush(), o.SetState([]byte("whole")), o.Close()); err != nil {
			t.Fatal(err)
		}
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		if string(v.State()) != "whole" {
			t.Errorf("state %q", v.State())
		}
		got := make([]byte, 1<<20)
		if _, err := v.ReadAt(got, 8<<20); err != nil || !bytes.Equal(got, image) {
			t.Errorf("what was restored is not what the volume holds: %v", err)
		}
		writeAt(t, v.Path(), 2<<20, 1) // before the volume is told
		if err := v.Restored(41, volume.NewUUID()); !errors.Is(err, volume.ErrTrackingLost) {
			t.Errorf("marks of another metadata: %v", err)
		}
		if err := v.Restored(41, label.EraID); err != nil {
			t.Fatal(err)
		}
		if err := v.Restored(40, label.EraID); err == nil {
			t.Error("told twice")
		}
		writeAt(t, v.Path(), 20<<20, 1)
		c := mustCut(t, v, 42, false)
		changed := mustChanged(t, c, 41)
		// This disk takes discards, so the block behind a marked one counts, too.
		if want := []blockdev.Extent{{Offset: 2 << 20, Length: 128 << 10}, {Offset: 20 << 20, Length: 128 << 10}}; len(changed) != 2 || changed[0] != want[0] || changed[1] != want[1] {
			t.Errorf("changed since the restore: %v, want %v", changed, want)
		}
		if _, err := c.Changed(40); !errors.Is(err, volume.ErrTrackingLost) {
			t.Errorf("changed since before the restore: %v", err)
		}
		mustRelease(t, c)
	})
}
