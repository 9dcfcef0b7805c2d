package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
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

// stopAll ends agents in order.
func stopAll(t *testing.T, agents ...*cli) {
	t.Helper()
	for _, c := range agents {
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	}
}

func volumeBytes(t *testing.T, device string) []byte {
	t.Helper()
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 0, attachedBytes))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The peer's copy is taken into use by hand while the other node writes on: nothing is
// sent, both go on, and status says what to do. When the operator gives the copy up it follows, and
// what only it had is in a rescue file, to the block, and can be written back.
func TestSplitBrainCopyInUse(t *testing.T) {
	onThisKernel(t)
	listen := freeAddress(t)
	p := newPair(t, listen, listen)
	rescue := t.TempDir()
	text := strings.Replace(mustRead(t, p.b.config), "listen:", "rescue: "+rescue+", listen:", 1)
	if err := os.WriteFile(p.b.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	writeNoise(t, filepath.Join(p.dir, "both"), 2<<20, 1)
	p.begin(t)
	stopAll(t, p.a, p.b)
	p.b.must(t, "recover", p.far)
	common := volumeBytes(t, p.far)
	there := t.TempDir()
	if err := unix.Mount(p.far, there, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	writeNoise(t, filepath.Join(there, "only there"), 1<<20, 2)
	if err := unix.Unmount(there, 0); err != nil {
		t.Fatal(err)
	}
	p.b.must(t, "recover", "--accept-changes", p.far)
	strayed := volumeBytes(t, p.far)
	p.b.start(t)
	p.a.start(t)
	writeNoise(t, filepath.Join(p.dir, "only here"), 1<<20, 3)
	split := func(v status.Volume) bool {
		r := replicaNamed(t, v, "zone-b")
		return strings.Contains(r.Reason, "both went on separately") && replicaNamed(t, v, "ebs").Disk == "UpToDate"
	}
	r := replicaNamed(t, p.a.await(t, "aware of the split brain", time.Minute, split), "zone-b")
	if !strings.Contains(r.Reason, "split brain") || strings.Contains(r.Reason+r.Advice, "\n") || !strings.Contains(r.Advice, "at node 'node-b': blockferry discard data") || strings.Contains(r.Advice, "blockferry primary") {
		t.Errorf("%s\n%s", r.Reason, r.Advice)
	}
	if out := p.a.must(t, "status"); !strings.Contains(out, "split brain") || !strings.Contains(out, "blockferry discard data") {
		t.Errorf("status:\n%s", out)
	}
	// It is tried again and again, and said once; nothing is written there.
	tries := func() int { return strings.Count(p.a.logText(t), "both went on separately") }
	before := tries()
	for range 3 {
		p.a.must(t, "pause")
		p.a.must(t, "resume")
		p.a.await(t, "refused again", time.Minute, split)
	}
	if n := tries() - before; n > 3 { // that it is behind, after each pause
		t.Errorf("said %d times:\n%s", n, p.a.logText(t))
	}
	if !bytes.Equal(volumeBytes(t, p.far), strayed) {
		t.Fatal("the copy was written to, and nobody gave it up")
	}
	p.a.refused(t, 3, []string{"is written here", "--replica"}, "discard")
	p.a.refused(t, 3, []string{"at node 'node-b'", "blockferry discard data"}, "discard", "--replica", "zone-b")
	if out := p.b.must(t, "rescue", "list"); out != "" {
		t.Errorf("rescue files before: %s", out)
	}
	if out := p.b.must(t, "discard", "data"); !strings.Contains(out, "saved in "+rescue) {
		t.Error(out)
	}
	p.a.await(t, "followed", 2*time.Minute, upToDate)
	out := p.b.must(t, "rescue", "list")
	if strings.Count(out, "\n") != 1 {
		t.Fatalf("rescue files: %s", out)
	}
	file, _, _ := strings.Cut(out, ": ")
	p.end(t)
	rescued(t, p.b, file, common, strayed, volumeBytes(t, p.far))
}

// rescued checks that a rescue file has what only the strayed image had, and that it can be
// written to a copy of another.
func rescued(t *testing.T, c *cli, file string, common, strayed, now []byte) {
	t.Helper()
	var d struct {
		Extents []struct{ Offset, Length int64 }
	}
	if err := json.Unmarshal([]byte(c.must(t, "rescue", "show", "--check", "--json", file)), &d); err != nil {
		t.Fatal(err)
	}
	held := make([]bool, len(now)/4096)
	want := bytes.Clone(now)
	for _, x := range d.Extents {
		copy(want[x.Offset:x.Offset+x.Length], strayed[x.Offset:])
		for b := x.Offset / 4096; b < (x.Offset+x.Length)/4096; b++ {
			held[b] = true
		}
	}
	only := 0
	for b := range held {
		at := b * 4096
		own := strayed[at : at+4096]
		if bytes.Equal(own, common[at:at+4096]) || bytes.Equal(own, now[at:at+4096]) {
			continue
		}
		if only++; !held[b] {
			t.Fatalf("what only the copy had at %d is not saved", at)
		}
	}
	if only < 100 {
		t.Errorf("only %d blocks were the copy's own: that was no test", only)
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, now, 0o600); err != nil {
		t.Fatal(err)
	}
	c.must(t, "rescue", "apply", file, image)
	if got, err := os.ReadFile(image); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the saved blocks were not written back as they were: %v", err)
	}
}

// A volume comes up at two nodes, from copies of one disk, and both are written: each is
// told by the other, status says so at both, each runs its hook once, neither writes to the other,
// and both go on.
func TestSplitBrainTwoPrimaries(t *testing.T) {
	onThisKernel(t)
	folders := issue(t, blockferry(t), "node-a", "node-b")
	type side struct {
		*cli
		ssd, ebs, state, dir, listen, name, other, told string
	}
	a := &side{name: "node-a", other: "node-b", listen: freeAddress(t)}
	b := &side{name: "node-b", other: "node-a", listen: freeAddress(t)}
	for _, s := range []*side{a, b} {
		s.ssd, s.ebs, s.state = blocktest.Loop(t, attachedBytes), blocktest.Loop(t, attachedBytes+96<<20), filepath.Join(t.TempDir(), "state")
		s.told = s.state + "-told"
		to := a.listen
		if s == a {
			to = b.listen
		}
		s.cli = newCLI(t, fmt.Sprintf(`node: {name: %s, certs: %s, listen: "%s"}
volumes:
  data:
    device: %s
    mode: attach
    state-file: %s
    interval: 200ms
    stall-limit: 5s
    hooks: {split-brain: [/bin/sh, -c, 'echo "$BLOCKFERRY_REPLICA $BLOCKFERRY_PEER $BLOCKFERRY_REASON" >>"$1"', hook, %s]}
    replicas:
      ebs: {device: %s, journal: 64MiB}
      far: {address: "%s", peer: %s}
`, s.name, folders[s.name], s.listen, s.ssd, s.state, s.told, s.ebs, to, s.other))
	}
	near := func(v status.Volume) bool { return replicaNamed(t, v, "ebs").Disk == "UpToDate" }
	a.dir = blocktest.FileSystem(t, "ext4", a.ssd)
	writeNoise(t, filepath.Join(a.dir, "both"), 1<<20, 1)
	a.must(t, "attach")
	a.start(t)
	a.await(t, "up to date beside it", 2*time.Minute, near)
	stopAll(t, a.cli)
	if err := unix.Unmount(a.dir, 0); err != nil {
		t.Fatal(err)
	}
	// The machine is copied.
	for _, c := range [][2]string{{a.ssd, b.ssd}, {a.ebs, b.ebs}} {
		run(t, "dd", "if="+c[0], "of="+c[1], "bs=1M", "conv=fsync,notrunc", "status=none")
	}
	run(t, "cp", a.state, b.state)
	for _, s := range []*side{a, b} {
		s.dir = blocktest.Mount(t, "ext4", s.ssd, 0)
		if s == b { // another machine has other pins
			s.inside = []string{"unshare", "--mount", "--propagation", "slave", "sh", "-c", `mount -t bpf bpf /sys/fs/bpf && exec "$@"`, "sh"}
		}
		s.start(t)
	}
	for i, s := range []*side{a, b} {
		writeNoise(t, filepath.Join(s.dir, "only at "+s.name), 1<<20, uint64(2+i))
		v := s.await(t, "aware of the other", time.Minute, func(v status.Volume) bool {
			return near(v) && strings.Contains(replicaNamed(t, v, "far").Reason, "primary there, too") && strings.Contains(v.Reason, "node '"+s.other+"'")
		})
		r := replicaNamed(t, v, "far")
		if !strings.Contains(r.Reason, "split brain") || !strings.Contains(r.Reason, "went on separately from") || v.Role != "Primary" || !v.Up {
			t.Errorf("%s: %+v", s.name, v)
		}
		for _, words := range []string{r.Advice, v.Advice} {
			if !strings.Contains(words, "blockferry secondary --force data") || !strings.Contains(words, "blockferry discard data") {
				t.Errorf("%s: %s", s.name, words)
			}
		}
	}
	for _, s := range []*side{a, b} {
		if !strings.Contains(s.logText(t), "another primary") || strings.Contains(s.logText(t), "fed by") {
			t.Errorf("the log at %s:\n%s", s.name, s.logText(t))
		}
		s.refused(t, 6, []string{"far"}, "sync", "--timeout", "2s")
		s.await(t, "up to date beside it", time.Minute, near)
		if told := mustRead(t, s.told); strings.Count(told, "\n") != 1 || !strings.HasPrefix(told, "far "+s.other+" ") || !strings.Contains(told, "went on separately from") {
			t.Errorf("the hook at %s was told: %s", s.name, told)
		}
		stopAll(t, s.cli)
		if err := unix.Unmount(s.dir, 0); err != nil {
			t.Fatal(err)
		}
		s.must(t, "recover", s.ebs)
		mounted := blocktest.Mount(t, "ext4", s.ebs, unix.MS_RDONLY)
		if _, err := os.Stat(filepath.Join(mounted, "only at "+s.name)); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(mounted, "only at "+s.other)); err == nil {
			t.Errorf("what was written at %s is at %s", s.other, s.name)
		}
	}
}
