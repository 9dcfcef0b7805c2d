package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"blockferry/blockdev/volume"
	"blockferry/integration/uml"
)

// planFigure measures how long it takes to find out what changed on a volume
// of so many TiB, and what it reads and holds for that.
func planFigure(tib int64, memory string, limit time.Duration) figure {
	return figure{
		name:  fmt.Sprintf("plan-%dtib", tib),
		about: fmt.Sprintf("what it takes to find out what changed on a volume of %d TiB", tib),
		note: "The disks' data areas take writes and forget them (dm-zero), labels, metadata and journal are real. Blocks of 64 KiB are written at random, the worst case: every change is a range of its own. " +
			"Each time is that of a new session's question about the same marks; memory is the most that the agent had from there until the answer; bytes are those read from the metadata's device meanwhile, the kernel's own reads included. " +
			"An epoch that asks the era's marks reads the kernel's whole array of them, some 67 MiB a TiB with blocks of 64 KiB, however little changed (rows epoch): at 16 TiB 1.1 GiB in some 4 s, so an `interval` of 1 s can't be kept there. " +
			"Larger blocks (`era-block`) take less in proportion; fine tracking, where the kernel has BPF, answers without reading them.",
		disks:   []uml.Disk{{Size: planTail(tib << 40)}, {Size: planTail(tib << 40)}},
		modules: []string{"dm-zero"},
		memory:  memory,
		limit:   limit,
		measure: func(ctx context.Context, s *stand, m *measured) error { return plan(ctx, s, m, tib<<40) },
		picture: planPicture,
	}
}

// planTail is the room for all but the data: the metadata, COW and journal of
// either side, with much to spare.
func planTail(size int64) int64 {
	return volume.EraMetadataBytes(size, volume.DefaultEraBlockBytes) + size/1024 + 16<<30
}

// forgetful makes a disk of which only the first MiB and the end are kept.
func forgetful(name, disk string, size int64) (string, error) {
	const head = 2048
	middle, tail := size/512, planTail(size)/512-head
	table := fmt.Sprintf("0 %d linear %s 0\n%d %d zero\n%d %d linear %s %d\n", head, disk, head, middle, head+middle, tail, disk, head)
	cmd := exec.Command("dmsetup", "create", name)
	cmd.Stdin = strings.NewReader(table)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("dmsetup create %s: %w: %s", name, err, out)
	}
	return "/dev/mapper/" + name, nil
}

func plan(ctx context.Context, s *stand, m *measured, size int64) error {
	ssd, err := forgetful("ssd", ssdDisk, size)
	if err != nil {
		return err
	}
	ebs, err := forgetful("ebs", ebsDisk, size)
	if err != nil {
		return err
	}
	if err := s.create(ctx, volumeSpec{device: ssd, replica: ebs, size: size, journal: "8GiB", cow: "64MiB"}); err != nil {
		return err
	}
	if err := syncedZeros(ctx, ssd, ebs, size); err != nil {
		return err
	}
	if err := s.rig.StartAgent(ctx, &s.log); err != nil {
		return s.withLog(err)
	}
	if err := s.rig.Run(ctx, "restore", "data"); err != nil {
		return s.withLog(err)
	}
	if err := s.rig.Await(ctx, "replicated", 5*time.Minute, upToDate); err != nil {
		return s.withLog(err)
	}
	device, err := metadataDevice()
	if err != nil {
		return err
	}
	if err := s.planEpochs(ctx, m, device, size); err != nil {
		return err
	}
	blocks := int(size / volume.DefaultEraBlockBytes)
	var few, many []float64
	for _, part := range []struct {
		name, words string
		count       int
		into        *[]float64
	}{
		{"0.01%", "a ten-thousandth", blocks / 10000, &few},
		{"1%", "a hundredth", blocks / 100, &many},
	} {
		if once && part.name == "1%" {
			continue
		}
		mark := func() error { return s.mark(ctx, size, "64k", 1024, part.count) }
		if err := mark(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		describe := func(name, what, unit string) *row {
			return &row{Name: part.name + "/" + name, What: fmt.Sprintf(what, part.words+" of "+sizeText(size)), Unit: unit}
		}
		took := describe("time", "time to find out that %s changed, over that in which dd reads as much of the metadata (bs=1M iflag=direct)", "s")
		alone := describe("seconds", "time to find out that %s changed", "s")
		read := describe("metadata", "metadata read to find out that %s changed", "MiB")
		peak := describe("memory", "the agent's peak memory until it has found out that %s changed", "MiB")
		for n := range m.runs(5, 2) {
			p, err := s.planOnce(ctx, device, part.count, mark)
			if err != nil {
				return fmt.Errorf("%s: %w", part.name, err)
			}
			reading, err := readRate(ctx, device, p.read)
			if err != nil {
				return err
			}
			fmt.Printf("%s, %d: %+v, dd %s s\n", part.name, n+1, p, short(reading))
			took.Ours, took.Theirs = append(took.Ours, p.seconds), append(took.Theirs, reading)
			alone.Ours, read.Ours, peak.Ours = append(alone.Ours, p.seconds), append(read.Ours, p.read/(1<<20)), append(peak.Ours, p.peak)
		}
		*part.into = alone.Ours
		for _, r := range []*row{took, alone, read, peak} {
			m.add(*r)
		}
	}
	if many != nil {
		m.add(row{Name: "growth", What: "time to find out that a hundredth of " + sizeText(size) + " changed, over that for a ten-thousandth, of which it is a hundred times", Unit: "s", Ours: many, Theirs: few})
	}
	return nil
}

// planEpochs has epochs in which next to nothing was written: what each epoch
// costs whatever changes.
func (s *stand) planEpochs(ctx context.Context, m *measured, device string, size int64) error {
	took := row{Name: "epoch/seconds", What: "time to find out what changed since the epoch before, when 16 blocks of " + sizeText(size) + " did", Unit: "s"}
	read := row{Name: "epoch/metadata", What: "metadata read for that", Unit: "MiB"}
	for range m.runs(5, 2) {
		if _, err := fio(ctx, top, size, load{pattern: "randwrite", block: "64k", depth: 1, count: 16}); err != nil {
			return err
		}
		before, _, err := diskBytes(device)
		if err != nil {
			return err
		}
		from := s.log.Len()
		if err := s.settle(ctx); err != nil {
			return err
		}
		after, _, err := diskBytes(device)
		if err != nil {
			return err
		}
		found, err := s.entries("changed", from)
		if err != nil || len(found) == 0 {
			return errors.Join(err, errors.New("nobody asked what changed"))
		}
		took.Ours, read.Ours = append(took.Ours, found[len(found)-1].Seconds), append(read.Ours, (after-before)/float64(len(found))/(1<<20))
	}
	m.add(took)
	m.add(read)
	return nil
}

func sizeText(bytes int64) string { return fmt.Sprintf("%d TiB", bytes>>40) }

// metadataDevice is where the kernel keeps its marks of the volume. A volume's
// inner devices have no names but the kernel's.
func metadataDevice() (string, error) {
	names, _ := filepath.Glob("/sys/block/dm-*/dm/name")
	for _, path := range names {
		if name, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(name)) == "data-meta" {
			return "/dev/" + strings.Split(path, "/")[3], nil
		}
	}
	return "", errors.New("no mapped device is called data-meta")
}

// planned is what one answer took.
type planned struct {
	seconds float64
	read    float64 // bytes
	peak    float64 // MiB
}

// planOnce has a new session ask what changed, and ends it, with as much marked
// as before.
func (s *stand) planOnce(ctx context.Context, device string, count int, mark func() error) (p planned, err error) {
	// The most memory so far is counted anew from here.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.rig.AgentPid()), []byte("5"), 0); err != nil {
		return p, err
	}
	before, _, err := diskBytes(device)
	if err != nil {
		return p, err
	}
	from := s.log.Len()
	if err := s.rig.Run(ctx, "resume", "data"); err != nil {
		return p, s.withLog(err)
	}
	e, err := s.awaitEntry(ctx, "changed", from, 3*time.Minute)
	if err != nil {
		return p, err
	}
	after, _, err := diskBytes(device)
	if err != nil {
		return p, err
	}
	if _, p.peak, err = memory(s.rig.AgentPid()); err != nil {
		return p, err
	}
	// What follows from the answer is no part of this.
	if err := s.pauseMarked(ctx, from, mark); err != nil {
		return p, err
	}
	if e.Ranges < count*9/10 {
		return p, fmt.Errorf("%d places were written, %d found", count, e.Ranges)
	}
	p.seconds, p.read = e.Seconds, after-before
	return p, nil
}

// readRate is the time in which dd reads so many bytes from the start of a device.
func readRate(ctx context.Context, device string, bytes float64) (float64, error) {
	count := max(1, int64(bytes)>>20)
	cmd := exec.CommandContext(ctx, "dd", "if="+device, "of=/dev/null", "bs=1M", "count="+strconv.FormatInt(count, 10), "iflag=direct")
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("dd: %w: %s", err, out)
	}
	found := ddSays.FindSubmatch(out)
	if found == nil {
		return 0, fmt.Errorf("dd says: %s", out)
	}
	return strconv.ParseFloat(string(found[2]), 64)
}
