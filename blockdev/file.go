package blockdev

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// bounceSize bounds one transfer of misaligned memory, in bytes.
	bounceSize = 1 << 20
	// rangeSize bounds one request to zero or discard, in bytes: the kernel
	// can't be interrupted within one.
	rangeSize = 1 << 30
	// openAgain is the pause between two tries to open a device that is in use.
	openAgain = 50 * time.Millisecond
)

// OpenOptions say what a device is opened for.
type OpenOptions struct {
	// Write opens for writing too.
	Write bool
	// Exclusive refuses a block device that anything else claims (mounts,
	// swap, device-mapper, md, another exclusive opener), and a regular file
	// that somebody else has opened exclusively.
	Exclusive bool
	// Wait is how long to wait for another program that has it exclusively; 0: not
	// at all. What does not end by itself (mounts and the like) is not waited for.
	Wait time.Duration
}

// File is a Device on a block device or a regular file, read and written
// past the page cache (O_DIRECT). The caller's memory need not be aligned;
// aligned memory (AlignedBuffer) saves a copy.
type File struct {
	file   *os.File
	path   string
	size   int64
	block  bool
	direct bool
	align  int // what direct I/O wants of memory addresses, in bytes
	bounce sync.Pool
}

var _ Device = (*File)(nil)

// OpenFile opens the block device or regular file at path; it never creates
// one. On a file system without O_DIRECT a regular file goes through the page
// cache. An error about a device in use (EBUSY) says by what it is used.
func OpenFile(path string, o OpenOptions) (*File, error) {
	d, err := openFile(path, o)
	if o.Wait <= 0 || !errors.Is(err, unix.EBUSY) {
		return d, err
	}
	if users, usersErr := Users(path); usersErr == nil && len(users) > 0 {
		return nil, err
	}
	for deadline := time.Now().Add(o.Wait); errors.Is(err, unix.EBUSY); d, err = openFile(path, o) {
		left := time.Until(deadline)
		if left <= 0 {
			return nil, fmt.Errorf("%w, for %s and longer", err, o.Wait)
		}
		time.Sleep(min(left, openAgain))
	}
	return d, err
}

func openFile(path string, o OpenOptions) (*File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("open device: %w", err)
	}
	block := info.Mode()&fs.ModeDevice != 0 && info.Mode()&fs.ModeCharDevice == 0
	if !block && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("open device: %s is a %s, want a block device or a regular file", path, kindOf(info.Mode()))
	}
	flags := os.O_RDONLY
	if o.Write {
		flags = os.O_RDWR
	}
	if block && o.Exclusive {
		flags |= unix.O_EXCL
	}
	direct := true
	f, err := os.OpenFile(path, flags|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) && !block {
		direct = false
		f, err = os.OpenFile(path, flags, 0)
	}
	if errors.Is(err, unix.EBUSY) {
		return nil, busyError(path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open device: %w", err)
	}
	d := &File{file: f, path: path, block: block, direct: direct, align: SectorSize}
	d.bounce.New = func() any { b := AlignedBuffer(bounceSize); return &b }
	if err := d.prepare(info, o); err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

func (d *File) prepare(seen fs.FileInfo, o OpenOptions) error {
	// The path may have changed hands between the look and the open.
	if now, err := d.file.Stat(); err != nil {
		return fmt.Errorf("open device: %w", err)
	} else if !os.SameFile(seen, now) {
		return fmt.Errorf("open device: %s was replaced while it was being opened: try again", d.path)
	}
	size, err := d.file.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("open device: size of %s: %w", d.path, err)
	}
	d.size = size &^ (BlockSize - 1)
	if d.block {
		err := d.control(func(fd int) error {
			logical, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
			if err == nil && logical > BlockSize {
				err = fmt.Errorf("its sectors have %d bytes, want at most %d", logical, BlockSize)
			}
			d.align = max(d.align, logical)
			return err
		})
		if err != nil {
			return fmt.Errorf("open device: %s: %w", d.path, err)
		}
		return nil
	}
	if o.Exclusive {
		err := d.control(func(fd int) error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
		if errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("open device: %s is in use by %s: %w", d.path, lockHolder(seen), unix.EBUSY)
		}
		if err != nil {
			return fmt.Errorf("open device: lock of %s: %w", d.path, err)
		}
	}
	return nil
}

func kindOf(m fs.FileMode) string {
	switch {
	case m.IsDir():
		return "directory"
	case m&fs.ModeCharDevice != 0:
		return "character device"
	case m&fs.ModeNamedPipe != 0:
		return "fifo"
	case m&fs.ModeSocket != 0:
		return "socket"
	}
	return "file of type " + m.Type().String()
}

// control runs f on the descriptor, which stays open while it runs.
func (d *File) control(f func(fd int) error) error {
	raw, err := d.file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = raw.Control(func(fd uintptr) {
		for {
			if result = f(int(fd)); !errors.Is(result, unix.EINTR) {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	return result
}

// Name is the path the device was opened by.
func (d *File) Name() string { return d.path }

// Size is the size when it was opened, in bytes, rounded down to BlockSize.
func (d *File) Size() int64 { return d.size }

// IsBlockDevice tells a block device from a regular file.
func (d *File) IsBlockDevice() bool { return d.block }

// Direct says whether I/O goes past the page cache.
func (d *File) Direct() bool { return d.direct }

// ReadAt implements Device.
func (d *File) ReadAt(p []byte, offset int64) (int, error) {
	return d.transfer("read", p, offset, func(b []byte, at int64) (int, error) {
		n, err := d.file.ReadAt(b, at)
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: the device became smaller", io.ErrUnexpectedEOF)
		}
		return n, err
	})
}

// WriteAt implements Device.
func (d *File) WriteAt(p []byte, offset int64) (int, error) {
	return d.transfer("write", p, offset, d.file.WriteAt)
}

// transfer moves all of p by step, which is os.File's loop over short
// transfers, in one piece or, when p is badly aligned, by way of a buffer.
func (d *File) transfer(op string, p []byte, offset int64, step func([]byte, int64) (int, error)) (int, error) {
	if err := CheckRange(d, op, offset, int64(len(p))); err != nil {
		return 0, err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if !d.direct || misalignment(p)%d.align == 0 {
		n, err := step(p, offset)
		return n, d.failed(op, int64(len(p)), offset, err)
	}
	pooled := d.bounce.Get().(*[]byte)
	defer d.bounce.Put(pooled)
	done := 0
	for done < len(p) {
		b := (*pooled)[:min(bounceSize, len(p)-done)]
		if op == "write" {
			copy(b, p[done:])
		}
		n, err := step(b, offset+int64(done))
		if op == "read" {
			copy(p[done:], b[:n])
		}
		done += n
		if err != nil {
			return done, d.failed(op, int64(len(p)), offset, err)
		}
	}
	return done, nil
}

// failed names device, operation and place in an error of the system's.
func (d *File) failed(op string, length, offset int64, err error) error {
	if err == nil {
		return nil
	}
	var path *fs.PathError
	if errors.As(err, &path) { // it says only the path and "read"
		err = path.Err
	}
	return fmt.Errorf("%s: %s of %d bytes at offset %d: %w", d.path, op, length, offset, err)
}

// Flush implements Device. On a block device it flushes the disk's cache too.
func (d *File) Flush() error {
	// fdatasync also commits what is needed to find the data again: sizes,
	// and extents that were allocated but unwritten.
	if err := d.control(unix.Fdatasync); err != nil {
		return fmt.Errorf("%s: flush: %w", d.path, err)
	}
	return nil
}

// Close implements Device. It does not flush.
func (d *File) Close() error {
	if err := d.file.Close(); err != nil {
		return fmt.Errorf("%s: close: %w", d.path, err)
	}
	return nil
}
