package protocol

import (
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
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

// BenchmarkLink sends a volume to a replica in memory, within the process and
// over loopback: in place, through the journal, and compared only. Beside the
// time it tells the CPU's, which others on the machine change less.
func BenchmarkLink(b *testing.B) {
	poison = nil // not here
	const size = 128 << 20
	src := &ram{make([]byte, size)}
	rng := rand.New(rand.NewPCG(1, 1))
	for i := range src.b {
		src.b[i] = byte(rng.Uint32()) & 0x3f // packs to about three quarters
	}
	for _, transport := range []string{"local", "tcp"} {
		for _, codec := range []string{"none", "s2", "auto"} {
			for _, way := range []string{"in-place", "journal", "equal"} {
				b.Run(fmt.Sprintf("%s/%s/%s", transport, codec, way), func(b *testing.B) {
					o := FormatOptions{VolumeUUID: testUUID, SizeBytes: size, JournalBytes: 2 * size}
					rep, recv := servedReplicaOn(b, &ram{make([]byte, o.NeededBytes())}, o)
					config := LinkConfig{VolumeUUID: testUUID, SizeBytes: size, Replica: "ebs", Codec: CodecS2, Adapt: codec == "auto"}
					if codec == "none" {
						config.Codec = CodecNone
					}
					client := LocalClient(recv)
					if transport == "tcp" {
						client = wireClient(b, recv, ServerOptions())
					} else {
						config.BatchBytes = LocalBatchBytes
					}
					l, err := Connect(b.Context(), client, config, line(1, 1))
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
					before := cpuSeconds(b)
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
					b.ReportMetric((cpuSeconds(b)-before)/float64(b.N)*float64(1<<30)/size, "cpu-s/GiB")
				})
			}
		}
	}
}

// cpuSeconds is what this process has used, the kernel's part included.
func cpuSeconds(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
