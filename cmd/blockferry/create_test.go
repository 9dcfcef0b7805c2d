package main

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
)

// A program that has the volume's disk to itself is seen only when the disk is
// claimed. By then no replica may have been formatted.
func TestCreateClaimsEveryDiskBeforeItWrites(t *testing.T) {
	const size = 128 << 20
	dir := t.TempDir()
	disk := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ssd, ebs := disk("ssd"), disk("ebs")
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
