package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

const (
	storeModel, durableModel = "Fast Store", "Durable Disk"
	// appearsWithin is long for a disk that is heard of, and short beside the half minute
	// in which it would be looked for.
	appearsWithin = 20 * time.Second
)

// scsiDisk attaches a new blank SCSI disk of a model, in memory, and returns its node and
// serial number.
func scsiDisk(t *testing.T, model string) (path, serial string) {
	t.Helper()
	before := map[string]bool{}
	for _, dir := range glob(t, "/sys/block/sd*") {
		before[dir] = true
	}
	const driver = "/sys/bus/pseudo/drivers/scsi_debug"
	if _, err := os.Stat(driver); err != nil {
		modprobe(t, "sd_mod")
		modprobe(t, "scsi_debug", "add_host=0", "per_host_store=1", "dev_size_mb=112", "delay=0")
	}
	put(t, "/sys/module/scsi_debug/parameters/inq_product", model)
	put(t, driver+"/add_host", "1")
	for limit := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		for _, dir := range glob(t, "/sys/block/sd*") {
			page, err := os.ReadFile(dir + "/device/vpd_pg80")
			path = "/dev/" + filepath.Base(dir)
			if _, gone := os.Stat(path); before[dir] || err != nil || gone != nil {
				continue
			}
			return path, strings.TrimSpace(string(page[4:]))
		}
		if time.Now().After(limit) {
			t.Fatal("no SCSI disk appeared")
		}
	}
}

// unplug takes a SCSI disk away, whatever uses it, and returns how to plug it in again.
func unplug(t *testing.T, path string) (plug func()) {
	t.Helper()
	dir, err := filepath.EvalSymlinks("/sys/block/" + filepath.Base(path) + "/device")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(dir, "/host")
	host, _, _ := strings.Cut(rest, "/")
	put(t, dir+"/delete", "1")
	return func() { put(t, "/sys/class/scsi_host/host"+host+"/scan", "- - -") }
}

func glob(t *testing.T, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

// Promises 5 and 6, with disks named by serial number and model, and no udevd: a replica's
// disk that is pulled under load is said to be gone, and followed again as soon as it is
// back, under whatever name, without a restart; of an SSD that is pulled, and comes back as
// a blank one, status says what to do, and nothing is written to it before that is done.
func TestDisksComeAndGo(t *testing.T) {
	inGuest(t, guest{Timeout: 4 * time.Minute}, func(t *testing.T) {
		const size, span = 16 << 20, 8 << 20
		ssd, _ := scsiDisk(t, storeModel)
		ebs, serial := scsiDisk(t, durableModel)
		c := newCLI(t, faultConfig("model:"+storeModel, "serial:"+serial, size, "    cow: 16MiB\n", "        journal: 24MiB\n"))
		c.must(t, "create")
		c.must(t, "check")
		c.start(t)
		v := c.await(t, "up to date", time.Minute, upToDate)
		h := history{Seed: 71, Size: span, MaxBytes: 64 << 10, Pause: 3 * time.Millisecond}
		w := startWriter(t, v.Path, h, 1)
		w.awaitWrites(t, 50)
		c.must(t, "sync", "--timeout", "60s")

		// Held open, the old number is not free: the disk comes back under another name.
		hold, err := os.Open(ebs)
		if err != nil {
			t.Fatal(err)
		}
		from, pulled := len(c.logText(t)), time.Now()
		w.takeSlowest()
		plug := unplug(t, ebs)
		said := c.says(t, appearsWithin, "serial:"+serial, "is gone since", "attach the disk; it is used as soon as it is there")
		gone := time.Since(pulled)
		if !said.Up || said.Role != "Primary" {
			t.Errorf("without its replica the volume is %+v", said)
		}
		k := w.acked()
		w.awaitWrites(t, 50)
		plugged := time.Now()
		plug()
		c.awaitLog(t, from, "replica opened", appearsWithin)
		opened := time.Since(plugged)
		c.await(t, "up to date again", time.Minute, upToDate)
		followed := time.Since(plugged)
		hold.Close()
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "verify")
		log := c.logText(t)[from:]
		incremental(t, "plugged in again", log)
		for _, word := range []string{"disk-gone", "disk-appeared"} {
			if strings.Count(log, "event="+word) != 1 {
				t.Errorf("%d times '%s' in the log", strings.Count(log, "event="+word), word)
			}
		}
		if strings.Contains(log, "is there, with") && strings.Contains(log, "("+ebs+") is there, with") {
			t.Errorf("it came back as %s: this shows nothing", ebs)
		}
		t.Logf("MEASURED said to be gone after %v; served %v after it was plugged in, up to date after %v; %d writes meanwhile, the slowest took %v",
			gone.Round(time.Millisecond), opened.Round(time.Millisecond), followed.Round(time.Millisecond), w.acked()-k, w.takeSlowest().Round(time.Millisecond))

		// The SSD goes under the volume, and a blank one of its model takes its place.
		synced := w.acked()
		c.must(t, "sync", "--timeout", "60s")
		unplug(t, ssd)
		<-w.done // its writes fail: they do not hang
		if w.err == nil {
			t.Fatal("the writer saw no error")
		}
		issued := w.issued()
		lost := c.says(t, time.Minute, "model:"+storeModel, "is gone since", "blockferry down --force data")
		if lost.Disk != "Diskless" {
			t.Errorf("without its SSD its disk is %s", lost.Disk)
		}
		blank, other := scsiDisk(t, storeModel)
		c.says(t, time.Minute, "in its place is "+blank, "a blank disk", "nothing is written to it by itself", "blockferry restore data")
		for _, one := range []string{"down --force", "restore"} {
			if one == "restore" {
				mustBeZero(t, blank)
			}
			c.must(t, strings.Fields(one)...)
		}
		v = c.await(t, "restored and up to date", time.Minute, upToDate)
		judgeDevice(t, v.Path, h, synced, issued)
		c.must(t, "sync", "--timeout", "60s")
		c.must(t, "verify")

		// Two of one model: neither is taken.
		c.must(t, "down")
		c.kill(t)
		twin, _ := scsiDisk(t, storeModel)
		findings, _, code := c.try(t, "check")
		for _, word := range []string{"more than one disk is meant by 'model:" + storeModel + "'", blank + " (serial:" + other, twin + " (serial:"} {
			if code != 3 || !strings.Contains(findings, word) {
				t.Errorf("check ends with %d, and says:\n%s\nwant 3, and %s", code, findings, word)
			}
		}
		c.start(t)
		c.says(t, time.Minute, "more than one disk is meant", blank, twin, "name one of them in the configuration")
		mustBeZero(t, twin)
		// One of them goes: the other is the one that is meant.
		unplug(t, twin)
		c.await(t, "up once it is the only one", time.Minute, func(v status.Volume) bool { return v.Up })
		c.must(t, "down")
	})
}

// mustBeZero checks that nothing was written to a disk.
func mustBeZero(t *testing.T, path string) {
	t.Helper()
	err := readDirect(path, func(offset int64, piece []byte) error {
		if !allZero(piece) {
			return fmt.Errorf("something was written at %d", offset)
		}
		return nil
	})
	if err != nil {
		t.Errorf("%s: %v", path, err)
	}
}
