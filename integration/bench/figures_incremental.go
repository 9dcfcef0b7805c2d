package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
)

// changedFolder is where the file system on the volume is mounted; others copy lagSource.
const changedFolder = "/mnt/volume"

// changeLoads change the files of the load whose lag is measured, at a rate that is far from
// what either side can take.
var changeLoads = []struct {
	name, what string
	mixed      bool
	rate       float64 // bytes per second
}{
	{"incremental-4k", "writes of 4 KiB at random", false, 2 << 20},
	{"incremental-mixed", "nine writes of ten of 4 KiB and the others of up to 128 KiB, at random", true, 8 << 20},
}

// changing is writers that change files again and again.
type changing struct {
	numbered
	counted int // records of earlier runs
}

// changed is how many bytes of pages were written since it was last asked, each once.
func (c *changing) changed() (bytes float64) {
	pages := map[[2]int]bool{}
	for _, r := range c.records[c.counted:] {
		for page := r.first; page <= r.last; page++ {
			pages[[2]int{r.file, page}] = true
		}
	}
	c.counted = len(c.records)
	return float64(len(pages)) * lagPage
}

// incremental counts what it takes to keep a copy of what changes, first copy apart, beside
// rsync in a loop.
func (s *stand) incremental(ctx context.Context, m *measured) (err error) {
	if err := rig.Zero(s.disks[1], syncBytes+256<<20); err != nil {
		return err
	}
	if err := s.replicated(ctx, volumeSpec{size: lagBytes}); err != nil {
		return err
	}
	devices := map[string]string{top: changedFolder, s.disks[2]: lagSource, s.disks[3]: lagTarget}
	for device := range devices {
		if err := rig.Do("mkfs.ext4", "-q", "-F", "-b", "4096", device, fmt.Sprint(lagBytes/4096)); err != nil {
			return err
		}
	}
	unmount, err := mounted(devices)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	ours, theirs := &changing{numbered: numbered{dir: changedFolder, pages: lagFilePages}}, &changing{numbered: numbered{dir: lagSource, pages: lagFilePages}}
	if err := errors.Join(ours.prepare(), theirs.prepare()); err != nil {
		return err
	}
	if err := rig.Do("rsync", "-a", lagSource+"/", lagTarget+"/"); err != nil {
		return err
	}
	unix.Sync()
	// Its peak of memory shall not be that of the first copy.
	if err := s.settle(ctx); err != nil {
		return err
	}
	if err := s.rig.StopAgent(); err != nil {
		return s.withLog(err)
	}
	if err := s.rig.StartAgent(ctx, &s.log); err != nil {
		return s.withLog(err)
	}
	if err := s.rig.Await(ctx, "replicated", time.Minute, upToDate); err != nil {
		return s.withLog(err)
	}
	there := &target{dir: lagTarget}
	for _, l := range changeLoads {
		ours.mixed, theirs.mixed = l.mixed, l.mixed
		lasting := m.lasting(8*time.Second, 3*time.Second)
		var taken [2][]usage // per GiB, ours and rsync's
		count := m.runs(5, 2)
		for n := range count {
			sides := []int{n % 2, 1 - n%2}
			for _, side := range sides {
				c, run := ours, func() (usage, error) { return s.replicateChanges(ctx, ours, lasting, l.rate) }
				if side == 1 {
					c, run = theirs, func() (usage, error) { return copyChanges(ctx, theirs, there, lasting, l.rate) }
				}
				if err := s.settle(ctx); err != nil {
					return err
				}
				u, err := run()
				if err != nil {
					return fmt.Errorf("%s, run %d: %w", l.name, n+1, err)
				}
				gib := c.changed() / (1 << 30)
				fmt.Printf("%s, %s, run %d of %d: %+v for %.4f GiB\n", l.name, []string{"blockferry", "rsync-loop"}[side], n+1, count, u, gib)
				u.cpu, u.own = u.cpu/gib, u.own/gib
				taken[side] = append(taken[side], u)
			}
		}
		m.addIncremental(l.name, fmt.Sprintf("%s, %v of them", l.what, lasting), taken[0], taken[1])
	}
	return nil
}

// addIncremental adds what both took, per GiB of pages that were changed.
func (m *measured) addIncremental(name, load string, ours, theirs []usage) {
	const rsync = "rsync -a --inplace in a loop, begun once a second at most and once more when all is written"
	for _, value := range []struct {
		name, what, unit string
		of               func(usage) float64
	}{
		{"cpu", "CPU seconds of the whole guest but for the writers, per GiB of pages changed", "s/GiB", func(u usage) float64 { return u.cpu }},
		{"own-cpu", "CPU seconds of the processes themselves (agent, with the replica, and dead-man), per GiB of pages changed", "s/GiB", func(u usage) float64 { return u.own }},
		{"rss", "peak resident memory of all the processes together", "MiB", func(u usage) float64 { return u.rss }},
	} {
		r := row{Name: name + "/" + value.name, Unit: value.unit, Ours: each(ours, value.of), Theirs: each(theirs, value.of),
			What: value.what + ", replicated at interval 1s: " + load + ", over that of " + rsync}
		m.add(r)
		r.Name, r.Theirs, r.What = r.Name+"-blockferry", nil, value.what+", likewise, of blockferry alone"
		m.add(r)
	}
}

// replicateChanges has writers change what the agent replicates, until all of it is.
func (s *stand) replicateChanges(ctx context.Context, c *changing, lasting time.Duration, rate float64) (usage, error) {
	taken := func() (u usage, err error) {
		// The command that waits for the replica is no part of it.
		u.cpu, err = busyBeside(unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN)
		for _, pid := range descendants(s.rig.AgentPid()) {
			seconds, failed := processCPU(pid)
			_, peak, alsoFailed := memory(pid)
			err = errors.Join(err, failed, alsoFailed)
			u.own, u.rss = u.own+seconds, u.rss+peak
		}
		return u, err
	}
	before, err := taken()
	if err != nil {
		return usage{}, err
	}
	if err := c.write(ctx, lasting, rate); err != nil {
		return usage{}, s.withLog(err)
	}
	if err := s.settle(ctx); err != nil {
		return usage{}, err
	}
	after, err := taken()
	return usage{cpu: after.cpu - before.cpu, own: after.own - before.own, rss: after.rss}, err
}

// copyChanges has rsync copy what writers change, until all of it is there.
func copyChanges(ctx context.Context, c *changing, there *target, lasting time.Duration, rate float64) (u usage, err error) {
	before, err := busyBeside(unix.RUSAGE_SELF)
	if err != nil {
		return u, err
	}
	written := make(chan error, 1)
	go func() { written <- c.write(ctx, lasting, rate) }()
	for writing, last := true, false; !last; {
		began := time.Now()
		last = !writing
		pass, err := measureCommand(ctx, nil, "rsync", "-a", "--inplace", lagSource+"/", lagTarget+"/")
		u.own, u.rss = u.own+pass.own, max(u.rss, pass.rss)
		if writing {
			select {
			case failed := <-written:
				err, writing = errors.Join(err, failed), false
			case <-time.After(time.Until(began.Add(time.Second))):
			}
		}
		if err != nil {
			if writing {
				<-written
			}
			return u, err
		}
	}
	if err := syncFileSystem(lagTarget); err != nil {
		return u, err
	}
	after, err := busyBeside(unix.RUSAGE_SELF)
	u.cpu = after - before
	if err != nil {
		return u, err
	}
	lag, _, err := there.lag(&c.numbered)
	if err == nil && lag > 0 {
		err = fmt.Errorf("rsync has not copied write %d of %d", there.arrived+1, len(c.records))
	}
	return u, err
}

// busyBeside is how long the machine's CPUs were not idle since it booted, in seconds, but for what
// these (see getrusage) used: of this process, in which the writers run, and of the commands
// that it ran.
func busyBeside(whose ...int) (float64, error) {
	busy, err := machineBusy()
	for _, who := range whose {
		var used unix.Rusage
		err = errors.Join(err, unix.Getrusage(who, &used))
		busy -= time.Duration(used.Utime.Nano() + used.Stime.Nano()).Seconds()
	}
	return busy, err
}
