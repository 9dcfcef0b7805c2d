package integration

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/status"
)

var powerGuest = guest{Modules: []string{"nbd"}, Timeout: 10 * time.Minute}

// Power goes for both disks at one instant, wherever the agent is at work.
// Nothing that was flushed is lost, the replica is one committed epoch and no
// older than what was acknowledged, the volume is no older than the replica,
// and replication goes on incrementally.
func TestFaultPowerLossOfBoth(t *testing.T) {
	inGuest(t, powerGuest, func(t *testing.T) {
		p := newPowerRig(t, false, "20MiB")
		p.create(t)
		p.start(t)
		points := []powerPoint{
			{on: "ebs", what: "journal", few: 12}, // in mid-epoch
			{on: "ebs", what: "flush after applied superblock", few: 3},
			{on: "ebs", what: "apply", few: 20}, // in mid-apply
			{on: "ssd", what: "label", few: 3},
			{on: "ebs", what: "commit", few: 2},
			{on: "ebs", what: "flush after commit superblock", few: 3},
			{on: "ebs", what: "map", few: 2},
			{on: "ssd", what: "mark", few: 30},
			{on: "ebs", what: "flush after commit", few: 2},
			{on: "ebs", what: "apply superblock", few: 2},
			{on: "ssd", what: "write", few: 200}, // between cuts, mostly
			{on: "ebs", what: "flush after applied superblock", few: 2},
		}
		for i := range powerNumber(t, powerLossesVar, len(points)) {
			p.loseOwn(t, points[i%len(points)], p.all()...)
		}
		p.finish(t)
	})
}

// write has the writer go on until its disk holds a point of the history
// again, and the replica too. It returns the last write that is synced.
func (p *powerRig) write(t *testing.T) (w *writer, synced uint64) {
	t.Helper()
	v := p.await(t, "up to date", time.Minute, upToDate)
	w = startWriter(t, v.Path, p.h, p.flushed+1)
	w.awaitWrites(t, max(p.issued, p.flushed)-p.flushed+50)
	synced = w.acked()
	p.must(t, "sync", "--timeout", "60s")
	return w, synced
}

// loseOwn takes the power of disks that the volume can't do without, at once.
func (p *powerRig) loseOwn(t *testing.T, at powerPoint, victims ...*volatileDisk) {
	t.Helper()
	t.Logf("power of %d goes at a %s on %s", len(victims), at.what, at.on)
	w, synced := p.write(t)
	epoch := p.awaitLoss(t, at, p.lose(at, victims...))
	<-w.done
	if w.err == nil {
		t.Fatal("the writer saw no error")
	}
	if len(victims) == 1 {
		time.Sleep(300 * time.Millisecond) // an agent that is not stopped at once does no harm either
	}
	p.flushed, p.issued = max(p.flushed, w.flushed()), max(p.issued, w.issued())
	p.takeDown(t)
	p.judge(t, w, synced, epoch)
	p.flushed = max(p.flushed, synced)
	for _, d := range victims {
		d.powerOn(t)
	}
	p.start(t)
	p.caughtUp(t)
}

// finish takes the volume down cleanly and loses power right after: the end
// is remembered, and both disks hold the last write.
func (p *powerRig) finish(t *testing.T) {
	t.Helper()
	w, _ := p.write(t)
	last := w.stop(t)
	p.caughtUp(t)
	if out := p.must(t, "down"); !strings.Contains(out, "cleanly") {
		t.Errorf("not a clean end: %s", out)
	}
	p.nothingToLose(t)
	p.mains.cut(p.all()...)
	p.takeDown(t)
	p.powerOn(t)
	p.must(t, "recover", p.ebs.path)
	judgeDevice(t, p.ebs.path, p.h, last, last)
	p.start(t)
	v := p.await(t, "up to date", time.Minute, upToDate)
	judgeDevice(t, v.Path, p.h, last, last)
	if n := strings.Count(p.logText(t), "new generation after a clean end"); n != 1 {
		t.Errorf("%d starts after a clean end, should be one, the last", n)
	}
	p.must(t, "down")
	if err := p.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
}

// Power goes for one of the disks only. Without its replica the volume goes
// on as if nothing were; without its SSD, or the disk with its marks, the
// machine is started anew. No disk is ever ahead of what the others can explain.
func TestFaultPowerLossOfOne(t *testing.T) {
	inGuest(t, powerGuest, func(t *testing.T) {
		p := newPowerRig(t, true, "20MiB")
		p.create(t)
		p.h.FlushEvery = 1000 // only the agent sees to it that the SSD keeps up with its replica
		p.start(t)
		points := []powerPoint{
			{on: "ssd", what: "write", few: 200},
			{on: "ebs", what: "apply", few: 20},
			{on: "ssd", what: "flush after label", few: 3},
			{on: "ebs", what: "flush after applied superblock", few: 3},
			{on: "ssd", what: "flush after write", few: 3},
			{on: "ebs", what: "journal", few: 12},
			{on: "ssd", what: "label", few: 3},
			{on: "ebs", what: "flush after commit superblock", few: 2},
			{on: "marks", what: "mark", few: 30},
		}
		for i := range powerNumber(t, powerLossesVar, len(points)) {
			if at := points[i%len(points)]; at.on == "ebs" {
				p.loseReplica(t, at)
			} else {
				p.loseOwn(t, at, p.named(at.on))
			}
		}
		p.finish(t)
	})
}

func (p *powerRig) loseReplica(t *testing.T, at powerPoint) {
	t.Helper()
	t.Logf("power of the replica goes at a %s", at.what)
	w, synced := p.write(t)
	epoch := p.awaitLoss(t, at, p.lose(at, p.ebs))
	p.cli.await(t, "without its replica", 30*time.Second, func(v status.Volume) bool {
		return v.Up && v.Replicas[0].Connection != "Connected" && v.Replicas[0].Position == nil
	})
	before := w.acked()
	w.awaitWrites(t, 100)
	p.issued = max(p.issued, w.issued())
	p.judgeReplica(t, survivor(p.ebs), synced, epoch)
	for i := range otherFates {
		p.judgeReplica(t, &diskCopy{name: "another fate of " + p.ebs.path, size: p.ebs.size, pages: p.mains.afterCut(p.ebs.before, p.ebs.atRisk, i == 0)}, synced, epoch)
	}
	p.ebs.powerOn(t)
	p.cli.await(t, "with its replica again", 30*time.Second, func(v status.Volume) bool {
		return v.Replicas[0].Connection == "Connected" && v.Replicas[0].Position != nil
	})
	if w.stop(t) <= before {
		t.Error("the application stood still without the replica")
	}
	p.flushed, p.issued = w.acked(), w.issued()
	p.caughtUp(t)
}

// What was written before a cut is on the SSD for good once its source is
// flushed, also where neither label nor marks are written beside it.
func TestFaultSourceFlush(t *testing.T) {
	inGuest(t, powerGuest, func(t *testing.T) {
		m := newMains(1)
		ssd, marks := m.disk(t, 0, powerDiskBytes), m.disk(t, 1, 8<<20)
		format(t, volume.FormatOptions{Device: ssd.path, MetaDevice: marks.path, SizeBytes: 20 << 20, CowBytes: 16 << 20})
		v := up(t, mapper(t), volume.Options{Device: ssd.path, MetaDevice: marks.path})
		c := mustCut(t, v, 1, true)
		for i := range int64(50) {
			mustWriteBlock(t, v.Path(), i*4096, byte(i+1))
		}
		if ssd.pendingBytes() < 50*4096 {
			t.Fatalf("only %d bytes are at risk: the writes were flushed by something else", ssd.pendingBytes())
		}
		if err := c.FlushSource(); err != nil {
			t.Fatal(err)
		}
		if n := ssd.pendingBytes(); n > 0 {
			t.Errorf("a power cut after the source was flushed would lose %d bytes", n)
		}
		mustRelease(t, c)
	})
}
