package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
)

// cutStall counts every time in which writers were stopped, as the agent's
// log says: for the cut itself, and again when its frozen view is released.
func cutStall(ctx context.Context, s *stand, m *measured) error {
	if err := s.bareDisk(volumeBytes); err != nil {
		return err
	}
	if err := s.replicated(ctx, volumeSpec{interval: 100 * time.Millisecond}); err != nil {
		return err
	}
	for i, image := range images() {
		prefix := ""
		if i > 0 {
			prefix = image + "/"
		}
		if err := s.withImage(ctx, volumeSpec{interval: 100 * time.Millisecond, image: image}); err != nil {
			return err
		}
		if err := s.cutStalls(ctx, m, prefix); err != nil {
			return fmt.Errorf("image %s: %w", image, err)
		}
	}
	return nil
}

// cutStalls is all that is measured with one kind of image; its rows' names begin
// with prefix.
func (s *stand) cutStalls(ctx context.Context, m *measured, prefix string) error {
	lasting := m.lasting(8*time.Second, 3*time.Second)
	for _, c := range []struct {
		name, what string
		write      func(ctx context.Context) error
	}{
		{"idle", "next to nothing written", func(ctx context.Context) error {
			_, err := writes(ctx, top, lasting, 20*time.Millisecond)
			return err
		}},
		{"load", "4 KiB written at random, 16 at once, as fast as it goes", func(ctx context.Context) error {
			_, err := fio(ctx, top, volumeBytes, load{pattern: "randwrite", block: "4k", depth: 16, lasting: lasting})
			return err
		}},
	} {
		describe := func(name, what string, p int) *row {
			return &row{Name: fmt.Sprintf("%s%s/%s-p%d", prefix, c.name, name, p), What: fmt.Sprintf("%s, p%d over a run of %v, %s", what, p, lasting, c.what), Unit: "ms"}
		}
		rows := []*row{
			describe("cut", "one stop for a cut", 50), describe("cut", "one stop for a cut", 99),
			describe("release", "one stop for the release of its view", 50), describe("release", "one stop for the release of its view", 99),
			describe("both", "all stops of one cut together", 50), describe("both", "all stops of one cut together", 99),
			describe("drain", "of a stop, until nothing is in flight", 50), describe("drain", "of a stop, until nothing is in flight", 99),
			describe("inside", "of a stop, what is done while writers stand still", 50), describe("inside", "of a stop, what is done while writers stand still", 99),
			describe("resume", "of a stop, until the dead-man has resumed and the agent knows", 50), describe("resume", "of a stop, until the dead-man has resumed and the agent knows", 99),
		}
		counts := []int{}
		for range m.runs(5, 2) {
			if err := s.settle(ctx); err != nil {
				return err
			}
			from := s.log.Len()
			if err := c.write(ctx); err != nil {
				return err
			}
			// The last cut's view is released, too.
			if err := s.settle(ctx); err != nil {
				return err
			}
			time.Sleep(200 * time.Millisecond)
			stops, err := s.stops(from)
			if err != nil {
				return err
			}
			for i, values := range [][]float64{stops.cut, stops.release, stops.both, stops.drain, stops.inside, stops.resume} {
				if len(values) == 0 {
					continue // with pre-copy there is no view to be released
				}
				rows[2*i].Ours = append(rows[2*i].Ours, percentile(values, 50))
				rows[2*i+1].Ours = append(rows[2*i+1].Ours, percentile(values, 99))
			}
			counts = append(counts, len(stops.both))
		}
		for _, r := range rows {
			if r.Ours != nil {
				m.add(*r)
			}
		}
		m.note(prefix+c.name+cutsPerRunSuffix, counts)
	}
	// The same from outside: what a writer saw.
	longest := func(device string) side {
		return func(ctx context.Context) (float64, error) {
			if err := s.settle(ctx); err != nil {
				return 0, err
			}
			took, err := writes(ctx, device, lasting, 0)
			return percentile(took, 100), err
		}
	}
	return m.pairs(ctx, row{Name: prefix + "outside/longest-write", What: "the longest of single writes, one after another, while cuts are taken 10 times a second, over that on the bare disk", Unit: "ms"},
		m.runs(5, 2), longest(top), longest(raw))
}

// stops are times in which writers were stopped, in ms.
type stops struct {
	cut, release, both    []float64
	drain, inside, resume []float64 // parts of a cut's
}

func (s *stand) stops(from int) (stops, error) {
	var r stops
	found, err := s.entries("writers stopped", from)
	for _, e := range found {
		ms := e.Seconds * 1000
		if e.For == "cut" {
			r.cut = append(r.cut, ms)
			r.both = append(r.both, ms)
			continue
		}
		r.release = append(r.release, ms)
		if n := len(r.both); n > 0 {
			r.both[n-1] += ms
		}
	}
	if err != nil {
		return r, err
	}
	if len(r.cut) == 0 || len(r.release) == 0 && s.image != "pre-copy" {
		return r, errors.New("no cut was taken and released in all the time")
	}
	parts, err := s.entries("a cut's stop in parts", from)
	for _, p := range parts {
		r.drain, r.inside, r.resume = append(r.drain, p.Drain*1000), append(r.inside, p.Inside*1000), append(r.resume, p.Resume*1000)
	}
	return r, err
}

// writes writes 4 KiB blocks of noise at random places, one at a time with a
// pause between, until the time is over: what each took, in ms.
func writes(ctx context.Context, device string, lasting, pause time.Duration) ([]float64, error) {
	file, err := os.OpenFile(device, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	block, err := rig.Buffer(4096)
	if err != nil {
		return nil, err
	}
	defer unix.Munmap(block)
	var took []float64
	for began := time.Now(); time.Since(began) < lasting; time.Sleep(pause) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		for i := 0; i < len(block); i += 64 {
			block[i] = byte(rand.Uint32())
		}
		at := time.Now()
		if _, err := file.WriteAt(block, rand.Int64N(volumeBytes/4096)*4096); err != nil {
			return nil, err
		}
		took = append(took, time.Since(at).Seconds()*1000)
	}
	return took, nil
}
