package integration

import (
	"errors"
	"strings"
	"testing"

	"blockferry/blockdev/volume"
)

func TestStackNoticesSwappedMetadata(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}, {Size: 16 << 20}, {Size: 128 << 20}, {Size: 16 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), MetaDevice: ubd(1), SizeBytes: testSize})
		o := volume.Options{Device: ubd(0), MetaDevice: ubd(1), Guard: guard(t)}
		number := uint64(0)
		// round takes two cuts with a write between, and says what an Up after
		// change finds.
		round := func(what string, change func(), lost string) {
			t.Helper()
			v := up(t, ctl, o)
			number++
			before := number
			mustRelease(t, mustCut(t, v, number, false))
			mustWriteBlock(t, v.Path(), 1<<20, byte(number))
			if err := v.Down(); err != nil {
				t.Fatal(err)
			}
			change()
			v = up(t, ctl, o)
			number++
			c := mustCut(t, v, number, false)
			list, err := c.Changed(before)
			if lost == "" {
				if err != nil || v.TrackingLost() != "" || !names(list, 1<<20) {
					t.Errorf("%s: %v, %v, lost '%s'", what, list, err, v.TrackingLost())
				}
			} else if !errors.Is(err, volume.ErrTrackingLost) || !strings.Contains(v.TrackingLost(), lost) {
				t.Errorf("%s: %v, %v, lost '%s'; want '%s'", what, list, err, v.TrackingLost(), lost)
			}
			mustRelease(t, c)
			if err := v.Down(); err != nil {
				t.Fatal(err)
			}
		}
		dd := func(args ...string) {
			t.Helper()
			run(t, "dd", append([]string{"bs=4k", "conv=fsync", "status=none"}, args...)...)
		}
		round("nothing", func() {}, "")
		round("superblock zeroed", func() { dd("if=/dev/zero", "of="+ubd(1), "seek=1", "count=1") }, "emptied")
		round("all zeroed", func() { dd("if=/dev/zero", "of="+ubd(1), "count=4096") }, "no identity")
		round("damaged", func() { dd("if=/dev/urandom", "of="+ubd(1), "seek=1", "count=1") }, "damaged")
		round("nothing again", func() {}, "")
		// An older state of the right metadata: its marks end too early.
		dd("if="+ubd(1), "of=/run/old", "iflag=direct")
		round("nothing more", func() {}, "")
		round("went back in time", func() { dd("if=/run/old", "of="+ubd(1), "oflag=direct") }, "went back in time")
		// The SSD came back empty while its metadata survived.
		dd("if=/dev/zero", "of="+ubd(0), "count=512")
		if _, err := tryUp(t, ctl, o); !errors.Is(err, volume.ErrNoLabel) {
			t.Errorf("without a label: %v", err)
		}
		// And another volume's metadata is left alone.
		format(t, volume.FormatOptions{Device: ubd(2), MetaDevice: ubd(3), SizeBytes: testSize})
		o2 := o
		o2.Device = ubd(2)
		if _, err := tryUp(t, ctl, o2); !errors.Is(err, volume.ErrOtherVolume) {
			t.Errorf("another volume's metadata: %v", err)
		}
	})
}
