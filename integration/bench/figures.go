package main

import (
	"context"
	"math/rand/v2"
	"time"

	"blockferry/integration/rig"
)

var figures = []figure{
	{
		name:  "first-sync-vs-dd",
		about: "seconds from the agent's start to a whole first copy over those of a plain sequential copy with O_DIRECT",
		pairs: 5, quickPairs: 2,
		open: firstSync,
	},
	{
		name:  "tracked-vs-raw-randwrite",
		about: "4 KiB random writes per second, one at a time, on a replicated volume over those on the bare disk",
		pairs: 7, quickPairs: 3,
		open: trackedVersusRaw,
	},
	{
		name:  "cut-stall",
		about: "the longest single write in a run on a volume that is cut every second over that on the bare disk",
		pairs: 9, quickPairs: 3,
		open: cutStall,
	},
	{
		name:  "sent-per-changed",
		about: "bytes sent over bytes changed, for 4 KiB blocks changed at random, not compressed",
		pairs: 5, quickPairs: 2,
		open: sentPerChanged,
	},
}

// runLength is how long one side of a pair writes.
func runLength(quick bool) time.Duration {
	if quick {
		return 3 * time.Second
	}
	return 8 * time.Second
}

// bothDevices sets up a replicated volume and a bare disk of the same kind.
func bothDevices(ctx context.Context, s *stand) error {
	if err := s.unreplicated(); err != nil {
		return err
	}
	if err := fill(raw, volumeBytes, 1); err != nil {
		return err
	}
	if err := s.replicated(ctx, time.Second); err != nil {
		return err
	}
	if err := fill(volume, volumeBytes, 2); err != nil {
		return err
	}
	return s.settle(ctx)
}

// settle waits until the agent has nothing left to do, so that it does not
// work off our side's writes while the other side is measured.
func (s *stand) settle(ctx context.Context) error {
	if err := s.rig.Run(ctx, "sync", "--wait", "--timeout", "2m", "data"); err != nil {
		return s.withLog(err)
	}
	return nil
}

func trackedVersusRaw(ctx context.Context, s *stand, quick bool) (sides, error) {
	if err := bothDevices(ctx, s); err != nil {
		return sides{}, err
	}
	random := rand.New(rand.NewPCG(1, 1))
	perSecond := func(device string) func(context.Context) (float64, error) {
		return func(ctx context.Context) (float64, error) {
			if err := s.settle(ctx); err != nil {
				return 0, err
			}
			w, err := randomWrites(ctx, device, volumeBytes, runLength(quick), random)
			return w.perSecond, err
		}
	}
	return sides{unit: "writes/s", ours: perSecond(volume), theirs: perSecond(raw)}, nil
}

// cutStall also collects what the agent itself says of its cuts.
func cutStall(ctx context.Context, s *stand, quick bool) (sides, error) {
	if err := bothDevices(ctx, s); err != nil {
		return sides{}, err
	}
	random := rand.New(rand.NewPCG(2, 2))
	stalled := map[uint64]float64{}
	worst := func(ctx context.Context, device string) (float64, error) {
		if err := s.settle(ctx); err != nil {
			return 0, err
		}
		w, err := randomWrites(ctx, device, volumeBytes, runLength(quick), random)
		return w.worst.Seconds() * 1000, err
	}
	return sides{
		unit: "ms",
		ours: func(ctx context.Context) (float64, error) {
			ms, err := worst(ctx, volume)
			if err != nil {
				return 0, err
			}
			document, err := s.rig.Status(ctx)
			if err != nil {
				return 0, err
			}
			if cut := document.Volumes[0].LastCut; cut != nil && cut.StalledSeconds != nil {
				stalled[cut.Epoch] = *cut.StalledSeconds * 1000
			}
			return ms, nil
		},
		theirs: func(ctx context.Context) (float64, error) { return worst(ctx, raw) },
		extra:  func() map[string]any { return map[string]any{"last-cut-stalled-ms-by-epoch": stalled} },
	}, nil
}

// firstSync copies the same noise both ways, each time onto a disk that holds
// nothing of it.
func firstSync(ctx context.Context, s *stand, _ bool) (sides, error) {
	if err := fill(ssdDisk, ssdBytes, 3); err != nil {
		return sides{}, err
	}
	return sides{
		unit: "s",
		ours: func(ctx context.Context) (float64, error) {
			if err := rig.Zero(ebsDisk, ebsBytes); err != nil {
				return 0, err
			}
			if err := s.configure(time.Second); err != nil {
				return 0, err
			}
			// Forced: what the disk holds becomes the volume's content.
			if err := s.rig.Run(ctx, "create", "--discard-my-data", "data"); err != nil {
				return 0, err
			}
			began := time.Now()
			if err := s.rig.StartAgent(ctx, &s.log); err != nil {
				return 0, s.withLog(err)
			}
			if err := s.rig.Await(ctx, "replicated", 2*time.Minute, upToDate); err != nil {
				return 0, s.withLog(err)
			}
			took := time.Since(began)
			if err := s.rig.Run(ctx, "down", "data"); err != nil {
				return 0, s.withLog(err)
			}
			return took.Seconds(), s.rig.StopAgent()
		},
		theirs: func(context.Context) (float64, error) {
			if err := rig.Zero(ebsDisk, ebsBytes); err != nil {
				return 0, err
			}
			return copySequentially(ssdDisk, ebsDisk, volumeBytes)
		},
	}, nil
}

// sentPerChanged changes few blocks, far apart, so that the kernel's coarse
// mark names much more than changed.
func sentPerChanged(ctx context.Context, s *stand, _ bool) (sides, error) {
	s.rig.Verbose = true
	if err := fill(ssdDisk, ssdBytes, 4); err != nil {
		return sides{}, err
	}
	if err := s.replicated(ctx, time.Second); err != nil {
		return sides{}, err
	}
	random := rand.New(rand.NewPCG(3, 3))
	const blocks = 1500
	return sides{
		unit: "bytes",
		ours: func(ctx context.Context) (float64, error) {
			before, err := s.wireBytes()
			if err != nil {
				return 0, err
			}
			if err := overwrite(volume, volumeBytes, blocks, random); err != nil {
				return 0, err
			}
			if err := s.settle(ctx); err != nil {
				return 0, err
			}
			after, err := s.wireBytes()
			return float64(after - before), err
		},
		// Every run changes as much.
		theirs: func(context.Context) (float64, error) { return blocks * 4096, nil },
	}, nil
}
