package volume

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"blockferry/blockdev/blocktest"
)

func sampleLabel(t testing.TB) *Label {
	t.Helper()
	areas, err := Layout(1<<30, LayoutOptions{TailBytes: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	return &Label{Sequence: 7, UUID: NewUUID(), EraID: NewUUID(), Identity: "serial-1", EraBlockBytes: 128 << 10, Areas: areas,
		MetaFormatted: true, Cuts: Cuts{{1, 2}, {5, 2}, {6, 9}}, State: []byte("state")}
}

func TestLabelSurvivesTheDisk(t *testing.T) {
	d := blocktest.NewMemory(4 << 20)
	want := sampleLabel(t)
	for i := range 5 {
		want.State = []byte(fmt.Sprint("state", i))
		if i == 2 { // from then on of version 2
			want.Watch = Watch{Cut: 6, Places: []WatchedPlace{{Offset: 0, Digest: [32]byte{1}}, {Offset: 64 << 10, Digest: [32]byte{31: 2}}}}
		}
		if b, err := want.encode(); err != nil || (b[8] == 1) != (i < 2) {
			t.Fatalf("version %d of label %d, %v", b[8], i, err)
		}
		if err := writeLabel(d, want); err != nil {
			t.Fatal(err)
		}
		got, err := ReadLabel(d)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("got %+v, %v; want %+v", got, err, want)
		}
	}
}

// A power cut at any point of any write leaves the old label or the new one.
func TestLabelSurvivesPowerCuts(t *testing.T) {
	d := blocktest.NewMemory(4 << 20)
	l := sampleLabel(t)
	l.State = bytes.Repeat([]byte("x"), 20000)
	rng := rand.New(rand.NewPCG(1, 0))
	var may []string // the last durable label, and what was tried since
	for i := range 300 {
		next := *l
		next.State = append([]byte(fmt.Sprintf("%8d", i)), l.State[8:]...)
		failed := rng.IntN(2) == 0
		if failed {
			d.FailAt(blocktest.OpFlush, 0, errors.New("flush fails"))
		}
		err := writeLabel(d, &next)
		if failed != (err != nil) {
			t.Fatalf("write %d: %v", i, err)
		}
		if err == nil {
			*l = next
			may = nil
		}
		may = append(may, string(next.State[:8]))
		if l.Sequence == 7 {
			continue // none is durable yet
		}
		got, err := ReadLabel(d.Clone().PowerCut(rng))
		if err != nil {
			t.Fatalf("after write %d: %v", i, err)
		}
		if s := string(got.State[:8]); !slices.Contains(may, s) {
			t.Fatalf("after write %d the label is that of %s, want one of %v", i, s, may)
		}
	}
}

func TestLabelKeepsToItsPlace(t *testing.T) {
	l := sampleLabel(t)
	l.State = make([]byte, MaxStateBytes)
	for i := range maxCuts {
		l.Cuts = l.Cuts.With(CutEra{uint64(100 + i), uint32(100 + i)})
	}
	l.Identity = string(make([]byte, maxIdentity))
	for i := range int64(maxWatched) {
		l.Watch.Places = append(l.Watch.Places, WatchedPlace{Offset: i * watchBytes})
	}
	b, err := l.encode()
	if err != nil || len(b) > slotBytes {
		t.Fatalf("the largest label has %d bytes, %v", len(b), err)
	}
	l.State = make([]byte, MaxStateBytes+1)
	if _, err := l.encode(); err == nil {
		t.Fatal("a state that is too long was taken")
	}
}

func TestReadLabelTellsAbsentFromDamaged(t *testing.T) {
	d := blocktest.NewMemory(4 << 20)
	if _, err := ReadLabel(d); !errors.Is(err, ErrNoLabel) {
		t.Fatalf("zeros: %v", err)
	}
	l := sampleLabel(t)
	if err := writeLabel(d, l); err != nil {
		t.Fatal(err)
	}
	damage := func(d *blocktest.Memory, slot uint64) {
		b := make([]byte, 4096)
		at := int64(slot%2) * slotStride
		d.ReadAt(b, at)
		b[600]++
		d.WriteAt(b, at)
	}
	one := d.Clone()
	damage(one, l.Sequence)
	if _, err := ReadLabel(one); !errors.Is(err, ErrBadLabel) {
		t.Fatalf("damaged: %v", err)
	}
	// The older slot must not be believed when the newer can't be read.
	if err := writeLabel(d, l); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadLabel(d); err != nil || got.Damage != "" {
		t.Fatalf("whole: %+v, %v", got, err)
	}
	// It is believed when the newer is damaged, and the damage is named.
	newest := d.Clone()
	damage(newest, l.Sequence)
	got, err := ReadLabel(newest)
	if want := fmt.Sprintf("slot %d: %v", l.Sequence%2, ErrBadLabel); err != nil || got.Sequence != l.Sequence-1 || !strings.Contains(got.Damage, want) {
		t.Fatalf("the newest slot damaged: %+v, %v; want '%s'", got, err, want)
	}
	for k := range 2 {
		d.FailAt(blocktest.OpRead, k, errors.New("no"))
		if _, err := ReadLabel(d); err == nil || errors.Is(err, ErrNoLabel) {
			t.Fatalf("with read %d failing: %v", k+1, err)
		}
		for d.FailurePending(blocktest.OpRead) {
			d.ReadAt(make([]byte, 4096), 0)
		}
	}
}

// A label of a later version is not passed over for the older one beside it:
// the next write would put an older state over the newer.
func TestReadLabelRefusesALaterVersion(t *testing.T) {
	d := blocktest.NewMemory(4 << 20)
	l := sampleLabel(t)
	for range 2 {
		if err := writeLabel(d, l); err != nil {
			t.Fatal(err)
		}
	}
	l.Sequence++
	b, err := l.encode()
	if err != nil {
		t.Fatal(err)
	}
	le.PutUint32(b[8:], labelVersion+1)
	le.PutUint32(b[16:], 0)
	le.PutUint32(b[16:], crc32.Checksum(b, castagnoli))
	for i := range int64(2) { // beside an older one, then alone
		if _, err := d.WriteAt(b, (int64(l.Sequence)+i)%2*slotStride); err != nil {
			t.Fatal(err)
		}
		got, err := ReadLabel(d)
		if !errors.Is(err, ErrBadLabel) || !strings.Contains(err.Error(), "upgrade") || strings.Contains(err.Error(), "damaged") {
			t.Fatalf("%d slots of version %d: %+v, %v", i+1, labelVersion+1, got, err)
		}
	}
}

// A file system made over a volume's disk may leave the second slot. The disk is
// no volume then: nothing is written to it, and udev does not hide it.
func TestLabelDoesNotOutliveWhatIsWrittenOverIt(t *testing.T) {
	whole := blocktest.NewMemory(16 << 20)
	l := sampleLabel(t)
	for range 2 {
		if err := writeLabel(whole, l); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		at   int64
		what string
	}{
		{"xfs", 0, "XFSB"},
		{"ext4", 1080, "\x53\xef"}, // its first sectors are zeros
		{"gpt", 512, "EFI PART"},
		{"what nobody knows", 0, "anything"},
	} {
		for slot := range int64(2) {
			d := whole.Clone()
			over := make([]byte, slotBytes)
			copy(over[c.at:], c.what)
			d.WriteAt(over, slot*slotStride)
			if _, err := ReadLabel(d); !errors.Is(err, ErrNoLabel) {
				t.Errorf("%s over slot %d: %v", c.name, slot, err)
			}
			if content, why := Inspect(d); content != Foreign {
				t.Errorf("%s over slot %d: %s, %s", c.name, slot, content, why)
			}
			if role, _, err := Probe(d); role != "" || err != nil {
				t.Errorf("%s over slot %d: role '%s', %v", c.name, slot, role, err)
			}
		}
	}
}

func TestCutsAnswerTooMuchNeverTooLittle(t *testing.T) {
	var c Cuts
	if _, known := c.Since(5); known {
		t.Fatal("an empty table knows something")
	}
	era := map[uint64]uint32{}
	rng := rand.New(rand.NewPCG(2, 0))
	number, e := uint64(10), uint32(3)
	for range 3 * maxCuts {
		number += 1 + uint64(rng.IntN(3))
		e += uint32(rng.IntN(3))
		era[number] = e
		c = c.With(CutEra{number, e})
		if len(c) > maxCuts {
			t.Fatalf("%d cuts", len(c))
		}
	}
	if c[len(c)-1] != (CutEra{number, e}) || c[len(c)-2].Number < number-3 {
		t.Fatal("the newest cuts were dropped")
	}
	if _, known := c.Since(c[0].Number - 1); known {
		t.Fatal("it knows what was before its first cut")
	}
	for n, true := range era {
		if got, known := c.Since(n); !known || got > true {
			t.Fatalf("cut %d: era %d, %v; it began in %d", n, got, known, true)
		}
	}
}

func FuzzDecodeLabel(f *testing.F) {
	l := sampleLabel(f)
	b, err := l.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b, true)
	f.Add([]byte(labelMagic), false)
	l.Watch = Watch{Cut: 6, Places: []WatchedPlace{{Offset: 64 << 10}, {Offset: 1 << 20}}}
	if b, err = l.encode(); err != nil {
		f.Fatal(err)
	}
	f.Add(b, true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= 4096 { // past the checksum
			b = b[:len(b)&^4095]
			copy(b, labelMagic)
			le.PutUint32(b[8:], min(max(1, le.Uint32(b[8:])), labelVersion))
			le.PutUint32(b[12:], uint32(len(b)))
			le.PutUint32(b[16:], 0)
			le.PutUint32(b[16:], crc32.Checksum(b, castagnoli))
		}
		l, err := decodeLabel(b)
		if err != nil {
			if l != nil || !errors.Is(err, ErrNoLabel) && !errors.Is(err, ErrBadLabel) {
				t.Fatalf("%+v, %v", l, err)
			}
			return
		}
		again, err := l.encode()
		if err != nil {
			t.Fatal(err)
		}
		if l2, err := decodeLabel(again); err != nil || !reflect.DeepEqual(l, l2) {
			t.Fatalf("%+v came back as %+v, %v", l, l2, err)
		}
	})
}
