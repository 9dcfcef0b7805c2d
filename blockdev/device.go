// Package blockdev reads, writes and identifies block devices. Each of its
// folders holds one kernel concept; none of them knows of epochs or of the
// wire.
package blockdev

import (
	"errors"
	"fmt"
	"io"
)

const (
	// SectorSize is the unit of device-mapper tables and of the kernel's
	// statistics, in bytes.
	SectorSize = 512
	// BlockSize is the grain of everything blockferry reads, writes and
	// compares, in bytes. Offsets and lengths of device I/O are multiples of it.
	BlockSize = 4096
)

// Device is a block device, or something that behaves like one. Offsets and
// lengths are in bytes and multiples of BlockSize; anything else is an error
// and touches nothing. ReadAt and WriteAt transfer all or fail. A write is
// durable only after a later Flush has returned nil; after a failed Flush
// nothing written since the last good one may be relied on. All methods but
// Close may be called from several goroutines at once.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Name is what errors and people call the device, for example its path.
	Name() string
	// Size is the device's size in bytes, rounded down to BlockSize.
	Size() int64
	// Flush makes every completed write durable.
	Flush() error
	// ZeroOut makes the range read as zeros.
	ZeroOut(offset, length int64) error
	// Discard tells the device that the range's content is not needed. What
	// it reads as afterwards is undefined. A device that can't do it returns
	// an error that wraps errors.ErrUnsupported; the content is as before.
	Discard(offset, length int64) error
	Close() error
}

// ErrRange says that an offset or a length is no multiple of BlockSize or
// reaches outside the device. Nothing was touched.
var ErrRange = errors.New("range not allowed")

// CheckRange is the check every Device begins with: offset and length, in
// bytes, are multiples of BlockSize and lie within the device. The error
// wraps ErrRange and names device, operation and range.
func CheckRange(d interface {
	Name() string
	Size() int64
}, op string, offset, length int64) error {
	switch {
	case offset < 0, length < 0, offset%BlockSize != 0, length%BlockSize != 0:
		return fmt.Errorf("%s: %s of %d bytes at offset %d: %w: want multiples of %d",
			d.Name(), op, length, offset, ErrRange, BlockSize)
	case length > d.Size() || offset > d.Size()-length:
		return fmt.Errorf("%s: %s of %d bytes at offset %d: %w: the device has %d bytes",
			d.Name(), op, length, offset, ErrRange, d.Size())
	}
	return nil
}
