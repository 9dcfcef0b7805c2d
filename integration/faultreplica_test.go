package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// replicaFault is one way in which a replica's disk goes bad under load.
type replicaFault struct {
	name   string
	inject func()
	words  []string // of the replica's reason and advice, or the volume's
	lasts  time.Duration
	during func() // while it lasts; may be nil
	heal   func()
}

// Promises 5, 6 and 1: whatever becomes of a replica's disk, the application
// goes on, status says which replica and why and what to do, and once the disk
// is well again it gets what it lacks and nothing else.
func TestFaultReplica(t *testing.T) {
	disks := []disk{{Size: 320 << 20}, {Size: 260 << 20}, {Size: 8 << 20}, {Size: 220 << 20}}
	inGuest(t, guest{Disks: disks, Modules: []string{"dm-thin-pool", "dm-flakey", "dm-delay"}, Timeout: 6 * time.Minute}, func(t *testing.T) {
		const size, span, journal = 64 << 20, 16 << 20, 80 << 20
		// The replica's disk is thin and has not the room that it promises.
		const replicaBytes, small, enough = 220 << 20, 117 << 20, 240 << 20
		pool := func(bytes int64) string {
			return fmt.Sprintf("0 %d thin-pool %s %s 128 0 2 skip_block_zeroing error_if_no_space", bytes/sector, ubd(2), ubd(1))
		}
		dmCreate(t, "pool", pool(small))
		run(t, "dmsetup", "message", "pool", "0", "create_thin 0")
		dmCreate(t, "thin", fmt.Sprintf("0 %d thin /dev/mapper/pool 0", replicaBytes/sector))
		table := func(disk string) string { return fmt.Sprintf("0 %d linear %s 0", replicaBytes/sector, disk) }
		sane, broken := table("/dev/mapper/thin"), fmt.Sprintf("0 %d error", replicaBytes/sector)
		dmCreate(t, "bad", broken)
		late := dmCreate(t, "late", sane)

		c := newCLI(t, faultConfig(ubd(0), late, size, "    cow: 64MiB\n", fmt.Sprintf("        journal: %d\n", journal)))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		noise(t, v.Path, span, size-span, 1)
		c.must(t, "sync", "--timeout", "60s")
		h := history{Seed: 31, Size: span, MaxBytes: 64 << 10, Pause: 3 * time.Millisecond}
		w := startWriter(t, v.Path, h, 1)

		swap := func(to string) func() { return func() { dmSwap(t, "late", to) } }
		remove := func() {
			dmSwap(t, "late", broken)
			c.await(t, "noticed", 30*time.Second, func(v status.Volume) bool { return v.Replicas[0].Connection != "Connected" })
			run(t, "dmsetup", "remove", "--retry", "late")
		}
		var foreign [32]byte
		for _, f := range []replicaFault{{
			name:   "full",
			inject: func() {}, // it fills up by itself
			words:  []string{"ebs", "/dev/mapper/late", "no space left on device", "make room"},
			lasts:  2 * time.Second,
			heal:   func() { dmSwap(t, "pool", pool(enough)) },
		}, {
			name:   "failing",
			inject: swap(broken),
			words:  []string{"ebs", "/dev/mapper/late", "input/output error"},
			lasts:  2 * time.Second,
			during: func() { c.refused(t, 6, []string{"ebs"}, "sync", "--timeout", "1s") },
			heal:   swap(sane),
		}, {
			name:   "failing on and off",
			inject: swap(fmt.Sprintf("0 %d flakey /dev/mapper/thin 0 1 1 1 error_writes", replicaBytes/sector)),
			words:  []string{"ebs", "/dev/mapper/late", "input/output error"},
			lasts:  3 * time.Second,
			heal:   swap(sane),
		}, {
			name: "with sectors in the image that can't be written",
			// Reads and flushes go through.
			inject: swap(fmt.Sprintf("0 %d linear /dev/mapper/thin 0\n%d %d delay /dev/mapper/thin %d 0 /dev/mapper/bad 0 0 /dev/mapper/thin %d 0\n%d %d linear /dev/mapper/thin %d",
				span/4/sector, span/4/sector, span/4/sector, span/4/sector, span/4/sector, span/2/sector, (replicaBytes-span/2)/sector, span/2/sector)),
			words: []string{"ebs", "apply of epoch", "/dev/mapper/late: write of", "at offset", "input/output error"},
			lasts: 2 * time.Second,
			heal:  swap(sane),
		}, {
			name:   "detached and back",
			inject: remove,
			words:  []string{"ebs", "/dev/mapper/late", "attach the disk"},
			lasts:  time.Second,
			heal:   func() { run(t, "dmsetup", "create", "late", "--table", sane) },
		}, {
			name: "another disk in its place",
			inject: func() {
				remove()
				mkfs(t, "ext4", ubd(3))
				run(t, "sync")
				foreign = digest(t, ubd(3))
				run(t, "dmsetup", "create", "late", "--table", table(ubd(3)))
			},
			words: []string{"ebs", "/dev/mapper/late", "no valid superblock", "blockferry create --replica ebs data"},
			lasts: time.Second,
			during: func() {
				c.refused(t, 3, []string{"ext4", "--force"}, "create", "--replica", "ebs")
				if digest(t, ubd(3)) != foreign {
					t.Error("a foreign disk in the replica's place was written to")
				}
			},
			heal: func() {
				run(t, "dmsetup", "remove", "--retry", "late")
				run(t, "dmsetup", "create", "late", "--table", sane)
			},
		}, {
			name: "stuck",
			inject: func() {
				t.Cleanup(func() { cleanup("dmsetup", "resume", "late") }) // the agent's end waits for it
				run(t, "dmsetup", "suspend", "--noflush", "--nolockfs", "late")
			},
			words:  []string{"ebs", "has not answered for"},
			lasts:  10 * time.Second,
			during: func() { c.refused(t, 6, []string{"ebs"}, "sync", "--timeout", "1s") },
			heal:   func() { run(t, "dmsetup", "resume", "late") },
		}} {
			w.takeSlowest()
			before, k, from := len(c.logText(t)), w.acked(), time.Now()
			f.inject()
			behind := c.says(t, time.Minute, f.words...)
			if r := behind.Replicas[0]; !behind.Up || behind.Role != "Primary" || r.Advice == "" {
				t.Errorf("%s: up %v, role %s; replica %+v", f.name, behind.Up, behind.Role, r)
			}
			if f.during != nil {
				f.during()
			}
			time.Sleep(f.lasts)
			last := c.await(t, "answering", time.Minute, func(status.Volume) bool { return true })
			writes, lasted, slowest := w.acked()-k, time.Since(from), w.takeSlowest()
			lag := "not known"
			if r := last.Replicas[0]; r.BehindSeconds != nil {
				lag = fmt.Sprintf("%.1f s, %d KiB", *r.BehindSeconds, *r.BehindBytes>>10)
			}
			f.heal()
			healed := time.Now()
			c.await(t, "up to date after "+f.name, 2*time.Minute, upToDate)
			back := time.Since(healed)
			c.must(t, "sync", "--timeout", "60s")
			log := c.logText(t)[before:]
			incremental(t, f.name, log)
			c.must(t, "verify")
			t.Logf("MEASURED replica %s for %.1f s: %.0f writes a second, the slowest took %v; behind at the end: %s; up to date %.1f s after, %d KiB sent",
				f.name, lasted.Seconds(), float64(writes)/lasted.Seconds(), slowest.Round(time.Millisecond), lag, back.Seconds(), epochBytes(t, log, "WireBytes")>>10)
			if writes < 20 || slowest > 2*time.Second {
				t.Errorf("%s: the application was held up: %d writes in %v, the slowest took %v", f.name, writes, lasted, slowest)
			}
		}
		last := w.stop(t)
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "down")
		c.kill(t)
		c.must(t, "recover", late)
		judgeDevice(t, late, h, last, last)
		if left := run(t, "dmsetup", "ls"); strings.Contains(left, "data") {
			t.Errorf("after down: %s", left)
		}
	})
}
