package bpf

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// ways are how a disk's content changes. Those that say which blocks they touch
// are checked for naming no others.
var ways = []struct {
	name string
	do   func(t testing.TB, d disk, rng *rand.Rand) map[int64]bool
}{
	{"direct", func(t testing.TB, d disk, rng *rand.Rand) map[int64]bool {
		touched := d.writes(t, rng, unix.O_DIRECT, 300, d.unit(t), 16384)
		for grain := range d.writes(t, rng, unix.O_DIRECT, 10, 4096, 1<<20) {
			touched[grain] = true
		}
		return touched
	}},
	{"buffered", func(t testing.TB, d disk, rng *rand.Rand) map[int64]bool {
		d.writes(t, rng, 0, 200, 1, 100_000)
		return nil
	}},
	{"dsync", func(t testing.TB, d disk, rng *rand.Rand) map[int64]bool {
		d.writes(t, rng, unix.O_DSYNC, 60, 512, 65536)
		return nil
	}},
	{"mapped", func(t testing.TB, d disk, rng *rand.Rand) map[int64]bool { d.mapped(t, rng, 300); return nil }},
	{"io_uring direct", func(t testing.TB, d disk, _ *rand.Rand) map[int64]bool {
		d.fio(t, "--ioengine=io_uring", "--direct=1", "--iodepth=16", "--io_size=4m",
			fmt.Sprintf("--bsrange=%d-64k", d.unit(t)), fmt.Sprintf("--blockalign=%d", d.unit(t)))
		return nil
	}},
	{"io_uring buffered", func(t testing.TB, d disk, _ *rand.Rand) map[int64]bool {
		d.fio(t, "--ioengine=io_uring", "--direct=0", "--iodepth=16", "--io_size=4m")
		return nil
	}},
	{"discard", func(t testing.TB, d disk, rng *rand.Rand) map[int64]bool {
		d.commands(t, rng, 20, (*blockdev.File).Discard)
		return nil
	}},
	{"zero-out", func(t testing.TB, d disk, rng *rand.Rand) map[int64]bool {
		d.commands(t, rng, 20, (*blockdev.File).ZeroOut)
		return nil
	}},
	{"punch hole", func(t testing.TB, d disk, rng *rand.Rand) map[int64]bool {
		d.allocates(t, rng, 20, unix.FALLOC_FL_PUNCH_HOLE)
		return nil
	}},
	{"zero range", func(t testing.TB, d disk, rng *rand.Rand) map[int64]bool {
		d.allocates(t, rng, 20, unix.FALLOC_FL_ZERO_RANGE)
		return nil
	}},
}

// Whatever way a disk's content changes, each block that differs afterwards is
// named: on a whole disk, on a partition, and for a volume that is a part of it.
func TestEveryChangeIsNamed(t *testing.T) {
	for _, c := range []struct {
		name           string
		new            func(testing.TB, int64) disk
		offset, length int64 // of the volume; 0: all
	}{
		{"disk", newLoop, 0, 0},
		{"partition", newPartition, 0, 0},
		{"part of a partition", newPartition, 8 << 20, 40<<20 + 4096},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := c.new(t, 64<<20)
			target := d.target(newPin(t))
			if c.length > 0 {
				target.Offset, target.Length = c.offset, c.length
			}
			checkEveryWay(t, d, target, "")
		})
	}
}

// The same on a device that BLOCKFERRY_BPF_DEVICE names: its path, how many
// bytes of it there are to change, and the ways that its statistics leave out.
func TestEveryChangeOfADevice(t *testing.T) {
	text := os.Getenv("BLOCKFERRY_BPF_DEVICE")
	if text == "" {
		t.Skip("no device was named")
	}
	text, uncounted, _ := strings.Cut(text, "\n")
	var d disk
	if _, err := fmt.Sscan(text, &d.path, &d.size); err != nil {
		t.Fatal(err)
	}
	checkEveryWay(t, d, d.target(newPin(t)), uncounted)
}

// checkEveryWay expects an answer for each way but those that the disk's
// statistics leave out: of each of them, that it is not covered.
func checkEveryWay(t *testing.T, d disk, target Target, uncounted string) {
	t.Helper()
	tracker := open(t, target)
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 1))
	d.fio(t, "--ioengine=psync", "--direct=1", "--rw=write", "--bs=1m") // something to discard
	cut := covered(t, tracker, 1)
	for _, way := range ways {
		// A loss that was reported is an answer, one that comes each time is a
		// kind of change that is not followed.
		for try := 0; ; try++ {
			before := d.sums(t)
			touched := way.do(t, d, rng)
			differ := differing(before, d.sums(t))
			ok := seal(t, tracker, cut+1)
			taken := tracker.Taken()
			if strings.Contains(uncounted, way.name) {
				if ok {
					t.Errorf("%s is counted", way.name)
				}
				cut = covered(t, tracker, cut+2)
				break
			}
			if !ok && try < 6 {
				cut = covered(t, tracker, cut+2)
				continue
			}
			if !ok {
				t.Fatalf("%s: lost each time", way.name)
			}
			named := changed(t, tracker, cut, cut+1)
			cut++
			if len(differ) == 0 {
				t.Logf("%s changed nothing", way.name)
				break
			}
			mustName(t, named, volumePart(target, differ))
			mustName(t, taken, volumePart(target, differ))
			if touched == nil {
				break
			}
			touched = volumePart(target, touched)
			for grain := range grainsOf(named) {
				if !touched[grain] {
					t.Fatalf("%s: block %d is named and was not written", way.name, grain)
				}
			}
			break
		}
	}
}

// volumePart turns blocks of a device into blocks of the volume on it.
func volumePart(target Target, blocks map[int64]bool) map[int64]bool {
	out := map[int64]bool{}
	for b := range blocks {
		if at := b*blockdev.BlockSize - target.Offset; at >= 0 && at < target.Length {
			out[at/blockdev.BlockSize] = true
		}
	}
	return out
}
