package main

import (
	"context"
	"fmt"
	"time"
)

// loads are the ways to write that tracking is measured with.
var loads = []struct {
	name, what, unit string
	load             load
	bytes            bool // measured in bytes, not writes
}{
	{"4k-qd1", "4 KiB at random, one at a time", "writes/s", load{pattern: "randwrite", block: "4k", depth: 1}, false},
	{"4k-qd16", "4 KiB at random, 16 at once", "writes/s", load{pattern: "randwrite", block: "4k", depth: 16}, false},
	{"4k-fdatasync", "4 KiB at random, each with fdatasync", "writes/s", load{pattern: "randwrite", block: "4k", depth: 1, fdatasync: true}, false},
	{"256k-sequential", "256 KiB in sequence", "bytes/s", load{pattern: "write", block: "256k", depth: 1}, true},
}

// eraBlocks are the grains of tracking that are compared.
var eraBlocks = []string{"64KiB", "256KiB", "1MiB", "4MiB"}

// rate runs a load of such a kind on a device.
func rate(ctx context.Context, device string, size int64, l load, bytes bool) (float64, error) {
	w, err := fio(ctx, device, size, l)
	if bytes {
		return w.bytesPerSecond, err
	}
	return w.iops, err
}

// bareDisk makes the device that is compared with; what is written to it
// later has its place already.
func (s *stand) bareDisk(size int64) error {
	if err := s.unreplicated(size); err != nil {
		return err
	}
	return fill(raw, size, 1)
}

// trackingAlone has every block marked and no cut to come: replication is
// paused.
func (s *stand) trackingAlone(ctx context.Context, size int64) error {
	if err := s.settle(ctx); err != nil {
		return err
	}
	if err := s.rig.Run(ctx, "pause", "data"); err != nil {
		return s.withLog(err)
	}
	return fill(top, size, 2)
}

// uncut fails if there was a cut after the log was from long.
func (s *stand) uncut(from int) error {
	cuts, err := s.entries("cut", from)
	if err == nil && len(cuts) > 0 {
		err = fmt.Errorf("%d cuts were taken where tracking alone was measured", len(cuts))
	}
	return err
}

func trackedVersusRaw(ctx context.Context, s *stand, m *measured) error {
	if err := s.bareDisk(volumeBytes); err != nil {
		return err
	}
	if err := s.replicated(ctx, volumeSpec{}); err != nil {
		return err
	}
	if err := s.trackingAlone(ctx, volumeBytes); err != nil {
		return err
	}
	from := s.log.Len()
	for _, l := range loads {
		// Many short runs: what else the machine does then falls on both sides.
		l.load.lasting = m.lasting(700*time.Millisecond, 700*time.Millisecond)
		on := func(device string) side {
			return func(ctx context.Context) (float64, error) { return rate(ctx, device, volumeBytes, l.load, l.bytes) }
		}
		r := row{Name: l.name, What: l.what + ", on the volume over the bare disk", Unit: l.unit}
		if err := m.pairs(ctx, r, m.runs(21, 5), on(top), on(raw)); err != nil {
			return err
		}
	}
	return s.uncut(from)
}

// afterCutBytes is the volume's size there: so large that few of a run's
// writes come second to their block.
const afterCutBytes = 512 << 20

// eraBlock measures what the default of era-block is chosen by.
func eraBlock(ctx context.Context, s *stand, m *measured) error {
	if err := s.bareDisk(afterCutBytes); err != nil {
		return err
	}
	lasting := m.lasting(time.Second, time.Second)
	for _, grain := range eraBlocks {
		if err := s.replicated(ctx, volumeSpec{size: afterCutBytes, eraBlock: grain}); err != nil {
			return err
		}
		count := m.runs(7, 2)
		for _, l := range loads[:2] {
			l.load.lasting = lasting
			r := row{Name: grain + "/" + l.name + "-after-cut", Unit: l.unit,
				What: fmt.Sprintf("%s, era-block %s, the first %v after a cut, over the bare disk", l.what, grain, lasting)}
			afterCut := func(ctx context.Context) (float64, error) {
				if err := s.rig.Run(ctx, "resume", "data"); err != nil {
					return 0, s.withLog(err)
				}
				if err := s.settle(ctx); err != nil {
					return 0, err
				}
				if err := s.rig.Run(ctx, "pause", "data"); err != nil {
					return 0, s.withLog(err)
				}
				from := s.log.Len()
				x, err := rate(ctx, top, afterCutBytes, l.load, false)
				if err == nil {
					err = s.uncut(from)
				}
				return x, err
			}
			bare := func(ctx context.Context) (float64, error) { return rate(ctx, raw, afterCutBytes, l.load, false) }
			if err := m.pairs(ctx, r, count, afterCut, bare); err != nil {
				return err
			}
		}
		if err := s.rig.Run(ctx, "resume", "data"); err != nil {
			return s.withLog(err)
		}
		const part = afterCutBytes / 4
		if err := s.trackingAlone(ctx, part); err != nil {
			return err
		}
		l := loads[3] // large writes are split at the borders of era blocks
		l.load.lasting = lasting
		on := func(device string) side {
			return func(ctx context.Context) (float64, error) { return rate(ctx, device, part, l.load, l.bytes) }
		}
		r := row{Name: grain + "/" + l.name, What: l.what + ", era-block " + grain + ", all marked, over the bare disk", Unit: l.unit}
		if err := m.pairs(ctx, r, count, on(top), on(raw)); err != nil {
			return err
		}
		if err := s.rig.Run(ctx, "resume", "data"); err != nil {
			return s.withLog(err)
		}
		if err := s.gone(ctx); err != nil {
			return err
		}
	}
	return nil
}

// replicatingLatency writes at a part of the rate that the bare disk can take.
func replicatingLatency(ctx context.Context, s *stand, m *measured) error {
	if err := s.bareDisk(volumeBytes); err != nil {
		return err
	}
	if err := s.replicated(ctx, volumeSpec{}); err != nil {
		return err
	}
	for _, at := range []struct {
		depth, part int
		name, words string
	}{
		{1, 2, "qd1-half", "half"},
		{16, 2, "qd16-half", "half"},
		{1, 10, "qd1-tenth", "a tenth of"},
	} {
		l := load{pattern: "randwrite", block: "4k", depth: at.depth, lasting: 2 * time.Second}
		if err := s.settle(ctx); err != nil {
			return err
		}
		full, err := fio(ctx, raw, volumeBytes, l)
		if err != nil {
			return err
		}
		l.rate, l.lasting = int(full.iops)/at.part, m.lasting(5*time.Second, 3*time.Second)
		what := fmt.Sprintf("4 KiB at random, %d at once, at %s the bare disk's rate while it is cut and replicated every second, over the same on the bare disk", at.depth, at.words)
		p50 := row{Name: at.name + "-p50", What: "median latency, " + what, Unit: "ms"}
		p99 := row{Name: at.name + "-p99", What: "99th percentile, " + what, Unit: "ms"}
		got := row{Name: at.name + "-rate", What: "writes per second that were reached then, over the same on the bare disk", Unit: "writes/s"}
		on := func(device string, long, reached *[]float64) side {
			return func(ctx context.Context) (float64, error) {
				if err := s.settle(ctx); err != nil {
					return 0, err
				}
				w, err := fio(ctx, device, volumeBytes, l)
				*long, *reached = append(*long, w.p99), append(*reached, w.iops)
				return w.p50, err
			}
		}
		if err := m.pairs(ctx, p50, m.runs(5, 2), on(top, &p99.Ours, &got.Ours), on(raw, &p99.Theirs, &got.Theirs)); err != nil {
			return err
		}
		m.add(p99)
		m.add(got)
	}
	return nil
}
