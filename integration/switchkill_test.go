package integration

import (
	"errors"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

// killStep is the n-th time that, after a flush, a disk's label or its superblocks are written.
type killStep struct {
	where string
	n     int
}

const (
	atLabel      = "label"
	atSuperblock = "superblock"
)

// killSteps are where the agent is killed in each change of role.
var killSteps = []struct{ down, up killStep }{
	{killStep{atLabel, 1}, killStep{atLabel, 1}},
	{killStep{atSuperblock, 1}, killStep{atSuperblock, 1}},
	{killStep{atSuperblock, 2}, killStep{atSuperblock, 2}},
	{killStep{atSuperblock, 3}, killStep{atLabel, 2}},
	{killStep{atSuperblock, 4}, killStep{atSuperblock, 3}},
}

// The agent is killed at one step after another of a change of role, whichever way it goes,
// those between the two roles included: the disk is never taken for both, repeated the change
// ends well, and nothing is lost.
func TestSwitchoverKilled(t *testing.T) {
	inGuest(t, guest{Memory: "1200M", Modules: []string{"veth", "nbd"}, Timeout: 8 * time.Minute}, func(t *testing.T) {
		m := newMains(1)
		disks := [2]*volatileDisk{m.disk(t, 0, twinDisk), m.disk(t, 1, twinDisk)}
		w := newTwinsOn(t, disks[0].path, disks[1].path)
		h := history{Seed: 47, Size: twinVolume, MaxBytes: 64 << 10, Span: 8 << 20}
		now, then := w.a, w.b
		last, seen := uint64(0), map[string]int{}
		// killed has a command killed at a step; then the agent is there again.
		killed := func(c *cli, d *volatileDisk, step killStep, command string) {
			t.Helper()
			at := c.killAtStep(t, d, step, command)
			t.Logf("%s, killed at %s %d: %s", command, step.where, step.n, at)
			seen[command+": "+at]++
			if c.agent == nil {
				c.start(t)
			}
			v := c.await(t, "one or the other", time.Minute, func(v status.Volume) bool { return v.Up || isSecondary(v) && v.Position != nil })
			if v.Up && command == "secondary" {
				c.await(t, "up to date", time.Minute, upToDate)
			}
		}
		for _, steps := range killSteps {
			v := now.await(t, "up to date", time.Minute, upToDate)
			load := startWriter(t, v.Path, h, last+1)
			load.awaitWrites(t, 20)
			last = load.stop(t)
			now.must(t, "sync", "--wait", "--timeout", "60s")
			killed(now, disks[0], steps.down, "secondary")
			now.must(t, "secondary")
			now.await(t, "open", time.Minute, func(v status.Volume) bool { return isSecondary(v) && v.Position != nil })
			killed(then, disks[1], steps.up, "primary")
			then.must(t, "primary")
			v = then.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
			judgeDevice(t, v.Path, h, last, last)
			now, then = then, now
			disks[0], disks[1] = disks[1], disks[0]
		}
		now.await(t, "up to date", time.Minute, upToDate)
		now.must(t, "verify")
		t.Logf("%v", seen)
		// Between the two roles, either way.
		for _, want := range []string{"secondary: " + betweenDown, "primary: " + betweenUp} {
			if seen[want] == 0 {
				t.Errorf("no kill struck where the disk was %s", want)
			}
		}
		now.must(t, "down")
		stopAll(t, now, then)
	})
}

// What a disk is while its role changes.
const (
	betweenDown = "secondary, without a replica's superblock"
	betweenUp   = "secondary, and its superblock says that it takes over"
)

// killAtStep begins a command and kills the agent at a step: that write is the last. It
// says what the disk is then, or that the command was done before.
func (c *cli) killAtStep(t *testing.T, d *volatileDisk, step killStep, command string) string {
	t.Helper()
	process, flushed, struck := c.agent.Process, true, make(chan struct{})
	d.mains.arm(func(on *volatileDisk, r diskRequest) []*volatileDisk {
		where := ""
		switch {
		case on != d:
		case r.flush:
			flushed = true
		case r.offset < 1<<20:
			where = atLabel
		case r.offset >= d.size-1<<20:
			where = atSuperblock
		}
		if where == step.where && flushed {
			flushed = false
			if step.n--; step.n == 0 {
				_ = process.Kill()
				close(struck)
			}
		}
		return nil
	})
	out, errs, code := c.try(t, command)
	d.mains.arm(nil)
	select {
	case <-struck:
	default:
		if code != 0 {
			t.Errorf("%s, not killed: exit code %d: %s%s", command, code, out, errs)
		}
		return "done before"
	}
	<-c.ended
	c.agent = nil
	return diskRole(t, d.path)
}

// diskRole says what a disk holds by its label and its superblock.
func diskRole(t *testing.T, path string) string {
	t.Helper()
	disk, err := blockdev.OpenFile(path, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	label, err := volume.ReadLabel(disk)
	if err != nil {
		t.Fatal(err)
	}
	state, err := protocol.DecodeSourceState(label.State)
	if err != nil {
		t.Fatal(err)
	}
	replica, err := protocol.PeekReplica(disk)
	if err != nil && !errors.Is(err, protocol.ErrNoSuperblock) {
		t.Fatal(err)
	}
	switch {
	case !state.Secondary && err == nil && replica.TookOver.IsZero():
		t.Errorf("%s is both: its label says primary, its superblock that it is a replica at %v", path, replica.Committed)
		return "both"
	case !state.Secondary && state.Clean:
		return "primary, closed"
	case !state.Secondary:
		return "primary"
	case err != nil:
		return betweenDown
	case !replica.TookOver.IsZero():
		return betweenUp
	case len(state.Effective()) > 0:
		return "secondary, and its label says what it held as primary"
	}
	return strings.TrimSpace("secondary " + replica.Strayed)
}
