package blockdev

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// DeviceLock is the right to manage a device. It ends with Close or with the
// process.
type DeviceLock struct {
	file *os.File
}

// Lock takes the right to manage the device or regular file at path, or says
// which process has it. It binds those who ask for it, nobody else, and does
// not stand in the way of OpenOptions.Exclusive.
//
// It is a lock of the open file (F_OFD_SETLK), not flock(2): udevd takes the
// latter on a disk for each event and gives the event up while somebody else
// has it, so an agent that held it would stop a disk's links from appearing.
func Lock(path string) (*DeviceLock, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("lock device: %w", err)
	}
	whole := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &whole)
	if err == nil {
		return &DeviceLock{f}, nil
	}
	defer f.Close()
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		info, statErr := f.Stat()
		if statErr != nil {
			return nil, fmt.Errorf("lock device: %w", statErr)
		}
		return nil, fmt.Errorf("lock device: %s is managed by another agent, %s: stop that one first: %w",
			path, lockHolder(info), unix.EBUSY)
	}
	return nil, fmt.Errorf("lock device: %s: %w", path, err)
}

// Close gives the right back.
func (l *DeviceLock) Close() error { return l.file.Close() }

// lockHolder names the processes that hold a lock on the whole file, as far as
// /proc shows them. A lock of an open file carries no process id, so the
// descriptors' own pages are asked.
func lockHolder(info fs.FileInfo) string {
	const unknown = "a process that can't be named"
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return unknown
	}
	inode := fmt.Sprintf(" %02x:%02x:%d 0 EOF", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	pages, err := filepath.Glob("/proc/[0-9]*/fdinfo/*")
	if err != nil {
		return unknown
	}
	var holders []string
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil || !bytes.Contains(text, []byte("lock:")) || !bytes.Contains(text, []byte(inode)) {
			continue // gone meanwhile, not ours to see, or another file
		}
		pid := strings.Split(page, "/")[2]
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		holder := fmt.Sprintf("process %s (%s)", pid, strings.TrimSpace(string(name)))
		if !slices.Contains(holders, holder) {
			holders = append(holders, holder)
		}
	}
	if len(holders) == 0 {
		return unknown
	}
	return strings.Join(holders, ", ")
}
