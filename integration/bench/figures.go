package main

import (
	"context"
	"math/rand/v2"
	"time"
)

var figures = []figure{
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
	return s.rig.Run(ctx, "sync", "--wait", "data")
}

func trackedVersusRaw(ctx context.Context, s *stand, quick bool) (sides, error) {
	if err := bothDevices(ctx, s); err != nil {
		return sides{}, err
	}
	random := rand.New(rand.NewPCG(1, 1))
	perSecond := func(device string) func(context.Context) (float64, error) {
		return func(ctx context.Context) (float64, error) {
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
