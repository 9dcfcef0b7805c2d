package integration

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// Disks that changed places, or that belong to another volume, are named by
// check with what was expected, and nothing is written to them.
func TestIdentityExchangedDisks(t *testing.T) {
	inGuest(t, guest{Disks: slices.Repeat([]disk{{Size: 64 << 20}}, 4), Timeout: 3 * time.Minute}, func(t *testing.T) {
		ssd, ebs, ssd2, ebs2 := ubd(0), ubd(1), ubd(2), ubd(3)
		two := func(a, ax, b, bx string) string {
			return fmt.Sprintf("volumes:\n  one:\n    device: %s\n    replicas:\n      x:\n        device: %s\n  two:\n    device: %s\n    replicas:\n      x:\n        device: %s\n", a, ax, b, bx)
		}
		right := newCLI(t, two(ssd, ebs, ssd2, ebs2))
		right.must(t, "create", "one")
		right.must(t, "create", "two")
		right.must(t, "check")
		for _, test := range []struct {
			name, yaml string
			words      []string
		}{
			{"an SSD and its replica", two(ebs, ssd, ssd2, ebs2), []string{
				"refuse " + ebs + ": the device of volume 'one' holds a replica of volume", "the label of volume 'one' is expected there; there is one on " + ssd,
				"refuse " + ssd + ": replica 'x' of volume 'one' holds the label of volume"}},
			{"the replicas of two volumes", two(ssd, ebs2, ssd2, ebs), []string{
				"refuse " + ebs2 + ": replica 'x' of volume 'one' holds a replica of volume", "there is one on " + ebs + ", replica 'x' of volume 'two'", "refuse " + ebs}},
			{"the SSDs of two volumes", two(ssd2, ebs, ssd, ebs2), []string{"refuse " + ebs, "refuse " + ebs2, "check the paths"}},
		} {
			c := newCLI(t, test.yaml)
			out, errs, code := c.try(t, "check")
			if code != 3 {
				t.Errorf("%s: check ends with %d\n%s%s", test.name, code, out, errs)
			}
			for _, w := range test.words {
				if !strings.Contains(out, w) {
					t.Errorf("%s: '%s' is missing in:\n%s", test.name, w, out)
				}
			}
		}

		// An agent with the SSD's path and the replica's exchanged.
		before := [2][32]byte{digest(t, ssd), digest(t, ebs)}
		c := newCLI(t, oneReplica(ebs, ssd))
		c.start(t)
		v := c.await(t, "refused", 30*time.Second, func(v status.Volume) bool { return v.Stage == "refused" })
		if !strings.Contains(v.Reason, ebs+" holds a replica of volume") || !strings.Contains(v.Advice, "check the paths") || strings.Contains(v.Advice, "--force") {
			t.Errorf("%s; %s", v.Reason, v.Advice)
		}
		c.refused(t, 3, []string{ebs + " holds a replica", "check the paths"}, "restore", "--force")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		if before != [2][32]byte{digest(t, ssd), digest(t, ebs)} {
			t.Error("a disk in the wrong place was written to")
		}

		// A blank SSD is not filled by itself from either of two volumes' replicas.
		zeroDisk(t, ssd)
		blank := digest(t, ssd)
		c = newCLI(t, strings.Replace(oneReplica(ssd, ebs)+"      two:\n        device: "+ebs2+"\n", "    interval:", "    restore: auto\n    interval:", 1))
		c.start(t)
		v = c.await(t, "refused", 30*time.Second, func(v status.Volume) bool { return strings.Contains(v.Reason, "not restored by itself") })
		for _, w := range []string{"replica 'ebs' on " + ebs + " holds volume", "replica 'two' on " + ebs2 + " holds volume", "check the paths"} {
			if !strings.Contains(v.Reason, w) {
				t.Errorf("'%s' is missing in: %s", w, v.Reason)
			}
		}
		c.refused(t, 3, []string{"check the paths", "--from"}, "restore")
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		if digest(t, ssd) != blank {
			t.Error("a blank disk was written to")
		}
	})
}

// A journal's size is that of its making: another one in the configuration is
// said, with what to do, and that way works.
func TestJournalSizeChanged(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 96 << 20}, {Size: 160 << 20}}, Timeout: 3 * time.Minute}, func(t *testing.T) {
		sized := func(journal string) string { return oneReplica(ubd(0), ubd(1)) + "        journal: " + journal + "\n" }
		c := newCLI(t, sized("16MiB"))
		c.must(t, "create")
		if out := c.must(t, "check"); strings.Contains(out, "journal") {
			t.Errorf("nothing changed, yet:\n%s", out)
		}
		if err := os.WriteFile(c.config, []byte(sized("24MiB")), 0o600); err != nil {
			t.Fatal(err)
		}
		words := []string{"has a journal of 16MiB, the configuration says 24MiB", "create --replica ebs --discard-my-data data"}
		out := c.must(t, "check")
		c.start(t)
		c.await(t, "up to date", time.Minute, upToDate)
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("check: '%s' is missing in:\n%s", w, out)
			}
			if log := c.logText(t); !strings.Contains(log, w) {
				t.Errorf("the agent's log: '%s' is missing in:\n%s", w, log)
			}
		}
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		c.must(t, "create", "--replica", "ebs", "--discard-my-data", "data")
		if out := c.must(t, "check"); strings.Contains(out, "journal") {
			t.Errorf("the journal has the size configured, yet:\n%s", out)
		}
		c.start(t)
		c.await(t, "up to date again", time.Minute, upToDate)
		c.must(t, "verify")
		c.must(t, "down")
	})
}
