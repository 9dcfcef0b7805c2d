package protocol

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

// fileStore is a plain file; its flush does nothing, to see our own cost.
type fileStore struct {
	*os.File
	size int64
}

func (s fileStore) Size() int64  { return s.size }
func (s fileStore) Flush() error { return nil }
func (s fileStore) ZeroOut(offset, length int64) error {
	zeros := make([]byte, min(length, 1<<20))
	for ; length > 0; length -= int64(len(zeros)) {
		zeros = zeros[:min(length, int64(len(zeros)))]
		if _, err := s.WriteAt(zeros, offset); err != nil {
			return err
		}
		offset += int64(len(zeros))
	}
	return nil
}

// BenchmarkReplica measures frames to data area, in place and by the journal
// (set BLOCKFERRY_BENCH_DIR to where the file should be).
func BenchmarkReplica(b *testing.B) {
	const volume = 256 << 20
	dir := os.Getenv("BLOCKFERRY_BENCH_DIR")
	if dir == "" {
		dir = b.TempDir()
	}
	ctx := context.Background()
	image := testImage(rand.New(rand.NewPCG(1, 1)), 4<<20/BlockSize)
	for _, mode := range []Mode{ModeInPlace, ModeJournal} {
		for _, codec := range []Codec{CodecNone, CodecS2} {
			b.Run(fmt.Sprintf("mode%d/%v", mode, codec), func(b *testing.B) {
				o := FormatOptions{VolumeUUID: [16]byte{1}, SizeBytes: volume, JournalBytes: 2 * volume}
				f, err := os.Create(filepath.Join(dir, "replica"))
				if err != nil {
					b.Fatal(err)
				}
				defer os.Remove(f.Name())
				defer f.Close()
				store := fileStore{f, o.NeededBytes()}
				if err := f.Truncate(store.size); err != nil {
					b.Fatal(err)
				}
				if err := FormatReplica(store, o); err != nil {
					b.Fatal(err)
				}
				r, err := OpenReplica(ctx, store, OpenOptions{})
				if err != nil {
					b.Fatal(err)
				}
				defer r.Close()
				c, _ := NewCompressor(codec)
				b.SetBytes(volume)
				for epoch := uint64(1); b.Loop(); epoch++ {
					d := NewStreamDigest()
					lineage := Lineage{{Generation{1}, epoch}}
					if err := r.Begin(ctx, EpochStart{Epoch: epoch, Attempt: 1, Mode: mode, Full: true, Lineage: lineage}); err != nil {
						b.Fatal(err)
					}
					for at := int64(0); at < volume; at += 1 << 20 {
						frames := AppendFrames(make([]byte, 0, 1<<20+8192), FrameMeta{epoch, 1, 1}, at, image[at%int64(len(image)):][:1<<20], c)
						if err := d.AddFrames(frames); err != nil {
							b.Fatal(err)
						}
						if err := r.Append(ctx, 0, frames); err != nil {
							b.Fatal(err)
						}
					}
					if err := r.Commit(ctx, EpochCommit{Epoch: epoch, Attempt: 1, Streams: []StreamSum{d.Sum()}}); err != nil {
						b.Fatal(err)
					}
					if err := r.WaitApplied(ctx, epoch); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
