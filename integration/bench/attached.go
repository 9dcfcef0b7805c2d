package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
)

// Where file systems of a native figure are mounted: the one that is replicated,
// and the one that it is compared with.
const (
	attachedFolder = "/mnt/attached"
	bareFolder     = "/mnt/bare"
)

// attach makes a file system on the first disk, fills a file of size bytes in it, and
// has an agent attached to it, which replicates to the second disk. With bare, the
// third disk gets the same, and nothing is attached to it. The files are mapped and
// written already: what is written to them later changes no metadata.
func (s *stand) attach(ctx context.Context, kind string, size int64, interval time.Duration, bare bool) error {
	if err := os.MkdirAll("/run/blockferry", 0o755); err != nil {
		return err
	}
	places := []struct{ device, folder string }{{s.disks[0], attachedFolder}}
	if bare {
		places = append(places, struct{ device, folder string }{s.disks[2], bareFolder})
	}
	for _, place := range places {
		if err := mountFresh(kind, place.device, place.folder); err != nil {
			return err
		}
		if size > 0 {
			if err := filledFile(filepath.Join(place.folder, "file"), size); err != nil {
				return err
			}
		}
	}
	if err := s.rig.Configure(fmt.Sprintf(`volumes:
  data:
    device: %s
    mode: attach
    interval: %v
    state-file: /run/blockferry/state
    replicas:
      ebs: {device: %s, compression: none, journal: 320MiB}
`, s.disks[0], interval, s.disks[1])); err != nil {
		return err
	}
	// The replica's disk may hold a copy of what was attached before.
	if err := s.rig.Run(ctx, "attach", "--discard-my-data", "data"); err != nil {
		return err
	}
	if err := s.rig.StartAgent(ctx, &s.log); err != nil {
		return s.withLog(err)
	}
	return s.withLog(s.rig.Await(ctx, "replicated", 2*time.Minute, upToDate))
}

// detach ends replication and tracking, and unmounts what attach mounted. Then the
// disks can be attached anew.
func (s *stand) detach(ctx context.Context) error {
	err := s.gone(ctx)
	for _, folder := range []string{attachedFolder, bareFolder} {
		if e := unmountSoon(folder); e != nil && !errors.Is(e, unix.EINVAL) && !errors.Is(e, unix.ENOENT) {
			err = errors.Join(err, e)
		}
	}
	return errors.Join(err, os.RemoveAll("/sys/fs/bpf/blockferry"), os.Remove("/run/blockferry/state"))
}

// mountFresh makes a file system whose tables are all written, so that the kernel
// has nothing to do on it by itself, with the blocks that one of usual size has.
func mountFresh(kind, device, folder string) error {
	args := map[string][]string{
		"ext4": {"-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0", device},
		"xfs":  {"-q", "-f", device},
	}[kind]
	if err := rig.Do("mkfs."+kind, args...); err != nil {
		return err
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, folder, kind, unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", device, folder, err)
	}
	return nil
}

func filledFile(path string, size int64) error {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(file.Fd()), 0, 0, size)
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	return fill(path, size, 4)
}
