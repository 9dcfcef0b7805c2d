package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// The buffer of every call, in the machine's byte order: a header, then the
// call's own data.
//
//	  0 version     u32[3]
//	 12 data_size   u32  of the whole buffer
//	 16 data_start  u32  where the data begins
//	 20 targets     u32
//	 24 open_count  i32
//	 28 flags       u32
//	 32 event_nr    u32
//	 36 padding
//	 40 dev         u64
//	 48 name        [128]
//	176 uuid        [129]
//	305 padding
//
// A target in a table that is loaded or read: start u64, length u64,
// status i32, next u32, type [16], then the parameters with a NUL. `next` is
// counted from this target when loading, from the data's start when reading.
const (
	headerBytes = unix.SizeofDmIoctl
	specBytes   = unix.SizeofDmTargetSpec

	offsetDataSize  = 12
	offsetDataStart = 16
	offsetTargets   = 20
	offsetOpen      = 24
	offsetFlags     = 28
	offsetDev       = 40
	offsetName      = 48
	offsetUUID      = 176

	// maxReplyBytes bounds how far a reply's buffer grows.
	maxReplyBytes = 1 << 20
)

var order = binary.NativeEndian

var errMalformed = errors.New("the kernel's answer is malformed")

// Target is one line of a table. Start and Length are in sectors of 512
// bytes. A device named in Params as "major:minor" reads back the same.
type Target struct {
	Start, Length uint64
	Type          string
	Params        string
}

func (t Target) String() string {
	return fmt.Sprintf("%d %d %s %s", t.Start, t.Length, t.Type, t.Params)
}

// Info is what the kernel says of a device. A device that does not exist is
// the zero Info.
type Info struct {
	Exists       bool
	Name, UUID   string
	Major, Minor uint32
	OpenCount    int
	Suspended    bool
	ReadOnly     bool
	HasActive    bool // a table is in use
	HasInactive  bool // a loaded table waits for the next resume
}

// Dev is the device as tables name it.
func (i Info) Dev() string { return fmt.Sprintf("%d:%d", i.Major, i.Minor) }

// encodeHeader makes a whole buffer with dataBytes of room after the header.
func encodeHeader(name, uuid string, flags uint32, dataBytes int) ([]byte, error) {
	if len(name) >= unix.DM_NAME_LEN || strings.ContainsAny(name, "\x00/") {
		return nil, fmt.Errorf("'%s' can't be a device-mapper name", name)
	}
	if len(uuid) >= unix.DM_UUID_LEN || strings.Contains(uuid, "\x00") {
		return nil, fmt.Errorf("'%s' can't be a device-mapper uuid", uuid)
	}
	b := make([]byte, headerBytes+dataBytes)
	order.PutUint32(b, 4) // the interface's major version; 0.0 as the rest asks for no later feature
	order.PutUint32(b[offsetDataSize:], uint32(len(b)))
	order.PutUint32(b[offsetDataStart:], headerBytes)
	order.PutUint32(b[offsetFlags:], flags)
	copy(b[offsetName:], name)
	copy(b[offsetUUID:], uuid)
	return b, nil
}

// encodeTargets is the data of a table load.
func encodeTargets(targets []Target) ([]byte, error) {
	var b []byte
	for _, t := range targets {
		if len(t.Type) >= unix.DM_MAX_TYPE_NAME || strings.Contains(t.Type+t.Params, "\x00") {
			return nil, fmt.Errorf("'%s' can't be a table's line", t)
		}
		size := (specBytes + len(t.Params) + 1 + 7) &^ 7
		s := make([]byte, size)
		order.PutUint64(s, t.Start)
		order.PutUint64(s[8:], t.Length)
		order.PutUint32(s[20:], uint32(size))
		copy(s[24:], t.Type)
		copy(s[specBytes:], t.Params)
		b = append(b, s...)
	}
	return b, nil
}

// encodeMessage is the data of a message to the target at a sector.
func encodeMessage(sector uint64, message string) ([]byte, error) {
	if message == "" || strings.Contains(message, "\x00") {
		return nil, fmt.Errorf("'%s' can't be a message", message)
	}
	b := make([]byte, 8, 8+len(message)+1)
	order.PutUint64(b, sector)
	return append(append(b, message...), 0), nil
}

// decodeInfo reads the header of an answer.
func decodeInfo(b []byte) (Info, error) {
	if len(b) < headerBytes {
		return Info{}, errMalformed
	}
	flags, dev := order.Uint32(b[offsetFlags:]), order.Uint64(b[offsetDev:])
	return Info{
		Exists:      true,
		Name:        text(b[offsetName : offsetName+unix.DM_NAME_LEN]),
		UUID:        text(b[offsetUUID : offsetUUID+unix.DM_UUID_LEN]),
		Major:       unix.Major(dev),
		Minor:       unix.Minor(dev),
		OpenCount:   int(int32(order.Uint32(b[offsetOpen:]))),
		Suspended:   flags&unix.DM_SUSPEND_FLAG != 0,
		ReadOnly:    flags&unix.DM_READONLY_FLAG != 0,
		HasActive:   flags&unix.DM_ACTIVE_PRESENT_FLAG != 0,
		HasInactive: flags&unix.DM_INACTIVE_PRESENT_FLAG != 0,
	}, nil
}

// bufferFull says that an answer did not fit.
func bufferFull(b []byte) bool {
	return order.Uint32(b[offsetFlags:])&unix.DM_BUFFER_FULL_FLAG != 0
}

// replyData is the part of an answer after its header.
func replyData(b []byte) ([]byte, error) {
	if len(b) < headerBytes {
		return nil, errMalformed
	}
	start, size := order.Uint32(b[offsetDataStart:]), order.Uint32(b[offsetDataSize:])
	if start < headerBytes || start > size || uint64(size) > uint64(len(b)) {
		return nil, errMalformed
	}
	return b[start:size], nil
}

// decodeTargets reads a table or a status.
func decodeTargets(b []byte) ([]Target, error) {
	data, err := replyData(b)
	if err != nil {
		return nil, err
	}
	count := int(order.Uint32(b[offsetTargets:]))
	if count > len(data)/specBytes {
		return nil, errMalformed
	}
	targets := make([]Target, 0, count)
	at := 0
	for range count {
		if at < 0 || at > len(data)-specBytes {
			return nil, errMalformed
		}
		s := data[at:]
		params, _, found := bytes.Cut(s[specBytes:], []byte{0})
		if !found {
			return nil, errMalformed
		}
		targets = append(targets, Target{
			Start: order.Uint64(s), Length: order.Uint64(s[8:]),
			Type: text(s[24:specBytes]), Params: strings.TrimRight(string(params), " "),
		})
		next := int(order.Uint32(s[20:]))
		if next <= at {
			next = len(data) // only right for the last; refused above for any other
		}
		at = next
	}
	return targets, nil
}

// decodeNames reads the list of devices: dev u64, next u32 counted from this
// entry (0: the last), name.
func decodeNames(b []byte) ([]string, error) {
	data, err := replyData(b)
	if err != nil {
		return nil, err
	}
	var names []string
	for len(data) > 0 {
		if len(data) < 12 {
			return nil, errMalformed
		}
		if order.Uint64(data) == 0 {
			return names, nil // no device at all
		}
		name, _, found := bytes.Cut(data[12:], []byte{0})
		if !found {
			return nil, errMalformed
		}
		names = append(names, string(name))
		next := order.Uint32(data[8:])
		if next == 0 {
			return names, nil
		}
		if next < 12 || uint64(next) > uint64(len(data)) {
			return nil, errMalformed
		}
		data = data[next:]
	}
	return names, nil
}

// decodeVersions reads the list of target types: next u32 as above, version
// u32[3], name.
func decodeVersions(b []byte) (map[string][3]uint32, error) {
	data, err := replyData(b)
	if err != nil {
		return nil, err
	}
	versions := map[string][3]uint32{}
	for len(data) > 0 {
		if len(data) < 16 {
			return nil, errMalformed
		}
		name, _, found := bytes.Cut(data[16:], []byte{0})
		if !found {
			return nil, errMalformed
		}
		versions[string(name)] = [3]uint32{order.Uint32(data[4:]), order.Uint32(data[8:]), order.Uint32(data[12:])}
		next := order.Uint32(data)
		if next == 0 {
			return versions, nil
		}
		if next < 16 || uint64(next) > uint64(len(data)) {
			return nil, errMalformed
		}
		data = data[next:]
	}
	return versions, nil
}

// text is a NUL-terminated field.
func text(b []byte) string {
	before, _, _ := bytes.Cut(b, []byte{0})
	return string(before)
}
