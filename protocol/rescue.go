package protocol

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// A rescue file holds blocks that one copy alone had when it was overwritten
// by those of another node. Little-endian:
//
//	   0  magic "BFRESCU1"            8  version u32 = 1      12  crc32c of the header with this field 0
//	  16  volume UUID [16]           32  replica UUID [16]    48  volume size u64
//	  56  number of extents u64      64  bytes of data u64    72  crc32c of the index u32, 0 u32
//	  80  common position (generation [16], epoch u64): what the two copies last had in common
//	 104  number of lineage points u16; zero to 511
//	 512  lineage of the copy: up to 128 points (generation [16], last epoch u64); zero to 4095
//	4096  data of the extents, one after another
//	  ..  index: per extent, in ascending order, offset in the volume u64, length u32 (up to 1 MiB), crc32c of its data u32
//
// The header is written last; the file gets its name once all of it is durable.
const (
	rescueMagic       = 0x3155435345524642 // "BFRESCU1" read as a little-endian u64
	rescueVersion     = 1
	rescueHeaderBytes = 4096
	rescueLineageAt   = 512
	rescueIndexBytes  = 16
	rescueExtentBytes = 1 << 20
	rescueSuffix      = ".rescue"
)

// ErrRescueFile says that a file is no rescue file, or a damaged one.
var ErrRescueFile = errors.New("not a whole rescue file")

// ErrOtherSize says that something has not the size of the volume.
var ErrOtherSize = errors.New("not of the volume's size")

// RescueInfo says where the blocks of a rescue file come from.
type RescueInfo struct {
	VolumeUUID  [16]byte
	ReplicaUUID [16]byte
	SizeBytes   int64    // of the volume
	Lineage     Lineage  // the copy's; its tip is what it held
	Common      Position // what it and the copy that replaced it last had in common
}

func (i RescueInfo) check() error {
	if err := i.Lineage.Check(); err != nil {
		return err
	}
	if i.Lineage.Until(i.Common) == nil {
		return fmt.Errorf("the common position %v is not in the history [%v]", i.Common, i.Lineage)
	}
	if i.SizeBytes <= 0 || i.SizeBytes > MaxVolumeBytes || i.SizeBytes%BlockSize != 0 {
		return fmt.Errorf("a volume of %d bytes", i.SizeBytes)
	}
	return nil
}

func (i RescueInfo) header(extents, dataBytes uint64, index uint32) []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, rescueHeaderBytes)
	b = le.AppendUint64(b, rescueMagic)
	b = le.AppendUint32(b, rescueVersion)
	b = le.AppendUint32(b, 0)
	b = append(append(b, i.VolumeUUID[:]...), i.ReplicaUUID[:]...)
	b = le.AppendUint64(b, uint64(i.SizeBytes))
	b = le.AppendUint64(b, extents)
	b = le.AppendUint64(b, dataBytes)
	b = le.AppendUint64(b, uint64(index))
	b = appendPosition(b, i.Common)
	b = le.AppendUint16(b, uint16(len(i.Lineage)))
	b = b[:rescueLineageAt]
	for _, p := range i.Lineage {
		b = appendPosition(b, p)
	}
	b = b[:rescueHeaderBytes]
	le.PutUint32(b[12:], crc32c(b))
	return b
}

// WriteRescue saves ranges (ascending, disjoint, whole blocks) of a copy in a
// new file of the folder and returns its path. File and name are durable then;
// after an error there is no such file. What a crash left of an earlier try for the
// same copy is removed; a copy has one call at a time.
func WriteRescue(dir string, info RescueInfo, ranges []Range, data io.ReaderAt) (path string, err error) {
	if err := info.check(); err != nil {
		return "", fmt.Errorf("rescue file in %s: %w", dir, err)
	}
	unfinished := fmt.Sprintf(".%x-", info.ReplicaUUID)
	if err := removeUnfinished(dir, unfinished); err != nil {
		return "", fmt.Errorf("rescue file: %w", err)
	}
	f, err := os.CreateTemp(dir, unfinished+"*"+rescueSuffix)
	if err != nil {
		return "", fmt.Errorf("rescue file: %w", err)
	}
	err = writeRescue(f, info, ranges, data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		path, err = nameRescue(f.Name(), info)
	}
	if err != nil {
		return "", fmt.Errorf("rescue file in %s of %d MiB: %w", dir, totalBytes(ranges)>>20, errors.Join(err, os.Remove(f.Name())))
	}
	return path, nil
}

func removeUnfinished(dir, prefix string) error {
	files, err := os.ReadDir(dir)
	for _, f := range files {
		if strings.HasPrefix(f.Name(), prefix) && strings.HasSuffix(f.Name(), rescueSuffix) {
			err = errors.Join(err, os.Remove(filepath.Join(dir, f.Name())))
		}
	}
	return err
}

// nameRescue gives the file a name that no other has, durably.
func nameRescue(from string, info RescueInfo) (string, error) {
	tip := info.Lineage.Tip()
	for n := 1; ; n++ {
		name := fmt.Sprintf("%x-%x-%d", info.VolumeUUID[:4], tip.Generation[:4], tip.Epoch)
		if n > 1 {
			name = fmt.Sprintf("%s-%d", name, n)
		}
		path := filepath.Join(filepath.Dir(from), name+rescueSuffix)
		switch err := os.Link(from, path); {
		case errors.Is(err, os.ErrExist):
			continue
		case err != nil:
			return "", err
		}
		folder, err := os.Open(filepath.Dir(from))
		if err == nil {
			err = errors.Join(folder.Sync(), folder.Close())
		}
		if err == nil {
			err = os.Remove(from)
		}
		if err != nil {
			return "", errors.Join(err, os.Remove(path))
		}
		return path, nil
	}
}

func writeRescue(f io.WriterAt, info RescueInfo, ranges []Range, data io.ReaderAt) error {
	var index []byte
	le := binary.LittleEndian
	at, buf := int64(rescueHeaderBytes), make([]byte, rescueExtentBytes)
	for _, r := range ranges {
		for r.Length > 0 {
			b := buf[:min(r.Length, rescueExtentBytes)]
			if n, err := data.ReadAt(b, r.Offset); n < len(b) {
				return fmt.Errorf("read of %d bytes at %d: %w", len(b), r.Offset, err)
			}
			if _, err := f.WriteAt(b, at); err != nil {
				return err
			}
			index = le.AppendUint64(index, uint64(r.Offset))
			index = le.AppendUint32(index, uint32(len(b)))
			index = le.AppendUint32(index, crc32c(b))
			at += int64(len(b))
			r = Range{r.Offset + int64(len(b)), r.Length - int64(len(b))}
		}
	}
	if _, err := f.WriteAt(index, at); err != nil {
		return err
	}
	_, err := f.WriteAt(info.header(uint64(len(index)/rescueIndexBytes), uint64(at-rescueHeaderBytes), crc32c(index)), 0)
	return err
}

// Rescue is a rescue file that was opened. One goroutine at a time uses it.
type Rescue struct {
	Info RescueInfo
	name string
	file io.ReaderAt
	at   []int64 // where in the file each extent is
	sums []uint32

	extents []Range
	close   func() error
}

// OpenRescue reads a rescue file's header and index, and checks them. Errors
// wrap ErrRescueFile, unless the file can't be read; they name it and the offset.
func OpenRescue(path string) (*Rescue, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	var r *Rescue
	if err == nil {
		r, err = readRescue(path, f, st.Size())
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	r.close = f.Close
	return r, nil
}

func readRescue(name string, f io.ReaderAt, size int64) (*Rescue, error) {
	bad := func(at int64, format string, args ...any) error {
		return fmt.Errorf("%s at %d: %w: %s", name, at, ErrRescueFile, fmt.Sprintf(format, args...))
	}
	b := make([]byte, rescueHeaderBytes)
	if size < rescueHeaderBytes {
		return nil, bad(size, "it ends within the header of %d bytes", rescueHeaderBytes)
	}
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("%s at 0: %w", name, err)
	}
	le := binary.LittleEndian
	if m := le.Uint64(b); m != rescueMagic {
		return nil, bad(0, "magic %#x, want %#x", m, uint64(rescueMagic))
	}
	sum := le.Uint32(b[12:])
	le.PutUint32(b[12:], 0)
	if got := crc32c(b); got != sum {
		return nil, bad(0, "header checksum %#x, computed %#x", sum, got)
	}
	if v := le.Uint32(b[8:]); v != rescueVersion {
		return nil, fmt.Errorf("%s at 8: %w: version %d, this program reads %d: upgrade it", name, ErrNewerFormat, v, rescueVersion)
	}
	r := &Rescue{name: name, file: f, close: func() error { return nil }}
	copy(r.Info.VolumeUUID[:], b[16:])
	copy(r.Info.ReplicaUUID[:], b[32:])
	r.Info.SizeBytes = int64(le.Uint64(b[48:]))
	extents, dataBytes, indexSum := le.Uint64(b[56:]), le.Uint64(b[64:]), le.Uint32(b[72:])
	r.Info.Common = readPosition(b[80:])
	points := int(le.Uint16(b[104:]))
	if points > MaxGenerations {
		return nil, bad(104, "%d lineage points, at most %d", points, MaxGenerations)
	}
	for i := range points {
		r.Info.Lineage = append(r.Info.Lineage, readPosition(b[rescueLineageAt+24*i:]))
	}
	if err := r.Info.check(); err != nil {
		return nil, bad(0, "%v", err)
	}
	if dataBytes > uint64(size) || extents > uint64(size)/rescueIndexBytes || rescueHeaderBytes+dataBytes+extents*rescueIndexBytes != uint64(size) {
		return nil, bad(size, "it ends here; %d bytes of data and %d extents need %d bytes", dataBytes, extents, rescueHeaderBytes+dataBytes+extents*rescueIndexBytes)
	}
	indexAt := int64(rescueHeaderBytes + dataBytes)
	index := make([]byte, extents*rescueIndexBytes)
	if _, err := f.ReadAt(index, indexAt); err != nil && len(index) > 0 {
		return nil, fmt.Errorf("%s at %d: %w", name, indexAt, err)
	}
	if got := crc32c(index); got != indexSum {
		return nil, bad(indexAt, "index checksum %#x, computed %#x", indexSum, got)
	}
	at, end := int64(rescueHeaderBytes), int64(0)
	for i := range int(extents) {
		e := index[i*rescueIndexBytes:]
		x := Range{int64(le.Uint64(e)), int64(le.Uint32(e[8:]))}
		if x.Offset < end || x.Offset%BlockSize != 0 || x.Length <= 0 || x.Length > rescueExtentBytes || x.Length%BlockSize != 0 ||
			x.Offset > r.Info.SizeBytes-x.Length || at+x.Length > indexAt {
			return nil, bad(indexAt+int64(i*rescueIndexBytes), "an extent of %d bytes at %d of a volume of %d", x.Length, x.Offset, r.Info.SizeBytes)
		}
		r.extents, r.at, r.sums = append(r.extents, x), append(r.at, at), append(r.sums, le.Uint32(e[12:]))
		at, end = at+x.Length, x.End()
	}
	if at != indexAt {
		return nil, bad(indexAt, "the extents have %d bytes, the file %d", at-rescueHeaderBytes, dataBytes)
	}
	return r, nil
}

// Close closes the file.
func (r *Rescue) Close() error { return r.close() }

// Extents lists, ascending, which ranges of the volume the file holds; each has
// at most 1 MiB.
func (r *Rescue) Extents() []Range { return append([]Range(nil), r.extents...) }

// Extent is the data of one extent, by its place in Extents.
func (r *Rescue) Extent(i int) ([]byte, error) {
	if i < 0 || i >= len(r.extents) {
		return nil, fmt.Errorf("%s: no extent %d, there are %d", r.name, i, len(r.extents))
	}
	x := r.extents[i]
	b := make([]byte, x.Length)
	if _, err := r.file.ReadAt(b, r.at[i]); err != nil {
		return nil, fmt.Errorf("%s at %d: %w", r.name, r.at[i], err)
	}
	if got := crc32c(b); got != r.sums[i] {
		return nil, fmt.Errorf("%s at %d: %w: the %d bytes at %d of the volume have checksum %#x, computed %#x",
			r.name, r.at[i], ErrRescueFile, x.Length, x.Offset, r.sums[i], got)
	}
	return b, nil
}

// Check reads everything.
func (r *Rescue) Check() error {
	for i := range r.extents {
		if _, err := r.Extent(i); err != nil {
			return err
		}
	}
	return nil
}

// Apply writes the blocks back to a volume and flushes it. Only the volume's own
// UUID and size will do; nothing is written before all of the file was checked.
func (r *Rescue) Apply(volume [16]byte, to Store) error {
	switch {
	case volume != r.Info.VolumeUUID:
		return fmt.Errorf("%s: it holds blocks of volume %x, not of %x", r.name, r.Info.VolumeUUID, volume)
	case to.Size() != r.Info.SizeBytes:
		return fmt.Errorf("%s: %w: it holds blocks of one of %d bytes, %s has %d", r.name, ErrOtherSize, r.Info.SizeBytes, to.Name(), to.Size())
	}
	if err := r.Check(); err != nil {
		return err
	}
	for i, x := range r.extents {
		b, err := r.Extent(i)
		if err != nil {
			return err
		}
		if _, err := to.WriteAt(b, x.Offset); err != nil {
			return fmt.Errorf("%s: write of %d bytes at %d of %s: %w", r.name, x.Length, x.Offset, to.Name(), err)
		}
	}
	if err := to.Flush(); err != nil {
		return fmt.Errorf("%s: flush of %s: %w", r.name, to.Name(), err)
	}
	return nil
}
