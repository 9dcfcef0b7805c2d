package integration

import (
	"bytes"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// Both nodes are primary, one after the other, while the link is cut. When it is back and one of them
// stands down, whether its copy gives way by itself is for the other one's policy to say: by
// discard-zero-changes one that was not written does, and none that was, which is left as it is;
// by discard-older-primary that of the first primary, with what only it had in a rescue file.
func TestSplitBrainPolicies(t *testing.T) {
	inGuest(t, twinGuest(6*time.Minute), func(t *testing.T) {
		w := madeTwins(t, ubd(0), ubd(1), "", "stall-limit: 20s\n    split-brain: discard-zero-changes")
		w.b.start(t)
		w.a.start(t)

		s := w.split(t, 1, 1<<20, 0)
		w.b.must(t, "down", "--force")
		w.a.must(t, "primary")
		s.follow(t, w.a, w.b)
		s.healed(t, w.a, "discard-zero-changes: the primary changed ", ", the replica 0 bytes")
		if out := w.b.must(t, "rescue", "list"); out != "" {
			t.Errorf("nothing was written there, and this was saved: %s", out)
		}

		s = w.split(t, 3, 1<<20, 4<<20)
		s.follow(t, w.b, w.a)
		v := w.b.await(t, "waiting for the operator", time.Minute, func(v status.Volume) bool {
			return strings.Contains(v.Replicas[0].Reason, "discard-zero-changes finds no side without changes")
		})
		if !strings.Contains(v.Replicas[0].Advice, "at node 'node-a': blockferry discard") {
			t.Errorf("the advice: %+v", v.Replicas[0])
		}
		if !bytes.Equal(image(t, ubd(0), dataOffset, twinVolume), s.atA) {
			t.Fatal("the copy was written to, and nobody gave it up")
		}
		if err := w.b.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		w.b.edit(t, "discard-zero-changes", "discard-older-primary")
		w.b.start(t)
		s.healed(t, w.b, "discard-older-primary: the primary's line took over later")
		out := w.a.must(t, "rescue", "list")
		if strings.Count(out, "\n") != 1 {
			t.Fatalf("rescue files: %s", out)
		}
		file, _, _ := strings.Cut(out, ": ")
		rescued(t, w.a, file, s.common, s.atA, s.atB)
		stopAll(t, w.a, w.b)
	})
}

// splitBrain is what the volume held before the link was cut, and what either node made of it.
type splitBrain struct {
	*twins
	common, atA, atB []byte
}

// split cuts the link, has a write so many bytes and go down, and b take over and write
// so many, to the same places as far as that goes. Their devices can't be in one kernel at once.
func (w *twins) split(t *testing.T, seed byte, byA, byB int64) *splitBrain {
	t.Helper()
	s := &splitBrain{twins: w}
	v := w.a.await(t, "up to date", 2*time.Minute, upToDate)
	w.a.must(t, "sync", "--wait", "--timeout", "60s")
	s.common = image(t, v.Path, 0, twinVolume)
	w.wire.ip("link set wire down")
	noise(t, v.Path, 4<<20, byA, seed)
	s.atA = image(t, v.Path, 0, twinVolume)
	w.a.must(t, "down", "--force")
	// Begun anew it needs not wait until the path counts as dead; nor does it take a's device for
	// its own, under another name.
	w.b.edit(t, "  data:", "  twin:")
	if err := w.b.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	w.b.start(t)
	w.b.await(t, "there", time.Minute, func(v status.Volume) bool { return v.Position != nil && v.FedBy == "" })
	w.b.must(t, "primary", "--force")
	v = w.b.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
	noise(t, v.Path, 4<<20, byB, seed+1)
	s.atB = image(t, v.Path, 0, twinVolume)
	return s
}

// follow joins the two again and has the one that is down stand down.
func (s *splitBrain) follow(t *testing.T, primary, other *cli) {
	t.Helper()
	s.wire.ip("link set wire up")
	primary.await(t, "aware of the other primary", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Replicas[0].Reason, ", too") })
	other.must(t, "secondary", "--force")
}

// healed waits until the other node follows by itself, and checks that the log says by which rule.
func (s *splitBrain) healed(t *testing.T, primary *cli, rule ...string) {
	t.Helper()
	primary.await(t, "followed by itself", time.Minute, upToDate)
	log := primary.logText(t)
	log = log[max(0, strings.LastIndex(log, `msg="replica connected"`)):]
	for _, words := range rule {
		if !strings.Contains(log, words) {
			t.Errorf("'%s' is missing in the log:\n%s", words, log)
		}
	}
	if plans(log, "full") > 0 {
		t.Error("it followed by a full copy")
	}
	primary.must(t, "sync", "--wait", "--timeout", "60s")
	primary.must(t, "verify")
}
