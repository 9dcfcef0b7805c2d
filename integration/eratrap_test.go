package integration

import (
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/era"
	"blockferry/blockdev/volume"
)

// dm-era has traps: ways to use it that silently lose a changed block, or
// hang. Each has a test here that fails when the guard against it is removed;
// some show the raw trap as well.

const eraGrain = 64 << 10

// eraMeta opens the metadata of a volume that is up, past the cache.
func eraMeta(t *testing.T) *blockdev.File {
	t.Helper()
	path, err := mapper(t).OwnNode("vol-meta")
	if err != nil {
		t.Fatal(err)
	}
	f, err := blockdev.OpenFile(path, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// slowData puts /dev/mapper/slow on the guest's disk, formats it, and returns
// a function that sets how long writes to its data take.
func slowData(t *testing.T) (device string, delay func(ms int)) {
	t.Helper()
	n, data, length := sectors(t, ubd(0)), int64(2048), int64(testSize/512)
	table := func(ms int) string {
		return fmt.Sprintf("0 %d linear %s 0\n%d %d delay %s %d 0 %s %d %d %s %d 0\n%d %d linear %s %d", data, ubd(0),
			data, length, ubd(0), data, ubd(0), data, ms, ubd(0), data, data+length, n-data-length, ubd(0), data+length)
	}
	device = dmCreate(t, "slow", table(0))
	format(t, volume.FormatOptions{Device: device, SizeBytes: testSize})
	return device, func(ms int) { dmSwap(t, "slow", table(ms)) }
}

// Trap 1: a roll of the era is no barrier. A write marked before it can land
// after it; only a suspend waits for it.
func TestEraTrapCheckpointIsNoBarrier(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}, Modules: []string{"dm-delay"}}, func(t *testing.T) {
		ctl := mapper(t)
		disk, delay := slowData(t)
		v := up(t, ctl, volume.Options{Device: disk})
		first := mustCut(t, v, 1, false)
		mustRelease(t, first)
		// lateWrite has a write under way that was marked and has not landed.
		lateWrite := func(offset int64, value byte) chan error {
			mustWriteBlock(t, v.Path(), offset, 1)
			delay(2000)
			landed := make(chan error, 1)
			go func() { landed <- writeBlock(v.Path(), offset, value) }()
			time.Sleep(500 * time.Millisecond)
			return landed
		}
		value := func(r interface {
			ReadAt([]byte, int64) (int, error)
		}, offset int64) byte {
			b := alignedBuffer(4096)
			if _, err := r.ReadAt(b, offset); err != nil {
				t.Fatal(err)
			}
			return b[0]
		}

		// The raw trap: read after a bare roll, then ask what changed since.
		landed := lateWrite(0, 2)
		if err := ctl.Message("vol-era", 0, "checkpoint"); err != nil {
			t.Fatal(err)
		}
		super, err := era.ReadSuperblock(eraMeta(t), 0)
		if err != nil {
			t.Fatal(err)
		}
		read := value(v, 0)
		if err := <-landed; err != nil {
			t.Fatal(err)
		}
		delay(0)
		if err := ctl.Message("vol-era", 0, "take_metadata_snap"); err != nil {
			t.Fatal(err)
		}
		if super, err = era.ReadSuperblock(eraMeta(t), 0); err != nil {
			t.Fatal(err)
		}
		list, err := era.Changed(eraMeta(t), super.MetadataSnapshot, super.CurrentEra-1)
		if err != nil {
			t.Fatal(err)
		}
		if read != 1 || names(list, 0) {
			t.Errorf("the trap is gone: read %d after the roll, changed since: %v", read, list)
		}
		if err := ctl.Message("vol-era", 0, "drop_metadata_snap"); err != nil {
			t.Fatal(err)
		}

		// A cut: whatever it did not see is named by the next one.
		for n := uint64(2); n <= 5; n++ {
			at := int64(n) * eraGrain
			landed := lateWrite(at, byte(n))
			c := mustCut(t, v, n*10, n%2 == 0)
			seen := value(v, at)
			if n%2 == 0 {
				seen = value(c.View(), at)
			}
			mustRelease(t, c)
			if err := <-landed; err != nil {
				t.Fatal(err)
			}
			delay(0)
			c = mustCut(t, v, n*10+1, false)
			if list := mustChanged(t, c, n*10); seen != byte(n) && !names(list, at) {
				t.Errorf("cut %d saw %d, %d is on the disk, and what changed since is %v", n*10, seen, n, list)
			}
			mustRelease(t, c)
		}
	})
}

// Trap 2 is in discard_test.go.

// Trap 3: a table that was loaded while the other was in use knows none of
// the marks made since. One that a dead process left waiting is dropped.
func TestEraTrapLoadedTableIsNotUsed(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		o := volume.Options{Device: ubd(0)}
		v := up(t, ctl, o)
		mustRelease(t, mustCut(t, v, 1, false))
		table, err := ctl.Table("vol-era")
		if err != nil {
			t.Fatal(err)
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		if err := ctl.Load("vol-era", table); err != nil {
			t.Fatal(err)
		}
		mustWriteBlock(t, v.Path(), 5*eraGrain, 1) // marked in the old table
		run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "vol-era")
		v = up(t, ctl, o)
		if info, err := ctl.Info("vol-era"); err != nil || info.HasInactive || info.Suspended {
			t.Errorf("after up: %+v, %v", info, err)
		}
		c := mustCut(t, v, 2, false)
		if list := mustChanged(t, c, 1); !names(list, 5*eraGrain) {
			t.Errorf("a write was lost: %v", list)
		}
		mustRelease(t, c)
	})
}

// Trap 4: a suspended era answers no message and no status until somebody
// resumes it. Nobody here waits for one.
func TestEraTrapSuspendedEraIsNotAsked(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		mustRelease(t, mustCut(t, v, 1, false))
		held := mustCut(t, v, 2, true)
		mustChanged(t, held, 1) // from here on it holds a metadata snapshot
		run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "vol-era")
		// The raw trap, in a process that may hang.
		raw := exec.Command("dmsetup", "status", "vol-era")
		if err := raw.Start(); err != nil {
			t.Fatal(err)
		}
		rawEnded := make(chan error, 1)
		go func() { rawEnded <- raw.Wait() }()
		within := func(what string, f func() error) {
			t.Helper()
			done := make(chan error, 1)
			go func() { done <- f() }()
			select {
			case err := <-done:
				if err == nil || !strings.Contains(err.Error(), "vol-era is suspended") {
					t.Errorf("%s with era suspended: %v", what, err)
				}
			case <-time.After(10 * time.Second):
				t.Errorf("%s waits for a suspended era", what)
			}
		}
		within("release", held.Release)
		within("cut", func() error { _, err := v.Cut(t.Context(), 3, false); return err })
		select {
		case err := <-rawEnded:
			t.Errorf("the trap is gone: status of a suspended era ended with %v", err)
		default:
		}
		run(t, "dmsetup", "resume", "vol-era")
		if err := <-rawEnded; err != nil {
			t.Error(err)
		}
		mustRelease(t, mustCut(t, v, 4, true)) // and what failed is cleared away
	})
}

// Trap 5: what counts is an era that had begun before the barrier, whatever rolls
// follow before the barrier, and before it is written down.
func TestEraTrapCutKeepsTheEraOfItsBarrier(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		// Somebody rolls eras all the time, and each write is to a block of its
		// own, so that a mark in the era before the wrong number is the only one.
		var stop atomic.Bool
		rolled := make(chan error, 1)
		go func() {
			var err error
			for !stop.Load() && err == nil {
				err = ctl.Message("vol-era", 0, "checkpoint")
			}
			rolled <- err
		}()
		var block atomic.Int64
		wrote := make(chan error, 1)
		go func() {
			var err error
			for !stop.Load() && err == nil {
				err = writeBlock(v.Path(), block.Load()%512*eraGrain, byte(block.Load()/512+1))
				block.Add(1)
			}
			wrote <- err
		}()
		var before []byte
		for n := uint64(1); n <= 25; n++ {
			c := mustCut(t, v, n, true)
			after := imageOf(t, c.View(), testSize)
			if n > 1 {
				mustCover(t, fmt.Sprint("cut ", n), mustChanged(t, c, n-1), before, after)
			}
			before = after
			mustRelease(t, c)
		}
		stop.Store(true)
		if err := errors.Join(<-rolled, <-wrote); err != nil {
			t.Fatal(err)
		}
	})
}

// Trap 6: of each block only the last era is kept, so a question has no upper
// end: a block written between two cuts and again after the second is found
// by asking since the first.
func TestEraTrapNoUpperBound(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
		v := up(t, ctl, volume.Options{Device: ubd(0)})
		mustRelease(t, mustCut(t, v, 1, false))
		for n := uint64(2); n <= 12; n++ {
			mustWriteBlock(t, v.Path(), 3*eraGrain, byte(n)) // in every era
			if n == 2 {
				mustWriteBlock(t, v.Path(), 8*eraGrain, 1) // only in the first
			}
			if n <= 8 {
				mustWriteBlock(t, v.Path(), 11*eraGrain, byte(n)) // until the kernel has digested it
			}
			c := mustCut(t, v, n, false)
			mustWriteBlock(t, v.Path(), 3*eraGrain, byte(n)+100) // and before it is asked
			for since := uint64(1); since < n; since++ {
				if list := mustChanged(t, c, since); !names(list, 3*eraGrain) || names(list, 8*eraGrain) != (since == 1) || names(list, 11*eraGrain) != (since < 8) {
					t.Errorf("changed from %d to %d: %v", since, n, list)
				}
			}
			mustRelease(t, c)
		}
	})
}
