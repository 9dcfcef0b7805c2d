package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/volume"
	"blockferry/integration/rig"
	"blockferry/integration/uml"
)

// Disks of the figure besides those of every stand.
var (
	drbdDisk     = guestDisk('d') // in both guests' words: the first guest's
	drbdPeerDisk = guestDisk('a') // the second guest's
	mdDisk       = guestDisk('e')
	mdMirror     = guestDisk('f')
)

const (
	drbdDevice = "/dev/drbd0"
	mdDevice   = "/dev/md0"
	drbdPort   = ":7789"
)

// peerDisks are the first guest's.
var peerDisks = []uml.Disk{{Size: volumeBytes + 512<<20}, {Size: volumeBytes + 512<<20}, {Size: volumeBytes},
	{Size: volumeBytes + 32<<20}, {Size: volumeBytes + 32<<20}, {Size: volumeBytes + 32<<20}}

// peerLoads are written at full speed.
var peerLoads = []int{0, 1, 3} // of loads: 4 KiB at random with 1 and 16 at once, 256 KiB in sequence

// images are the ways to take a cut that are compared in this guest. Without fine
// tracking there is but one.
func images() []string {
	if onDebian() {
		return []string{"snapshot", "pre-copy"}
	}
	return []string{"snapshot"}
}

// trackedVersusDRBD writes at full speed to a volume that is replicated meanwhile, and to
// what others replicate: DRBD to a second guest, md to a second disk.
func trackedVersusDRBD(ctx context.Context, s *stand, m *measured) error {
	there, leave, err := peer(ctx)
	if err != nil {
		return err
	}
	defer leave()
	if err := s.bareDisk(volumeBytes); err != nil {
		return err
	}
	d := &drbd{there: there}
	if err := d.prepare(); err != nil {
		return err
	}
	if err := makeMD(); err != nil {
		return err
	}
	if err := s.replicated(ctx, volumeSpec{}); err != nil {
		return err
	}
	for _, device := range []string{drbdDevice, mdDevice} {
		if err := fill(device, volumeBytes, 3); err != nil {
			return err
		}
	}
	lasting := m.lasting(5*time.Second, 3*time.Second)
	for _, i := range peerLoads {
		l := loads[i]
		l.load.lasting = lasting
		if err := s.againstPeers(ctx, m, d, l.name, l.what, l.unit, l.load, l.bytes); err != nil {
			return fmt.Errorf("%s: %w", l.name, err)
		}
	}
	return nil
}

// ended is how a run at full speed ended.
type ended struct {
	rate      float64
	committed float64 // bytes known to be on the other side at its end
	lag       float64 // seconds until all of it was, after its end
	growing   bool    // it fell behind more and more
}

func (s *stand) againstPeers(ctx context.Context, m *measured, d *drbd, name, what, unit string, l load, bytes bool) error {
	type side struct {
		name, what string
		run        func() (ended, error)
		results    []ended
	}
	var sides []side
	ours := images()
	for _, image := range ours {
		sides = append(sides, side{name: image, what: "blockferry, image: " + image, run: func() (ended, error) {
			return s.fullSpeed(ctx, image, l, bytes)
		}})
	}
	sides = append(sides, []side{
		{name: "drbd-a", what: "DRBD 8.4 protocol A", run: func() (ended, error) { return d.fullSpeed(ctx, "A", l, bytes) }},
		{name: "drbd-c", what: "DRBD 8.4 protocol C", run: func() (ended, error) { return d.fullSpeed(ctx, "C", l, bytes) }},
		{name: "md", what: "md RAID1 write-mostly, write-behind", run: func() (ended, error) {
			return mdFullSpeed(ctx, l, bytes)
		}},
		{name: "raw", what: "the bare disk", run: func() (ended, error) {
			rate, err := rate(ctx, raw, volumeBytes, l, bytes)
			return ended{rate: rate}, err
		}},
	}...)
	count := m.runs(5, 2)
	for n := range count {
		for i := range sides {
			// Each begins a round in turn.
			side := &sides[(i+n)%len(sides)]
			e, err := side.run()
			if err != nil {
				return fmt.Errorf("%s: %w", side.name, err)
			}
			fmt.Printf("%s, %s, run %d of %d: %+v\n", name, side.name, n+1, count, e)
			side.results = append(side.results, e)
		}
	}
	values := func(i int, of func(ended) float64) (v []float64) {
		for _, e := range sides[i].results {
			v = append(v, of(e))
		}
		return v
	}
	rateOf := func(e ended) float64 { return e.rate }
	for i, image := range ours {
		for j, other := range sides[len(ours):] {
			m.add(row{Name: name + "/" + image + "-over-" + other.name, Unit: unit, Ours: values(i, rateOf), Theirs: values(len(ours)+j, rateOf),
				What: what + ", at full speed on a volume that is replicated meanwhile, image: " + image + ", over " + other.what})
		}
	}
	for i, side := range sides[:len(sides)-1] {
		who := side.what
		lag := row{Name: name + "/" + side.name + "-lag", Unit: "s", Ours: values(i, func(e ended) float64 { return e.lag }),
			What: fmt.Sprintf("seconds after %v of it until all was on the other side, %s", l.lasting, who)}
		grew := 0
		for _, e := range side.results {
			if e.growing {
				grew++
			}
		}
		if grew > 0 {
			lag.What += fmt.Sprintf("; the lag was GROWING in %d of %d runs: had the load gone on, it would have grown on", grew, count)
		}
		m.add(lag)
		m.add(row{Name: name + "/" + side.name + "-committed", Unit: "bytes", Ours: values(i, func(e ended) float64 { return e.committed }),
			What: "bytes known to be on the other side when the writer ended, " + who})
	}
	return nil
}

// fullSpeed is blockferry's side.
func (s *stand) fullSpeed(ctx context.Context, image string, l load, bytes bool) (e ended, err error) {
	if err := s.withImage(ctx, volumeSpec{image: image}); err != nil {
		return e, err
	}
	if err := s.settle(ctx); err != nil {
		return e, err
	}
	if onDebian() {
		if err := s.marked(ctx); err != nil {
			return e, err
		}
	}
	from, began := s.log.Len(), time.Now()
	if e.rate, err = rate(ctx, top, volumeBytes, l, bytes); err != nil {
		return e, err
	}
	ended := time.Now()
	found, err := s.entries("epoch committed", from)
	if err != nil {
		return e, err
	}
	for _, c := range found {
		e.committed += float64(c.Stats.Link.SentBytes)
	}
	if err := s.settle(ctx); err != nil {
		return e, err
	}
	e.lag = time.Since(ended).Seconds()
	commits, _, err := s.commits(from)
	e.growing = growing(commits, began, ended)
	return e, err
}

// withImage has cuts taken in that volume's way.
func (s *stand) withImage(ctx context.Context, v volumeSpec) error {
	if s.image == v.image {
		return nil
	}
	if err := s.rig.StopAgent(); err != nil {
		return s.withLog(err)
	}
	if err := s.configure(v); err != nil {
		return err
	}
	if err := s.rig.StartAgent(ctx, &s.log); err != nil {
		return s.withLog(err)
	}
	s.image = v.image
	return s.withLog(s.rig.Await(ctx, "replicated", time.Minute, upToDate))
}

// marked has each block of the era written once, as it is for all but the first
// moments of the minute in which the era lasts.
func (s *stand) marked(ctx context.Context) error {
	file, err := os.OpenFile(top, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	block, err := rig.Buffer(4096)
	if err != nil {
		return err
	}
	defer unix.Munmap(block)
	for offset := int64(0); offset < volumeBytes; offset += volume.DefaultEraBlockBytes {
		if _, err := file.WriteAt(block, offset); err != nil {
			return err
		}
	}
	return s.settle(ctx)
}

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

// connect joins the two with a protocol.
func (d *drbd) connect(protocol string) error {
	if d.protocol == protocol {
		return nil
	}
	for _, guest := range []struct {
		run       runner
		own, peer string
	}{{here, ownAddress, peerAddress}, {d.there, peerAddress, ownAddress}} {
		own, peer := "ipv4:"+guest.own+drbdPort, "ipv4:"+guest.peer+drbdPort
		if d.protocol != "" {
			if _, err := guest.run("drbdsetup", "disconnect", own, peer); err != nil {
				return err
			}
		}
	}
	for _, guest := range []struct {
		run       runner
		own, peer string
	}{{here, ownAddress, peerAddress}, {d.there, peerAddress, ownAddress}} {
		own, peer := "ipv4:"+guest.own+drbdPort, "ipv4:"+guest.peer+drbdPort
		if _, err := guest.run("drbdsetup", "connect", "bench", own, peer, "--protocol="+protocol); err != nil {
			return err
		}
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

// written is what DRBD has written to its disk, in bytes, as one of the guests
// says.
func (d *drbd) written(run runner) (float64, error) {
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

func (d *drbd) fullSpeed(ctx context.Context, protocol string, l load, bytes bool) (e ended, err error) {
	if err := d.connect(protocol); err != nil {
		return e, err
	}
	ownBefore, err := d.written(here)
	if err != nil {
		return e, err
	}
	peerBefore, err := d.written(d.there)
	if err != nil {
		return e, err
	}
	if e.rate, err = rate(ctx, drbdDevice, volumeBytes, l, bytes); err != nil {
		return e, err
	}
	began := time.Now()
	own, err := d.written(here)
	if err != nil {
		return e, err
	}
	for first := true; ; first = false {
		there, err := d.written(d.there)
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

// mdFullSpeed counts what was written to the second disk; when that stands still
// it has all of it.
func mdFullSpeed(ctx context.Context, l load, bytes bool) (e ended, err error) {
	_, before, err := diskBytes(mdMirror)
	if err != nil {
		return e, err
	}
	if e.rate, err = rate(ctx, mdDevice, volumeBytes, l, bytes); err != nil {
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
