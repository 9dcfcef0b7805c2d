package integration

import (
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

// settled waits until the agent knows what a volume's disk holds.
func (p *powerRig) settled(t *testing.T) status.Volume {
	t.Helper()
	return p.await(t, "looked at", time.Minute, func(v status.Volume) bool {
		if strings.Contains(v.Reason, "not the device that was expected") {
			t.Fatalf("a label and areas that are not of one volume: %s", v.Reason)
		}
		return v.Up || v.Reason != "" && !strings.Contains(v.Reason, "the agent is starting")
	})
}

// filledPowerRig is one whose volume holds the writes of its history up to last.
func filledPowerRig(t *testing.T) (p *powerRig, last uint64) {
	t.Helper()
	p = newPowerRig(t, false, "20MiB")
	p.create(t)
	p.start(t)
	w, _ := p.write(t)
	w.awaitWrites(t, 500)
	return p, w.stop(t)
}

// Power of the SSD goes while it is being restored: what is there is never
// taken for a volume before it is one, and the restore, repeated, ends well.
func TestFaultPowerLossInRestore(t *testing.T) {
	inGuest(t, powerGuest, func(t *testing.T) {
		p, last := filledPowerRig(t)
		p.must(t, "down")
		if err := p.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		p.ssd.wipe(t)
		for _, at := range []powerPoint{
			{on: "ssd", what: "label", few: 2},
			{on: "ssd", what: "flush after label", few: 2, state: "restoring"},
			{on: "ssd", what: "write", few: 100, state: "restoring"},
			{on: "ssd", what: "flush after write", few: 1, state: "restoring"},
			{on: "ssd", what: "flush after label", few: 1, state: "verifying"},
			{on: "ssd", what: "write", few: 100, state: "restoring"},
			{on: "ssd", what: "flush after label", few: 1, state: "verifying"},
			{on: "ssd", what: "flush after label", few: 1, state: "clean"},
		} {
			if at.state == "restoring" && p.labelState() != "restoring" {
				p.ssd.wipe(t)
			}
			p.start(t)
			p.settled(t)
			gone := p.lose(at, p.ssd)
			code := p.restore(t)
			select {
			case <-gone:
			default:
				if code != 0 {
					t.Fatalf("restore ended with %d though its disk has power", code)
				}
				t.Fatalf("there was no %s while %s", at.what, at.state)
			}
			if code == 0 {
				t.Fatalf("restore ended well though the power went at a %s while %s", at.what, at.state)
			}
			p.takeDown(t)
			said := p.labelState()
			p.ssd.powerOn(t)
			now := p.labelState()
			t.Logf("power of the SSD went at a %s; the label said %s, says %s", at.what, said, now)
			p.start(t)
			if v := p.settled(t); v.Up && now != "clean" {
				t.Fatalf("half restored, and up: %+v", v)
			}
			p.takeDown(t)
		}
		if p.agent == nil {
			p.start(t)
		}
		if v := p.settled(t); !v.Up {
			if code := p.restore(t); code != 0 {
				t.Fatalf("the last restore ended with %d", code)
			}
		}
		p.mains.cut(p.ssd)
		p.takeDown(t)
		p.ssd.powerOn(t)
		p.start(t)
		v := p.await(t, "up to date", time.Minute, upToDate)
		judgeDevice(t, v.Path, p.h, last, last)
		p.must(t, "sync", "--timeout", "60s")
		p.must(t, "verify")
		p.must(t, "down")
	})
}

// restore runs the command as the agent advises: with --force only where a
// disk is neither blank nor a volume.
func (p *powerRig) restore(t *testing.T) int {
	t.Helper()
	_, errs, code := p.try(t, "restore")
	if code == 3 && strings.Contains(errs, "--force") {
		_, errs, code = p.try(t, "restore", "--force")
	}
	t.Logf("restore: exit code %d %s", code, errs)
	return code
}

// Power goes while a volume is created, now on new disks, now over an old one:
// what is there afterwards is a whole volume or none, and create, as it says
// itself, makes one of it. Created it is when the command says so.
func TestFaultPowerLossInCreate(t *testing.T) {
	inGuest(t, powerGuest, func(t *testing.T) {
		p := newPowerRig(t, true, "20MiB")
		for i := range powerNumber(t, powerLossesVar, 4) {
			for _, d := range p.all() {
				d.wipe(t)
			}
			p.create(t) // the second one finds what the first left
			for _, d := range p.all() {
				if i%2 == 0 {
					d.wipe(t)
				}
			}
			on := []string{"ssd", "ebs", "marks"}[i%3]
			gone := p.lose(powerPoint{on: on, few: map[string]int{"ssd": 16, "ebs": 8, "marks": 4}[on]}, p.all()...)
			_, errs, code := p.try(t, "create", "--discard-my-data")
			select {
			case <-gone:
			default:
				t.Fatalf("create made fewer requests of %s than that: %d %s", on, code, errs)
			}
			p.powerOn(t)
			t.Logf("power of all went at a request of %s in create, which ended with %d; the label says %s", on, code, p.labelState())
			p.start(t)
			up := p.settled(t).Up
			if up {
				// The old volume, if its label was not touched yet: its replica
				// may be the new one's already, and that is said.
				p.await(t, "up", time.Minute, func(v status.Volume) bool {
					up = !strings.Contains(v.Replicas[0].Reason, "holds volume")
					return !up || upToDate(v)
				})
			}
			p.takeDown(t)
			if up {
				continue
			}
			args := []string{"create"}
			_, errs, code = p.try(t, args...)
			for _, flag := range []string{"--force", "--discard-my-data"} {
				if code == 3 && strings.Contains(errs, flag) {
					_, errs, code = p.try(t, append(args, flag)...)
				}
			}
			if code != 0 {
				t.Fatalf("create again: exit code %d: %s", code, errs)
			}
			p.nothingToLose(t)
			p.mains.cut(p.all()...) // it said that the volume is made
			p.powerOn(t)
			p.start(t)
			p.await(t, "up to date", time.Minute, upToDate)
			p.takeDown(t)
		}
	})
}

// Power goes in the first full sync, which overwrites the replica in place:
// until it ends nobody takes the replica for a copy, and then it is one.
func TestFaultPowerLossInFirstSync(t *testing.T) {
	inGuest(t, powerGuest, func(t *testing.T) {
		p, last := filledPowerRig(t)
		p.must(t, "sync", "--timeout", "60s")
		p.takeDown(t)
		for i, at := range []powerPoint{
			{on: "ebs", what: "apply", few: 16},
			{on: "ebs", what: "flush after commit superblock", few: 2}, // before the first frame
			{on: "ebs", what: "flush after applied superblock", few: 1},
			{on: "ebs", what: "flush after map", few: 2},
		} {
			p.ebs.wipe(t)
			p.must(t, "create", "--replica", "ebs")
			gone := p.lose(at, p.all()...)
			p.start(t)
			p.awaitLoss(t, at, gone)
			p.takeDown(t)
			copied := survivor(p.ebs)
			s, err := protocol.PeekReplica(copied)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("power of both went at a %s; the replica is %v", at.what, s.State)
			if s.State == protocol.DiskConsistent {
				if _, err := judgeImage(copied, p.h); err != nil {
					t.Fatalf("it calls itself consistent at %v: %v", s.Committed, err)
				}
			}
			p.powerOn(t)
			if i == 0 {
				// Not even a lost SSD is filled from it.
				kept := p.ssd.durable
				p.ssd.wipe(t)
				p.start(t)
				p.settled(t)
				p.refused(t, 3, []string{"nothing to restore from"}, "restore")
				p.takeDown(t)
				p.mains.cut(p.ssd)
				p.ssd.durable = kept
				p.ssd.powerOn(t)
			}
			p.start(t)
			p.await(t, "up to date", time.Minute, upToDate)
			p.must(t, "sync", "--timeout", "60s")
			p.must(t, "verify")
			p.takeDown(t)
		}
		p.start(t)
		p.await(t, "up to date", time.Minute, upToDate)
		p.must(t, "down")
		if err := p.stop(t, os.Interrupt); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		p.must(t, "recover", p.ebs.path)
		judgeDevice(t, p.ebs.path, p.h, last, last)
	})
}
