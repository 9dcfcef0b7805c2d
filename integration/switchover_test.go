package integration

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// twins are two nodes with one volume that either can write: one disk each, in
// two network namespaces of one guest. The volume's device is made by whichever is
// primary, under one name.
type twins struct {
	a, b *cli
	wire *zone    // b's end of what joins them
	ends [2]*zone // both ends, a's first
}

const (
	twinDisk   = 300 << 20
	twinVolume = 40 << 20
)

// twinGuest is a guest for them.
func twinGuest(limit time.Duration) guest {
	return guest{Memory: "1200M", Disks: []disk{{Size: twinDisk}, {Size: twinDisk}}, Modules: []string{"veth"}, Timeout: limit}
}

func newTwins(t *testing.T) *twins {
	t.Helper()
	return newTwinsOn(t, ubd(0), ubd(1))
}

func newTwinsOn(t *testing.T, diskA, diskB string) *twins {
	t.Helper()
	w := madeTwins(t, diskA, diskB, "", "stall-limit: 20s")
	w.b.start(t)
	w.a.start(t)
	w.a.await(t, "up to date", 2*time.Minute, upToDate)
	return w
}

// twinFile is the file of one of two nodes with a volume that either can write: with top at the
// top level, and more for the volume.
func twinFile(top, me, certs, here, rescue, role, device string, size int64, more, other, there string) string {
	return top + fmt.Sprintf(`node: {name: %s, certs: %s, listen: "%s:7070", rescue: %s}
volumes:
  data:
    role: %s
    device: %s
    size: %d
    interval: 300ms
    %s
    peers: [%s]
    replicas:
      other: {address: "%s:7070", peer: %[9]s}
`, me, certs, here, rescue, role, device, size, more, other, there)
}

// madeTwins are those whose agents were not started. Their files have top at the top
// level, and more for the volume.
func madeTwins(t *testing.T, diskA, diskB, top, more string) *twins {
	t.Helper()
	zoneA, zoneB := twoZones(t)
	folders := issue(t, blockferry(t), "node-a", "node-b")
	file := func(me, other, role, here, there, device string) *cli {
		return newCLI(t, twinFile(top, me, folders[me], here, t.TempDir(), role, device, twinVolume, more, other, there))
	}
	w := &twins{wire: zoneB, ends: [2]*zone{zoneA, zoneB}}
	w.a = file("node-a", "node-b", "primary", "10.9.0.1", "10.9.0.2", diskA)
	w.b = file("node-b", "node-a", "secondary", "10.9.0.2", "10.9.0.1", diskB)
	w.a.inside, w.b.inside = zoneA.inside(), zoneB.inside()
	w.b.must(t, "create")
	w.b.must(t, "check")
	w.a.must(t, "create")
	return w
}

var sentBytes = regexp.MustCompile(` SentBytes:(\d+) `)

// sent is how many bytes of frames an agent's log says that it sent.
func sent(t *testing.T, log string) (sum int64) {
	t.Helper()
	for _, m := range sentBytes.FindAllStringSubmatch(log, -1) {
		n, err := strconv.ParseInt(m[1], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum += n
	}
	return sum
}

func isSecondary(v status.Volume) bool { return v.Stage == "secondary" }

// A planned switchover, there and back under load: the new primary has all that
// was acknowledged, and only what changed is sent, either way.
func TestSwitchover(t *testing.T) {
	rounds := powerNumber(t, roundsVar, 2)
	inGuest(t, twinGuest(8*time.Minute+time.Duration(rounds)*2*time.Minute), func(t *testing.T) { switchover(t, rounds) })
}

func switchover(t *testing.T, rounds int) {
	w := newTwins(t)
	h := history{Seed: 31, Size: twinVolume, MaxBytes: 128 << 10, Span: 16 << 20, Pause: 2 * time.Millisecond}
	now, then := w.a, w.b
	v := now.await(t, "up to date", time.Minute, upToDate)
	logA, logB := len(w.a.logText(t)), len(w.b.logText(t))
	last, written := uint64(0), int64(0)
	for turn := range 2 * rounds {
		load := startWriter(t, v.Path, h, last+1)
		load.awaitWrites(t, 60)
		if turn == 0 {
			now.refused(t, 3, []string{"in use"}, "secondary")
			then.refused(t, 3, []string{"another primary is alive"}, "primary")
			then.refused(t, 3, []string{"is secondary here", "blockferry primary data"}, "sync")
			if got := now.must(t, "primary"); !strings.Contains(got, "is primary already") {
				t.Errorf("primary where it is: %s", got)
			}
		}
		before := last
		last = load.stop(t)
		for k := before + 1; k <= last; k++ {
			written += h.op(k).Length
		}
		if got := now.must(t, "secondary"); !strings.Contains(got, "nothing is lost") {
			t.Errorf("turn %d: %s", turn, got)
		}
		now.await(t, "secondary", time.Minute, isSecondary)
		if got := now.must(t, "secondary"); !strings.Contains(got, "already") {
			t.Errorf("turn %d: secondary again: %s", turn, got)
		}
		begun := time.Now()
		if got := then.must(t, "primary"); !strings.Contains(got, "nothing is lost") {
			t.Errorf("turn %d: %s", turn, got)
		}
		t.Logf("turn %d: primary after %v", turn, time.Since(begun).Round(time.Millisecond))
		v = then.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		judgeDevice(t, v.Path, h, last, last)
		now, then = then, now
		now.await(t, "replicating back", time.Minute, upToDate)
	}
	now.must(t, "sync", "--wait", "--timeout", "60s")
	now.must(t, "verify")
	logs := w.a.logText(t)[logA:] + w.b.logText(t)[logB:]
	if full, compared := plans(logs, "full"), plans(logs, "compare"); full+compared > 0 || plans(logs, "incremental") == 0 {
		t.Errorf("%d full copies, %d comparisons, %d incremental epochs", full, compared, plans(logs, "incremental"))
	}
	passed := sent(t, logs)
	t.Logf("%d turns, %d writes of %d bytes, %d bytes of frames", 2*rounds, last, written, passed)
	if passed > written+written/4+1<<20 {
		t.Errorf("%d bytes were written, %d sent", written, passed)
	}
	now.must(t, "down")
	for _, c := range []*cli{w.a, w.b} {
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	}
}
