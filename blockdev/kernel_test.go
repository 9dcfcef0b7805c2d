package blockdev

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeKernel is a tree as Linux shows it on a machine with disks of several
// kinds. Device paths are those of the files it makes in dev.
func fakeKernel(t *testing.T) (k kernel, dev string) {
	t.Helper()
	root := t.TempDir()
	numbers := map[string][2]uint32{}
	dev = filepath.Join(root, "dev")
	k = kernel{sys: filepath.Join(root, "sys"), proc: filepath.Join(root, "proc")}
	k.device = func(path string) (uint32, uint32, error) {
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return 0, 0, err
		}
		n, ok := numbers[real]
		if !ok {
			return 0, 0, fmt.Errorf("%s is no block device", path)
		}
		return n[0], n[1], nil
	}
	put := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	link := func(to, path string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(to, path); err != nil {
			t.Fatal(err)
		}
	}
	device := func(dir string, major, minor uint32, files map[string]string) {
		name := filepath.Base(dir)
		put("sys/devices/"+dir+"/dev", fmt.Sprintf("%d:%d\n", major, minor))
		for file, text := range files {
			put("sys/devices/"+dir+"/"+file, text)
		}
		link("../../devices/"+dir, fmt.Sprintf("sys/dev/block/%d:%d", major, minor))
		if _, partition := files["partition"]; !partition {
			link("../devices/"+dir, "sys/block/"+name)
		}
		put("dev/"+name, "")
		real, err := filepath.EvalSymlinks(filepath.Join(dev, name))
		if err != nil {
			t.Fatal(err)
		}
		numbers[real] = [2]uint32{major, minor}
	}
	const ebs = "pci0000:00/0000:00:04.0/nvme/nvme0/nvme0n1"
	device(ebs, 259, 0, map[string]string{
		"size": "1000\n", "device/serial": "vol0123456789abcdef0 \n", "device/model": "Amazon Elastic Block Store              \n",
		"wwid": "nvme.1d0f-766f6c30\n", "queue/iostats": "1\n", "diskseq": "11\n", "mq/0/cpu_list": "0\n",
		"stat": "  11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27\n",
	})
	device(ebs+"/nvme0n1p1", 259, 1, map[string]string{"size": "500", "start": "100", "partition": "1\n", "stat": "1 1 1 1 1 1 70 1 1 1 1 1 1 140 1"})
	device(ebs+"/nvme0n1p2", 259, 2, map[string]string{"size": "400", "start": "600", "partition": "2\n"})
	device(ebs+"/nvme0n1p5", 259, 5, map[string]string{"size": "100", "start": "700", "partition": "5\n"}) // within 2
	// The disk that joins a namespace's paths: without requests.
	device("virtual/nvme-subsystem/nvme-subsys1/nvme1n1", 259, 8, map[string]string{"size": "1000", "queue/iostats": "1\n",
		"stat": "  11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27\n"})
	device("virtual/nvme-subsystem/nvme-subsys1/nvme1n1/nvme1n1p2", 259, 9, map[string]string{"size": "400", "start": "600", "partition": "2\n", "stat": "0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"})
	device("pci0000:00/virtio1/block/vda", 254, 0, map[string]string{"size": "8", "serial": "disk-7", "queue/iostats": "0\n"})
	device("pci0000:00/host0/block/sda", 8, 0, map[string]string{
		"size": "16", "device/model": "QEMU HARDDISK\n", "device/wwid": "naa.5000\n", "device/vpd_pg80": "\x00\x80\x00\x08  ABC123junk",
	})
	device("virtual/block/dm-0", 253, 0, map[string]string{
		"size": "24", "dm/name": "data-era\n", "dm/uuid": "blockferry-1\n", "holders/dm-1/dm/name": "data\n",
	})
	device("virtual/block/loop3", 7, 3, map[string]string{"size": "0", "loop/backing_file": filepath.Join(dev, "sda") + "\n"})
	device("virtual/block/md0", 9, 0, map[string]string{"size": "0"})
	put("sys/devices/"+ebs+"/nvme0n1p2/holders/dm-0/dm/name", "data-era\n")
	put("sys/devices/pci0000:00/host0/block/sda/holders/md0/dev", "9:0")
	link("nvme0n1", "dev/by-id")
	put("proc/swaps", "Filename\t\t\t\tType\t\tSize\n"+filepath.Join(dev, "nvme0n1p1")+"   partition\t100\t0\t-2\n")
	mounts := []string{
		`22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw`,
		`23 22 0:6 / /dev rw - devtmpfs devtmpfs rw`,
		`24 22 0:40 / /srv/a\040b rw master:2 - btrfs ` + filepath.Join(dev, "md0") + ` rw`,
	}
	put("proc/self/mountinfo", strings.Join(mounts, "\n")+"\n")
	link("mnt:[1]", "proc/self/ns/mnt")
	put("proc/10/mountinfo", strings.Join(mounts, "\n")+"\n")
	link("mnt:[1]", "proc/10/ns/mnt")
	put("proc/11/mountinfo", "30 22 254:0 /var /hidden rw - ext4 /dev/root rw\n") // a container's
	link("mnt:[2]", "proc/11/ns/mnt")
	link("mnt:[3]", "proc/12/ns/mnt") // ended meanwhile
	return k, dev
}

// A disk that hangs or fails when it is asked for its serial number is no reason to wait, nor
// to think it is another.
func TestGlanceAsksNoDisk(t *testing.T) {
	k, dev := fakeKernel(t)
	write := func(file, text string) string {
		t.Helper()
		path := filepath.Join(k.sys, "devices/pci0000:00", file)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("virtio1/block/vda/diskseq", "21\n")
	write("../virtual/block/dm-0/diskseq", "22\n")
	serial := write("virtio1/block/vda/serial", "")
	if err := errors.Join(os.Remove(serial), unix.Mkfifo(serial, 0o600)); err != nil {
		t.Fatal(err)
	}
	type look struct {
		id  Identity
		err error
	}
	for name, want := range map[string]Identity{
		"vda":       {Major: 254, SizeBytes: 4096, Disk: "vda", Sequence: 21},
		"dm-0":      {WWID: "blockferry-1", Major: 253, SizeBytes: 12288, Disk: "dm-0", Sequence: 22},
		"nvme0n1p2": {Major: 259, Minor: 2, SizeBytes: 204800, Disk: "nvme0n1", Partition: 2, Sequence: 11},
		"sda":       {Serial: "ABC123", Model: "QEMU HARDDISK", WWID: "naa.5000", Major: 8, SizeBytes: 8192, Disk: "sda"}, // without a number all is read
	} {
		want.Path = filepath.Join(dev, name)
		done := make(chan look, 1)
		go func() {
			id, err := k.identifyBy(want.Path, k.glance)
			done <- look{id, err}
		}()
		select {
		case got := <-done:
			if got.err != nil || got.id != want {
				t.Errorf("%s: %+v, %v; want %+v", name, got.id, got.err, want)
			}
		case <-time.After(20 * time.Second):
			t.Errorf("%s: the disk was asked, and does not answer", name)
			if f, err := os.OpenFile(serial, os.O_RDWR, 0); err == nil { // it ends
				f.Close()
			}
		}
	}
	if id, err := k.glance(254, 99); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("none: %+v, %v", id, err)
	}
}

func TestIdentify(t *testing.T) {
	k, dev := fakeKernel(t)
	const model = "Amazon Elastic Block Store"
	for name, want := range map[string]Identity{
		"nvme0n1":   {Serial: "vol0123456789abcdef0", Model: model, WWID: "nvme.1d0f-766f6c30", Major: 259, SizeBytes: 512000, Disk: "nvme0n1", Sequence: 11},
		"by-id":     {Serial: "vol0123456789abcdef0", Model: model, WWID: "nvme.1d0f-766f6c30", Major: 259, SizeBytes: 512000, Disk: "nvme0n1", Sequence: 11},
		"nvme0n1p2": {Serial: "vol0123456789abcdef0", Model: model, WWID: "nvme.1d0f-766f6c30", Major: 259, Minor: 2, SizeBytes: 204800, Disk: "nvme0n1", Partition: 2, Sequence: 11},
		"vda":       {Serial: "disk-7", Major: 254, SizeBytes: 4096, Disk: "vda"},
		"sda":       {Serial: "ABC123", Model: "QEMU HARDDISK", WWID: "naa.5000", Major: 8, SizeBytes: 8192, Disk: "sda"},
		"dm-0":      {WWID: "blockferry-1", Major: 253, SizeBytes: 12288, Disk: "dm-0"},
	} {
		want.Path = filepath.Join(dev, name)
		got, err := k.identify(want.Path)
		if err != nil || got != want {
			t.Errorf("%s is\n%+v, %v; want\n%+v", name, got, err, want)
		}
	}
	for _, path := range []string{dev, filepath.Join(dev, "none")} {
		if got, err := k.identify(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s is %+v, %v; want an error that names it", path, got, err)
		}
	}
}

// All that there are, as the kernel names them; one that does not answer is left out.
func TestDisks(t *testing.T) {
	k, _ := fakeKernel(t)
	all, err := k.disks()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, id := range all {
		found = append(found, fmt.Sprintf("%s=%s/%s/%d", id.Path, id.Serial, id.Model, id.Partition))
	}
	const ebs = "vol0123456789abcdef0/Amazon Elastic Block Store"
	want := []string{"/dev/loop3=//0", "/dev/sda=ABC123/QEMU HARDDISK/0", "/dev/md0=//0", "/dev/dm-0=//0", "/dev/vda=disk-7//0", "/dev/nvme0n1=" + ebs + "/0",
		"/dev/nvme0n1p1=" + ebs + "/1", "/dev/nvme0n1p2=" + ebs + "/2", "/dev/nvme0n1p5=" + ebs + "/5", "/dev/nvme1n1=//0", "/dev/nvme1n1p2=//2"}
	if !reflect.DeepEqual(found, want) {
		t.Errorf("disks:\n%s\nwant\n%s", strings.Join(found, "\n"), strings.Join(want, "\n"))
	}
	sda, err := filepath.EvalSymlinks(filepath.Join(k.sys, "dev/block/8:0"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(sda, "device/vpd_pg80"), []byte("torn"), 0o600); err != nil {
		t.Fatal(err)
	}
	if all, err = k.disks(); err != nil || len(all) != len(want)-1 {
		t.Errorf("with one that does not answer: %d disks, %v; want %d", len(all), err, len(want)-1)
	}
}

func TestPlacement(t *testing.T) {
	k, dev := fakeKernel(t)
	for name, want := range map[string]Placement{
		"nvme0n1":   {Major: 259, Sequence: 11, Requests: true},
		"nvme0n1p2": {Major: 259, Sequence: 11, Requests: true, StartBytes: 600 * SectorSize},
		"dm-0":      {Major: 253},
		"nvme1n1p2": {Major: 259, Minor: 8, StartBytes: 600 * SectorSize},
	} {
		got, err := k.placement(filepath.Join(dev, name))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if disk := filepath.Base(got.Dir); disk != strings.TrimSuffix(name, "p2") {
			t.Errorf("%s stands on %s", name, disk)
		}
		// Only there is counted what is written to such a partition.
		if stat := map[string]string{"nvme1n1p2": "nvme1n1"}[name]; filepath.Base(got.StatDir) != cmp.Or(stat, name) {
			t.Errorf("%s: statistics of %s", name, got.StatDir)
		}
		if want.Dir, want.StatDir = got.Dir, got.StatDir; got != want {
			t.Errorf("%s is at\n%+v, want\n%+v", name, got, want)
		}
	}
	if got, err := k.placement(dev); err == nil {
		t.Errorf("a folder is at %+v", got)
	}
}

func TestUnitSerialDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "page")
	for _, page := range []string{"", "\x00\x80\x00", "\x00\x83\x00\x01a", "\x00\x80\x00\x05abcd"} {
		if err := os.WriteFile(path, []byte(page), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := unitSerial(path); err == nil {
			t.Errorf("page %q: serial %q, want an error", page, got)
		}
	}
}

func TestSameDisk(t *testing.T) {
	k, dev := fakeKernel(t)
	file := filepath.Join(dev, "image")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(file, file+"-too"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"nvme0n1", "nvme0n1", true},
		{"nvme0n1", "by-id", true},
		{"nvme0n1", "nvme0n1p1", true},
		{"by-id", "nvme0n1p5", true},
		{"nvme0n1p1", "nvme0n1p2", false},
		{"nvme0n1p2", "nvme0n1p5", true},
		{"nvme0n1p1", "nvme0n1p5", false},
		{"nvme0n1", "sda", false},
		{"sda", "vda", false},
		{"image", "image-too", true},
		{"image", "sda", false},
	} {
		for _, pair := range [][2]string{{c.a, c.b}, {c.b, c.a}} {
			got, err := k.sameDisk(filepath.Join(dev, pair[0]), filepath.Join(dev, pair[1]))
			if err != nil || got != c.want {
				t.Errorf("%s and %s: %v, %v; want %v", pair[0], pair[1], got, err, c.want)
			}
		}
	}
	for _, pair := range [][2]string{{"sda", "none"}, {"none", "sda"}, {"image", "none"}} {
		if same, err := k.sameDisk(filepath.Join(dev, pair[0]), filepath.Join(dev, pair[1])); err == nil {
			t.Errorf("%s and %s: %v, want an error", pair[0], pair[1], same)
		}
	}
}

func TestUsers(t *testing.T) {
	k, dev := fakeKernel(t)
	for name, want := range map[string][]Use{
		"nvme0n1":   {{"swap", filepath.Join(dev, "nvme0n1p1"), "nvme0n1p1"}, {"holder", "data-era", "nvme0n1p2"}},
		"nvme0n1p2": {{"holder", "data-era", "nvme0n1p2"}},
		"nvme0n1p5": nil,
		"dm-0":      {{"holder", "data", "dm-0"}},
		"vda":       {{"mount", "/", "vda"}, {"mount", "/hidden", "vda"}},
		"sda":       {{"holder", "md0", "sda"}, {"loop", "loop3", "sda"}},
		"md0":       {{"mount", "/srv/a b", "md0"}},
	} {
		got, err := k.users(filepath.Join(dev, name))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s is used by %v, %v; want %v", name, got, err, want)
		}
	}
}

func TestTraffic(t *testing.T) {
	k, dev := fakeKernel(t)
	for name, want := range map[string]Traffic{
		"nvme0n1":   {17 * 512, 24 * 512},
		"nvme0n1p1": {70 * 512, 140 * 512},
		"nvme1n1p2": {17 * 512, 24 * 512}, // the whole disk's
	} {
		if got, err := k.traffic(filepath.Join(dev, name)); err != nil || got != want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, want)
		}
	}
	// Promise 1: statistics that are not kept must not read as 'nothing written'.
	if got, err := k.traffic(filepath.Join(dev, "vda")); err == nil || !strings.Contains(err.Error(), "iostats") {
		t.Errorf("a device without statistics: %+v, %v; want an error that says iostats", got, err)
	}
	for _, want := range []bool{true, false} {
		if switched, err := k.keepStatistics(filepath.Join(dev, "vda")); switched != want || err != nil {
			t.Errorf("switched on: %v, %v, want %v", switched, err, want)
		}
	}
	if got, err := k.traffic(filepath.Join(dev, "vda")); err != nil && strings.Contains(err.Error(), "iostats") {
		t.Errorf("with statistics switched on: %+v, %v", got, err)
	}
	for _, text := range []string{"", "1 2 3 4 5 6 7 8 9 10 11 12 13", "1 2 3 4 5 6 x 8 9 10 11 12 13 14", "1 2 3 4 5 6 7 8 9 10 11 12 13 x"} {
		if got, err := parseTraffic(text); err == nil {
			t.Errorf("statistics %q: %+v, want an error", text, got)
		}
	}
}
func TestStatField(t *testing.T) {
	line := []byte("     100        2     300        4   55      6      777 8\n")
	for n, want := range map[int]uint64{1: 100, 7: 777, 8: 8} {
		if got, ok := StatField(line, n); !ok || got != want {
			t.Errorf("field %d: %d, %v", n, got, ok)
		}
	}
	if _, ok := StatField(line, 9); ok {
		t.Error("there is a ninth field")
	}
	if got, ok := StatField([]byte("1 23"), 2); !ok || got != 23 {
		t.Errorf("%d, %v", got, ok)
	}
}
