package protocol

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"blockferry/blockdev/blocktest"
)

// model is what a replica is fed and what it must hold: an image per epoch.
type model struct {
	t       *testing.T
	rng     *rand.Rand
	size    int64
	image   []byte // of the volume at its last cut
	lineage Lineage
	images  map[Position][]byte
	asked   map[Position]bool // a commit was asked for
	acked   Position          // the last commit that returned nil
	inPlace bool              // an in-place epoch was begun and is not committed
	next    uint64
	attempt uint32
}

func newModel(t *testing.T, seed uint64, size int64) *model {
	return &model{t: t, rng: rand.New(rand.NewPCG(seed, 1)), size: size, image: make([]byte, size),
		lineage: Lineage{{Generation{1}, 0}}, images: map[Position][]byte{{}: make([]byte, size)}, asked: map[Position]bool{}, next: 1}
}

func testOptions(size int64) FormatOptions {
	return FormatOptions{VolumeUUID: [16]byte{7}, ReplicaUUID: [16]byte{9, 1}, SizeBytes: size, JournalBytes: MinJournalBytes, ReserveBytes: 1 << 20}
}

// fill makes the content of some blocks: zeros, text, noise.
func (m *model) fill(b []byte) {
	for i := 0; i < len(b); i += BlockSize {
		block := b[i : i+BlockSize]
		switch m.rng.IntN(4) {
		case 0:
			clear(block)
		case 1:
			copy(block, bytes.Repeat([]byte(fmt.Sprintf("line %d\n", m.rng.Uint32())), BlockSize/7))
		default:
			for k := 0; k < BlockSize; k += 8 {
				binary.LittleEndian.PutUint64(block[k:], m.rng.Uint64())
			}
			block[0] = 1
		}
	}
}

// epochPlan is one epoch to be sent.
type epochPlan struct {
	mode   Mode
	full   bool
	gap    uint64 // the final epoch is so much later than the one begun
	blocks int
	codec  Codec
	abort  bool
	cut    bool // its session is lost again and again
	gen    byte // a new generation begins
}

// rounds invents changes and returns the frames of each round.
func (m *model) rounds(p epochPlan, meta FrameMeta) (out [][]byte) {
	c, err := NewCompressor(p.codec)
	if err != nil {
		m.t.Fatal(err)
	}
	for round := range uint32(3) {
		meta.Round = round + 1
		var frames []byte
		if p.full && round == 0 {
			if m.rng.IntN(2) == 0 {
				m.fill(m.image[1<<20:])
			}
			for at := int64(0); at < m.size; at += 300 << 10 {
				frames = AppendFrames(frames, meta, at, m.image[at:min(at+(300<<10), m.size)], c)
			}
		}
		for range p.blocks {
			n := int64(1+m.rng.IntN(24)) * BlockSize
			at := m.rng.Int64N((m.size-n)/BlockSize) * BlockSize
			m.fill(m.image[at : at+n])
			if m.rng.IntN(8) == 0 {
				clear(m.image[at : at+n])
				frames = appendHeader(frames, meta, FrameDiscard, CodecNone, at, n, nil)
			} else {
				frames = AppendFrames(frames, meta, at, m.image[at:at+n], c)
			}
		}
		out = append(out, frames)
	}
	return out
}

// send feeds one epoch to a replica.
func (m *model) send(r *Replica, p epochPlan) error {
	ctx := context.Background()
	m.attempt++
	meta := FrameMeta{Epoch: m.next, Attempt: m.attempt}
	m.next += 1 + p.gap
	final := Position{m.lineage.Tip().Generation, meta.Epoch + p.gap}
	if p.gen != 0 {
		final.Generation = Generation{p.gen}
	}
	lineage := m.lineage.Extend(final)
	if m.lineage.Tip().Epoch == 0 {
		lineage = Lineage{final}
	}
	before := bytes.Clone(m.image)
	rounds := m.rounds(p, meta)
	if !p.abort {
		m.images[final] = bytes.Clone(m.image)
	}
	if p.mode == ModeInPlace {
		m.inPlace = true
	}
	start := EpochStart{Epoch: meta.Epoch, Attempt: meta.Attempt, Mode: p.mode, Full: p.full, Lineage: lineage, CutUnixNanos: 5}
	if p.cut {
		start.Token = token{byte(meta.Attempt), 1}
		rounds = [][]byte{bytes.Join(rounds, nil)}
	}
	err := r.Begin(ctx, start)
	if err != nil {
		return err
	}
	if p.mode == ModeJournal {
		// Each round has its own stream; the last one comes first.
		for i, j := 0, len(rounds)-1; i < j; i, j = i+1, j-1 {
			rounds[i], rounds[j] = rounds[j], rounds[i]
		}
	}
	sums := make([]StreamSum, len(rounds))
	for i, frames := range rounds {
		d := NewStreamDigest()
		if err := d.AddFrames(frames); err != nil {
			return err
		}
		sums[i] = d.Sum()
		for _, piece := range wholeFrames(frames, MaxAppendBytes/4) {
			if err := r.Append(ctx, i, piece); err != nil {
				return err
			}
			if p.cut {
				if err := r.Interrupt(); err != nil {
					return err
				}
				if err := r.Resume(start); err != nil {
					return err
				}
			}
		}
	}
	if p.abort {
		m.image = before
		if p.cut {
			return r.Interrupt() // nobody comes back to it
		}
		return r.Abort()
	}
	m.asked[final] = true
	if err := r.Commit(ctx, EpochCommit{Epoch: meta.Epoch, Attempt: meta.Attempt, Streams: sums, Lineage: lineage}); err != nil {
		return err
	}
	m.lineage, m.acked, m.inPlace = lineage, final, false
	return nil
}

// wholeFrames cuts frames into pieces of about n bytes.
func wholeFrames(frames []byte, n int) (out [][]byte) {
	begun, at := 0, 0
	for fr := NewFrameReader(frames); fr.More(); {
		f, err := fr.Next()
		if err != nil {
			return append(out, frames[begun:])
		}
		if at += len(f.Header) + len(f.Payload); at-begun >= n {
			out = append(out, frames[begun:at:at])
			begun = at
		}
	}
	return append(out, frames[begun:])
}

// check opens what is left of a device and compares it with the model: the
// image of exactly one epoch whose commit was asked for, no older than the last
// acknowledged one, and a change map that names at least what differs.
func (m *model) check(dev Store) error { return m.checkWith(dev, OpenOptions{}) }

func (m *model) checkWith(dev Store, o OpenOptions) error {
	r, err := OpenReplica(context.Background(), dev, o)
	if err != nil {
		if m.acked.IsZero() && errors.Is(err, ErrNoSuperblock) && !m.inPlace {
			return nil // cut off while it was being formatted
		}
		return err
	}
	defer r.Close()
	return m.checkOpen(r)
}

func (m *model) checkOpen(r *Replica) error {
	s := r.Status()
	switch s.State {
	case DiskBlank:
		if !m.acked.IsZero() {
			return fmt.Errorf("blank, acknowledged was %s", m.acked)
		}
		return nil
	case DiskInconsistent:
		if !m.inPlace {
			return fmt.Errorf("inconsistent (%s) without an in-place epoch", s.Reason)
		}
		return nil
	}
	if s.Applied != s.Committed || s.Applied.Epoch < m.acked.Epoch {
		return fmt.Errorf("holds %s of %s, acknowledged was %s", s.Applied, s.Committed, m.acked)
	}
	want, ok := m.images[s.Applied]
	if !ok || !m.asked[s.Applied] {
		return fmt.Errorf("holds %s, which was never to be committed", s.Applied)
	}
	image, err := r.Hold(context.Background())
	if err != nil {
		return err
	}
	defer image.Release()
	got := make([]byte, m.size)
	if _, err := image.ReadAt(got, 0); err != nil {
		return err
	}
	if at := firstDifference(got, want); at >= 0 {
		for p, other := range m.images {
			if bytes.Equal(got, other) {
				return fmt.Errorf("says %s and holds %s", s.Applied, p)
			}
		}
		return fmt.Errorf("torn: not the image of %s at %d (and of no other)", s.Applied, at)
	}
	ranges, err := image.DataRanges()
	if err != nil {
		return err
	}
	if at := uncovered(ranges, m.images[Position{}], want); at >= 0 {
		return fmt.Errorf("data ranges leave out %d, which is not zero", at)
	}
	// Numbers between two of its epochs are those of other copies.
	var base Position
	for since := range s.Applied.Epoch {
		for p := range m.images {
			if m.asked[p] && p.Epoch == since {
				base = p
			}
		}
		ranges, err := image.ChangedSince(since)
		if errors.Is(err, ErrTrackingLost) {
			continue
		}
		if err != nil {
			return err
		}
		if at := uncovered(ranges, m.images[base], want); at >= 0 {
			return fmt.Errorf("changes since %d leave out %d", since, at)
		}
	}
	return nil
}

func firstDifference(a, b []byte) int {
	for i := 0; i < len(a); i += BlockSize {
		if !bytes.Equal(a[i:i+BlockSize], b[i:i+BlockSize]) {
			return i
		}
	}
	return -1
}

// uncovered is the first place outside the ranges where a and b differ.
func uncovered(ranges []Range, a, b []byte) int {
	var at int64
	for _, r := range append(ranges, Range{Offset: int64(len(a))}) {
		if d := firstDifference(a[at:r.Offset], b[at:r.Offset]); d >= 0 {
			return int(at) + d
		}
		at = r.End()
	}
	return -1
}

// scenario is the life of a replica: a first sync in place, journaled epochs
// until the ring has come round, an aborted one, a catch-up in place, a full
// epoch by the journal, a new generation, lost sessions, and openings in between.
var scenario = []epochPlan{
	{mode: ModeInPlace, full: true, gap: 2, blocks: 3, codec: CodecS2},
	{mode: ModeJournal, blocks: 5},
	{mode: ModeJournal, blocks: 8, codec: CodecZstd, cut: true},
	{mode: ModeJournal, blocks: 4, abort: true},
	{mode: ModeJournal, blocks: 6},
	{}, // closed and opened again
	{mode: ModeJournal, blocks: 3, abort: true, cut: true},
	{mode: ModeJournal, blocks: 10},
	{mode: ModeInPlace, blocks: 4, gap: 1, cut: true},
	{mode: ModeJournal, blocks: 7, codec: CodecS2, gen: 2},
	{mode: ModeJournal, full: true, blocks: 2},
	{},
	{mode: ModeJournal, blocks: 1},
}

// play formats a device and plays the scenario to its end or first error.
func (m *model) play(dev Store) error { return m.playSteps(dev, scenario, OpenOptions{}) }

func (m *model) playSteps(dev Store, steps []epochPlan, o OpenOptions) error {
	if err := FormatReplica(dev, testOptions(m.size)); err != nil {
		return err
	}
	r, err := OpenReplica(context.Background(), dev, o)
	if err != nil {
		return err
	}
	defer func() {
		if r != nil {
			r.Close()
		}
	}()
	for i, p := range steps {
		if p.mode != 0 {
			if err := m.send(r, p); err != nil {
				return fmt.Errorf("step %d: %w", i, err)
			}
			continue
		}
		if err := r.Close(); err != nil {
			return err
		}
		if r, err = OpenReplica(context.Background(), dev, o); err != nil {
			return fmt.Errorf("step %d: %w", i, err)
		}
	}
	return r.WaitApplied(context.Background(), m.acked.Epoch)
}

// keepsItsWord opens a replica and has the power cut right after: what it then said
// it holds, it holds.
func (m *model) keepsItsWord(dev *blocktest.Memory, k uint64) error {
	r, err := OpenReplica(context.Background(), dev, OpenOptions{})
	if err != nil {
		return nil // formatted in part; check judges that
	}
	said := r.Status()
	r.Close()
	for seed := range uint64(4) {
		r, err := OpenReplica(context.Background(), dev.Clone().PowerCut(rand.New(rand.NewPCG(seed, k))), OpenOptions{})
		if err != nil {
			return fmt.Errorf("after it said %v: %w", said.Committed, err)
		}
		now := r.Status()
		r.Close()
		if now.Committed != said.Committed || now.State != said.State {
			return fmt.Errorf("it said %v %v, after a power cut it says %v %v", said.State, said.Committed, now.State, now.Committed)
		}
	}
	return nil
}

const testVolume = 2<<20 + 3*BlockSize

func testDevice(size int64) *blocktest.Memory {
	return blocktest.NewMemory(testOptions(size).NeededBytes() + 12*BlockSize)
}

func TestReplicaHoldsEachCommittedEpoch(t *testing.T) {
	m := newModel(t, 1, testVolume)
	dev := testDevice(m.size)
	if err := m.play(dev); err != nil {
		t.Fatal(err)
	}
	if err := m.check(dev); err != nil {
		t.Fatal(err)
	}
}

// Promises 1, 2 and 3: whatever operation of the device fails, and whether
// the program dies alone or with the power, what comes back is one whole
// committed epoch, at least the last acknowledged one.
func TestReplicaSurvivesEveryFault(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken on purpose")
	for _, op := range []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush, blocktest.OpZeroOut, blocktest.OpRead} {
		step := 1
		if op == blocktest.OpRead {
			step = 3
		}
		if testing.Short() {
			step *= 7
		}
		for k := 0; ; k += step {
			m := newModel(t, uint64(k%5), testVolume)
			dev := testDevice(m.size)
			dev.FailAt(op, k, broken)
			err := m.play(dev)
			if dev.FailurePending(op) {
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%d faults of kind %v", k, op)
				break
			}
			where := fmt.Sprintf("%v %d failed (%v)", op, k, err)
			if err := m.check(dev.Clone()); err != nil {
				t.Fatalf("%s, opened again: %v", where, err)
			}
			for seed := range uint64(3) {
				after := dev.Clone().PowerCut(rand.New(rand.NewPCG(seed, uint64(k))))
				if err := m.check(after); err != nil {
					t.Fatalf("%s, power cut %d: %v", where, seed, err)
				}
			}
			// Opened, and the power cut while it recovers.
			if op == blocktest.OpFlush && !testing.Short() {
				// What the first failed flush left in the cache alone was read
				// as if it were durable.
				if err := m.keepsItsWord(dev.Clone(), uint64(k)); err != nil {
					t.Fatalf("%s: %v", where, err)
				}
				for second := range 2 {
					again := dev.Clone()
					again.FailAt(blocktest.OpFlush, second, broken)
					m.check(again)
					for seed := range uint64(4) {
						after := again.Clone().PowerCut(rand.New(rand.NewPCG(seed, uint64(k))))
						if err := m.check(after); err != nil {
							t.Fatalf("%s, flush %d of the recovery failed, power cut %d: %v", where, second, seed, err)
						}
					}
				}
			} else if k%3 == 0 {
				again := dev.Clone()
				again.FailAt(blocktest.OpFlush, k%4, broken)
				m.check(again)
				after := again.PowerCut(rand.New(rand.NewPCG(9, uint64(k))))
				if err := m.check(after); err != nil {
					t.Fatalf("%s, power cut in the recovery: %v", where, err)
				}
			}
		}
	}
}
