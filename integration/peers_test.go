package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/blocktest"
	"blockferry/cmd/blockferry/status"
)

// pair is a node that writes an attached device, with one replica beside it and
// one at another node.
type pair struct {
	a, b          *cli
	ssd, ebs, far string
	dir           string // where the volume is mounted
}

// newPair makes both, up to the agents' start. address leads from a to b's
// listen.
func newPair(t *testing.T, listen, address string) *pair {
	t.Helper()
	folders := issue(t, blockferry(t), "node-a", "node-b")
	p := &pair{ssd: blocktest.Loop(t, attachedBytes), ebs: blocktest.Loop(t, attachedBytes+96<<20), far: blocktest.Loop(t, attachedBytes+256<<20)}
	p.dir = blocktest.FileSystem(t, "ext4", p.ssd)
	p.b = newCLI(t, fmt.Sprintf(`node: {name: node-b, certs: %s, listen: "%s"}
volumes:
  data: {role: secondary, device: %s, journal: 160MiB, peers: [node-a]}
`, folders["node-b"], listen, p.far))
	p.a = newCLI(t, fmt.Sprintf(`node: {name: node-a, certs: %s}
volumes:
  data:
    device: %s
    mode: attach
    state-file: %s
    interval: 200ms
    stall-limit: 5s
    replicas:
      ebs: {device: %s, journal: 64MiB}
      zone-b: {address: "%s", peer: node-b}
`, folders["node-a"], p.ssd, filepath.Join(t.TempDir(), "state"), p.ebs, address))
	return p
}

func (p *pair) begin(t *testing.T) {
	t.Helper()
	p.b.must(t, "create")
	p.a.must(t, "attach")
	p.b.start(t)
	p.a.start(t)
	p.a.await(t, "up to date on both", 2*time.Minute, upToDate)
	p.a.must(t, "sync", "--wait", "--timeout", "60s")
}

// end stops both in order and compares all three devices, byte by byte.
func (p *pair) end(t *testing.T) {
	t.Helper()
	mustUnmount(t, p.dir)
	p.a.must(t, "sync", "--wait", "--timeout", "60s")
	for _, c := range []*cli{p.a, p.b} {
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	}
	for _, replica := range []string{p.ebs, p.far} {
		p.a.must(t, "recover", replica)
		sameBytes(t, p.ssd, replica, attachedBytes)
	}
}

func replicaNamed(t *testing.T, v status.Volume, name string) status.Replica {
	t.Helper()
	for _, r := range v.Replicas {
		if r.Name == name {
			return r
		}
	}
	t.Fatalf("no replica %s in %+v", name, v)
	return status.Replica{}
}

// Two agents in two network namespaces: the far replica catches up and holds the
// same; the link is cut, the near one goes on, status says how far the far one is
// behind and why; the link is back and only what changed is sent.
func TestPeer(t *testing.T) {
	onThisKernel(t)
	zoneA, zoneB := twoZones(t)
	p := newPair(t, "10.9.0.2:7070", "10.9.0.2:7070")
	p.a.inside, p.b.inside = zoneA.inside(), zoneB.inside()
	p.b.must(t, "create", "--dry-run")
	writeNoise(t, filepath.Join(p.dir, "before"), 4<<20, 1)
	p.begin(t)
	p.b.refused(t, 3, []string{"only a replica here", "node-a"}, "up")
	p.b.refused(t, 3, []string{"only a replica here"}, "up", "--wait")
	p.a.refused(t, 2, []string{"is at node 'node-b'"}, "create", "--replica", "zone-b")
	p.a.must(t, "verify")
	v := p.a.await(t, "up to date", time.Minute, upToDate)
	if far := replicaNamed(t, v, "zone-b"); far.Peer != "node-b" || far.BehindSeconds == nil || far.BehindBytes == nil {
		t.Errorf("the far replica: %+v", far)
	}
	s := p.b.await(t, "fed", time.Minute, func(v status.Volume) bool { return v.FedBy != "" })
	if s.Role != "Secondary" || s.Disk != "Consistent" || s.Position == nil || !strings.HasPrefix(s.FedBy, "node-a@10.9.0.1") || s.CutAt == nil || s.UUID != v.UUID {
		t.Errorf("at the peer: %+v", s)
	}
	p.a.must(t, "status")
	p.b.must(t, "status")

	zoneB.ip("link set wire down")
	cut := time.Now()
	writeNoise(t, filepath.Join(p.dir, "meanwhile"), 2<<20, 2)
	v = p.a.await(t, "aware of the cut link", time.Minute, func(v status.Volume) bool {
		r := replicaNamed(t, v, "zone-b")
		return r.Connection != "Connected" && r.Reason != ""
	})
	t.Logf("the cut link was noticed after %v: %s", time.Since(cut).Round(10*time.Millisecond), replicaNamed(t, v, "zone-b").Reason)
	// 10 s of silence, or 10 s from when something was sent within these; and a busy machine.
	if took := time.Since(cut); took > 25*time.Second {
		t.Errorf("a dead path was noticed after %v", took)
	}
	p.b.await(t, "aware of the cut link", time.Minute, func(v status.Volume) bool { return v.FedBy == "" && strings.Contains(v.Reason, "nobody feeds it") })
	near := replicaNamed(t, v, "ebs").Position.Epoch
	writeNoise(t, filepath.Join(p.dir, "later"), 2<<20, 3)
	v = p.a.await(t, "going on to the near replica", time.Minute, func(v status.Volume) bool {
		r := replicaNamed(t, v, "ebs")
		far := replicaNamed(t, v, "zone-b")
		return r.Disk == "UpToDate" && r.Position.Epoch > near && far.BehindBytes != nil && *far.BehindBytes >= 4<<20 && *far.BehindSeconds > 1 && strings.Contains(far.Reason, "can't be reached")
	})
	if far := replicaNamed(t, v, "zone-b"); !strings.Contains(far.Advice, "node 'node-b' is up") {
		t.Errorf("the far replica: %+v", far)
	}
	p.a.refused(t, 6, []string{"zone-b"}, "sync", "--timeout", "2s")

	before := len(p.a.logText(t))
	zoneB.ip("link set wire up")
	back := time.Now()
	p.a.await(t, "up to date again", time.Minute, upToDate)
	t.Logf("up to date %v after the link was back", time.Since(back).Round(10*time.Millisecond))
	onlyWhatChanged(t, p.a.logText(t)[before:])

	// The peer's agent dies and comes back.
	before = len(p.a.logText(t))
	_ = p.b.stop(t, syscall.SIGKILL)
	writeNoise(t, filepath.Join(p.dir, "while the peer was down"), 1<<20, 4)
	p.a.await(t, "aware that the peer is gone", time.Minute, func(v status.Volume) bool { return replicaNamed(t, v, "zone-b").Connection != "Connected" })
	p.b.start(t)
	p.a.await(t, "up to date once more", time.Minute, upToDate)
	onlyWhatChanged(t, p.a.logText(t)[before:])
	p.end(t)
}

// onlyWhatChanged checks that the replica that came back was planned for by what changed.
func onlyWhatChanged(t *testing.T, log string) {
	t.Helper()
	lost, err := planned(log, "zone-b")
	if lost {
		t.Log("events were lost, and it was said: everything is compared")
	}
	if err != nil {
		t.Errorf("%v:\n%s", err, log)
	}
}

// planned says whether a log has plans for a replica, all of which go by what changed. Events
// are lost on some kernels: that counts only where the agent says so of its own tracking.
func planned(log, replica string) (lost bool, err error) {
	plans := 0
	for line := range strings.Lines(log) {
		if !strings.Contains(line, `msg="replica connected"`) || !strings.Contains(line, "replica="+replica+" ") {
			continue
		}
		_, plan, _ := strings.Cut(line, "plan=\"")
		plans++
		switch {
		case strings.HasPrefix(plan, "incremental: "), strings.HasPrefix(plan, "nothing: "):
		case strings.HasPrefix(plan, "compare: the replica holds an earlier cut and what changed since is not known ") && strings.Contains(log, "what changed since epoch"):
			lost = true // a round before failed for want of tracking, and said so
		default:
			err = errors.Join(err, fmt.Errorf("planned: %s", strings.TrimSpace(plan)))
		}
	}
	if plans == 0 {
		return false, errors.New("it did not connect")
	}
	return lost, err
}

// A peer at less than the write rate delays nobody: the near replica has the last cut while
// most of the work still waits for the link, and the far one catches up when the load
// stops. The work is the same on any machine, whatever a flush takes there.
func TestPeerSlowLink(t *testing.T) {
	const (
		rate   = 400 << 10 // bytes per second
		rounds = 10
		each   = 4 << 20 // bytes written at once, that can't be packed: 10 s of the link
	)
	onThisKernel(t)
	listen := freeAddress(t)
	link := newSlowLink(t, listen, rate)
	p := newPair(t, listen, link.address())
	p.begin(t)
	before, begun := link.bytes(), time.Now()
	for n := range rounds {
		writeOver(t, filepath.Join(p.dir, fmt.Sprint("file", n%4)), junk(each))
		// The near replica has it before the next is written; the far one has not got far.
		p.a.await(t, "up to date beside it", 2*time.Minute, func(v status.Volume) bool {
			near := replicaNamed(t, v, "ebs")
			return near.Disk == "UpToDate" && near.BehindBytes != nil && *near.BehindBytes < each/2
		})
	}
	took, passed := time.Since(begun), link.bytes()-before
	v := p.a.await(t, "known", time.Minute, func(status.Volume) bool { return true })
	far := replicaNamed(t, v, "zone-b")
	t.Logf("%d MiB were written and at the near replica within %.1f s; %d MiB passed the link meanwhile; the far one: %s, %s", rounds*each>>20, took.Seconds(), passed>>20, far.Disk, far.Reason)
	if limit := int64(took.Seconds()*rate) + 1<<20; passed > limit {
		t.Errorf("%d bytes passed a link that takes %d in that time: it was not slow", passed, limit)
	}
	// Each round alone takes the link 10 s; with the last one just written the far one lacks it.
	if far.BehindBytes == nil || *far.BehindBytes < each {
		t.Errorf("the far replica is not behind: %+v", far)
	}
	p.a.await(t, "up to date once the load has ended", 5*time.Minute, upToDate)
	p.end(t)
}

// The disk is lost, and the replica beside it is older than the far one: it is not
// restored from by itself, nor while the far one does not answer.
func TestPeerIsAskedBeforeARestore(t *testing.T) {
	onThisKernel(t)
	listen := freeAddress(t)
	p := newPair(t, listen, listen)
	p.begin(t)
	if err := p.a.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	old := filepath.Join("/dev/shm", filepath.Base(t.TempDir())+filepath.Base(p.ebs))
	t.Cleanup(func() { os.Remove(old) })
	run(t, "cp", "--sparse=always", p.ebs, old)
	p.a.start(t)
	content := writeNoise(t, filepath.Join(p.dir, "newer"), 1<<20, 5)
	p.a.await(t, "up to date on both", time.Minute, upToDate)
	p.a.must(t, "sync", "--wait", "--timeout", "60s")
	for _, c := range []*cli{p.a, p.b} {
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	}
	mustUnmount(t, p.dir)
	current := old + "-current"
	t.Cleanup(func() { os.Remove(current) })
	run(t, "cp", "--sparse=always", p.ebs, current)
	run(t, "dd", "if="+old, "of="+p.ebs, "bs=1M", "conv=fsync,notrunc", "status=none")
	wipe(t, p.ssd, attachedBytes)
	p.a.start(t)
	p.a.await(t, "found blank", time.Minute, func(v status.Volume) bool { return v.Stage == "blank" })
	p.a.refused(t, 3, []string{"'zone-b' did not say what it holds", "connection refused", "--from ebs"}, "restore")
	p.b.start(t)
	p.b.await(t, "open", time.Minute, func(v status.Volume) bool { return v.Position != nil })
	p.a.refused(t, 3, []string{"'zone-b' at node 'node-b' holds", "ahead", "--from ebs"}, "restore")
	// The copy beside it is the newest again.
	if err := p.a.stop(t, syscall.SIGTERM); err != nil {
		t.Errorf("the agent ended with %v", err)
	}
	run(t, "dd", "if="+current, "of="+p.ebs, "bs=1M", "conv=fsync,notrunc", "status=none")
	p.a.start(t)
	p.a.await(t, "found blank", time.Minute, func(v status.Volume) bool { return v.Stage == "blank" })
	p.a.must(t, "restore")
	if err := unix.Mount(p.ssd, p.dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(p.dir, "newer")); err != nil || !bytes.Equal(got, content) {
		t.Errorf("restored: %d bytes, %v", len(got), err)
	}
	p.a.await(t, "up to date on both", time.Minute, upToDate)
	p.end(t)
}

// Certificates are exchanged under agents that run: a peer whose own is of another authority,
// or has expired, is refused, in words that say which, and taken again when it has a good one.
func TestPeerCertificates(t *testing.T) {
	onThisKernel(t)
	listen := freeAddress(t)
	p := newPair(t, listen, listen)
	p.begin(t)
	folder := strings.Split(strings.SplitAfter(mustRead(t, p.b.config), "certs: ")[1], ",")[0]
	kept := t.TempDir()
	replace := func(from, to string) {
		t.Helper()
		for _, file := range []string{"ca.crt", "node.pem"} {
			next := filepath.Join(to, ".next")
			if err := os.WriteFile(next, []byte(mustRead(t, filepath.Join(from, file))), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(next, filepath.Join(to, file)); err != nil {
				t.Fatal(err)
			}
		}
	}
	replace(folder, kept)
	for _, c := range []struct{ name, from, here, there string }{
		{"foreign", issue(t, p.b.binary, "node-b")["node-b"], "its certificate, of node 'node-b', is not by an authority that is trusted here", "it refused this node's certificate"},
		// It knows itself that it has expired, and does not show it.
		{"expired", expiredOf(t, filepath.Dir(filepath.Dir(folder)), "node-b"), "node 'node-b' at " + listen, "this node's certificate can't be used"},
	} {
		replace(c.from, folder)
		logged := len(p.b.logText(t))
		position := p.b.await(t, "open", time.Minute, func(v status.Volume) bool { return v.Position != nil }).Position.Epoch
		p.a.must(t, "pause")
		p.a.await(t, "paused", time.Minute, func(v status.Volume) bool { return replicaNamed(t, v, "zone-b").Connection != "Connected" })
		p.a.must(t, "resume")
		writeNoise(t, filepath.Join(p.dir, "while "+c.name), 1<<20, 9)
		v := p.a.await(t, "refused: "+c.name, time.Minute, func(v status.Volume) bool {
			r := replicaNamed(t, v, "zone-b")
			return r.Connection != "Connected" && strings.Contains(r.Reason, c.here) && replicaNamed(t, v, "ebs").Disk == "UpToDate"
		})
		r := replicaNamed(t, v, "zone-b")
		t.Logf("%s: %s; %s", c.name, r.Reason, r.Advice)
		p.b.awaitLog(t, logged, c.there, time.Minute)
		if c.name == "expired" {
			p.b.awaitLog(t, logged, "expired on", time.Minute)
			p.b.refused(t, 7, []string{"1 of "}, "check")
		}
		if v := p.b.await(t, "there", time.Minute, func(v status.Volume) bool { return v.Position != nil }); v.Position.Epoch > position+1 || v.FedBy != "" {
			t.Errorf("%s: fed all the same: from %d to %+v", c.name, position, v)
		}
		replace(kept, folder)
		p.a.await(t, "up to date again", time.Minute, upToDate)
	}
	p.a.must(t, "check")
	p.end(t)
}

// writeOver writes a file in its place, durably.
func writeOver(t *testing.T, path string, content []byte) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err == nil {
		_, err = file.Write(content)
		err = errors.Join(err, file.Sync(), file.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func mustRead(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}
