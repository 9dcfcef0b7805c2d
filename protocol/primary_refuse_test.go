package protocol

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"blockferry/proto"
)

// What must not be written is refused before anything is.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*PrimaryConfig)
		state  func() SourceState
		want   string
	}{
		{"another volume", func(c *PrimaryConfig) { c.VolumeUUID = [16]byte{8} }, nil, "holds volume 07"},
		{"another replica", func(c *PrimaryConfig) { c.Replicas[0].Name = "nvme" }, nil, `no replica "nvme"`},
		{"another size", func(c *PrimaryConfig) { c.Source = newMemSource(4<<20, BlockSize) }, nil, "formatted for a volume of"},
		{"no common history", nil, nil, "no history in common"},
		// The label is an old one, as after a disk was copied back: the number of
		// the next epoch is one the replica knows with another content.
		{"the label was turned back", nil, func() SourceState {
			return SourceState{Lineage: line(1, 1), Generation: gen(1), Clean: true}
		}, "split brain"},
		{"the label was turned back, unclean", nil, func() SourceState {
			return SourceState{Lineage: line(1, 1), Generation: gen(1), OpenEpoch: 2}
		}, "split brain"},
	} {
		t.Run(c.name, func(t *testing.T) {
			src := newMemSource(testVolumeSize, BlockSize)
			wroteSome(src, 0, 100)
			n := newNode(t, "ebs", testVolumeSize, 32<<20)
			// The replica belongs to generation 1, epoch 2.
			link, err := Connect(t.Context(), n.client(), LinkConfig{VolumeUUID: testUUID, SizeBytes: testVolumeSize, Replica: "ebs"}, line(1, 2))
			if err != nil {
				t.Fatal(err)
			}
			err = link.Begin(t.Context(), EpochStart{Epoch: 2, Mode: ModeInPlace, Full: true, Lineage: line(1, 2)}, false)
			if err == nil {
				_, err = link.SendRound(t.Context(), Round{Source: src, Ranges: []Range{{0, testVolumeSize}}})
			}
			if err == nil {
				err = link.Commit(t.Context(), line(1, 2), 0)
			}
			if err != nil {
				t.Fatal(err)
			}
			link.Close()
			before := n.store.Clone()
			state := &memState{}
			if c.state != nil {
				state.b = mustEncode(t, c.state())
			}
			r := startRig(t, src, state, []*node{n}, c.change)
			var report ReplicaReport
			eventually(t, c.want, func() bool {
				report = r.p.Status().Replicas[0]
				return strings.Contains(report.Reason, c.want)
			})
			if len(r.epoch) > 0 {
				t.Fatalf("epochs were committed: %v", r.epoch)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			if _, _, err := r.p.SyncNow(ctx); err == nil {
				t.Fatal("SyncNow succeeded")
			}
			a, b := make([]byte, before.Size()), make([]byte, before.Size())
			if _, err := before.ReadAt(a, 0); err != nil {
				t.Fatal(err)
			}
			if _, err := n.store.ReadAt(b, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(a, b) {
				t.Fatal("the refused replica was written to")
			}
		})
	}
}

// A replica that speaks other versions is refused by name.
func TestVersionMismatch(t *testing.T) {
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	stream, err := proto.NewReplicationClient(n.conn).Replicate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&proto.FromPrimary{Message: &proto.FromPrimary_Hello{Hello: &proto.Hello{
		Version: 9, MinVersion: 8, VolumeUuid: testUUID[:], Replica: "ebs", SizeBytes: testVolumeSize, HashKey: make([]byte, 16)}}}); err != nil {
		t.Fatal(err)
	}
	m, err := stream.Recv()
	if err != nil || m.GetRefused().GetReason() != proto.Reason_REASON_VERSION {
		t.Fatalf("%v, %v", m, err)
	}
}

// A second session for the same replica is refused while the first lives.
func TestOneSessionPerReplica(t *testing.T) {
	n := newNode(t, "ebs", testVolumeSize, 32<<20)
	cfg := LinkConfig{VolumeUUID: testUUID, SizeBytes: testVolumeSize, Replica: "ebs"}
	first, err := Connect(t.Context(), n.client(), cfg, line(1, 1))
	if err != nil {
		t.Fatal(err)
	}
	var refused *RefusedError
	if _, err := Connect(t.Context(), n.client(), cfg, line(2, 1)); !errors.As(err, &refused) || refused.Reason != proto.Reason_REASON_BUSY {
		t.Fatalf("the second session: %v", err)
	}
	first.Close()
	eventually(t, "the place is free again", func() bool {
		l, err := Connect(t.Context(), n.client(), cfg, line(1, 1))
		if err == nil {
			l.Close()
		}
		return err == nil
	})
}

// A session that is lost with an epoch open leaves it to the next, which may go on
// with it, or begin another: then the journal's room is given back.
func TestSessionEndKeepsTheOpenEpoch(t *testing.T) {
	src, n, r := syncedRig(t, BlockSize, 2000)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.p.Stop(ctx, nil); err != nil {
		t.Fatal(err)
	}
	n.check(src)
	free := n.rep.JournalFree()
	link := n.connect(n.rep.Status().Lineage)
	next := Position{gen(50), n.rep.Status().Committed.Epoch + 1}
	start := EpochStart{Epoch: next.Epoch, Mode: ModeJournal, Lineage: link.Lineage().Extend(next)}
	err := link.Begin(t.Context(), start, false)
	if err == nil {
		_, err = link.SendRound(t.Context(), Round{Source: src, Ranges: []Range{{0, testVolumeSize}}})
	}
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the frames are in the journal", func() bool { return n.rep.JournalFree() < free-4<<20 })
	link.Close()
	link = n.connect(link.Lineage())
	if k := link.welcome.Kept; k == nil || k.Epoch != next.Epoch || n.rep.JournalFree() > free-4<<20 {
		t.Fatalf("%v is kept, %d bytes of the journal are free", k, n.rep.JournalFree())
	}
	if err := link.Begin(t.Context(), start, false); err != nil {
		t.Fatal(err)
	}
	if now := n.rep.JournalFree(); now < free-1<<20 {
		t.Errorf("%d bytes of the journal are free, want about %d", now, free)
	}
	// A session that broke the rules leaves nothing.
	if err := link.send(&proto.FromPrimary{}); err != nil {
		t.Fatal(err)
	}
	<-link.Dead()
	if link = n.connect(link.Lineage()); link.welcome.Kept != nil {
		t.Errorf("%v is kept after a refusal", link.welcome.Kept)
	}
}
