package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/rig"
)

const (
	ssdDisk = "/dev/ubda"
	ebsDisk = "/dev/ubdb"
	rawDisk = "/dev/ubdc"
	volume  = "/dev/mapper/data"
	raw     = "/dev/mapper/raw" // the same kind of disk, with nothing but a linear target over it

	volumeBytes = 256 << 20
)

// stand is the place a figure is measured at.
type stand struct {
	rig rig.Rig
	log safeBuffer
}

// safeBuffer is a buffer that is read while the agent writes to it.
type safeBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// configure describes a volume on ssdDisk, replicated to ebsDisk.
func (s *stand) configure(interval time.Duration) error {
	return s.rig.Configure(fmt.Sprintf(`volumes:
  data:
    device: %s
    size: %d
    interval: %v
    replicas:
      ebs: {device: %s, compression: none, journal: 320MiB}
`, ssdDisk, volumeBytes, interval, ebsDisk))
}

// replicated brings that volume up and waits for its first copy.
func (s *stand) replicated(ctx context.Context, interval time.Duration) error {
	if err := s.configure(interval); err != nil {
		return err
	}
	// Forced: what the disk holds becomes the volume's content.
	if err := s.rig.Run(ctx, "create", "--discard-my-data", "data"); err != nil {
		return err
	}
	if err := s.rig.StartAgent(ctx, &s.log); err != nil {
		return s.withLog(err)
	}
	if err := rig.AwaitFile(volume, 20*time.Second); err != nil {
		return s.withLog(err)
	}
	return s.withLog(s.rig.Await(ctx, "replicated", 2*time.Minute, upToDate))
}

func upToDate(v status.Volume) bool {
	return len(v.Replicas) == 1 && v.Replicas[0].Position != nil && v.Replicas[0].Disk == "UpToDate"
}

// unreplicated makes the device that is compared with.
func (s *stand) unreplicated() error {
	return rig.Do("dmsetup", "create", "raw", "--table", fmt.Sprintf("0 %d linear %s 0", volumeBytes/512, rawDisk))
}

func (s *stand) withLog(err error) error {
	if err == nil {
		return nil
	}
	lines := strings.Split(strings.TrimSpace(s.log.String()), "\n")
	return fmt.Errorf("%w; the agent's log ends with:\n%s", err, strings.Join(lines[max(0, len(lines)-15):], "\n"))
}

func (s *stand) close() error { return s.rig.StopAgent() }

// fill writes noise over a whole device.
func fill(device string, size int64, seed uint64) error {
	file, err := os.OpenFile(device, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	buffer, err := rig.Buffer(1 << 20)
	if err != nil {
		return err
	}
	defer unix.Munmap(buffer)
	noise := rand.NewChaCha8([32]byte{byte(seed)})
	for offset := int64(0); offset < size; offset += int64(len(buffer)) {
		noise.Read(buffer)
		if _, err := file.WriteAt(buffer[:min(int64(len(buffer)), size-offset)], offset); err != nil {
			return err
		}
	}
	return file.Sync()
}

// writes is what a run of single small writes showed.
type writes struct {
	perSecond float64
	worst     time.Duration
	median    time.Duration
}

// randomWrites writes 4 KiB blocks of noise at random places, one at a time,
// until the time is over.
func randomWrites(ctx context.Context, device string, size int64, lasting time.Duration, random *rand.Rand) (writes, error) {
	file, err := os.OpenFile(device, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return writes{}, err
	}
	defer file.Close()
	block, err := rig.Buffer(4096)
	if err != nil {
		return writes{}, err
	}
	defer unix.Munmap(block)
	var took []time.Duration
	began := time.Now()
	for time.Since(began) < lasting {
		if err := ctx.Err(); err != nil {
			return writes{}, err
		}
		for i := 0; i < len(block); i += 64 {
			block[i] = byte(random.Uint32())
		}
		at := time.Now()
		if _, err := file.WriteAt(block, random.Int64N(size/4096)*4096); err != nil {
			return writes{}, err
		}
		took = append(took, time.Since(at))
	}
	elapsed := time.Since(began)
	if len(took) == 0 {
		return writes{}, errors.New("no write in all the time")
	}
	slices.Sort(took)
	return writes{perSecond: float64(len(took)) / elapsed.Seconds(), worst: took[len(took)-1], median: took[len(took)/2]}, nil
}

// wireBytes is how much the agent has sent so far, as its debug log says of
// each epoch.
func (s *stand) wireBytes() (uint64, error) {
	var sum uint64
	found := sentInEpoch.FindAllStringSubmatch(s.log.String(), -1)
	for _, match := range found {
		n, err := strconv.ParseUint(match[1], 10, 64)
		if err != nil {
			return 0, err
		}
		sum += n
	}
	if len(found) == 0 {
		return 0, errors.New("the agent's log says of no epoch how much was sent")
	}
	return sum, nil
}

var sentInEpoch = regexp.MustCompile(`epoch committed.*\bWireBytes:(\d+)`)

// overwrite writes noise to count different blocks of 4 KiB, chosen at random.
func overwrite(device string, size int64, count int, random *rand.Rand) error {
	file, err := os.OpenFile(device, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	block, err := rig.Buffer(4096)
	if err != nil {
		return err
	}
	defer unix.Munmap(block)
	noise := rand.NewChaCha8([32]byte{byte(random.Uint32())})
	chosen := random.Perm(int(size / 4096))[:count]
	for _, at := range chosen {
		noise.Read(block)
		if _, err := file.WriteAt(block, int64(at)*4096); err != nil {
			return err
		}
	}
	return nil
}

// copySequentially does what `dd bs=1M iflag=direct oflag=direct conv=fsync`
// does, and says how long it took, in seconds.
func copySequentially(from, to string, size int64) (float64, error) {
	in, err := os.OpenFile(from, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return 0, err
	}
	defer out.Close()
	buffer, err := rig.Buffer(1 << 20)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(buffer)
	began := time.Now()
	for offset := int64(0); offset < size; offset += int64(len(buffer)) {
		if _, err := in.ReadAt(buffer, offset); err != nil {
			return 0, err
		}
		if _, err := out.WriteAt(buffer, offset); err != nil {
			return 0, err
		}
	}
	if err := out.Sync(); err != nil {
		return 0, err
	}
	return time.Since(began).Seconds(), nil
}
