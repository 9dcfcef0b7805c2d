package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"blockferry/integration/rig"
	"blockferry/integration/uml"
)

// Disks of the figure besides those of every stand.
var (
	drbdDisk     = guestDisk('d') // in both guests' words: the first guest's
	drbdPeerDisk = guestDisk('a') // the second guest's
	mdDisk       = guestDisk('e')
	mdMirror     = guestDisk('f')
	aloneDisk    = guestDisk('g')
)

const (
	drbdDevice  = "/dev/drbd0"
	aloneDevice = "/dev/drbd1" // see aloneDRBD
	mdDevice    = "/dev/md0"
	drbdPort    = ":7789"
)

// peerDisks are the first guest's.
var peerDisks = []uml.Disk{{Size: volumeBytes + 512<<20}, {Size: volumeBytes + 512<<20}, {Size: volumeBytes},
	{Size: volumeBytes + 32<<20}, {Size: volumeBytes + 32<<20}, {Size: volumeBytes + 32<<20}, {Size: volumeBytes + 32<<20}}

// drbd is a DRBD resource on both guests.
type drbd struct {
	there    runner
	protocol string
}

// prepare makes it on both, equal as both disks are all zeros.
func (d *drbd) prepare() error {
	for _, guest := range []struct {
		run  runner
		disk string
	}{{here, drbdDisk}, {d.there, drbdPeerDisk}} {
		for _, command := range []string{
			// The handlers of a machine are not here, and without one DRBD drops
			// the connection at the first resync.
			"modprobe -d /run/modules drbd usermode_helper=/bin/true",
			"drbdmeta --force 0 v08 " + guest.disk + " internal create-md",
			"drbdsetup new-resource bench",
			"drbdsetup new-minor bench 0 0",
			"drbdsetup attach 0 " + guest.disk + " " + guest.disk + " internal",
		} {
			if _, err := guest.run(strings.Fields(command)...); err != nil {
				return err
			}
		}
	}
	if err := d.connect("C"); err != nil {
		return err
	}
	if _, err := here("drbdsetup", "new-current-uuid", "--clear-bitmap", "0"); err != nil {
		return err
	}
	if _, err := here("drbdsetup", "primary", "0"); err != nil {
		return err
	}
	return d.await("UpToDate/UpToDate")
}

// aloneDRBD makes another resource that never had a peer. DRBD can't pause what it sends:
// without a connection it marks what is written, for a peer to come, and sends nothing.
func aloneDRBD() error {
	for _, command := range []string{
		"drbdmeta --force 1 v08 " + aloneDisk + " internal create-md",
		"drbdsetup new-resource alone",
		"drbdsetup new-minor alone 1 0",
		"drbdsetup attach 1 " + aloneDisk + " " + aloneDisk + " internal",
		"drbdsetup primary --force 1",
	} {
		if _, err := here(strings.Fields(command)...); err != nil {
			return err
		}
	}
	return nil
}

// onBoth calls do for each guest, with its own and the other's address, until one fails.
func (d *drbd) onBoth(do func(run runner, own, peer string) error) error {
	own, peer := "ipv4:"+ownAddress+drbdPort, "ipv4:"+peerAddress+drbdPort
	if err := do(here, own, peer); err != nil {
		return err
	}
	return do(d.there, peer, own)
}

// connect joins the two with a protocol.
func (d *drbd) connect(protocol string) error {
	if d.protocol == protocol {
		return nil
	}
	if d.protocol != "" {
		if err := d.onBoth(func(run runner, own, peer string) error {
			_, err := run("drbdsetup", "disconnect", own, peer)
			return err
		}); err != nil {
			return err
		}
	}
	if err := d.onBoth(func(run runner, own, peer string) error {
		_, err := run("drbdsetup", "connect", "bench", own, peer, "--protocol="+protocol)
		return err
	}); err != nil {
		return err
	}
	d.protocol = protocol
	return d.await("cs:Connected")
}

// await waits until DRBD says so.
func (d *drbd) await(what string) error {
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		said, err := here("cat", "/proc/drbd")
		if err != nil || strings.Contains(said, what) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("DRBD is not %s within 30 s: %s", what, said)
		}
	}
}

var drbdWritten = regexp.MustCompile(`\bdw:(\d+)`)

// wrote is what DRBD has written to its disk, in bytes, as one of the guests
// says.
func (d *drbd) wrote(run runner) (float64, error) {
	said, err := run("cat", "/proc/drbd")
	if err != nil {
		return 0, err
	}
	found := drbdWritten.FindStringSubmatch(said)
	if found == nil || !strings.Contains(said, "cs:Connected") || !strings.Contains(said, "ds:UpToDate/UpToDate") {
		return 0, fmt.Errorf("DRBD does not replicate: %s", said)
	}
	kib, err := strconv.ParseFloat(found[1], 64)
	return kib * 1024, err
}

// run puts a load on it under a protocol, and waits until the second guest has all of it.
func (d *drbd) run(ctx context.Context, protocol string, l load) (e ended, err error) {
	if err := d.connect(protocol); err != nil {
		return e, err
	}
	ownBefore, err := d.wrote(here)
	if err != nil {
		return e, err
	}
	peerBefore, err := d.wrote(d.there)
	if err != nil {
		return e, err
	}
	if e.written, err = fio(ctx, drbdDevice, volumeBytes, l); err != nil {
		return e, err
	}
	began := time.Now()
	own, err := d.wrote(here)
	if err != nil {
		return e, err
	}
	for first := true; ; first = false {
		there, err := d.wrote(d.there)
		if err != nil {
			return e, err
		}
		if first {
			e.committed = there - peerBefore
		}
		if e.lag = time.Since(began).Seconds(); there-peerBefore >= own-ownBefore {
			return e, nil
		}
		if e.lag > 60 {
			return e, errors.New("the second guest's disk has not got all of it a minute after the last write")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// makeMD makes a mirror whose second half may be behind.
func makeMD() error {
	if err := uml.Modprobe("raid1"); err != nil {
		return err
	}
	return rig.Do("mdadm", "--create", mdDevice, "--run", "--assume-clean", "--level=1", "--raid-devices=2", "--metadata=1.2", "--bitmap=internal",
		"--write-behind=16383", mdDisk, "--write-mostly", mdMirror)
}

// runMD puts a load on it. It counts what was written to the second disk; when that stands still
// it has all of it.
func runMD(ctx context.Context, l load) (e ended, err error) {
	_, before, err := diskBytes(mdMirror)
	if err != nil {
		return e, err
	}
	if e.written, err = fio(ctx, mdDevice, volumeBytes, l); err != nil {
		return e, err
	}
	began := time.Now()
	_, last, err := diskBytes(mdMirror)
	e.committed = last - before
	for still := began; err == nil && time.Since(still) < 200*time.Millisecond; time.Sleep(10 * time.Millisecond) {
		var now float64
		if _, now, err = diskBytes(mdMirror); now != last {
			last, still = now, time.Now()
			e.lag = still.Sub(began).Seconds()
		}
	}
	return e, err
}
