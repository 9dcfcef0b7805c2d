package integration

import (
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

// besideLevel says that the replica beside a copy holds what that does.
func besideLevel(t *testing.T, v status.Volume) bool {
	t.Helper()
	r := replicaNamed(t, v, "ebs")
	return isSecondary(v) && v.Position != nil && r.Position != nil && *r.Position == *v.Position && r.Disk == "UpToDate" && r.Reason == ""
}

// openedAt is the position at which an agent's log says first that it opened a replica.
func openedAt(t *testing.T, log, device string) (position string) {
	t.Helper()
	for line := range strings.Lines(log) {
		if _, words, is := strings.Cut(line, `msg="replica opened"`); is && strings.Contains(words, " device="+device+" ") {
			_, position, _ = strings.Cut(strings.TrimSpace(words), " position=")
			return position
		}
	}
	t.Fatalf("no replica was opened on %s", device)
	return ""
}

// A node that follows has a disk beside its copy: that holds a point in time under the name
// that it has where it is written, also when the agent is killed, and goes on from there.
// When the node that writes is lost and this one takes over, its disk is up to date again
// by what was written since.
func TestCascade(t *testing.T) {
	inGuest(t, guest{Memory: "1200M", Disks: []disk{{Size: twinDisk}, {Size: twinDisk}, {Size: twinDisk}}, Modules: []string{"veth"}, Timeout: 6 * time.Minute}, cascaded)
}

func cascaded(t *testing.T) {
	ebs := ubd(2)
	w := madeTwins(t, ubd(0), ubd(1), "", "stall-limit: 20s")
	w.b.edit(t, "    replicas:\n", "    replicas:\n      ebs: {device: "+ebs+"}\n")
	w.b.start(t)
	w.a.start(t)
	w.a.await(t, "up to date", 2*time.Minute, upToDate)
	w.b.await(t, "told to format its disk", time.Minute, func(v status.Volume) bool {
		return isSecondary(v) && strings.Contains(replicaNamed(t, v, "ebs").Advice, "blockferry create --replica ebs data")
	})
	stopAll(t, w.b) // it looks for its disk now and then, and nobody else has that meanwhile
	w.b.must(t, "create", "--replica", "ebs")
	w.b.must(t, "check")
	w.b.start(t)
	h := history{Seed: 59, Size: twinVolume, MaxBytes: 64 << 10, Span: 8 << 20, Pause: 5 * time.Millisecond}
	v := w.a.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
	load := startWriter(t, v.Path, h, 1)
	load.awaitWrites(t, 20)
	v = w.b.await(t, "fed as well", time.Minute, func(v status.Volume) bool {
		r := replicaNamed(t, v, "ebs")
		return r.Position != nil && r.CutAt != nil && r.BehindSeconds != nil && !r.BehindIsMinimum
	})
	from := replicaNamed(t, v, "ebs").Position.Epoch
	w.b.await(t, "further", time.Minute, func(v status.Volume) bool { return replicaNamed(t, v, "ebs").Position.Epoch > from+2 })
	w.b.refused(t, 3, []string{"is secondary here"}, "verify", "--replica", "ebs")

	w.b.kill(t)
	out := w.b.must(t, "recover", ebs)
	last, copied := peek(t, ebs), peek(t, ubd(1)) // which nobody has opened yet
	if kind := protocol.Compare(last.Lineage, copied.Lineage).Kind; kind != protocol.Same && kind != protocol.Behind || last.Committed.Epoch <= from+2 {
		t.Errorf("the disk is at [%v], the copy at [%v]", last.Lineage, copied.Lineage)
	}
	if !strings.Contains(out, last.Committed.String()) || !strings.Contains(out, "it can be mounted") {
		t.Errorf("recover: %s", out)
	}
	held := judgeDevice(t, ebs, h, 1, load.issued())
	if held.Partial || held.K > load.issued() {
		t.Errorf("the disk holds %+v", held)
	}
	before := len(w.b.logText(t))
	w.b.start(t)
	w.a.await(t, "up to date", time.Minute, upToDate)
	w.b.await(t, "further", time.Minute, func(v status.Volume) bool {
		r := replicaNamed(t, v, "ebs")
		return r.Position != nil && r.Position.Epoch > last.Committed.Epoch+1
	})

	load.awaitWrites(t, 20)
	w.a.kill(t)
	load.awaitWrites(t, 3) // which nobody else has
	lost := load.stop(t)
	removeStack(t, "data")
	v = w.b.await(t, "level with its disk, and fed no more", time.Minute, func(v status.Volume) bool { return v.FedBy == "" && besideLevel(t, v) })
	log := w.b.logText(t)[before:]
	// Of epochs that were committed and not applied when it was killed it does not know what
	// had been compared: then the disk beside it is.
	waited := openedAt(t, log, ubd(1)) != copied.Applied.String()
	t.Logf("when it was killed the copy had applied %v; epochs waited in its journal: %v", copied.Applied, waited)
	if full, compared := plans(log, "full"), plans(log, "compare"); full > 0 || compared > 0 && !waited || plans(log, "incremental") == 0 {
		t.Errorf("after the kill: %d full copies, %d comparisons, %d incremental epochs", full, compared, plans(log, "incremental"))
	}
	taken := len(w.b.logText(t))
	w.b.must(t, "primary", "--force")
	beside := func(v status.Volume) bool { return v.Up && replicaNamed(t, v, "ebs").Disk == "UpToDate" }
	v = w.b.await(t, "up to date beside it", time.Minute, beside)
	got := judgeDevice(t, v.Path, h, held.K, lost)
	if got.Partial {
		t.Errorf("the new primary holds %+v, its disk had %+v", got, held)
	}
	load = startWriter(t, v.Path, h, got.K+1)
	load.awaitWrites(t, 20)
	end := load.stop(t)
	v = w.b.await(t, "level", time.Minute, func(v status.Volume) bool {
		r := replicaNamed(t, v, "ebs")
		return beside(v) && r.BehindBytes != nil && *r.BehindBytes == 0 && !r.BehindIsMinimum
	})
	w.b.must(t, "verify", "--replica", "ebs")
	written := int64(0)
	for k := got.K + 1; k <= end; k++ {
		written += h.op(k).Length
	}
	log = w.b.logText(t)[taken:]
	passed := sent(t, log)
	t.Logf("its disk held up to write %d when it was killed, the copy at the end up to %d of %d; after the take-over %d bytes were written, %d sent", held.K, got.K, lost, written, passed)
	if full, compared := plans(log, "full"), plans(log, "compare"); full+compared > 0 || plans(log, "incremental") == 0 || passed > written+written/4+1<<20 {
		t.Errorf("after the take-over: %d full copies, %d comparisons, %d incremental epochs, %d bytes", full, compared, plans(log, "incremental"), passed)
	}

	// Its own disk is lost and restored from that one. Whether the other node took over meanwhile
	// nobody says: the operator does.
	w.b.kill(t)
	removeStack(t, "data")
	wipe(t, ubd(1), twinDisk)
	w.b.beginAs(t, "primary")
	w.b.start(t)
	w.b.await(t, "blank", time.Minute, func(v status.Volume) bool { return v.Stage == "blank" })
	w.b.refused(t, 3, []string{"restored epoch", "it is restored, but not up", "node 'node-a' does not say where it stands"}, "restore", "--from", "ebs")
	v = w.b.await(t, "waiting for the other node", time.Minute, func(v status.Volume) bool { return v.Stage == "waiting" })
	if !strings.Contains(v.Advice, "blockferry primary data") {
		t.Errorf("it waits: %+v", v)
	}
	w.b.must(t, "primary")
	v = w.b.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
	judgeDevice(t, v.Path, h, end, end)
	stopAll(t, w.b)
}
