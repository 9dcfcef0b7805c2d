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
	onThisKernel(t)
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
	if err := unix.Unmount(p.dir, 0); err != nil {
		t.Fatal(err)
	}
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
	if took := time.Since(cut); took > 40*time.Second {
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

// onlyWhatChanged checks that a replica that came back was sent no more.
func onlyWhatChanged(t *testing.T, log string) {
	t.Helper()
	switch {
	case strings.Contains(log, "what changed since that cut is not known"):
		t.Log("events were lost, and it was said: everything is compared") // as they are, on some kernels
	case !strings.Contains(log, `plan="incremental`), strings.Contains(log, `plan="compare`):
		t.Errorf("it was not incremental:\n%s", log)
	}
}

// A peer at a tenth of the write rate delays nobody: the near replica stays
// close all the time, and the far one catches up when the load stops.
func TestPeerSlowLink(t *testing.T) {
	const rate = 400 << 10 // bytes per second
	listen := freeAddress(t)
	link := newSlowLink(t, listen, rate)
	p := newPair(t, listen, link.address())
	p.begin(t)
	before := link.bytes()
	begun := time.Now()
	behind, late, written := 0.0, 0.0, int64(0)
	for n := 0; time.Since(begun) < 20*time.Second; n++ {
		writeOver(t, filepath.Join(p.dir, fmt.Sprint("file", n%4)), junk(4<<20))
		written += 4 << 20
		v, _, known := p.a.look(t)
		if !known {
			continue
		}
		if r := replicaNamed(t, v, "ebs"); r.BehindSeconds != nil {
			behind = max(behind, *r.BehindSeconds)
		}
		if r := replicaNamed(t, v, "zone-b"); r.BehindSeconds != nil {
			late = max(late, *r.BehindSeconds)
		}
		if pause := time.Until(begun.Add(time.Duration(written) * time.Second / (10 * rate))); pause > 0 {
			time.Sleep(pause) // the load's own pace
		}
	}
	t.Logf("%d MiB written, %d MiB passed the link: the near replica was at most %.1f s behind, the far one %.1f s", written>>20, (link.bytes()-before)>>20, behind, late)
	if passed := link.bytes() - before; passed*3 > written {
		t.Errorf("%d bytes passed the slow link of %d written: it was not slow", passed, written)
	}
	if behind > 8 || late < 10 {
		t.Errorf("the near replica was up to %.1f s behind, the far one up to %.1f s", behind, late)
	}
	p.a.await(t, "up to date once the load has ended", 5*time.Minute, upToDate)
	p.end(t)
}

// The disk is lost, and the replica beside it is older than the far one: it is not
// restored from by itself, nor while the far one does not answer.
func TestPeerIsAskedBeforeARestore(t *testing.T) {
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
	if err := unix.Unmount(p.dir, 0); err != nil {
		t.Fatal(err)
	}
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

// Certificates are exchanged under agents that run: a peer whose own expired is refused, in words on
// both sides, and taken again when it has a new one.
func TestPeerCertificates(t *testing.T) {
	listen := freeAddress(t)
	p := newPair(t, listen, listen)
	p.begin(t)
	folder := strings.Split(strings.SplitAfter(mustRead(t, p.b.config), "certs: ")[1], ",")[0]
	good := mustRead(t, filepath.Join(folder, "node.pem"))
	other := issue(t, p.b.binary, "node-b")["node-b"]
	replace := func(content string) {
		t.Helper()
		next := filepath.Join(folder, ".next")
		if err := os.WriteFile(next, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(folder, "node.pem")); err != nil {
			t.Fatal(err)
		}
	}
	replace(mustRead(t, filepath.Join(other, "node.pem")))
	p.a.must(t, "pause")
	p.a.must(t, "resume")
	v := p.a.await(t, "refused", time.Minute, func(v status.Volume) bool {
		return replicaNamed(t, v, "zone-b").Connection != "Connected" && replicaNamed(t, v, "zone-b").Reason != ""
	})
	t.Logf("%s; %s", replicaNamed(t, v, "zone-b").Reason, replicaNamed(t, v, "zone-b").Advice)
	p.b.refused(t, 7, []string{"1 of "}, "check")
	replace(good)
	p.a.await(t, "up to date again", time.Minute, upToDate)
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
