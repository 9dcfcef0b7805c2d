package protocol

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"blockferry/blockdev/blocktest"
)

// swappable is a disk that can be exchanged for another under its open handle.
type swappable struct{ *blocktest.Memory }

// Promise 1: a disk that was emptied or exchanged under an open replica gets no
// further epoch: incremental changes over another content are no image.
func TestSwappedDiskIsNoticedBeforeTheNextEpoch(t *testing.T) {
	const size = 4 << 20
	volume := [16]byte{1}
	o := FormatOptions{VolumeUUID: volume, SizeBytes: size, JournalBytes: 16 << 20}
	for name, other := range map[string]func(t *testing.T, own *blocktest.Memory) *blocktest.Memory{
		"emptied": func(t *testing.T, own *blocktest.Memory) *blocktest.Memory { return blocktest.NewMemory(own.Size()) },
		"exchanged for a new replica": func(t *testing.T, own *blocktest.Memory) *blocktest.Memory {
			m := blocktest.NewMemory(own.Size())
			if err := FormatReplica(m, o); err != nil {
				t.Fatal(err)
			}
			return m
		},
		"put back to an earlier state": nil,
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			disk := &swappable{blocktest.NewMemory(o.NeededBytes())}
			if err := FormatReplica(disk, o); err != nil {
				t.Fatal(err)
			}
			r, err := OpenReplica(ctx, disk, OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			early := disk.Clone()
			gen := Generation{9}
			epoch := func(n uint64, full bool) error {
				lineage := Lineage{{gen, n}}
				mode := ModeJournal
				if full {
					mode = ModeInPlace
				}
				if err := r.Begin(ctx, EpochStart{Epoch: n, Attempt: 1, Mode: mode, Full: full, Lineage: lineage}); err != nil {
					return err
				}
				data := make([]byte, 64<<10)
				for i := range data {
					data[i] = byte(rand.Uint32())
				}
				frames := AppendFrames(nil, FrameMeta{Epoch: n, Attempt: 1}, int64(n)*65536, data, nil)
				digest := NewStreamDigest()
				if err := digest.AddFrames(frames); err != nil {
					t.Fatal(err)
				}
				if err := r.Append(ctx, 0, frames); err != nil {
					return err
				}
				return r.Commit(ctx, EpochCommit{Epoch: n, Attempt: 1, Streams: []StreamSum{digest.Sum()}})
			}
			for n := uint64(1); n <= 3; n++ {
				if err := epoch(n, n == 1); err != nil {
					t.Fatal(err)
				}
				if err := r.WaitApplied(ctx, n); err != nil {
					t.Fatal(err)
				}
			}
			if other == nil {
				disk.Memory = early
			} else {
				disk.Memory = other(t, disk.Memory)
			}
			if err := epoch(4, false); !errors.Is(err, ErrChangedOutside) {
				t.Fatalf("an epoch was taken on another disk: %v", err)
			}
			if r.Status().Err == nil {
				t.Error("the replica goes on")
			}
		})
	}
}
