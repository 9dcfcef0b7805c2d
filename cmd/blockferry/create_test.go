package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
)

// waitFor has commands wait so long for a disk that is in use.
func waitFor(t *testing.T, d time.Duration) {
	old := claimPatience
	t.Cleanup(func() { claimPatience = old })
	claimPatience = d
}

// An agent has each disk of its configuration to itself while it looks what is
// on it. What needs such a disk then waits, and says at the end whom for.
func TestCreateBesideAnAgent(t *testing.T) {
	const size = 128 << 20
	ssd, ebs := blocktest.Loop(t, size), blocktest.Loop(t, size)
	path := filepath.Join(t.TempDir(), "blockferry.yaml")
	text := fmt.Sprintf("volumes:\n  data:\n    device: %s\n    size: 16MiB\n    replicas: {ebs: {device: %s}}\n", ssd, ebs)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	v := c.Volumes[0]
	plan, err := layout.Make(v, map[string]int64{ssd: size, ebs: size})
	if err != nil {
		t.Fatal(err)
	}
	g := &globalOptions{streams: streams{out: io.Discard, err: io.Discard}, config: path}
	for _, command := range []struct {
		name  string
		disks []string
		run   func() error
		want  string
	}{
		{"create", []string{ssd, ebs}, func() error { return writeVolume(v, plan, volume.NewUUID(), true) }, ""},
		{"create --replica", []string{ebs}, func() error {
			return g.createReplica(doctor.Live(), []string{"data"}, createOptions{replica: "ebs", discard: true})
		}, ""},
		{"recover", []string{ebs}, func() error { return g.recover(t.Context(), ebs, recoverOptions{}) }, "holds no whole image"}, // it was reached
	} {
		for _, disk := range command.disks {
			look, err := blockdev.OpenFile(disk, blockdev.OpenOptions{Write: true, Exclusive: true})
			if err != nil {
				t.Fatal(err)
			}
			waitFor(t, 100*time.Millisecond)
			err = command.run()
			if exit.Of(err) != exit.Refused || !strings.Contains(fmt.Sprint(err), disk+" is in use by ") || !strings.Contains(err.Error(), "systemctl stop blockferry") {
				t.Errorf("%s while %s is in use: %v", command.name, disk, err)
			}
			waitFor(t, time.Minute)
			closed := make(chan error, 1)
			time.AfterFunc(200*time.Millisecond, func() { closed <- look.Close() })
			if err := command.run(); (err != nil) != (command.want != "") || !strings.Contains(fmt.Sprint(err), command.want) {
				t.Errorf("%s while an agent looks at %s: %v", command.name, disk, err)
			}
			if err := <-closed; err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A program that has the volume's disk to itself is seen only when the disk is
// claimed. By then no replica may have been formatted.
func TestCreateClaimsEveryDiskBeforeItWrites(t *testing.T) {
	waitFor(t, 100*time.Millisecond)
	const size = 128 << 20
	ssd, ebs := image(t, size), image(t, size)
	v := &config.Volume{Name: "data", Device: ssd, SizeBytes: 16 << 20, EraBlockBytes: config.MinEraBlockBytes,
		Replicas: []*config.Replica{{Name: "ebs", Device: ebs}}}
	plan, err := layout.Make(v, map[string]int64{ssd: size, ebs: size})
	if err != nil {
		t.Fatal(err)
	}
	holder, err := blockdev.OpenFile(ssd, blockdev.OpenOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	defer holder.Close()
	if err := writeVolume(v, plan, volume.NewUUID(), true); exit.Of(err) != exit.Refused {
		t.Errorf("the disk is in use, yet: %v", err)
	}
	content, err := os.ReadFile(ebs)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(content, make([]byte, size)) {
		t.Error("the replica was formatted")
	}
}
