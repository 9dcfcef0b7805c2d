package dm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// flushPatience is how long a flush may take before a device is made to fail without
// its end.
const flushPatience = 10 * time.Second

// passing are targets with nothing of their own to flush: what they map to is flushed
// in their place, as they may be suspended.
var passing = []string{"linear", "era", "snapshot-origin", errorTarget}

// caches are the disks, open, whose flush makes durable what a device has written.
type caches []*os.File

// beneath opens what is to be flushed of a device that is going to be suspended itself.
func (c *Control) beneath(name string) (found caches, err error) {
	defer func() {
		if err != nil {
			found.close()
			found = nil
		}
	}()
	seen := map[string]bool{}
	var look func(name string) error
	look = func(name string) error {
		info, err := c.Info(name)
		if err != nil {
			return err
		}
		under, err := filepath.Glob(filepath.Join("/sys/dev/block", info.Dev(), "slaves/*"))
		if err != nil {
			return err
		}
		for _, dir := range under {
			number, err := attribute(dir, "dev")
			if err != nil {
				return err
			}
			if seen[number] {
				continue
			}
			seen[number] = true
			if below, err := attribute(dir, "dm/name"); err == nil {
				table, err := c.Table(below)
				if err != nil {
					return err
				}
				if !slices.ContainsFunc(table, func(t Target) bool { return !slices.Contains(passing, t.Type) }) {
					if err := look(below); err != nil {
						return err
					}
					continue
				}
			}
			f, err := openNumber(number)
			if err != nil {
				return err
			}
			found = append(found, f)
		}
		return nil
	}
	return found, look(name)
}

func attribute(dir, name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, name))
	return strings.TrimSpace(string(b)), err
}

// openNumber opens a block device by "major:minor", at the kernel's own node.
func openNumber(number string) (*os.File, error) {
	var major, minor uint32
	if _, err := fmt.Sscanf(number, "%d:%d", &major, &minor); err != nil {
		return nil, fmt.Errorf("block device '%s': %w", number, err)
	}
	path, err := blockdev.Node(number)
	if err != nil {
		return nil, err
	}
	if isNode(path, unix.Mkdev(major, minor)) {
		return os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	return nil, fmt.Errorf("block device %s has no node of its own in /dev", number)
}

func (c caches) flush() error {
	var errs []error
	for _, f := range c {
		for {
			err := unix.Fdatasync(int(f.Fd()))
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("flush %s: %w", f.Name(), err))
			}
			break
		}
	}
	return errors.Join(errs...)
}

func (c caches) close() {
	for _, f := range c {
		f.Close()
	}
}

// flushBeneath makes durable what a suspended device has written. To look for the disks takes
// a while, so that is not done before writers are held.
func (c *Control) flushBeneath(name string) error {
	disks, err := c.beneath(name)
	if err != nil {
		return fmt.Errorf("what it stands on is not found: %w", err)
	}
	defer disks.close()
	return disks.flush()
}

// within runs a flush and returns after a time at the latest, with an error if it has not ended.
func within(patience time.Duration, flush func() error) error {
	ended := make(chan error, 1)
	go func() { ended <- flush() }()
	select {
	case err := <-ended:
		return err
	case <-time.After(patience):
		return fmt.Errorf("the flush of what it stands on has not ended after %s", patience)
	}
}
