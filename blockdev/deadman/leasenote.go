package deadman

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A lease's note holds its deadline for the dead-man's service after this one,
// and for whoever is about to resume the device. The service alone writes it,
// before it answers, and removes it when the device fails, is gone, or was
// released. It is one line, in the folder that the notes of freezes are in:
//
//	blockferry lease 1 <boot id> <deadline> <holder> <major:minor> <disk's sequence> "<device>" "<uuid>"
//
// The deadline is nanoseconds of this boot (CLOCK_BOOTTIME), the holder a random
// word. Another file takes its place in one step, so it is never read in part.
// It is not made durable: the device does not survive a boot either.
const (
	leaseVersion = 1
	leasePrefix  = "lease-"
)

// identity is what tells a device from a later one of the same name.
type identity struct {
	uuid     string
	number   string // "major:minor"
	sequence uint64 // of the disk among all of this boot; 0: it had none yet, or the kernel has none
}

// matches says that the device noted may be the one that is: a number that was
// not known then is any.
func (i identity) matches(is identity) bool {
	return i.uuid == is.uuid && i.number == is.number && (i.sequence == 0 || i.sequence == is.sequence)
}

type leaseNote struct {
	device string
	identity
	holder string
	until  time.Duration // of this boot
}

func leasePath(folder, device string) string { return filepath.Join(folder, leasePrefix+device) }

// write puts the note in the place of the one before.
func (n *leaseNote) write(folder string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("a note of the lease: %w", err)
		}
	}()
	boot, err := bootID()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(folder, "new-*")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "blockferry lease %d %s %d %s %s %d %q %q\n", leaseVersion, boot, n.until.Nanoseconds(), n.holder, n.number, n.sequence, n.device, n.uuid)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), leasePath(folder, n.device))
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// errOtherBoot says that a note is of another boot: its device is gone.
var errOtherBoot = errors.New("a note of another boot")

// errTorn says that a file is no note, as far as can be read.
var errTorn = errors.New("it holds no note of a lease")

// readLease reads the note at a path; os.ErrNotExist: there is none.
func readLease(path string) (*leaseNote, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var text [1024]byte
	size, err := f.Read(text[:])
	if err != nil && !errors.Is(err, io.EOF) { // an empty one is torn
		return nil, fmt.Errorf("the note of a lease %s: %w", path, err)
	}
	n, version, boot, until := &leaseNote{}, 0, "", int64(0)
	_, err = fmt.Sscanf(string(text[:size]), "blockferry lease %d %s %d %s %s %d %q %q\n", &version, &boot, &until, &n.holder, &n.number, &n.sequence, &n.device, &n.uuid)
	if version != leaseVersion || err != nil || leasePath(filepath.Dir(path), n.device) != path {
		return nil, fmt.Errorf("%s: %w of version %d: '%s'", path, errTorn, leaseVersion, strings.TrimSpace(string(text[:size])))
	}
	n.until = time.Duration(until)
	now, err := bootID()
	if err := ofBoot(boot, now, err); err != nil {
		return nil, err
	}
	return n, nil
}

// ofBoot is errOtherBoot if it is sure that a note's boot is not this one.
func ofBoot(noted, now string, err error) error {
	if err != nil {
		return fmt.Errorf("whether a note of a lease is of this boot can't be told: %w", err)
	}
	if noted != now {
		return errOtherBoot
	}
	return nil
}

// leaseOf is the note of a device, nil if there is none that counts.
func leaseOf(folder, device string) (*leaseNote, error) {
	if folder == "" {
		return nil, nil
	}
	n, err := readLease(leasePath(folder, device))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, errOtherBoot) {
		return nil, nil
	}
	return n, err
}
