package volume

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"

	"blockferry/blockdev"
)

// The label stands in two slots written alternately; the valid one with the
// higher sequence counts. Little-endian:
//
//	  0 magic "BFVOLUME"              8 version u32
//	 12 length u32, of all that the checksum covers, a multiple of 4096
//	 16 crc32c u32, of bytes 0 to length with this field zero
//	 20 era block u32, bytes         24 sequence u64
//	 32 volume uuid [16]             48 id of the era metadata [16]
//	 64 data length u64, bytes       72 data offset u64
//	 80 COW offset u64               88 COW length u64
//	 96 metadata offset u64         104 metadata length u64
//	112 tail length u64
//	120 flags u32: 1 the COW area is on another device, 2 the metadata is,
//	    4 the kernel has formatted the metadata, 8 the volume took discards
//	124 length of identity u32      128 the disk's identity [256]
//	384 number of cuts u32          388 length of state u32
//	392 number of watched places u32
//	400 cut u64 that the watched places are of, then zeros
//	512 cuts {number u64, era u32, zero u32}, ascending in both
//	 then the watched places {offset in the volume u64, SHA-256 [32]}, ascending (watch.go)
//	 then the state's bytes, then zeros
//
// The version is 3 if the volume ever took discards: its marks mean more then
// (discard.go). Otherwise it is 1 without watched places, else 2.
const (
	labelMagic   = "BFVOLUME"
	labelVersion = 3
	slotStride   = 512 << 10
	slotBytes    = 256 << 10
	labelHead    = 512
	cutBytes     = 16
	maxIdentity  = 256

	flagCowElsewhere  = 1
	flagMetaElsewhere = 2
	flagMetaFormatted = 4
	flagDiscards      = 8

	// maxCuts bounds the table of cuts.
	maxCuts = 4096
	// MaxStateBytes bounds the caller's state in a label.
	MaxStateBytes = 128 << 10
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian

	// ErrNoLabel: there is no sign of a label. It does not say that the
	// device is blank.
	ErrNoLabel = errors.New("no volume label")
	// ErrBadLabel: there is or was a label, and it can't be trusted.
	ErrBadLabel = errors.New("the volume label is damaged")
)

// newerLabel is the version of a whole label that a later program wrote. It is
// an ErrBadLabel.
type newerLabel uint32

func (v newerLabel) Error() string {
	return fmt.Sprintf("the volume label has version %d, this program knows versions up to %d: upgrade it", uint32(v), labelVersion)
}

// Is makes errors.Is(err, ErrBadLabel) true.
func (v newerLabel) Is(target error) bool { return target == ErrBadLabel }

// UUID names a volume, or the era metadata of one.
type UUID [16]byte

// NewUUID is a random one.
func NewUUID() UUID {
	var u UUID
	rand.Read(u[:])
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return u
}

func (u UUID) String() string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// IsZero says that there is none.
func (u UUID) IsZero() bool { return u == UUID{} }

// Label is what a volume's disk says of itself.
type Label struct {
	Sequence      uint64 // of this version of the label
	UUID          UUID
	EraID         UUID   // of the era metadata that Cuts belong to
	Identity      string // the disk's, when the label was first written
	EraBlockBytes int64
	Areas         Areas
	CowElsewhere  bool // the COW area is on a device of its own
	MetaElsewhere bool
	// MetaFormatted: the kernel has formatted the era metadata, so zeros in
	// its place are a loss.
	MetaFormatted bool
	// Discards: the volume takes discards or did once, so each marked block
	// names the one behind it, too.
	Discards bool
	Cuts     Cuts
	Watch    Watch
	State    []byte // the caller's, at most MaxStateBytes
	// Damage is what is wrong with the other slot, as ReadLabel found it: an
	// interrupted write, or a newer version that was lost. "": nothing.
	Damage string
}

// encode returns the label as it stands in a slot.
func (l *Label) encode() ([]byte, error) {
	if len(l.State) > MaxStateBytes || len(l.Cuts) > maxCuts || len(l.Watch.Places) > maxWatched || len(l.Identity) > maxIdentity {
		return nil, fmt.Errorf("label: %d bytes of state, %d cuts, %d bytes of identity do not fit", len(l.State), len(l.Cuts), len(l.Identity))
	}
	watchAt := labelHead + len(l.Cuts)*cutBytes
	stateAt := watchAt + len(l.Watch.Places)*watchedBytes
	used := stateAt + len(l.State)
	b := blockdev.AlignedBuffer((used + blockdev.BlockSize - 1) &^ (blockdev.BlockSize - 1))
	copy(b, labelMagic)
	version := uint32(1)
	switch {
	case l.Discards:
		version = 3
	case len(l.Watch.Places) > 0:
		version = 2
	}
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint32(b[20:], uint32(l.EraBlockBytes))
	le.PutUint64(b[24:], l.Sequence)
	copy(b[32:], l.UUID[:])
	copy(b[48:], l.EraID[:])
	a := l.Areas
	for i, v := range []int64{a.Data.Length, a.Data.Offset, a.Cow.Offset, a.Cow.Length, a.Meta.Offset, a.Meta.Length, a.TailBytes} {
		le.PutUint64(b[64+8*i:], uint64(v))
	}
	flags := uint32(0)
	if l.CowElsewhere {
		flags |= flagCowElsewhere
	}
	if l.MetaElsewhere {
		flags |= flagMetaElsewhere
	}
	if l.MetaFormatted {
		flags |= flagMetaFormatted
	}
	if l.Discards {
		flags |= flagDiscards
	}
	le.PutUint32(b[120:], flags)
	le.PutUint32(b[124:], uint32(len(l.Identity)))
	copy(b[128:], l.Identity)
	le.PutUint32(b[384:], uint32(len(l.Cuts)))
	le.PutUint32(b[388:], uint32(len(l.State)))
	for i, c := range l.Cuts {
		le.PutUint64(b[labelHead+i*cutBytes:], c.Number)
		le.PutUint32(b[labelHead+i*cutBytes+8:], c.Era)
	}
	le.PutUint32(b[392:], uint32(len(l.Watch.Places)))
	le.PutUint64(b[400:], l.Watch.Cut)
	for i, w := range l.Watch.Places {
		at := b[watchAt+i*watchedBytes:]
		le.PutUint64(at, uint64(w.Offset))
		copy(at[8:], w.Digest[:])
	}
	copy(b[stateAt:], l.State)
	le.PutUint32(b[16:], crc32.Checksum(b, castagnoli))
	return b, nil
}

// decodeLabel reads a slot. Its error is ErrNoLabel when there is none and
// ErrBadLabel for anything else.
func decodeLabel(slot []byte) (*Label, error) {
	if len(slot) < labelHead || string(slot[:8]) != labelMagic {
		return nil, ErrNoLabel
	}
	bad := func(format string, args ...any) (*Label, error) {
		return nil, fmt.Errorf("%w: %s", ErrBadLabel, fmt.Sprintf(format, args...))
	}
	length := int64(le.Uint32(slot[12:]))
	if length < blockdev.BlockSize || length > int64(len(slot)) || length%blockdev.BlockSize != 0 {
		return bad("its length is %d", length)
	}
	b := slot[:length]
	sum := crc32.Update(crc32.Update(crc32.Checksum(b[:16], castagnoli), castagnoli, make([]byte, 4)), castagnoli, b[20:])
	if want := le.Uint32(b[16:]); sum != want {
		return bad("checksum %#x, want %#x", sum, want)
	}
	version := le.Uint32(b[8:])
	switch {
	case version > labelVersion:
		return nil, newerLabel(version)
	case version < 1:
		return bad("version %d", version)
	}
	cuts, state, identity := int64(le.Uint32(b[384:])), int64(le.Uint32(b[388:])), le.Uint32(b[124:])
	watched := int64(le.Uint32(b[392:]))
	stateAt := labelHead + cuts*cutBytes + watched*watchedBytes
	flags := le.Uint32(b[120:])
	discards := flags&flagDiscards != 0
	if discards != (version == 3) || !discards && (watched > 0) != (version == 2) {
		return bad("flags %#x and %d watched places in version %d", flags, watched, version)
	}
	if cuts > maxCuts || watched > maxWatched || state > MaxStateBytes || identity > maxIdentity || stateAt+state > length {
		return bad("%d cuts, %d watched places, %d bytes of state and %d of identity do not fit into %d", cuts, watched, state, identity, length)
	}
	number := func(at int) int64 { return int64(le.Uint64(b[at:])) }
	l := &Label{
		Sequence:      le.Uint64(b[24:]),
		UUID:          UUID(b[32:48]),
		EraID:         UUID(b[48:64]),
		Identity:      string(b[128 : 128+identity]),
		EraBlockBytes: int64(le.Uint32(b[20:])),
		Areas: Areas{
			Data:      Area{number(72), number(64)},
			Cow:       Area{number(80), number(88)},
			Meta:      Area{number(96), number(104)},
			TailBytes: number(112),
		},
		CowElsewhere:  flags&flagCowElsewhere != 0,
		MetaElsewhere: flags&flagMetaElsewhere != 0,
		MetaFormatted: flags&flagMetaFormatted != 0,
		Discards:      discards,
		State:         bytes.Clone(b[stateAt:][:state]),
	}
	for i := range cuts {
		at := b[labelHead+i*cutBytes:]
		c := CutEra{le.Uint64(at), le.Uint32(at[8:])}
		if n := len(l.Cuts); n > 0 && (c.Number <= l.Cuts[n-1].Number || c.Era < l.Cuts[n-1].Era) {
			return bad("its cuts are not in order")
		}
		l.Cuts = append(l.Cuts, c)
	}
	if watched > 0 {
		l.Watch.Cut = le.Uint64(b[400:])
	}
	for i := range watched {
		at := b[labelHead+cuts*cutBytes+i*watchedBytes:]
		l.Watch.Places = append(l.Watch.Places, WatchedPlace{number(int(labelHead + cuts*cutBytes + i*watchedBytes)), [sha256.Size]byte(at[8:])})
	}
	if err := l.check(); err != nil {
		return bad("%v", err)
	}
	return l, nil
}

func (l *Label) check() error {
	if err := checkEraBlock(l.EraBlockBytes); err != nil {
		return err
	}
	a := l.Areas
	const most = 1 << 60 // far from overflow in any sum below
	for _, v := range []int64{a.Data.Offset, a.Data.Length, a.Cow.Offset, a.Cow.Length, a.Meta.Offset, a.Meta.Length, a.TailBytes} {
		if v < 0 || v > most || v%blockdev.BlockSize != 0 {
			return fmt.Errorf("an area of %d bytes", v)
		}
	}
	if l.UUID.IsZero() || a.Data.Length == 0 || a.Data.Offset < 2*slotStride || a.Cow.Length <= auxIDBytes || a.Meta.Length <= auxIDBytes {
		return errors.New("an area or the uuid is missing")
	}
	if !l.CowElsewhere && a.Cow.Offset < a.Data.End() ||
		!l.MetaElsewhere && a.Meta.Offset < a.Data.End() ||
		!l.MetaElsewhere && !l.CowElsewhere && a.Cow.Offset < a.Meta.End() && a.Meta.Offset < a.Cow.End() {
		return errors.New("its areas overlap")
	}
	return l.Watch.check(a.Data.Length)
}

// endBytes is how large the disk must be.
func (l *Label) endBytes() int64 {
	end := l.Areas.Data.End()
	if !l.CowElsewhere {
		end = max(end, l.Areas.Cow.End())
	}
	if !l.MetaElsewhere {
		end = max(end, l.Areas.Meta.End())
	}
	return end + l.Areas.TailBytes
}

// ReadLabel reads a device's label: ErrNoLabel when there is no sign of one, or
// something else was written over a slot, ErrBadLabel when there is no valid one,
// or one of a later version.
func ReadLabel(d blockdev.Device) (*Label, error) {
	if d.Size() < 2*slotStride {
		return nil, fmt.Errorf("%s: %w: it has %d bytes, a label needs %d", d.Name(), ErrNoLabel, d.Size(), 2*slotStride)
	}
	var best *Label
	var bad, foreign error
	for slot := range int64(2) {
		b := blockdev.AlignedBuffer(slotBytes)
		if _, err := d.ReadAt(b, slot*slotStride); err != nil {
			// Not even the other slot helps: this one may be the newer.
			return nil, fmt.Errorf("%s: read label slot %d: %w", d.Name(), slot, err)
		}
		l, err := decodeLabel(b)
		if newer := newerLabel(0); errors.As(err, &newer) {
			// Nor does it here.
			return nil, fmt.Errorf("%s: slot %d: %w", d.Name(), slot, err)
		}
		switch {
		case err == nil && (best == nil || l.Sequence > best.Sequence):
			best = l
		case errors.Is(err, ErrBadLabel):
			bad = fmt.Errorf("%s: slot %d: %w", d.Name(), slot, err)
		case err != nil && overwritten(b):
			foreign = fmt.Errorf("%s: %w: slot %d holds %s", d.Name(), ErrNoLabel, slot, signature(b))
		}
	}
	switch {
	case best != nil && foreign != nil:
		// The disk is somebody else's by now: mkfs.xfs for one leaves the second slot.
		return nil, foreign
	case best != nil:
		// Whatever the other slot held, this one names too much changed, and
		// a replica that has got further than it knows is noticed.
		if bad != nil {
			best.Damage = bad.Error()
		}
		return best, nil
	case bad != nil:
		return nil, bad
	}
	return nil, fmt.Errorf("%s: %w", d.Name(), ErrNoLabel)
}

// overwritten says whether a slot without a label holds something else. A label
// whose write was torn is none: it begins with zeros, as a slot does at first.
func overwritten(slot []byte) bool {
	return firstNonzero(slot[:len(labelMagic)]) >= 0 || signature(slot) != unknownContent
}

// writeLabel writes the next version of the label and makes it durable. On an
// error the device holds the old or the new one, and l is unchanged.
func writeLabel(d blockdev.Device, l *Label) error {
	next := *l
	next.Sequence++
	b, err := next.encode()
	if err != nil {
		return err
	}
	if _, err := d.WriteAt(b, int64(next.Sequence%2)*slotStride); err != nil {
		return fmt.Errorf("%s: write label: %w", d.Name(), err)
	}
	if err := d.Flush(); err != nil {
		return fmt.Errorf("%s: flush label: %w", d.Name(), err)
	}
	l.Sequence, l.Damage = next.Sequence, ""
	return nil
}

// keepLabel makes the label durable that ReadLabel has found: its write may be in the
// disk's cache alone, as a flush that failed does not come again. Before that nothing is
// done by what only it says, and the other slot is not overwritten: a power cut
// could leave neither. What is written is what stands there.
func keepLabel(d blockdev.Device, l *Label) error {
	at := int64(l.Sequence%2) * slotStride
	b := blockdev.AlignedBuffer(slotBytes)
	if _, err := d.ReadAt(b, at); err != nil {
		return fmt.Errorf("%s: read its label again: %w", d.Name(), err)
	}
	if again, err := decodeLabel(b); err != nil || again.Sequence != l.Sequence {
		return fmt.Errorf("%s: %w: slot %d held number %d when it was read first, and does not any more (%v)", d.Name(), ErrBadLabel, l.Sequence%2, l.Sequence, err)
	}
	if _, err := d.WriteAt(b[:le.Uint32(b[12:])], at); err != nil {
		return fmt.Errorf("%s: write its label again: %w", d.Name(), err)
	}
	if err := d.Flush(); err != nil {
		return fmt.Errorf("%s: flush its label: %w", d.Name(), err)
	}
	return nil
}

// CutEra says in which era a cut begins: all that is written after the cut is
// marked with that era or a later one.
type CutEra struct {
	Number uint64
	Era    uint32
}

// Cuts is the table of cuts of one era metadata, ascending.
type Cuts []CutEra

// With is the table with one more cut. A full table is thinned out in its
// older half.
func (c Cuts) With(cut CutEra) Cuts {
	out := make(Cuts, 0, len(c)+1)
	for i, e := range c {
		if len(c) < maxCuts || i >= len(c)/2 || i%2 == 0 {
			out = append(out, e)
		}
	}
	return append(out, cut)
}

// Since is the era to ask for what changed since the cut of that number: its
// own or, when it is not there, that of the nearest earlier one, which only
// names more. False: nothing is known that far back.
func (c Cuts) Since(number uint64) (uint32, bool) {
	for i := len(c) - 1; i >= 0; i-- {
		if c[i].Number <= number {
			return c[i].Era, true
		}
	}
	return 0, false
}
