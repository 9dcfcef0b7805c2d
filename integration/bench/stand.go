package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/rig"
	"blockferry/protocol"
)

var (
	ssdDisk = guestDisk('a')
	ebsDisk = guestDisk('b')
	rawDisk = guestDisk('c')
)

const (
	top = "/dev/mapper/data"
	raw = "/dev/mapper/raw" // the same kind of disk, with nothing but a linear target over it

	volumeBytes = 256 << 20
)

// stand is the place a figure is measured at.
type stand struct {
	rig   rig.Rig
	log   safeBuffer
	image string // of the volume's cuts, where figures change it
	// disks are the figure's: in a guest ssdDisk and so on, otherwise loop devices.
	disks []string
	loops []*os.File // that keep those there
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

func (b *safeBuffer) Len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Len()
}

// since is what was written after Len was from.
func (b *safeBuffer) since(from int) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return string(b.text.Bytes()[from:])
}

// volumeSpec is a volume, replicated to one disk.
type volumeSpec struct {
	device   string        // "": ssdDisk
	replica  string        // "": ebsDisk
	size     int64         // 0: volumeBytes
	interval time.Duration // 0: 1 s
	eraBlock string        // "": the default
	journal  string        // "": 320MiB
	cow      string        // "": the default
	image    string        // "": the default
}

// configure describes that volume.
func (s *stand) configure(v volumeSpec) error {
	if v.device == "" {
		v.device = ssdDisk
	}
	if v.replica == "" {
		v.replica = ebsDisk
	}
	if v.size == 0 {
		v.size = volumeBytes
	}
	if v.interval == 0 {
		v.interval = time.Second
	}
	if v.journal == "" {
		v.journal = "320MiB"
	}
	options := ""
	if v.eraBlock != "" {
		options += "    era-block: " + v.eraBlock + "\n"
	}
	if v.cow != "" {
		options += "    cow: " + v.cow + "\n"
	}
	if v.image != "" {
		options += "    image: " + v.image + "\n"
	}
	return s.rig.Configure(fmt.Sprintf(`volumes:
  data:
    device: %s
    size: %d
    interval: %v
%s    replicas:
      ebs: {device: %s, compression: none, journal: %s}
`, v.device, v.size, v.interval, options, v.replica, v.journal))
}

// create formats it. Forced: what the disk holds becomes the volume's content.
func (s *stand) create(ctx context.Context, v volumeSpec) error {
	if err := s.configure(v); err != nil {
		return err
	}
	return s.rig.Run(ctx, "create", "--discard-my-data", "data")
}

// replicated brings a new volume up and waits for its first copy.
func (s *stand) replicated(ctx context.Context, v volumeSpec) error {
	if err := s.create(ctx, v); err != nil {
		return err
	}
	if err := s.rig.StartAgent(ctx, &s.log); err != nil {
		return s.withLog(err)
	}
	if err := rig.AwaitFile(top, 20*time.Second); err != nil {
		return s.withLog(err)
	}
	return s.withLog(s.rig.Await(ctx, "replicated", 2*time.Minute, upToDate))
}

// gone takes the volume down and ends the agent.
func (s *stand) gone(ctx context.Context) error {
	if err := s.rig.Run(ctx, "down", "data"); err != nil {
		return s.withLog(err)
	}
	return s.rig.StopAgent()
}

func upToDate(v status.Volume) bool {
	return len(v.Replicas) == 1 && v.Replicas[0].Position != nil && v.Replicas[0].Disk == "UpToDate"
}

// unreplicated makes the device that is compared with.
func (s *stand) unreplicated(size int64) error {
	return rig.Do("dmsetup", "create", "raw", "--table", fmt.Sprintf("0 %d linear %s 0", size/512, rawDisk))
}

// settle waits until the agent has nothing left to do, so that it does not
// work off our side's writes while the other side is measured.
func (s *stand) settle(ctx context.Context) error {
	return s.withLog(s.rig.Run(ctx, "sync", "--wait", "--timeout", "2m", "data"))
}

func (s *stand) withLog(err error) error {
	if err == nil {
		return nil
	}
	lines := strings.Split(strings.TrimSpace(s.log.since(0)), "\n")
	return fmt.Errorf("%w; the agent's log ends with:\n%s", err, strings.Join(lines[max(0, len(lines)-15):], "\n"))
}

func (s *stand) close() error {
	err := s.rig.StopAgent()
	for _, device := range s.loops {
		err = errors.Join(err, device.Close())
	}
	return err
}

// entry is a line of the agent's log, as far as something is measured by it.
type entry struct {
	Message string              `json:"msg"`
	Stats   protocol.EpochStats `json:"stats"`         // "epoch committed"
	For     string              `json:"for"`           // "writers stopped": cut or release
	Seconds float64             `json:"seconds"`       // likewise; of "changed", the time to find out
	Ranges  int                 `json:"ranges"`        // "changed"
	Drain   float64             `json:"drain-seconds"` // "a cut's stop in parts"
	Inside  float64             `json:"inside-seconds"`
	Resume  float64             `json:"resume-seconds"`
}

// entries are the log's lines with a message, after Len was from.
func (s *stand) entries(message string, from int) ([]entry, error) {
	var found []entry
	for line := range strings.Lines(s.log.since(from)) {
		if !strings.HasSuffix(line, "\n") || !strings.Contains(line, `"`+message+`"`) {
			continue // not all of it is there yet
		}
		var e entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			return nil, fmt.Errorf("the agent's log: %w: %s", err, line)
		}
		if e.Message == message {
			found = append(found, e)
		}
	}
	return found, nil
}

// awaitEntry waits for the first of them.
func (s *stand) awaitEntry(ctx context.Context, message string, from int, limit time.Duration) (entry, error) {
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		found, err := s.entries(message, from)
		switch {
		case err != nil:
			return entry{}, err
		case len(found) > 0:
			return found[0], nil
		case ctx.Err() != nil:
			return entry{}, ctx.Err()
		case time.Now().After(deadline):
			return entry{}, s.withLog(fmt.Errorf("the agent's log does not say %q within %v", message, limit))
		}
	}
}

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

// kernelRelease is the running kernel's, without its builder's suffix.
func kernelRelease() string {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err.Error()
	}
	release, _, _ := strings.Cut(unix.ByteSliceToString(name.Release[:]), "-")
	return release
}

// diskBytes is what was read from a disk and written to it, as the kernel
// counts.
func diskBytes(path string) (read, written float64, err error) {
	var device unix.Stat_t
	if err := unix.Stat(path, &device); err != nil {
		return 0, 0, fmt.Errorf("%s: %w", path, err)
	}
	text, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(device.Rdev), unix.Minor(device.Rdev)))
	if err != nil {
		return 0, 0, err
	}
	fields := strings.Fields(string(text))
	if len(fields) < 7 {
		return 0, 0, errors.New(path + ": its statistics have too few fields")
	}
	var r, w uint64
	if _, err := fmt.Sscan(fields[2]+" "+fields[6], &r, &w); err != nil {
		return 0, 0, fmt.Errorf("%s: its statistics: %w", path, err)
	}
	return float64(r) * 512, float64(w) * 512, nil
}
