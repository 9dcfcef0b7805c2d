package integration

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Promises 5 and 6: what goes wrong on the primary's side, short of losing the
// SSD (TestDiskLostWhileUp), costs epochs: status says what, the application
// goes on, and replication goes on from there once it is over.
func TestFaultPrimarySide(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 200 << 20}, {Size: 140 << 20}}, Modules: []string{"dm-delay"}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		const size, span = 32 << 20, 8 << 20
		total := sectors(t, ubd(0))
		sane := fmt.Sprintf("0 %d linear %s 0", total, ubd(0))
		dmCreate(t, "bad", fmt.Sprintf("0 %d error", total))
		ssd := dmCreate(t, "ssd", sane)
		// failing has the reads or the writes of a MiB of the disk fail.
		failing := func(mib int64, writes bool) string {
			from, end := mib<<20/sector, (mib+1)<<20/sector
			read, write := "/dev/mapper/bad", ubd(0)
			if writes {
				read, write = write, read
			}
			head := ""
			if from > 0 {
				head = fmt.Sprintf("0 %d linear %s 0\n", from, ubd(0))
			}
			return head + fmt.Sprintf("%d %d delay %s %d 0 %s %d 0 %s %d 0\n%d %d linear %s %d", from, end-from, read, from, write, from, ubd(0), from,
				end, total-end, ubd(0), end)
		}
		c := newCLI(t, faultConfig(ssd, ubd(1), size, "    cow: 32MiB\n", "        journal: 40MiB\n"))
		c.must(t, "create")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		noise(t, v.Path, span, size-span, 1)
		c.must(t, "sync", "--timeout", "60s")
		h := history{Seed: 61, Size: span, MaxBytes: 64 << 10, Pause: 3 * time.Millisecond}
		w := startWriter(t, v.Path, h, 1)
		// taken is the first descriptor that the agent does not have all the time: below
		// it none is ever free.
		taken := func() (n uint64) {
			always := map[string]int{}
			const looks = 100 // a cut, and a command's connection, have some open for a moment
			for range looks {
				list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.agent.Process.Pid))
				if err != nil {
					t.Fatal(err)
				}
				for _, file := range list {
					always[file.Name()]++
				}
				time.Sleep(10 * time.Millisecond)
			}
			for always[strconv.FormatUint(n, 10)] == looks {
				n++
			}
			return n
		}
		var before unix.Rlimit
		limit := func(n uint64) {
			next := unix.Rlimit{Cur: n, Max: before.Max}
			if err := unix.Prlimit(c.agent.Process.Pid, unix.RLIMIT_NOFILE, &next, nil); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range []struct {
			name         string
			inject, heal func()
			says, logs   []string
			refused      []string // what a sync says meanwhile
		}{{
			name: "sectors of the SSD can't be read",
			inject: func() {
				dmSwap(t, "ssd", failing(1+20, false))
				noise(t, v.Path, 20<<20, 1<<20, 2) // so that they have to be
			},
			says: []string{"ebs", "read of", "at offset", "input/output error", "/dev/mapper/ssd"},
			heal: func() { dmSwap(t, "ssd", sane) },
		}, {
			name:    "the label can't be written",
			inject:  func() { dmSwap(t, "ssd", failing(0, true)) },
			says:    []string{"/dev/mapper/ssd", "label", "input/output error", "writes go on and are marked"},
			refused: []string{"ebs (no cut can be taken", "label"},
			heal:    func() { dmSwap(t, "ssd", sane) },
		}, {
			name: "the agent is out of file descriptors, so cuts fail",
			inject: func() {
				if err := unix.Prlimit(c.agent.Process.Pid, unix.RLIMIT_NOFILE, nil, &before); err != nil {
					t.Fatal(err)
				}
				limit(taken())
				time.Sleep(3 * time.Second)
			},
			logs: []string{"too many open files", "cut failed"},
			heal: func() { limit(before.Cur) },
		}} {
			w.takeSlowest()
			from, k, began := len(c.logText(t)), w.acked(), time.Now()
			f.inject()
			if f.says != nil {
				c.says(t, 30*time.Second, f.says...)
			}
			if f.refused != nil {
				c.refused(t, 6, f.refused, "sync", "--timeout", "1s")
			}
			time.Sleep(time.Second)
			writes, lasted, slowest := w.acked()-k, time.Since(began), w.takeSlowest()
			f.heal()
			healed := time.Now()
			c.await(t, "up to date after "+f.name, 90*time.Second, upToDate)
			back := time.Since(healed)
			c.must(t, "sync", "--timeout", "60s")
			c.must(t, "verify")
			log := c.logText(t)[from:]
			incremental(t, f.name, log)
			for _, word := range f.logs {
				if !strings.Contains(log, word) {
					t.Errorf("%s: the agent does not say '%s'", f.name, word)
				}
			}
			t.Logf("MEASURED %s, for %.1f s: %.0f writes a second, the slowest took %v; up to date %.1f s after, %d KiB sent",
				f.name, lasted.Seconds(), float64(writes)/lasted.Seconds(), slowest.Round(time.Millisecond), back.Seconds(), epochBytes(t, log, "WireBytes")>>10)
			if writes < 20 || slowest > 2*time.Second {
				t.Errorf("%s: the application was held up: %d writes in %v, the slowest took %v", f.name, writes, lasted, slowest)
			}
		}
		// Nobody can read what it says, and it works all the same.
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		log := c.log
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		c.log = full
		c.start(t)
		c.await(t, "up to date without a log", time.Minute, upToDate)
		last := w.stop(t)
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "verify")
		c.must(t, "down")
		c.kill(t)
		c.log = log
		c.must(t, "recover", ubd(1))
		judgeDevice(t, ubd(1), h, last, last)
	})
}
