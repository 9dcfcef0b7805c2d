package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
)

const (
	// sentBytes is the volume's size there, sentBlocks how many blocks of 4 KiB
	// are changed, far apart.
	sentBytes  = 512 << 20
	sentBlocks = 512
)

// sentPerChanged changes few blocks, so that the kernel's coarse mark names
// much more than changed, and follows the bytes: on the wire, and on both
// disks as the kernel counts them.
func sentPerChanged(ctx context.Context, s *stand, m *measured) error {
	if err := fill(ssdDisk, sentBytes+1<<20, 4); err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(3, 3))
	grains := eraBlocks
	if onDebian() {
		grains = []string{"64KiB"} // beside what is tracked exactly the era's grain does not matter
	}
	for _, grain := range grains {
		// Cuts are taken by hand, so that each run is one epoch.
		if err := s.replicated(ctx, volumeSpec{size: sentBytes, eraBlock: grain, interval: time.Hour, journal: "64MiB", cow: "64MiB"}); err != nil {
			return err
		}
		describe := func(name, what string) *row {
			return &row{Name: grain + "/" + name, What: what + " per byte changed by 4 KiB writes at random, era-block " + grain, Unit: "bytes"}
		}
		sent := describe("sent", "bytes on the wire, both ways, checksums included,")
		rows := []*row{
			sent,
			describe("read-from-ssd", "bytes read from the SSD"),
			describe("read-from-replica", "bytes read from the replica"),
			describe("written-to-replica", "bytes written to the replica"),
		}
		for range m.runs(5, 2) {
			if err := s.settle(ctx); err != nil {
				return err
			}
			time.Sleep(300 * time.Millisecond) // the replica applies
			from := s.log.Len()
			ssdBefore, _, err := diskBytes(ssdDisk)
			if err != nil {
				return err
			}
			readBefore, writtenBefore, err := diskBytes(ebsDisk)
			if err != nil {
				return err
			}
			if err := overwrite(top, sentBytes, sentBlocks, random); err != nil {
				return err
			}
			if err := s.settle(ctx); err != nil {
				return err
			}
			e, err := s.awaitEntry(ctx, "epoch committed", from, 10*time.Second)
			if err != nil {
				return err
			}
			if e.Stats.Link.SentBytes < sentBlocks*4096 {
				return fmt.Errorf("that was not the epoch of %d changed blocks: %+v", sentBlocks, e.Stats)
			}
			time.Sleep(300 * time.Millisecond)
			ssdAfter, _, err := diskBytes(ssdDisk)
			if err != nil {
				return err
			}
			readAfter, writtenAfter, err := diskBytes(ebsDisk)
			if err != nil {
				return err
			}
			for i, x := range []float64{float64(e.Stats.Link.WireBytes + e.Stats.Link.CheckBytes), ssdAfter - ssdBefore, readAfter - readBefore, writtenAfter - writtenBefore} {
				rows[i].Ours = append(rows[i].Ours, x)
				rows[i].Theirs = append(rows[i].Theirs, sentBlocks*4096)
			}
		}
		for _, r := range rows {
			m.add(*r)
		}
		if err := s.gone(ctx); err != nil {
			return err
		}
	}
	return nil
}
