package attach

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"

	"blockferry/blockdev"
)

// The state file, little-endian:
//
//	 0  magic          "BFATTACH"
//	 8  version        u32, 1
//	12  checksum       u32, crc32c of the whole file with this field zero
//	16  generation     u64, grows with every write
//	24  UUID           16 bytes, the volume's
//	40  boot id        16 bytes, of the boot in which it was last attached
//	56  sequence       u64, the disk's in that boot; 0: the kernel has none
//	64  device bytes   i64
//	72  serial length  u16
//	74  WWID length    u16
//	76  state length   u32
//	80  partition      u32, 0: the whole disk
//	84  zeros          12 bytes
//	96  file system    UUID, 16 bytes, of the file system on the device; zeros: none known
//	112 tracking       16 bytes, random: which tracking the numbers of cuts are of
//	128 serial, WWID, state
//
// It is replaced as a whole; the one before stays beside it as <name>.old.
const (
	stateMagic   = "BFATTACH"
	stateVersion = 1
	stateHead    = 128
	// MaxStateBytes bounds the caller's state.
	MaxStateBytes = 128 << 10
	maxIdentity   = 4096 // of serial and WWID each
)

// errNoState is fs.ErrNotExist in words.
var errNoState = fmt.Errorf("the device was never attached: %w", fs.ErrNotExist)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// state is what the state file holds.
type state struct {
	Generation  uint64
	UUID        [16]byte
	Boot        [16]byte
	Sequence    uint64
	DeviceBytes int64
	Partition   uint32
	FileSystem  [16]byte
	Tracking    [16]byte
	Serial      string
	WWID        string
	State       []byte
}

// stateOf is the state of a device that nothing is known of. An attached volume
// is all of its device, in whole blocks.
func stateOf(device string) (s state, err error) {
	id, err := blockdev.Identify(device)
	if err != nil {
		return s, err
	}
	if rest := id.SizeBytes % blockdev.BlockSize; rest != 0 {
		return s, fmt.Errorf("%w: %s has %d bytes, %d more than whole blocks of %d: its end could not be copied; make the partition smaller by that", ErrUser,
			device, id.SizeBytes, rest, blockdev.BlockSize)
	}
	place, err := blockdev.PlacementOf(device)
	if err != nil {
		return s, err
	}
	boot, err := blockdev.BootID()
	if err != nil {
		return s, err
	}
	s = state{Boot: boot, Sequence: place.Sequence, DeviceBytes: id.SizeBytes, Partition: uint32(id.Partition), Serial: id.Serial, WWID: id.WWID}
	rand.Read(s.Tracking[:])
	disk, err := blockdev.OpenFile(device, blockdev.OpenOptions{})
	if err != nil {
		return s, err
	}
	s.FileSystem, err = fileSystemID(disk)
	return s, errors.Join(err, disk.Close())
}

// fileSystemID is the UUID of the file system on a device: of ext2 to ext4 (magic
// EF53 at 1024+56, UUID at 1024+104) or XFS (magic at 0, UUID at 32); zeros for
// any other content.
func fileSystemID(disk blockdev.Device) (id [16]byte, err error) {
	b := blockdev.AlignedBuffer(blockdev.BlockSize)
	if _, err := disk.ReadAt(b, 0); err != nil {
		return id, err
	}
	switch {
	case bytes.HasPrefix(b, []byte("XFSB")):
		copy(id[:], b[32:])
	case binary.LittleEndian.Uint16(b[1024+56:]) == 0xef53:
		copy(id[:], b[1024+104:])
	}
	return id, nil
}

// sameDevice refuses a device that is another one than the state file's. Many
// have no serial number; then the file system, or that it never went away, has to
// tell.
func (s *state) sameDevice(now *state, device, file string) error {
	why := ""
	switch {
	case s.Serial != now.Serial || s.WWID != now.WWID || s.DeviceBytes != now.DeviceBytes || s.Partition != now.Partition:
		why = "another disk"
	case s.FileSystem != [16]byte{} && s.FileSystem != now.FileSystem:
		why = "another file system"
	case s.FileSystem == [16]byte{} && s.Serial == "" && s.WWID == "" && (s.Boot != now.Boot || s.Sequence != now.Sequence):
		why = "a disk that can't be told from another"
	default:
		return nil
	}
	return fmt.Errorf("%w: %s holds %s: (serial '%s', WWID '%s', partition %d, %d bytes, file system %x); state file %s is of (serial '%s', WWID '%s', partition %d, %d bytes, file system %x); "+
		"its replicas are left as they are: to fill this device from one, blockferry restore; if what it holds is to count, move the state file away: it then is a new volume, with replicas of its own", ErrOtherDevice,
		device, why, now.Serial, now.WWID, now.Partition, now.DeviceBytes, now.FileSystem, file, s.Serial, s.WWID, s.Partition, s.DeviceBytes, s.FileSystem)
}

// sameDisk is sameDevice for a disk that is being filled: what it holds says
// nothing.
func (s *state) sameDisk(now *state) bool {
	certain := s.Serial != "" || s.WWID != "" || s.Boot == now.Boot && s.Sequence == now.Sequence
	return certain && s.Serial == now.Serial && s.WWID == now.WWID && s.DeviceBytes == now.DeviceBytes && s.Partition == now.Partition
}

func (s *state) encode() ([]byte, error) {
	if len(s.State) > MaxStateBytes || len(s.Serial) > maxIdentity || len(s.WWID) > maxIdentity {
		return nil, fmt.Errorf("a state of %d bytes, identities of %d and %d: at most %d and %d", len(s.State), len(s.Serial), len(s.WWID), MaxStateBytes, maxIdentity)
	}
	b := make([]byte, stateHead, stateHead+len(s.Serial)+len(s.WWID)+len(s.State))
	le := binary.LittleEndian
	copy(b, stateMagic)
	le.PutUint32(b[8:], stateVersion)
	le.PutUint64(b[16:], s.Generation)
	copy(b[24:], s.UUID[:])
	copy(b[40:], s.Boot[:])
	le.PutUint64(b[56:], s.Sequence)
	le.PutUint64(b[64:], uint64(s.DeviceBytes))
	le.PutUint16(b[72:], uint16(len(s.Serial)))
	le.PutUint16(b[74:], uint16(len(s.WWID)))
	le.PutUint32(b[76:], uint32(len(s.State)))
	le.PutUint32(b[80:], s.Partition)
	copy(b[96:], s.FileSystem[:])
	copy(b[112:], s.Tracking[:])
	b = append(append(append(b, s.Serial...), s.WWID...), s.State...)
	le.PutUint32(b[12:], crc32.Checksum(b, castagnoli))
	return b, nil
}

func decodeState(b []byte) (*state, error) {
	le := binary.LittleEndian
	if len(b) < stateHead || string(b[:8]) != stateMagic {
		return nil, errors.New("it is no state file of an attached device")
	}
	if v := le.Uint32(b[8:]); v != stateVersion {
		return nil, fmt.Errorf("its format is version %d, this program knows %d", v, stateVersion)
	}
	plain := bytes.Clone(b)
	clear(plain[12:16])
	if crc32.Checksum(plain, castagnoli) != le.Uint32(b[12:]) {
		return nil, errors.New("its checksum is wrong: it is damaged")
	}
	serial, wwid, length := int(le.Uint16(b[72:])), int(le.Uint16(b[74:])), int(le.Uint32(b[76:]))
	size := int64(le.Uint64(b[64:]))
	if serial > maxIdentity || wwid > maxIdentity || length > MaxStateBytes || len(b) != stateHead+serial+wwid+length ||
		size <= 0 || !allZero(b[84:96]) {
		return nil, errors.New("its lengths do not fit: it is damaged")
	}
	s := &state{
		Generation: le.Uint64(b[16:]), UUID: [16]byte(b[24:40]), Boot: [16]byte(b[40:56]), Sequence: le.Uint64(b[56:]),
		DeviceBytes: size, Partition: le.Uint32(b[80:]),
		FileSystem: [16]byte(b[96:112]), Tracking: [16]byte(b[112:128]),
	}
	rest := b[stateHead:]
	s.Serial, s.WWID = string(rest[:serial]), string(rest[serial:serial+wwid])
	s.State = bytes.Clone(rest[serial+wwid:])
	return s, nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// readState is nil when there is no file. The one before is not taken in place
// of a damaged one: numbers would be used twice.
func readState(path string) (*state, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var b []byte
	if n := info.Size(); !info.Mode().IsRegular() || n > stateHead+2*maxIdentity+MaxStateBytes {
		err = errors.New("it is no state file of an attached device")
	} else if b, err = os.ReadFile(path); err != nil {
		return nil, err
	}
	var s *state
	if err == nil {
		s, err = decodeState(b)
	}
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w; the one before it is %s.old: if it is put in its place, or both are removed, remove the replicas' data too and let them be filled anew", path, err, path)
	}
	return s, nil
}

// writeState replaces the file in one step and keeps the one before. It is
// durable on return.
func writeState(path string, s *state) error {
	b, err := s.encode()
	if err == nil {
		err = keepOld(path)
	}
	if err == nil {
		err = blockdev.ReplaceFile(path, b, int64(len(b)), 0o600)
	}
	if err != nil {
		return fmt.Errorf("state file %s: %w", path, err)
	}
	return nil
}

// keepOld makes <name>.old another name of the present file.
func keepOld(path string) error {
	next := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".link")
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch err := os.Link(path, next); {
	case errors.Is(err, fs.ErrNotExist):
		return nil // the first
	case err != nil:
		return err
	}
	// The rename of one name of a file onto another of its names does nothing.
	if err := os.Rename(next, path+".old"); err != nil {
		return err
	}
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
