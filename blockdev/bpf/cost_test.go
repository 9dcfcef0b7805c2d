package bpf

import (
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Within a window nothing may be allocated: the memory might have to come from
// a page on the way to the very disk that stands still.
func TestExchangeAllocatesNothing(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	tracker := open(t, d.target(newPin(t)))
	covered(t, tracker, 1)
	f := d.open(t, unix.O_DIRECT)
	defer f.Close()
	buffer := noise(rand.New(rand.NewPCG(1, 1)), 4096)
	offset := int64(0)
	took := make([]time.Duration, 0, 100)
	if n := testing.AllocsPerRun(50, func() {
		offset += 4096 * 3
		if _, err := unix.Pwrite(int(f.Fd()), buffer, offset); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		tracker.ExchangeStopped()
		took = append(took, time.Since(start))
	}); n != 0 {
		t.Errorf("%v allocations in an exchange", n)
	}
	slices.Sort(took)
	t.Logf("an exchange took %s, half of them %s at most", took[0], took[len(took)/2])
	if taken := tracker.Taken(); len(taken) != 1 || taken[0].Offset != offset {
		t.Errorf("the last exchange took %v, want the block at %d", taken, offset)
	}
}

// BenchmarkExchange takes blocks marked at random out of volumes of 1 and 4 TiB,
// out of cold caches.
func BenchmarkExchange(b *testing.B) {
	for _, c := range []struct{ tebibytes, marked int64 }{{1, 0}, {1, 1000}, {1, 4000}, {1, 16000}, {4, 4000}} {
		b.Run(strconv.FormatInt(c.tebibytes, 10)+"TiB-"+strconv.FormatInt(c.marked, 10), func(b *testing.B) {
			grains := c.tebibytes << 40 / 4096
			active, kept := marksOn(make([]uint64, markMemory(grains)), grains), marksOn(make([]uint64, markMemory(grains)), grains)
			log := newTakenLog(takenWords)
			rng := rand.New(rand.NewPCG(1, 1))
			cold := make([]uint64, 64<<20/8)
			for i := range kept.words {
				kept.words[i], active.words[i] = 0, 0 // so that the memory is there
			}
			var took []time.Duration
			for b.Loop() {
				for range c.marked {
					grain := rng.Int64N(grains)
					active.words[grain/wordBits] |= 1 << (grain % wordBits)
					active.lines[grain/wordBits/lineWords/wordBits] |= 1 << (grain / wordBits / lineWords % wordBits)
				}
				for i := range cold {
					cold[i]++
				}
				log.reset()
				start := time.Now()
				exchange(active, kept, log, nil)
				took = append(took, time.Since(start))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[0].Microseconds()), "best-µs")
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "median-µs")
			b.ReportMetric(0, "ns/op")
			if log.rest != noRest || c.marked > 0 && log.used == 0 {
				b.Fatalf("%d words taken", log.used)
			}
		})
	}
}

// BenchmarkMark measures what the kernel spends in the programs for one write
// of 4 KiB to the disk they follow, and for one to another disk.
func BenchmarkMark(b *testing.B) {
	for name, newDisk := range map[string]func(testing.TB, int64) disk{"requests": newFastLoop, "bios": newZram} {
		b.Run(name, func(b *testing.B) {
			d, other := newDisk(b, 256<<20), newDisk(b, 256<<20)
			tracker := open(b, d.target(newPin(b)))
			stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
			if err != nil {
				b.Fatal(err)
			}
			defer stats.Close()
			spent := func() (runtime time.Duration, runs uint64) {
				for _, p := range tracker.kernel.programs {
					s, err := p.Stats()
					if err != nil {
						b.Fatal(err)
					}
					runtime += s.Runtime
					runs += s.RunCount
				}
				return runtime, runs
			}
			for range b.N {
				for metric, to := range map[string]disk{"ns/write": d, "ns/write-elsewhere": other} {
					const writes = 50_000
					before, runs := spent()
					to.fio(b, "--ioengine=libaio", "--direct=1", "--iodepth=16", "--number_ios="+strconv.Itoa(writes))
					after, now := spent()
					if now-runs < writes {
						b.Fatalf("%d events for %d writes", now-runs, writes)
					}
					b.ReportMetric(float64((after-before).Nanoseconds())/writes, metric)
				}
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkWriters is the throughput of writers with tracking as a ratio to that
// without, in alternate runs on a loop device over memory: the fastest disk
// there is here, and so the worst case. An exchange is made every 100 ms.
func BenchmarkWriters(b *testing.B) {
	for _, load := range [][]string{
		{"randwrite-4k-qd1", "--iodepth=1"},
		{"randwrite-4k-qd16", "--iodepth=16"},
		{"write-256k-qd4", "--rw=write", "--bs=256k", "--iodepth=4"},
		{"randwrite-4k-fdatasync", "--iodepth=1", "--fdatasync=1"},
	} {
		b.Run(load[0], func(b *testing.B) {
			d, pin := newFastLoop(b, 512<<20), newPin(b)
			measure := func() float64 {
				options := append([]string{"--ioengine=libaio", "--direct=1", "--time_based", "--runtime=2", "--ramp_time=1s"}, load[1:]...)
				command := d.fioCommand(append(options, "--output-format=terse", "--output=/dev/stdout")...)
				command.Stdout = nil
				out, err := command.Output()
				if err != nil {
					b.Fatal(err)
				}
				fields := strings.Split(string(out), ";")
				rate, err := strconv.ParseFloat(fields[47], 64) // KiB/s written
				if err != nil {
					b.Fatal(err)
				}
				return rate
			}
			var ratios []float64
			for range max(b.N, 5) {
				without := measure()
				tracker := open(b, d.target(pin))
				ended, done := make(chan struct{}), make(chan struct{})
				go func() {
					defer close(done)
					for {
						select {
						case <-ended:
							return
						case <-time.After(100 * time.Millisecond):
							tracker.Exchange()
							tracker.Taken()
						}
					}
				}()
				with := measure()
				close(ended)
				<-done
				if err := tracker.Remove(); err != nil {
					b.Fatal(err)
				}
				b.Logf("%.0f KiB/s without, %.0f with: %.3f", without, with, with/without)
				ratios = append(ratios, with/without)
			}
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "ratio")
			b.ReportMetric(0, "ns/op")
		})
	}
}
