package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// The agent runs the operator's commands when a peer falls behind, when it is not
// behind any more, and when copies turn out to have gone their own ways.
func TestPeerHooks(t *testing.T) {
	onThisKernel(t)
	listen := freeAddress(t)
	p := newPair(t, listen, listen)
	told := filepath.Join(t.TempDir(), "told")
	const line = `echo "$BLOCKFERRY_EVENT $BLOCKFERRY_NODE $BLOCKFERRY_VOLUME $BLOCKFERRY_REPLICA $BLOCKFERRY_PEER $BLOCKFERRY_EPOCH $BLOCKFERRY_BEHIND_SECONDS $BLOCKFERRY_BEHIND_BYTES: $BLOCKFERRY_REASON" >>"$1"`
	script := `[/bin/sh, -c, '` + line + `', hook, ` + told + `]`
	config := strings.Replace(mustRead(t, p.a.config), "    mode: attach\n",
		"    mode: attach\n    hooks: {behind-after: 15s, behind: "+script+", split-brain: "+script+"}\n", 1)
	if err := os.WriteFile(p.a.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	first := 0 // of the peer's lines, after what a busy machine's first copy had told
	await := func(what string, ok func(lines []string) bool) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
			var lines []string
			b, _ := os.ReadFile(told)
			for line := range strings.Lines(string(b)) {
				if strings.Contains(line, " data zone-b node-b ") && strings.HasSuffix(line, "\n") {
					lines = append(lines, strings.TrimSpace(line))
				}
			}
			if ok(lines[first:]) {
				return
			} else if time.Now().After(end) {
				t.Fatalf("no hook was told that %s: %q, of the first copy %d", what, lines, first)
			}
		}
	}
	p.begin(t)
	early := 0
	await("the first copy is over", func(l []string) bool { early = len(l); return early%2 == 0 })
	first = early
	v := p.a.await(t, "up to date", time.Minute, upToDate)
	epoch := replicaNamed(t, v, "zone-b").Position.Epoch

	_ = p.b.stop(t, syscall.SIGKILL)
	writeNoise(t, filepath.Join(p.dir, "meanwhile"), 2<<20, 1)
	await("the peer is behind", func(l []string) bool {
		if len(l) == 0 {
			return false
		}
		words := strings.Fields(l[0])
		if len(words) < 9 {
			return false
		}
		seconds, _ := strconv.Atoi(words[6])
		bytes, _ := strconv.Atoi(strings.TrimSuffix(words[7], ":"))
		at, _ := strconv.ParseUint(words[5], 10, 64)
		return strings.HasPrefix(l[0], "behind node-a data zone-b node-b ") && at >= epoch && seconds >= 15 && bytes >= 2<<20 && strings.TrimSpace(strings.SplitN(l[0], ":", 2)[1]) != ""
	})
	p.b.start(t)
	await("it is not any more", func(l []string) bool {
		if len(l) != 2 || !strings.HasPrefix(l[1], "behind node-a data zone-b node-b ") {
			return false
		}
		seconds, err := strconv.Atoi(strings.Fields(l[1])[6])
		return err == nil && seconds < 8
	})

	// The node and the copy beside it go on from what they were before: the peer
	// holds what they do not.
	p.a.must(t, "sync", "--wait", "--timeout", "60s")
	state := strings.TrimSpace(strings.SplitN(strings.SplitAfter(config, "state-file: ")[1], "\n", 2)[0])
	stop := func() {
		t.Helper()
		if err := p.a.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	}
	stop()
	before, ebs := mustRead(t, state), filepath.Join("/dev/shm", filepath.Base(t.TempDir())+filepath.Base(p.ebs))
	t.Cleanup(func() { os.Remove(ebs) })
	run(t, "cp", "--sparse=always", p.ebs, ebs)
	p.a.start(t)
	p.a.await(t, "up to date", time.Minute, upToDate)
	writeNoise(t, filepath.Join(p.dir, "later"), 1<<20, 2)
	p.a.must(t, "sync", "--wait", "--timeout", "60s")
	stop()
	if err := os.WriteFile(state, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, "dd", "if="+ebs, "of="+p.ebs, "bs=1M", "conv=fsync,notrunc", "status=none")
	p.a.start(t)
	await("the peer went its own way", func(l []string) bool {
		return slices.ContainsFunc(l, func(line string) bool {
			return strings.HasPrefix(line, "split-brain node-a data zone-b node-b ") && strings.Contains(line, "diverged")
		})
	})
	// It is tried again and again, and told once.
	came := strings.Count(p.b.logText(t), `msg="fed by"`)
	p.a.must(t, "pause")
	p.a.must(t, "resume")
	p.a.await(t, "there once more", time.Minute, func(status.Volume) bool {
		return strings.Count(p.b.logText(t), `msg="fed by"`) > came
	})
	await("it is the same still", func(l []string) bool { return strings.Count(strings.Join(l, "\n"), "split-brain") == 1 })
	mustUnmount(t, p.dir)
	for _, c := range []*cli{p.a, p.b} {
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	}
}
