package protocol

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// SourceState is what the primary's label remembers about its place in
// history. The label keeps it as opaque bytes:
//
//	0       4         6       8              24           32
//	+-------+---------+-------+--------------+------------+------------+
//	|"BFST" | version | flags | generation   | open epoch | lineage    |
//	+-------+---------+-------+--------------+------------+------------+
//	| with flag restore: lineage, offset u64, replica name             |
//	+------------------------------------------------------------------+
//
// Numbers are little-endian. A lineage is a u16 count and (generation[16],
// epoch u64) each; a name is a u16 length and its bytes. Flags: 1 clean,
// 2 restore, 4 verifying, 8 secondary. The label has the checksum.
type SourceState struct {
	// Lineage holds every cut whose frames may have left this node; its tip
	// is the last one.
	Lineage Lineage
	// Generation is the one this node writes under; zero before it first
	// became primary.
	Generation Generation
	// OpenEpoch is the number of the writes after the tip: the device may
	// hold some of them unless Clean. 0 when clean.
	OpenEpoch uint64
	// Clean: the device holds exactly the tip and could not be written since.
	Clean bool
	// Secondary: the device stood down and follows another node's. It does not
	// start as primary before it has taken over; the rest says what it held then.
	Secondary bool
	// Restore is set while the device is being filled from a replica.
	Restore *RestoreState
}

// ErrSecondary says that a device stood down, and does not start as primary.
var ErrSecondary = errors.New("this node is secondary")

// RestoreState is how far a restore has come.
type RestoreState struct {
	Replica     string  // from which replica
	Lineage     Lineage // its tip is the position being restored
	OffsetBytes uint64  // everything below is restored and durable
	Verifying   bool    // all is written, the comparison runs
}

const (
	sourceStateMagic   = 0x54534642 // "BFST" read as a little-endian u32
	sourceStateVersion = 1
	sourceFlagClean    = 1
	sourceFlagRestore  = 2
	sourceFlagVerify   = 4
	sourceFlagSecond   = 8
	sourceFlagsKnown   = sourceFlagClean | sourceFlagRestore | sourceFlagVerify | sourceFlagSecond
)

// Effective is the lineage that the device's content stands for: with the
// open epoch unless the state is clean. This is what plans are made from.
func (s SourceState) Effective() Lineage {
	if s.Clean || s.OpenEpoch == 0 {
		return s.Lineage.Clone()
	}
	return s.Lineage.Extend(Position{s.Generation, s.OpenEpoch})
}

// Check says what is wrong with a state, nil when it is well formed.
func (s SourceState) Check() error {
	if err := s.Lineage.Check(); err != nil {
		return err
	}
	if s.Restore != nil {
		if err := s.Restore.Lineage.Check(); err != nil {
			return fmt.Errorf("restore: %w", err)
		}
		if len(s.Restore.Replica) > maxNameBytes {
			return fmt.Errorf("restore: replica name of %d bytes, at most %d are allowed", len(s.Restore.Replica), maxNameBytes)
		}
	}
	switch {
	case s.Clean && s.OpenEpoch != 0:
		return fmt.Errorf("clean, yet epoch %d is open", s.OpenEpoch)
	case s.Clean && len(s.Lineage) == 0:
		return errors.New("clean, yet it holds no cut")
	case s.OpenEpoch != 0 && s.OpenEpoch <= s.Lineage.Tip().Epoch:
		return fmt.Errorf("open epoch %d does not follow %d", s.OpenEpoch, s.Lineage.Tip().Epoch)
	case s.OpenEpoch != 0 && s.Generation == Generation{}:
		return fmt.Errorf("epoch %d is open without a generation", s.OpenEpoch)
	case s.OpenEpoch == 0 && !s.Clean && len(s.Lineage) > 0:
		return errors.New("neither clean nor open")
	}
	return s.Effective().Check()
}

const maxNameBytes = 255

// Encode is the state as the label keeps it.
func (s SourceState) Encode() ([]byte, error) {
	if err := s.Check(); err != nil {
		return nil, fmt.Errorf("source state not written: %w", err)
	}
	var flags uint16
	if s.Clean {
		flags |= sourceFlagClean
	}
	if s.Secondary {
		flags |= sourceFlagSecond
	}
	if s.Restore != nil {
		flags |= sourceFlagRestore
		if s.Restore.Verifying {
			flags |= sourceFlagVerify
		}
	}
	le := binary.LittleEndian
	b := le.AppendUint32(nil, sourceStateMagic)
	b = le.AppendUint16(b, sourceStateVersion)
	b = le.AppendUint16(b, flags)
	b = append(b, s.Generation[:]...)
	b = le.AppendUint64(b, s.OpenEpoch)
	b = appendLineage(b, s.Lineage)
	if r := s.Restore; r != nil {
		b = appendLineage(b, r.Lineage)
		b = le.AppendUint64(b, r.OffsetBytes)
		b = le.AppendUint16(b, uint16(len(r.Replica)))
		b = append(b, r.Replica...)
	}
	return b, nil
}

// DecodeSourceState reads what Encode wrote. No bytes at all are the state of
// a device that was never primary.
func DecodeSourceState(b []byte) (SourceState, error) {
	if len(b) == 0 {
		return SourceState{}, nil
	}
	d := decoder{b: b}
	if m := d.u32(); d.err == nil && m != sourceStateMagic {
		return SourceState{}, fmt.Errorf("source state: magic %#x, want %#x", m, uint32(sourceStateMagic))
	}
	if v := d.u16(); d.err == nil && v != sourceStateVersion {
		return SourceState{}, fmt.Errorf("source state: version %d, this program reads %d; upgrade it", v, sourceStateVersion)
	}
	flags := d.u16()
	if d.err == nil && (flags&^sourceFlagsKnown != 0 || flags&(sourceFlagRestore|sourceFlagVerify) == sourceFlagVerify) {
		return SourceState{}, fmt.Errorf("source state: unknown flags %#x", flags)
	}
	var s SourceState
	s.Clean, s.Secondary = flags&sourceFlagClean != 0, flags&sourceFlagSecond != 0
	copy(s.Generation[:], d.bytes(16))
	s.OpenEpoch = d.u64()
	s.Lineage = d.lineage()
	if flags&sourceFlagRestore != 0 {
		r := &RestoreState{Verifying: flags&sourceFlagVerify != 0, Lineage: d.lineage(), OffsetBytes: d.u64()}
		r.Replica = string(d.bytes(int(d.u16())))
		s.Restore = r
	}
	if d.err != nil {
		return SourceState{}, fmt.Errorf("source state of %d bytes: %w", len(b), d.err)
	}
	if len(d.b) > 0 {
		return SourceState{}, fmt.Errorf("source state: %d bytes follow its end", len(d.b))
	}
	if err := s.Check(); err != nil {
		return SourceState{}, fmt.Errorf("source state: %w", err)
	}
	return s, nil
}

// StartPrimary is the state that must be durable before the device becomes
// writable. fresh is a random generation, which begins here. The second result
// says in words how the last one ended. Epoch numbers continue, whatever happened.
//
// After a clean end the old generation is not continued either: were the label
// an old one (a disk copied back), the next epoch would get a name that
// another content may have at a replica.
func StartPrimary(old SourceState, fresh Generation) (SourceState, string, error) {
	if err := old.Check(); err != nil {
		return SourceState{}, "", err
	}
	if fresh == (Generation{}) {
		return SourceState{}, "", errors.New("a generation can't be all zero")
	}
	if r := old.Restore; r != nil {
		return SourceState{}, "", fmt.Errorf("a restore of %v from replica %q is not finished (%d bytes are there): finish it, or start it anew",
			r.Lineage.Tip(), r.Replica, r.OffsetBytes)
	}
	if old.Secondary {
		return SourceState{}, "", fmt.Errorf("%w: it stood down at %v, and another node's copy may be newer: let it take over first", ErrSecondary, old.Effective().Tip())
	}
	s := SourceState{Lineage: old.Lineage.Clone(), Generation: fresh}
	switch {
	case old.Clean:
		s.OpenEpoch = old.Lineage.Tip().Epoch + 1
		return s, "new generation after a clean end", nil
	case old.OpenEpoch == 0:
		s.OpenEpoch = 1
		return s, "first start", nil
	}
	// No frame of the open epoch ever left, so no copy names it: the new
	// generation takes its place after the tip.
	s.OpenEpoch = old.OpenEpoch + 1
	return s, fmt.Sprintf("new generation after an unclean end (epoch %d was open)", old.OpenEpoch), nil
}

// UseEpoch is the state that must be durable before the first frame of the
// open epoch's cut leaves: that epoch becomes the tip, the next one is open.
func (s SourceState) UseEpoch() (SourceState, error) {
	if s.Clean || s.OpenEpoch == 0 || s.Secondary {
		return SourceState{}, errors.New("no epoch is open: the node is not primary")
	}
	return SourceState{
		Lineage:    s.Lineage.Extend(Position{s.Generation, s.OpenEpoch}),
		Generation: s.Generation,
		OpenEpoch:  s.OpenEpoch + 1,
	}, nil
}

// Close is the state of a device that holds exactly the tip and can't be
// written any more.
func (s SourceState) Close() SourceState {
	return SourceState{Lineage: s.Lineage.Clone(), Generation: s.Generation, Clean: true}
}

// BeginRestore is the state to be durable before a restore's first write.
func BeginRestore(replica string, l Lineage) SourceState {
	return SourceState{Restore: &RestoreState{Replica: replica, Lineage: l.Clone()}}
}

// FinishRestore is the state after a restore whose comparison found nothing:
// the device holds exactly the restored position. A secondary stays one.
func FinishRestore(s SourceState) (SourceState, error) {
	if s.Restore == nil || len(s.Restore.Lineage) == 0 {
		return SourceState{}, errors.New("no restore is under way")
	}
	l := s.Restore.Lineage.Clone()
	return SourceState{Lineage: l, Generation: l.Tip().Generation, Clean: true, Secondary: s.Secondary}, nil
}

func appendLineage(b []byte, l Lineage) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(len(l)))
	for _, p := range l {
		b = append(b, p.Generation[:]...)
		b = binary.LittleEndian.AppendUint64(b, p.Epoch)
	}
	return b
}

// decoder reads from the front of b; after the first error it returns zeros.
type decoder struct {
	b   []byte
	err error
}

func (d *decoder) bytes(n int) []byte {
	if d.err == nil && len(d.b) < n {
		d.err = fmt.Errorf("cut short: %d bytes are missing", n-len(d.b))
	}
	if d.err != nil {
		return make([]byte, n)
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) u16() uint16 { return binary.LittleEndian.Uint16(d.bytes(2)) }
func (d *decoder) u32() uint32 { return binary.LittleEndian.Uint32(d.bytes(4)) }
func (d *decoder) u64() uint64 { return binary.LittleEndian.Uint64(d.bytes(8)) }

func (d *decoder) lineage() Lineage {
	n := int(d.u16())
	if n > MaxGenerations {
		d.err = errors.Join(d.err, fmt.Errorf("%d generations, at most %d are allowed", n, MaxGenerations))
		return nil
	}
	var l Lineage
	for range n {
		var p Position
		copy(p.Generation[:], d.bytes(16))
		p.Epoch = d.u64()
		l = append(l, p)
	}
	return l
}
