package protocol

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
)

// waywardRig is a volume that two nodes wrote after its cut 'common': theirs is the
// old primary's, whose disk became a replica; mine goes on from the copy that took over.
type waywardRig struct {
	*rig
	theirs *memSource
	disk   *node
	common Position
	tip    Position // of the disk
	dir    string   // for rescue files
	state  *memState
}

type wayward struct {
	grain   int64
	known   bool   // the old primary's tracker tells what changed
	written bool   // it was written after the common cut
	clean   uint64 // ... and then cut with this number and taken down cleanly
	policy  SplitBrain
	partial bool // frozen views of the new primary hold only what changed at it
}

func newWayward(t *testing.T, w wayward) *waywardRig {
	t.Helper()
	return newWaywardWith(t, w, nil)
}

func newWaywardWith(t *testing.T, w wayward, change func(*PrimaryConfig)) *waywardRig {
	t.Helper()
	theirs := newMemSource(testVolumeSize, w.grain)
	wroteSome(theirs, 0, 1500)
	g1, g2 := gen(1), gen(2)
	cut := func(s *memSource, n uint64) {
		c, err := s.Cut(t.Context(), n, CutWish{})
		must(t, err)
		must(t, c.Release())
	}
	cut(theirs, 7)
	mine := newMemSource(testVolumeSize, w.grain)
	mine.blocks, mine.last, mine.cut = append([]uint64(nil), theirs.blocks...), 1_000_000, 7
	if w.partial {
		mine.frozenMax = testVolumeSize
	}
	if w.written {
		wroteSome(theirs, 100, 50)
		wroteSome(theirs, 1700, 30)
	}
	wroteSome(mine, 120, 60)
	wroteSome(mine, 400, 20)
	if w.policy == SplitBrainLeast {
		wroteSome(mine, 600, 800)
	}
	old := SourceState{Lineage: Lineage{{g1, 7}}, Generation: g1, OpenEpoch: 8}
	if w.clean > 0 {
		cut(theirs, w.clean)
		old = SourceState{Lineage: Lineage{{g1, w.clean}}, Generation: g1, Clean: true}
	}
	o := FormatOptions{VolumeUUID: testUUID, SizeBytes: testVolumeSize, JournalBytes: 32 << 20}
	store := blocktest.NewMemory(o.NeededBytes())
	b := make([]byte, testVolumeSize)
	_, err := theirs.ReadAt(b, 0)
	must(t, err)
	_, err = store.WriteAt(b, 0)
	must(t, err)
	down := StandDownOptions{Format: o, Stray: true, Follow: Lineage{{g1, 7}, {g2, 9}}}
	if w.known {
		down.ChangedSince = func(since uint64) ([]Range, error) { return theirs.changed(since), nil }
	}
	h, err := StandDown(&memState{b: mustEncode(t, old)}, store, down)
	must(t, err)
	r := &waywardRig{theirs: theirs, common: Position{g1, 7}, tip: h.Lineage.Tip(), dir: t.TempDir()}
	r.disk = openNode(t, "old", store, ReceiverConfig{WindowBytes: 2 << 20})
	r.disk.rep.rescueDir = r.dir
	r.state = &memState{b: mustEncode(t, SourceState{Lineage: Lineage{{g1, 7}}, Generation: g2, OpenEpoch: 9})}
	r.rig = startRig(t, mine, r.state, []*node{r.disk}, func(c *PrimaryConfig) {
		if c.Replicas[0].SplitBrain = w.policy; change != nil {
			change(c)
		}
	})
	return r
}

func (r *waywardRig) refused(what string) {
	r.t.Helper()
	eventually(r.t, "refused: "+what, func() bool { return strings.Contains(r.p.Status().Replicas[0].Reason, what) })
}

func (r *waywardRig) rescued() []string {
	r.t.Helper()
	files, err := filepath.Glob(filepath.Join(r.dir, "*"))
	must(r.t, err)
	return files
}

// onlyTheirs lists the blocks that the old primary wrote after the common cut and
// that the new one does not have.
func (r *waywardRig) onlyTheirs() []Range {
	var out []Range
	var x, y [BlockSize]byte
	for b, k := range r.theirs.blocks {
		content(x[:], int64(b), k)
		content(y[:], int64(b), r.src.blocks[b])
		if x != y && k != r.theirs.images[7][b] {
			out = appendRange(out, Range{int64(b) * BlockSize, BlockSize})
		}
	}
	return out
}

// A copy that was written after another node took over is left as it is until the
// operator gives up the very position that it is at; what only it had is saved then, and
// it follows, by the smallest resync that is safe.
func TestWaywardCopyIsGivenUp(t *testing.T) {
	for _, c := range []struct {
		name   string
		w      wayward
		action Action
	}{
		{"strayed, changes known", wayward{grain: BlockSize, known: true, written: true}, Incremental},
		{"strayed, changes known by coarse grains", wayward{grain: 1 << 20, known: true, written: true}, Incremental},
		{"strayed, changes known, views are partial", wayward{grain: BlockSize, known: true, written: true, partial: true}, Incremental},
		{"strayed, changes unknown", wayward{grain: BlockSize, written: true}, CompareAll},
		{"strayed, not written", wayward{grain: BlockSize}, CompareAll},
		{"cut after the other took over, changes known", wayward{grain: BlockSize, known: true, written: true, clean: 8}, Incremental},
		{"cut far ahead of where the other took over", wayward{grain: BlockSize, known: true, written: true, clean: 5000}, Incremental},
		{"cut after the other took over, changes unknown", wayward{grain: BlockSize, written: true, clean: 8}, CompareAll},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			before := func(r *waywardRig) []byte { return snapshot(t, r.disk.store) }
			r := newWayward(t, c.w)
			r.refused("both went on separately from " + r.common.String())
			old := before(r)
			if r.disk.rep.GiveUp(Position{r.tip.Generation, r.tip.Epoch + 1}) == nil {
				t.Error("given up at a position where it is not")
			}
			must(t, r.p.Resume("old"))
			time.Sleep(20 * time.Millisecond) // some tries
			r.refused("both went on separately")
			if string(before(r)) != string(old) || len(r.rescued()) > 0 {
				t.Fatal("the copy was written to, or a rescue file made, without the word for its position")
			}
			want := r.onlyTheirs()
			must(t, r.disk.rep.GiveUp(r.tip))
			r.sync()
			must(t, r.disk.rep.WaitApplied(t.Context(), r.disk.rep.Status().Committed.Epoch))
			r.disk.check(r.src)
			if st := r.disk.rep.Status(); st.Strayed != "" || Compare(st.Lineage, Lineage{{gen(1), 7}}).Kind != Ahead {
				t.Fatalf("%+v", st)
			}
			if p := r.plan("old"); p.Action != c.action || p.Discard != r.tip || p.InPlace {
				t.Errorf("planned %v, giving up %v", p, p.Discard)
			}
			if e := r.last("old"); c.action == Incremental && c.w.grain == BlockSize && e.Link.MarkedBytes > 2<<20 {
				t.Errorf("%d bytes were looked at", e.Link.MarkedBytes)
			}
			files := r.rescued()
			if !c.w.written {
				return
			}
			if len(files) != 1 {
				t.Fatalf("rescue files: %v", files)
			}
			saved, err := OpenRescue(files[0])
			must(t, err)
			defer saved.Close()
			got := uniteRanges(saved.Extents(), nil)
			if missed := subtractRanges(want, got); len(missed) > 0 {
				t.Errorf("not saved: %v", missed)
			}
			if c.w.known && c.w.grain == BlockSize && totalBytes(got) > totalBytes(want)+2*ChunkBytes {
				t.Errorf("saved %d bytes, only %d were its own", totalBytes(got), totalBytes(want))
			}
			for i, x := range saved.Extents() {
				b, err := saved.Extent(i)
				must(t, err)
				if string(b) != string(old[x.Offset:x.End()]) {
					t.Errorf("saved at %v is not what the copy held", x)
				}
			}
			if saved.Info.Common != r.common || saved.Info.Lineage.Tip() != r.tip {
				t.Errorf("%+v", saved.Info)
			}
			// From here on it is a replica like others.
			wroteSome(r.src, 900, 5)
			r.sync()
			r.disk.check(r.src)
			if e := r.last("old"); e.Action != "incremental" || e.Link.MarkedBytes > 1<<20 {
				t.Errorf("afterwards: %+v", e)
			}
		})
	}
}

// Policies decide by themselves, where they can tell; with none the operator does.
func TestSplitBrainPolicies(t *testing.T) {
	for _, c := range []struct {
		name    string
		w       wayward
		discard bool
	}{
		{"older primary", wayward{known: true, written: true, policy: SplitBrainOlder}, true},
		{"least changes", wayward{known: true, written: true, policy: SplitBrainLeast}, true},
		{"zero changes, it was written", wayward{known: true, written: true, policy: SplitBrainZero}, false},
		{"zero changes, it was not", wayward{known: true, clean: 8, policy: SplitBrainZero}, true},
		{"zero changes, not known", wayward{written: true, policy: SplitBrainZero}, false},
		{"none", wayward{known: true, written: true, policy: SplitBrainNone}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.w.grain = 64 << 10
			r := newWayward(t, c.w)
			if !c.discard {
				r.refused("both went on separately")
				return
			}
			r.sync()
			r.disk.check(r.src)
			if p := r.plan("old"); !strings.Contains(p.Rule, string(c.w.policy)) {
				t.Errorf("%v", p)
			}
		})
	}
}

// When what only the copy has can't be saved, nothing of it is overwritten.
func TestNothingIsGivenUpUnsaved(t *testing.T) {
	for _, c := range []struct{ name, why string }{{"no folder", "name one for rescue files"}, {"a folder that is gone", "no such file"}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newWayward(t, wayward{grain: BlockSize, known: true, written: true})
			r.refused("both went on separately")
			if c.name == "no folder" {
				r.disk.rep.rescueDir = ""
			} else {
				must(t, os.Remove(r.dir))
			}
			old := dataOf(t, r.disk.store, testVolumeSize)
			must(t, r.disk.rep.GiveUp(r.tip))
			r.refused(c.why)
			if st := r.disk.rep.Status(); st.Strayed == "" || st.Committed != r.tip || st.Err != nil {
				t.Errorf("%+v", st)
			}
			if at := firstDifference(dataOf(t, r.disk.store, testVolumeSize), old); at >= 0 {
				t.Errorf("overwritten at %d", at)
			}
		})
	}
}

// Power is lost anywhere while a strayed copy is overwritten: it holds its old image,
// strayed, or the new one whole, and what only it had is then in a rescue file.
func TestGivingUpSurvivesEveryFault(t *testing.T) {
	for _, full := range []bool{true, false} {
		m := newModel(t, 5, testVolume)
		m.fill(m.image)
		m.next, m.lineage = 9, line(1, 7)
		o := testOptions(m.size)
		dev := testDevice(m.size)
		_, err := dev.WriteAt(m.image, 0)
		must(t, err)
		stray := Range{1 << 20, 64 << 10}
		only := make([]byte, stray.Length)
		m.fill(only)
		_, err = dev.WriteAt(only, stray.Offset)
		must(t, err)
		o.Holds = &Holding{Lineage: line(1, 11), Strayed: "written", Since: 7, Changed: []Range{stray}}
		must(t, FormatReplica(dev, o))
		before := dataOf(t, dev, m.size)
		oldEpochs, newEpochs := 0, 0
		discard := func(d *blocktest.Memory, dir string, m *model) error {
			r, err := OpenReplica(context.Background(), d, OpenOptions{RescueDir: dir})
			if err != nil {
				return err
			}
			defer r.Close()
			c, err := NewCompressor(CodecNone)
			must(t, err)
			meta, l := FrameMeta{Epoch: 9, Attempt: 1}, Lineage{gen7(1), {gen(2), 9}}
			frames := AppendFrames(nil, meta, stray.Offset, m.image[stray.Offset:stray.End()], c)
			if full {
				frames = AppendFrames(frames, meta, 0, m.image[:256<<10], c)
			}
			digest := NewStreamDigest()
			must(t, digest.AddFrames(frames))
			err = r.Begin(context.Background(), EpochStart{Epoch: 9, Attempt: 1, Mode: ModeJournal, Full: full, Lineage: l, Discard: line(1, 11).Tip()})
			if err == nil {
				err = r.Append(context.Background(), 0, frames)
			}
			if err == nil {
				err = r.Commit(context.Background(), EpochCommit{Epoch: 9, Attempt: 1, Streams: []StreamSum{digest.Sum()}})
			}
			if err == nil {
				err = r.WaitApplied(context.Background(), 9)
			}
			return err
		}
		var dir string
		looks := 0
		eachPowerCut(t, dev, func(d *blocktest.Memory) error {
			dir = t.TempDir()
			return discard(d, dir, m)
		}, func(t *testing.T, after *blocktest.Memory) {
			if looks++; looks%4 != 0 {
				return
			}
			r, err := OpenReplica(t.Context(), after, OpenOptions{})
			must(t, err)
			defer r.Close()
			st := r.Status()
			want := m.image
			if st.Committed == line(1, 11).Tip() {
				oldEpochs++
				want = before
			} else {
				newEpochs++
				files, err := filepath.Glob(filepath.Join(dir, "*.rescue"))
				must(t, err)
				if len(files) != 1 {
					t.Fatalf("it holds %v, rescue files are %v", st.Committed, files)
				}
				saved, err := OpenRescue(files[0])
				must(t, err)
				defer saved.Close()
				b, err := saved.Extent(0)
				must(t, err)
				if string(b) != string(only) || len(saved.Extents()) != 1 || saved.Extents()[0] != stray {
					t.Fatalf("saved %v", saved.Extents())
				}
				since, err := r.ChangedSince(t.Context(), Position{gen(1), 7})
				if !errors.Is(err, ErrTrackingLost) {
					t.Fatalf("it tells what changed since before it switched: %v, %v", since, err)
				}
			}
			if (st.Strayed != "") != (st.Committed == line(1, 11).Tip()) || st.State != DiskConsistent {
				t.Fatalf("%+v", st)
			}
			if at := firstDifference(dataOf(t, after, m.size), want); at >= 0 {
				t.Fatalf("holds %v, differs at %d", st.Committed, at)
			}
		})
		if oldEpochs == 0 || newEpochs == 0 {
			t.Errorf("not both outcomes came: %d, %d", oldEpochs, newEpochs)
		}
	}
}

func gen7(n byte) Position { return Position{gen(n), 7} }

// A replica guards itself, whatever its session let pass.
func TestReplicaGivesUpOnlyOnTheWord(t *testing.T) {
	o := testOptions(testVolume)
	o.Holds = &Holding{Lineage: line(1, 11), Strayed: "written"}
	dev := testDevice(testVolume)
	must(t, FormatReplica(dev, o))
	wayward := testDevice(testVolume)
	o.Holds = &Holding{Lineage: line(1, 11)}
	must(t, FormatReplica(wayward, o))
	here, other := line(1, 11).Tip(), line(1, 7, 2, 12)
	start := EpochStart{Epoch: 12, Attempt: 1, Mode: ModeJournal, Full: true, Lineage: other, Discard: here}
	with := func(change func(*EpochStart)) EpochStart {
		s := start
		change(&s)
		return s
	}
	for _, c := range []struct {
		name  string
		dev   Store
		dir   string
		start EpochStart
		want  string // "": it may begin
	}{
		{"strayed, the word given", dev, "x", start, ""},
		{"strayed, changes only", dev, "x", with(func(s *EpochStart) { s.Full = false }), ""},
		{"strayed, no word", dev, "x", with(func(s *EpochStart) { s.Discard = Position{} }), "only on the operator's word"},
		{"strayed, no word, it could follow", dev, "x", with(func(s *EpochStart) { s.Lineage, s.Discard = line(1, 12), Position{} }), "only on the operator's word"},
		{"strayed, the word is for another position", dev, "x", with(func(s *EpochStart) { s.Discard.Epoch-- }), "operator's word is for"},
		{"strayed, in place", dev, "x", with(func(s *EpochStart) { s.Mode = ModeInPlace }), "nothing given up"},
		{"strayed, no folder", dev, "", start, "no folder"},
		{"strayed, no history in common", dev, "x", with(func(s *EpochStart) { s.Lineage = line(3, 12) }), "a history in common"},
		{"went its own way, the word given", wayward, "x", start, ""},
		{"went its own way, the word is for another position", wayward, "x", with(func(s *EpochStart) { s.Discard.Epoch-- }), "operator's word is for"},
		{"it can follow, and is given up", wayward, "x", with(func(s *EpochStart) { s.Lineage = line(1, 12) }), "a history in common"},
	} {
		r, err := OpenReplica(t.Context(), c.dev, OpenOptions{RescueDir: c.dir})
		must(t, err)
		err = r.Begin(t.Context(), c.start)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		must(t, r.Close())
	}
}

// What is said of data that is there: any of it may be other than zero, what changed is
// named, and what somebody writes to it later is noticed.
func TestFormatAroundData(t *testing.T) {
	o := testOptions(testVolume)
	for _, h := range []Holding{
		{Lineage: line(1, 11)},
		{Lineage: line(1, 11), Since: 7, Changed: []Range{{ChunkBytes + 4096, 4096}, {5 * ChunkBytes, ChunkBytes + 1}}},
		{Lineage: line(1, 3, 2, 11), Strayed: strings.Repeat("w", MaxStrayedReason), Since: 11, CutUnixNanos: 4},
	} {
		dev := testDevice(testVolume)
		o.Holds = &h
		must(t, FormatReplica(dev, o))
		r := open(t, dev)
		st := r.Status()
		if st.State != DiskConsistent || !st.Lineage.Equal(h.Lineage) || st.Strayed != h.Strayed || st.NeedsFull || st.CutUnixNanos != h.CutUnixNanos {
			t.Errorf("%+v of %+v", st, h)
		}
		image, err := r.Hold(t.Context())
		must(t, err)
		data, err := image.DataRanges()
		must(t, err)
		if totalBytes(data) != testVolume {
			t.Errorf("data only in %v", data)
		}
		since := max(h.Since, 1)
		if h.Since == 0 {
			since = 11
		}
		changed, err := image.ChangedSince(since)
		must(t, err)
		if missed := subtractRanges(cleanRanges(h.Changed, testVolume), changed); len(missed) > 0 || len(h.Changed) == 0 && len(changed) > 0 || totalBytes(changed) > 3*ChunkBytes {
			t.Errorf("changed since %d: %v of %v", since, changed, h.Changed)
		}
		if _, err := image.ChangedSince(since - 1); !errors.Is(err, ErrTrackingLost) {
			t.Errorf("since before: %v", err)
		}
		image.Release()
		must(t, r.Close())
		if _, err := dev.WriteAt(make([]byte, 4096), 8192); err != nil {
			t.Fatal(err)
		}
		if r := open(t, dev); r.Status().State != DiskConsistent {
			t.Error("the same bytes count as a change")
		}
		page := make([]byte, 4096)
		page[0] = 1
		if _, err := dev.WriteAt(page, 8192); err != nil {
			t.Fatal(err)
		}
		if r := open(t, dev); !r.Status().ChangedOutside {
			t.Error("what was written from outside is not noticed")
		}
	}
	for name, h := range map[string]*Holding{
		"no history":         {},
		"malformed":          {Lineage: line(1, 3, 1, 4)},
		"long reason":        {Lineage: line(1, 3), Strayed: strings.Repeat("w", MaxStrayedReason+1)},
		"since later":        {Lineage: line(1, 3), Since: 4},
		"changed since what": {Lineage: line(1, 3), Changed: []Range{{0, 4096}}},
		"changed outside":    {Lineage: line(1, 3), Since: 2, Changed: []Range{{testVolume, 4096}}},
	} {
		dev := testDevice(testVolume)
		o.Holds = h
		if err := FormatReplica(dev, o); err == nil || dev.Count(blocktest.OpWrite)+dev.Count(blocktest.OpZeroOut) > 0 {
			t.Errorf("%s: %v", name, err)
		}
	}
}
