package deadman

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	fiFreeze = 0xc0045877 // _IOWR('X', 119, int)
	fiThaw   = 0xc0045878 // _IOWR('X', 120, int)
)

// freezer freezes and thaws the file system that a file is on.
type freezer interface {
	freeze(f *os.File) error // EBUSY: it is frozen already
	thaw(f *os.File) error   // EINVAL: it is not frozen
}

type kernelFreezer struct{}

func (kernelFreezer) freeze(f *os.File) error { return fsIoctl(f, fiFreeze) }
func (kernelFreezer) thaw(f *os.File) error   { return fsIoctl(f, fiThaw) }

func fsIoctl(f *os.File, request uint) error {
	for {
		if err := unix.IoctlSetInt(int(f.Fd()), request, 0); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// mount is a file system that is, or is to be, frozen.
type mount struct {
	file   *os.File
	frozen bool // by this dead-man
}

func (d *deadman) armMounts(fields []string) error {
	files := d.inbox.take()
	err := fmt.Errorf("ARM-MOUNTS wants a limit, a count from 1 to %d and as many descriptors; %d came", maxDevices, len(files))
	if len(fields) == 2 && len(files) > 0 && len(files) <= maxDevices && fields[1] == strconv.Itoa(len(files)) {
		limit, wrong := d.limit(fields[0])
		if err = wrong; err == nil {
			var mounts []mount
			for _, f := range files {
				mounts = append(mounts, mount{file: f})
			}
			if d.note, err = newNote(d.notes, mounts); err == nil {
				d.begin(limit, nil, mounts)
				return nil
			}
		}
	}
	closeAll(files)
	return err
}

// freeze freezes what is armed, all or nothing, and returns the answer. While
// the kernel is at it nothing ends it, not even this process's death; once it
// is done the time is looked at.
func (d *deadman) freeze() string {
	if !d.armed || len(d.mounts) == 0 {
		return "ERROR no file system is armed"
	}
	d.note.since = d.now()
	for i := range d.mounts {
		m := &d.mounts[i]
		if d.checkTime(); d.late != "" {
			break
		}
		if m.frozen {
			d.late = "it was to freeze twice"
			break
		}
		if err := d.note.set(i, noteFreezing); err != nil {
			d.late = "the note of the freeze can't be written: " + err.Error()
			break
		}
		err := d.freezer.freeze(m.file)
		if err != nil {
			_ = d.note.set(i, noteArmed) // it was written a moment ago
		}
		if errors.Is(err, unix.EBUSY) {
			d.late = m.file.Name() + " is frozen by somebody else"
			if _, err := d.thaw(); err == nil {
				return "BUSY " + m.file.Name()
			}
			break
		}
		if err != nil {
			d.late = fmt.Sprintf("freeze %s: %s", m.file.Name(), err)
			_, _ = d.thaw() // tried again while armed
			return "ERROR " + d.late
		}
		m.frozen = true
		_ = d.note.set(i, noteFrozen) // 'freezing' does, too
	}
	if d.checkTime(); d.late == "" {
		return "FROZEN"
	}
	_, _ = d.thaw() // tried again while armed
	return "LATE " + d.late
}

// thaw thaws what this dead-man froze; gone says what somebody else thawed.
func (d *deadman) thaw() (gone string, err error) {
	var errs []error
	for i := len(d.mounts) - 1; i >= 0; i-- {
		m := &d.mounts[i]
		if !m.frozen {
			gone = m.file.Name() + " was not frozen"
			continue
		}
		err := d.freezer.thaw(m.file)
		if err == nil || errors.Is(err, unix.EINVAL) {
			m.frozen = false
			_ = d.note.set(i, noteThawed) // it is removed in a moment
		}
		if errors.Is(err, unix.EINVAL) {
			gone = m.file.Name() + " was not frozen any more: somebody else thawed it"
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("thaw %s: %w", m.file.Name(), err))
		}
	}
	return gone, errors.Join(errs...)
}

// inbox reads a connection and keeps the descriptors that come along.
type inbox struct {
	conn *net.UnixConn
	oob  [256]byte

	mu    sync.Mutex
	files []*os.File
}

func (i *inbox) Read(p []byte) (int, error) {
	n, oobn, _, _, err := i.conn.ReadMsgUnix(p, i.oob[:])
	if oobn > 0 {
		i.keep(i.oob[:oobn])
	}
	if errors.Is(err, io.EOF) {
		err = io.EOF // as who reads wants it
	}
	return n, err
}

func (i *inbox) keep(oob []byte) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
			if err != nil {
				name = fmt.Sprintf("descriptor %d", fd)
			}
			f := os.NewFile(uintptr(fd), name)
			i.mu.Lock()
			if room := len(i.files) <= maxDevices; room {
				i.files = append(i.files, f)
			} else {
				f.Close()
			}
			i.mu.Unlock()
		}
	}
}

// take hands over what has come.
func (i *inbox) take() []*os.File {
	i.mu.Lock()
	defer i.mu.Unlock()
	files := i.files
	i.files = nil
	return files
}

func (i *inbox) close() { closeAll(i.take()) }

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
