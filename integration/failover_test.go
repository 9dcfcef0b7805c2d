package integration

import (
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// roundsVar is how often the tests of failovers and switchovers do so.
const roundsVar = "BLOCKFERRY_ROUNDS"

// claim is what a status said of a replica: how far behind it was when it was asked.
type claim struct {
	asked  time.Time
	behind time.Duration
}

// claimed is the last write that a replica has to hold by what was said of it:
// all that was acknowledged before then. w has ended.
func (w *writer) claimed(c []claim) (k uint64) {
	for _, one := range c {
		then := one.asked.Add(-one.behind)
		for i := range w.begun[1:] {
			if w.begun[i+1].Before(then) { // so the one before was acknowledged
				k = max(k, w.first+uint64(i))
			}
		}
	}
	return k
}

// After a forced failover at a random moment the new primary holds all writes up
// to some point and none after, no older than what status had claimed; and it is
// refused without force, with what is lost in seconds and bytes.
func TestFailover(t *testing.T) {
	rounds := powerNumber(t, roundsVar, 3)
	inGuest(t, twinGuest(10*time.Minute+time.Duration(rounds)*time.Minute), func(t *testing.T) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d, %d rounds", seed, rounds)
		rng := rand.New(rand.NewPCG(seed, 0))
		w := newTwins(t)
		now, then := w.a, w.b
		at, lost, claims, inBytes := uint64(0), uint64(0), 0, 0
		for n := range rounds {
			v := now.await(t, "up to date", 2*time.Minute, upToDate)
			h := history{Seed: 41, Size: twinVolume, MaxBytes: 64 << 10, Span: 8 << 20, Pause: 10 * time.Millisecond}
			load := startWriter(t, v.Path, h, at+1)
			load.awaitWrites(t, 20)
			var said []claim
			for end := time.Now().Add(time.Duration(2000+rng.IntN(2500)) * time.Millisecond); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				asked := time.Now()
				if v, _, known := now.look(t); known && v.Replicas[0].BehindSeconds != nil && !v.Replicas[0].BehindIsMinimum {
					said = append(said, claim{asked, time.Duration(*v.Replicas[0].BehindSeconds * float64(time.Second))})
				}
			}
			now.kill(t)
			load.awaitWrites(t, 3) // of its last epoch, which nobody else has
			last := load.stop(t)
			removeStack(t, "data")
			claimed := load.claimed(said)
			then.await(t, "not fed any more", time.Minute, func(v status.Volume) bool { return v.FedBy == "" })
			then.refused(t, 3, []string{"writes may be lost", "open epoch", " s until the primary was last heard of", "force it", "does not say where it stands"}, "primary")
			then.await(t, "secondary as before", time.Minute, isSecondary)
			begun := time.Now()
			out := then.must(t, "primary", "--force")
			took := time.Since(begun)
			if !strings.Contains(out, "what was written after the copy's cut is lost") {
				t.Errorf("round %d: it does not say what is lost: %s", n, out)
			}
			v = then.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
			got := judgeDevice(t, v.Path, h, max(claimed, at), last)
			t.Logf("round %d: %d writes, claimed up to %d of %d statuses, held up to %d; primary in %v", n, last-at, claimed, len(said), got.K, took.Round(time.Millisecond))
			if got.Partial {
				t.Errorf("round %d: write %d is in halfway", n, got.K+1)
			}
			lost += last - got.K
			if strings.Contains(out, " bytes by then") {
				inBytes++
			}
			if claimed > at {
				claims++
			}
			if got := then.must(t, "primary"); !strings.Contains(got, "already") {
				t.Errorf("primary again: %s", got)
			}
			at = got.K
			if n == rounds-1 {
				break
			}
			// The old primary's own copy is given up; it follows the new one.
			now.beginAs(t, "secondary")
			now.must(t, "create", "--discard-my-data")
			now.start(t)
			now, then = then, now
		}
		t.Logf("%d writes were lost in all", lost)
		if lost == 0 && rounds > 2 {
			t.Error("no failover lost a write: they were not under load")
		}
		if inBytes == 0 {
			t.Error("in no round it was said how many bytes are lost")
		}
		if claims*2 < rounds {
			t.Errorf("in %d of %d rounds a status claimed anything", claims, rounds)
		}
		// The last old primary starts with its disk: it was left behind, and says so.
		// Under another name: its device can't be beside the new primary's, in one kernel.
		now.edit(t, "  data:", "  was:")
		now.start(t)
		v := now.await(t, "out of date", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Reason, "out of date") })
		if v.Up || !strings.Contains(v.Advice, "blockferry secondary") {
			t.Errorf("the old primary: %+v", v)
		}
		now.refused(t, 3, []string{"out of date"}, "up")
		now.refused(t, 3, []string{"secondary --force"}, "secondary")
		if out := now.must(t, "secondary", "--force"); !strings.Contains(out, "written as primary after its last cut") {
			t.Errorf("it strays: %s", out)
		}
		// Whether it is overwritten is the operator's to say.
		then.await(t, "aware of it", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Replicas[0].Reason, "split brain") })
		before := len(then.logText(t))
		now.must(t, "discard")
		v = then.await(t, "up to date on both", time.Minute, upToDate)
		then.must(t, "sync", "--wait", "--timeout", "60s")
		then.must(t, "verify")
		if log := then.logText(t)[before:]; plans(log, "full")+plans(log, "compare") > 0 || plans(log, "incremental") == 0 {
			t.Errorf("the old primary did not come back by what changed")
		}
		if out := now.must(t, "rescue", "list"); !strings.Contains(out, ".rescue") {
			t.Errorf("what only the old primary had was not saved: %s", out)
		}
		for _, c := range []*cli{w.a, w.b} {
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
		}
	})
}

// beginAs says in the node's file with what role the volume begins.
func (c *cli) beginAs(t *testing.T, role string) {
	t.Helper()
	c.edit(t, "role: primary", "role: "+role, "role: secondary", "role: "+role)
}

// edit changes words of the node's file.
func (c *cli) edit(t *testing.T, fromTo ...string) {
	t.Helper()
	text := strings.NewReplacer(fromTo...).Replace(mustRead(t, c.config))
	if err := os.WriteFile(c.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// removeStack takes away what a machine that lost its power has no more.
func removeStack(t *testing.T, name string) {
	t.Helper()
	for _, inner := range []string{"", "-era", "-snap", "-base", "-cow", "-meta", "-data"} {
		if exec.Command("dmsetup", "info", name+inner).Run() != nil {
			continue
		}
		run(t, "dmsetup", "resume", name+inner)
		run(t, "dmsetup", "remove", "--retry", name+inner)
	}
}

// A node whose only other node is alive and connected is not made primary by
// accident; forced, both are, and neither overwrites the other.
func TestFailoverRefused(t *testing.T) {
	inGuest(t, twinGuest(6*time.Minute), func(t *testing.T) {
		w := newTwins(t)
		w.b.refused(t, 3, []string{"another primary is alive", "let it stand down first"}, "primary")
		// The link is cut: it is not known what is lost, and nobody says.
		w.wire.ip("link set wire down")
		w.b.await(t, "aware of the cut link", time.Minute, func(v status.Volume) bool { return v.FedBy == "" })
		w.b.refused(t, 3, []string{"does not say where it stands", "force it"}, "primary")
		w.wire.ip("link set wire up")
		w.a.await(t, "up to date again", time.Minute, upToDate)
		// A replica that is away keeps a volume from standing down, unless forced.
		if err := w.b.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		h := history{Seed: 43, Size: twinVolume, MaxBytes: 64 << 10, Span: 8 << 20, Pause: time.Millisecond}
		v := w.a.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		load := startWriter(t, v.Path, h, 1)
		load.awaitWrites(t, 20)
		last := load.stop(t)
		w.a.refused(t, 3, []string{"other", "--force"}, "secondary")
		w.a.await(t, "still up", time.Minute, func(v status.Volume) bool { return v.Up })
		if out := w.a.must(t, "secondary", "--force"); strings.Contains(out, "nothing is lost") {
			t.Errorf("forced: %s", out)
		}
		// The other is behind, and knows when it can ask.
		w.b.start(t)
		w.b.await(t, "open", time.Minute, func(v status.Volume) bool { return v.Position != nil })
		w.b.refused(t, 3, []string{"writes may be lost", "node 'node-a' is secondary"}, "primary")
		// Where all of it is it may.
		if out := w.a.must(t, "primary"); !strings.Contains(out, "nothing is lost") {
			t.Errorf("%s", out)
		}
		v = w.a.await(t, "up", time.Minute, upToDate)
		judgeDevice(t, v.Path, h, last, last)
		w.a.must(t, "sync", "--wait", "--timeout", "60s")
		w.a.must(t, "verify")
		for _, c := range []*cli{w.a, w.b} {
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
		}
	})
}
