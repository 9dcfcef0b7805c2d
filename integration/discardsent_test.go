package integration

import (
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
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
	// Little enough that a slow guest comes round some times.
	d := discards{Seed: 4, Size: 2<<20 + 3*4096}
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
	// Alone it is an epoch of its own.
	awaitNoView(t)
	fillNoise(t, path, 0, 1<<20)
	c.syncAndSettle(t, ebs)
	awaitNoView(t)
	discardRange(t, path, 4096, 1<<20-8192)
	c.syncAndSettle(t, ebs)
	same(t, path, ebs, oddVolumeBytes)
	replica := openBoth(t, ebs)
	defer replica.Close()
	if image := imageOf(t, replica, 1<<20); !allZero(image[4096:1<<20-4096]) || allZero(image[:4096]) {
		t.Error("what was discarded, and nothing else done, is not zeros on the replica")
	}
	t.Logf("%d cuts, %d writes, %d of %d blocks discarded", cuts, at.Load(), gone, d.blocks())
	c.must(t, "verify")
	c.must(t, "down")
}

// awaitNoView waits until no frozen view is held.
func awaitNoView(t *testing.T) {
	t.Helper()
	ctl := mapper(t)
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		info, err := ctl.Info("data-snap")
		if err != nil {
			t.Fatal(err)
		}
		if !info.Exists {
			return
		}
	}
	t.Fatal("a frozen view is held for a minute")
}

// What was discarded in an epoch that its agent did not live to commit is in the
// next one.
func TestDiscardsOutliveTheAgent(t *testing.T) {
	inGuest(t, guest{Memory: "1500M", Disks: []disk{{Size: 16 << 20}}, Modules: []string{"loop"}, Timeout: 8 * time.Minute}, func(t *testing.T) {
		ssd, _ := thinDisk(t, 200<<20)
		ebs, _ := thinDisk(t, 200<<20)
		checkDiscardsOutliveTheAgent(t, ssd, ebs, "snapshot")
	})
}

// checkDiscardsOutliveTheAgent kills the agent between a cut, at which fine
// tracking exchanges its maps, and the commit.
func checkDiscardsOutliveTheAgent(t *testing.T, ssd, ebs, image string) {
	c := newCLI(t, strings.Replace(onlyOnSync(ssd, ebs, oddVolumeBytes), "    cow:", "    image: "+image+"\n    cow:", 1))
	c.must(t, "create", "--discard-my-data")
	c.start(t)
	path := c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up }).Path
	const kills = 3
	hit := 0
	for try := 0; hit < kills; try++ {
		if try == 5*kills {
			t.Fatalf("the agent was killed %d times, %d of them before the commit", try, hit)
		}
		fillNoise(t, path, 0, oddVolumeBytes)
		c.syncAndSettle(t, ebs)
		before := committed(t, ebs)
		awaitNoView(t)
		for at := int64(eraGrain - 4096); at < 16<<20; at += 3 * eraGrain {
			discardRange(t, path, at, 8192) // across a border
		}
		discardRange(t, path, 20<<20, 4<<20)
		fillDifferent(t, path, 28<<20, 8<<20, byte(try)) // keeps it busy
		from := len(c.logText(t))
		sync := exec.CommandContext(t.Context(), c.binary, "--config", c.config, "--socket", c.socket, "sync", "--timeout", "60s")
		if err := sync.Start(); err != nil {
			t.Fatal(err)
		}
		c.awaitLog(t, from, "a cut's stop in parts", time.Minute)
		c.kill(t)
		_ = sync.Wait() // it lost its agent
		if committed(t, ebs) == before {
			hit++
		}
		c.start(t)
		c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		c.syncAndSettle(t, ebs)
		same(t, path, ebs, oddVolumeBytes)
	}
	if log := c.logText(t); strings.Contains(log, "tracking begins anew") {
		t.Error("tracking began anew: then it proves nothing")
	}
	c.must(t, "verify")
	c.must(t, "down")
}

// committed is the epoch that a replica's disk committed last.
func committed(t *testing.T, replica string) protocol.Position {
	t.Helper()
	disk := openBoth(t, replica)
	defer disk.Close()
	s, err := protocol.PeekReplica(disk)
	if err != nil {
		t.Fatal(err)
	}
	return s.Committed
}

// checkFineDiscards: with fine tracking what is sent is what was written or
// discarded, to 4 KiB, and nothing is compared.
func checkFineDiscards(t *testing.T, ssd, ebs string) {
	c := newCLI(t, onlyOnSync(ssd, ebs, oddVolumeBytes))
	c.must(t, "create", "--discard-my-data")
	c.start(t)
	path := c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up }).Path
	exact := 0
	for range 4 {
		fillNoise(t, path, 0, 24<<20)
		c.syncAndSettle(t, ebs)
		awaitNoView(t)
		changed := int64(0)
		for at := int64(eraGrain - 8192); at < 16<<20; at += 5 * eraGrain {
			discardRange(t, path, at, 12288)
			fillNoise(t, path, at+eraGrain, 4096)
			changed += 12288 + 4096
		}
		discardRange(t, path, 20<<20+4096, 2<<20)
		changed += 2 << 20
		from := len(c.logText(t))
		c.syncAndSettle(t, ebs)
		log := c.logText(t)[from:]
		same(t, path, ebs, oddVolumeBytes)
		marked, compared, _ := committedEpochs(log)
		if strings.Contains(log, "fine tracking has a gap") {
			t.Logf("a gap, that was told: marked %v, compared %v", marked, compared)
			continue
		}
		if len(marked) != 1 || marked[0] != changed || compared[0] != 0 {
			t.Errorf("%d bytes were written or discarded; marked %v, compared %v:\n%s", changed, marked, compared, log)
		}
		exact++
	}
	if exact == 0 {
		t.Error("there was a gap each time")
	}
	c.must(t, "verify")
	c.must(t, "down")
}

// fillDifferent fills a range with noise that differs from try to try.
func fillDifferent(t *testing.T, device string, offset, length int64, try byte) {
	t.Helper()
	b := alignedBuffer(int(length))
	defer unix.Munmap(b)
	rng := rand.NewChaCha8([32]byte{try})
	_, _ = rng.Read(b) // never fails
	f, err := os.OpenFile(device, os.O_WRONLY|unix.O_DIRECT, 0)
	if err == nil {
		_, err = f.WriteAt(b, offset)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}
