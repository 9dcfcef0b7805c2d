package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/hooks"
)

const samples = "../../../docs/config/"

func TestValidSamples(t *testing.T) {
	files, _ := filepath.Glob(samples + "valid/*.yaml")
	if len(files) < 3 {
		t.Fatalf("only %d valid samples found", len(files))
	}
	for _, f := range files {
		if _, err := Load(f); err != nil {
			t.Errorf("%v", err)
		}
	}
}

// Every invalid sample states its errors in its first comment lines.
func TestInvalidSamples(t *testing.T) {
	files, _ := filepath.Glob(samples + "invalid/*.yaml")
	if len(files) < 25 {
		t.Fatalf("only %d invalid samples found", len(files))
	}
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) {
			content, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			var want []string
			for line := range strings.Lines(string(content)) {
				if text, ok := strings.CutPrefix(line, "# error: "); ok {
					want = append(want, f+":"+strings.TrimSuffix(text, "\n"))
				}
			}
			if len(want) == 0 {
				t.Fatal("the sample's first line must be '# error: line:column: text'")
			}
			_, err = Load(f)
			if err == nil {
				t.Fatalf("accepted; expected\n%s", strings.Join(want, "\n"))
			}
			if got := err.Error(); got != strings.Join(want, "\n") {
				t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, "\n"))
			}
			var one *Error
			if !errors.As(err, &one) {
				t.Error("no *Error inside")
			}
		})
	}
}

// Without a stall budget there is one that fits the stall limit.
func TestDefaultStallBudget(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.yaml")
	for limit, want := range map[string]time.Duration{"10ms": 5 * time.Millisecond, "40ms": DefaultStallBudget, "1m": DefaultStallBudget} {
		text := "volumes:\n  data:\n    mode: attach\n    device: /dev/a\n    stall-limit: " + limit + "\n    replicas:\n      ebs: {device: /dev/b}\n"
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.Volumes[0].StallBudget; got != want {
			t.Errorf("stall-limit %s: a budget of %s, want %s", limit, got, want)
		}
	}
}

func TestFullSampleIsReadWhole(t *testing.T) {
	c, err := Load(samples + "valid/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	v, err := c.Volume("")
	if err != nil {
		t.Fatal(err)
	}
	want := Volume{Name: "data", Device: "/dev/nvme1n1", SizeBytes: 100 * GiB, Interval: time.Second, StallLimit: 2 * time.Second,
		EraBlockBytes: 64 * KiB, CowBytes: 8 * GiB, MetadataDevice: "/dev/nvme3n1"}
	got := *v
	got.Replicas = nil
	if len(v.Replicas) != 1 || *v.Replicas[0] != (Replica{Name: "ebs", Device: "/dev/nvme2n1", Compression: CompressionAuto, JournalBytes: 4 * GiB,
		Spill: "/srv/spill/data-ebs", SpillLimitBytes: 50 * GiB}) {
		t.Errorf("replicas: %+v", v.Replicas[0])
	}
	if got.SplitBrain != "none" || c.RescueDir != DefaultRescueDir {
		t.Errorf("split brain: %s, %s", got.SplitBrain, c.RescueDir)
	}
	if got.Name != want.Name || got.Device != want.Device || got.SizeBytes != want.SizeBytes || got.Interval != want.Interval || got.StallLimit != want.StallLimit ||
		got.EraBlockBytes != want.EraBlockBytes || got.CowBytes != want.CowBytes || got.MetadataDevice != want.MetadataDevice ||
		got.FreezeFilesystem || got.AutoRestore {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestSecondSampleIsReadWhole(t *testing.T) {
	c, err := Load(samples + "valid/two-volumes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Volume(""); err == nil || !strings.Contains(err.Error(), "db, logs-2") {
		t.Errorf("no volume named: %v", err)
	}
	if _, err := c.Volume("log-2"); err == nil || !strings.Contains(err.Error(), "did you mean 'logs-2'?") {
		t.Errorf("a slip: %v", err)
	}
	v, err := c.Volume("logs-2")
	if err != nil {
		t.Fatal(err)
	}
	if !v.FreezeFilesystem || !v.AutoRestore || v.SizeBytes != GiB || len(v.Replicas) != 2 ||
		!v.Replicas[0].InPlace || v.Replicas[1].InPlace || v.Replicas[1].JournalBytes != 64*MiB {
		t.Errorf("%+v", v)
	}
	if _, err := v.Replica(""); err == nil || !strings.Contains(err.Error(), "first, second") {
		t.Errorf("no replica named: %v", err)
	}
	db, _ := c.Volume("db")
	if db.CowDevice != "/dev/nvme5n1" || db.Replicas[0].Compression != "zstd" || db.Interval != 500*time.Millisecond {
		t.Errorf("%+v", db)
	}
}

// Disks may be named by what they are, to the letter.
func TestDisksSampleIsReadWhole(t *testing.T) {
	c, err := Load(samples + "valid/disks.yaml")
	if err != nil {
		t.Fatal(err)
	}
	v := c.Volumes[0]
	if v.Device != "model:Amazon EC2 NVMe Instance Storage" || v.Replicas[0].Device != "serial:vol-0123456789abcdef0" || v.Replicas[1].Device != "serial:vol0fedcba9876543210-part2" {
		t.Errorf("%s, %+v, %+v", v.Device, v.Replicas[0], v.Replicas[1])
	}
	// Where a file of ours is meant there is no disk's name.
	for _, key := range []string{"spill: serial:x", "spill: model:x"} {
		text := "volumes:\n  data:\n    device: /dev/a\n    replicas:\n      ebs:\n        device: /dev/b\n        " + key + "\n"
		if _, err := Parse("x", []byte(text)); err == nil || !strings.Contains(err.Error(), "is not a whole path") {
			t.Errorf("%s: %v", key, err)
		}
	}
}

func TestPeersSamplesAreReadWhole(t *testing.T) {
	c, err := Load(samples + "valid/peers.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if *c.Node != (Node{Name: "node-a", Certs: "/etc/blockferry/certs"}) {
		t.Errorf("%+v", c.Node)
	}
	v, _ := c.Volume("data")
	if got := v.Replicas[1].Rate.String(); got != "08:00 20MiB, 20:00 unlimited" {
		t.Errorf("rate: %s", got)
	}
	v.Replicas[1].Rate = nil
	if local := v.Local(); v.Secondary() || len(v.Replicas) != 2 || len(local) != 1 || local[0].Name != "ebs" ||
		*v.Replicas[1] != (Replica{Name: "zone-b", Address: "node-b.example:7070", Peer: "node-b", Compression: "zstd"}) || len(v.DiskUses()) != 2 {
		t.Errorf("%+v", v)
	}
	if c, err = Load(samples + "valid/peers-secondary.yaml"); err != nil {
		t.Fatal(err)
	}
	v, _ = c.Volume("data")
	if c.RescueDir != "/srv/rescue" || c.Node.Listen != "10.0.2.7:7070" || !v.Secondary() || len(v.Peers) != 1 || v.Peers[0] != "node-a" || len(v.DiskUses()) != 1 ||
		*v.Copy != (Replica{Name: "data", Device: "/dev/nvme1n1", JournalBytes: 4 * GiB, Spill: "/srv/spill/data", SpillLimitBytes: 50 * GiB}) {
		t.Errorf("%+v %+v", v, v.Copy)
	}
}

func TestHooksSampleIsReadWhole(t *testing.T) {
	c, err := Load(samples + "valid/hooks.yaml")
	if err != nil {
		t.Fatal(err)
	}
	v, _ := c.Volume("data")
	h := v.Hooks
	if len(h.Commands) != len(hooks.Events()) || h.Timeout != 20*time.Second || h.BehindAfter != 5*time.Minute ||
		strings.Join(h.Commands[hooks.Behind], "|") != "/usr/local/sbin/notify|a replica is behind" || strings.Join(h.Commands[hooks.SplitBrain], "|") != "/usr/local/sbin/notify" ||
		strings.Join(h.Commands[hooks.FencePeer], "|") != "/usr/local/sbin/fence|--wait" {
		t.Errorf("%+v", h)
	}
	c, err = Parse("x", []byte("node: {name: a, listen: \"unix:/x\", hooks: {behind: /node}}\nvolumes:\n  one: {device: /a, replicas: {r: {device: /b}}, hooks: {behind: /own}}\n"+
		"  two: {device: /c, replicas: {r: {device: /d}}, hooks: {before-promote: /own}}\n"))
	if err != nil {
		t.Fatal(err)
	}
	one, two := c.Volumes[0].Hooks, c.Volumes[1].Hooks
	if one.Commands[hooks.Behind][0] != "/own" || two.Commands[hooks.Behind][0] != "/node" || two.Commands[hooks.BeforePromote][0] != "/own" ||
		one.Timeout != hooks.DefaultTimeout || one.BehindAfter != DefaultBehindAfter || c.Node.Hooks.Commands[hooks.Behind][0] != "/node" {
		t.Errorf("%+v %+v", one, two)
	}
}

func TestOnThisMachine(t *testing.T) {
	for address, want := range map[string]bool{"127.0.0.1:1": true, "127.9.9.9:1": true, "[::1]:1": true, "localhost:1": true, "unix:/x": true,
		"0.0.0.0:1": false, ":1": false, "10.0.0.1:1": false, "[::]:1": false, "localhost.example:1": false, "127.0.0.1.example:1": false} {
		if got := OnThisMachine(address); got != want {
			t.Errorf("%s: %v", address, got)
		}
	}
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "4096": 4096, "64KiB": 64 * KiB, "1.5TiB": 3 * TiB / 2, "100 GiB": 100 * GiB} {
		if got, err := ParseSize(text); err != nil || got != want {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "GiB", "1.5", "-3KiB", "NaNGiB", "InfTiB", "1e30TiB", "10 potatoes", "8192TiB0"} {
		if got, err := ParseSize(text); err == nil {
			t.Errorf("%q was read as %d", text, got)
		}
	}
	for bytes, want := range map[int64]string{0: "0B", 1023: "1023B", 1536: "1.5KiB", GiB: "1GiB", 5*GiB + GiB/4: "5.25GiB"} {
		if got := FormatSize(bytes); got != want {
			t.Errorf("%d: %s, want %s", bytes, got, want)
		}
	}
}

func TestNearest(t *testing.T) {
	keys := []string{"device", "size", "interval", "cut", "cow", "restore"}
	for word, want := range map[string]string{"devcie": "device", "intervl": "interval", "Size": "size", "cwo": "cow", "banana": "", "restroe": "restore"} {
		if got := nearest(word, keys); got != want {
			t.Errorf("%s: %q, want %q", word, got, want)
		}
	}
}

// Whatever the bytes are, the parser answers; it never panics and never
// accepts a volume without disks.
func FuzzParse(f *testing.F) {
	for _, dir := range []string{"valid", "invalid"} {
		files, _ := filepath.Glob(samples + dir + "/*.yaml")
		for _, name := range files {
			b, _ := os.ReadFile(name)
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		c, err := Parse("x", content)
		if err != nil {
			return
		}
		for _, v := range c.Volumes {
			if v.Device == "" || (len(v.Replicas) == 0) != v.Secondary() || v.Interval < MinInterval || v.Secondary() && len(v.Peers) == 0 {
				t.Errorf("accepted %+v", v)
			}
		}
	})
}

// What is done when too much changes is said by one key in both modes, each with a
// default of its own; and compression adapts unless it is set.
func TestDefaultsOfAMode(t *testing.T) {
	for keys, want := range map[string]string{
		"":                                       BusySnapshot,
		"image: pre-copy":                        BusySnapshot,
		"image: pre-copy\n    when-busy: stall":  BusyStall,
		"image: pre-copy\n    when-busy: report": BusyReport,
		"mode: attach":                           BusyReport,
		"mode: attach\n    when-busy: stall":     BusyStall,
	} {
		for compression, codec := range map[string]string{"": CompressionAuto, ", compression: none": "none", ", compression: s2": "s2", ", compression: auto": CompressionAuto} {
			path := filepath.Join(t.TempDir(), "blockferry.yaml")
			text := "volumes:\n  data:\n    device: /dev/a\n    " + keys + "\n    replicas:\n      ebs: {device: /dev/b" + compression + "}\n"
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := Load(path)
			if err != nil {
				t.Fatal(err)
			}
			if v := c.Volumes[0]; v.WhenBusy != want || v.Replicas[0].Compression != codec {
				t.Errorf("%q, %q: when-busy %s, compression %s, want %s, %s", keys, compression, v.WhenBusy, v.Replicas[0].Compression, want, codec)
			}
		}
	}
}
