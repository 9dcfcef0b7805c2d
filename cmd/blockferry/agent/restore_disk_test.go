package agent

import (
	"bytes"
	"crypto/rand"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/protocol"
)

// aRestore is the plan of one onto what is at device now.
func aRestore(t *testing.T, device, replica string) restorePlan {
	t.Helper()
	seen, err := udev.Look(device)
	if err != nil {
		t.Fatal(err)
	}
	p := restorePlan{from: &localReplica{config: &config.Replica{Name: replica}}, seen: seen}
	p.status.SizeBytes, p.status.VolumeUUID = 4<<20, [16]byte{1}
	p.layout.Volume.CowBytes = 16 << 20
	return p
}

func content(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A disk that came in the place of the one that was looked at is not written to, with or
// without --force, whatever the restore is about to do.
func TestRestoreOntoTheDiskSeen(t *testing.T) {
	first, other := blocktest.Loop(t, 64<<20), blocktest.Loop(t, 64<<20)
	random := make([]byte, 1<<20)
	_, _ = rand.Read(random)
	if err := os.WriteFile(other, random, 0); err != nil {
		t.Fatal(err)
	}
	before := content(t, other)
	dir := t.TempDir()
	name, state := filepath.Join(dir, "ssd"), filepath.Join(dir, "state")
	link := func(to string) {
		t.Helper()
		_ = os.Remove(name)
		if err := os.Symlink(to, name); err != nil {
			t.Fatal(err)
		}
	}
	for what, change := range map[string]func(*config.Volume, *restorePlan) (force bool){
		"forced":      func(*config.Volume, *restorePlan) bool { return true },
		"starts over": func(_ *config.Volume, p *restorePlan) bool { p.overwrite = true; return false },
		"goes on":     func(_ *config.Volume, p *restorePlan) bool { p.resume = true; return false },
		"attached":    func(v *config.Volume, _ *restorePlan) bool { v.Attach, v.StateFile = true, state; return false },
	} {
		link(first)
		v := &config.Volume{Name: "data", Device: name}
		m, p := aManaged(v), aRestore(t, name, "ebs")
		p.begun = &protocol.RestoreState{Replica: "ebs"}
		force := change(v, &p)
		link(other)
		if _, err := m.fill(t.Context(), p, nil, nil, force); err == nil || !strings.Contains(err.Error(), "is another disk than the one that was looked at") {
			t.Errorf("%s: %v", what, err)
		}
		if !force && !p.overwrite {
			continue // formats nothing, or a blank disk alone
		}
		// It comes between that look and the writing.
		if err := m.formatForRestore(p, diskPaths{device: name}, force); err == nil || !strings.Contains(err.Error(), "is another disk than the one that was looked at") {
			t.Errorf("%s, late: %v", what, err)
		}
	}
	if !bytes.Equal(content(t, other), before) {
		t.Error("a disk that nobody looked at was written to")
	}
	if _, err := os.Stat(state); err == nil {
		t.Error("an attached volume's state was begun for another disk")
	}
}

// A restore that starts over by itself overwrites what it had begun, and nothing that came
// onto the same disk since.
func TestRestoreStartsOverOnItsOwn(t *testing.T) {
	device := blocktest.Loop(t, 64<<20)
	m := aManaged(&config.Volume{Name: "data", Device: device})
	at := diskPaths{device: device}
	first := aRestore(t, device, "ebs")
	if err := m.formatForRestore(first, at, false); err != nil {
		t.Fatal(err)
	}
	again := aRestore(t, device, "second")
	again.overwrite = true
	again.begun = &protocol.RestoreState{Replica: "third"}
	before := content(t, device)
	if err := m.formatForRestore(again, at, false); err == nil || !strings.Contains(err.Error(), "no longer holds the restore from replica 'third'") {
		t.Errorf("another restore's: %v", err)
	}
	if !bytes.Equal(content(t, device), before) {
		t.Error("another restore's disk was written to")
	}
	again.begun.Replica = "ebs"
	if err := m.formatForRestore(again, at, false); err != nil {
		t.Errorf("its own: %v", err)
	}
	disk, err := openOffline(device)
	if err != nil {
		t.Fatal(err)
	}
	s, err := protocol.DecodeSourceState(disk.Label().State)
	if err != nil || s.Restore == nil || s.Restore.Replica != "second" || disk.Label().UUID != (volume.UUID{1}) {
		t.Errorf("after it started over: %+v, %v", s, err)
	}
	disk.Close()
	random := make([]byte, 1<<20)
	_, _ = rand.Read(random)
	if err := os.WriteFile(device, random, 0); err != nil {
		t.Fatal(err)
	}
	before = content(t, device)
	again.begun.Replica = "second"
	if err := m.formatForRestore(again, at, false); err == nil {
		t.Error("what is no restore at all is overwritten")
	}
	if !bytes.Equal(content(t, device), before) {
		t.Error("what is no restore at all was written to")
	}
}

// Of several disks of a model the first to come may be any, so none is filled unasked, and
// status says what to run.
func TestModelIsNotRestoredByItself(t *testing.T) {
	for _, c := range []struct {
		v     config.Volume
		tries bool
	}{
		{config.Volume{Device: "serial:none-such", AutoRestore: true}, true},
		{config.Volume{Device: "/dev/none-such", AutoRestore: true}, true},
		{config.Volume{Device: "model:None Such", AutoRestore: true}, false},
		{config.Volume{Device: "/dev/none-such", CowDevice: "model:None Such", AutoRestore: true}, false},
		{config.Volume{Device: "/dev/none-such", MetadataDevice: "model:None Such", AutoRestore: true}, false},
		{config.Volume{Device: "serial:none-such"}, false},
	} {
		c.v.Name, c.v.Attach = "data", true
		m := aManaged(&c.v)
		m.set(stageBlank, "it is blank", m.blankAdvice())
		m.restoreUnasked(t.Context())
		s := m.status()
		if tried := strings.Contains(s.Reason, "it is not restored by itself"); tried != c.tries || (s.Restore == "auto") != c.tries {
			t.Errorf("%+v: restore %s, %s; want a try: %v", c.v, s.Restore, s.Reason, c.tries)
		}
		if says := strings.Contains(s.Advice, "named by its model is not restored by itself"); says != (c.v.AutoRestore && !c.tries) || !strings.Contains(s.Advice, "blockferry restore data") {
			t.Errorf("%+v: %s", c.v, s.Advice)
		}
	}
}
