package integration

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// A link as between zones: with delay and loss the roles change there and back under load,
// in one session each, and nothing is lost. Then it is narrow, and is cut in the middle
// of an epoch: what arrived of that is not sent again.
func TestFailoverLink(t *testing.T) {
	g := twinGuest(5 * time.Minute)
	g.Modules = append(g.Modules, "sch_netem")
	inGuest(t, g, func(t *testing.T) {
		w := newTwins(t)
		w.overLossyLink(t)
		w.cutInAnEpoch(t)
		stopAll(t, w.a, w.b)
	})
}

// awaitLosses waits until either end of the wire has lost packets under a load.
func (w *twins) awaitLosses(t *testing.T, load *writer) {
	t.Helper()
	var before [2]int
	for i, end := range w.ends {
		before[i] = end.dropped()
	}
	for i, end := range w.ends {
		for deadline := time.Now().Add(time.Minute); end.dropped() <= before[i]; load.awaitWrites(t, 10) {
			if time.Now().After(deadline) {
				t.Fatalf("in a minute the wire lost nothing at end %d: that is no test", i)
			}
		}
	}
}

func (w *twins) overLossyLink(t *testing.T) {
	for _, end := range w.ends {
		end.netem("delay 5ms loss 1%")
	}
	h := history{Seed: 67, Size: twinVolume, MaxBytes: 64 << 10, Span: 8 << 20, Pause: 5 * time.Millisecond}
	logA, logB := len(w.a.logText(t)), len(w.b.logText(t))
	now, then, last := w.a, w.b, uint64(0)
	v := now.await(t, "up to date", time.Minute, upToDate)
	for turn := range 2 {
		load := startWriter(t, v.Path, h, last+1)
		load.awaitWrites(t, 60)
		w.awaitLosses(t, load)
		last = load.stop(t)
		for _, change := range []func() string{
			func() string { return now.must(t, "secondary") },
			func() string { return then.must(t, "primary") },
		} {
			if got := change(); !strings.Contains(got, "nothing is lost") {
				t.Errorf("turn %d: %s", turn, got)
			}
		}
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
	// A lost packet is the transport's to mend: no session ends by it.
	if n := strings.Count(logs, `msg="replica connected"`); n != 2 || strings.Contains(logs, `msg="replica disconnected"`) {
		t.Errorf("two turns took %d sessions:\n%s", n, logs)
	}
	t.Logf("%d writes; the wire lost %d and %d packets", last, w.ends[0].dropped(), w.ends[1].dropped())
}

// cutInAnEpoch bounds what passes the wire for an epoch that is cut off: what changed, and
// what was under way when it was cut. The replica goes on reading after that, for as long
// as a dead path takes to be noticed, so of what had arrived only a message that is not whole is lost.
func (w *twins) cutInAnEpoch(t *testing.T) {
	const (
		changed  = 16 << 20
		cutAfter = 10 << 20
		message  = 1 << 20            // at most
		more     = changed/16 + 1<<20 // headers, handshakes, acknowledgements, comparisons
	)
	w.ends[0].netem("delay 5ms rate 16mbit limit 200") // 8 s for what changed
	w.ends[1].netem("delay 5ms")
	v := w.a.await(t, "up to date", time.Minute, upToDate)
	w.a.must(t, "pause")
	noise(t, v.Path, 16<<20, changed, 1)
	want := image(t, v.Path, 0, twinVolume)
	held := w.b.await(t, "there", time.Minute, func(v status.Volume) bool { return v.Position != nil && v.FedBy == "" }).Position.Epoch
	before, from := len(w.a.logText(t)), w.ends[1].arrived()
	w.a.must(t, "resume")
	for deadline := time.Now().Add(time.Minute); w.ends[1].arrived()-from < cutAfter; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes arrived in a minute:\n%s", w.ends[1].arrived()-from, w.a.logText(t)[before:])
		}
	}
	w.wire.ip("link set wire down")
	first := w.ends[1].arrived() - from
	there := w.b.await(t, "keeping what it has", time.Minute, func(v status.Volume) bool { return v.Kept != nil && v.FedBy == "" })
	kept := int64(there.Kept.Bytes)
	t.Logf("%d bytes had arrived, %d are kept of epoch %d", first, kept, there.Kept.Epoch)
	if kept > first || kept < first-message-more || first >= changed {
		t.Errorf("%d bytes had arrived of %d when the wire was cut, %d are kept", first, changed, kept)
	}
	if there.Position.Epoch != held || there.Disk != "Consistent" {
		t.Errorf("the copy was at epoch %d, and is in the middle of the next: %+v", held, there)
	}
	w.a.await(t, "aware of the cut", time.Minute, func(v status.Volume) bool { return v.Replicas[0].Connection != "Connected" })
	w.wire.ip("link set wire up")
	w.a.await(t, "up to date again", time.Minute, upToDate)
	second := w.ends[1].arrived() - from - first
	t.Logf("%d more bytes arrived for the rest", second)
	if second > changed-kept+more || first+second > changed+message+2*more {
		t.Errorf("%d bytes had changed, %d of them were kept; %d arrived before the cut and %d after it", changed, kept, first, second)
	}
	log := w.a.logText(t)[before:]
	if !strings.Contains(log, fmt.Sprintf("it goes on with epoch %d, ", there.Kept.Epoch)) || !strings.Contains(log, " Resumed:1 ") {
		t.Errorf("it does not say that it went on with epoch %d:\n%s", there.Kept.Epoch, log)
	}
	if plans(log, "full")+plans(log, "compare") > 0 {
		t.Error("it went on by a full copy")
	}
	if out := w.a.must(t, "secondary"); !strings.Contains(out, "nothing is lost") {
		t.Errorf("secondary: %s", out)
	}
	w.b.must(t, "primary")
	v = w.b.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
	if !bytes.Equal(image(t, v.Path, 0, twinVolume), want) {
		t.Error("the copy holds something else than was written")
	}
}
