package integration

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/load"
)

// What applications see: with ext4 on the volume, every record that was synced
// before power went is on the SSD, and the replica is the file system of one
// moment, with everything that was durable before the last sync.
func TestFaultPowerLossUnderFilesystem(t *testing.T) {
	spec := powerGuest
	spec.Disks = []disk{{Size: powerDiskBytes}}
	inGuest(t, spec, func(t *testing.T) {
		p := newPowerRig(t, false, "64MiB")
		// ext4 promises nothing for a page that was being overwritten; the
		// ledger wants it old or new, as on disks with sectors of 4 KiB.
		p.mains.grain = 4096
		p.create(t)
		p.start(t)
		v := p.await(t, "up to date", time.Minute, upToDate)
		mkfs(t, "ext4", v.Path)
		points := []powerPoint{{on: "ebs", what: "apply", few: 60}, {on: "ssd", what: "flush after write", few: 30}, {on: "ebs", what: "flush after applied superblock", few: 3}}
		for i := range powerNumber(t, powerLossesVar, len(points)) {
			p.loseFilesystem(t, v.Path, points[i%len(points)])
		}
		p.must(t, "down")
	})
}

func (p *powerRig) loseFilesystem(t *testing.T, path string, at powerPoint) {
	t.Helper()
	t.Logf("power of both goes at a %s on %s", at.what, at.on)
	dir := mustMount(t, "ext4", path, "")
	for _, old := range []string{"log", "pages", "files"} {
		if err := os.RemoveAll(filepath.Join(dir, old)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	l := &load.Load{Dir: dir, Ledger: load.NewLedger()}
	if err := l.Start(ctx); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	synced := l.Ledger.Now()
	p.must(t, "sync", "--timeout", "60s")
	epoch := p.awaitLoss(t, at, p.lose(at, p.all()...))
	gone := l.Ledger.Now() - time.Since(p.lostAt)
	stop()
	_ = l.Wait() // it failed, or was stopped before it saw
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	p.takeDown(t)

	replica := survivor(p.ebs)
	openCopy(t, replica, epoch)
	replica.writeTo(t, ubd(0))
	m, err := judgeFileSystem(t, l, ubd(0))
	if err != nil || m.Held == 0 || m.Before <= synced {
		t.Fatalf("the replica: %v; it lacks what was durable at %v, before the sync at %v: %+v", err, m.Before, synced, m)
	}
	t.Logf("the replica is of a moment between %v and %v; synced at %v, power lost at %v", m.After, m.Before, synced, gone)

	p.powerOn(t)
	p.start(t)
	p.caughtUp(t)
	m, err = judgeFileSystem(t, l, path)
	// The machine outlives its disks here. Until ext4 has noticed that its journal was given
	// up, which is at the next write, it answers a folder's fsync with yes (it forces a commit,
	// and there is none): what was acknowledged once the power had gone does not count.
	if err != nil || m.Held == 0 || m.Before < gone {
		t.Fatalf("the SSD, whose power went at %v: %v; %d durable records are lost: %+v", gone, err, m.Lost, m)
	}
}

// writeTo writes what it holds onto a disk, up to that one's end.
func (c *diskCopy) writeTo(t *testing.T, path string) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	piece := alignedBuffer(1 << 20)
	defer unix.Munmap(piece)
	size := min(c.size, sectors(t, path)*sector)
	for at := int64(0); at < size; at += int64(len(piece)) {
		some := piece[:min(int64(len(piece)), size-at)]
		c.pages.read(some, at)
		if _, err := file.WriteAt(some, at); err != nil {
			t.Fatal(err)
		}
	}
}
