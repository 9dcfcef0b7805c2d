package protocol

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
)

// A superblock is one block of 4 KiB; two copies are written in turn, the
// higher sequence counts. Numbers are little-endian, sizes and offsets bytes.
//
//	   0  magic "BFSUPER1"          8  version u32           12  crc32c of the block with this field 0
//	  16  sequence u64             24  volume UUID [16]     40  replica UUID [16]
//	  56  volume size u64          64  data offset u64      72  device end u64
//	  80  reserve offset, length   96  map offset, length  112  journal offset, length
//	 128  state u8: 1 blank, 2 inconsistent, 3 consistent
//	 129  why inconsistent u8: 0 not, 1 in-place write, 2 changed outside, 3 journal damaged
//	 130  flags u16: 1 only a full epoch may follow, 2 strayed, 4 took over
//	 132  number of lineage points u16     134  number of watched places u16
//	 136  applied position (generation [16], epoch u64)
//	 160  committed position: decided, the part beyond 'applied' is in the journal
//	 184  in-place position: the epoch whose frames were last written in place, zero when none is under way
//	 208  epoch being applied u64: 0 when the data area is exactly the applied position's
//	 216  map base u64: the map can tell what changed since this epoch or a later one
//	 224  cut of the applied epoch, wall clock, ns u64
//	 232  journal tail: logical offset u64, segment sequence u64, chain u32, 0 u32
//	 256  journal head: the same, after the last committed segment
//	 280  spill file: UUID [16], zero when none was ever named; 296 length u16 and 298 text of its path
//	 512  lineage of the applied position: up to 128 points (generation [16], last epoch u64)
//	3584  watched places, up to 8: offset in the volume u64, length u32, 0 u32, SHA-256 [32]
//	3968  why strayed: length u16, 3970 text; zero to 4055
//	4056  took over: first half of the SHA-256 of the label's state before [16], 4072 as position (generation [16], epoch u64)
//
// The version is 1 until a spill file is named, 2 from then on: a program that
// knows of none must not take what the journal holds for all there is. It is 3
// while the copy is strayed or has taken over: to others that is no image to use.
const (
	superBytes      = 4096
	superMagic      = 0x3152455055534642 // "BFSUPER1" read as a little-endian u64
	superVersion    = 3
	superSpillAt    = 280
	superLineageAt  = 512
	superWatchAt    = superLineageAt + 24*MaxGenerations
	superWatchBytes = 48
	superStrayedAt  = superWatchAt + superWatchBytes*maxWatched
	superTookOverAt = superBytes - 40

	maxWatched = 8
	// MaxStrayedReason is the longest Holding.Strayed, in bytes.
	MaxStrayedReason = superTookOverAt - superStrayedAt - 2

	superFlagNeedFull = 1
	superFlagStrayed  = 2
	superFlagTookOver = 4
)

// ErrNoSuperblock says that a device is not a replica, or not one any more.
var ErrNoSuperblock = errors.New("no valid superblock")

// ErrResized says that a device is a replica whose superblocks are not at its
// end: the device was enlarged since it was formatted.
var ErrResized = errors.New("the device was resized")

// ErrNewerFormat says that a superblock is whole, but of a version that this
// program does not know.
var ErrNewerFormat = errors.New("written by another version of blockferry")

// DiskState says what a replica's data area is worth.
type DiskState uint8

const (
	DiskBlank        DiskState = 1 // formatted, never synced
	DiskInconsistent DiskState = 2 // torn, or of unknown content: no image until a sync ends
	DiskConsistent   DiskState = 3 // holds exactly one committed epoch (perhaps with the journal laid over it)
)

// String is the state as people and JSON see it.
func (s DiskState) String() string {
	switch s {
	case DiskBlank:
		return "blank"
	case DiskInconsistent:
		return "inconsistent"
	case DiskConsistent:
		return "consistent"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// causes of DiskInconsistent
const (
	whyNone           = 0
	whyInPlace        = 1
	whyChangedOutside = 2
	whyJournalDamaged = 3
)

// cursor is a place in the journal: what the segment there must carry.
type cursor struct {
	logical  uint64 // bytes; the physical place is this modulo the ring's length
	sequence uint64
	chain    uint32 // header checksum of the segment before
}

type superblock struct {
	sequence uint64
	volume   [16]byte
	replica  [16]byte
	layout   layout
	state    DiskState
	why      uint8
	needFull bool

	applied   Position
	committed Position
	inPlace   Position
	applying  uint64
	mapBase   uint64
	cutNanos  int64
	tail      cursor
	head      cursor
	lineage   Lineage
	watched   []watchedPlace
	spill     [16]byte // zero: none was ever named
	spillName string
	strayed   string   // why the data is no committed position of any line but its own; empty: it is
	tookOver  Position // as what it began as primary; zero: it did not
	label     [16]byte // with tookOver: labelDigest of the state before it
}

// labelDigest tells a label's states apart.
func labelDigest(state []byte) (half [16]byte) {
	sum := sha256.Sum256(state)
	copy(half[:], sum[:])
	return half
}

// tag marks this replica's map pages and journal segments, so that those of
// an earlier use of the device are never taken for its own.
func (s *superblock) tag() uint64 { return binary.LittleEndian.Uint64(s.replica[:]) }

func appendPosition(b []byte, p Position) []byte {
	return binary.LittleEndian.AppendUint64(append(b, p.Generation[:]...), p.Epoch)
}

func readPosition(b []byte) (p Position) {
	copy(p.Generation[:], b)
	p.Epoch = binary.LittleEndian.Uint64(b[16:])
	return p
}

func appendCursor(b []byte, c cursor) []byte {
	b = binary.LittleEndian.AppendUint64(b, c.logical)
	b = binary.LittleEndian.AppendUint64(b, c.sequence)
	b = binary.LittleEndian.AppendUint32(b, c.chain)
	return binary.LittleEndian.AppendUint32(b, 0)
}

func readCursor(b []byte) cursor {
	le := binary.LittleEndian
	return cursor{logical: le.Uint64(b), sequence: le.Uint64(b[8:]), chain: le.Uint32(b[16:])}
}

func (s *superblock) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, superBytes)
	b = le.AppendUint64(b, superMagic)
	version := uint32(1)
	if s.spill != [16]byte{} {
		version = 2
	}
	if s.strayed != "" || !s.tookOver.IsZero() {
		version = superVersion
	}
	b = le.AppendUint32(b, version)
	b = le.AppendUint32(b, 0)
	b = le.AppendUint64(b, s.sequence)
	b = append(b, s.volume[:]...)
	b = append(b, s.replica[:]...)
	l := s.layout
	for _, n := range []int64{l.size, l.dataOffset, l.deviceBytes, l.reserve.offset, l.reserve.length,
		l.changeMap.offset, l.changeMap.length, l.journal.offset, l.journal.length} {
		b = le.AppendUint64(b, uint64(n))
	}
	var flags uint16
	if s.needFull {
		flags |= superFlagNeedFull
	}
	if s.strayed != "" {
		flags |= superFlagStrayed
	}
	if !s.tookOver.IsZero() {
		flags |= superFlagTookOver
	}
	b = append(b, byte(s.state), s.why)
	b = le.AppendUint16(b, flags)
	b = le.AppendUint16(b, uint16(len(s.lineage)))
	b = le.AppendUint16(b, uint16(len(s.watched)))
	b = appendPosition(b, s.applied)
	b = appendPosition(b, s.committed)
	b = appendPosition(b, s.inPlace)
	b = le.AppendUint64(b, s.applying)
	b = le.AppendUint64(b, s.mapBase)
	b = le.AppendUint64(b, uint64(s.cutNanos))
	b = appendCursor(b, s.tail)
	b = appendCursor(b, s.head)
	b = append(b, s.spill[:]...)
	b = le.AppendUint16(b, uint16(len(s.spillName)))
	b = append(b, s.spillName...)
	b = b[:superLineageAt]
	for _, p := range s.lineage {
		b = appendPosition(b, p)
	}
	b = b[:superWatchAt]
	for _, w := range s.watched {
		b = le.AppendUint64(b, uint64(w.offset))
		b = le.AppendUint32(b, uint32(w.length))
		b = le.AppendUint32(b, 0)
		b = append(b, w.digest[:]...)
	}
	b = b[:superStrayedAt]
	b = le.AppendUint16(b, uint16(len(s.strayed)))
	b = append(b, s.strayed...)
	b = appendPosition(append(b[:superTookOverAt], s.label[:]...), s.tookOver)
	le.PutUint32(b[12:], crc32c(b))
	return b
}

// decodeSuperblock checks everything that can be checked in one copy alone.
func decodeSuperblock(b []byte) (*superblock, error) {
	le := binary.LittleEndian
	if len(b) != superBytes {
		return nil, fmt.Errorf("%d bytes, want %d", len(b), superBytes)
	}
	if got := le.Uint64(b); got != superMagic {
		return nil, fmt.Errorf("magic %#x, want %#x", got, uint64(superMagic))
	}
	plain := append([]byte(nil), b...)
	le.PutUint32(plain[12:], 0)
	if got, want := le.Uint32(b[12:]), crc32c(plain); got != want {
		return nil, fmt.Errorf("checksum %#x, computed %#x", got, want)
	}
	version := le.Uint32(b[8:])
	if version < 1 || version > superVersion {
		return nil, fmt.Errorf("%w: version %d, this program reads versions up to %d: upgrade it", ErrNewerFormat, version, superVersion)
	}
	s := &superblock{sequence: le.Uint64(b[16:])}
	copy(s.volume[:], b[24:])
	copy(s.replica[:], b[40:])
	var n [9]int64
	for i := range n {
		n[i] = int64(le.Uint64(b[56+8*i:]))
	}
	s.layout = layout{size: n[0], dataOffset: n[1], deviceBytes: n[2], reserve: area{n[3], n[4]}, changeMap: area{n[5], n[6]},
		journal: area{n[7], n[8]}, superA: n[2] - superAreaBytes}
	if n[0] > 0 && n[0] <= MaxVolumeBytes {
		s.layout.mapPageCount = mapPages(n[0])
	}
	s.state, s.why = DiskState(b[128]), b[129]
	flags := le.Uint16(b[130:])
	s.needFull = flags&superFlagNeedFull != 0
	points, watched := int(le.Uint16(b[132:])), int(le.Uint16(b[134:]))
	s.applied, s.committed, s.inPlace = readPosition(b[136:]), readPosition(b[160:]), readPosition(b[184:])
	s.applying, s.mapBase, s.cutNanos = le.Uint64(b[208:]), le.Uint64(b[216:]), int64(le.Uint64(b[224:]))
	s.tail, s.head = readCursor(b[232:]), readCursor(b[256:])
	copy(s.spill[:], b[superSpillAt:])
	spillName := int(le.Uint16(b[superSpillAt+16:]))
	if named := s.spill != [16]byte{}; version < 3 && named != (version > 1) || spillName > MaxSpillName || !named && spillName > 0 {
		return nil, fmt.Errorf("spill file %x with a path of %d bytes in version %d", s.spill, spillName, version)
	}
	s.spillName = string(b[superSpillAt+18:][:spillName])
	copy(s.label[:], b[superTookOverAt:])
	s.tookOver = readPosition(b[superTookOverAt+16:])
	if n := int(le.Uint16(b[superStrayedAt:])); n <= MaxStrayedReason {
		s.strayed = string(b[superStrayedAt+2:][:n])
	}
	if role := flags &^ superFlagNeedFull; (role != 0) != (version == 3) || (role&superFlagStrayed != 0) != (s.strayed != "") ||
		(role&superFlagTookOver != 0) != !s.tookOver.IsZero() {
		return nil, fmt.Errorf("flags %#x in version %d, strayed for %q, took over as %s", flags, version, s.strayed, s.tookOver)
	}
	if err := s.layout.check(s.layout.deviceBytes); err != nil {
		return nil, err
	}
	used := s.head.logical - s.tail.logical
	switch {
	case s.state < DiskBlank || s.state > DiskConsistent || s.why > whyJournalDamaged || flags > superFlagNeedFull|superFlagStrayed|superFlagTookOver:
		return nil, fmt.Errorf("state %d, reason %d, flags %#x: unknown", s.state, s.why, flags)
	case points > MaxGenerations || watched > maxWatched:
		return nil, fmt.Errorf("%d lineage points and %d watched places, at most %d and %d", points, watched, MaxGenerations, maxWatched)
	case s.head.logical < s.tail.logical || used > uint64(s.layout.journal.length) || s.head.logical%BlockSize != 0 || s.tail.logical%BlockSize != 0:
		return nil, fmt.Errorf("journal from %d to %d in a ring of %d bytes", s.tail.logical, s.head.logical, s.layout.journal.length)
	case s.state == DiskConsistent && (points == 0 || !s.inPlace.IsZero() || s.needFull || s.why != whyNone):
		return nil, fmt.Errorf("consistent, yet %d lineage points, in-place epoch %s, reason %d", points, s.inPlace, s.why)
	}
	for i := range points {
		s.lineage = append(s.lineage, readPosition(b[superLineageAt+24*i:]))
	}
	if err := s.lineage.Check(); err != nil {
		return nil, err
	}
	if s.lineage.Tip() != s.applied {
		return nil, fmt.Errorf("lineage ends with %s, applied is %s", s.lineage.Tip(), s.applied)
	}
	for i := range watched {
		at := superWatchAt + superWatchBytes*i
		w := watchedPlace{offset: int64(le.Uint64(b[at:])), length: int64(le.Uint32(b[at+8:]))}
		copy(w.digest[:], b[at+16:])
		if w.offset < 0 || w.length <= 0 || w.length > maxWatchedBytes || w.offset%BlockSize != 0 || w.length%BlockSize != 0 ||
			w.offset > s.layout.size-w.length {
			return nil, fmt.Errorf("watched place of %d bytes at %d", w.length, w.offset)
		}
		s.watched = append(s.watched, w)
	}
	return s, nil
}

// superOffset is where the copy with a sequence goes.
func superOffset(l layout, sequence uint64) int64 {
	return l.superA + int64(sequence%2)*superCopyOffset
}

// writeSuperblock writes the copy whose turn it is and makes it durable.
func writeSuperblock(store Store, s superblock) error {
	at := superOffset(s.layout, s.sequence)
	if _, err := store.WriteAt(s.encode(), at); err != nil {
		return fmt.Errorf("%s: superblock at %d: %w", store.Name(), at, err)
	}
	if err := store.Flush(); err != nil {
		return fmt.Errorf("%s: flush of the superblock at %d: %w", store.Name(), at, err)
	}
	return nil
}

// checkOwn reads back the copy that was written last. A disk that was emptied
// or exchanged under an open replica, while it answered with errors for one,
// must not get another epoch laid over whatever it holds now.
func checkOwn(store Store, s superblock) error {
	at := superOffset(s.layout, s.sequence)
	b := make([]byte, superBytes)
	if _, err := store.ReadAt(b, at); err != nil {
		return fmt.Errorf("%s: superblock at %d: %w", store.Name(), at, err)
	}
	if !bytes.Equal(b, s.encode()) {
		return fmt.Errorf("%s: superblock at %d: %w: it is not the one that was written last: the disk was emptied, exchanged or written by somebody else",
			store.Name(), at, ErrChangedOutside)
	}
	return nil
}

// readSuperblocks returns the newest valid copy; warnings tell of a damaged
// other one. Without any the error is ErrNoSuperblock, unless a copy could not
// be read: such a disk may well be a replica.
func readSuperblocks(store Store) (*superblock, []string, error) {
	best, warnings, err := newestSuperblock(store)
	if best != nil || err != nil {
		return best, warnings, err
	}
	if was := formerSize(store); was != nil {
		return nil, nil, fmt.Errorf("%s: %w: it had %d bytes when it became a replica and has %d now; it holds %s; to use all of it, with its agent stopped: blockferry resize VOLUME; or keep it as it is and use its first %d bytes: "+
			"losetup --find --show --sizelimit %d %s, and name that loop device instead", store.Name(), ErrResized, was.layout.deviceBytes, store.Size(),
			was.committed, was.layout.deviceBytes, was.layout.deviceBytes, store.Name())
	}
	return nil, nil, fmt.Errorf("%s: %w: %s (if the device was resized, give it its former size; otherwise it is not a blockferry replica)",
		store.Name(), ErrNoSuperblock, warnings)
}

// newestSuperblock is nil, with the reasons as warnings, where neither place
// holds a valid one.
func newestSuperblock(store Store) (best *superblock, warnings []string, err error) {
	end := store.Size() / layoutAlign * layoutAlign
	if end < superAreaBytes {
		return nil, nil, fmt.Errorf("%s: %w: only %d bytes", store.Name(), ErrNoSuperblock, store.Size())
	}
	var unread error
	for i := range uint64(2) {
		at := superOffset(layout{superA: end - superAreaBytes}, i)
		b := make([]byte, superBytes)
		if _, err := store.ReadAt(b, at); err != nil {
			unread = fmt.Errorf("%s: superblock at %d: %w", store.Name(), at, err)
			warnings = append(warnings, fmt.Sprintf("superblock at %d: %s", at, err))
			continue
		}
		s, err := decodeSuperblock(b)
		if errors.Is(err, ErrNewerFormat) {
			// The other copy is no help: this one may be the newer.
			return nil, nil, fmt.Errorf("%s: superblock at %d: %w", store.Name(), at, err)
		}
		if err == nil && s.sequence%2 != i {
			err = fmt.Errorf("sequence %d belongs into the other place", s.sequence)
		}
		if err == nil {
			err = s.layout.check(store.Size())
		}
		if err != nil {
			warnings = append(warnings, fmt.Sprintf("superblock at %d: %s", at, err))
			continue
		}
		if best == nil || s.sequence > best.sequence {
			best = s
		}
	}
	if best == nil && unread != nil {
		return nil, nil, unread
	}
	return best, warnings, nil
}

// formerSize is the replica that a device was when it was smaller; nil if none is found.
func formerSize(store Store) *superblock {
	for s := range formerSuperblocks(store) {
		return s
	}
	return nil
}

// formerSuperblocks looks for a replica's superblock at the ends that the device may
// have had, the last first: whole GiB, as clouds sell them, or any of a small device. What stands
// there may also be the content of a volume: none counts where there is one at the
// device's end, and a growth goes by the first only where there is none.
func formerSuperblocks(store Store) iter.Seq[*superblock] {
	return func(yield func(*superblock) bool) {
		const probes = 8192
		step := int64(layoutAlign)
		if store.Size() > 4<<30 {
			step = 1 << 30
		}
		b := make([]byte, superBytes)
		for n, end := 0, (store.Size()-1)/step*step; n < probes && end >= superAreaBytes; n, end = n+1, end-step {
			var best *superblock
			for i := range uint64(2) {
				if _, err := store.ReadAt(b, superOffset(layout{superA: end - superAreaBytes}, i)); err != nil {
					continue
				}
				s, err := decodeSuperblock(b)
				if err == nil && s.layout.deviceBytes == end && s.layout.check(end) == nil && (best == nil || s.sequence > best.sequence) {
					best = s
				}
			}
			if best != nil && !yield(best) {
				return
			}
		}
	}
}
