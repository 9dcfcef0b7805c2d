package integration

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/status"
)

// discards is an endless sequence of numbered writes of 4 KiB, one block after
// the other and round again, of which every few are followed by a discard of
// blocks that were written about half a round before.
type discards struct {
	Seed uint64
	Size int64 // of the device, in bytes; a multiple of 4096
}

// discardEvery is how many writes there are to a discard.
const discardEvery = 8

func (d discards) blocks() uint64 { return uint64(d.Size / 4096) }

// written is the block that write k goes to, k from 1.
func (d discards) written(k uint64) uint64 { return (k - 1) % d.blocks() }

// discarded is what is discarded after write k: up to 40 blocks, so that many
// cross borders of the era's.
func (d discards) discarded(k uint64) (first, count uint64) {
	if k%discardEvery != 0 {
		return 0, 0
	}
	n := d.blocks()
	first = (d.written(k) + n/2 + mix(d.Seed^k)%(n/4)) % n
	return first, min(1+mix(d.Seed^mix(k))%40, n-first)
}

func (d discards) run(file *os.File, stop *atomic.Bool, at *atomic.Uint64) error {
	block := alignedBuffer(4096)
	defer unix.Munmap(block)
	disk, err := blockdev.OpenFile(file.Name(), blockdev.OpenOptions{Write: true})
	if err != nil {
		return err
	}
	defer disk.Close()
	for k := at.Load() + 1; !stop.Load(); k++ {
		binary.LittleEndian.PutUint64(block, k)
		binary.LittleEndian.PutUint64(block[4088:], k)
		if _, err := file.WriteAt(block, int64(d.written(k))*4096); err != nil {
			return fmt.Errorf("write %d: %w", k, err)
		}
		if first, count := d.discarded(k); count > 0 {
			if err := disk.Discard(int64(first)*4096, int64(count)*4096); err != nil {
				return fmt.Errorf("discard after write %d: %w", k, err)
			}
		}
		at.Store(k)
		time.Sleep(time.Millisecond)
	}
	return nil
}

// judge says up to which write an image holds the sequence, and how many blocks
// are discarded. What was discarded may read as before; nothing else may differ.
func (d discards) judge(image io.ReaderAt) (newest uint64, gone int, err error) {
	found := make([]uint64, d.blocks())
	buffer := alignedBuffer(1 << 20)
	defer unix.Munmap(buffer)
	for offset := int64(0); offset < d.Size; offset += int64(len(buffer)) {
		piece := buffer[:min(int64(len(buffer)), d.Size-offset)]
		if _, err := image.ReadAt(piece, offset); err != nil {
			return 0, 0, err
		}
		for at := 0; at < len(piece); at += 4096 {
			k := binary.LittleEndian.Uint64(piece[at:])
			index := (uint64(offset) + uint64(at)) / 4096
			if k != binary.LittleEndian.Uint64(piece[at+4088:]) || k != 0 && d.written(k) != index {
				return 0, 0, fmt.Errorf("block %d holds what no write left there: %d", index, k)
			}
			found[index] = k
			newest = max(newest, k)
		}
	}
	want, optional := make([]uint64, d.blocks()), make([]bool, d.blocks())
	for k := uint64(1); k <= newest; k++ {
		want[d.written(k)], optional[d.written(k)] = k, false
		first, count := d.discarded(k)
		for b := first; b < first+count; b++ {
			optional[b] = true
		}
	}
	for b, k := range found {
		switch {
		case k == want[b]:
		case k == 0 && optional[b]:
			gone++
		default:
			return 0, 0, fmt.Errorf("block %d is of write %d; up to write %d, want %d (discarded since: %v)", b, k, newest, want[b], optional[b])
		}
	}
	return newest, gone, nil
}

// same fails if a volume and its replica differ.
func same(t *testing.T, path, replica string, size int64) {
	t.Helper()
	a, b := openBoth(t, path), openBoth(t, replica)
	defer a.Close()
	defer b.Close()
	one, other := imageOf(t, a, size), imageOf(t, b, size)
	defer unix.Munmap(one)
	defer unix.Munmap(other)
	for at := int64(0); at < size; at += 4096 {
		if string(one[at:at+4096]) != string(other[at:at+4096]) {
			t.Fatalf("the volume and its replica differ at byte %d", at)
		}
	}
}

func openBoth(t *testing.T, path string) *blockdev.File {
	t.Helper()
	f, err := blockdev.OpenFile(path, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// Promises 1 and 2 with discards: a replica is one point in time of them, too,
// and holds what the volume holds. Frozen views are held while some come.
func TestDiscardsAreSent(t *testing.T) {
	inGuest(t, guest{Memory: "1500M", Disks: []disk{{Size: 16 << 20}}, Modules: []string{"loop"}, Timeout: 8 * time.Minute}, func(t *testing.T) {
		ssd, _ := thinDisk(t, 200<<20)
		ebs, _ := thinDisk(t, 200<<20)
		checkDiscardsAreSent(t, ssd, ebs, 30, "snapshot")
	})
}

func checkDiscardsAreSent(t *testing.T, ssd, ebs string, cuts int, image string) {
	c := newCLI(t, strings.Replace(onlyOnSync(ssd, ebs, oddVolumeBytes), "    cow:", "    image: "+image+"\n    cow:", 1))
	c.must(t, "create", "--discard-my-data")
	c.start(t)
	path := c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up }).Path
	d := discards{Seed: 4, Size: oddVolumeBytes}
	var at atomic.Uint64
	load := func() (stop func()) {
		file, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		var stopping atomic.Bool
		ended := make(chan error, 1)
		go func() { ended <- d.run(file, &stopping, &at) }()
		return func() {
			stopping.Store(true)
			if err := <-ended; err != nil {
				t.Error(err)
			}
			file.Close()
		}
	}
	var gone int
	for cut := 0; cut < cuts; {
		stop := load()
		for range 5 {
			atLeast := at.Load()
			for now := atLeast; at.Load() < now+100; {
				time.Sleep(time.Millisecond)
			}
			c.syncAndSettle(t, ebs)
			atMost := at.Load() + 1
			replica := openBoth(t, ebs)
			newest, discarded, err := d.judge(replica)
			replica.Close()
			if err != nil || newest < atLeast || newest > atMost {
				t.Errorf("cut %d, at write %d to %d, holds those up to %d, %v", cut, atLeast, atMost, newest, err)
			}
			gone = discarded
			cut++
		}
		stop()
		c.syncAndSettle(t, ebs)
		same(t, path, ebs, oddVolumeBytes)
	}
	if gone < int(d.blocks()/8) {
		t.Errorf("%d of %d blocks are discarded: that is none to speak of", gone, d.blocks())
	}
	t.Logf("%d cuts, %d writes, %d of %d blocks discarded", cuts, at.Load(), gone, d.blocks())
	c.must(t, "verify")
	c.must(t, "down")
}

// What a file system gives back under load is free on both sides.
func TestTrimFreesBothSides(t *testing.T) {
	const size = 320 << 20 // as small as xfs may be
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			inGuest(t, guest{Memory: "2000M", Disks: []disk{{Size: 16 << 20}}, Modules: []string{"loop"}, Timeout: 8 * time.Minute}, func(t *testing.T) {
				ssd, ssdFile := thinDisk(t, 1100<<20)
				ebs, ebsFile := thinDisk(t, 1100<<20)
				c := newCLI(t, onlyOnSync(ssd, ebs, size))
				c.must(t, "create")
				c.start(t)
				path := c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up }).Path
				mkfs(t, kind, path)
				dir := mustMount(t, kind, path, "")
				if err := os.WriteFile(dir+"/large", filled(100<<20), 0o600); err != nil {
					t.Fatal(err)
				}
				unix.Sync()
				c.syncAndSettle(t, ebs)
				full := [2]int64{allocatedBytes(t, ssdFile), allocatedBytes(t, ebsFile)}

				stop, stopped := make(chan struct{}), make(chan error, 1)
				go func() { stopped <- churn(dir, stop, writerPause) }()
				if err := os.Remove(dir + "/large"); err != nil {
					t.Fatal(err)
				}
				unix.Sync()
				t.Log(run(t, "fstrim", "-v", dir))
				c.syncAndSettle(t, ebs)
				freed := [2]int64{full[0] - allocatedBytes(t, ssdFile), full[1] - allocatedBytes(t, ebsFile)}
				t.Logf("of 100 MiB the SSD gave back %d, the replica %d", freed[0]>>20, freed[1]>>20)
				for i, side := range []string{"SSD", "replica"} {
					if freed[i] < 80<<20 {
						t.Errorf("the %s gave back %d bytes of 100 MiB", side, freed[i])
					}
				}
				for range 5 {
					run(t, "fstrim", dir)
					c.syncAndSettle(t, ebs)
					if out, err := checkCopy(t, kind, ebs, size); err != nil {
						t.Errorf("%v\n%s", err, out)
					}
				}
				close(stop)
				if err := <-stopped; err != nil {
					t.Error(err)
				}
				mustUnmount(t, dir)
				c.syncAndSettle(t, ebs)
				same(t, path, ebs, size)
				c.must(t, "verify")
				c.must(t, "down")
			})
		})
	}
}

// filled is content without a zero.
func filled(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i%251 + 1)
	}
	return b
}
