package main

import (
	"context"
	"fmt"
	"path/filepath"
	"time"
)

// attachedBytes is the size of the file that is written.
const attachedBytes = 256 << 20

// attachedVersusRaw writes to a file on an attached device and to one on a bare device,
// in turn: while changes are only marked, while they are replicated and the writer has a
// rate, and at full speed.
func attachedVersusRaw(ctx context.Context, s *stand, m *measured) error {
	if err := s.attach(ctx, "ext4", attachedBytes, time.Second, true); err != nil {
		return err
	}
	ours, bare := filepath.Join(attachedFolder, "file"), filepath.Join(bareFolder, "file")
	if err := s.attachedTracking(ctx, m, ours, bare); err != nil {
		return err
	}
	if err := s.attachedLatency(ctx, m, ours, bare); err != nil {
		return err
	}
	return s.attachedFullSpeed(ctx, m, ours, bare)
}

// attachedTracking is tracking alone: no cut is taken.
func (s *stand) attachedTracking(ctx context.Context, m *measured, ours, bare string) error {
	if err := s.settle(ctx); err != nil {
		return err
	}
	if err := s.rig.Run(ctx, "pause", "data"); err != nil {
		return s.withLog(err)
	}
	from := s.log.Len()
	for _, l := range loads {
		l.load.lasting = m.lasting(700*time.Millisecond, 700*time.Millisecond)
		on := func(path string) side {
			return func(ctx context.Context) (float64, error) { return rate(ctx, path, attachedBytes, l.load, l.bytes) }
		}
		r := row{Name: "tracking/" + l.name, What: l.what + ", on the attached device with replication paused, over the bare one", Unit: l.unit}
		if err := m.pairs(ctx, r, m.runs(21, 5), on(ours), on(bare)); err != nil {
			return err
		}
	}
	if err := s.uncut(from); err != nil {
		return err
	}
	if err := s.rig.Run(ctx, "resume", "data"); err != nil {
		return s.withLog(err)
	}
	return s.settle(ctx)
}

// attachedLatency writes at half of the bare device's rate.
func (s *stand) attachedLatency(ctx context.Context, m *measured, ours, bare string) error {
	for _, l := range loads[:2] {
		l.load.lasting = 2 * time.Second
		full, err := fio(ctx, bare, attachedBytes, l.load)
		if err != nil {
			return err
		}
		l.load.rate, l.load.lasting = int(full.iops)/2, m.lasting(5*time.Second, 3*time.Second)
		what := l.what + ", at half the bare device's rate while it is cut and replicated every second, over the same on the bare device"
		p50 := row{Name: "half/" + l.name + "-p50", What: "median latency, " + what, Unit: "ms"}
		p99 := row{Name: "half/" + l.name + "-p99", What: "99th percentile, " + what, Unit: "ms"}
		got := row{Name: "half/" + l.name + "-rate", What: "writes per second that were reached then, over the same on the bare device", Unit: "writes/s"}
		on := func(path string, long, reached *[]float64) side {
			return func(ctx context.Context) (float64, error) {
				if err := s.settle(ctx); err != nil {
					return 0, err
				}
				w, err := fio(ctx, path, attachedBytes, l.load)
				*long, *reached = append(*long, w.p99), append(*reached, w.iops)
				return w.p50, err
			}
		}
		if err := m.pairs(ctx, p50, m.runs(5, 2), on(ours, &p99.Ours, &got.Ours), on(bare, &p99.Theirs, &got.Theirs)); err != nil {
			return err
		}
		m.add(p99)
		m.add(got)
	}
	return nil
}

// peerLoads are written at full speed.
var peerLoads = []int{0, 1, 3} // of loads: 4 KiB at random with 1 and 16 at once, 256 KiB in sequence

// attachedFullSpeed says also what was committed when the writer ended, and how
// long the rest took.
func (s *stand) attachedFullSpeed(ctx context.Context, m *measured, ours, bare string) error {
	for _, i := range peerLoads {
		l := loads[i]
		l.load.lasting = m.lasting(5*time.Second, 3*time.Second)
		committed := row{Name: "full/" + l.name + "-committed", Unit: "bytes", What: "bytes committed when the writer ended"}
		lag := row{Name: "full/" + l.name + "-lag", Unit: "s", What: fmt.Sprintf("seconds after %v of it until all was committed", l.load.lasting)}
		grew := 0
		attached := func(ctx context.Context) (float64, error) {
			if err := s.settle(ctx); err != nil {
				return 0, err
			}
			from, began := s.log.Len(), time.Now()
			reached, err := rate(ctx, ours, attachedBytes, l.load, l.bytes)
			if err != nil {
				return 0, err
			}
			ended := time.Now()
			sent := 0.0
			found, err := s.entries("epoch committed", from)
			if err != nil {
				return 0, err
			}
			for _, c := range found {
				sent += float64(c.Stats.Link.SentBytes)
			}
			commits, _, err := s.commits(from)
			if err != nil {
				return 0, err
			}
			if growing(commits, began, ended) {
				grew++
			}
			if err := s.settle(ctx); err != nil {
				return 0, err
			}
			committed.Ours, lag.Ours = append(committed.Ours, sent), append(lag.Ours, time.Since(ended).Seconds())
			return reached, nil
		}
		raw := func(ctx context.Context) (float64, error) {
			if err := s.settle(ctx); err != nil {
				return 0, err
			}
			return rate(ctx, bare, attachedBytes, l.load, l.bytes)
		}
		count := m.runs(5, 2)
		r := row{Name: "full/" + l.name, Unit: l.unit, What: l.what + ", at full speed while it is replicated, over the bare device"}
		if err := m.pairs(ctx, r, count, attached, raw); err != nil {
			return err
		}
		if grew > 0 {
			lag.What += fmt.Sprintf("; the lag was GROWING in %d of %d runs: had the load gone on, it would have grown on", grew, count)
		}
		m.add(committed)
		m.add(lag)
	}
	return nil
}
