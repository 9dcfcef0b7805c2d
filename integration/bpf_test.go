package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/bpf"
	"blockferry/blockdev/volume"
)

const (
	// trackerVar makes this test binary a process that goes on with a tracker,
	// exchanges once it reads a line, says so and waits. The value is the
	// tracker's folder, offset, length and device.
	trackerVar = "BLOCKFERRY_TEST_TRACKER"
	// bpfTestsVar tells a guest where the tracker's own tests are.
	bpfTestsVar = "BLOCKFERRY_BPF_TESTS"

	trackedDisk = 256 << 20
)

func init() {
	if text := os.Getenv(trackerVar); text != "" {
		if err := exchangeAndWait(text); err != nil {
			fmt.Println("child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func exchangeAndWait(text string) error {
	var target bpf.Target
	if _, err := fmt.Sscan(text, &target.Pin, &target.Offset, &target.Length, &target.Device); err != nil {
		return err
	}
	tracker, err := bpf.Open(target)
	if err != nil {
		return err
	}
	if _, _, ok := tracker.Adopted(); !ok {
		return fmt.Errorf("tracking began anew: %s", tracker.Fresh())
	}
	fmt.Println("adopted")
	if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
		return err
	}
	tracker.Exchange()
	fmt.Println("exchanged")
	select {}
}

// builtBPFTests builds the tracker's own tests, once per run.
var builtBPFTests = sync.OnceValues(func() (string, error) {
	path := filepath.Join(host.Dir(), "bpf.test")
	build := exec.Command("go", "test", "-c", "-o", path, "./blockdev/bpf")
	build.Dir = ".."
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %w\n%s", build.Args, err, out)
	}
	return path, nil
})

// checkTrackerOn runs the tracker's own tests on disks with requests, one of them NVMe with
// a partition, and on those that take bios as they come: of exactness, and of cuts of a disk that is written to
// all the time. Stripes split what is written.
func checkTrackerOn(t *testing.T, disk, nvme, partition string) {
	const size = 16 << 20
	modprobe(t, "zram", "num_devices=1")
	put := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0); err != nil {
			t.Fatal(err)
		}
	}
	put("/sys/block/zram0/disksize", fmt.Sprint(size))
	linear := dmCreate(t, "tracked", fmt.Sprintf("0 %d linear %s %d", size/sector, disk, size/sector))
	striped := dmCreate(t, "striped", fmt.Sprintf("0 %d striped 2 16 %s %d %s %d", size/sector, disk, 2*size/sector, disk, 3*size/sector))
	for i := range 2 {
		dmCreate(t, fmt.Sprint("half", i), fmt.Sprintf("0 %d linear %s %d", size/sector, disk, (4+i)*size/sector))
	}
	modprobe(t, "raid0")
	run(t, "mdadm", "--build", "/dev/md77", "--run", "--level=0", "--chunk=8", "--raid-devices=2", "/dev/mapper/half0", "/dev/mapper/half1")
	t.Cleanup(func() {
		if out, err := exec.Command("mdadm", "--stop", "/dev/md77").CombinedOutput(); err != nil {
			t.Errorf("stop md77: %v: %s", err, out)
		}
	})
	for _, c := range []struct{ device, test, uncounted string }{
		{disk, "EveryChangeOfADevice", ""},
		{nvme, "EveryChangeOfADevice", ""},
		{partition, "EveryChangeOfADevice", ""},
		{linear, "EveryChangeOfADevice", ""},
		{"/dev/zram0", "EveryChangeOfADevice", "discard, zero-out, punch hole, zero range"},
		{"/dev/md77", "EveryChangeOfADevice", "discard"},
		{partition, "BusyDevice", ""},
		{striped, "BusyDevice", ""},
		{"/dev/zram0", "BusyDevice", ""},
		{"/dev/md77", "BusyDevice", ""},
	} {
		t.Run(c.test+" "+filepath.Base(c.device), func(t *testing.T) {
			began := time.Now()
			if _, err := blockdev.KeepStatistics(c.device); err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), os.Getenv(bpfTestsVar), "-test.v", "-test.run", "^Test"+c.test+"$")
			cmd.Env = append(os.Environ(), fmt.Sprintf("BLOCKFERRY_BPF_DEVICE=%s %d\n%s", c.device, size, c.uncounted))
			out, err := cmd.CombinedOutput()
			t.Logf("%v\n%s", time.Since(began).Round(time.Second), out)
			if err != nil || !strings.Contains(string(out), "--- PASS: Test"+c.test) {
				t.Error(err)
			}
		})
	}
}

// tracked is a volume whose disk is tracked below the stack.
type tracked struct {
	t       *testing.T
	target  bpf.Target
	tracker *bpf.Tracker
	last    uint64 // the last cut
	image   []byte // of the volume, then
	covered bool   // the last cut was sealed
	named   int    // cuts whose changes were named
}

// cut stops the volume's writers, exchanges and seals; what differs from the
// image at the last cut must be named.
func (d *tracked) cut(exchange func()) {
	d.t.Helper()
	d.last++
	run(d.t, "dmsetup", "suspend", "--noflush", "--nolockfs", "vol")
	exchange()
	image := d.read()
	run(d.t, "dmsetup", "resume", "vol")
	if d.tracker == nil {
		d.open()
	}
	err := d.tracker.Seal(d.last)
	before, wasCovered := d.image, d.covered
	d.image, d.covered = image, err == nil
	if errors.Is(err, bpf.ErrUncovered) {
		d.t.Logf("cut %d: %v", d.last, err)
		return
	}
	if err != nil {
		d.t.Fatal(err)
	}
	if !wasCovered {
		return
	}
	list, err := d.tracker.Changed(d.last-1, d.last)
	if err != nil {
		d.t.Fatal(err)
	}
	mustCover(d.t, fmt.Sprintf("cut %d", d.last), list, before, image)
	d.named++
	d.t.Logf("cut %d: %d bytes named in %d extents", d.last, blockdev.Total(list), len(list))
}

func (d *tracked) open() {
	d.t.Helper()
	var err error
	if d.tracker, err = bpf.Open(d.target); err != nil {
		d.t.Fatal(err)
	}
}

func (d *tracked) close() {
	d.t.Helper()
	if err := d.tracker.Close(); err != nil {
		d.t.Fatal(err)
	}
	d.tracker = nil
}

func (d *tracked) exchange() {
	d.t.Helper()
	d.tracker.Exchange()
}

func (d *tracked) read() []byte {
	d.t.Helper()
	f := openDevice(d.t, d.target.Device)
	defer f.Close()
	b := alignedBuffer(int(d.target.Length))
	if _, err := f.ReadAt(b, d.target.Offset); err != nil {
		d.t.Fatal(err)
	}
	return b
}

// exchangeInAChild has another process exchange, which is killed before it
// could seal.
func (d *tracked) exchangeInAChild() {
	d.t.Helper()
	self, err := os.Executable()
	if err != nil {
		d.t.Fatal(err)
	}
	out := &syncBuffer{}
	child := exec.Command(self)
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d %s", trackerVar, d.target.Pin, d.target.Offset, d.target.Length, d.target.Device))
	child.Stdout, child.Stderr = out, os.Stderr
	begin, err := child.StdinPipe()
	if err != nil {
		d.t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		d.t.Fatal(err)
	}
	defer func() {
		child.Process.Kill()
		child.Wait()
	}()
	out.await(d.t, "adopted")
	if _, err := begin.Write([]byte{'\n'}); err != nil {
		d.t.Fatal(err)
	}
	out.await(d.t, "exchanged")
}

// checkTrackerBelowEra tracks the disk below a volume's stack, with a file
// system at work, cuts with and without a view, and trackers that are killed
// between exchange and seal: each time a block has changed it is named, or it is
// said that this is not known.
func checkTrackerBelowEra(t *testing.T, disk string) {
	const size = 48<<20 + 4096
	ctl := mapper(t)
	label := format(t, volume.FormatOptions{Device: disk, SizeBytes: size, CowBytes: 32 << 20, Overwrite: true})
	v := up(t, ctl, volume.Options{Device: disk})
	mkfs(t, "ext4", v.Path())
	dir := mustMount(t, "ext4", v.Path(), "")
	pins := t.TempDir()
	if err := unix.Mount("bpf", pins, "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(pins, unix.MNT_DETACH) })
	d := &tracked{t: t, target: bpf.Target{Device: disk, Offset: label.Areas.Data.Offset, Length: size, Pin: pins + "/vol"}}
	d.open()
	t.Cleanup(func() {
		if d.tracker != nil {
			d.tracker.Close()
		}
	})

	stop, stopped := make(chan struct{}), make(chan error, 2)
	go func() { stopped <- churn(dir, stop, 2*time.Millisecond) }()
	go func() { stopped <- overwriteIn(dir+"/mixed", 16<<20, stop) }()
	d.cut(d.exchange)
	kills := 0
	for round := range 6 {
		time.Sleep(700 * time.Millisecond)
		if round%3 == 1 { // a new era, and copies beside the data
			c := mustCut(t, v, uint64(round), true)
			time.Sleep(300 * time.Millisecond)
			mustRelease(t, c)
		}
		if round%3 == 2 && d.covered {
			// What was taken and never sealed belongs to the next cut.
			d.close()
			d.exchangeInAChild()
			kills++
			d.open()
			if _, last, ok := d.tracker.Adopted(); !ok || last != d.last {
				t.Logf("after a kill tracking began anew, to %d: %s", last, d.tracker.Fresh())
				d.covered = false
			}
			time.Sleep(300 * time.Millisecond)
		}
		d.cut(d.exchange)
	}
	close(stop)
	for range 2 {
		if err := <-stopped; err != nil && !strings.Contains(err.Error(), "no space left") {
			t.Error(err)
		}
	}
	if d.named < 3 || kills < 2 {
		t.Errorf("%d cuts named their changes, %d trackers were killed: this test checks little", d.named, kills)
	}
	mustUnmount(t, dir)
}
