package deadman

import (
	"errors"
	"hash/fnv"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A hold says that somebody alive looks after the suspends of a device, so that
// a dead-man's service that has just started does not end one that is under
// way. Holds are locks on bytes of one empty file in the folder of notes; the
// byte is a hash of the device's name. A dead-man that has armed a device shares
// the lock; who resumes what was left suspended has it alone meanwhile. The
// kernel ends a lock with its process. Two names with one hash wait for each
// other, and nothing worse.
//
// A hold that can't be had is none: then a cut may be void that need not be.
const (
	holdsName = "suspends"
	// holdPatience is how long an arm waits for a look at left devices to end.
	holdPatience = 500 * time.Millisecond
	holdAgain    = 5 * time.Millisecond
)

// holds is one dead-man's locks; its zero value, and one without a file, hold nothing.
type holds struct{ file *os.File }

func openHolds(folder string) (holds, error) {
	if folder == "" {
		return holds{}, errors.New("no folder for locks of suspends")
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return holds{}, err
	}
	f, err := os.OpenFile(filepath.Join(folder, holdsName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	return holds{f}, err
}

func (h holds) lock(kind int16, start, length int64) error {
	if h.file == nil {
		return os.ErrInvalid
	}
	// Of the open file, not the process: a service has one for each agent.
	return unix.FcntlFlock(h.file.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: kind, Start: start, Len: length})
}

func byteOf(device string) int64 {
	sum := fnv.New64a()
	_, _ = sum.Write([]byte(device))
	return int64(sum.Sum64() >> 2) // a lock's end has to fit, too
}

// share takes the devices' holds as one of any number.
func (h holds) share(devices []string) {
	for _, d := range devices {
		for end := bootTime() + holdPatience; ; time.Sleep(holdAgain) {
			err := h.lock(unix.F_RDLCK, byteOf(d), 1)
			if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) || bootTime() > end {
				break
			}
		}
	}
}

// alone has f run while nobody holds the device, and says whether it did.
func (h holds) alone(device string, f func()) bool {
	if h.lock(unix.F_WRLCK, byteOf(device), 1) != nil {
		return false
	}
	defer func() { _ = h.lock(unix.F_UNLCK, byteOf(device), 1) }()
	f()
	return true
}

// drop ends all holds.
func (h holds) drop() { _ = h.lock(unix.F_UNLCK, 0, 0) }

func (h holds) close() {
	if h.file != nil {
		h.file.Close()
	}
}
