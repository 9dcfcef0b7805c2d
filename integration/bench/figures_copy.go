package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
)

// source is the volume's data on ssdDisk, without a volume around it.
const source = "/dev/mapper/source"

type copier struct {
	name, what string
	files      bool // copies a file system's files, not the device
	run        func(ctx context.Context) (usage, error)
}

// copiers are other ways to make the first copy of a device, or of what is on
// it. Each finds ebsDisk holding zeros.
var copiers = []copier{
	{"rsync-files", "rsync -a --inplace of the file system's files to a fresh one, then syncfs,", true, rsyncFiles},
	{"rsync-device", "rsync --inplace --copy-devices --write-devices of the device, then fsync,", false, func(ctx context.Context) (usage, error) {
		return measureCommand(ctx, flush(ebsDisk), "rsync", "--inplace", "--copy-devices", "--write-devices", source, ebsDisk)
	}},
	{"nbdcopy", "nbdcopy --flush from device to device", false, func(ctx context.Context) (usage, error) {
		return measureCommand(ctx, nil, "nbdcopy", "--flush", source, ebsDisk)
	}},
	{"nbdcopy-nbdkit", "nbdcopy --flush from nbdkit's file plugin, over a Unix socket, to the device", false, func(ctx context.Context) (usage, error) {
		return measureCommand(ctx, nil, "nbdcopy", "--flush", "--", "[", "nbdkit", "--readonly", "--exit-with-parent", "file", source, "]", ebsDisk)
	}},
}

// rsyncFiles copies as people do it. To make the file system is not counted.
func rsyncFiles(ctx context.Context) (u usage, err error) {
	if err := rig.Do("mkfs.ext4", "-q", "-F", "-b", "4096", ebsDisk, fmt.Sprint(syncBytes/4096)); err != nil {
		return u, err
	}
	unmount, err := mounted(map[string]string{source: "/mnt/from", ebsDisk: "/mnt/to"})
	if err != nil {
		return u, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	return measureCommand(ctx, func() error { return syncFileSystem("/mnt/to") }, "rsync", "-a", "--inplace", "/mnt/from/", "/mnt/to/")
}

func syncFileSystem(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Syncfs(int(dir.Fd()))
}

// mounted mounts devices as ext4.
func mounted(at map[string]string) (unmount func() error, err error) {
	var done []string
	unmount = func() (err error) {
		for _, path := range done {
			err = errors.Join(err, unmountSoon(path))
		}
		return err
	}
	for device, path := range at {
		err := os.MkdirAll(path, 0o755)
		if err == nil {
			err = unix.Mount(device, path, "ext4", 0, "")
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("mount %s on %s: %w", device, path, err), unmount())
		}
		done = append(done, path)
	}
	return unmount, nil
}

// unmountSoon gives a process that was killed, and still has something open
// there, a while to end.
func unmountSoon(path string) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := unix.Unmount(path, 0)
		if err == nil {
			return nil
		}
		if err != unix.EBUSY || time.Now().After(deadline) {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// asSource makes what is to become the volume's data readable as a device, for as long
// as f runs.
func asSource(f func() error) (err error) {
	// A volume's data begins after the label, at 1 MiB.
	if err := rig.Do("dmsetup", "create", "source", "--table", fmt.Sprintf("0 %d linear %s 2048", syncBytes/512, ssdDisk)); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rig.Do("dmsetup", "remove", "source")) }()
	return f()
}

// kinds are the files that are copied, filesBytes all of them.
var kinds = []struct {
	name         string
	count, bytes int
}{{"large", 4, 128 << 20}, {"middle", 200, 1 << 20}, {"small", 4000, 20 << 10}}

const filesBytes = 4*128<<20 + 200<<20 + 4000*20<<10

// fillSource has the volume's data be a file system that is four fifths full of
// noise, as is the rest of it.
func fillSource() error {
	return asSource(func() (err error) {
		if err := fill(source, syncBytes, 5); err != nil {
			return err
		}
		// What is free keeps its noise.
		if err := rig.Do("mkfs.ext4", "-q", "-F", "-E", "nodiscard", source); err != nil {
			return err
		}
		unmount, err := mounted(map[string]string{source: "/mnt/from"})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, unmount()) }()
		noise := rand.NewChaCha8([32]byte{6})
		for _, kind := range kinds {
			if err := os.Mkdir(filepath.Join("/mnt/from", kind.name), 0o755); err != nil {
				return err
			}
			content := make([]byte, min(kind.bytes, 1<<20))
			for i := range kind.count {
				file, err := os.Create(fmt.Sprintf("/mnt/from/%s/%d", kind.name, i))
				if err != nil {
					return err
				}
				for written := 0; written < kind.bytes; written += len(content) {
					noise.Read(content)
					if _, err := file.Write(content); err != nil {
						return errors.Join(err, file.Close())
					}
				}
				if err := file.Close(); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// copied is what a copier and a first sync took, pair by pair.
type copied struct {
	sync, ours, theirs []usage // sync: ours from the first cut on, its seconds alone
	bytes              float64 // that the copier copied
}

// copies has a copier and first syncs take turns.
func (s *stand) copies(ctx context.Context, count int, c copier) (copied, error) {
	r := copied{bytes: syncBytes}
	if c.files {
		r.bytes = filesBytes
	}
	ours := func() error {
		took, whole, err := s.firstSyncOnce(ctx, true)
		r.sync, r.ours = append(r.sync, usage{seconds: took}), append(r.ours, whole)
		return err
	}
	theirs := func() error {
		return asSource(func() error {
			u, err := c.run(ctx)
			r.theirs = append(r.theirs, u)
			return err
		})
	}
	for n := range count {
		order := []func() error{ours, theirs}
		if n%2 == 1 {
			slices.Reverse(order)
		}
		for _, run := range order {
			if err := rig.Zero(ebsDisk, syncBytes+256<<20); err != nil {
				return r, err
			}
			if err := dropCaches(); err != nil {
				return r, err
			}
			if err := run(); err != nil {
				return r, fmt.Errorf("%s, pair %d: %w", c.name, n+1, err)
			}
		}
		fmt.Printf("%s, pair %d of %d: %+v, %+v\n", c.name, n+1, count, r.ours[n], r.theirs[n])
	}
	return r, nil
}

// each is one value of every usage.
func each(of []usage, value func(usage) float64) (values []float64) {
	for _, u := range of {
		values = append(values, value(u))
	}
	return values
}

func seconds(u usage) float64 { return u.seconds }

// firstSyncVersusRsync has the first copy made in every way, over and over.
func firstSyncVersusRsync(ctx context.Context, s *stand, m *measured) error {
	if err := fillSource(); err != nil {
		return err
	}
	for _, c := range copiers {
		r, err := s.copies(ctx, m.runs(5, 2), c)
		if err != nil {
			return err
		}
		sync := row{Name: c.name, Unit: "s", Inverse: true, Ours: each(r.sync, seconds), Theirs: each(r.theirs, seconds),
			What: "how many times as fast as " + c.what + " a first sync of the device is, from its first cut to its commit"}
		m.add(sync)
		m.add(row{Name: c.name + "-whole", Unit: "s", Inverse: true, Ours: each(r.ours, seconds), Theirs: each(r.theirs, seconds),
			What: "the same, but from the agent's start to the commit"})
	}
	return nil
}

// cpuPerGiB has the same copies made, and changes after them, and counts what they take.
func cpuPerGiB(ctx context.Context, s *stand, m *measured) error {
	if err := fillSource(); err != nil {
		return err
	}
	var whole []usage
	for _, c := range copiers {
		r, err := s.copies(ctx, m.runs(5, 2), c)
		if err != nil {
			return err
		}
		whole = append(whole, r.ours...)
		for _, value := range []struct {
			name, what, unit string
			of               func(u usage, bytes float64) float64
		}{
			{"cpu", "CPU seconds of the whole guest per GiB of a first sync", "s/GiB", func(u usage, bytes float64) float64 { return u.cpu / bytes * (1 << 30) }},
			{"own-cpu", "CPU seconds of the processes themselves per GiB of a first sync", "s/GiB", func(u usage, bytes float64) float64 { return u.own / bytes * (1 << 30) }},
			{"rss", "peak resident memory of all the processes together in a first sync", "MiB", func(u usage, _ float64) float64 { return u.rss }},
		} {
			m.add(row{Name: c.name + "/" + value.name, What: value.what + ", over that of " + c.what, Unit: value.unit,
				Ours:   each(r.ours, func(u usage) float64 { return value.of(u, syncBytes) }),
				Theirs: each(r.theirs, func(u usage) float64 { return value.of(u, r.bytes) })})
		}
	}
	m.add(row{Name: "cpu", What: "CPU seconds of the whole guest per GiB of a first sync, from the agent's start to the commit", Unit: "s", Ours: each(whole, func(u usage) float64 { return u.cpu })})
	m.add(row{Name: "rss", What: "peak resident memory of the agent and its dead-man in a first sync of 1 GiB", Unit: "MiB", Ours: each(whole, func(u usage) float64 { return u.rss })})
	return s.incremental(ctx, m)
}
