package blocktest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"testing"

	"blockferry/blockdev"
)

const block = blockdev.BlockSize

func TestMemoryIsDevice(t *testing.T) {
	TestDevice(t, func(t *testing.T) blockdev.Device { return NewMemory(8 << 20) })
}

func rngOf(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 0)) }

// filled is n blocks of one byte.
func filled(value byte, n int) []byte { return bytes.Repeat([]byte{value}, n*block) }

func content(t *testing.T, d blockdev.Device, blocks int) []byte {
	t.Helper()
	b := make([]byte, blocks*block)
	mustRead(t, d, b, 0)
	return b
}

// seen runs a check of many reboots and reports which outcomes came up.
func seen(t *testing.T, m *Memory, outcome func(b []byte) string) map[string]int {
	t.Helper()
	outcomes := map[string]int{}
	for seed := range uint64(500) {
		after := m.Clone().PowerCut(rngOf(seed))
		outcomes[outcome(content(t, after, 4))]++
	}
	return outcomes
}

func TestPowerCutKeepsWhatWasFlushed(t *testing.T) {
	m := NewMemory(4 * block)
	mustWrite(t, m, filled(1, 4), 0)
	if err := m.Flush(); err != nil {
		t.Fatal(err)
	}
	got := seen(t, m, func(b []byte) string {
		if bytes.Equal(b, filled(1, 4)) {
			return "whole"
		}
		return "damaged"
	})
	if got["damaged"] > 0 {
		t.Errorf("flushed data: %v", got)
	}
}

func TestPowerCutOutcomes(t *testing.T) {
	m := NewMemory(4 * block)
	mustWrite(t, m, filled(1, 4), 0)
	if err := m.Flush(); err != nil {
		t.Fatal(err)
	}
	mustWrite(t, m, filled(2, 2), 0)
	mustWrite(t, m, filled(3, 2), 2*block)
	if err := m.ZeroOut(3*block, block); err != nil {
		t.Fatal(err)
	}
	got := seen(t, m, func(b []byte) string {
		first, third := b[:2*block], b[2*block:3*block]
		for s := 0; s < len(b); s += 512 { // no sector is ever torn
			if !bytes.Equal(b[s:s+512], bytes.Repeat(b[s:s+1], 512)) {
				t.Fatalf("the sector at %d is torn", s)
			}
			var allowed string
			switch {
			case s < 2*block:
				allowed = "\x01\x02"
			case s < 3*block:
				allowed = "\x01\x03"
			default:
				allowed = "\x00\x01\x03"
			}
			if !bytes.Contains([]byte(allowed), b[s:s+1]) {
				t.Fatalf("the sector at %d holds %d", s, b[s])
			}
		}
		was := func(b []byte, before, after byte) string {
			switch {
			case bytes.Equal(b, bytes.Repeat([]byte{before}, len(b))):
				return "lost"
			case bytes.Equal(b, bytes.Repeat([]byte{after}, len(b))):
				return "kept"
			}
			return "torn"
		}
		return was(first, 1, 2) + " " + was(third, 1, 3)
	})
	for _, want := range []string{"lost lost", "lost kept", "kept lost", "kept kept", "torn lost", "lost torn", "torn torn"} {
		if got[want] == 0 {
			t.Errorf("never %q in %v", want, got)
		}
	}
}

// With many writes an even chance for each would never lose all, nor keep all.
func TestPowerCutExtremes(t *testing.T) {
	m := NewMemory(4 * block)
	for i := range byte(40) {
		mustWrite(t, m, filled(1+i, 1), int64(i%4)*block)
	}
	kept := content(t, m, 4)
	got := seen(t, m, func(b []byte) string {
		switch {
		case bytes.Equal(b, kept):
			return "kept"
		case bytes.Equal(b, filled(0, 4)):
			return "lost"
		}
		return "between"
	})
	if got["kept"] < 5 || got["lost"] < 5 || got["between"] < 5 {
		t.Errorf("%v", got)
	}
}

func TestPowerCutIsRepeatable(t *testing.T) {
	m := NewMemory(1 << 30)
	for i := range 200 {
		mustWrite(t, m, pattern(block, uint64(i)), int64(i)*3*block)
	}
	if err := m.ZeroOut(0, m.Size()); err != nil { // over many pages, found in a map
		t.Fatal(err)
	}
	for seed := range uint64(20) {
		a, b := m.Clone().PowerCut(rngOf(seed)), m.Clone().PowerCut(rngOf(seed))
		if !bytes.Equal(content(t, a, 600), content(t, b, 600)) {
			t.Error("two power cuts with the same numbers differ")
		}
	}
}

func TestPowerCutEndsDevice(t *testing.T) {
	m := NewMemory(4 * block)
	after := m.PowerCut(rngOf(1))
	if _, err := m.WriteAt(filled(9, 1), 0); !errors.Is(err, ErrPowerLost) {
		t.Errorf("write after the power cut: %v", err)
	}
	if err := m.Flush(); !errors.Is(err, ErrPowerLost) {
		t.Errorf("flush after the power cut: %v", err)
	}
	if !bytes.Equal(content(t, after, 4), filled(0, 4)) {
		t.Error("a write after the power cut arrived")
	}
}

// A flush that failed is not made good by a later one.
func TestFailedFlushLosesData(t *testing.T) {
	m := NewMemory(4 * block)
	mustWrite(t, m, filled(1, 4), 0)
	m.FailAt(OpFlush, 0, io.ErrUnexpectedEOF)
	if err := m.Flush(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("flush: %v", err)
	}
	mustWrite(t, m, filled(2, 1), block) // written again after the failure
	if err := m.Flush(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(content(t, m, 1), filled(1, 1)) {
		t.Error("what a failed flush lost can't be read while the power is on")
	}
	got := seen(t, m, func(b []byte) string {
		if !bytes.Equal(b[block:2*block], filled(2, 1)) {
			t.Fatal("a write after the failed flush, flushed, is damaged")
		}
		if bytes.Equal(b[:block], filled(1, 1)) && bytes.Equal(b[2*block:], filled(1, 2)) {
			return "kept"
		}
		return "lost"
	})
	if got["kept"] == 0 || got["lost"] == 0 {
		t.Errorf("data of a failed flush: %v, want both", got)
	}
}

func TestFailAt(t *testing.T) {
	m := NewMemory(1 << 20)
	fault := errors.New("a fault of the test's")
	ops := map[Op]func() error{
		OpRead:    func() error { _, err := m.ReadAt(make([]byte, block), 0); return err },
		OpWrite:   func() error { _, err := m.WriteAt(filled(1, 2), 4*block); return err },
		OpFlush:   m.Flush,
		OpZeroOut: func() error { return m.ZeroOut(0, block) },
		OpDiscard: func() error { return m.Discard(0, block) },
	}
	for op, do := range ops {
		for k := range 3 {
			before := m.Count(op)
			m.FailAt(op, k, fault)
			for other, do := range ops {
				if other != op {
					if err := do(); err != nil {
						t.Errorf("%s fails though %s was to: %v", other, op, err)
					}
				}
			}
			for i := range 5 {
				err := do()
				if (i == k) != errors.Is(err, fault) {
					t.Errorf("%s %d of 5, to fail at %d: %v", op, i, k, err)
				}
				if m.FailurePending(op) != (i < k) {
					t.Errorf("%s %d of 5, to fail at %d: pending is %v", op, i, k, m.FailurePending(op))
				}
			}
			if n := m.Count(op) - before; n != 5 {
				t.Errorf("%d times %s counted, want 5", n, op)
			}
		}
		m.FailAt(op, 0, fault)
		m.FailAt(op, 0, nil)
		if err := do(); err != nil {
			t.Errorf("%s fails though that was cancelled: %v", op, err)
		}
	}
}

func TestFailedWriteIsHalfWritten(t *testing.T) {
	m := NewMemory(4 * block)
	mustWrite(t, m, filled(1, 4), 0)
	m.FailAt(OpWrite, 0, io.ErrShortWrite)
	if n, err := m.WriteAt(filled(2, 3), block); n != 0 || !errors.Is(err, io.ErrShortWrite) {
		t.Fatalf("write: %d, %v", n, err)
	}
	want := filled(1, 4)
	copy(want[block:], bytes.Repeat([]byte{2}, 3*block/2))
	if !bytes.Equal(content(t, m, 4), want) {
		t.Error("a failed write is not half written")
	}
}

func TestFill(t *testing.T) {
	m := NewMemory(3 * block)
	mustWrite(t, m, filled(1, 2), 0)
	m.Fill(filled(7, 1))
	for seed := range uint64(8) {
		if !bytes.Equal(content(t, m.Clone().PowerCut(rngOf(seed)), 3), filled(7, 3)) {
			t.Error("not all of it survives the power")
		}
	}
	mustWrite(t, m, filled(2, 1), block)
	if got, want := content(t, m, 3), slices.Concat(filled(7, 1), filled(2, 1), filled(7, 1)); !bytes.Equal(got, want) {
		t.Error("a write changes other blocks, or none")
	}
}

func TestMemoryIsSparse(t *testing.T) {
	m := NewMemory(1 << 50)
	last := m.Size() - block
	mustWrite(t, m, filled(7, 1), last)
	if err := m.ZeroOut(0, last); err != nil {
		t.Fatal(err)
	}
	if err := m.Discard(0, last); err != nil {
		t.Fatal(err)
	}
	if err := m.Flush(); err != nil {
		t.Fatal(err)
	}
	after := m.PowerCut(rngOf(1))
	mustHold(t, after, filled(7, 1), last)
	mustHold(t, after, filled(0, 1), last/2/block*block)
}

func TestDiscardLeavesGarbage(t *testing.T) {
	m := NewMemory(4 * block)
	mustWrite(t, m, filled(1, 4), 0)
	if err := m.Discard(block, block); err != nil {
		t.Fatal(err)
	}
	b := content(t, m, 4)
	if bytes.Equal(b[block:2*block], filled(0, 1)) || bytes.Equal(b[block:2*block], filled(1, 1)) {
		t.Error("a discarded block reads as zeros or as before: tests would come to rely on it")
	}
}

func TestCloneIsIndependent(t *testing.T) {
	m := NewMemory(4 * block)
	mustWrite(t, m, filled(1, 4), 0)
	c := m.Clone()
	mustWrite(t, m, filled(2, 4), 0)
	mustHold(t, c, filled(1, 4), 0)
	mustWrite(t, c, filled(3, 1), 0)
	mustHold(t, m, filled(2, 4), 0)
}
