package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/protocol"
)

// rssBytes is the volume's size there; both disks are sparse.
const rssBytes = 1 << 40

// agentRSS has an agent with a volume of 1 TiB, marks some of it, and looks
// how long it takes to find that again, and how much memory it has taken.
func agentRSS(ctx context.Context, s *stand, m *measured) error {
	if err := s.create(ctx, volumeSpec{size: rssBytes, journal: "8GiB"}); err != nil {
		return err
	}
	if err := syncedZeros(ctx, ssdDisk, ebsDisk, rssBytes); err != nil {
		return err
	}
	if err := s.rig.StartAgent(ctx, &s.log); err != nil {
		return s.withLog(err)
	}
	if err := s.rig.Run(ctx, "restore", "data"); err != nil {
		return s.withLog(err)
	}
	if err := s.rig.Await(ctx, "replicated", time.Minute, upToDate); err != nil {
		return s.withLog(err)
	}
	const blocks = rssBytes / (64 << 10)
	var resident, peak []float64
	for _, part := range []struct {
		name        string
		count       int
		full, quick int // runs
	}{
		{"0.01%", blocks / 10000, 5, 2},
		{"0.1%", blocks / 1000, 5, 2},
		{"1%", blocks / 100, 5, 0},
	} {
		if m.runs(part.full, part.quick) == 0 {
			continue
		}
		plan := row{Name: "plan-" + part.name, Unit: "s", What: fmt.Sprintf("time to find out what changed in 1 TiB after %d places were written, %s of its blocks of 64 KiB", part.count, part.name)}
		mark := func() error { return s.mark(ctx, rssBytes, "4k", 64, part.count) }
		if err := mark(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		for range m.runs(part.full, part.quick) {
			// Each session asks anew.
			from := s.log.Len()
			if err := s.rig.Run(ctx, "resume", "data"); err != nil {
				return s.withLog(err)
			}
			e, err := s.awaitEntry(ctx, "changed", from, time.Minute)
			if err != nil {
				return err
			}
			if e.Ranges < part.count*9/10 {
				return s.withLog(fmt.Errorf("%s: %d places were written, %d found", part.name, part.count, e.Ranges))
			}
			plan.Ours = append(plan.Ours, e.Seconds)
			if err := s.pauseMarked(ctx, from, mark); err != nil {
				return fmt.Errorf("%s: %w", part.name, err)
			}
		}
		m.add(plan)
		// What is marked is sent, as far as it goes in a while.
		if err := s.rig.Run(ctx, "resume", "data"); err != nil {
			return s.withLog(err)
		}
		sending, cancel := context.WithTimeout(ctx, 30*time.Second)
		_ = s.rig.Run(sending, "sync", "--wait", "--timeout", "25s", "data") // if it takes longer that is no error here
		cancel()
		now, most, err := memory(s.rig.AgentPid())
		if err != nil {
			return err
		}
		resident, peak = append(resident, now), append(peak, most)
	}
	m.add(row{Name: "rss", Unit: "MiB", What: "the agent's resident memory after each of these, part or all of it sent", Ours: resident})
	m.add(row{Name: "rss-peak", Unit: "MiB", What: "the most it had been until then, a restore of the (empty) volume included", Ours: peak[len(peak)-1:]})
	return nil
}

// mark writes blocks to count places of a volume while replication is paused.
// Deep, one commit of the kernel's marks serves many writes.
func (s *stand) mark(ctx context.Context, size int64, block string, depth, count int) error {
	if err := s.rig.Run(ctx, "pause", "data"); err != nil {
		return s.withLog(err)
	}
	w, err := fio(ctx, top, size, load{pattern: "randwrite", block: block, depth: depth, count: count})
	if err == nil {
		fmt.Printf("%d places written, %.0f a second\n", count, w.iops)
	}
	return err
}

// pauseMarked pauses replication and marks again if an epoch was committed after
// Len was from: when little is marked it may all be sent before the pause.
func (s *stand) pauseMarked(ctx context.Context, from int, mark func() error) error {
	if err := s.rig.Run(ctx, "pause", "data"); err != nil {
		return s.withLog(err)
	}
	committed, err := s.entries("epoch committed", from)
	if err == nil && len(committed) > 0 {
		err = mark()
	}
	return err
}

// memory is what a process has resident, and the most it ever had, in MiB.
func memory(pid int) (now, peak float64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for key, into := range map[string]*float64{"VmRSS": &now, "VmHWM": &peak} {
		var kib float64
		if _, err := fmt.Sscan(field(string(text), key, ""), &kib); err != nil {
			return 0, 0, fmt.Errorf("%s of process %d: %w", key, pid, err)
		}
		*into = kib / 1024
	}
	return now, peak, nil
}

// syncedZeros makes disks that were never written what a restore leaves that
// has only its comparison before it: the replica holds an epoch that is all zeros,
// as is the SSD. To copy a terabyte of zeros would take an hour.
func syncedZeros(ctx context.Context, ssd, ebs string, size int64) (err error) {
	lineage := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 1}}
	disk, err := blockdev.OpenFile(ebs, blockdev.OpenOptions{Write: true, Exclusive: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	replica, err := protocol.OpenReplica(ctx, neverWritten{disk, size}, protocol.OpenOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, replica.Close()) }()
	start := protocol.EpochStart{Epoch: 1, Attempt: 1, Mode: protocol.ModeInPlace, Full: true, Lineage: lineage}
	if err := replica.Begin(ctx, start); err != nil {
		return err
	}
	digest := protocol.NewStreamDigest()
	const piece = 64 << 30
	var frames []byte
	for offset := int64(0); offset < size; offset += piece {
		frames = protocol.AppendZeroFrames(frames[:0], protocol.FrameMeta{Epoch: 1, Attempt: 1}, protocol.Range{Offset: offset, Length: min(piece, size-offset)})
		for r := protocol.NewFrameReader(frames); r.More(); {
			f, err := r.Next()
			if err != nil {
				return err
			}
			digest.Add(f.Header)
		}
		if err := replica.Append(ctx, 0, frames); err != nil {
			return err
		}
	}
	if err := replica.Commit(ctx, protocol.EpochCommit{Epoch: 1, Attempt: 1, Streams: []protocol.StreamSum{digest.Sum()}}); err != nil {
		return err
	}
	state, err := protocol.SourceState{Restore: &protocol.RestoreState{Replica: "ebs", Lineage: lineage, OffsetBytes: uint64(size), Verifying: true}}.Encode()
	if err != nil {
		return err
	}
	offline, err := volume.OpenOffline(ssd)
	if err != nil {
		return err
	}
	return errors.Join(offline.SetState(state), offline.Close())
}

// neverWritten is a disk whose data area reads as zeros already.
type neverWritten struct {
	*blockdev.File
	size int64 // of its data area
}

func (n neverWritten) ZeroOut(offset, length int64) error {
	if offset+length <= n.size {
		return nil
	}
	return n.File.ZeroOut(offset, length)
}
