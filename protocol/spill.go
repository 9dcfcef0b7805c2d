package protocol

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
)

// A spill file takes what an epoch brings beyond the journal's room. It is a
// part of its replica: the superblock names it in both copies before its first
// segment, and it is flushed before the commit that counts on it. At most one
// epoch lies in it, the open one or the last committed one; once that is
// applied, the file is emptied.
//
//	   0  header, one block, little-endian:
//	       0 magic "BFSPILL1"       8 version u32 = 1        12 crc32c of the block with this field 0
//	      16 spill UUID [16]       32 replica UUID [16]      48 volume UUID [16]     64 zero to 4095
//	4096  segments as in the journal; the first has the logical offset 0, there is no ring.
//	      Its sequence and chain are those of the epoch's marker in the journal
//
// The marker, a segment of its own kind in the journal (journal.go) right before
// the epoch's commit, has the body:
//
//	0 spill UUID [16]   16 first segment (cursor as in the superblock)   40 behind the last segment
const (
	spillMagic       = 0x314c4c4950534642 // "BFSPILL1" read as a little-endian u64
	spillVersion     = 1
	spillHeaderBytes = BlockSize
	spillMarkBytes   = 64

	// MaxSpillName is the longest name of a spill file, in bytes: the superblock keeps it, for messages.
	MaxSpillName = 212
)

// ErrSpill says that a replica's spill file is missing, is another one, or
// can't be read or written.
var ErrSpill = errors.New("spill file")

// SpillFile is where a replica's spill file is, or is to be.
type SpillFile interface {
	// Name is its path, at most MaxSpillName bytes.
	Name() string
	// Open opens it as it is; the error wraps fs.ErrNotExist when there is none.
	Open() (SpillStore, error)
	// Create puts a file with this content at its front into the place; the
	// file is durable, under its name, before Create returns. One that is
	// there is replaced if that is asked for, else the error wraps fs.ErrExist.
	Create(header []byte, replace bool) (SpillStore, error)
}

// SpillStore is an open spill file.
type SpillStore interface {
	Store
	// Empty gives back the room of everything behind the header; it then reads as zeros, up to
	// the file's full size. Nothing else is called meanwhile.
	Empty() error
	// InPlace is nil while the name it was opened by leads to it.
	InPlace() error
	Close() error
}

// spillID is what a spill file's header says.
type spillID struct{ spill, replica, volume [16]byte }

func (s *superblock) spillID() spillID { return spillID{s.spill, s.replica, s.volume} }

func (id spillID) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, 16, spillHeaderBytes)
	le.PutUint64(b, spillMagic)
	le.PutUint32(b[8:], spillVersion)
	b = append(append(append(b, id.spill[:]...), id.replica[:]...), id.volume[:]...)
	b = b[:spillHeaderBytes]
	le.PutUint32(b[12:], crc32c(b))
	return b
}

func decodeSpillHeader(b []byte) (id spillID, err error) {
	le := binary.LittleEndian
	if len(b) != spillHeaderBytes {
		return id, fmt.Errorf("%d bytes, want %d", len(b), spillHeaderBytes)
	}
	if got := le.Uint64(b); got != spillMagic {
		return id, fmt.Errorf("magic %#x, want %#x", got, uint64(spillMagic))
	}
	sum := crc32cUpdate(crc32cUpdate(crc32c(b[:12]), []byte{0, 0, 0, 0}), b[16:])
	if got := le.Uint32(b[12:]); got != sum {
		return id, fmt.Errorf("checksum %#x, computed %#x", got, sum)
	}
	if v := le.Uint32(b[8:]); v != spillVersion {
		return id, fmt.Errorf("%w: version %d, this program reads version %d", ErrNewerFormat, v, spillVersion)
	}
	copy(id.spill[:], b[16:])
	copy(id.replica[:], b[32:])
	copy(id.volume[:], b[48:])
	return id, nil
}

// spillPart is where in the spill file an epoch goes on.
type spillPart struct {
	spill      [16]byte
	first, end cursor
}

func (p spillPart) append(b []byte) []byte {
	return appendCursor(appendCursor(append(b, p.spill[:]...), p.first), p.end)
}

func decodeSpillPart(b []byte) (p spillPart, err error) {
	if len(b) != spillMarkBytes {
		return p, fmt.Errorf("spill marker of %d bytes, want %d", len(b), spillMarkBytes)
	}
	copy(p.spill[:], b)
	p.first, p.end = readCursor(b[16:]), readCursor(b[40:])
	if p.first.logical != 0 || p.end.logical <= p.first.logical || p.end.sequence <= p.first.sequence {
		return p, fmt.Errorf("spill marker from %+v to %+v", p.first, p.end)
	}
	return p, nil
}

// spillRing is the segments of an open spill file; it never comes round.
func spillRing(store Store, tag uint64) ring {
	return ring{store: store, area: area{spillHeaderBytes, 1 << 62}, tag: tag, spill: true}
}

// namedSpill opens the spill file that the superblock names.
func namedSpill(file SpillFile, sb *superblock) (SpillStore, error) {
	if file == nil {
		return nil, fmt.Errorf("%w %s (%x) was not given: it is a part of this replica", ErrSpill, sb.spillName, sb.spill)
	}
	store, id, err := identifySpill(file)
	if err == nil && id != sb.spillID() {
		store.Close()
		err = fmt.Errorf("it is %x of replica %x of volume %x, want %x of replica %x of volume %x",
			id.spill, id.replica, id.volume, sb.spill, sb.replica, sb.volume)
	}
	if err != nil {
		return nil, fmt.Errorf("%w %s (%x, last known as %s): %w", ErrSpill, file.Name(), sb.spill, sb.spillName, err)
	}
	return store, nil
}

// errNoSpillHeader says that a file is not a spill file, or not whole.
var errNoSpillHeader = errors.New("it is no whole spill file")

func identifySpill(file SpillFile) (SpillStore, spillID, error) {
	store, err := file.Open()
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", ErrUnreadable, err)
		}
		return nil, spillID{}, err
	}
	b := make([]byte, spillHeaderBytes)
	if store.Size() < spillHeaderBytes {
		err = fmt.Errorf("%w: it has %d bytes", errNoSpillHeader, store.Size())
	} else if _, err = store.ReadAt(b, 0); err != nil {
		err = fmt.Errorf("%w: %w", ErrUnreadable, err)
	} else {
		var id spillID
		if id, err = decodeSpillHeader(b); err == nil {
			return store, id, nil
		}
		err = fmt.Errorf("%w: %w", errNoSpillHeader, err)
	}
	store.Close()
	return nil, spillID{}, err
}

// ensureSpill opens the replica's spill file, and makes one where there is
// none or an older one of this replica. Nothing that is committed lies in it.
// A file that is anything else is left alone. The error wraps ErrSpill.
func (r *Replica) ensureSpill() error {
	if r.spill != nil && r.spill.InPlace() == nil {
		return nil
	}
	r.closeSpill() // removed or replaced: nobody would find it again
	err := r.openOrMakeSpill()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.noSpill = ""
	if err != nil {
		r.noSpill = err.Error()
	}
	return err
}

func (r *Replica) openOrMakeSpill() error {
	name := r.spillFile.Name()
	fail := func(err error) error { return fmt.Errorf("%w %s: %w", ErrSpill, name, err) }
	if len(name) > MaxSpillName {
		return fail(fmt.Errorf("its path has %d bytes, at most %d are kept", len(name), MaxSpillName))
	}
	r.mu.Lock()
	sb := r.sb
	r.mu.Unlock()
	store, id, err := identifySpill(r.spillFile)
	replace := false
	switch {
	case err == nil && id == sb.spillID():
		r.spill = store
	case err == nil && id.replica == sb.replica:
		store.Close() // of a time that the superblock does not know any more
		replace = true
	case err == nil:
		store.Close()
		return fail(fmt.Errorf("it belongs to replica %x of volume %x: name another path, or remove it if that one needs it no more", id.replica, id.volume))
	case !errors.Is(err, fs.ErrNotExist):
		return fail(fmt.Errorf("%w; it is left as it is: name another path, or remove it", err))
	}
	// The copy of the superblock that is not the newest may count on what was
	// there, if the last apply did not get to it.
	if sb.spill != [16]byte{} {
		if err := r.writeSuper(1, func(*superblock) {}, nil); err != nil {
			return err
		}
	}
	if r.spill == nil {
		id = sb.spillID()
		rand.Read(id.spill[:]) // never fails
		switch r.spill, err = r.spillFile.Create(id.encode(), replace); {
		case errors.Is(err, fs.ErrExist): // another replica was given the same name, and made it just now
			r.spill = nil
			return r.openOrMakeSpill()
		case err != nil:
			r.spill = nil
			return fail(err)
		}
	}
	if err := r.spill.Empty(); err != nil {
		r.closeSpill()
		return fail(err)
	}
	if id == sb.spillID() && name == sb.spillName {
		return nil
	}
	// Both copies: what is committed later must not hang on the newest alone.
	return r.writeSuper(2, func(sb *superblock) { sb.spill, sb.spillName = id.spill, name }, nil)
}

func (r *Replica) closeSpill() {
	if r.spill != nil {
		r.spill.Close()
		r.spill = nil
	}
}

// mayDivert says whether an epoch may go on in a spill file.
func (r *Replica) mayDivert() bool { return r.spillFile != nil && r.spillLimit > 0 }

// openSpilled is the segments in the spill file with this UUID.
func (r *Replica) openSpilled(spill [16]byte) (ring, error) {
	if spill != r.sb.spill {
		return ring{}, fmt.Errorf("%w %x is not the one that the superblock names, %x", ErrSpill, spill, r.sb.spill)
	}
	if r.spill == nil {
		store, err := namedSpill(r.spillFile, &r.sb)
		if err != nil {
			return ring{}, err
		}
		r.spill = store
	}
	return spillRing(r.spill, r.ring.tag), nil
}

// divert lets the open epoch go on in the spill file. Everything before it is applied.
func (r *Replica) divert(o *openEpoch) error {
	if err := r.ensureSpill(); err != nil {
		return err
	}
	o.spilled = true
	return o.writer.divert(spillRing(r.spill, r.ring.tag))
}

// finishSpill makes what the open epoch has in the spill file durable, and
// puts the marker for it into the journal; the commit is to follow.
func (r *Replica) finishSpill(o *openEpoch) error {
	part, err := o.writer.revert()
	if err != nil {
		return err
	}
	if err := r.spill.Flush(); err != nil {
		return fmt.Errorf("%w: flush: %w", ErrSpill, err)
	}
	// Whoever opens the replica after a crash has only the name.
	if err := r.spill.InPlace(); err != nil {
		return fmt.Errorf("%w %s: %w", ErrSpill, r.spillFile.Name(), err)
	}
	r.mu.Lock()
	part.spill = r.sb.spill
	r.mu.Unlock()
	o.spillPart = &part
	return o.writer.mark(part)
}

// writeFailed tells a fault of the spill file, which is no room for this epoch
// and takes nothing from what is committed, from one of the replica's own store.
func (r *Replica) writeFailed(err error) error {
	if errors.Is(err, ErrSpill) {
		return fmt.Errorf("%w: the epoch needs more than %d bytes, and there is no room beside the journal: %w", ErrJournalFull, r.lay.journal.length, err)
	}
	return r.failed(err)
}

// emptySpill gives the spill file's room back, when nothing in it is needed.
func (r *Replica) emptySpill() {
	if r.spill == nil {
		return
	}
	if err := r.spill.Empty(); err != nil {
		r.warn([]string{fmt.Sprintf("spill file can't be emptied: %v", err)})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.spilled = 0
}
