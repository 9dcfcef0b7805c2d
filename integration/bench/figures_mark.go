package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// markCost has the kernel say what it spends in the programs that mark what is written, for
// each write to the attached device and for each to another one.
func markCost(ctx context.Context, s *stand, m *measured) error {
	if err := s.attach(ctx, "ext4", attachedBytes, time.Second, true); err != nil {
		return err
	}
	if err := s.settle(ctx); err != nil {
		return err
	}
	// The agent's own writes are to the replica's disk.
	if err := s.rig.Run(ctx, "pause", "data"); err != nil {
		return s.withLog(err)
	}
	programs, err := pinnedPrograms()
	if err != nil {
		return err
	}
	defer func() {
		for _, p := range programs {
			p.Close()
		}
	}()
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return fmt.Errorf("have the kernel count what programs take: %w", err)
	}
	defer stats.Close()
	writes := 50_000
	if once {
		writes = 1000
	}
	for _, c := range []struct{ name, what, path string }{
		{"attached", "to the attached device, a loop device", filepath.Join(attachedFolder, "file")},
		{"elsewhere", "to another device of the machine", filepath.Join(bareFolder, "file")},
	} {
		r := row{Name: c.name, Unit: "ns", What: "time in the kernel's programs, as the kernel counts it, for each write of 4 KiB at random, 16 at once, " + c.what}
		for range m.runs(7, 2) {
			before, runs, err := spent(programs)
			if err != nil {
				return err
			}
			if _, err := fio(ctx, c.path, attachedBytes, load{pattern: "randwrite", block: "4k", depth: 16, count: writes}); err != nil {
				return err
			}
			after, ran, err := spent(programs)
			if err != nil {
				return err
			}
			// Writes that happen to be side by side are merged into one request.
			if ran-runs < uint64(writes)*99/100 {
				return fmt.Errorf("the programs were run %d times for %d writes", ran-runs, writes)
			}
			r.Ours = append(r.Ours, float64(after-before)/float64(writes))
		}
		m.add(r)
	}
	return nil
}

// pinnedPrograms are those that follow the attached device.
func pinnedPrograms() (programs []*ebpf.Program, err error) {
	paths, err := filepath.Glob("/sys/fs/bpf/blockferry/*/*")
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		// Maps and links are pinned beside them.
		if p, err := ebpf.LoadPinnedProgram(path, nil); err == nil {
			programs = append(programs, p)
		}
	}
	if len(programs) == 0 {
		err = fmt.Errorf("no program is pinned below /sys/fs/bpf/blockferry: %q", paths)
	}
	return programs, err
}

// spent is the time in ns that was spent in programs until now, and how often they were run.
func spent(programs []*ebpf.Program) (ns, runs uint64, err error) {
	for _, p := range programs {
		s, e := p.Stats()
		if err = errors.Join(err, e); e == nil {
			ns, runs = ns+uint64(s.Runtime.Nanoseconds()), runs+s.RunCount
		}
	}
	return ns, runs, err
}
