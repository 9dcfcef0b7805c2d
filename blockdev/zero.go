package blockdev

import (
	"errors"

	"golang.org/x/sys/unix"
)

// ZeroOut implements Device: by giving the space back where the device or the
// file then reads as zeros, by the device's own command to zero where not, and by
// writing zeros where there is neither.
func (d *File) ZeroOut(offset, length int64) error {
	return d.inPieces("zero-out", offset, length, func(fd int, at, n int64) error {
		err := d.zero(fd, at, n)
		if !unsupported(err) {
			return err
		}
		zeros := AlignedBuffer(int(min(n, bounceSize)))
		for end := at + n; at < end; {
			written, err := d.file.WriteAt(zeros[:min(int64(len(zeros)), end-at)], at)
			if err != nil {
				return err
			}
			at += int64(written)
		}
		return nil
	})
}

func (d *File) zero(fd int, at, n int64) error {
	// A hole first: it keeps a sparse image sparse. Of a device the kernel asks for
	// zeros then, which may unmap; BLKZEROOUT asks it not to.
	err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, n)
	switch {
	case !unsupported(err):
	case d.block:
		err = ioctlRange(fd, unix.BLKZEROOUT, at, n)
	default:
		err = unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, at, n)
	}
	return err
}

// Discard implements Device.
func (d *File) Discard(offset, length int64) error {
	return d.inPieces("discard", offset, length, func(fd int, at, n int64) error {
		if d.block {
			return ioctlRange(fd, unix.BLKDISCARD, at, n)
		}
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, n)
	})
}

func (d *File) inPieces(op string, offset, length int64, f func(fd int, at, n int64) error) error {
	if err := CheckRange(d, op, offset, length); err != nil {
		return err
	}
	for at := offset; at < offset+length; {
		n := min(rangeSize, offset+length-at)
		if err := d.control(func(fd int) error { return f(fd, at, n) }); err != nil {
			return d.failed(op, n, at, err)
		}
		at += n
	}
	return nil
}

// unsupported says that the kernel can't do it for this device, whatever the
// range; the errno differs between file systems and drivers.
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENOSYS)
}
