package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// A replica with a rate is sent no more than that a second, TLS included, and
// status says what holds it back and what to do; the one beside it is not delayed.
func TestPeerLimit(t *testing.T) {
	const rate, load = 1 << 20, 12 << 20
	onThisKernel(t)
	listen := freeAddress(t)
	link := newSlowLink(t, listen, 100<<20) // a counter
	p := newPair(t, listen, link.address())
	limited := strings.Replace(mustRead(t, p.a.config), "peer: node-b}", `peer: node-b, compression: none, rate: {"00:00": 1MiB, "12:00": 1MiB}}`, 1)
	if err := os.WriteFile(p.a.config, []byte(limited), 0o600); err != nil {
		t.Fatal(err)
	}
	p.begin(t)
	before, begun, near := link.bytes(), time.Now(), 0.0
	for n := range 3 {
		writeNoise(t, filepath.Join(p.dir, fmt.Sprint("noise", n)), load/3, uint64(n))
	}
	v := p.a.await(t, "behind for its limit", time.Minute, func(v status.Volume) bool {
		r := replicaNamed(t, v, "zone-b")
		return r.Limited && strings.Contains(r.Reason, "held back by its limit of 1 MiB a second")
	})
	if r := replicaNamed(t, v, "zone-b"); r.LimitBytes == nil || *r.LimitBytes != rate || !strings.Contains(r.Advice, "raise 'rate' of replica 'zone-b'") {
		t.Errorf("status says %+v", r)
	}
	p.a.await(t, "up to date", 3*time.Minute, func(v status.Volume) bool {
		if r := replicaNamed(t, v, "ebs"); r.BehindSeconds != nil {
			near = max(near, *r.BehindSeconds)
		}
		return replicaNamed(t, v, "zone-b").Disk == "UpToDate" && link.bytes()-before >= load
	})
	took, passed := time.Since(begun).Seconds(), link.bytes()-before
	t.Logf("%.2f MiB/s for %.1f s; the near replica was at most %.1f s behind", float64(passed)/took/(1<<20), took, near)
	if float64(passed)/took > 1.3*rate {
		t.Errorf("%d bytes in %.1f s with a limit of %d a second", passed, took, rate)
	}
	if near > 30 { // on a busy machine, too
		t.Errorf("the near replica was up to %.1f s behind", near)
	}
	p.end(t)
}
