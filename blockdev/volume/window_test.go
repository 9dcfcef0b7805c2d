package volume

import (
	"testing"
	"time"

	"blockferry/blockdev/deadman"
)

// How long a suspend may wait counts from before it was armed, not from when
// this process goes on.
func TestPatienceCountsTheArm(t *testing.T) {
	const slow = 200 * time.Millisecond
	g, err := deadman.NewGuard(deadman.GuardOptions{Command: []string{"/bin/sh", "-c", "read l; sleep 0.2; echo REFUSED today; read l"}})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	w := &window{guard: g, limit: time.Minute, devices: []string{"vol"}}
	if err := w.run(); err == nil {
		t.Fatal("armed by a dead-man that refuses")
	}
	if p := w.patience(); p > w.limit/2-slow || p <= 0 {
		t.Errorf("patience is %s after an arm of %s", p, slow)
	}
	w.begun = deadman.BootTime() - w.limit/2
	if p := w.patience(); p > 0 {
		t.Errorf("patience is %s after half of the limit", p)
	}
}
