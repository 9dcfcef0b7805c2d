package volume

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"blockferry/blockdev/blocktest"
)

// Wherever a growth is cut off the volume is there, as large as it was or larger, with its data
// and, in what has come to it, zeros; done again it is done. No mark of before is believed.
func TestGrowSurvivesPowerCuts(t *testing.T) {
	const size, larger = 8<<20 + 4096, 40<<20 + 8192
	disk := blocktest.NewMemory(200 << 20)
	disk.Fill(bytes.Repeat([]byte("was here"), 512))
	// The disk held another volume, with its areas where the larger one's will be.
	was, err := FormatOn(disk, NewUUID(), LayoutOptions{SizeBytes: larger, TailBytes: 12 << 20}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := disk.WriteAt(bytes.Repeat([]byte("old tree"), 512), was.Areas.Meta.Offset+auxIDBytes); err != nil {
		t.Fatal(err)
	}
	if _, err := FormatOn(disk, NewUUID(), LayoutOptions{SizeBytes: size, TailBytes: 8 << 20}, []byte("state")); err != nil {
		t.Fatal(err)
	}
	o, err := OfflineOn(disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.BeginAt(5, []byte("the caller's")); err != nil {
		t.Fatal(err)
	}
	if err := o.change(func(l *Label) { l.MetaFormatted = true }); err != nil {
		t.Fatal(err)
	}
	if err := o.Remember(5); err != nil {
		t.Fatal(err)
	}
	began := o.Label()
	label := &began
	era := make([]byte, label.Areas.Meta.Length)
	if _, err := disk.ReadAt(era, label.Areas.Meta.Offset); err != nil {
		t.Fatal(err)
	}
	grow := func(d *blocktest.Memory) error {
		o, err := OfflineOn(d)
		if err != nil {
			return err
		}
		return o.Grow(context.Background(), LayoutOptions{SizeBytes: larger, TailBytes: 12 << 20}, nil)
	}
	want := bytes.Repeat([]byte("was here"), size/8)
	old, grown := 0, 0
	look := func(d *blocktest.Memory, done bool) {
		t.Helper()
		l, err := ReadLabel(d)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, l.Areas.Data.Length)
		if _, err := d.ReadAt(got, l.Areas.Data.Offset); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:size], want) || l.UUID != label.UUID || string(l.State) != "the caller's" {
			t.Fatal("the volume is another")
		}
		switch l.Areas.Data.Length {
		case size:
			old++
			// What is left of the marks may look whole: a label vouches for all of them, or for none.
			marks := make([]byte, len(era))
			if _, err := d.ReadAt(marks, label.Areas.Meta.Offset); err != nil {
				t.Fatal(err)
			}
			if l.EraID == label.EraID && !bytes.Equal(marks, era) {
				t.Fatal("the label vouches for marks that are gone")
			}
			if l.EraID != label.EraID && (len(l.Cuts) > 0 || l.MetaFormatted || len(l.Watch.Places) > 0) {
				t.Fatalf("marks of before are believed: %+v", l)
			}
			if done {
				t.Fatal("it has not grown")
			}
			return
		case larger:
		default:
			t.Fatalf("it has %d bytes", l.Areas.Data.Length)
		}
		grown++
		if firstNonzero(got[size:]) >= 0 {
			t.Fatalf("what came to it is not zeros at %d", firstNonzero(got[size:]))
		}
		for _, at := range []int64{l.Areas.Cow.Offset, l.Areas.Meta.Offset} {
			if id, err := readAux(d, at); !errors.Is(err, errNoAux) {
				t.Fatalf("what an earlier use left at %d counts: %+v, %v", at, id, err)
			}
		}
		head := make([]byte, 4096)
		if _, err := d.ReadAt(head, l.Areas.Meta.Offset+auxIDBytes); err != nil || firstNonzero(head) >= 0 {
			t.Fatalf("old era metadata is at %d: %v", l.Areas.Meta.Offset+auxIDBytes, err)
		}
		if id, err := readAux(d, l.Areas.Meta.Offset); err == nil && id.era == l.EraID || len(l.Cuts) > 0 || l.MetaFormatted {
			t.Fatalf("marks of before are believed: %+v", l)
		}
	}
	for _, op := range []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush, blocktest.OpZeroOut} {
		for k := 0; ; k++ {
			d := disk.Clone()
			d.FailAt(op, k, errors.New("broken on purpose"))
			err := grow(d)
			if d.FailurePending(op) {
				if err != nil {
					t.Fatal(err)
				}
				look(d.PowerCut(rand.New(rand.NewPCG(1, 1))), true)
				break
			}
			for seed := range uint64(20) {
				after := d.Clone().PowerCut(rand.New(rand.NewPCG(seed, uint64(k))))
				look(after, false)
				if err := grow(after); err != nil {
					t.Fatal(err)
				}
				look(after, true)
			}
		}
	}
	if old == 0 || grown == 0 {
		t.Errorf("%d moments before, %d after", old, grown)
	}
}

// What does not fit is refused with what is needed, and nothing is written.
func TestGrowRefuses(t *testing.T) {
	disk := blocktest.NewMemory(64 << 20)
	if _, err := FormatOn(disk, NewUUID(), LayoutOptions{SizeBytes: 8 << 20}, nil); err != nil {
		t.Fatal(err)
	}
	o, err := OfflineOn(disk)
	if err != nil {
		t.Fatal(err)
	}
	writes := disk.Count(blocktest.OpWrite) + disk.Count(blocktest.OpZeroOut)
	for _, c := range []struct {
		layout LayoutOptions
		is     error
		want   string
	}{
		{LayoutOptions{SizeBytes: 60 << 20}, ErrTooSmall, "needs a disk of"},
		{LayoutOptions{SizeBytes: 4 << 20}, nil, "does not shrink"},
		{LayoutOptions{SizeBytes: 16 << 20, CowDeviceBytes: 32 << 20}, nil, "are not as its label says"},
	} {
		err := o.Grow(t.Context(), c.layout, nil)
		if err == nil || c.is != nil && !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c.layout, err)
		}
	}
	if n := disk.Count(blocktest.OpWrite) + disk.Count(blocktest.OpZeroOut); n != writes {
		t.Errorf("refused, and written to %d times", n-writes)
	}
}
