package integration

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

// The hooks of a change of role: what runs before it may refuse, and then nothing
// has changed; what runs after it can't. A node that does not answer is fenced
// first, and unfenced when it follows.
func TestSwitchoverHooks(t *testing.T) {
	inGuest(t, twinGuest(5*time.Minute), func(t *testing.T) {
		w := newTwins(t)
		dir := t.TempDir()
		const line = `echo "$BLOCKFERRY_EVENT $BLOCKFERRY_VOLUME peer=$BLOCKFERRY_PEER device=$BLOCKFERRY_DEVICE epoch=$BLOCKFERRY_EPOCH" >>"$1/told"; echo told; [ ! -e "$1/no-$BLOCKFERRY_EVENT" ]`
		lines := "    hooks:\n"
		for _, e := range []string{"before-promote", "after-promote", "after-demote", "fence-peer", "unfence-peer"} {
			lines += "      " + e + ": [/bin/sh, -c, '" + line + "', hook, " + dir + "]\n"
		}
		stop := func(c *cli) {
			t.Helper()
			if err := c.stop(t, syscall.SIGTERM); err != nil {
				t.Errorf("the agent ended with %v", err)
			}
		}
		stop(w.a)
		config := strings.Replace(mustRead(t, w.a.config), "  data:\n", "  data:\n"+lines, 1)
		if err := os.WriteFile(w.a.config, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		w.a.start(t)
		w.a.await(t, "up to date", time.Minute, upToDate)
		told := func(want ...string) {
			t.Helper()
			var got []string
			for line := range strings.Lines(mustRead(t, filepath.Join(dir, "told"))) {
				if !strings.HasPrefix(line, "unfence-peer data peer=node-b") {
					got = append(got, strings.TrimSpace(line[:strings.Index(line, " epoch=")]))
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("told %q\nwant %q", got, want)
			}
		}
		refuse := func(event string) func() {
			t.Helper()
			file := filepath.Join(dir, "no-"+event)
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return func() { os.Remove(file) }
		}

		// What runs afterwards refuses nothing.
		allow := refuse("after-demote")
		if got := w.a.must(t, "secondary"); !strings.Contains(got, "nothing is lost") {
			t.Errorf("secondary: %s", got)
		}
		allow()
		all := []string{"after-demote data peer= device="}
		told(all...)
		w.a.await(t, "secondary", time.Minute, isSecondary)

		stop(w.b)
		for _, event := range []string{"before-promote", "fence-peer"} {
			allow := refuse(event)
			w.a.refused(t, 3, []string{"hook " + event + " (/bin/sh) ended with exit status 1: told"}, "primary", "--force")
			w.a.await(t, "secondary as before", time.Minute, isSecondary)
			allow()
		}
		all = append(all, "before-promote data peer= device=", "before-promote data peer= device=", "fence-peer data peer=node-b device=")
		told(all...)
		w.a.must(t, "primary", "--force")
		w.a.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up })
		all = append(all, "before-promote data peer= device=", "fence-peer data peer=node-b device=", "after-promote data peer= device=/dev/mapper/data")
		told(all...)

		w.b.start(t)
		w.a.await(t, "followed by the other", time.Minute, upToDate)
		for end := time.Now().Add(time.Minute); !strings.HasPrefix(lastLine(mustRead(t, filepath.Join(dir, "told"))), "unfence-peer data peer=node-b device=/dev/mapper/data"); time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("it was not unfenced: %s", mustRead(t, filepath.Join(dir, "told")))
			}
		}
		told(all...)
		// One that answers is not fenced.
		w.a.must(t, "secondary")
		w.a.must(t, "primary")
		told(append(all, "after-demote data peer= device=", "before-promote data peer= device=", "after-promote data peer= device=/dev/mapper/data")...)
		w.a.must(t, "down")
		stop(w.a)
		stop(w.b)
	})
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return lines[len(lines)-1]
}
