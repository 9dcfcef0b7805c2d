package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/era"
	"blockferry/blockdev/volume"
)

// thinDisk makes a disk that takes discards, and the file below it: what was
// discarded reads as zeros and takes no space.
func thinDisk(t *testing.T, size int64) (device, file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(file)
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	device = strings.TrimSpace(run(t, "losetup", "--find", "--show", "--direct-io=off", file))
	t.Cleanup(func() { cleanup("losetup", "--detach", device) })
	return device, file
}

func discardRange(t *testing.T, device string, offset, length int64) {
	t.Helper()
	f, err := blockdev.OpenFile(device, blockdev.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Discard(offset, length); err != nil {
		t.Fatal(err)
	}
}

// fillNoise makes a range of a device differ from zeros everywhere.
func fillNoise(t *testing.T, device string, offset, length int64) {
	t.Helper()
	f, err := os.OpenFile(device, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := alignedBuffer(int(length))
	defer unix.Munmap(b)
	for i := range b {
		b[i] = byte(i%251 + 1)
	}
	if _, err := f.WriteAt(b, offset); err != nil {
		t.Fatal(err)
	}
}

// Trap 2: dm-era marks only the block in which a discard begins. All of what was
// discarded is named, whatever borders it crosses, from the first on and after
// whatever a cut, another agent or a table load changes; and a frozen view stays.
func TestEraTrapDiscardsAreNamed(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}}, Modules: []string{"loop"}}, func(t *testing.T) { checkDiscardsAreNamed(t) })
}

func checkDiscardsAreNamed(t *testing.T) {
	ctl := mapper(t)
	disk, file := thinDisk(t, 128<<20)
	format(t, volume.FormatOptions{Device: disk, SizeBytes: testSize})
	o := volume.Options{Device: disk}
	v := up(t, ctl, o)
	limits := func(when string) {
		t.Helper()
		for _, name := range []string{"vol", "vol-era"} {
			info, err := ctl.Info(name)
			if err != nil {
				t.Fatal(err)
			}
			text, err := os.ReadFile("/sys/dev/block/" + info.Dev() + "/queue/discard_max_bytes")
			if err != nil || string(text) != fmt.Sprintln(eraGrain) {
				t.Errorf("%s: discards of %s are limited to '%s' bytes, %v; want %d", when, name, bytes.TrimSpace(text), err, eraGrain)
			}
		}
	}
	number := uint64(0)
	cut := func() *volume.Cut {
		number++
		return mustCut(t, v, number, false)
	}
	// discarded says what is named after a discard; only that, and what the
	// marks name too much, may be.
	discarded := func(what string, offset, length int64) {
		t.Run(what, func(t *testing.T) {
			fillNoise(t, v.Path(), 0, testSize)
			mustRelease(t, cut())
			before := allocatedBytes(t, file)
			began := time.Now()
			discardRange(t, v.Path(), offset, length)
			took := time.Since(began)
			c := cut()
			defer mustRelease(t, c)
			list := mustChanged(t, c, number-1)
			for at := offset; at < offset+length; at += 4096 {
				if !names(list, at) {
					t.Errorf("discarded at %d and not named: %v", at, list)
					break
				}
			}
			if named, most := blockdev.Total(list), (length/eraGrain+3)*eraGrain; named > most {
				t.Errorf("%d bytes were discarded and %d named: %v", length, named, list)
			}
			// The era's metadata stands on the same disk and grows a little.
			if freed := before - allocatedBytes(t, file); length > 1<<20 && freed < length-(256<<10) {
				t.Errorf("of %d bytes %d were given back by the disk", length, freed)
			}
			raw, err := mapper(t).Status("vol-era")
			if err != nil {
				t.Fatal(err)
			}
			marks, err := era.Changed(eraMeta(t), heldSnapshotOf(t, raw[0].Params), eraOf(t, raw[0].Params)-1)
			t.Logf("%d bytes discarded in %s, %d marked by the kernel, %d named, %v", length, took, blockdev.Total(marks), blockdev.Total(list), err)
		})
	}
	all := func(when string) {
		t.Helper()
		limits(when)
		discarded(when+": all of the volume", 0, testSize)
		discarded(when+": across a border", 5*eraGrain-4096, 8192)
		discarded(when+": as long as a block, across a border", 5*eraGrain+4096, eraGrain)
		discarded(when+": many blocks, across borders", 5*eraGrain+8192, 20*eraGrain)
	}
	// Whichever slot of the label is damaged, the other says what marks mean.
	label, slot := openBoth(t, disk), alignedBuffer(4096)
	for at := int64(0); at < 1<<20; at += 512 << 10 {
		if _, err := label.ReadAt(slot, at); err != nil || slot[8] != 3 {
			t.Errorf("the slot of the label at %d is of version %d, %v", at, slot[8], err)
		}
	}
	label.Close()
	all("up")

	fillNoise(t, v.Path(), 0, testSize)
	number++
	c := mustCut(t, v, number, true)
	limits("in a cut")
	before := imageOf(t, c.View(), testSize)
	discardRange(t, v.Path(), 0, testSize)
	discardRange(t, v.Path(), 3*eraGrain-4096, 8192)
	fillNoise(t, v.Path(), 4096, 4096)
	if !bytes.Equal(before, imageOf(t, c.View(), testSize)) {
		t.Error("a frozen view is not what it was, after a discard")
	}
	if err := c.Valid(); err != nil {
		t.Error(err)
	}
	mustRelease(t, c)
	all("after a view")

	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	// As a table load would leave it.
	limit := func(most int64, names ...string) {
		t.Helper()
		for _, name := range names {
			info, err := ctl.Info(name)
			if err == nil {
				err = os.WriteFile("/sys/dev/block/"+info.Dev()+"/queue/discard_max_bytes", []byte(fmt.Sprint(most)), 0)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	raise := func(names ...string) { limit(16<<20, names...) }
	raise("vol-era")
	v = up(t, ctl, o)
	all("adopted")

	// Somebody raises both limits, as a rule of udev may: nothing is known then.
	for when, again := range map[string]func(){"at a cut": func() {}, "put back": func() { limit(eraGrain, "vol", "vol-era") }, "adopted": func() {
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		v = up(t, ctl, o)
	}} {
		mustRelease(t, cut())
		raise("vol", "vol-era")
		discardRange(t, v.Path(), 0, testSize)
		again()
		c := cut()
		if list, err := c.Changed(number - 1); !errors.Is(err, volume.ErrTrackingLost) {
			t.Errorf("%s: limits were raised and 'changed' says %v, %v", when, list, err)
		}
		mustRelease(t, c)
		limits(when)
	}
	discarded("limits set again", 5*eraGrain-4096, 8192)

	// Zeroing, which devices may do without data, is a marked write.
	mustRelease(t, cut())
	run(t, "blkdiscard", "-z", "-o", "1048576", "-l", "1048576", v.Path())
	c = cut()
	list := mustChanged(t, c, number-1)
	for at := int64(1 << 20); at < 2<<20; at += eraGrain {
		if !names(list, at) {
			t.Errorf("zeroed at %d and not named: %v", at, list)
		}
	}
	mustRelease(t, c)
	if err := v.Down(); err != nil {
		t.Fatal(err)
	}
	v = up(t, ctl, o)
	all("down and up")
}

// heldSnapshotOf and eraOf read era's status line.
func heldSnapshotOf(t *testing.T, status string) (block uint64) {
	t.Helper()
	if _, err := fmt.Sscan(strings.Fields(status)[3], &block); err != nil {
		t.Fatalf("era's status is '%s': %v", status, err)
	}
	return block
}

func eraOf(t *testing.T, status string) (number uint32) {
	t.Helper()
	if _, err := fmt.Sscan(strings.Fields(status)[2], &number); err != nil {
		t.Fatalf("era's status is '%s': %v", status, err)
	}
	return number
}
