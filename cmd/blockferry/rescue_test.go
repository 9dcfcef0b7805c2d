package main

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"blockferry/blockdev/blocktest"
	"blockferry/cmd/blockferry/exit"
	"blockferry/protocol"
)

const rescuedBytes = 32 << 20

// saved is a rescue file of two ranges, in a folder, and what it was saved from.
func saved(t *testing.T) (dir, file string, from []byte) {
	t.Helper()
	dir = t.TempDir()
	from = make([]byte, rescuedBytes)
	for i := range from {
		from[i] = byte(i>>12 + i)
	}
	l := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 7}, {Generation: protocol.Generation{2}, Epoch: 9}}
	file, err := protocol.WriteRescue(dir, protocol.RescueInfo{VolumeUUID: [16]byte{7}, SizeBytes: rescuedBytes, Lineage: l, Common: l[0]},
		[]protocol.Range{{Offset: 8192, Length: 4096}, {Offset: 5 << 20, Length: 3 << 20}}, bytes.NewReader(from))
	if err != nil {
		t.Fatal(err)
	}
	return dir, file, from
}

// image is a file of noughts of a size.
func image(t *testing.T, bytes int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, bytes); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRescueListAndShow(t *testing.T) {
	dir, file, _ := saved(t)
	if err := os.WriteFile(filepath.Join(dir, ".half.rescue"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	configured := filepath.Join(t.TempDir(), "c.yaml")
	text := "node: {name: node-b, rescue: " + dir + "}\nvolumes: {data: {device: /dev/a, replicas: {ebs: {device: /dev/b}}}}\n"
	if err := os.WriteFile(configured, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"rescue", "list", dir}, {"rescue", "list", "--config", configured}} {
		out, errs, code := blockferry(t, args...)
		if code != exit.OK || strings.Count(out, "\n") != 1 || !strings.HasPrefix(out, file+": ") || !strings.Contains(out, "of volume 07000000-") || !strings.Contains(out, "/9 that went its own way after") || errs != "" {
			t.Errorf("%v: %d, %q, %q", args, code, out, errs)
		}
	}
	out, errs, code := blockferry(t, "rescue", "show", "--check", file)
	if code != exit.OK || !strings.Contains(out, "saved 3149824 bytes") || !strings.Contains(out, "\n8192 4096\n5242880 1048576\n") {
		t.Errorf("%d, %q, %q", code, out, errs)
	}
	out, errs, code = blockferry(t, "rescue", "show", "--json", file)
	var d struct {
		Saved   int64              `json:"saved-bytes"`
		Epoch   uint64             `json:"epoch"`
		Common  uint64             `json:"common-epoch"`
		Extents []map[string]int64 `json:"extents"`
	}
	if err := json.Unmarshal([]byte(out), &d); err != nil || code != exit.OK || d.Saved != 3149824 || d.Epoch != 9 || d.Common != 7 || len(d.Extents) != 4 {
		t.Errorf("%d, %q, %q, %v", code, out, errs, err)
	}
	// A damaged one is named, and the others are still listed.
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b[5000] ^= 1
	damaged := filepath.Join(dir, "z.rescue")
	for _, c := range []struct {
		content []byte
		list    exit.Code
		check   exit.Code
	}{{b, exit.OK, exit.Differs}, {b[:6000], exit.Failed, exit.Refused}} {
		if err := os.WriteFile(damaged, c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		if out, errs, code := blockferry(t, "rescue", "list", dir); code != c.list || !strings.Contains(out, file) || (code != exit.OK) != strings.Contains(errs, damaged) {
			t.Errorf("%d, %q, %q", code, out, errs)
		}
		if _, errs, code := blockferry(t, "rescue", "show", "--check", damaged); code != c.check || !strings.Contains(errs, damaged) {
			t.Errorf("%d, %q", code, errs)
		}
	}
	if _, _, code := blockferry(t, "rescue", "list", filepath.Join(dir, "none")); code != exit.Failed {
		t.Errorf("a folder that is not there: %d", code)
	}
}

// The saved blocks get to their places and nowhere else.
func TestRescueApply(t *testing.T) {
	_, file, from := saved(t)
	to := image(t, rescuedBytes)
	want := make([]byte, rescuedBytes)
	for _, r := range [][2]int{{8192, 4096}, {5 << 20, 3 << 20}} {
		copy(want[r[0]:r[0]+r[1]], from[r[0]:])
	}
	if out, errs, code := blockferry(t, "rescue", "apply", file, to); code != exit.OK || !strings.Contains(out, "3149824 saved bytes") {
		t.Errorf("%d, %q, %q", code, out, errs)
	}
	if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, want) {
		t.Errorf("written wrongly: %v", err)
	}
}

// What is in use, of another size, or a disk that blockferry keeps account of, is refused, and so is
// a damaged file; nothing is written then.
func TestRescueApplyRefuses(t *testing.T) {
	dir, file, _ := saved(t)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-100] ^= 1 // the last extents: the first ones are whole
	damaged := filepath.Join(dir, "damaged.rescue")
	if err := os.WriteFile(damaged, b, 0o600); err != nil {
		t.Fatal(err)
	}
	data := bytes.Clone(b)
	data[rescueDataEnd(t, file)-1] ^= 1
	data[len(b)-100] = b[len(b)-100] ^ 1
	torn := filepath.Join(dir, "torn.rescue")
	if err := os.WriteFile(torn, data, 0o600); err != nil {
		t.Fatal(err)
	}
	refused := func(file, to string, words ...string) {
		t.Helper()
		before := readAll(t, to)
		_, errs, code := blockferry(t, "rescue", "apply", file, to)
		if code != exit.Refused {
			t.Errorf("%s to %s: %d, %q", file, to, code, errs)
		}
		for _, w := range words {
			if !strings.Contains(errs, w) {
				t.Errorf("%q does not say %q", errs, w)
			}
		}
		if !bytes.Equal(readAll(t, to), before) {
			t.Errorf("%s: refused, and written to", to)
		}
	}
	plain := image(t, rescuedBytes)
	refused(damaged, plain, damaged)
	refused(torn, plain, torn, "nothing was written")
	refused(file, image(t, rescuedBytes+4096), "not of the volume's size", "nothing was written")
	replica := image(t, rescuedBytes)
	disk := blocktest.NewMemory(rescuedBytes)
	if err := protocol.FormatReplica(disk, protocol.FormatOptions{VolumeUUID: [16]byte{7}, SizeBytes: 4 << 20, JournalBytes: protocol.MinJournalBytes}); err != nil {
		t.Fatal(err)
	}
	content := make([]byte, rescuedBytes)
	if _, err := disk.ReadAt(content, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(replica, content, 0o600); err != nil {
		t.Fatal(err)
	}
	refused(file, replica, "is a replica of volume 07000000", "name a copy")
	if os.Geteuid() != 0 {
		t.Skip("mounts need root")
	}
	loop := blocktest.Loop(t, rescuedBytes)
	blocktest.FileSystem(t, "ext4", loop)
	before := blockSum(t, loop)
	if _, errs, code := blockferry(t, "rescue", "apply", file, loop); code != exit.Refused || !strings.Contains(errs, "mounted on") || !strings.Contains(errs, "nothing was written") {
		t.Errorf("mounted: %d, %q", code, errs)
	}
	if blockSum(t, loop) != before {
		t.Error("a mounted device was written to")
	}
	behind, err := exec.Command("losetup", "--find", "--show", plain).Output()
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimSpace(string(behind))
	defer func() {
		if out, err := exec.Command("losetup", "--detach", name).CombinedOutput(); err != nil {
			t.Errorf("%v %s", err, out)
		}
	}()
	refused(file, plain, "is behind "+filepath.Base(name))
}

// rescueDataEnd is where the data of a rescue file ends.
func rescueDataEnd(t *testing.T, file string) int {
	t.Helper()
	r, err := protocol.OpenRescue(file)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	end := 4096
	for _, x := range r.Extents() {
		end += int(x.Length)
	}
	return end
}

func readAll(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// blockSum reads the places that are to be written.
func blockSum(t *testing.T, device string) string {
	t.Helper()
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.NewSectionReader(f, 5<<20, 3<<20))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
