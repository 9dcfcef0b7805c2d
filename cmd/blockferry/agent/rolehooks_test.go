package agent

import (
	"context"
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

// formattedVolume is what a volume's disk holds at first, with room for a replica's tail.
func formattedVolume(t *testing.T) []byte {
	t.Helper()
	disk := blocktest.NewMemory(64 << 20)
	if _, err := volume.FormatOn(disk, volume.UUID{7}, volume.LayoutOptions{SizeBytes: 4 << 20, CowBytes: config.MinCowBytes, TailBytes: protocol.TailBytes(4<<20, protocol.MinJournalBytes)}, nil); err != nil {
		t.Fatal(err)
	}
	raw := make([]byte, disk.Size())
	if _, err := disk.ReadAt(raw, 0); err != nil {
		t.Fatal(err)
	}
	return raw
}

// Who uses a volume is asked to end before it stands down; that can refuse it, but for force,
// and then nothing has changed. That it is up is told whatever brought it up.
func TestHooksEndTheUse(t *testing.T) {
	s := aSwitching(t, formattedVolume(t))
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
	// What it may have ended is started again: the volume stays up.
	if got := told(t, file, 3); got != up+end+up {
		t.Errorf("told %q", got)
	}
	if err := s.endUse(t.Context(), true); err != nil {
		t.Errorf("by force: %v", err)
	}
	if got := told(t, file, 4); got != up+end+up+end {
		t.Errorf("told %q", got)
	}

	// So it is when the hook was content, and what came after it was not: here the disk went meanwhile.
	end0 := []string{"/bin/sh", "-c", `echo "$BLOCKFERRY_EVENT $BLOCKFERRY_DEVICE" >>"$1"; : >"$2"`, "hook", file, s.config.Device}
	s.managed.hooks = hooks.New("node-a", "data", map[hooks.Event][]string{hooks.BeforeDemote: end0, hooks.AfterUp: line("0"), hooks.AfterDemote: line("0")}, time.Minute, quiet())
	t.Cleanup(s.managed.hooks.Close)
	if _, err := s.secondary(t.Context(), false); exit.Of(err) != exit.Refused || s.managed.at() != stageUp {
		t.Errorf("%v; it is %s", err, stageWords[s.managed.at()])
	}
	if got := told(t, file, 6); got != up+end+up+end+end+up {
		t.Errorf("told %q", got)
	}
}

// statefulStack is one that replicates, as far as is asked here.
type statefulStack struct {
	fakeStack
	state []byte
}

func (s *statefulStack) State() []byte               { return s.state }
func (s *statefulStack) SetState(state []byte) error { s.state = state; return nil }
func (*statefulStack) WrittenBytes() (uint64, error) { return 1, nil }

// A replica that can't have what was written refuses before anybody has to end, but by force.
func TestHooksEndNothingInVain(t *testing.T) {
	s := aSwitching(t, formattedVolume(t))
	file := filepath.Join(t.TempDir(), "told")
	s.managed.hooks = hooks.New("node-a", "data", map[hooks.Event][]string{hooks.BeforeDemote: {"/bin/sh", "-c", `echo >>"$1"; exit 1`, "hook", file}}, time.Minute, quiet())
	t.Cleanup(s.managed.hooks.Close)
	stack := &statefulStack{}
	state, _, err := protocol.BeginPrimary(keptState{stack})
	if err != nil {
		t.Fatal(err)
	}
	p, err := protocol.NewPrimary(protocol.PrimaryConfig{Volume: "data", Source: &source{raised: stack, take: func(context.Context, uint64, protocol.CutWish) (cut, error) { return cut{}, errors.New("none") }},
		State: keptState{stack}, Replicas: []protocol.ReplicaConfig{{Name: "away", Client: protocol.LocalClient(protocol.NewReceiver(protocol.ReceiverConfig{}))}}}, state)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		limited, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, _ = p.Stop(limited, func() error { return nil }) // there is no cut to be had
	}()
	if err := p.Pause(""); err != nil {
		t.Fatal(err)
	}
	s.managed.nowUp(stack, &running{primary: p})
	if _, err := s.secondary(t.Context(), false); exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "away (paused)") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the hook was run: %v", err)
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
