package bpf

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
)

// A mounted file system on the disk that discards what is removed, and is
// trimmed at the end: all that differs is named.
func TestFileSystemsAreFollowed(t *testing.T) {
	for _, c := range []struct {
		mkfs []string
		new  func(testing.TB, int64) disk
	}{
		{[]string{"mkfs.ext4", "-q", "-F"}, newPartition},
		{[]string{"mkfs.xfs", "-q", "-f"}, newLoop},
	} {
		t.Run(c.mkfs[0], func(t *testing.T) {
			d := c.new(t, 320<<20)
			tracker := open(t, d.target(newPin(t)))
			cut := covered(t, tracker, 1)
			before := d.sums(t)
			command(t, c.mkfs[0], append(c.mkfs[1:], d.path)...)
			dir := t.TempDir()
			command(t, "mount", "-o", "discard", d.path, dir)
			mounted := true
			unmount := func() {
				if mounted {
					command(t, "umount", dir)
					mounted = false
				}
			}
			t.Cleanup(unmount)
			rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 2))
			for i := range 60 {
				path := filepath.Join(dir, fmt.Sprint("file", i%40))
				if err := os.WriteFile(path, noise(rng, rng.IntN(1<<20)+1), 0o600); err != nil {
					t.Fatal(err)
				}
				if i%7 == 0 {
					unix.Sync()
				}
				if i%11 == 10 {
					tracker.Exchange()
				}
				if i%3 == 0 {
					if err := os.Remove(path); err != nil {
						t.Fatal(err)
					}
				}
			}
			command(t, "fstrim", dir)
			unmount()
			after := d.sums(t)
			if seal(t, tracker, cut+1) {
				mustName(t, changed(t, tracker, cut, cut+1), differing(before, after))
			}
		})
	}
}

// Under load, with exchanges all the time, nothing is lost unless it is said.
func TestLossesAreReported(t *testing.T) {
	d := newFastLoop(t, 96<<20)
	tracker := open(t, d.target(newPin(t)))
	losses := 0
	for round := range 3 {
		cut := covered(t, tracker, uint64(round*100+1))
		before := d.sums(t)
		load := d.fioCommand([]string{"--ioengine=libaio", "--direct=1", "--iodepth=16", "--numjobs=2", "--bsrange=512-16k", "--blockalign=512",
			"--time_based", "--runtime=1"}...)
		if err := load.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- load.Wait() }()
		var taken []blockdev.Extent
		exchanges := 0
		for running := true; running; exchanges++ {
			select {
			case err := <-ended:
				if err != nil {
					t.Fatalf("fio: %v", err)
				}
				running = false
			case <-time.After(2 * time.Millisecond):
			}
			tracker.Exchange()
			taken = blockdev.Union(taken, tracker.Taken())
		}
		whole := tracker.ExchangeStopped()
		taken = blockdev.Union(taken, tracker.Taken())
		differ := differing(before, d.sums(t))
		if err := tracker.Seal(cut + 1); errors.Is(err, ErrUncovered) {
			t.Logf("round %d: %v", round, err)
			losses++
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		if !whole {
			t.Logf("round %d: completions were lost, and the cut is covered", round)
		}
		mustName(t, taken, differ)
		mustName(t, changed(t, tracker, cut, cut+1), differ)
		if exchanges < 20 {
			t.Logf("round %d: only %d exchanges", round, exchanges)
		}
	}
	if losses == 3 {
		t.Error("events were lost in each round")
	}
	t.Logf("%d of 3 rounds lost events, and said so", losses)
}

const helperVariable = "BLOCKFERRY_BPF_HELPER"

// TestMain lets a test run this binary as a process of its own: one that tracks
// the device and folder it is given until it is killed.
func TestMain(m *testing.M) {
	if device, ok := os.LookupEnv(helperVariable); ok {
		if err := help(strings.Split(device, "|")); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// help exchanges and seals as fast as it can.
func help(args []string) error {
	var target Target
	target.Device, target.Pin = args[0], args[1]
	if _, err := fmt.Sscan(args[2], &target.Length); err != nil {
		return err
	}
	tracker, err := Open(target)
	if err != nil {
		return err
	}
	first, last, adopted := tracker.Adopted()
	if !adopted {
		if err := tracker.Seal(1); err != nil {
			return err
		}
	}
	fmt.Println("ready:", first, last, adopted, tracker.Fresh())
	for number := last + 2; ; number++ {
		for range 20 {
			tracker.Exchange()
			if number%3 == 0 {
				tracker.Taken()
			}
		}
		if err := tracker.Seal(number); err != nil {
			return err
		}
	}
}

// Processes that track are killed in the midst of exchanges; the last one still
// knows all that changed since the first cut.
func TestKilledTrackerIsAdopted(t *testing.T) {
	d := newFastLoop(t, 128<<20)
	target := d.target(newPin(t))
	rng := rand.New(rand.NewPCG(uint64(time.Now().UnixNano()), 3))
	before := d.sums(t)
	fresh := ""
	f := d.open(t, unix.O_DIRECT)
	defer f.Close()
	buffers := [][]byte{noise(rng, 4096), noise(rng, 4096), noise(rng, 4096)}
	for round := range 12 {
		helper := exec.Command(os.Args[0])
		helper.Env = append(os.Environ(), fmt.Sprintf("%s=%s|%s|%d", helperVariable, target.Device, target.Pin, target.Length))
		out, err := helper.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		helper.Stderr = os.Stderr
		if err := helper.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "ready:") {
			_ = helper.Process.Kill()
			_ = helper.Wait()
			t.Fatalf("helper %d: %q, %v", round, line, err)
		}
		if round > 0 && !strings.Contains(line, "true") {
			fresh = line // it reported a loss, and begins anew: so does this test
			before = d.sums(t)
		}
		for end := time.Now().Add(time.Duration(20+rng.IntN(60)) * time.Millisecond); time.Now().Before(end); {
			if _, err := f.WriteAt(buffers[rng.IntN(3)], rng.Int64N(d.size/4096)*4096); err != nil {
				t.Fatal(err)
			}
		}
		if err := helper.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := helper.Wait(); err == nil {
			t.Fatalf("helper %d ended before it was killed", round)
		}
	}
	after := d.sums(t)
	tracker := open(t, target)
	first, last, ok := tracker.Adopted()
	if !ok {
		t.Logf("began anew: %s", tracker.Fresh())
		if !strings.Contains(tracker.Fresh(), "statistics") && !strings.Contains(tracker.Fresh(), "missed") && !strings.Contains(tracker.Fresh(), "lost track") {
			t.Errorf("began anew: %s", tracker.Fresh())
		}
		return
	}
	if fresh != "" {
		t.Logf("a helper began anew: %s", fresh)
	}
	if !seal(t, tracker, last+1) {
		return
	}
	mustName(t, changed(t, tracker, first, last+1), differing(before, after))
}

// What is pinned is gone on with only by the volume it is of.
func TestPinOfAnotherDiskIsNotAdopted(t *testing.T) {
	a, b := newFastLoop(t, 64<<20), newFastLoop(t, 64<<20)
	pin := newPin(t)
	track := func(target Target) (why string, ok bool) {
		t.Helper()
		tracker, err := Open(target)
		if err != nil {
			t.Fatal(err)
		}
		defer tracker.Close()
		if _, err := Open(target); err == nil {
			t.Fatal("two trackers have one folder")
		}
		_, last, ok := tracker.Adopted()
		covered(t, tracker, last+1)
		return tracker.Fresh(), ok
	}
	target := a.target(pin)
	if why, ok := track(target); ok || why != "nothing was pinned" {
		t.Errorf("the first: %q", why)
	}
	if why, ok := track(target); !ok {
		t.Errorf("the same again: %q", why)
	}
	if why, ok := track(b.target(pin)); ok || !strings.Contains(why, "another disk") {
		t.Errorf("another disk: %q", why)
	}
	target = b.target(pin)
	target.Length -= 1 << 20
	if why, ok := track(target); ok || !strings.Contains(why, "length") {
		t.Errorf("another length: %q", why)
	}
	target.Offset = 1 << 20
	if why, ok := track(target); ok || !strings.Contains(why, "place") {
		t.Errorf("another place: %q", why)
	}
	// The same name and number, but another disk.
	file := command(t, "losetup", "-nO", "BACK-FILE", b.path)
	command(t, "losetup", "-d", b.path)
	command(t, "losetup", b.path, file)
	if why, ok := track(target); ok || !strings.Contains(why, "sequence") {
		t.Errorf("a disk under another's name: %q", why)
	}
	if err := os.Remove(filepath.Join(pin, nameCounts)); err != nil {
		t.Fatal(err)
	}
	if why, ok := track(target); ok || !strings.Contains(why, "not whole") {
		t.Errorf("half of what was pinned: %q", why)
	}
	if _, err := Open(Target{Device: b.path, Length: b.size, Pin: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "bpffs") {
		t.Errorf("a folder on another file system: %v", err)
	}
}

// An adopted coverage answers for what was written while no process was there,
// and while one had taken it and not sealed.
func TestTrackingGoesOnWithoutProcess(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	target := d.target(newPin(t))
	rng := rand.New(rand.NewPCG(4, 4))
	tracker, err := Open(target)
	if err != nil {
		t.Fatal(err)
	}
	cut := covered(t, tracker, 5)
	touched := d.writes(t, rng, unix.O_DIRECT, 20, 4096, 4096)
	if tracker.MarkedBytes() != int64(len(touched))*4096 {
		t.Errorf("%d bytes marked, want %d blocks", tracker.MarkedBytes(), len(touched))
	}
	tracker.Exchange()
	if err := tracker.Close(); err != nil {
		t.Fatal(err)
	}
	for grain := range d.writes(t, rng, unix.O_DIRECT, 20, 4096, 4096) {
		touched[grain] = true
	}
	tracker = open(t, target)
	first, last, ok := tracker.Adopted()
	if !ok || first != cut || last != cut {
		t.Fatalf("adopted from %d to %d (%v): %s", first, last, ok, tracker.Fresh())
	}
	if !seal(t, tracker, cut+1) {
		t.Skip("events were lost, and that was said")
	}
	list := changed(t, tracker, cut, cut+1)
	mustName(t, list, touched)
	if len(grainsOf(list)) != len(touched) {
		t.Errorf("%d blocks named, want %d", len(grainsOf(list)), len(touched))
	}
	if err := tracker.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(target.Pin); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Remove the folder is there: %v", err)
	}
}

// Writes that the disk's statistics do not count end the coverage, and so do
// those that only they count; afterwards a new one can begin.
func TestStatisticsDecide(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	target := d.target(newPin(t))
	tracker := open(t, target)
	rng := rand.New(rand.NewPCG(5, 5))
	cut := covered(t, tracker, 1)
	iostats := "/sys/block/" + d.name() + "/queue/iostats"
	refused := func(what string) {
		t.Helper()
		tracker.ExchangeStopped()
		cut++
		err := tracker.Seal(cut)
		if !errors.Is(err, ErrUncovered) || !strings.Contains(err.Error(), what) {
			t.Fatalf("seal: %v, want one that says %q", err, what)
		}
		if list, err := tracker.Changed(cut-1, cut); !errors.Is(err, ErrUncovered) {
			t.Fatalf("changed: %v, %v", list, err)
		}
		cut = covered(t, tracker, cut+1)
		d.writes(t, rng, unix.O_DIRECT, 3, 4096, 4096)
		cut = covered(t, tracker, cut+1)
	}
	put(t, iostats, "0")
	d.writes(t, rng, unix.O_DIRECT, 3, 4096, 4096)
	put(t, iostats, "1")
	refused("ahead of what was seen to complete by -12288 bytes written and 0 discarded")
	put(t, iostats, "0") // by now what begins is watched, too
	d.writes(t, rng, unix.O_DIRECT, 3, 4096, 4096)
	put(t, iostats, "1")
	refused("ahead of what was seen to begin by -12288 bytes")

	put(t, iostats, "0")
	tracker.Exchange()
	cut++
	err := tracker.Seal(cut)
	put(t, iostats, "1")
	if !errors.Is(err, ErrUncovered) || !strings.Contains(err.Error(), "switched off") {
		t.Fatalf("seal without statistics: %v", err)
	}
	cut = covered(t, tracker, cut+1)

	// Programs that were not there for a while have missed what was written.
	for i := range tracker.kernel.links {
		tracker.silence(t, i)
	}
	d.writes(t, rng, unix.O_DIRECT, 3, 4096, 4096)
	if tracker.ExchangeStopped() {
		t.Error("an exchange does not say that completions were lost")
	}
	if err := tracker.Seal(cut + 1); !errors.Is(err, ErrUncovered) || !strings.Contains(err.Error(), "to complete by 12288 bytes") || !strings.Contains(err.Error(), "to begin by 12288 bytes") {
		t.Errorf("seal after a loss: %v", err)
	}
}

// Whatever a program could not follow ends the coverage, and so does its caller's
// word; the cut after that begins a new one.
func TestMissesVoid(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	target := d.target(newPin(t))
	tracker := open(t, target)
	cut := covered(t, tracker, 1)
	for _, slot := range []int{slotStrange, slotFailed} {
		tracker.kernel.memory[nameCounts][slot]++ // the disk of a test gives no cause
		if err := tracker.Seal(cut + 1); !errors.Is(err, ErrUncovered) || !strings.Contains(err.Error(), "1 events were missed") {
			t.Fatalf("slot %d: %v", slot, err)
		}
		cut = covered(t, tracker, cut+2)
	}
	tracker.Void("a reason of the caller's")
	if list, err := tracker.Changed(cut, cut); !errors.Is(err, ErrUncovered) || !strings.Contains(err.Error(), "a reason of") {
		t.Errorf("changed, void: %v, %v", list, err)
	}
	if err := tracker.Close(); err != nil {
		t.Fatal(err)
	}
	tracker = open(t, target)
	if _, _, ok := tracker.Adopted(); ok || !strings.Contains(tracker.Fresh(), "a reason of") {
		t.Errorf("adopted, void (%v): %s", ok, tracker.Fresh())
	}
	cut = covered(t, tracker, cut+1)
	tracker.Void("another")
	if err := tracker.Seal(cut + 1); !errors.Is(err, ErrUncovered) {
		t.Errorf("seal, void: %v", err)
	}
	cut = covered(t, tracker, cut+2)
	// A miss while no process was there.
	tracker.kernel.memory[nameCounts][slotFailed]++
	if err := tracker.Close(); err != nil {
		t.Fatal(err)
	}
	tracker = open(t, target)
	if _, _, ok := tracker.Adopted(); ok || !strings.Contains(tracker.Fresh(), "missed") {
		t.Errorf("adopted after a miss (%v): %s", ok, tracker.Fresh())
	}
	if err := tracker.Seal(cut); err != nil {
		t.Errorf("the first cut of a new coverage: %v", err)
	}
	if err := tracker.Seal(cut); err == nil || errors.Is(err, ErrUncovered) {
		t.Errorf("the same cut twice: %v", err)
	}
}
