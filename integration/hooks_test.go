package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

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
		"    mode: attach\n    hooks: {behind-after: 3s, behind: "+script+", split-brain: "+script+"}\n", 1)
	if err := os.WriteFile(p.a.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	await := func(what string, ok func(lines []string) bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			b, _ := os.ReadFile(told)
			if lines := strings.Split(strings.TrimSpace(string(b)), "\n"); ok(lines) {
				return
			} else if time.Now().After(end) {
				t.Fatalf("no hook was told that %s: %q", what, lines)
			}
		}
	}
	p.begin(t)
	v := p.a.await(t, "up to date", time.Minute, upToDate)
	epoch := replicaNamed(t, v, "zone-b").Position.Epoch

	_ = p.b.stop(t, syscall.SIGKILL)
	writeNoise(t, filepath.Join(p.dir, "meanwhile"), 2<<20, 1)
	await("the peer is behind", func(l []string) bool {
		words := strings.Fields(l[0])
		if len(words) < 9 {
			return false
		}
		seconds, _ := strconv.Atoi(words[6])
		bytes, _ := strconv.Atoi(strings.TrimSuffix(words[7], ":"))
		at, _ := strconv.ParseUint(words[5], 10, 64)
		return strings.HasPrefix(l[0], "behind node-a data zone-b node-b ") && at >= epoch && seconds >= 3 && bytes >= 2<<20 && strings.TrimSpace(strings.SplitN(l[0], ":", 2)[1]) != ""
	})
	p.b.start(t)
	await("it is not any more", func(l []string) bool {
		if len(l) != 2 || !strings.HasPrefix(l[1], "behind node-a data zone-b node-b ") {
			return false
		}
		seconds, err := strconv.Atoi(strings.Fields(l[1])[6])
		return err == nil && seconds < 2
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
		return len(l) >= 3 && strings.HasPrefix(l[len(l)-1], "split-brain node-a data zone-b node-b ") && strings.Contains(l[len(l)-1], "diverged")
	})
	// It is tried again and again, and told once.
	came := strings.Count(p.b.logText(t), `msg="fed by"`)
	p.a.must(t, "pause")
	p.a.must(t, "resume")
	p.a.await(t, "there once more", time.Minute, func(status.Volume) bool {
		return strings.Count(p.b.logText(t), `msg="fed by"`) > came
	})
	await("it is the same still", func(l []string) bool { return strings.Count(strings.Join(l, "\n"), "split-brain") == 1 })
	if err := unix.Unmount(p.dir, 0); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*cli{p.a, p.b} {
		if err := c.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	}
}
