package integration

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// image is a part of a device, read past the page cache.
func image(t *testing.T, device string, offset, length int64) []byte {
	t.Helper()
	content := make([]byte, 0, length)
	err := readDirectTo(device, offset+length, func(at int64, piece []byte) error {
		content = append(content, piece[min(max(0, offset-at), int64(len(piece))):]...)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// The link is cut, and the copy is made primary by force while the first primary's machine
// was only off for a moment, which wrote before and writes after that. When the link is
// back neither overwrites the other, and the one that is not up stays so. The operator has it
// stand down and gives up what it wrote: it follows, what only it had is in a rescue file, to the
// block, and the two can change roles again.
func TestSplitBrainHealed(t *testing.T) {
	inGuest(t, twinGuest(6*time.Minute), func(t *testing.T) {
		w := newTwins(t)
		v := w.a.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 59, Size: twinVolume, MaxBytes: 64 << 10, Span: 8 << 20, Pause: time.Millisecond}
		last := uint64(0)
		write := func() {
			t.Helper()
			load := startWriter(t, v.Path, h, last+1)
			load.awaitWrites(t, 40)
			last = load.stop(t)
		}
		write()
		w.a.must(t, "sync", "--wait", "--timeout", "60s")
		common := image(t, v.Path, 0, twinVolume)

		// Both devices can't be in one kernel at once, so the machines take turns.
		w.wire.ip("link set wire down")
		write()
		w.a.kill(t)
		removeStack(t, "data")
		w.b.await(t, "aware of the cut link", time.Minute, func(v status.Volume) bool { return v.FedBy == "" })
		w.b.must(t, "primary", "--force")
		w.b.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		noise(t, v.Path, 4<<20, 1<<20, 1) // where the first one writes, too
		noise(t, v.Path, 24<<20, 1<<20, 2)
		strayed := image(t, v.Path, 0, twinVolume)
		w.b.kill(t)
		removeStack(t, "data")
		w.a.start(t)
		waits := w.a.await(t, "waiting for the other node", time.Minute, func(v status.Volume) bool { return v.Stage == "waiting" })
		if waits.Up || !strings.Contains(waits.Reason, "node 'node-b' does not say where it stands") || !strings.Contains(waits.Advice, "blockferry primary data") {
			t.Errorf("nobody answers the first one: %+v", waits)
		}
		w.a.refused(t, 3, []string{"may have taken over"}, "up")
		w.a.must(t, "primary") // the operator knows less than we do
		v = w.a.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		write()

		w.wire.ip("link set wire up")
		w.b.edit(t, "  data:", "  twin:") // or it would take the other's device for its own
		w.b.start(t)
		there := w.b.await(t, "left down", time.Minute, func(v status.Volume) bool {
			return strings.Contains(v.Reason, "would be a second primary") && strings.Contains(v.Reason, "node 'node-a'")
		})
		if there.Up || !strings.Contains(there.Advice, "blockferry secondary") || !strings.Contains(there.Advice, "blockferry discard") {
			t.Errorf("the second one: %+v", there)
		}
		w.b.refused(t, 3, []string{"would be a second primary"}, "up")
		for _, c := range []*cli{w.a, w.b} {
			c.refused(t, 3, []string{"is written here"}, "discard")
		}
		judgeDevice(t, v.Path, h, last, last)

		w.b.refused(t, 3, []string{"secondary --force"}, "secondary")
		if out := w.b.must(t, "secondary", "--force"); !strings.Contains(out, "written as primary after its last cut") {
			t.Errorf("it strays: %s", out)
		}
		w.a.await(t, "waiting for the operator", time.Minute, func(v status.Volume) bool {
			r := replicaNamed(t, v, "other")
			return strings.Contains(r.Reason, "both went on separately") && strings.Contains(r.Reason, "split brain") && strings.Contains(r.Advice, "at node 'node-b': blockferry discard")
		})
		if !bytes.Equal(image(t, ubd(1), dataOffset, twinVolume), strayed) {
			t.Fatal("the copy was written to, and nobody gave it up")
		}
		if out := w.b.must(t, "rescue", "list"); out != "" {
			t.Errorf("rescue files before: %s", out)
		}
		before := len(w.a.logText(t))
		if out := w.b.must(t, "discard"); !strings.Contains(out, "saved in ") {
			t.Error(out)
		}
		w.a.await(t, "followed", time.Minute, upToDate)
		if log := w.a.logText(t)[before:]; plans(log, "full") > 0 {
			t.Error("it followed by a full copy")
		}
		w.a.must(t, "sync", "--wait", "--timeout", "60s")
		w.a.must(t, "verify")
		out := w.b.must(t, "rescue", "list")
		if strings.Count(out, "\n") != 1 {
			t.Fatalf("rescue files: %s", out)
		}
		file, _, _ := strings.Cut(out, ": ")
		rescued(t, w.b, file, common, strayed, image(t, v.Path, 0, twinVolume))

		if out := w.a.must(t, "secondary"); !strings.Contains(out, "nothing is lost") {
			t.Errorf("secondary: %s", out)
		}
		if out := w.b.must(t, "primary"); !strings.Contains(out, "nothing is lost") {
			t.Errorf("primary: %s", out)
		}
		v = w.b.await(t, "followed in turn", time.Minute, upToDate)
		judgeDevice(t, v.Path, h, last, last)
		stopAll(t, w.b, w.a)
	})
}
