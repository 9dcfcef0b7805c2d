package main

import (
	"context"
	"time"
)

// nativeControl measures one disk against another of the same kind.
func nativeControl(ctx context.Context, s *stand, m *measured) error {
	for i, disk := range s.disks {
		if err := fill(disk, volumeBytes, uint64(i)); err != nil {
			return err
		}
	}
	for _, l := range loads {
		l.load.lasting = m.lasting(700*time.Millisecond, 700*time.Millisecond)
		on := func(device string) side {
			return func(ctx context.Context) (float64, error) { return rate(ctx, device, volumeBytes, l.load, l.bytes) }
		}
		r := row{Name: l.name, What: l.what + ", on a loop device over another one", Unit: l.unit}
		if err := m.pairs(ctx, r, m.runs(21, 5), on(s.disks[0]), on(s.disks[1])); err != nil {
			return err
		}
	}
	return nil
}
