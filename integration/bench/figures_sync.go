package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"blockferry/integration/rig"
)

const (
	syncBytes = 1 << 30
	// ebsRate is what a common volume of EBS gives (gp3 at 250 MB/s).
	ebsRate = 250_000_000
)

// firstSync copies the same noise both ways, each time onto a disk that holds
// nothing of it, with the disks as they are and with the replica's held to
// ebsRate.
func firstSync(ctx context.Context, s *stand, m *measured) error {
	if err := fill(ssdDisk, syncBytes+1<<20, 3); err != nil {
		return err
	}
	cgroup, err := newCgroup()
	if err != nil {
		return err
	}
	for _, limit := range []struct {
		name, what string
		rate       int64
	}{
		{"memory-disks", "the rate of a first sync of 1 GiB, from its first cut to its commit, over that of dd (bs=1M iflag=direct oflag=direct conv=fsync)", 0},
		{"250MBps-replica", "the same, the replica's disk held to 250 MB/s for both sides", ebsRate},
	} {
		var whole []float64
		held := func(f func() (float64, error)) (x float64, err error) {
			if err := rig.Zero(ebsDisk, syncBytes+256<<20); err != nil {
				return 0, err
			}
			if limit.rate > 0 {
				if err := cgroup.enter(ebsDisk, limit.rate); err != nil {
					return 0, err
				}
				defer func() { err = errors.Join(err, cgroup.leave()) }()
			}
			return f()
		}
		err := m.pairs(ctx, row{Name: limit.name, What: limit.what, Unit: "s", Inverse: true}, m.runs(5, 2),
			func(ctx context.Context) (float64, error) {
				return held(func() (float64, error) {
					took, all, err := s.firstSyncOnce(ctx, false)
					whole = append(whole, all.seconds)
					return took, err
				})
			},
			func(ctx context.Context) (float64, error) {
				return held(func() (float64, error) { return dd(ctx, ssdDisk, ebsDisk, syncBytes) })
			})
		if err != nil {
			return err
		}
		m.add(row{Name: limit.name + "-whole", What: "the same, but from the agent's start to the commit", Unit: "s", Inverse: true,
			Ours: whole, Theirs: m.Rows[len(m.Rows)-1].Theirs})
	}
	return nil
}

// firstSyncOnce makes a volume of what ssdDisk holds and has it copied to
// ebsDisk: seconds from the first cut to the commit, as the agent says, and
// what it all took from the agent's start to the commit. To be watched takes
// time from the guest's one CPU: only where the other side is, too.
func (s *stand) firstSyncOnce(ctx context.Context, watched bool) (took float64, all usage, err error) {
	if err := s.create(ctx, volumeSpec{size: syncBytes, journal: "64MiB", cow: "64MiB"}); err != nil {
		return 0, all, err
	}
	before, err := machineBusy()
	if err != nil {
		return 0, all, err
	}
	from, began := s.log.Len(), time.Now()
	if err := s.rig.StartAgent(ctx, &s.log); err != nil {
		return 0, all, s.withLog(err)
	}
	var w *watch
	if watched {
		w = watchProcess(s.rig.AgentPid(), before)
	}
	e, err := s.awaitEntry(ctx, "epoch committed", from, 2*time.Minute)
	ended := time.Since(began)
	if watched {
		var failed error
		all, failed = w.end()
		err = errors.Join(err, failed)
	}
	if err != nil {
		return 0, all, err
	}
	all.seconds = ended.Seconds()
	if e.Stats.Action != "full" || e.Stats.Link.SentBytes < syncBytes {
		return 0, all, fmt.Errorf("that was no whole first sync: %+v", e.Stats)
	}
	fmt.Printf("first sync: %+v\n", e.Stats)
	return e.Stats.TotalSeconds, all, s.gone(ctx)
}

// dd copies one device to another and returns the seconds that it says.
func dd(ctx context.Context, from, to string, size int64) (float64, error) {
	cmd := exec.CommandContext(ctx, "dd", "if="+from, "of="+to, "bs=1M", "count="+strconv.FormatInt(size>>20, 10),
		"iflag=direct", "oflag=direct", "conv=fsync")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("dd: %w: %s", err, out)
	}
	found := ddSays.FindSubmatch(out)
	if found == nil || string(found[1]) != strconv.FormatInt(size, 10) {
		return 0, fmt.Errorf("dd says: %s", out)
	}
	return strconv.ParseFloat(string(found[2]), 64)
}

var ddSays = regexp.MustCompile(`(?m)^(\d+) bytes .* copied, ([0-9.]+) s,`)

// cgroup holds this process, and what it starts meanwhile, to a disk's rate.
type cgroup struct{ root, group string }

func newCgroup() (*cgroup, error) {
	c := &cgroup{root: "/run/cgroup"}
	c.group = filepath.Join(c.root, "held")
	if err := os.MkdirAll(c.root, 0o755); err != nil {
		return nil, err
	}
	if err := rig.Do("mount", "-t", "cgroup2", "none", c.root); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(c.root, "cgroup.subtree_control"), []byte("+io"), 0); err != nil {
		return nil, err
	}
	return c, os.Mkdir(c.group, 0o755)
}

func (c *cgroup) move(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

// enter limits reading from a disk, and writing to it, to bytes per second.
func (c *cgroup) enter(device string, rate int64) error {
	info, err := os.Stat(device)
	if err != nil {
		return err
	}
	number := info.Sys().(*syscall.Stat_t).Rdev
	line := fmt.Sprintf("%d:%d rbps=%d wbps=%d", number>>8, number&0xff, rate, rate)
	if err := os.WriteFile(filepath.Join(c.group, "io.max"), []byte(line), 0); err != nil {
		return fmt.Errorf("%s: %w", line, err)
	}
	return c.move(c.group)
}

func (c *cgroup) leave() error { return c.move(c.root) }
