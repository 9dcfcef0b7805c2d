package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
	"blockferry/protocol"
)

// aVolume is a volume of 64 MiB that is down, on a loop device, with a replica beside it.
func aVolume(t *testing.T) (file, ssd, ebs string, content []byte) {
	t.Helper()
	ssd, ebs = blocktest.Loop(t, 256<<20), filepath.Join(t.TempDir(), "ebs")
	file = filepath.Join(t.TempDir(), "c.yaml")
	setSize(t, file, ssd, ebs, "size: 64MiB")
	if err := os.WriteFile(ebs, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(ebs, 160<<20); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	v := c.Volumes[0]
	plan, err := layout.Make(v, map[string]int64{ssd: 256 << 20, ebs: 160 << 20})
	if err != nil {
		t.Fatal(err)
	}
	content = bytes.Repeat([]byte("what it holds..."), 64<<20/16)
	at := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}}
	state, err := protocol.SourceState{Lineage: at, Generation: protocol.Generation{1}, Clean: true}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	label, err := volume.Format(volume.FormatOptions{Device: ssd, SizeBytes: plan.SizeBytes, CowBytes: plan.Volume.CowBytes, TailBytes: plan.Volume.TailBytes, State: state, Overwrite: true})
	if err != nil {
		t.Fatal(err)
	}
	put(t, ssd, content, label.Areas.Data.Offset)
	put(t, ebs, content, 0)
	disk, err := blockdev.OpenFile(ebs, blockdev.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	format := plan.Replicas["ebs"]
	format.VolumeUUID, format.Holds = label.UUID, &protocol.Holding{Lineage: at}
	if err := protocol.FormatReplica(disk, format); err != nil {
		t.Fatal(err)
	}
	return file, ssd, ebs, content
}

func setSize(t *testing.T, file, ssd, ebs, size string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(fmt.Sprintf("volumes:\n  data:\n    device: %s\n    %s\n    cow: 16MiB\n    replicas:\n      ebs: {device: %s, journal: 16MiB}\n", ssd, size, ebs)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, path string, content []byte, offset int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt(content, offset)
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// holds says whether a device holds the content at an offset, and zeros behind it up to a size.
func holds(t *testing.T, path string, offset int64, content []byte, size int64) bool {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, size)
	if _, err := f.ReadAt(got, offset); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	return bytes.Equal(got[:len(content)], content) && len(bytes.TrimLeft(got[len(content):], "\x00")) == 0
}

func digest(t *testing.T, path string) (sum [32]byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	copy(sum[:], h.Sum(nil))
	return sum
}

func sizes(t *testing.T, ssd, ebs string) (label *volume.Label, replica protocol.ReplicaStatus) {
	t.Helper()
	for _, path := range []string{ssd, ebs} {
		f, err := blockdev.OpenFile(path, blockdev.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if path == ssd {
			label, err = volume.ReadLabel(f)
		} else {
			replica, err = protocol.PeekReplica(f)
		}
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	return label, replica
}

// A volume and its replica grow together, with what they hold and zeros behind it, at the
// same position; a disk that is too small refuses before either is written to.
func TestResize(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a loop device needs root")
	}
	file, ssd, ebs, content := aVolume(t)
	before := [][32]byte{digest(t, ssd), digest(t, ebs)}
	unchanged := func(what string) {
		t.Helper()
		if after := [][32]byte{digest(t, ssd), digest(t, ebs)}; after[0] != before[0] || after[1] != before[1] {
			t.Fatalf("%s: something was written", what)
		}
	}
	refused := func(code exit.Code, want string, args ...string) {
		t.Helper()
		_, errs, got := blockferry(t, append([]string{"--config", file, "resize"}, args...)...)
		if got != code || !strings.Contains(errs, want) {
			t.Errorf("%v: %d, want %d and '%s': %s", args, got, code, want, errs)
		}
		unchanged(want)
	}
	setSize(t, file, ssd, ebs, "size: 140MiB") // the SSD has the room
	refused(exit.Refused, ebs+": replica 'ebs' of a volume of 140MiB needs")
	setSize(t, file, ssd, ebs, "size: 32MiB")
	refused(exit.Refused, "does not shrink")
	setSize(t, file, ssd, ebs, "size: 96MiB")
	refused(exit.Usage, "has 'size: 96MiB'", "--size", "80MiB")
	refused(exit.Usage, "is no size", "--size", "much")
	refused(exit.OK, "", "--dry-run")
	holder, err := blockdev.OpenFile(ssd, blockdev.OpenOptions{Exclusive: true})
	if err != nil {
		t.Fatal(err)
	}
	refused(exit.Refused, "the volume has to be down")
	holder.Close()

	check := func(size int64) {
		t.Helper()
		label, replica := sizes(t, ssd, ebs)
		if label.Areas.Data.Length != size || replica.SizeBytes != size || replica.State != protocol.DiskConsistent || replica.Committed.Epoch != 5 {
			t.Fatalf("want %d bytes: the volume has %+v, the replica is %+v", size, label.Areas, replica)
		}
		if !holds(t, ssd, label.Areas.Data.Offset, content, size) || !holds(t, ebs, 0, content, size) {
			t.Error("one of them does not hold what it did, and zeros")
		}
		if state, err := protocol.DecodeSourceState(label.State); err != nil || state.Lineage.Tip().Epoch != 5 {
			t.Errorf("its state is %+v, %v", state, err)
		}
	}
	for range 2 {
		if out, errs, code := blockferry(t, "--config", file, "resize"); code != exit.OK || !strings.Contains(out, "it has 96MiB") {
			t.Fatalf("%d: %s%s", code, out, errs)
		}
		check(96 << 20)
	}
	// The replica's disk is enlarged; without a size the volume is as large as fits.
	if err := os.Truncate(ebs, 300<<20); err != nil {
		t.Fatal(err)
	}
	setSize(t, file, ssd, ebs, "interval: 2s")
	if out, errs, code := blockferry(t, "--config", file, "resize"); code != exit.OK {
		t.Fatalf("%d: %s%s", code, out, errs)
	}
	label, _ := sizes(t, ssd, ebs)
	if label.Areas.Data.Length < 150<<20 {
		t.Errorf("of 256 MiB it has %d", label.Areas.Data.Length)
	}
	check(label.Areas.Data.Length)
	disk, err := blockdev.OpenFile(ebs, blockdev.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	r, err := protocol.OpenReplica(t.Context(), disk, protocol.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if st := r.Status(); st.ChangedOutside || st.State != protocol.DiskConsistent || len(st.Warnings) > 0 {
		t.Errorf("opened: %+v", st)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

// The copy of another node's volume grows to the size that it is told.
func TestResizeCopy(t *testing.T) {
	dir := t.TempDir()
	device, file := filepath.Join(dir, "disk"), filepath.Join(dir, "c.yaml")
	content := bytes.Repeat([]byte("what it holds..."), 16<<20/16)
	if err := os.WriteFile(device, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(device, 100<<20); err != nil {
		t.Fatal(err)
	}
	disk, err := blockdev.OpenFile(device, blockdev.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	err = protocol.FormatReplica(disk, protocol.FormatOptions{VolumeUUID: [16]byte{7}, SizeBytes: 16 << 20, JournalBytes: 16 << 20, ReserveBytes: 8 << 20,
		Holds: &protocol.Holding{Lineage: protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}}}})
	disk.Close()
	if err != nil {
		t.Fatal(err)
	}
	text := "node:\n  name: node-b\n  insecure: plaintext\n  listen: 127.0.0.1:7070\nvolumes:\n  data:\n    role: secondary\n    device: " + device + "\n    peers: [node-a]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	before := digest(t, device)
	for _, c := range []struct {
		args []string
		code exit.Code
		want string
	}{
		{nil, exit.Usage, "--size says how large"},
		{[]string{"--size", "1GiB"}, exit.Refused, "needs a disk of"},
	} {
		_, errs, code := blockferry(t, append([]string{"--config", file, "resize"}, c.args...)...)
		if code != c.code || !strings.Contains(errs, c.want) || digest(t, device) != before {
			t.Errorf("%v: %d: %s", c.args, code, errs)
		}
	}
	if out, errs, code := blockferry(t, "--config", file, "resize", "--size", "32MiB"); code != exit.OK {
		t.Fatalf("%d: %s%s", code, out, errs)
	}
	f, err := blockdev.OpenFile(device, blockdev.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if st, err := protocol.PeekReplica(f); err != nil || st.SizeBytes != 32<<20 || st.Committed.Epoch != 5 || !holds(t, device, 0, content, 32<<20) {
		t.Errorf("%+v, %v", st, err)
	}
}
