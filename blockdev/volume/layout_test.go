package volume

import (
	"strings"
	"testing"
)

func TestLayoutPutsNothingOnAnythingElse(t *testing.T) {
	sizes := []int64{40 << 20, 64<<20 + 4096, 100<<20 + 12345*4096, 1 << 30, 1<<40 + 4096, 60 << 40}
	for _, disk := range sizes {
		for _, o := range []LayoutOptions{
			{}, {TailBytes: 8 << 20}, {EraBlockBytes: 4 << 20}, {CowBytes: 20<<20 + 4096},
			{MetaDeviceBytes: 1 << 40}, {CowDeviceBytes: 1 << 30}, {CowDeviceBytes: 1 << 30, MetaDeviceBytes: 1 << 40, TailBytes: 4096},
		} {
			a, err := Layout(disk, o)
			if err != nil {
				t.Errorf("%d %+v: %v", disk, o, err)
				continue
			}
			l := Label{UUID: NewUUID(), EraBlockBytes: max(o.EraBlockBytes, DefaultEraBlockBytes), Areas: a,
				CowElsewhere: o.CowDeviceBytes > 0, MetaElsewhere: o.MetaDeviceBytes > 0}
			if err := l.check(); err != nil {
				t.Errorf("%d %+v: %+v: %v", disk, o, a, err)
			}
			if end := l.endBytes(); end > disk {
				t.Errorf("%d %+v: ends at %d", disk, o, end)
			}
			// As large as fits: one block more does not.
			o.SizeBytes = a.Data.Length
			if again, err := Layout(disk, o); err != nil || again != a {
				t.Errorf("%d %+v: got %+v, %v; want %+v", disk, o, again, err, a)
			}
			o.SizeBytes += 4096
			if _, err := Layout(disk, o); err == nil {
				t.Errorf("%d %+v: a larger volume fits too", disk, o)
			}
		}
	}
}

func TestLayoutSizes(t *testing.T) {
	for size, want := range map[int64]int64{1 << 20: 16 << 20, 1 << 30: 64 << 20, 1 << 40: 64 << 30, 100 << 40: 64 << 30} {
		if got := DefaultCowBytes(size); got != want {
			t.Errorf("COW of %d: got %d, want %d", size, got, want)
		}
	}
	// Measured: 1 TiB needs about 67 MiB at 64 KiB blocks, and twice that
	// while a metadata snapshot is held.
	if got := EraMetadataBytes(1<<40, 64<<10); got < 134<<20 || got > 256<<20 {
		t.Errorf("metadata of 1 TiB at 64 KiB: %d", got)
	}
	if got := EraMetadataBytes(1<<20, 4<<20); got < 4<<20 {
		t.Errorf("the smallest metadata: %d", got)
	}
}

func TestLayoutRefuses(t *testing.T) {
	for _, c := range []struct {
		disk int64
		o    LayoutOptions
		want string
	}{
		{10 << 20, LayoutOptions{}, "too small"},
		{1 << 30, LayoutOptions{SizeBytes: 1 << 30}, "needs a disk of"},
		{1 << 30, LayoutOptions{SizeBytes: 1000}, "multiple"},
		{1 << 30, LayoutOptions{TailBytes: 100}, "multiple"},
		{1 << 30, LayoutOptions{EraBlockBytes: 4096}, "era blocks"},
		{1 << 30, LayoutOptions{MetaDeviceBytes: 1 << 20}, "metadata device"},
		{1 << 30, LayoutOptions{CowDeviceBytes: 1 << 20}, "COW area"},
	} {
		if _, err := Layout(c.disk, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%d %+v: got %v, want '%s'", c.disk, c.o, err, c.want)
		}
	}
}
