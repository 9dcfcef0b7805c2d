package agent

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/layout"
	"blockferry/protocol"
)

// BenchmarkTakeOver is the time from the decision to a disk that may come up as
// primary, with 256 MiB committed and not applied. BLOCKFERRY_BENCH_DIR is where the
// disk is; flushes count.
func BenchmarkTakeOver(b *testing.B) {
	const size, pending = 512 << 20, 256 << 20
	dir := os.Getenv("BLOCKFERRY_BENCH_DIR")
	if dir == "" {
		dir = b.TempDir()
	}
	path := filepath.Join(dir, "takes-over")
	noise := make([]byte, 1<<20)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	b.SetBytes(pending)
	for b.Loop() {
		b.StopTimer()
		disk, at := pendingDisk(b, path, size, pending, noise)
		b.StartTimer()
		if _, err := takeOver(context.Background(), disk, protocol.OpenOptions{}, knowledge{Heard: protocol.Heard{Lineage: at}}, false); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		disk.Close()
		os.Remove(path)
		b.StartTimer()
	}
}

// pendingDisk is a secondary's disk whose journal has an epoch that is not applied.
func pendingDisk(b *testing.B, path string, size, pending int64, noise []byte) (*blockdev.File, protocol.Lineage) {
	b.Helper()
	check := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	f, err := os.Create(path)
	check(err)
	check(f.Truncate(2 << 30))
	check(f.Close())
	disk, err := blockdev.OpenFile(path, blockdev.OpenOptions{Write: true})
	check(err)
	v := &config.Volume{Name: "data", Copy: &config.Replica{JournalBytes: 2 * pending}, CowBytes: config.MinCowBytes}
	state, err := protocol.SourceState{Secondary: true}.Encode()
	check(err)
	label, err := volume.FormatOn(disk, volume.UUID{7}, layout.Switching(v, size), state)
	check(err)
	format := layout.OnLabelled(label)
	at := protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}}
	format.Holds = &protocol.Holding{Lineage: at, Since: 5}
	check(protocol.FormatReplica(disk, format))
	ctx := context.Background()
	r, err := protocol.OpenReplica(ctx, disk, protocol.OpenOptions{})
	check(err)
	image, err := r.Hold(ctx) // keeps it from being applied
	check(err)
	at = at.Extend(protocol.Position{Generation: at.Tip().Generation, Epoch: 6})
	digest := protocol.NewStreamDigest()
	check(r.Begin(ctx, protocol.EpochStart{Epoch: 6, Attempt: 1, Mode: protocol.ModeJournal, Lineage: at}))
	for offset := int64(0); offset < pending; offset += 1 << 20 {
		frames := protocol.AppendFrames(make([]byte, 0, 1<<20+8192), protocol.FrameMeta{Epoch: 6, Attempt: 1, Round: 1}, offset, noise, nil)
		check(digest.AddFrames(frames))
		check(r.Append(ctx, 0, frames))
	}
	check(r.Commit(ctx, protocol.EpochCommit{Epoch: 6, Attempt: 1, Streams: []protocol.StreamSum{digest.Sum()}}))
	go image.Release()
	check(r.Close())
	return disk, at
}
