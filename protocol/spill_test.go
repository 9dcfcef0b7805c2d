package protocol

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"blockferry/blockdev/blocktest"
)

// testSpill is a spill file in memory that loses power with the rest.
type testSpill struct {
	limit int64
	mem   *blocktest.Memory // nil: there is no file
	arm   func(*blocktest.Memory)
	made  int
	// syncing is called before each flush, creating before a file is made; nil for nothing.
	syncing, creating func()
}

type testSpillStore struct {
	*blocktest.Memory
	file *testSpill
}

func (s testSpillStore) Empty() error {
	return s.ZeroOut(spillHeaderBytes, s.Size()-spillHeaderBytes)
}
func (s testSpillStore) Flush() error {
	if s.file.syncing != nil {
		s.file.syncing()
	}
	return s.Memory.Flush()
}
func (s testSpillStore) InPlace() error {
	if s.file.mem != s.Memory {
		return errors.New("removed while it was in use")
	}
	return nil
}
func (s testSpillStore) Close() error { return nil }
func (s testSpillStore) Name() string { return "/spill/file" }

func (s *testSpill) Name() string { return "/spill/file" }
func (s *testSpill) Open() (SpillStore, error) {
	if s.mem == nil {
		return nil, fs.ErrNotExist
	}
	return testSpillStore{s.mem, s}, nil
}

func (s *testSpill) Create(header []byte, replace bool) (SpillStore, error) {
	if s.creating != nil {
		s.creating()
	}
	if s.mem != nil && !replace {
		return nil, fs.ErrExist
	}
	m := blocktest.NewMemory(spillHeaderBytes + s.limit)
	if _, err := m.WriteAt(header, 0); err != nil {
		return nil, err
	}
	if err := m.Flush(); err != nil {
		return nil, err
	}
	if s.mem == nil && s.arm != nil {
		s.arm(m)
	}
	s.mem = m
	s.made++
	return testSpillStore{m, s}, nil
}

// with is the spill file over another state of its content.
func (s *testSpill) with(change func(*blocktest.Memory) *blocktest.Memory) *testSpill {
	out := &testSpill{limit: s.limit}
	if s.mem != nil {
		out.mem = change(s.mem.Clone())
	}
	return out
}

func (s *testSpill) clone() *testSpill {
	return s.with(func(m *blocktest.Memory) *blocktest.Memory { return m })
}

func (s *testSpill) options() OpenOptions {
	return OpenOptions{Spill: s, SpillLimitBytes: s.limit}
}

const testSpillLimit = 16 << 20

// spills is an epoch that no journal of MinJournalBytes holds.
var spills = epochPlan{mode: ModeJournal, blocks: 60}

// spillScenario has epochs that spill behind small ones, one after another,
// an aborted one, a full one, one of a new generation, and openings between.
var spillScenario = []epochPlan{
	{mode: ModeInPlace, full: true, blocks: 3, codec: CodecS2},
	{mode: ModeJournal, blocks: 5},
	spills,
	{mode: ModeJournal, blocks: 60, abort: true, cut: true},
	{mode: ModeJournal, blocks: 60, cut: true},
	{},
	{mode: ModeJournal, blocks: 4},
	{mode: ModeJournal, blocks: 55, full: true, gen: 2},
	{mode: ModeJournal, blocks: 1},
}

// Promises 2 and 3 for epochs larger than the journal: whatever operation of
// the disk or of the spill file fails, and whether the program dies alone or with
// the power of both, what comes back is one whole committed epoch.
func TestSpillSurvivesEveryFault(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken on purpose")
	for _, where := range []string{"disk", "spill file"} {
		for _, op := range []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush, blocktest.OpZeroOut, blocktest.OpRead} {
			step := 1
			if where == "disk" { // where TestReplicaSurvivesEveryFault has been at each
				step = map[blocktest.Op]int{blocktest.OpWrite: 7, blocktest.OpZeroOut: 3, blocktest.OpRead: 61, blocktest.OpFlush: 1}[op]
			}
			if testing.Short() {
				step *= 7
			}
			for k := 0; ; k += step {
				m := newModel(t, uint64(k%5), testVolume)
				dev := testDevice(m.size)
				spill := &testSpill{limit: testSpillLimit}
				if where == "disk" {
					dev.FailAt(op, k, broken)
				} else {
					spill.arm = func(mem *blocktest.Memory) { mem.FailAt(op, k, broken) }
				}
				err := m.playSteps(dev, spillScenario, spill.options())
				at := fmt.Sprintf("%s: %v %d failed (%v)", where, op, k, err)
				if where == "disk" && dev.FailurePending(op) || where != "disk" && spill.mem.FailurePending(op) {
					if err != nil {
						t.Fatal(at)
					}
					t.Logf("%s: %d faults of kind %v", where, k, op)
					break
				}
				if err := m.checkWith(dev.Clone(), spill.clone().options()); err != nil {
					t.Fatalf("%s, opened again: %v", at, err)
				}
				for seed := range uint64(2) {
					rng := rand.New(rand.NewPCG(seed, uint64(k)))
					after := dev.Clone().PowerCut(rng)
					lost := spill.with(func(m *blocktest.Memory) *blocktest.Memory { return m.PowerCut(rng) })
					if err := m.checkWith(after, lost.options()); err != nil {
						t.Fatalf("%s, power cut %d: %v", at, seed, err)
					}
				}
				// Opened, and the power cut while it recovers.
				if k%3 == 0 {
					rng := rand.New(rand.NewPCG(9, uint64(k)))
					again, its := dev.Clone(), spill.clone()
					again.FailAt(blocktest.OpFlush, k%4, broken)
					m.checkWith(again, its.options())
					after := again.PowerCut(rng)
					lost := its.with(func(m *blocktest.Memory) *blocktest.Memory { return m.PowerCut(rng) })
					if err := m.checkWith(after, lost.options()); err != nil {
						t.Fatalf("%s, power cut in the recovery: %v", at, err)
					}
				}
			}
		}
	}
}

// committedSpill is a replica with one epoch that is committed, lies partly in
// the spill file, and is not applied.
func committedSpill(t *testing.T) (*model, *blocktest.Memory, *testSpill) {
	t.Helper()
	m := newModel(t, 3, testVolume)
	dev := testDevice(m.size)
	spill := &testSpill{limit: testSpillLimit}
	must(t, m.playSteps(dev, spillScenario[:2], spill.options()))
	r, err := OpenReplica(context.Background(), dev, spill.options())
	must(t, err)
	image, err := r.Hold(context.Background()) // keeps it from being applied
	must(t, err)
	must(t, m.send(r, spills))
	if s := r.Status(); s.SpilledBytes < 1<<20 || s.PendingEpochs != 1 {
		t.Fatalf("%d bytes in the spill file, %d epochs pending", s.SpilledBytes, s.PendingEpochs)
	}
	carried, file := dev.Clone(), spill.clone()
	image.Release()
	must(t, r.WaitApplied(context.Background(), m.acked.Epoch))
	if err := m.checkOpen(r); err != nil {
		t.Fatal(err)
	}
	must(t, r.Close())
	if s := r.Status(); s.SpilledBytes != 0 {
		t.Fatalf("%d bytes in the spill file after the apply", s.SpilledBytes)
	}
	// No copy of the superblock counts on what is not there any more.
	sb := super(t, dev)
	must(t, dev.ZeroOut(superOffset(sb.layout, sb.sequence), superBytes))
	if err := m.checkWith(dev, spill.options()); err != nil {
		t.Fatalf("without the newest copy of the superblock: %v", err)
	}
	return m, carried, file
}

// The power may fail when one copy of the superblock knows that what was
// spilled is applied, and the other does not: the file is emptied only when
// both do, or the loss of the first would cost the image.
func TestSpillIsKeptForTheOlderSuperblock(t *testing.T) {
	m, dev, spill := committedSpill(t)
	after := dev.Clone()
	must(t, m.checkWith(after, spill.clone().options()))
	older, newest := super(t, dev), super(t, after)
	older.sequence, older.applying = newest.sequence-1, older.committed.Epoch
	must(t, writeSuperblock(after, *older))
	must(t, m.checkWith(after, spill.options()))
	newest = super(t, after)
	must(t, after.ZeroOut(superOffset(newest.layout, newest.sequence), superBytes))
	must(t, m.checkWith(after, spill.options()))
}

// Rule 7: what is committed and lies in the spill file is never given up in
// silence, whatever became of the file.
func TestSpillMissingOrDamagedIsNamed(t *testing.T) {
	m, dev, spill := committedSpill(t)
	if err := m.checkWith(dev.Clone(), spill.clone().options()); err != nil {
		t.Fatalf("with the spill file: %v", err)
	}
	flip := func(at int64) func(*blocktest.Memory) *blocktest.Memory {
		return func(m *blocktest.Memory) *blocktest.Memory {
			b := make([]byte, BlockSize)
			must(t, second(m.ReadAt(b, at/BlockSize*BlockSize)))
			b[at%BlockSize] ^= 1
			must(t, second(m.WriteAt(b, at/BlockSize*BlockSize)))
			return m
		}
	}
	foreign, older := spill.clone(), spill.clone() // with the very segments that are wanted
	id := super(t, dev).spillID()
	id.replica[5]++
	must(t, second(foreign.mem.WriteAt(id.encode(), 0)))
	id = super(t, dev).spillID()
	id.spill[5]++
	must(t, second(older.mem.WriteAt(id.encode(), 0)))
	for name, bad := range map[string]*testSpill{
		"not given":   nil,
		"missing":     {limit: testSpillLimit},
		"foreign":     foreign,
		"another one": older,
		"header":      spill.with(flip(40)),
		"segment":     spill.with(flip(spillHeaderBytes + 24)),
		"body":        spill.with(flip(spillHeaderBytes + 1<<20)),
		"truncated": spill.with(func(m *blocktest.Memory) *blocktest.Memory {
			short := blocktest.NewMemory(spillHeaderBytes + 1<<20)
			b := make([]byte, short.Size())
			must(t, second(m.ReadAt(b, 0)))
			must(t, second(short.WriteAt(b, 0)))
			return short
		}),
	} {
		for _, headLost := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/head-lost=%v", name, headLost), func(t *testing.T) {
				disk := dev.Clone()
				if headLost {
					// The newest superblock copy, the one that names the commit, is gone.
					sb := super(t, disk)
					must(t, disk.ZeroOut(superOffset(sb.layout, sb.sequence), superBytes))
				}
				var o OpenOptions
				before := disk.Count(blocktest.OpWrite)
				if bad != nil {
					o = bad.options()
				}
				_, err := OpenReplica(context.Background(), disk, o)
				if !errors.Is(err, ErrSpill) || !errors.Is(err, ErrJournalDamaged) ||
					!strings.Contains(err.Error(), "/spill/file") || !strings.Contains(err.Error(), "bring the spill file back") {
					t.Fatalf("opened: %v", err)
				}
				if n := disk.Count(blocktest.OpWrite); n != before {
					t.Fatalf("%d writes although it was refused", n-before)
				}
				// The way out is the operator's word: back to the image before.
				o.DropJournal = true
				r, err := OpenReplica(context.Background(), disk, o)
				must(t, err)
				defer r.Close()
				s := r.Status()
				if s.State != DiskConsistent || s.Committed.Epoch >= m.acked.Epoch {
					t.Fatalf("dropped: %+v", s)
				}
			})
		}
	}
}

// What can't be read for a moment, in the spill file or in the journal, is not
// taken for damage, and least of all for nothing: the next opening has it all.
func TestWhatCantBeReadIsTriedAgain(t *testing.T) {
	t.Parallel()
	broken := errors.New("input/output error")
	m, pristine, file := committedSpill(t)
	for _, where := range []string{"disk", "spill file", "spill file, head lost", "disk, head lost"} {
		faults := 0
		for k := 0; ; k++ {
			dev, spill := pristine.Clone(), file.clone()
			if strings.HasSuffix(where, "head lost") {
				sb := super(t, dev)
				must(t, dev.ZeroOut(superOffset(sb.layout, sb.sequence), superBytes))
			}
			at := dev
			if strings.HasPrefix(where, "spill") {
				at = spill.mem
			}
			before := snapshot(t, dev)
			at.FailAt(blocktest.OpRead, k, broken)
			r, err := OpenReplica(context.Background(), dev, spill.options())
			if at.FailurePending(blocktest.OpRead) {
				must(t, err)
				must(t, r.Close())
				break
			}
			at.FailAt(blocktest.OpRead, 0, nil)
			if err == nil { // a superblock's other copy stood in for it
				must(t, r.Close())
				if s := r.Status(); s.Committed != m.acked {
					t.Fatalf("%s, read %d failed: it holds %v of %v", where, k, s.Committed, m.acked)
				}
				continue
			}
			faults++
			if errors.Is(err, ErrJournalDamaged) || errors.Is(err, ErrNoSuperblock) {
				t.Fatalf("%s, read %d failed: %v", where, k, err)
			}
			var d *JournalDamage
			if errors.As(err, &d) && (!errors.Is(err, ErrUnreadable) || !strings.Contains(err.Error(), "open it again") || !bytes.Equal(before, snapshot(t, dev))) {
				t.Fatalf("%s, read %d failed: %v", where, k, err)
			}
			if err := m.checkWith(dev.Clone(), spill.clone().options()); err != nil {
				t.Fatalf("%s, read %d failed, opened again: %v", where, k, err)
			}
			if d == nil {
				continue
			}
			// The operator can give it up all the same, and has a replica then.
			o := spill.options()
			o.DropJournal = true
			at.FailAt(blocktest.OpRead, k, broken)
			r, err = OpenReplica(context.Background(), dev, o)
			must(t, err)
			if s := r.Status(); s.State != DiskConsistent {
				t.Fatalf("%s, read %d failed, dropped: %+v", where, k, s)
			}
			must(t, r.Close())
		}
		if faults == 0 {
			t.Errorf("%s: no read failed", where)
		}
		t.Logf("%s: %d faults", where, faults)
	}
}

func second[T any](_ T, err error) error { return err }

// A file that nothing needs may be missing: it is made anew. Whatever else
// stands there is left alone, and what fits into the journal goes on.
func TestSpillIsMadeAnewOnlyInItsOwnPlace(t *testing.T) {
	m := newModel(t, 4, testVolume)
	dev := testDevice(m.size)
	spill := &testSpill{limit: testSpillLimit}
	must(t, m.playSteps(dev, spillScenario[:4], spill.options()))
	first := super(t, dev).spill
	spill.mem = nil
	r, err := OpenReplica(context.Background(), dev, spill.options())
	must(t, err)
	must(t, m.send(r, spills))
	must(t, r.Close())
	if now := super(t, dev).spill; now == first || spill.made != 2 {
		t.Fatalf("spill file %x after %x, made %d times", now, first, spill.made)
	}
	must(t, m.checkWith(dev, spill.options()))

	foreign := blocktest.NewMemory(1 << 20)
	must(t, second(foreign.WriteAt(bytes.Repeat([]byte("mine"), BlockSize/4), 0)))
	spill.mem = foreign
	r, err = OpenReplica(context.Background(), dev, spill.options())
	must(t, err)
	if w := strings.Join(r.Status().Warnings, ""); !strings.Contains(w, "/spill/file") || !strings.Contains(w, "left as it is") {
		t.Errorf("warnings: %q", w)
	}
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 3}))
	before := m.image
	if err := m.send(r, spills); !errors.Is(err, ErrJournalFull) || !errors.Is(err, ErrSpill) {
		t.Errorf("an epoch without room: %v", err)
	}
	m.image = before
	must(t, r.Abort())
	if err := m.checkOpen(r); err != nil {
		t.Error(err)
	}
	must(t, r.Close())
	if spill.made != 2 {
		t.Error("the foreign file was written over")
	}
}

// Of two replicas that were given one path, and look at once, one makes the
// file: the other leaves it, and says whose it is.
func TestSpillMadeByAnotherMeanwhile(t *testing.T) {
	m := newModel(t, 4, testVolume)
	dev := testDevice(m.size)
	spill := &testSpill{limit: testSpillLimit}
	must(t, m.playSteps(dev, spillScenario[:1], OpenOptions{}))
	other := blocktest.NewMemory(1 << 20)
	id := spillID{volume: [16]byte{6}, replica: [16]byte{7}, spill: [16]byte{8}}
	must(t, second(other.WriteAt(id.encode(), 0)))
	spill.creating = func() { spill.mem = other }
	r, err := OpenReplica(context.Background(), dev, spill.options())
	must(t, err)
	if w := strings.Join(r.Status().Warnings, ""); !strings.Contains(w, "belongs to replica 07") {
		t.Errorf("warnings: %q", w)
	}
	must(t, r.Close())
	if spill.mem != other || spill.made != 0 {
		t.Error("the other's file was replaced")
	}
}

// A file that is removed while the replica has it open takes nothing with it
// that is committed: an epoch whose part is gone is void, and the next one
// gets a new file.
func TestSpillRemovedWhileInUse(t *testing.T) {
	m := newModel(t, 8, testVolume)
	dev := testDevice(m.size)
	spill := &testSpill{limit: testSpillLimit}
	must(t, m.playSteps(dev, spillScenario[:2], spill.options()))
	r, err := OpenReplica(context.Background(), dev, spill.options())
	must(t, err)
	image, err := r.Hold(context.Background()) // keeps it from being applied
	must(t, err)
	spill.mem = nil
	must(t, m.send(r, spills))
	if err := m.checkWith(dev.Clone(), spill.clone().options()); err != nil {
		t.Fatalf("removed between two epochs, then a crash: %v", err)
	}
	image.Release()
	must(t, r.WaitApplied(context.Background(), m.acked.Epoch))

	before := bytes.Clone(m.image)
	spill.syncing = func() { spill.mem = nil }
	if err := m.send(r, spills); !errors.Is(err, ErrJournalFull) || !errors.Is(err, ErrSpill) || !strings.Contains(err.Error(), "/spill/file") {
		t.Errorf("removed before the commit: %v", err)
	}
	m.image, spill.syncing = before, nil
	must(t, r.Abort())
	must(t, m.checkOpen(r))
	must(t, m.send(r, spills))
	must(t, r.Close())
	must(t, m.checkWith(dev, spill.options()))
}

// With neither room the replica keeps its image, says why, and goes on.
func TestSpillLimit(t *testing.T) {
	m := newModel(t, 5, testVolume)
	dev := testDevice(m.size)
	spill := &testSpill{limit: 1 << 20}
	must(t, m.playSteps(dev, spillScenario[:2], spill.options()))
	r, err := OpenReplica(context.Background(), dev, spill.options())
	must(t, err)
	defer r.Close()
	before := bytes.Clone(m.image)
	if err := m.send(r, spills); !errors.Is(err, ErrJournalFull) || !strings.Contains(err.Error(), "1048576 that may spill") {
		t.Fatal(err)
	}
	m.image = before
	must(t, r.Abort())
	must(t, m.checkOpen(r))
	must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 4}))
	must(t, r.WaitApplied(context.Background(), m.acked.Epoch))
	must(t, m.checkOpen(r))
}

// A program that knows of no spill file must not open such a replica.
func TestSpillMakesTheSuperblockNewer(t *testing.T) {
	m := newModel(t, 6, testVolume)
	dev := testDevice(m.size)
	must(t, m.playSteps(dev, spillScenario[:1], OpenOptions{}))
	version := func() (v [2]uint32) {
		b := make([]byte, superBytes)
		for i := range v {
			must(t, second(dev.ReadAt(b, superOffset(super(t, dev).layout, uint64(i)))))
			v[i] = binary.LittleEndian.Uint32(b[8:])
		}
		return v
	}
	if v := version(); v != [2]uint32{1, 1} {
		t.Errorf("versions %v before a spill file was named", v)
	}
	r, err := OpenReplica(context.Background(), dev, (&testSpill{limit: testSpillLimit}).options())
	must(t, err)
	must(t, r.Close())
	if v := version(); v != [2]uint32{2, 2} {
		t.Errorf("versions %v after it", v)
	}
}

func FuzzSpillHeader(f *testing.F) {
	f.Add(spillID{[16]byte{1}, [16]byte{2}, [16]byte{3}}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == spillHeaderBytes {
			b = bytes.Clone(b)
			binary.LittleEndian.PutUint32(b[12:], 0)
			binary.LittleEndian.PutUint32(b[12:], crc32c(b))
		}
		id, err := decodeSpillHeader(b)
		if err != nil {
			return
		}
		if again, err := decodeSpillHeader(id.encode()); err != nil || again != id {
			t.Fatalf("%+v, then %+v: %v", id, again, err)
		}
	})
}

func FuzzSpillMarker(f *testing.F) {
	p := spillPart{[16]byte{1}, cursor{0, 5, 6}, cursor{8192, 7, 8}}
	f.Add(p.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := decodeSpillPart(b)
		if err != nil {
			return
		}
		if again, err := decodeSpillPart(p.append(nil)); err != nil || !reflect.DeepEqual(again, p) {
			t.Fatalf("%+v, then %+v: %v", p, again, err)
		}
	})
}
