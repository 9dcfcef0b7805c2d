package integration

import (
	"os"
	"strings"
	"testing"

	"blockferry/integration/uml"
)

// The harness is what every other test here trusts.

func TestHarnessGuestHasDeviceMapper(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 3 << 20}, {Size: 5<<20 + 512}}}, func(t *testing.T) {
		targets := run(t, "dmsetup", "targets")
		for _, want := range []string{"era", "snapshot-origin", "linear"} {
			if !strings.Contains(targets, want) {
				t.Errorf("no target %s among:\n%s", want, targets)
			}
		}
		if got := sectors(t, ubd(1)); got != (5<<20+512)/512 {
			t.Errorf("disk b has %d sectors", got)
		}
		if os.Getuid() != 0 || os.Getpid() == 1 {
			t.Errorf("uid %d, pid %d", os.Getuid(), os.Getpid())
		}
		if _, err := os.Stat(uml.GuestPath("/etc/passwd")); err != nil {
			t.Error(err)
		}
	})
}
