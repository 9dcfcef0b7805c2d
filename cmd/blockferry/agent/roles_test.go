package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/layout"
	"blockferry/protocol"
)

// eitherRole is a disk that a secondary holds, at a position, and its content.
func eitherRole(t *testing.T) (disk *blocktest.Memory, at protocol.Lineage, content []byte) {
	t.Helper()
	const size = 4 << 20
	v := &config.Volume{Name: "data", Copy: &config.Replica{JournalBytes: config.MinJournalBytes}, CowBytes: config.MinCowBytes}
	disk = blocktest.NewMemory(64 << 20)
	state, err := protocol.SourceState{Secondary: true}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	label, err := volume.FormatOn(disk, volume.UUID{7}, layout.Switching(v, size), state)
	if err != nil {
		t.Fatal(err)
	}
	content = bytes.Repeat([]byte("what it holds. "), size/15+1)[:size]
	if _, err := disk.WriteAt(content, label.Areas.Data.Offset); err != nil {
		t.Fatal(err)
	}
	at = protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: 5}}
	format := layout.OnLabelled(label)
	format.Holds = &protocol.Holding{Lineage: at, Since: 5}
	if err := protocol.FormatReplica(disk, format); err != nil {
		t.Fatal(err)
	}
	return disk, at, content
}

func takeOverHere(disk *blocktest.Memory, at protocol.Lineage) error {
	_, err := takeOver(context.Background(), disk, protocol.OpenOptions{}, knowledge{Heard: protocol.Heard{Lineage: at}}, false)
	return err
}

// closeCleanly is what a volume that goes down leaves after one more cut.
func closeCleanly(t *testing.T, disk *blocktest.Memory) protocol.Lineage {
	t.Helper()
	o, err := volume.OfflineOn(disk)
	if err != nil {
		t.Fatal(err)
	}
	s, _, err := protocol.BeginPrimary(offlineState{o})
	if err == nil {
		s, err = s.UseEpoch()
	}
	if err != nil {
		t.Fatal(err)
	}
	s = s.Close()
	raw, err := s.Encode()
	if err == nil {
		err = o.SetState(raw)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s.Lineage
}

// checkRole says what a disk is, and fails if that is not one role, or its
// content is another.
func checkRole(t *testing.T, disk *blocktest.Memory, tip protocol.Position, content []byte) (secondary bool) {
	t.Helper()
	o, err := volume.OfflineOn(disk)
	if err != nil {
		t.Fatal(err)
	}
	label := o.Label()
	got := make([]byte, len(content))
	if _, err := o.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("the volume's content is another (%v)", err)
	}
	state, err := protocol.DecodeSourceState(label.State)
	if err != nil {
		t.Fatal(err)
	}
	if state.Secondary {
		if _, _, err := protocol.BeginPrimary(offlineState{o}); !errors.Is(err, protocol.ErrSecondary) {
			t.Fatalf("a secondary begins as primary: %v", err)
		}
		if err := settle(disk); err != nil {
			t.Fatalf("it is not settled: %v", err)
		}
		r, err := protocol.OpenReplica(t.Context(), disk, protocol.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if st := r.Status(); st.State != protocol.DiskConsistent || st.Committed != tip || st.Strayed != "" {
			t.Fatalf("%+v", st)
		}
		return true
	}
	if settle(disk.Clone()) == nil {
		t.Fatal("a primary's disk was settled as a replica")
	}
	if r, err := protocol.OpenReplica(t.Context(), disk.Clone(), protocol.OpenOptions{}); err == nil {
		r.Close()
		t.Fatal("a primary's disk opens as a replica")
	}
	return false
}

// A primary that was heard of before its last cut arrived went on from that cut: the
// copy does not have all because it has more than what was heard.
func TestCopyIsAheadOfWhatWasHeard(t *testing.T) {
	line := func(epoch uint64) protocol.Lineage {
		return protocol.Lineage{{Generation: protocol.Generation{1}, Epoch: epoch}}
	}
	behind := uint64(4096)
	for _, c := range []struct {
		heard   uint64 // with its open epoch
		written bool
		open    uint64
		bytes   bool
	}{{12, true, 12, true}, {10, true, 11, false}, {9, true, 11, false}, {10, false, 10, true}} {
		k := knowledge{Heard: protocol.Heard{Lineage: line(c.heard), BehindBytes: &behind}, written: c.written}
		got := k.beside(line(10))
		if got.Lineage.Tip().Epoch != c.open || (got.BehindBytes != nil) != c.bytes {
			t.Errorf("heard of %+v: %+v", c, got)
		}
		_, err := protocol.PlanTakeOver(protocol.ReplicaStatus{State: protocol.DiskConsistent, Lineage: line(10)}, protocol.TakeOverOptions{Heard: got, Fresh: protocol.Generation{9}})
		if c.written != errors.Is(err, protocol.ErrWouldLose) {
			t.Errorf("heard of %+v: %v", c, err)
		}
	}
}

// The power fails at each step of a take-over, and of standing down: the disk is
// one of both, holds what it held, and the step can be done again, and undone. A primary
// knows from its first write what changed since the replica's position.
func TestRolesSurvivePowerCuts(t *testing.T) {
	was, at, content := eitherRole(t)
	seen := map[bool]int{}
	eachCut(t, was, func(d *blocktest.Memory) error { return takeOverHere(d, at) }, func(after *blocktest.Memory) {
		secondary := checkRole(t, after, at.Tip(), content)
		seen[secondary]++
		if secondary {
			if err := takeOverHere(after, at); err != nil {
				t.Fatalf("taken over again: %v", err)
			}
			checkRole(t, after, at.Tip(), content)
		}
		o, err := volume.OfflineOn(after)
		if err != nil {
			t.Fatal(err)
		}
		if cuts := o.Label().Cuts; len(cuts) != 1 || cuts[0] != (volume.CutEra{Number: 5, Era: 1}) || o.Label().MetaFormatted {
			t.Fatalf("it tracks since %v", cuts)
		}
	})
	if seen[true] == 0 || seen[false] == 0 {
		t.Errorf("not all outcomes of taking over came: %v", seen)
	}

	if err := takeOverHere(was, at); err != nil {
		t.Fatal(err)
	}
	lineage := closeCleanly(t, was)
	clear(seen)
	down := func(d *blocktest.Memory) error {
		o, err := volume.OfflineOn(d)
		if err != nil {
			return err
		}
		_, err = standDown(d, o, nil, "", false)
		return err
	}
	eachCut(t, was, down, func(after *blocktest.Memory) {
		secondary := checkRole(t, after, lineage.Tip(), content)
		seen[secondary]++
		if !secondary {
			if err := down(after); err != nil {
				t.Fatalf("it stands down again: %v", err)
			}
		}
		if !checkRole(t, after, lineage.Tip(), content) {
			t.Fatal("it stood down and is primary")
		}
		if err := takeOverHere(after, lineage); err != nil {
			t.Fatalf("taken over after it stood down: %v", err)
		}
		if checkRole(t, after, lineage.Tip(), content) {
			t.Fatal("it took over and is secondary")
		}
	})
	if seen[true] == 0 || seen[false] == 0 {
		t.Errorf("not all outcomes of standing down came: %v", seen)
	}
}

// The agent began before the disk had a label: the volume's id is known once it is up.
func TestIDIsKnownAfterCreate(t *testing.T) {
	a := &Agent{log: slog.New(slog.DiscardHandler), hub: newHub(), options: Options{Config: &config.Config{}}}
	m := newManaged(a, &config.Volume{Name: "data", Hooks: &config.Hooks{}})
	m.roles = &switching{agent: a, config: m.config, log: a.log, managed: m, role: rolePrimary, change: make(chan struct{})}
	_, _, change := m.roles.look()
	m.nowUp(fakeStack{}, nil)
	if _, id, _ := m.roles.look(); id != (volume.UUID{7}) {
		t.Errorf("its id is %v", id)
	}
	select {
	case <-change:
	default:
		t.Error("who waits for it is not told")
	}
}

// An SSD that was written past its volume after that went down does not count as whole;
// with --force it is a replica that strayed. What it stands down with names the volume.
func TestStandDownChangedOutside(t *testing.T) {
	disk, at, _ := eitherRole(t)
	if err := takeOverHere(disk, at); err != nil {
		t.Fatal(err)
	}
	tip := closeCleanly(t, disk).Tip()
	path := filepath.Join(t.TempDir(), "ssd")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := io.Copy(f, io.NewSectionReader(disk, 0, disk.Size())); err != nil {
		t.Fatal(err)
	}
	on, err := blockdev.OpenFile(path, blockdev.OpenOptions{Write: true})
	if err != nil {
		t.Fatal(err)
	}
	defer on.Close()
	o, err := volume.OfflineOn(on)
	if err == nil {
		err = o.Remember(o.Label().Cuts[len(o.Label().Cuts)-1].Number)
	}
	if err == nil {
		_, err = o.WriteAt(make([]byte, 64<<10), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := &switching{agent: &Agent{}, config: &config.Volume{Name: "data", Device: path}, change: make(chan struct{})}
	if h, err := s.standDown(false); !errors.Is(err, protocol.ErrUnclean) || !strings.Contains(err.Error(), "past its volume") {
		t.Fatalf("it stands down: %+v, %v", h, err)
	}
	if _, id, _ := s.look(); id != (volume.UUID{7}) {
		t.Errorf("its id is %v", id)
	}
	h, err := s.standDown(true)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(h.Strayed, "past its volume") || h.Lineage.Tip() == tip || h.Since != 0 {
		t.Errorf("it holds %+v", h)
	}
}

// A replica that lost both superblocks is refused, whatever it stood down with: what it
// holds now nobody knows.
func TestSettleWithoutSuperblocks(t *testing.T) {
	disk, at, _ := eitherRole(t)
	if err := takeOverHere(disk, at); err != nil {
		t.Fatal(err)
	}
	closeCleanly(t, disk)
	stoodDownWith := func() (*volume.Offline, []byte) {
		o, err := volume.OfflineOn(disk)
		if err != nil {
			t.Fatal(err)
		}
		return o, o.Label().State
	}
	o, before := stoodDownWith()
	if _, err := standDown(disk, o, nil, "", false); err != nil {
		t.Fatal(err)
	}
	zero := func(d *blocktest.Memory) {
		if err := d.ZeroOut(d.Size()-1<<20, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
	lost := disk.Clone()
	zero(lost)
	if err := settle(lost); !errors.Is(err, protocol.ErrNoSuperblock) {
		t.Errorf("without superblocks it is settled: %v", err)
	}
	// The power failed after the superblocks were written, and before the label was.
	old, err := protocol.DecodeSourceState(before)
	if err != nil {
		t.Fatal(err)
	}
	old.Secondary = true
	raw, err := old.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if o, _ = stoodDownWith(); o.SetState(raw) != nil {
		t.Fatal("the label is not written")
	}
	if err := settle(disk); err != nil {
		t.Fatal(err)
	}
	zero(disk)
	if err := settle(disk); !errors.Is(err, protocol.ErrNoSuperblock) {
		t.Errorf("without superblocks, after it was settled, it is settled again: %v", err)
	}
}

// eachCut does something with a disk that fails at each write, flush and
// zeroing in turn, and looks at what a power cut then leaves.
func eachCut(t *testing.T, disk *blocktest.Memory, do func(*blocktest.Memory) error, look func(*blocktest.Memory)) {
	t.Helper()
	for _, op := range []blocktest.Op{blocktest.OpWrite, blocktest.OpFlush, blocktest.OpZeroOut} {
		for k := 0; ; k++ {
			d := disk.Clone()
			d.FailAt(op, k, errors.New("broken on purpose"))
			err := do(d)
			if d.FailurePending(op) {
				if err != nil {
					t.Fatal(err)
				}
				d.FailAt(op, 0, nil)
				look(d)
				break
			}
			if err == nil {
				t.Fatalf("%v %d failed, and nobody said so", op, k)
			}
			for seed := range uint64(10) {
				look(d.Clone().PowerCut(rand.New(rand.NewPCG(seed, uint64(k)))))
			}
		}
	}
}
