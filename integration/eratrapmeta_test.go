package integration

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/era"
	"blockferry/blockdev/volume"
)

// The traps of dm-era that lie in its metadata; the others are in
// eratrap_test.go.

// Trap 7: a metadata snapshot outlives its device. One that was left is
// dropped, else there is no other and its answers are of the past.
func TestEraTrapStaleMetadataSnapshot(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		o := volume.Options{Device: ubd(0)}
		v := up(t, ctl, o)
		mustRelease(t, mustCut(t, v, 1, false))
		if err := ctl.Message("vol-era", 0, "take_metadata_snap"); err != nil {
			t.Fatal(err)
		}
		mustWriteBlock(t, v.Path(), 5*eraGrain, 1)
		if err := v.Down(); err != nil {
			t.Fatal(err)
		}
		v = up(t, ctl, o)
		if status := run(t, "dmsetup", "status", "vol-era"); !strings.HasSuffix(strings.TrimSpace(status), " -") {
			t.Errorf("it is still there: %s", status)
		}
		c := mustCut(t, v, 2, false)
		if list := mustChanged(t, c, 1); !names(list, 5*eraGrain) {
			t.Errorf("a write was lost: %v", list)
		}
		mustRelease(t, c)
	})
}

// Trap 8: the kernel keeps no identity in its metadata: another volume's looks
// like one's own in which nothing changed.
func TestEraTrapMetadataHasAnIdentity(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}, {Size: 16 << 20}, {Size: 16 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		id := volume.NewUUID()
		// Two sets of metadata of one volume: the disk was set up anew, under
		// its old uuid, and the old metadata device comes back.
		format(t, volume.FormatOptions{Device: ubd(0), MetaDevice: ubd(1), SizeBytes: testSize, UUID: id})
		o := volume.Options{Device: ubd(0), MetaDevice: ubd(1), Guard: guard(t)}
		v := up(t, ctl, o)
		for range 10 { // so that its era is beyond the other's
			if err := ctl.Message("vol-era", 0, "checkpoint"); err != nil {
				t.Fatal(err)
			}
		}
		if err := v.Down(); err != nil {
			t.Fatal(err)
		}
		format(t, volume.FormatOptions{Device: ubd(0), MetaDevice: ubd(2), SizeBytes: testSize, UUID: id, Overwrite: true})
		o.MetaDevice = ubd(2)
		v = up(t, ctl, o)
		mustRelease(t, mustCut(t, v, 1, false))
		mustWriteBlock(t, v.Path(), 5*eraGrain, 1)
		if err := v.Down(); err != nil {
			t.Fatal(err)
		}
		o.MetaDevice = ubd(1)
		v = up(t, ctl, o)
		c := mustCut(t, v, 2, false)
		if list, err := c.Changed(1); !errors.Is(err, volume.ErrTrackingLost) {
			t.Errorf("asked the wrong metadata: %v, %v", list, err)
		}
		mustRelease(t, c)
	})
}

// Trap 9: kernels before 5.12 lose marks in a crash.
func TestEraTrapOldKernels(t *testing.T) {
	for release, fit := range map[string]bool{"5.11.22": false, "4.19.0-27-amd64": false, "5.12.0": true, "6.1.0-13-cloud-amd64": true, "10.0": true} {
		if err := volume.CheckKernel(release, false); (err == nil) != fit {
			t.Errorf("%s: %v", release, err)
		}
		if err := volume.CheckKernel(release, true); err != nil {
			t.Errorf("%s, allowed: %v", release, err)
		}
	}
}

// Trap 10: each status costs a commit of the metadata. Statistics cost none.
func TestEraTrapStatisticsCostNothing(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		mustRelease(t, mustCut(t, v, 1, false))
		info, err := ctl.Info("vol-meta")
		if err != nil {
			t.Fatal(err)
		}
		writes := func() string {
			t.Helper()
			text, err := os.ReadFile("/sys/dev/block/" + info.Dev() + "/stat")
			if err != nil {
				t.Fatal(err)
			}
			return strings.Fields(string(text))[4]
		}
		before := writes()
		for range 1000 {
			if s := v.Stats(); s.MetaTotalBlocks == 0 || s.Era == 0 {
				t.Fatalf("%+v", s)
			}
			if _, err := v.WrittenBytes(); err != nil {
				t.Fatal(err)
			}
		}
		if after := writes(); after != before {
			t.Errorf("statistics made %s metadata writes into %s", before, after)
		}
		if _, err := ctl.Status("vol-era"); err != nil {
			t.Fatal(err)
		}
		if after := writes(); after == before {
			t.Error("the trap is gone: a status costs no commit")
		}
	})
}

// Trap 11: a read through the page cache of a device below the one that is
// written is stale.
func TestEraTrapReadsAreNotStale(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		path, err := ctl.OwnNode("vol-data")
		if err != nil {
			t.Fatal(err)
		}
		buffered, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer buffered.Close()
		b := alignedBuffer(4096)
		read := func(what string, r interface {
			ReadAt([]byte, int64) (int, error)
		}) byte {
			t.Helper()
			if _, err := r.ReadAt(b, 0); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			return b[0]
		}
		for n := byte(1); n <= 3; n++ {
			read("buffered", buffered) // fills the cache
			read("live", v)
			mustWriteBlock(t, v.Path(), 0, n)
			if got := read("live", v); got != n {
				t.Errorf("live: read %d, %d was written", got, n)
			}
			c := mustCut(t, v, uint64(n), true)
			mustWriteBlock(t, v.Path(), 0, 100)
			if got := read("view", c.View()); got != n {
				t.Errorf("view: read %d, want %d", got, n)
			}
			mustRelease(t, c)
		}
		if got := read("buffered", buffered); got == 100 {
			t.Error("the trap is gone: a buffered read below is not stale")
		}
	})
}

// Trap 12: after a crash the last marks stand in a writeset that was never
// archived. They count.
func TestEraTrapMarksOfACrashCount(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		label := format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		o := volume.Options{Device: ubd(0)}
		v := up(t, ctl, o)
		mustRelease(t, mustCut(t, v, 1, false))
		mustWriteBlock(t, v.Path(), 5*eraGrain, 1)
		// What a crash leaves: the metadata as it is on the disk now.
		meta, err := blockdev.OpenFile(ubd(0), blockdev.OpenOptions{Write: true})
		if err != nil {
			t.Fatal(err)
		}
		defer meta.Close()
		at := label.Areas.Meta
		crashed := alignedBuffer(int(at.Length))
		if _, err := meta.ReadAt(crashed, at.Offset); err != nil {
			t.Fatal(err)
		}
		super, err := era.ReadSuperblock(bytes.NewReader(crashed[4096:]), 0)
		if err != nil {
			t.Fatal(err)
		}
		list, err := era.ChangedInactive(bytes.NewReader(crashed[4096:]), super.CurrentEra)
		if err != nil || !names(list, 5*eraGrain) {
			t.Errorf("read at rest: %v, %v", list, err)
		}
		if err := v.Down(); err != nil {
			t.Fatal(err)
		}
		if _, err := meta.WriteAt(crashed, at.Offset); err != nil {
			t.Fatal(err)
		}
		v = up(t, ctl, o)
		c := mustCut(t, v, 2, false)
		if list := mustChanged(t, c, 1); !names(list, 5*eraGrain) {
			t.Errorf("after the crash: %v", list)
		}
		mustRelease(t, c)
	})
}
