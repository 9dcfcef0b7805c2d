package integration

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// trio are three nodes with one volume that each of them can write, every two joined
// by a wire of their own.
type trio struct {
	a, b, c *cli
	zones   map[*cli]*zone
	letters map[*cli]string
}

func newTrio(t *testing.T) *trio {
	t.Helper()
	letters := []string{"a", "b", "c"}
	zones := []*zone{newZone(t), newZone(t), newZone(t)}
	// The wire between i and j is network i+j.
	address := func(i, j int) string { return fmt.Sprintf("10.9.%d.%d", i+j, i+1) }
	for i := range zones {
		for j := range i {
			zones[i].ip(fmt.Sprintf("link add to-%s type veth peer name to-%s netns %d", letters[j], letters[i], zones[j].tid))
			zones[i].ip(fmt.Sprintf("address add %s/24 dev to-%s", address(i, j), letters[j]))
			zones[j].ip(fmt.Sprintf("address add %s/24 dev to-%s", address(j, i), letters[i]))
			zones[i].ip("link set to-" + letters[j] + " up")
			zones[j].ip("link set to-" + letters[i] + " up")
		}
	}
	folders := issue(t, blockferry(t), "node-a", "node-b", "node-c")
	w := &trio{zones: map[*cli]*zone{}, letters: map[*cli]string{}}
	for i, node := range []**cli{&w.a, &w.b, &w.c} {
		var peers []string
		replicas := ""
		for j, other := range letters {
			if j != i {
				peers = append(peers, "node-"+other)
				replicas += fmt.Sprintf("      zone-%s: {address: \"%s:7070\", peer: node-%[1]s}\n", other, address(j, i))
			}
		}
		role := "secondary"
		if i == 0 {
			role = "primary"
		}
		name := "node-" + letters[i]
		*node = newCLI(t, fmt.Sprintf(`node: {name: %s, certs: %s, listen: "0.0.0.0:7070", rescue: %s}
volumes:
  data:
    role: %s
    device: %s
    size: %d
    interval: 300ms
    stall-limit: 20s
    peers: [%s]
    replicas:
%s`, name, folders[name], t.TempDir(), role, ubd(i), twinVolume, strings.Join(peers, ", "), replicas))
		(*node).inside = zones[i].inside()
		w.zones[*node], w.letters[*node] = zones[i], letters[i]
	}
	for _, node := range []*cli{w.c, w.b, w.a} {
		node.must(t, "create")
		node.start(t)
	}
	w.a.await(t, "up to date on both", 2*time.Minute, upToDate)
	return w
}

// wire sets the wire between two nodes up or down.
func (w *trio) wire(from, to *cli, state string) {
	w.zones[from].ip("link set to-" + w.letters[to] + " " + state)
}

// A volume with two remote peers. A planned switchover takes both along. Then the
// new primary is lost while one of the two is behind: that one does not take over by
// accident, the other does, and the one behind follows by what changed since its own cut. The
// old primary comes back while it can't reach the new one: the third node's copy is
// enough to tell it that it was left behind; given up by the operator it follows.
func TestFailoverThreeNodes(t *testing.T) {
	inGuest(t, guest{Memory: "1200M", Disks: []disk{{Size: twinDisk}, {Size: twinDisk}, {Size: twinDisk}}, Modules: []string{"veth"}, Timeout: 8 * time.Minute}, threeNodes)
}

func threeNodes(t *testing.T) {
	w := newTrio(t)
	a, b, c := w.a, w.b, w.c
	h := history{Seed: 53, Size: twinVolume, MaxBytes: 64 << 10, Span: 8 << 20, Pause: 5 * time.Millisecond}
	written := func(from, to uint64) (sum int64) {
		for k := from; k <= to; k++ {
			sum += h.op(k).Length
		}
		return sum
	}

	v := a.await(t, "up to date", time.Minute, upToDate)
	load := startWriter(t, v.Path, h, 1)
	load.awaitWrites(t, 40)
	last := load.stop(t)
	if out := a.must(t, "secondary"); !strings.Contains(out, "'zone-b'") || !strings.Contains(out, "'zone-c'") || !strings.Contains(out, "nothing is lost") {
		t.Errorf("secondary: %s", out)
	}
	if out := b.must(t, "primary"); !strings.Contains(out, "nothing is lost") {
		t.Errorf("primary: %s", out)
	}
	v = b.await(t, "up to date on both", time.Minute, upToDate)
	judgeDevice(t, v.Path, h, last, last)
	c.refused(t, 3, []string{"another primary is alive", "node 'node-b' is primary"}, "primary")
	load = startWriter(t, v.Path, h, last+1)
	load.awaitWrites(t, 40)
	last = load.stop(t)
	b.await(t, "up to date on both", time.Minute, upToDate)
	log := b.logText(t)
	if full, compared := plans(log, "full"), plans(log, "compare"); full+compared > 0 || plans(log, "incremental") < 2 {
		t.Errorf("after the switchover there were %d full copies, %d comparisons, %d incremental epochs", full, compared, plans(log, "incremental"))
	}

	// node-c falls behind, then node-b is lost.
	first := last + 1
	load = startWriter(t, v.Path, h, first)
	load.awaitWrites(t, 20)
	w.wire(b, c, "down")
	parted := load.acked()
	tip := b.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Position != nil }).Position.Epoch
	b.await(t, "further at node-a", time.Minute, func(v status.Volume) bool {
		near := replicaNamed(t, v, "zone-a")
		return near.Position != nil && near.Position.Epoch > tip+1
	})
	b.kill(t)
	load.awaitWrites(t, 3) // which nobody else has
	lost := load.stop(t)
	removeStack(t, "data")
	w.wire(b, c, "up")
	for _, node := range []*cli{a, c} {
		node.await(t, "not fed any more", time.Minute, func(v status.Volume) bool { return isSecondary(v) && v.FedBy == "" })
	}
	ahead := a.await(t, "there", time.Minute, func(v status.Volume) bool { return v.Position != nil }).Position.Epoch
	behind := c.await(t, "there", time.Minute, func(v status.Volume) bool { return v.Position != nil }).Position.Epoch
	if behind >= ahead {
		t.Fatalf("node-c is at epoch %d, node-a at %d: that was no test", behind, ahead)
	}
	c.refused(t, 3, []string{"writes may be lost", "node 'node-b' does not say where it stands", "node 'node-a' is secondary at", fmt.Sprintf("/%d, ahead of the copy here", ahead)}, "primary")
	a.refused(t, 3, []string{"writes may be lost", "node 'node-b' does not say where it stands", "node 'node-c' is secondary at"}, "primary")
	if out := a.must(t, "primary", "--force"); !strings.Contains(out, "what was written after the copy's cut is lost") {
		t.Errorf("it does not say what is lost: %s", out)
	}
	v = a.await(t, "followed by node-c", time.Minute, func(v status.Volume) bool { return v.Up && replicaNamed(t, v, "zone-c").Disk == "UpToDate" })
	at := judgeDevice(t, v.Path, h, parted, lost).K
	log = a.logText(t)
	log = log[strings.Index(log, "takes over"):]
	if passed, changed := sent(t, log), written(first, lost); plans(log, "full")+plans(log, "compare") > 0 || plans(log, "incremental") == 0 || passed > changed+changed/4+1<<20 {
		t.Errorf("node-c followed by %d full copies, %d comparisons and %d incremental epochs, with %d bytes sent; %d were written since it was level",
			plans(log, "full"), plans(log, "compare"), plans(log, "incremental"), passed, changed)
	}

	// node-b comes back, and can't reach node-a.
	w.wire(a, b, "down")
	b.edit(t, "  data:", "  was:") // its device can't be beside the new primary's, in one kernel
	b.start(t)
	v = b.await(t, "out of date", time.Minute, func(v status.Volume) bool { return strings.Contains(v.Reason, "out of date") })
	if v.Up || !strings.Contains(v.Reason, "node 'node-c'") || !strings.Contains(v.Advice, "blockferry secondary") {
		t.Errorf("the old primary: %+v", v)
	}
	b.refused(t, 3, []string{"out of date"}, "up")
	w.wire(a, b, "up")
	if out := b.must(t, "secondary", "--force"); !strings.Contains(out, "written as primary after its last cut") {
		t.Errorf("it strays: %s", out)
	}
	v = a.await(t, "aware of it", time.Minute, func(v status.Volume) bool {
		return strings.Contains(replicaNamed(t, v, "zone-b").Reason, "split brain")
	})
	if r := replicaNamed(t, v, "zone-c"); r.Disk != "UpToDate" {
		t.Errorf("the third node's replica: %+v", r)
	}
	before := len(a.logText(t))
	b.must(t, "discard")
	v = a.await(t, "up to date on both", time.Minute, upToDate)
	if log := a.logText(t)[before:]; plans(log, "full")+plans(log, "compare") > 0 || plans(log, "incremental") == 0 {
		t.Error("the old primary did not come back by what changed")
	}
	if out := b.must(t, "rescue", "list"); !strings.Contains(out, ".rescue") {
		t.Errorf("what only the old primary had was not saved: %s", out)
	}
	load = startWriter(t, v.Path, h, at+1)
	load.awaitWrites(t, 20)
	last = load.stop(t)
	a.must(t, "sync", "--wait", "--timeout", "60s")
	a.must(t, "verify")
	judgeDevice(t, v.Path, h, last, last)
	for _, node := range []*cli{a, b, c} {
		if err := node.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	}
}
