package integration

import (
	"os"
	"testing"
	"time"

	"blockferry/blockdev/dm"
	"blockferry/blockdev/volume"
)

// deadmanVar makes this test binary a dead-man.
const deadmanVar = "BLOCKFERRY_TEST_DEADMAN"

func init() {
	if os.Getenv(deadmanVar) != "" {
		if err := volume.RunDeadMan(os.Stdin, os.Stdout); err != nil {
			os.Stderr.WriteString("dead-man: " + err.Error() + "\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// mapper opens device-mapper for the length of a test.
func mapper(t *testing.T) *dm.Control {
	t.Helper()
	ctl, err := dm.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ctl.Close() })
	return ctl
}

// guard starts a dead-man for the length of a test.
func guard(t *testing.T) *volume.Guard {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	g, err := volume.NewGuard("/bin/busybox", "env", deadmanVar+"=1", self)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close() })
	return g
}

// format makes a volume of a disk.
func format(t *testing.T, o volume.FormatOptions) *volume.Label {
	t.Helper()
	label, err := volume.Format(o)
	if err != nil {
		t.Fatal(err)
	}
	return label
}

// up puts a volume up, with the test's own dead-man if the options name none;
// it is taken down when the test ends.
func up(t *testing.T, ctl *dm.Control, o volume.Options) *volume.Volume {
	t.Helper()
	if o.Guard == nil {
		o.Guard = guard(t)
	}
	if o.StallLimit == 0 {
		o.StallLimit = 5 * time.Second // a guest on a busy machine
	}
	v, err := volume.Up(ctl, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Down() })
	return v
}

func TestStackUpDown(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 256 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0)})
		o := volume.Options{Name: "vol", Device: ubd(0), Guard: guard(t), StallLimit: 5 * time.Second}
		v := up(t, ctl, o)
		t.Log(run(t, "dmsetup", "table"))
		c, err := v.Cut(t.Context(), 1, true)
		if err != nil {
			t.Fatal(err)
		}
		t.Log(c.Stalled(), c.WrittenBytes())
		t.Log(run(t, "dmsetup", "table"), run(t, "dmsetup", "status"))
		if err := c.Release(); err != nil {
			t.Fatal(err)
		}
		t.Log(run(t, "dmsetup", "table"))
		if err := v.Down(); err != nil {
			t.Fatal(err)
		}
	})
}
