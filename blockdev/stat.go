package blockdev

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Traffic is what a device has done since it appeared, in bytes.
type Traffic struct {
	WrittenBytes   uint64
	DiscardedBytes uint64
}

// ReadTraffic reads the kernel's statistics of the block device at path. It
// is an error when the kernel does not keep them (queue/iostats is 0), since
// they would then look like a device that nothing is written to. Of some partitions
// they are the whole disk's; see Placement.StatDir.
func ReadTraffic(path string) (Traffic, error) { return hostKernel.traffic(path) }

// KeepStatistics has the kernel keep the statistics of the disk that the block
// device at path is on. switched says that it did not before: disks without
// requests (zram, device-mapper and md of some kernels) may come so.
func KeepStatistics(path string) (switched bool, err error) { return hostKernel.keepStatistics(path) }

func (k kernel) keepStatistics(path string) (switched bool, err error) {
	n, err := k.nodeAt(path)
	if err != nil {
		return false, fmt.Errorf("statistics of %s: %w", path, err)
	}
	file := filepath.Join(n.disk, "queue/iostats")
	if on, err := ReadNumber(file); err != nil || on != 0 {
		return false, err
	}
	if err := os.WriteFile(file, []byte("1"), 0); err != nil {
		return false, fmt.Errorf("statistics of %s are switched off, and can't be switched on: %w", path, err)
	}
	if on, err := ReadNumber(file); err != nil || on == 0 {
		return false, fmt.Errorf("statistics of %s are switched off: after writing 1 to %s it holds %d (%v)", path, file, on, err)
	}
	return true, nil
}

// WrittenBytes is the number of bytes written to the block device at path
// since it appeared; see ReadTraffic.
func WrittenBytes(path string) (uint64, error) {
	t, err := ReadTraffic(path)
	return t.WrittenBytes, err
}

func (k kernel) traffic(path string) (Traffic, error) {
	fail := func(err error) (Traffic, error) { return Traffic{}, fmt.Errorf("statistics of %s: %w", path, err) }
	n, err := k.nodeAt(path)
	if err != nil {
		return fail(err)
	}
	switch on, err := ReadNumber(filepath.Join(n.disk, "queue/iostats")); {
	case err != nil:
		return fail(err)
	case on == 0:
		return fail(fmt.Errorf("they are switched off: write 1 to %s", filepath.Join(n.disk, "queue/iostats")))
	}
	dir, err := n.statDir()
	if err != nil {
		return fail(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return fail(err)
	}
	return parseTraffic(string(text))
}

// parseTraffic parses a stat file: fields counted from 1, sectors written in
// 7, discarded in 14 (since Linux 4.18).
func parseTraffic(text string) (Traffic, error) {
	fields := strings.Fields(text)
	if len(fields) < 14 {
		return Traffic{}, fmt.Errorf("statistics have %d fields, want at least 14", len(fields))
	}
	written, err := strconv.ParseUint(fields[6], 10, 64)
	if err != nil {
		return Traffic{}, fmt.Errorf("sectors written: %w", err)
	}
	discarded, err := strconv.ParseUint(fields[13], 10, 64)
	if err != nil {
		return Traffic{}, fmt.Errorf("sectors discarded: %w", err)
	}
	return Traffic{written * SectorSize, discarded * SectorSize}, nil
}

// StatField is the n-th number, from 1, of a line of numbers. It allocates
// nothing.
func StatField(line []byte, n int) (uint64, bool) {
	field, value, inside := 0, uint64(0), false
	for _, c := range line {
		if c >= '0' && c <= '9' {
			if !inside {
				inside, value = true, 0
				field++
			}
			value = value*10 + uint64(c-'0')
			continue
		}
		if inside && field == n {
			return value, true
		}
		inside = false
	}
	return value, inside && field == n
}
