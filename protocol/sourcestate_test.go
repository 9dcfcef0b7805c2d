package protocol

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func mustEncode(t testing.TB, s SourceState) []byte {
	t.Helper()
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sampleStates() []SourceState {
	return []SourceState{
		{},
		{Generation: gen(1), OpenEpoch: 1},
		{Lineage: line(1, 10, 2, 15), Generation: gen(2), OpenEpoch: 16},
		{Lineage: line(1, 10, 2, 15), Generation: gen(3), OpenEpoch: 17},
		{Lineage: line(1, 10), Generation: gen(1), Clean: true},
		{Restore: &RestoreState{Replica: "ebs", Lineage: line(1, 10), OffsetBytes: 1 << 40, Verifying: true}},
		{Secondary: true},
		{Lineage: line(1, 10), Generation: gen(1), Clean: true, Secondary: true},
		{Lineage: line(1, 10), Generation: gen(1), OpenEpoch: 11, Secondary: true},
	}
}

func TestSourceStateRoundTrip(t *testing.T) {
	for _, s := range sampleStates() {
		b := mustEncode(t, s)
		got, err := DecodeSourceState(b)
		if err != nil {
			t.Fatalf("%+v: %v", s, err)
		}
		if !bytes.Equal(mustEncode(t, got), b) || !got.Lineage.Equal(s.Lineage) || got.Clean != s.Clean || got.Secondary != s.Secondary || got.OpenEpoch != s.OpenEpoch {
			t.Fatalf("%+v came back as %+v", s, got)
		}
		for n := 1; n < len(b); n++ {
			if _, err := DecodeSourceState(b[:n]); err == nil {
				t.Fatalf("%+v: %d of %d bytes are accepted", s, n, len(b))
			}
		}
	}
	if _, err := DecodeSourceState(append(mustEncode(t, sampleStates()[2]), 0)); err == nil || !strings.Contains(err.Error(), "follow its end") {
		t.Fatalf("a byte too many: %v", err)
	}
	newer := mustEncode(t, sampleStates()[2])
	newer[4] = 2
	if _, err := DecodeSourceState(newer); err == nil || !strings.Contains(err.Error(), "version 2") {
		t.Fatalf("a newer version: %v", err)
	}
}

func FuzzDecodeSourceState(f *testing.F) {
	for _, s := range sampleStates() {
		f.Add(mustEncode(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := DecodeSourceState(b)
		if err != nil || len(b) == 0 {
			return
		}
		if again := mustEncode(t, s); !bytes.Equal(again, b) {
			t.Fatalf("%x was read and written as %x", b, again)
		}
	})
}

// Starts, cuts, crashes and clean ends in a row: what the label says at any
// moment must never take a copy that holds more for one that holds less, and
// no epoch number may come twice.
func TestStartPrimary(t *testing.T) {
	start := func(s SourceState, g Generation) SourceState {
		t.Helper()
		s, why, err := StartPrimary(s, g)
		if err != nil || why == "" {
			t.Fatal(why, err)
		}
		return s
	}
	cut := func(s SourceState) SourceState {
		t.Helper()
		s, err := s.UseEpoch()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := start(SourceState{}, gen(1))
	if s.OpenEpoch != 1 || s.Generation != gen(1) {
		t.Fatalf("first start: %+v", s)
	}
	s = cut(cut(s))
	if s.Lineage.Tip() != (Position{gen(1), 2}) || s.OpenEpoch != 3 {
		t.Fatalf("two cuts: %+v", s)
	}
	replica := s.Lineage.Clone()
	if r := Compare(replica, s.Effective()); r.Kind != Behind {
		t.Fatalf("a replica that holds the tip of an open device is %v", r)
	}

	// Unclean: the open epoch's number is not used again, and a copy that
	// was continued elsewhere from the tip has diverged.
	crashed := start(s, gen(2))
	if crashed.Generation != gen(2) || crashed.OpenEpoch <= s.OpenEpoch {
		t.Fatalf("unclean start: %+v", crashed)
	}
	if r := Compare(replica, crashed.Effective()); r.Kind != Behind || r.Common.Epoch != 2 {
		t.Fatalf("after a crash the replica is %v", r)
	}
	taken := replica.Extend(Position{gen(9), 3})
	if r := Compare(taken, s.Effective()); r.Kind != Diverged {
		t.Fatalf("a replica that took over is %v to the crashed device", r)
	}
	if r := Compare(taken, crashed.Effective()); r.Kind != Diverged {
		t.Fatalf("a replica that took over is %v to the restarted device", r)
	}

	// Crash after crash without a cut does not lengthen the lineage.
	for i := range byte(200) {
		crashed = start(crashed, gen(i+3))
	}
	if !crashed.Lineage.Equal(s.Lineage) {
		t.Fatalf("after 200 crashes: %v", crashed.Lineage)
	}

	clean := s.Close()
	if r := Compare(replica, clean.Effective()); r.Kind != Same {
		t.Fatalf("after a clean end the replica is %v", r)
	}
	if r := Compare(taken, clean.Effective()); r.Kind != Ahead {
		t.Fatalf("after a clean end a replica that took over is %v", r)
	}
	again := start(clean, gen(3))
	if again.Generation != gen(3) || again.OpenEpoch != 3 || again.Clean {
		t.Fatalf("start after a clean end: %+v", again)
	}

	// After a restore the generation must not be continued: a peer may have
	// gone on in it from the restored position.
	peer := line(1, 5)
	r := BeginRestore("ebs", line(1, 2))
	if _, _, err := StartPrimary(r, gen(4)); err == nil || !strings.Contains(err.Error(), "not finished") {
		t.Fatalf("start in the middle of a restore: %v", err)
	}
	done, err := FinishRestore(r)
	if err != nil {
		t.Fatal(err)
	}
	if r := Compare(line(1, 2), done.Effective()); r.Kind != Same {
		t.Fatalf("the replica restored from is %v", r)
	}
	restored := start(done, gen(4))
	for range 6 {
		restored = cut(restored)
	}
	if rel := Compare(peer, restored.Effective()); rel.Kind != Diverged {
		t.Fatalf("a peer that was ahead of the restored position is %v", rel)
	}
	if _, err := clean.UseEpoch(); err == nil {
		t.Fatal("a clean state hands out an epoch")
	}
}

// A device that stood down is not written by a start, however it ended, and
// not by one after a restore either.
func TestSecondaryDoesNotStart(t *testing.T) {
	for _, s := range sampleStates() {
		if !s.Secondary {
			continue
		}
		if got, _, err := StartPrimary(s, gen(9)); !errors.Is(err, ErrSecondary) {
			t.Errorf("%+v starts as %+v, %v", s, got, err)
		}
		if got, err := s.UseEpoch(); err == nil {
			t.Errorf("%+v takes a cut: %+v", s, got)
		}
	}
	s := BeginRestore("ebs", line(1, 10))
	s.Secondary = true
	s, err := FinishRestore(s)
	must(t, err)
	if _, _, err := StartPrimary(s, gen(9)); !errors.Is(err, ErrSecondary) {
		t.Errorf("after a restore it starts: %v", err)
	}
	store := &memState{b: mustEncode(t, s)}
	if _, _, err := BeginPrimary(store); !errors.Is(err, ErrSecondary) || store.saves > 0 {
		t.Errorf("BeginPrimary: %v, %d writes of the label", err, store.saves)
	}
}
