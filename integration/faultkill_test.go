package integration

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

const (
	faultKills = 50
	killSeed   = 20
)

// Promise 5 and 1: an agent that is killed at any moment, also while it comes
// up, never leaves the device suspended and loses track of nothing; its replica
// stays whole and gets what it lacks, not everything.
func TestFaultAgentKilled(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 320 << 20}, {Size: 320 << 20}}, Timeout: 10 * time.Minute}, func(t *testing.T) {
		const size, span = 96 << 20, 24 << 20
		c := newCLI(t, faultConfig(ubd(0), ubd(1), size, "    cow: 100MiB\n", "        journal: 100MiB\n"))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		noise(t, v.Path, span, size-span, 1) // a full copy would show
		c.must(t, "sync", "--timeout", "60s")
		before := len(c.logText(t))
		written := writtenBytes(t, "data")

		h := history{Seed: 12, Size: span, MaxBytes: 64 << 10, Pause: 2 * time.Millisecond}
		w := startWriter(t, v.Path, h, 1)
		t.Cleanup(func() { // or the writer's end is waited for in vain
			if t.Failed() {
				cleanup("dmsetup", "resume", "data-base")
				cleanup("dmsetup", "resume", "data")
			}
		})
		watch := watchSuspends(t, "data", "data-base")
		random := rand.New(rand.NewPCG(killSeed, 0))
		started := before
		var longest time.Duration // that the application waited for a dead agent
		for i := range faultKills {
			switch i % 5 { // 0: while it comes up
			case 1, 2, 3: // around its first cuts
				c.awaitLog(t, started, "msg=cut ", 20*time.Second)
			case 4: // while the replica applies, and the next cut comes
				c.awaitLog(t, started, "epoch committed", 20*time.Second)
			}
			time.Sleep(time.Duration(random.Int64N(int64(700 * time.Millisecond))))
			c.kill(t)
			killed, k := time.Now(), w.acked()
			for deadline := killed.Add(10 * time.Second); w.acked() < k+2; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("kill %d: the application is stopped by a dead agent, at write %d", i+1, w.acked())
				}
			}
			longest = max(longest, time.Since(killed))
			started = len(c.logText(t))
			c.start(t)
		}
		last := w.stop(t)
		watch.end(t, time.Second)
		c.await(t, "up to date", time.Minute, upToDate)
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "verify")
		written = writtenBytes(t, "data") - written
		log := c.logText(t)[before:]
		c.kill(t)
		c.must(t, "recover", ubd(1))
		judgeDevice(t, ubd(1), h, last, last)

		incremental(t, "after 50 kills", log)
		sent, marked := epochBytes(t, log, "WireBytes"), epochBytes(t, log, "MarkedBytes")
		up, cut := strings.Count(log, "msg=\"volume is up\""), strings.Count(log, "msg=cut ")
		t.Logf("MEASURED %d kills in %d starts that came up, %d cuts, %d epochs: %d writes of %d KiB, %d KiB marked, %d KiB sent; the application waited at most %v",
			faultKills, up, cut, plans(log, "incremental"), last, written>>10, marked>>10, sent>>10, longest.Round(time.Millisecond))
		if sent > written+written/4 {
			t.Errorf("%d bytes were sent for %d written", sent, written)
		}
		if up > faultKills || cut < faultKills*4/5 {
			t.Errorf("%d of %d agents came up and took %d cuts: the kills did not fall at all kinds of moments", up, faultKills, cut)
		}
		// Nobody has it open any more; the next agent takes it over and down.
		c.start(t)
		c.await(t, "up to date", time.Minute, upToDate)
		c.must(t, "down")
		if left := run(t, "dmsetup", "ls"); strings.Contains(left, "data") {
			t.Errorf("after down: %s", left)
		}
	})
}
