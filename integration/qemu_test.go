package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/udev"
	"blockferry/integration/qemu"
	"blockferry/integration/uml"
	"blockferry/integration/vm"
)

// The kernel that users have: Debian's, with preemption and two CPUs. It boots
// once for all that is tested on it.
func TestDebianKernel(t *testing.T) {
	g := guest{
		Memory: "2000M", Modules: []string{"ext4", "loop", "nvme"}, Timeout: 15 * time.Minute,
		Disks: []disk{{Size: frozenViewDisk}, {Size: pointInTimeDisk}, {Size: pointInTimeDisk}, {Size: trackedDisk}, {Size: pointInTimeDisk + 1<<20, NVMe: true}},
	}
	if !uml.Inside() {
		mustHost(t, emulator)
		tests, err := builtBPFTests()
		if err != nil {
			t.Fatal(err)
		}
		g.Env = []string{bpfTestsVar + "=" + uml.GuestPath(tests)}
	}
	inQemu(t, g, func(t *testing.T) {
		t.Run("HasWhatTestsNeed", checkDebianKernel)
		partition := nvmePartition(t)
		t.Run("NamesOfNVMe", checkNVMeNames)
		t.Run("FrozenView", func(t *testing.T) { checkFrozenView(t, vd(0)) })
		t.Run("NumberedWrites", func(t *testing.T) { checkNumberedWrites(t, vd(1), vd(2), 2, "snapshot") })
		t.Run("PreCopy", func(t *testing.T) { checkNumberedWrites(t, vd(1), vd(2), 6, "pre-copy") })
		t.Run("FineTracking", func(t *testing.T) { checkFineTracking(t, vd(1), vd(2)) })
		t.Run("FineDiscards", func(t *testing.T) { checkFineDiscards(t, "serial:"+nvmeVolume+"-part1", vd(2)) })
		t.Run("DiscardsAreSent", func(t *testing.T) {
			wipe(t, vd(1), pointInTimeDisk)
			checkDiscardsAreSent(t, vd(1), vd(2), 5, "pre-copy")
		})
		t.Run("DiscardsOutliveTheAgent", func(t *testing.T) { checkDiscardsOutliveTheAgent(t, vd(1), vd(2), "snapshot") })
		t.Run("DiscardsAreNamed", checkDiscardsAreNamed)
		t.Run("TrimWhileReplicated", checkTrimWhileReplicated)
		t.Run("Tracker", func(t *testing.T) { checkTrackerOn(t, vd(3), nvmeDisk, partition) })
		t.Run("TrackerBelowEra", func(t *testing.T) { checkTrackerBelowEra(t, vd(3)) })
	})
}

const (
	// nvmeDisk is the guest's fifth; it says that it is this volume of EBS.
	nvmeDisk   = "/dev/nvme0n1"
	nvmeVolume = "vol-00000000000000004"
)

// nvmePartition is one of pointInTimeDisk bytes that begins at no block's border.
func nvmePartition(t *testing.T) (path string) {
	t.Helper()
	awaitFile(t, nvmeDisk)
	run(t, "addpart", nvmeDisk, "1", fmt.Sprint(2048-63), fmt.Sprint(pointInTimeDisk/sector))
	awaitFile(t, nvmeDisk+"p1")
	return nvmeDisk + "p1"
}

// A disk is found by what it says that it is, as the kernel shows it.
func checkNVMeNames(t *testing.T) {
	for name, want := range map[string]string{
		"serial:" + nvmeVolume:               nvmeDisk,
		"serial:" + qemu.NVMeSerial(4):       nvmeDisk,
		"model:" + qemu.NVMeModel:            nvmeDisk,
		"serial:" + nvmeVolume + "-part1":    nvmeDisk + "p1",
		"model:" + qemu.NVMeModel + "-part1": nvmeDisk + "p1",
		"serial:disk2":                       vd(2),
	} {
		id, err := udev.Look(name)
		if err != nil || id.Path != want || id.SizeBytes != sectors(t, want)*sector || id.Sequence == 0 {
			t.Errorf("%s is %+v, %v; want %s", name, id, err, want)
		}
	}
	for _, name := range []string{"serial:vol-00000000000000005", "serial:" + nvmeVolume + "-part2", "model:QEMU"} {
		if id, err := udev.Look(name); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), nvmeDisk+" (serial:"+qemu.NVMeSerial(4)) {
			t.Errorf("%s is %+v, %v; want that there is none", name, id, err)
		}
	}
}

func checkDebianKernel(t *testing.T) {
	targets := run(t, "dmsetup", "targets")
	for _, want := range []string{"era", "snapshot-origin", "linear"} {
		if !strings.Contains(targets, want) {
			t.Errorf("no target %s among:\n%s", want, targets)
		}
	}
	if types, err := os.ReadFile("/sys/kernel/btf/vmlinux"); err != nil || len(types) < 1<<20 {
		t.Errorf("the kernel's types: %d bytes, %v", len(types), err)
	}
	dir := t.TempDir()
	if err := unix.Mount("bpf", dir, "bpf", 0, ""); err != nil {
		t.Errorf("a bpffs: %v", err)
	} else if err := unix.Unmount(dir, 0); err != nil {
		t.Error(err)
	}
	if n := runtime.NumCPU(); n != 2 {
		t.Errorf("%d CPUs", n)
	}
	if got := sectors(t, vd(2)); got != pointInTimeDisk/sector {
		t.Errorf("disk c has %d sectors", got)
	}
	if text, err := os.ReadFile("/sys/block/vda/queue/discard_max_bytes"); err != nil || string(text) == "0\n" {
		t.Errorf("disk a discards at most '%s' at once, %v", strings.TrimSpace(string(text)), err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s %s", unix.ByteSliceToString(name.Release[:]), unix.ByteSliceToString(name.Version[:]))
}

// A program's end is its end, and a guest that crashed is tried once more.
func TestQemuHarness(t *testing.T) {
	if uml.Inside() {
		return
	}
	hosts := mustHost(t, emulator)
	t.Parallel()
	result, err := hosts.Run(t.Context(), vm.Spec{Name: t.Name(), Args: []string{"/bin/sh", "-c", "echo hello; echo c > /run/guest/out; exit 7"},
		Collect: func(dir string) error {
			text, err := os.ReadFile(dir + "/out")
			if string(text) != "c\n" {
				t.Errorf("the guest handed out '%s', %v", text, err)
			}
			return nil
		}})
	if err != nil || result.Exit != 7 || !strings.Contains(result.Output, "hello\n") || result.Retried {
		t.Errorf("a program with exit status 7: %+v, %v", result, err)
	}
	t.Logf("boot to end in %v", result.Elapsed.Round(100*time.Millisecond))
	result, err = hosts.Run(t.Context(), vm.Spec{Name: t.Name(), Args: []string{"/bin/sh", "-c", "echo attempt; sleep 1; echo c > /proc/sysrq-trigger"}})
	if !errors.Is(err, vm.ErrNoEnd) || !result.Retried || strings.Count(result.Output, "attempt\n") != 2 {
		t.Errorf("a guest that crashed: %+v, %v", result, err)
	}
	left, err := os.ReadDir(hosts.Dir())
	for _, entry := range left {
		if strings.HasPrefix(entry.Name(), "guest-") {
			t.Errorf("left behind: %s", entry.Name())
		}
	}
	if err != nil {
		t.Error(err)
	}
}
