package protocol

import (
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"blockferry/proto"
)

// ram is a device without any cost but the copying.
type ram struct{ b []byte }

func (r *ram) Name() string { return "ram" }
func (r *ram) Size() int64  { return int64(len(r.b)) }
func (r *ram) Flush() error { return nil }
func (r *ram) ReadAt(p []byte, off int64) (int, error) {
	return copy(p, r.b[off:off+int64(len(p))]), nil
}
func (r *ram) WriteAt(p []byte, off int64) (int, error) {
	return copy(r.b[off:off+int64(len(p))], p), nil
}
func (r *ram) ZeroOut(off, n int64) error { clear(r.b[off : off+n]); return nil }

// BenchmarkLink sends a volume over a Unix socket to a replica in memory: in
// place, through the journal, and compared only.
func BenchmarkLink(b *testing.B) {
	const size = 128 << 20
	src := &ram{make([]byte, size)}
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range src.b {
		src.b[i] = byte(rng.Uint32()) & 0x3f // packs to about three quarters
	}
	for _, codec := range []Codec{CodecNone, CodecS2} {
		for _, way := range []string{"in-place", "journal", "equal"} {
			b.Run(fmt.Sprintf("%v/%s", codec, way), func(b *testing.B) {
				o := FormatOptions{VolumeUUID: testUUID, SizeBytes: size, JournalBytes: 2 * size}
				store := &ram{make([]byte, o.NeededBytes())}
				if err := FormatReplica(store, o); err != nil {
					b.Fatal(err)
				}
				rep, err := OpenReplica(b.Context(), store, OpenOptions{})
				if err != nil {
					b.Fatal(err)
				}
				defer rep.Close()
				recv := NewReceiver(ReceiverConfig{})
				defer recv.Close()
				if err := recv.Add("ram", rep); err != nil {
					b.Fatal(err)
				}
				server := grpc.NewServer(grpc.MaxRecvMsgSize(MaxMessageBytes))
				proto.RegisterReplicationServer(server, recv)
				path := filepath.Join(b.TempDir(), "s")
				lis, err := net.Listen("unix", path)
				if err != nil {
					b.Fatal(err)
				}
				go func() { _ = server.Serve(lis) }()
				defer server.Stop()
				conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
				if err != nil {
					b.Fatal(err)
				}
				defer conn.Close()
				l, err := Connect(b.Context(), proto.NewReplicationClient(conn), LinkConfig{VolumeUUID: testUUID, SizeBytes: size, Replica: "ram", Codec: codec}, line(1, 1))
				if err != nil {
					b.Fatal(err)
				}
				defer l.Close()
				epoch := uint64(0)
				send := func(mode Mode, narrow bool) {
					epoch++
					lineage := Lineage{{gen(1), epoch}}
					err := l.Begin(b.Context(), EpochStart{Epoch: epoch, Mode: mode, Full: mode == ModeInPlace, Lineage: lineage}, false)
					if err == nil {
						_, err = l.SendRound(b.Context(), Round{Source: src, Ranges: []Range{{0, size}}, Narrow: narrow})
					}
					if err == nil {
						err = l.Commit(b.Context(), lineage, 0)
					}
					if err == nil {
						err = rep.WaitApplied(b.Context(), epoch)
					}
					if err != nil {
						b.Fatal(err)
					}
				}
				send(ModeInPlace, false)
				b.SetBytes(size)
				b.ResetTimer()
				for range b.N {
					switch way {
					case "in-place":
						send(ModeInPlace, false)
					case "journal":
						send(ModeJournal, false)
					case "equal":
						send(ModeJournal, true)
					}
				}
			})
		}
	}
}
