package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
	"blockferry/protocol"
)

// blockferry runs one command line and returns what it printed.
func blockferry(t *testing.T, args ...string) (out, errs string, code exit.Code) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(t.Context(), args, streams{out: &o, err: &e})
	return o.String(), e.String(), code
}

func sample(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs("../../docs/config/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCommandLineMistakes(t *testing.T) {
	two := sample(t, "valid/two-volumes.yaml")
	for _, c := range []struct {
		args []string
		code exit.Code
		want string
	}{
		{[]string{"statsu"}, exit.Usage, "unknown command 'statsu'; did you mean 'status'?"},
		{[]string{"status", "--wathc"}, exit.Usage, "unknown flag: --wathc; see 'blockferry status --help'"},
		{[]string{"status", "a", "b"}, exit.Usage, "'b' was not expected"},
		{[]string{"recover"}, exit.Usage, "DEVICE is missing"},
		{[]string{"sync", "--timeout", "soon"}, exit.Usage, "invalid argument \"soon\""},
		{[]string{"sync", "--timeout=-1s"}, exit.Usage, "--timeout"},
		{[]string{"drain", "--timeout=-1s"}, exit.Usage, "--timeout"},
		{[]string{"drain", "--socket", "/nowhere.sock"}, exit.Unreachable, "does not answer"},
		{[]string{"up", "--timeout", "1s"}, exit.Usage, "--timeout is for --wait"},
		{[]string{"up", "--config", "/nowhere.yaml"}, exit.Usage, "/nowhere.yaml: no such file"},
		{[]string{"up", "--config", two}, exit.Usage, "several volumes are configured (db, logs-2)"},
		{[]string{"create", "--config", two, "log-2"}, exit.Usage, "no volume 'log-2' is configured; did you mean 'logs-2'?"},
		{[]string{"check", "--config", sample(t, "invalid/unknown-key.yaml")}, exit.Usage, "unknown-key.yaml:5:5: unknown key 'intervall'"},
		{[]string{"status", "--socket", "/nowhere.sock"}, exit.Unreachable, "the agent does not answer on /nowhere.sock; start it"},
		{[]string{"agent", "--log-format", "xml", "--config", two}, exit.Usage, "--log-format"},
	} {
		out, errs, code := blockferry(t, c.args...)
		if code != c.code || !strings.Contains(errs, c.want) || out != "" {
			t.Errorf("%v: code %d, printed %q, %q; want %d, %q", c.args, code, out, errs, c.code, c.want)
		}
	}
}

// A socket nobody listens on any more is as good as none.
func TestDeadSocketIsUnreachable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, errs, code := blockferry(t, "status", "--socket", path)
	if code != exit.Unreachable || !strings.Contains(errs, "does not answer") {
		t.Errorf("%d %q", code, errs)
	}
}

func TestLastErrorAsJSON(t *testing.T) {
	_, errs, code := blockferry(t, "status", "--json", "--socket", "/nowhere.sock")
	var got struct {
		Error struct {
			Code int    `json:"exit-code"`
			Kind string `json:"kind"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(errs), &got); err != nil {
		t.Fatalf("%q: %v", errs, err)
	}
	if code != exit.Unreachable || got.Error.Code != int(code) || got.Error.Kind != "unreachable" {
		t.Errorf("%d, %+v", code, got)
	}
}

func TestHelpAndVersion(t *testing.T) {
	out, _, code := blockferry(t)
	if code != exit.OK {
		t.Errorf("help ends with %d", code)
	}
	for _, command := range []string{"agent", "check", "create", "up", "down", "status", "events", "sync", "drain", "verify", "restore", "recover", "pause", "resume", "certs", "version", "completion"} {
		if !strings.Contains(out, "\n  "+command+" ") {
			t.Errorf("'%s' is not in the help", command)
		}
	}
	for _, hidden := range []string{"dead-man", "probe"} {
		if strings.Contains(out, hidden) {
			t.Errorf("%s is shown", hidden)
		}
	}
	if out, _, code := blockferry(t, "version", "--json"); code != exit.OK || !strings.Contains(out, `"version":"`+version+`"`) {
		t.Errorf("%d %s", code, out)
	}
}

func TestCheckPrintsFindingsAndRefuses(t *testing.T) {
	system := &doctor.System{
		Exists:       func(string) bool { return false },
		Euid:         func() int { return 0 },
		Release:      func() (string, error) { return "6.8.0-1021-aws", nil },
		Targets:      func() ([]string, error) { return []string{"linear", "snapshot", "snapshot-origin"}, nil },
		Modprobe:     func(string) error { return errors.New("not found") },
		Distribution: func() string { return "ubuntu debian" },
		Inspect:      func(p string) (doctor.Disk, error) { return doctor.Disk{Path: p, SizeBytes: 1 << 30}, nil },
		SameDisk:     func(a, b string) (bool, error) { return false, nil },
		DiscardsOff:  func(string, int64) string { return "it takes none" },
	}
	var out, errs bytes.Buffer
	g := &globalOptions{streams: streams{out: &out, err: &errs}, config: sample(t, "valid/minimal.yaml")}
	err := g.check(system, checkOptions{})
	if exit.Of(err) != exit.Prerequisite || !strings.Contains(err.Error(), "1 of ") {
		t.Errorf("%v", err)
	}
	for _, want := range []string{"minimal.yaml: 1 volume", "refuse dm-era: ", "install linux-modules-extra-6.8.0-1021-aws", "note   /dev/disk/by-id/nvme-local-ssd", "discards (fstrim) are off: it takes none", "blockferry create data"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("'%s' is missing in\n%s", want, out.String())
		}
	}
	out.Reset()
	g.json = true
	_ = g.check(system, checkOptions{})
	for _, l := range strings.Split(strings.TrimSpace(out.String()), "\n") {
		var f doctor.Finding
		if err := json.Unmarshal([]byte(l), &f); err != nil || f.Subject == "" {
			t.Errorf("%q: %v", l, err)
		}
	}
	system.Euid = func() int { return 1000 }
	if err := g.check(system, checkOptions{}); exit.Of(err) != exit.Prerequisite {
		t.Errorf("not root: %v", err)
	}
	out.Reset()
	g.json = false
	if err := g.check(system, checkOptions{configOnly: true}); err != nil || strings.Contains(out.String(), "/dev/disk") {
		t.Errorf("configuration only: %v\n%s", err, out.String())
	}
}

// What udev imports: a replica is known by its superblock, also a damaged one,
// and the file system in front of it is not looked at.
func TestProbe(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	content := make([]byte, 64<<20)
	copy(content[1080:], "\x53\xef")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	probe := func(want string) {
		t.Helper()
		if out, errs, code := blockferry(t, "probe", path); code != exit.OK || out != want {
			t.Errorf("probe: code %d, printed %q, %q; want %q", code, out, errs, want)
		}
	}
	probe("")
	disk, err := blockdev.OpenFile(path, blockdev.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	id := volume.NewUUID()
	if err := protocol.FormatReplica(disk, protocol.FormatOptions{SizeBytes: 32 << 20, VolumeUUID: id, JournalBytes: protocol.MinJournalBytes}); err != nil {
		t.Fatal(err)
	}
	probe("BLOCKFERRY_ROLE=replica\nBLOCKFERRY_VOLUME=" + id.String() + "\n")
	// Both superblocks, each somewhere behind its checksum.
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for at := int64(63 << 20); at < 64<<20; at += 4096 {
		if _, err := file.WriteAt([]byte{0x55, 0x55, 0x55, 0x55}, at+200); err != nil {
			t.Fatal(err)
		}
	}
	probe("BLOCKFERRY_ROLE=replica\n")
	if _, err := disk.WriteAt(make([]byte, 1<<20), 63<<20); err != nil {
		t.Fatal(err)
	}
	probe("")
	if _, _, code := blockferry(t, "probe", "/nowhere"); code == exit.OK {
		t.Error("a disk that is not there was probed")
	}
}
