package agent

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/protocol"
)

// told is what hooks that append a line to a file have said; it waits for as many lines.
func told(t *testing.T, path string, lines int) string {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		text, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		if strings.Count(string(text), "\n") >= lines {
			return string(text)
		}
		if time.Now().After(end) {
			t.Fatalf("%d lines were to come: %s", lines, text)
		}
	}
}

// Who uses a volume is asked to end before it stands down; that can refuse it, but for force,
// and then nothing has changed. That it is up is told whatever brought it up.
func TestHooksEndTheUse(t *testing.T) {
	disk := blocktest.NewMemory(64 << 20)
	if _, err := volume.FormatOn(disk, volume.UUID{7}, volume.LayoutOptions{SizeBytes: 4 << 20, CowBytes: config.MinCowBytes, TailBytes: protocol.TailBytes(4<<20, protocol.MinJournalBytes)}, nil); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	s := aSwitching(t, raw)
	s.config.Attach = true // needs no mapper
	file := filepath.Join(t.TempDir(), "told")
	line := func(status string) []string {
		return []string{"/bin/sh", "-c", `echo "$BLOCKFERRY_EVENT $BLOCKFERRY_DEVICE" >>"$1"; exit ` + status, "hook", file}
	}
	s.managed.hooks = hooks.New("node-a", "data", map[hooks.Event][]string{hooks.BeforeDemote: line("1"), hooks.AfterUp: line("0"), hooks.AfterDemote: line("0")}, time.Minute, quiet())
	t.Cleanup(s.managed.hooks.Close)
	if _, err := s.secondary(t.Context(), false); err == nil || strings.Contains(err.Error(), "before-demote") {
		t.Errorf("one that is not up asks nobody: %v", err)
	}
	s.managed.nowUp(fakeStack{}, nil)
	const up, end = "after-up /dev/mapper/data\n", "before-demote /dev/mapper/data\n"
	if got := told(t, file, 1); got != up {
		t.Errorf("told %q", got)
	}
	_, err := s.secondary(t.Context(), false)
	if exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "hook before-demote (/bin/sh) ended with exit status 1") || s.managed.at() != stageUp || s.at() != rolePrimary {
		t.Errorf("%v; it is %s", err, stageWords[s.managed.at()])
	}
	if err := s.endUse(t.Context(), true); err != nil {
		t.Errorf("by force: %v", err)
	}
	if got := told(t, file, 3); got != up+end+end {
		t.Errorf("told %q", got)
	}
}

// When a lease ends, those who use the volume hear of it once, and nobody waits for them.
func TestLeaseEndIsTold(t *testing.T) {
	s, f := withLease(t, nil)
	s.config.Attach = true // needs no mapper
	file := filepath.Join(t.TempDir(), "told")
	s.managed.hooks = hooks.New("node-a", "data", map[hooks.Event][]string{hooks.BeforeDemote: {"/bin/sh", "-c", `echo "$BLOCKFERRY_REASON" >>"$1"`, "hook", file}}, time.Minute, quiet())
	look := func() { s.lookAtLease(t.Context(), rolePrimary, volume.UUID{7}) }
	for n, why := range []string{"etcd is away", "another end"} {
		s.lease.have(&scriptedLease{now: f.now, sent: f.now()})
		look()
		if _, err := os.Stat(file); n == 0 && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("told of a lease that goes on: %v", err)
		}
		s.managed.set(stageDown, "taken down", "") // so that it is not taken again
		s.lease.held().end(errors.New(why))
		look()
		told(t, file, n+1)
		s.tellEnd("once more")
		look()
	}
	s.managed.hooks.Close()
	if got := told(t, file, 2); !strings.HasPrefix(got, "etcd is away") || !strings.Contains(got, "\nanother end") || strings.Count(got, "\n") != 2 {
		t.Errorf("told %q", got)
	}
}
