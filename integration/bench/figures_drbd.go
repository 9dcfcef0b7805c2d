package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/volume"
	"blockferry/integration/rig"
)

// fullLoads are the loads, of loads, that are written at full speed while the volume is
// replicated, and those that are written beside it, the bare disk last.
var fullLoads = []struct {
	load   int
	beside []string
}{
	{0, []string{"drbd-a", "drbd-c", "md", "raw"}},
	{1, []string{"drbd-a", "raw"}},
	{2, []string{"drbd-a", "drbd-c", "raw"}},
	{3, []string{"drbd-a", "drbd-c", "md", "raw"}},
}

// heldLoads are those that are held at a part of the rate that the bare disk takes.
var heldLoads = []struct {
	load, part  int
	name, words string
}{
	{0, 2, "half", "half"},
	{1, 2, "half", "half"},
	{0, 10, "tenth", "a tenth of"}, // where half is more than either takes
}

// images are the ways to take a cut that are compared in this guest. Without fine
// tracking there is but one.
func images() []string {
	if onDebian() {
		return []string{"snapshot", "pre-copy"}
	}
	return []string{"snapshot"}
}

// trackedVersusDRBD has writers on a volume and on what others replicate take turns: DRBD
// to a second guest, md to a second disk.
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
	if err := aloneDRBD(); err != nil {
		return err
	}
	if err := makeMD(); err != nil {
		return err
	}
	if err := s.replicated(ctx, volumeSpec{}); err != nil {
		return err
	}
	for _, device := range []string{drbdDevice, aloneDevice, mdDevice} {
		if err := fill(device, volumeBytes, 3); err != nil {
			return err
		}
	}
	for _, part := range []func(context.Context, *measured, *drbd) error{s.trackingVersusDRBD, s.fullVersusPeers, s.heldVersusDRBD} {
		if err := part(ctx, m, d); err != nil {
			return err
		}
	}
	return nil
}

// ended is how a run ended.
type ended struct {
	written
	committed float64 // bytes known to be on the other side at its end
	lag       float64 // seconds until all of it was, after its end
	growing   bool    // it fell behind more and more
}

// contender is one of those that a load is put on in turns.
type contender struct {
	name, what string
	run        func(ctx context.Context, l load) (ended, error)
	results    []ended
}

// values is one number of each of its runs.
func (c *contender) values(of func(ended) float64) (v []float64) {
	for _, e := range c.results {
		v = append(v, of(e))
	}
	return v
}

// throughput is a run's, in bytes or in writes.
func throughput(bytes bool) func(ended) float64 {
	if bytes {
		return func(e ended) float64 { return e.bytesPerSecond }
	}
	return func(e ended) float64 { return e.iops }
}

// ours are blockferry's, one for each image.
func (s *stand) ours() (c []*contender) {
	for _, image := range images() {
		c = append(c, &contender{name: image, what: "blockferry, image: " + image, run: func(ctx context.Context, l load) (ended, error) {
			return s.whileReplicated(ctx, image, l)
		}})
	}
	return c
}

// on is a device that is only written.
func on(name, what, device string) *contender {
	return &contender{name: name, what: what, run: func(ctx context.Context, l load) (ended, error) {
		w, err := fio(ctx, device, volumeBytes, l)
		return ended{written: w}, err
	}}
}

// beside are the others, by name.
func beside(d *drbd, names []string) (c []*contender) {
	for _, name := range names {
		switch name {
		case "drbd-a", "drbd-c":
			protocol := map[string]string{"drbd-a": "A", "drbd-c": "C"}[name]
			c = append(c, &contender{name: name, what: "DRBD 8.4 protocol " + protocol, run: func(ctx context.Context, l load) (ended, error) {
				return d.run(ctx, protocol, l)
			}})
		case "md":
			c = append(c, &contender{name: name, what: "md RAID1 write-mostly, write-behind", run: runMD})
		case "raw":
			c = append(c, on(name, "the bare disk", raw))
		}
	}
	return c
}

// turns puts a load on each of them, over and over. Each other time the last begins: what
// comes later may find warmer caches, and no image and no protocol is changed twice in a round.
func turns(ctx context.Context, name string, count int, l load, sides []*contender) error {
	for n := range count {
		order := slices.Clone(sides)
		if n%2 == 1 {
			slices.Reverse(order)
		}
		for _, side := range order {
			e, err := side.run(ctx, l)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", name, side.name, err)
			}
			fmt.Printf("%s, %s, run %d of %d: %+v\n", name, side.name, n+1, count, e)
			side.results = append(side.results, e)
		}
	}
	return nil
}

// trackingVersusDRBD has the volume's changes marked only, replication being paused.
func (s *stand) trackingVersusDRBD(ctx context.Context, m *measured, d *drbd) error {
	if err := s.trackingAlone(ctx, volumeBytes); err != nil {
		return err
	}
	from := s.log.Len()
	for _, l := range loads {
		l.load.lasting = m.lasting(time.Second, 500*time.Millisecond)
		ours, others := on("tracking", "", top), beside(d, []string{"drbd-a", "raw"})
		others[0].what += ", which replicates meanwhile, as it has no pause"
		others = append(others, on("drbd-alone", "DRBD 8.4 without a peer, which marks what changed and sends nothing", aloneDevice))
		if err := turns(ctx, "tracking/"+l.name, m.runs(5, 2), l.load, append([]*contender{ours}, others...)); err != nil {
			return err
		}
		for _, other := range others {
			m.add(row{Name: "tracking/" + l.name + "-over-" + other.name, Unit: l.unit, Ours: ours.values(throughput(l.bytes)), Theirs: other.values(throughput(l.bytes)),
				What: l.what + ", at full speed on a volume whose changes are marked while its replication is paused, over " + other.what})
		}
	}
	if err := s.uncut(from); err != nil {
		return err
	}
	if err := s.rig.Run(ctx, "resume", "data"); err != nil {
		return s.withLog(err)
	}
	return s.settle(ctx)
}

// fullVersusPeers writes at full speed to what is replicated meanwhile.
func (s *stand) fullVersusPeers(ctx context.Context, m *measured, d *drbd) error {
	lasting := m.lasting(5*time.Second, 3*time.Second)
	for _, full := range fullLoads {
		l := loads[full.load]
		l.load.lasting = lasting
		count, ours, others := m.runs(5, 2), s.ours(), beside(d, full.beside)
		sides := slices.Concat(ours, others)
		if err := turns(ctx, l.name, count, l.load, sides); err != nil {
			return err
		}
		for _, side := range ours {
			for _, other := range others {
				m.add(row{Name: l.name + "/" + side.name + "-over-" + other.name, Unit: l.unit, Ours: side.values(throughput(l.bytes)), Theirs: other.values(throughput(l.bytes)),
					What: l.what + ", at full speed on a volume that is replicated meanwhile, image: " + side.name + ", over " + other.what})
			}
		}
		for _, side := range sides[:len(sides)-1] {
			lag := row{Name: l.name + "/" + side.name + "-lag", Unit: "s", Ours: side.values(func(e ended) float64 { return e.lag }),
				What: fmt.Sprintf("seconds after %v of it until all was on the other side, %s", lasting, side.what)}
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
			m.add(row{Name: l.name + "/" + side.name + "-committed", Unit: "bytes", Ours: side.values(func(e ended) float64 { return e.committed }),
				What: "bytes known to be on the other side when the writer ended, " + side.what})
		}
	}
	return nil
}

// heldVersusDRBD measures the latency of writers that are held at a part of the rate that the
// bare disk takes, while what they write is replicated.
func (s *stand) heldVersusDRBD(ctx context.Context, m *measured, d *drbd) error {
	for _, held := range heldLoads {
		l := loads[held.load]
		l.load.lasting = m.lasting(time.Second, time.Second)
		var full []float64
		for range m.runs(3, 1) {
			w, err := fio(ctx, raw, volumeBytes, l.load)
			if err != nil {
				return err
			}
			full = append(full, w.iops)
		}
		l.load.rate, l.load.lasting = int(percentile(full, 50))/held.part, m.lasting(4*time.Second, 3*time.Second)
		name := held.name + "-" + l.name
		ours, others := s.ours(), beside(d, []string{"drbd-a", "raw"})
		sides := slices.Concat(ours, others)
		if err := turns(ctx, name, m.runs(5, 2), l.load, sides); err != nil {
			return err
		}
		m.addHeld(name, fmt.Sprintf("%s, at %s the bare disk's rate while it is replicated", l.what, held.words), ours, others[0], others[1])
	}
	return nil
}

// addHeld adds the latencies under a load, over those on the bare disk and over DRBD's, and what
// of its rate was reached.
func (m *measured) addHeld(name, what string, ours []*contender, drbd, bare *contender) {
	latencies := []struct {
		name, what string
		of         func(ended) float64
	}{
		{"p50", "median latency, ", func(e ended) float64 { return e.p50 }},
		{"p99", "99th percentile of the latency, ", func(e ended) float64 { return e.p99 }},
	}
	for _, side := range append(slices.Clone(ours), drbd) {
		for _, latency := range latencies {
			m.add(row{Name: name + "/" + side.name + "-" + latency.name, Unit: "ms", Ours: side.values(latency.of), Theirs: bare.values(latency.of),
				What: latency.what + what + ", " + side.what + ", over the same on the bare disk"})
		}
		m.add(row{Name: name + "/" + side.name + "-rate", Unit: "writes/s", Ours: side.values(throughput(false)), Theirs: bare.values(throughput(false)),
			What: "writes per second that were reached then, " + side.what + ", over the same on the bare disk"})
	}
	for _, side := range ours {
		for _, latency := range latencies {
			m.add(row{Name: name + "/" + side.name + "-over-" + drbd.name + "-" + latency.name, Unit: "ms", Ours: side.values(latency.of), Theirs: drbd.values(latency.of),
				What: latency.what + what + ", " + side.what + ", over that on " + drbd.what})
		}
	}
}

// whileReplicated puts a load on the volume, which begins and ends with all of it at the
// replica.
func (s *stand) whileReplicated(ctx context.Context, image string, l load) (e ended, err error) {
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
	if e.written, err = fio(ctx, top, volumeBytes, l); err != nil {
		return e, err
	}
	end := time.Now()
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
	e.lag = time.Since(end).Seconds()
	commits, _, err := s.commits(from)
	e.growing = growing(commits, began, end)
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
