package protocol

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev/blocktest"
)

func TestPlanTakeOver(t *testing.T) {
	copyAt := func(l Lineage) ReplicaStatus {
		return ReplicaStatus{State: DiskConsistent, Lineage: l, CutUnixNanos: 5e9}
	}
	bytesBehind, seconds, old := uint64(4096), 2.0, 3600.0
	whole := copyAt(line(1, 10))
	with := func(change func(*ReplicaStatus)) ReplicaStatus {
		st := whole
		change(&st)
		return st
	}
	for _, c := range []struct {
		name string
		st   ReplicaStatus
		o    TakeOverOptions
		want error
		text string // of the error, or of the loss
		open uint64
	}{
		{"the primary stood down at the same cut", whole, TakeOverOptions{Heard: Heard{Lineage: line(1, 10)}}, nil, "nothing is lost", 11},
		{"the copy is ahead of what was heard", whole, TakeOverOptions{Heard: Heard{Lineage: line(1, 9)}}, nil, "nothing is lost", 11},
		{"nothing was heard", whole, TakeOverOptions{}, ErrWouldLose, "not known", 0},
		{"nothing was heard, forced", whole, TakeOverOptions{Force: true}, nil, "not known", 11},
		{"an epoch was open", whole, TakeOverOptions{Heard: Heard{Lineage: line(1, 11)}}, ErrWouldLose, "0 later cuts and an open epoch", 0},
		{"cuts were taken", whole, TakeOverOptions{Heard: Heard{Lineage: line(1, 14), Seconds: &seconds, BehindBytes: &bytesBehind}}, ErrWouldLose, "3 later cuts and an open epoch, 2.0 s until the primary was last heard of, 4096 bytes by then;", 0},
		{"the same, heard before a start", whole, TakeOverOptions{Heard: Heard{Lineage: line(1, 14), Seconds: &seconds, BehindBytes: &bytesBehind, OldSeconds: &old}}, ErrWouldLose, "4096 bytes by then, which was 3600 s ago, and the agent here was started since", 0},
		{"cuts were taken, forced", whole, TakeOverOptions{Heard: Heard{Lineage: line(1, 14)}, Force: true}, nil, "3 later cuts", 15},
		{"another took over before", whole, TakeOverOptions{Heard: Heard{Lineage: line(1, 8, 2, 12)}}, ErrWouldLose, "3 later cuts", 0},
		{"alive", whole, TakeOverOptions{Heard: Heard{Lineage: line(1, 10), Alive: true}}, ErrPrimaryAlive, "stand down first", 0},
		{"alive, forced", whole, TakeOverOptions{Heard: Heard{Lineage: line(1, 11), Alive: true}, Force: true}, nil, "0 later cuts", 12},
		{"blank", ReplicaStatus{State: DiskBlank}, TakeOverOptions{Force: true}, ErrNotConsistent, "blank", 0},
		{"inconsistent", with(func(s *ReplicaStatus) { s.State, s.Reason = DiskInconsistent, "changed outside" }), TakeOverOptions{Force: true}, ErrNotConsistent, "changed outside", 0},
		{"needs a full sync", with(func(s *ReplicaStatus) { s.NeedsFull = true }), TakeOverOptions{Force: true}, ErrNotConsistent, "", 0},
		{"epochs wait in the journal", with(func(s *ReplicaStatus) { s.PendingEpochs = 1 }), TakeOverOptions{Force: true}, ErrNotConsistent, "", 0},
		{"strayed", with(func(s *ReplicaStatus) { s.Strayed = "written after its last cut" }), TakeOverOptions{Heard: Heard{Lineage: line(1, 10)}}, ErrStrayed, "written after its last cut", 0},
		{"strayed, forced", with(func(s *ReplicaStatus) { s.Strayed = "written" }), TakeOverOptions{Heard: Heard{Lineage: line(1, 10)}, Force: true}, nil, "nothing is lost", 11},
	} {
		c.o.Fresh = gen(9)
		p, err := PlanTakeOver(c.st, c.o)
		text := p.Loss.String()
		if err != nil {
			text = err.Error()
		}
		if !errors.Is(err, c.want) || !strings.Contains(text, c.text) || err == nil && p.State.OpenEpoch != c.open {
			t.Errorf("%s: %+v, %v (%s)\nwant epoch %d open, %v, %q", c.name, p.State, err, text, c.open, c.want, c.text)
		}
		if err != nil && p.State.OpenEpoch != 0 {
			t.Errorf("%s: refused, yet with a state: %+v", c.name, p.State)
		}
		if err == nil {
			rel := Compare(p.State.Effective(), c.st.Lineage)
			if p.State.Generation != gen(9) || p.State.Clean || rel.Kind != Ahead || rel.Common != c.st.Lineage.Tip() {
				t.Errorf("%s: %+v is %v", c.name, p.State, rel)
			}
			if h := c.o.Heard.Lineage; len(h) > 0 && p.State.OpenEpoch <= h.Tip().Epoch {
				t.Errorf("%s: epoch %d was used by the old primary", c.name, p.State.OpenEpoch)
			}
		}
	}
	if _, err := PlanTakeOver(whole, TakeOverOptions{Force: true}); err == nil {
		t.Error("a generation of zeros")
	}
}

func TestPlanStandDown(t *testing.T) {
	clean := SourceState{Lineage: line(1, 10), Generation: gen(1), Clean: true}
	opened := SourceState{Lineage: line(1, 10), Generation: gen(1), OpenEpoch: 11}
	knows := func(changed ...Range) func(uint64) ([]Range, error) {
		return func(uint64) ([]Range, error) { return changed, nil }
	}
	asked := func(want uint64) func(uint64) ([]Range, error) {
		return func(since uint64) ([]Range, error) {
			if since != want {
				return nil, ErrTrackingLost
			}
			return []Range{{0, 4096}}, nil
		}
	}
	lost := func(uint64) ([]Range, error) { return nil, ErrTrackingLost }
	broken := errors.New("broken on purpose")
	for _, c := range []struct {
		name    string
		s       SourceState
		o       StandDownOptions
		want    error // nil: none
		lineage Lineage
		strayed bool
		since   uint64
		changed int
	}{
		{"clean", clean, StandDownOptions{}, nil, line(1, 10), false, 10, 0},
		{"clean, allowed to stray", clean, StandDownOptions{Stray: true}, nil, line(1, 10), false, 10, 0},
		{"clean, written outside", clean, StandDownOptions{Outside: "by hand"}, ErrUnclean, nil, false, 0, 0},
		{"clean, written outside, strays", clean, StandDownOptions{Outside: "by hand", Stray: true, ChangedSince: asked(10)}, nil, line(1, 11), true, 0, 0},
		{"unclean, no tracker", opened, StandDownOptions{}, ErrUnclean, nil, false, 0, 0},
		{"unclean, tracking lost", opened, StandDownOptions{ChangedSince: lost}, ErrUnclean, nil, false, 0, 0},
		{"unclean, written", opened, StandDownOptions{ChangedSince: knows(Range{0, 4096})}, ErrUnclean, nil, false, 0, 0},
		{"unclean, yet nothing was written", opened, StandDownOptions{ChangedSince: knows()}, nil, line(1, 10), false, 10, 0},
		{"the tracker fails", opened, StandDownOptions{Stray: true, ChangedSince: func(uint64) ([]Range, error) { return nil, broken }}, broken, nil, false, 0, 0},
		{"strays, written", opened, StandDownOptions{Stray: true, ChangedSince: asked(10)}, nil, line(1, 11), true, 10, 1},
		{"strays, nobody can tell", opened, StandDownOptions{Stray: true}, nil, line(1, 11), true, 0, 0},
		{"strays, from before the last cut", opened, StandDownOptions{Stray: true, ChangedSince: func(since uint64) ([]Range, error) {
			return asked(map[bool]uint64{true: 10, false: 7}[since == 10])(since)
		}, Follow: line(1, 7, 2, 12)}, nil, line(1, 11), true, 7, 1},
		{"clean, the other took over before", clean, StandDownOptions{ChangedSince: asked(7), Follow: line(1, 7, 2, 12)}, nil, line(1, 10), false, 7, 1},
		{"clean, the other took over before, nobody can tell", clean, StandDownOptions{Follow: line(1, 7, 2, 12)}, nil, line(1, 10), false, 0, 0},
		{"clean, the other took over there", clean, StandDownOptions{Follow: line(1, 10, 2, 12)}, nil, line(1, 10), false, 10, 0},
		{"clean, the other is unrelated", clean, StandDownOptions{Follow: line(5, 10)}, nil, line(1, 10), false, 10, 0},
		{"no cut was ever taken", SourceState{Generation: gen(1), OpenEpoch: 1}, StandDownOptions{Stray: true, ChangedSince: knows()}, nil, line(1, 1), true, 0, 0},
		{"never primary", SourceState{}, StandDownOptions{Stray: true}, errAny, nil, false, 0, 0},
		{"a restore is not finished", BeginRestore("ebs", line(1, 10)), StandDownOptions{Stray: true}, errAny, nil, false, 0, 0},
	} {
		h, err := PlanStandDown(c.s, c.o)
		if c.want != nil {
			if err == nil || c.want != errAny && !errors.Is(err, c.want) {
				t.Errorf("%s: %+v, %v", c.name, h, err)
			}
			continue
		}
		must(t, err)
		if !h.Lineage.Equal(c.lineage) || (h.Strayed != "") != c.strayed || h.Since != c.since || len(h.Changed) != c.changed {
			t.Errorf("%s: %+v", c.name, h)
		}
		if err := h.check(testVolumeSize); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

var errAny = errors.New("any")

// labelOf is a device's label that may fail, before or after it is written.
type labelOf struct {
	memState
	fail, written bool
}

func (l *labelOf) Save(b []byte) error {
	if l.fail && !l.written {
		return errors.New("the label is broken on purpose")
	}
	if err := l.memState.Save(b); err != nil || l.fail {
		return errors.Join(err, errors.New("the label is broken on purpose, too late"))
	}
	return nil
}

// replicaWith is a device that holds epochs, the last ones still in its journal.
func replicaWith(t *testing.T, m *model) *blocktest.Memory {
	t.Helper()
	dev := testDevice(m.size)
	must(t, FormatReplica(dev, testOptions(m.size)))
	r := open(t, dev)
	must(t, m.send(r, epochPlan{mode: ModeInPlace, full: true, blocks: 3}))
	image, err := r.Hold(t.Context())
	must(t, err)
	defer image.Release()
	for range 3 {
		must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 5}))
	}
	return dev.PowerCut(m.rng)
}

func takeOver(dev Store, label StateStore) error {
	r, err := OpenReplica(context.Background(), dev, OpenOptions{TookOver: true})
	if err != nil {
		return err
	}
	_, err = r.TakeOver(context.Background(), label, TakeOverOptions{Force: true})
	return errors.Join(err, r.Close())
}

// roleOf is what a device and its label may be used as, and fails if both.
func roleOf(t *testing.T, dev *blocktest.Memory, label *memState) string {
	t.Helper()
	_, _, asPrimary := BeginPrimary(&memState{b: label.b})
	r, err := OpenReplica(t.Context(), dev.Clone(), OpenOptions{})
	if err == nil {
		must(t, r.Close())
	}
	switch {
	case asPrimary == nil && err == nil:
		t.Fatal("it may be used as primary and as replica")
	case asPrimary == nil:
		if !errors.Is(err, ErrTookOver) && !errors.Is(err, ErrNoSuperblock) {
			t.Fatal(err)
		}
		return "primary"
	case err == nil:
		return "replica"
	}
	return "neither"
}

// data is what a device holds of the volume.
func dataOf(t *testing.T, dev Store, size int64) []byte {
	t.Helper()
	b := make([]byte, size)
	_, err := dev.ReadAt(b, 0)
	must(t, err)
	return b
}

// A replica takes over, whatever fails in between and wherever the power goes:
// it is never both, and either way leads out of any state between, with the image of the
// last committed epoch.
func TestTakeOverSurvivesFaults(t *testing.T) {
	t.Parallel()
	m := newModel(t, 3, testVolume)
	dev := replicaWith(t, m)
	tip, want := m.acked, m.images[m.acked]
	secondary := mustEncode(t, SourceState{Lineage: line(1, 1), Generation: gen(1), OpenEpoch: 2, Secondary: true})
	seen := map[string]int{}
	outcome := func(t *testing.T, dev *blocktest.Memory, label *memState) {
		role := roleOf(t, dev, label)
		seen[role]++
		for _, back := range []bool{false, true} {
			d, l := dev.Clone(), &memState{b: label.b}
			if back {
				o := StandDownOptions{Format: testOptions(m.size), ChangedSince: func(uint64) ([]Range, error) { return nil, nil }}
				_, err := StandDown(l, d, o)
				must(t, err)
				if got := roleOf(t, d, l); got != "replica" {
					t.Fatalf("stood down from %s it is %s", role, got)
				}
				r, err := OpenReplica(t.Context(), d, OpenOptions{})
				must(t, err)
				defer r.Close()
				st := r.Status()
				if st.State != DiskConsistent || st.Committed != tip || st.Strayed != "" {
					t.Fatalf("%+v", st)
				}
				if past, err := ReadInheritance(d, st.VolumeUUID, m.size, m.lineage.Extend(Position{gen(9), tip.Epoch + 1})); err == nil {
					t.Fatalf("stood down it still tells of the time before %v", past.At())
				}
			} else {
				err := takeOver(d, l)
				if role == "primary" && !errors.Is(err, ErrTookOver) || role != "primary" && err != nil {
					t.Fatalf("taken over again from %s: %v", role, err)
				}
				if got := roleOf(t, d, l); got != "primary" {
					t.Fatalf("taken over from %s it is %s", role, got)
				}
				s, _, err := BeginPrimary(l)
				must(t, err)
				if rel := Compare(s.Effective(), m.lineage); rel.Kind != Ahead || rel.Common != tip {
					t.Fatalf("it begins as %+v: %v", s, rel)
				}
				past, err := ReadInheritance(d, testOptions(m.size).VolumeUUID, m.size, s.Effective())
				if err != nil || past.At() != tip {
					t.Fatalf("of the time before %v it tells: %+v, %v", tip, past, err)
				}
			}
			if at := firstDifference(dataOf(t, d, m.size), want); at >= 0 {
				t.Fatalf("from %s: the image of %v differs at %d", role, tip, at)
			}
		}
	}
	var label *labelOf
	eachPowerCut(t, dev, func(d *blocktest.Memory) error {
		label = &labelOf{memState: memState{b: secondary}}
		return takeOver(d, label)
	}, func(t *testing.T, after *blocktest.Memory) {
		if len(seen) > 0 && label.rngSkip() {
			return
		}
		outcome(t, after, &label.memState)
	})
	for _, written := range []bool{false, true} {
		d := dev.Clone()
		label = &labelOf{memState: memState{b: secondary}, fail: true, written: written}
		if err := takeOver(d, label); err == nil {
			t.Fatal("the label failed, and nobody said so")
		}
		outcome(t, d.PowerCut(m.rng), &label.memState)
	}
	d := dev.Clone()
	label = &labelOf{memState: memState{b: secondary}}
	must(t, takeOver(d, label))
	outcome(t, d, &label.memState)
	if seen["primary"] == 0 || seen["replica"] == 0 || seen["neither"] == 0 {
		t.Errorf("not all outcomes came: %v", seen)
	}
}

// rngSkip thins out the looks, which are slow: one in twenty.
func (l *labelOf) rngSkip() bool { l.saves++; return l.saves%20 != 0 }

// A primary stands down, whatever fails in between: it is never both, and goes
// down when told again.
func TestStandDownSurvivesFaults(t *testing.T) {
	for _, clean := range []bool{true, false} {
		t.Run(fmt.Sprintf("clean %v", clean), func(t *testing.T) {
			m := newModel(t, 4, testVolume)
			dev, l := replicaWith(t, m), &memState{}
			must(t, takeOver(dev, l))
			s, _, err := BeginPrimary(l)
			must(t, err)
			// It is written as primary, and a cut is taken.
			block := bytes.Repeat([]byte{0x77}, 16*BlockSize)
			_, err = dev.WriteAt(block, 512<<10)
			must(t, err)
			must(t, dev.Flush())
			if s, err = s.UseEpoch(); err == nil && clean {
				s = s.Close()
			}
			must(t, err)
			must(t, saveState(l, s))
			want := dataOf(t, dev, m.size)
			o := StandDownOptions{Format: testOptions(m.size), Stray: true}
			o.Format.ReplicaUUID = [16]byte{}
			seen := map[string]int{}
			check := func(t *testing.T, d *blocktest.Memory, label *memState) {
				seen[roleOf(t, d, label)]++
				h, err := StandDown(label, d, o)
				must(t, err)
				if roleOf(t, d, label) != "replica" {
					t.Fatal("told again it is no replica")
				}
				r, err := OpenReplica(t.Context(), d, OpenOptions{})
				must(t, err)
				defer r.Close()
				st := r.Status()
				if !st.Lineage.Equal(s.Effective()) || (st.Strayed == "") != clean || !h.Lineage.Equal(st.Lineage) || st.State != DiskConsistent {
					t.Fatalf("%+v, held %v", st, s.Effective())
				}
				if at := firstDifference(dataOf(t, d, m.size), want); at >= 0 {
					t.Fatalf("differs at %d", at)
				}
			}
			var label *labelOf
			eachPowerCut(t, dev, func(d *blocktest.Memory) error {
				label = &labelOf{memState: memState{b: l.b}}
				_, err := StandDown(label, d, o)
				return err
			}, func(t *testing.T, after *blocktest.Memory) {
				if label.rngSkip() {
					return
				}
				check(t, after, &memState{b: label.b})
			})
			for _, written := range []bool{false, true} {
				label := &labelOf{memState: memState{b: l.b}, fail: true, written: written}
				d := dev.Clone()
				if _, err := StandDown(label, d, o); err == nil {
					t.Fatal("the label failed, and nobody said so")
				}
				check(t, d, &memState{b: label.b})
			}
			if seen["primary"] == 0 || seen["replica"] == 0 || seen["neither"] == 0 {
				t.Errorf("not all outcomes came: %v", seen)
			}
		})
	}
}

// What does not fit is refused before the label says anything.
func TestStandDownRefusesBeforeItWrites(t *testing.T) {
	s := SourceState{Lineage: line(1, 10), Generation: gen(1), Clean: true}
	label := &memState{b: mustEncode(t, s)}
	for name, o := range map[string]FormatOptions{
		"too small": testOptions(64 << 20),
		"no volume": {SizeBytes: testVolume, JournalBytes: MinJournalBytes},
	} {
		dev := testDevice(testVolume)
		if h, err := StandDown(label, dev, StandDownOptions{Format: o}); err == nil || label.saves > 0 || dev.Count(blocktest.OpWrite)+dev.Count(blocktest.OpZeroOut) > 0 {
			t.Errorf("%s: %+v, %v, %d writes of the label", name, h, err, label.saves)
		}
	}
}

// A replica in use takes over with all that it acknowledged, also what still waits in
// the journal; what was never committed is dropped, and nothing can follow.
func TestTakeOverFinishesTheJournal(t *testing.T) {
	m := newModel(t, 6, testVolume)
	dev := testDevice(m.size)
	must(t, FormatReplica(dev, testOptions(m.size)))
	r := open(t, dev)
	must(t, m.send(r, epochPlan{mode: ModeInPlace, full: true, blocks: 3}))
	image, err := r.Hold(t.Context())
	must(t, err)
	for range 3 {
		must(t, m.send(r, epochPlan{mode: ModeJournal, blocks: 5}))
	}
	must(t, r.Begin(t.Context(), EpochStart{Epoch: m.next, Attempt: 99, Mode: ModeJournal, Lineage: m.lineage.Extend(Position{m.lineage.Tip().Generation, m.next})}))
	if r.Status().PendingEpochs != 3 {
		t.Fatalf("%+v", r.Status())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.TakeOver(ctx, &memState{}, TakeOverOptions{Force: true}); !errors.Is(err, context.Canceled) {
		t.Fatalf("it did not wait for the journal: %v", err)
	}
	time.AfterFunc(10*time.Millisecond, image.Release)
	label := &memState{}
	p, err := r.TakeOver(t.Context(), label, TakeOverOptions{Heard: Heard{Lineage: m.lineage}})
	must(t, err)
	if !p.Loss.None || p.State.OpenEpoch != m.acked.Epoch+1 {
		t.Errorf("%+v", p)
	}
	if at := firstDifference(dataOf(t, dev, m.size), m.images[m.acked]); at >= 0 {
		t.Errorf("differs at %d", at)
	}
	if err := m.send(r, epochPlan{mode: ModeJournal, blocks: 5}); !errors.Is(err, ErrTookOver) {
		t.Errorf("an epoch after it took over: %v", err)
	}
	if i, err := r.Hold(t.Context()); err == nil {
		t.Errorf("an image to restore from after it took over: %v", i.Position())
	}
	s, err := DecodeSourceState(label.b)
	must(t, err)
	if s.OpenEpoch != p.State.OpenEpoch || s.Generation != p.State.Generation {
		t.Errorf("the label says %+v, not %+v", s, p.State)
	}
}
