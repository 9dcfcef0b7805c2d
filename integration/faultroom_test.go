package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// Promise 2 and 5: a copy-on-write store that fills up costs the epoch, neither
// the application nor the replica's image; the replica gets there later.
func TestFaultCowOverflow(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 300 << 20}}, Modules: []string{"dm-delay"}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		const size = 64 << 20
		disk := ubd(1)
		replica := func(delayMS int) string {
			return fmt.Sprintf("0 %d delay %s 0 0 %s 0 %d %s 0 0", sectors(t, disk), disk, disk, delayMS, disk)
		}
		slow := dmCreate(t, "slow", replica(0))
		c := newCLI(t, faultConfig(ubd(0), slow, size, "    cow: 16MiB\n", "        journal: 128MiB\n"))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 41, Size: size, MaxBytes: 1 << 20}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 100)
		held := w.stop(t)
		c.must(t, "sync", "--timeout", "60s")
		before := len(c.logText(t))

		// While the replica takes its time the application rewrites everything.
		dmSwap(t, "slow", replica(400))
		w = startWriter(t, v.Path, h, held+1)
		k, from := w.acked(), time.Now()
		c.says(t, time.Minute, "ebs", "the frozen view of epoch", "the COW area of", "is full")
		lasted, writes, slowest := time.Since(from), w.acked()-k, w.takeSlowest()
		c.kill(t)
		atMost := w.issued()
		c.must(t, "recover", slow)
		image := judgeDevice(t, slow, h, held, atMost)
		c.start(t)
		dmSwap(t, "slow", replica(0))
		healed := time.Now()
		last := w.stop(t)
		c.await(t, "up to date again", time.Minute, upToDate)
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "verify")
		log := c.logText(t)[before:]
		incremental(t, "after the overflow", log)
		t.Logf("MEASURED COW store full after %.1f s: %.0f writes a second, the slowest took %v; %d epochs void; the replica kept write %d, %d were acknowledged; up to date %.1f s after, %d KiB sent",
			lasted.Seconds(), float64(writes)/lasted.Seconds(), slowest.Round(time.Millisecond), strings.Count(log, "epoch void"), image.K, atMost,
			time.Since(healed).Seconds(), epochBytes(t, log, "WireBytes")>>10)
		if writes < 20 || slowest > 3*time.Second {
			t.Errorf("the application was held up: %d writes in %v, the slowest took %v", writes, lasted, slowest)
		}
		c.must(t, "down")
		c.kill(t)
		c.must(t, "recover", slow)
		judgeDevice(t, slow, h, last, last)
	})
}

// Promise 2 and 6: an epoch that the journal can't hold leaves the replica at the
// image it has, and status says why and what to do, until the operator allows
// the replica to be inconsistent while it catches up.
func TestFaultJournalTooSmall(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 300 << 20}, {Size: 300 << 20}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		const size, span = 64 << 20, 16 << 20
		ebs := ubd(1)
		c := newCLI(t, faultConfig(ubd(0), ebs, size, "    cow: 64MiB\n", "        journal: 16MiB\n"))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 42, Size: size, MaxBytes: 64 << 10, Span: span, Pause: 2 * time.Millisecond}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 100)
		held := w.stop(t)
		c.must(t, "sync", "--timeout", "60s")
		before := len(c.logText(t))

		c.must(t, "pause") // a cut amid the noise would hold some of it, and fit
		noise(t, v.Path, span, size-span, 1)
		c.must(t, "resume")
		c.says(t, time.Minute, "ebs", "does not fit into the replica's journal", "enlarge the journal", "catch-up: in-place")
		c.refused(t, 6, []string{"ebs", "journal"}, "sync", "--timeout", "2s")
		w = startWriter(t, v.Path, h, held+1)
		w.awaitWrites(t, 100)
		v = c.says(t, time.Minute, "ebs", "journal", "catch-up: in-place")
		r := v.Replicas[0]
		if r.BehindSeconds == nil || r.BehindBytes == nil || *r.BehindBytes < size-span {
			t.Errorf("it does not say how far it is behind: %+v", r)
		}
		t.Logf("MEASURED journal too small: behind %.1f s, %d KiB; the slowest write took %v", *r.BehindSeconds, *r.BehindBytes>>10, w.takeSlowest().Round(time.Millisecond))
		c.kill(t)
		c.must(t, "recover", ebs)
		judgeDevice(t, ebs, h, held, held) // the whole volume: the noise is not there

		config := faultConfig(ubd(0), ebs, size, "    cow: 64MiB\n", "        journal: 16MiB\n        catch-up: in-place\n")
		if err := os.WriteFile(c.config, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		c.start(t)
		began := time.Now()
		c.await(t, "up to date in place", time.Minute, upToDate)
		last := w.stop(t)
		c.must(t, "sync", "--timeout", "60s")
		t.Logf("MEASURED caught up in place in %.1f s, %d KiB sent", time.Since(began).Seconds(), epochBytes(t, c.logText(t)[before:], "WireBytes")>>10)
		c.must(t, "verify")
		incremental(t, "in place", c.logText(t)[before:])
		c.must(t, "down")
		c.kill(t)
		c.must(t, "recover", ebs)
		h.Size = span
		judgeDevice(t, ebs, h, last, last)
	})
}
