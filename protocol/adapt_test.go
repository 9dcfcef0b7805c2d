package protocol

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"blockferry/proto"
)

var everyCodec = []string{CodecS2.String(), CodecZstd.String()}

// packWorld says what four workers spend on a byte, in nanoseconds.
type packWorld struct {
	read float64           // of one worker
	link float64           // on the wire, for all
	pack map[Codec]float64 // of one worker
	left map[Codec]float64 // of a byte, packed
}

// cost of bytes packed with c: with four workers the link is full, or it is not waited for.
func (w packWorld) cost(c Codec, bytes int64) packCost {
	busy := w.read + w.pack[c]
	all := max(busy, 4*w.link*w.left[c])
	ns := func(f float64) time.Duration { return time.Duration(f * float64(bytes)) }
	return packCost{codec: c, bytes: bytes, wire: int64(w.left[c] * float64(bytes)), pack: ns(w.pack[c]), link: ns(all - busy), total: ns(all)}
}

var (
	packText  = map[Codec]float64{CodecNone: 1, CodecS2: 0.4, CodecZstd: 0.25}
	packNoise = map[Codec]float64{CodecNone: 1, CodecS2: 1, CodecZstd: 1}
	packSpeed = map[Codec]float64{CodecNone: 0.1, CodecS2: 2, CodecZstd: 6}
	// What does not shrink passes nearly at once.
	packSpeedNoise = map[Codec]float64{CodecNone: 0.1, CodecS2: 0.2, CodecZstd: 0.5}
)

// drive has p told of data, in one long round or in rounds of 16 MiB that fit into what lies
// between, and returns how many samples' worth was packed with what, how often that changed,
// and what all of it cost the workers.
func (p *packing) drive(long bool, samples int, turn func(sample int) packWorld) (with map[Codec]int, changes int, spent time.Duration) {
	with = map[Codec]int{}
	const batch, round = 4 << 20, 16 << 20
	now := time.Unix(1000, 0)
	p.begin(1<<40, 4, now)
	at := p.codec()
	for bytes := int64(0); bytes < int64(samples)*packStretchBytes; bytes += batch {
		w := turn(int(bytes / packStretchBytes))
		c := w.cost(p.codec(), batch)
		spent += c.total
		with[p.codec()]++
		if long {
			p.spent(c)
		} else {
			wait := c.link
			c.link, c.total = 0, c.total-c.link
			p.spent(c)
			if (bytes+batch)%round == 0 {
				p.sent(now, false)
				now = now.Add(wait * (round / batch) / 4)
				p.stored(now)
				p.begin(round, 4, now)
			}
		}
		if now := p.codec(); now != at {
			at = now
			changes++
		}
	}
	for c := range with {
		with[c] /= packStretchBytes / batch
	}
	return with, changes, spent
}

// The slower side decides: a link that holds workers up has data packed harder, a
// processor that does has it packed less, and where it is neither all stays as it is.
func TestPackingSuitsTheSlowerSide(t *testing.T) {
	for _, c := range []struct {
		name  string
		world packWorld
		first Codec
		want  Codec
	}{
		{"25 Gbit/s, fast disk", packWorld{0.3, 0.32, packSpeed, packText}, CodecS2, CodecNone},
		{"25 Gbit/s, from zstd", packWorld{0.3, 0.32, packSpeed, packText}, CodecZstd, CodecNone},
		{"5 Gbit/s", packWorld{0.3, 1.6, packSpeed, packText}, CodecNone, CodecS2},
		{"100 Mbit/s", packWorld{0.3, 80, packSpeed, packText}, CodecS2, CodecZstd},
		{"100 Mbit/s, from nothing", packWorld{0.3, 80, packSpeed, packText}, CodecNone, CodecZstd},
		{"a slow disk", packWorld{20, 0.32, packSpeed, packText}, CodecS2, CodecS2},
		{"a slow disk, packed hard", packWorld{20, 0.32, packSpeed, packText}, CodecZstd, CodecZstd},
		{"what does not shrink, 100 Mbit/s", packWorld{0.3, 80, packSpeedNoise, packNoise}, CodecS2, CodecS2},
	} {
		for _, long := range []bool{true, false} {
			p := newPacking(c.first, everyCodec)
			const all = 400
			with, changes, _ := p.drive(long, all, func(int) packWorld { return c.world })
			if with[c.want] < all*17/20 {
				t.Errorf("%s, long rounds %v: of %d samples %v, want most with %v", c.name, long, all, with, c.want)
			}
			if changes > 40 { // each trial that fails is two
				t.Errorf("%s, long rounds %v: it changed %d times", c.name, long, changes)
			}
		}
	}
}

// Data of two kinds by turns, and a link that is now fast and now slow, do not have it
// change all the time, and cost hardly more than the best codec would.
func TestPackingDoesNotFlap(t *testing.T) {
	slowText, slowNoise := packWorld{0.3, 80, packSpeed, packText}, packWorld{0.3, 80, packSpeedNoise, packNoise}
	fastText, fastNoise := packWorld{0.3, 0.32, packSpeed, packText}, packWorld{0.3, 0.32, packSpeedNoise, packNoise}
	for name, kinds := range map[string][2]packWorld{
		"a slow link": {slowText, slowNoise}, "a fast link": {fastText, fastNoise}, "a link that changes 250-fold": {slowText, fastText},
	} {
		most, changing := 1.1, 80
		if kinds[0].link != kinds[1].link {
			most, changing = 1.8, 500 // the best codec was chosen with all of it known before
		}
		for _, period := range []int{1, 2, 3, 5, 8, 20} {
			for _, long := range []bool{true, false} {
				const all = 1000
				turn := func(sample int) packWorld { return kinds[sample/period%2] }
				p := newPacking(CodecS2, everyCodec)
				with, changes, spent := p.drive(long, all, turn)
				best := time.Duration(1 << 62)
				for _, c := range p.codecs {
					var fixed time.Duration
					for i := range all {
						fixed += turn(i).cost(c, packStretchBytes).total
					}
					best = min(best, fixed)
				}
				what := fmt.Sprintf("%s, %d samples a kind, long rounds %v", name, period, long)
				t.Logf("%s: %v, %d changes, %.2f of the best", what, with, changes, float64(spent)/float64(best))
				if changes > changing {
					t.Errorf("%s: of %d samples %v, with %d changes", what, all, with, changes)
				}
				if float64(spent) > most*float64(best) {
					t.Errorf("%s: it took %v, %v with the best codec", what, spent, best)
				}
			}
		}
	}
}

// A link that is another than it was is answered soon.
func TestPackingFollowsTheLink(t *testing.T) {
	fast, slow := packWorld{0.3, 0.32, packSpeed, packText}, packWorld{0.3, 80, packSpeed, packText}
	for _, long := range []bool{true, false} {
		p := newPacking(CodecS2, everyCodec)
		for i, w := range []packWorld{fast, slow, fast, slow, fast} {
			want := CodecNone
			if w.link == slow.link {
				want = CodecZstd
			}
			p.drive(long, 40, func(int) packWorld { return w })
			if with, _, _ := p.drive(long, 200, func(int) packWorld { return w }); with[want] < 150 {
				t.Errorf("long rounds %v, link %d: %v, want most with %v", long, i, with, want)
			}
		}
	}
}

// What says nothing of the codec in use, or nothing at all, decides nothing.
func TestPackingCountsWhatItJudges(t *testing.T) {
	now := time.Unix(1000, 0)
	world := packWorld{0.3, 80, packSpeed, packText}
	slow := world.cost(CodecS2, packStretchBytes)
	for _, c := range []struct {
		name string
		do   func(p *packing)
		want Codec
	}{
		{"a round", func(p *packing) {
			p.begin(packStretchBytes, 4, now)
			p.spent(slow)
			p.sent(now, false)
			p.stored(now)
		}, CodecZstd},
		{"one that waited only for its end", func(p *packing) {
			p.begin(packStretchBytes, 4, now)
			p.spent(packCost{codec: CodecS2, bytes: packStretchBytes, pack: time.Second, total: time.Second})
			p.sent(now, false)
			p.stored(now.Add(time.Second)) // of four workers
		}, CodecZstd},
		{"one that the next followed at once", func(p *packing) {
			p.begin(packStretchBytes, 4, now)
			p.spent(slow)
			p.sent(now, false)
			p.begin(packStretchBytes, 4, now)
		}, CodecZstd},
		{"one that failed", func(p *packing) {
			p.begin(packStretchBytes, 4, now)
			p.spent(slow)
			p.sent(now, true)
			p.stored(now)
		}, CodecS2},
		{"one that is not stored yet", func(p *packing) {
			p.begin(packStretchBytes, 4, now)
			p.spent(slow)
			p.stored(now)
		}, CodecS2},
		{"small ones", func(p *packing) {
			for range 1000 {
				p.begin(packRoundBytes-BlockSize, 1, now)
				p.spent(world.cost(CodecS2, packRoundBytes-BlockSize))
				p.sent(now, false)
				p.stored(now.Add(time.Second))
			}
		}, CodecS2},
		{"the begin of a long one", func(p *packing) {
			p.begin(1<<40, 4, now)
			p.spent(packCost{codec: CodecS2, bytes: 1 << 30, wire: packSettleBytes, link: time.Hour, total: time.Hour})
			p.spent(packCost{codec: CodecS2, bytes: 1 << 30, wire: packMiddleBytes, pack: time.Second, total: time.Second})
		}, CodecNone},
		{"its end", func(p *packing) {
			p.begin(1<<40, 4, now)
			p.spent(packCost{codec: CodecS2, bytes: 1 << 30, wire: packSettleBytes, total: time.Second})
			p.spent(packCost{codec: CodecS2, bytes: 1 << 30, wire: packMiddleBytes, total: time.Second})
			p.sent(now, false)
			p.stored(now.Add(time.Hour))
		}, CodecS2},
		{"what another codec took", func(p *packing) {
			slow.codec = CodecNone
			p.begin(packStretchBytes, 4, now)
			p.spent(slow)
			p.sent(now, false)
			p.stored(now)
		}, CodecS2},
		{"a clock that stands", func(p *packing) {
			for range 10 {
				p.begin(packStretchBytes, 4, now)
				p.spent(packCost{codec: CodecS2, bytes: packStretchBytes})
				p.sent(now, false)
				p.stored(now)
			}
		}, CodecS2},
	} {
		p := newPacking(CodecS2, everyCodec)
		if c.do(p); p.codec() != c.want {
			t.Errorf("%s: it went on with %v, want %v", c.name, p.codec(), c.want)
		}
	}
	if p := newPacking(CodecS2, nil); p.codec() != CodecNone || p.strongest() != CodecNone {
		t.Errorf("to a replica that unpacks nothing it sends %v, up to %v", p.codec(), p.strongest())
	}
}

// slowLink is a client whose frames take time on the way, up to the window.
type slowLink struct {
	proto.ReplicationClient
	perByte time.Duration // for bytes of 1 KiB
}

type slowStream struct {
	grpc.BidiStreamingClient[proto.FromPrimary, proto.FromReplica]
	mu     sync.Mutex
	queue  []*proto.FromPrimary
	came   chan struct{}
	closed <-chan struct{}
}

func (c slowLink) Replicate(ctx context.Context, o ...grpc.CallOption) (grpc.BidiStreamingClient[proto.FromPrimary, proto.FromReplica], error) {
	st, err := c.ReplicationClient.Replicate(ctx, o...)
	s := &slowStream{BidiStreamingClient: st, came: make(chan struct{}, 1), closed: ctx.Done()}
	go func() {
		for {
			s.mu.Lock()
			var m *proto.FromPrimary
			if len(s.queue) > 0 {
				m, s.queue = s.queue[0], s.queue[1:]
			}
			s.mu.Unlock()
			if m == nil {
				select {
				case <-s.came:
					continue
				case <-s.closed:
					return
				}
			}
			if isFrames(m) {
				b, _ := bundleOf(m)
				time.Sleep(time.Duration(b.bytes) * c.perByte / 1024)
			}
			_ = st.Send(m)
		}
	}()
	return s, err
}

func (s *slowStream) Send(m *proto.FromPrimary) error {
	s.mu.Lock()
	s.queue = append(s.queue, m)
	s.mu.Unlock()
	select {
	case s.came <- struct{}{}:
	default:
	}
	return nil
}

// adaptRun is what came of sending volumes, one an epoch, to a replica in a bubble: only what
// is said to take time does.
type adaptRun struct {
	took    time.Duration
	wire    uint64
	last    Codec
	changes []string
}

// each is of one of so many epochs.
func (r adaptRun) each(epochs int) adaptRun {
	r.took, r.wire = r.took/time.Duration(epochs), r.wire/uint64(epochs)
	return r
}

func runAdapt(t *testing.T, perKiB time.Duration, packs map[Codec]float64, cfg LinkConfig, sources ...[]byte) (got adaptRun) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		size := int64(len(sources[0]))
		o := FormatOptions{VolumeUUID: testUUID, SizeBytes: size, JournalBytes: MinJournalBytes}
		target := &ram{make([]byte, o.NeededBytes())}
		_, recv := servedReplicaOn(t, target, o)
		cfg.VolumeUUID, cfg.SizeBytes, cfg.Replica, cfg.BatchBytes = testUUID, size, "ebs", LocalBatchBytes
		cfg.packs = func(c Codec, bytes int) { time.Sleep(time.Duration(packs[c] * float64(bytes))) }
		var mu sync.Mutex
		got.last = cfg.Codec
		cfg.Packing = func(now Codec, why string) {
			mu.Lock()
			defer mu.Unlock()
			got.last, got.changes = now, append(got.changes, fmt.Sprintf("%v: %s", now, why))
		}
		l, err := Connect(t.Context(), slowLink{LocalClient(recv), perKiB}, cfg, line(1, 1))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		begun := time.Now()
		for i, src := range sources {
			epoch := uint64(i + 1)
			lineage := Lineage{{gen(1), epoch}}
			must(t, l.Begin(t.Context(), EpochStart{Epoch: epoch, Mode: ModeInPlace, Full: true, Lineage: lineage}, false))
			if _, err := l.SendRound(t.Context(), Round{Source: &ram{src}, Ranges: []Range{{0, size}}}); err != nil {
				t.Fatal(err)
			}
			must(t, l.Commit(t.Context(), lineage, 0))
			if !slices.Equal(target.b[:size], src) {
				t.Fatalf("epoch %d: another image", epoch)
			}
		}
		got.took, got.wire = time.Since(begun), l.Stats().WireBytes
	})
	t.Logf("%v, adapting %v: %v, %d KiB on the wire, %q", cfg.Codec, cfg.Adapt, got.took, got.wire>>10, got.changes)
	return got
}

// 16 MiB of words, and of noise.
var (
	packWords = sync.OnceValue(func() []byte {
		b := make([]byte, 0, 16<<20)
		rng := rand.New(rand.NewPCG(7, 7))
		for len(b) < cap(b) {
			b = fmt.Appendf(b, "block %d of volume %x ", rng.IntN(1000), rng.IntN(16))
		}
		return b[:16<<20]
	})
	packRandom = sync.OnceValue(func() []byte {
		b := make([]byte, 16<<20)
		_, _ = rand.NewChaCha8([32]byte{7}).Read(b)
		return b
	})
)

// Over a fast link a compressor that holds workers up gives way to sending raw, and the
// data is there sooner; a codec that is set stays.
func TestFastLinkIsSentRaw(t *testing.T) {
	const perKiB = 400 * time.Nanosecond // 2.5 GB/s
	set := runAdapt(t, perKiB, packSpeed, LinkConfig{Codec: CodecS2}, words(4)...).each(4)
	got := runAdapt(t, perKiB, packSpeed, LinkConfig{Codec: CodecS2, Adapt: true}, words(14)...).each(14)
	if got.last != CodecNone {
		t.Errorf("it sends %v over a fast link", got.last)
	}
	if float64(got.took) > 0.9*float64(set.took) {
		t.Errorf("an epoch took %v, %v with what was set", got.took, set.took)
	}
	if len(set.changes) > 0 || set.wire > got.wire/2 {
		t.Errorf("a codec that is set did not stay: %q, %d bytes an epoch on the wire of %d", set.changes, set.wire, got.wire)
	}
}

// Over a slow link data is packed harder, less of it travels, and it is there sooner.
func TestSlowLinkIsPackedHarder(t *testing.T) {
	const perKiB = 80 * time.Microsecond // 100 Mbit/s
	for _, first := range []Codec{CodecS2, CodecNone} {
		set := runAdapt(t, perKiB, packSpeed, LinkConfig{Codec: first}, words(1)...)
		got := runAdapt(t, perKiB, packSpeed, LinkConfig{Codec: first, Adapt: true}, words(7)...).each(7)
		if got.last != CodecZstd {
			t.Errorf("from %v: it packs with %v over a slow link", first, got.last)
		}
		if got.wire > set.wire*9/10 || got.took > set.took*9/10 {
			t.Errorf("from %v: an epoch is %d bytes in %v; with what was set %d in %v", first, got.wire, got.took, set.wire, set.took)
		}
	}
}

func words(epochs int) [][]byte { return slices.Repeat([][]byte{packWords()}, epochs) }

// A first sync is one long round: it adapts in the middle of it.
func TestLongRoundAdapts(t *testing.T) {
	src := slices.Repeat(packWords(), 8)
	got := runAdapt(t, 80*time.Microsecond, packSpeed, LinkConfig{Codec: CodecNone, Adapt: true}, src)
	if got.last == CodecNone || got.wire > uint64(len(src))*3/4 {
		t.Errorf("it sent %d bytes of %d, with %v at the end", got.wire, len(src), got.last)
	}
}

// Words and noise by turns over a slow link.
func TestKindsByTurnsDoNotFlap(t *testing.T) {
	var src [][]byte
	for range 6 {
		src = append(src, packWords(), packRandom())
	}
	got := runAdapt(t, 80*time.Microsecond, packSpeed, LinkConfig{Codec: CodecS2, Adapt: true}, src...)
	if len(got.changes) > 6 {
		t.Errorf("it decided %d times in 12 epochs", len(got.changes))
	}
}

// What a session decides is told with the replica's name.
func TestPackingIsTold(t *testing.T) {
	var told []string
	p := &Primary{cfg: PrimaryConfig{Events: PrimaryEvents{Packing: func(replica string, now Codec, why string) {
		told = append(told, fmt.Sprint(replica, " ", now, " ", why))
	}}}}
	w := newReplicaWorker(p, ReplicaConfig{Name: "far", Link: LinkConfig{Adapt: true}})
	w.cfg.Link.Packing(CodecZstd, "tried")
	if want := []string{"far zstd tried"}; !slices.Equal(told, want) {
		t.Errorf("%q, want %q", told, want)
	}
}
