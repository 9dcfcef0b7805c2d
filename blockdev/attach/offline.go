package attach

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"

	"blockferry/blockdev"
)

// Kept is what a state file keeps for its user.
type Kept struct {
	UUID  [16]byte // the volume's
	State []byte
}

// ReadStateOf is ReadState, and says whether a device is, for certain, the disk
// that the file is of; what it holds does not matter.
func ReadStateOf(device, path string) (k Kept, same bool, err error) {
	was, err := mustReadState(path)
	if err != nil {
		return k, false, err
	}
	now, err := stateOf(device)
	return Kept{was.UUID, was.State}, err == nil && was.sameDisk(&now), err
}

// ReadState reads a state file, whatever device it is of. Without one the error
// is fs.ErrNotExist.
func ReadState(path string) (Kept, error) {
	s, err := mustReadState(path)
	if err != nil {
		return Kept{}, err
	}
	return Kept{s.UUID, s.State}, nil
}

// mustReadState is readState for a file that has to be there.
func mustReadState(path string) (*state, error) {
	s, err := readState(path)
	if err == nil && s == nil {
		err = fmt.Errorf("state file %s: %w", path, errNoState)
	}
	return s, err
}

// Create makes the state file of a device that is attached for the first time;
// the device may be in use. It refuses when the file is there.
func Create(device, stateFile string, uuid [16]byte) error {
	was, err := readState(stateFile)
	if err != nil {
		return err
	}
	if was != nil {
		return fmt.Errorf("state file %s: %w", stateFile, fs.ErrExist)
	}
	s, err := stateOf(device)
	if err != nil {
		return err
	}
	s.UUID, s.Generation = uuid, 1
	return writeState(stateFile, &s)
}

// Offline is the device of an attached volume that nobody uses, held
// exclusively, with its state file: what a restore fills.
type Offline struct {
	*blockdev.File
	lock  *blockdev.DeviceLock
	path  string
	state state
}

// OpenOffline takes a device and the state file that is its own. It refuses a
// device in use, and another one than the file's.
func OpenOffline(device, stateFile string) (*Offline, error) {
	return openOffline(device, stateFile, func(was, now *state) error {
		if was == nil {
			return fmt.Errorf("state file %s: %w", stateFile, errNoState)
		}
		if !was.sameDisk(now) {
			return fmt.Errorf("%w: %s is not, for certain, the disk that state file %s is of", ErrOtherDevice, device, stateFile)
		}
		now.UUID, now.State, now.Tracking = was.UUID, was.State, was.Tracking
		return nil
	})
}

// CreateOffline is OpenOffline for a device that takes another's place, or is the
// first: its state file is made, or made anew.
func CreateOffline(device, stateFile string, uuid [16]byte, kept []byte) (*Offline, error) {
	return openOffline(device, stateFile, func(_, now *state) error {
		now.UUID, now.State = uuid, bytes.Clone(kept)
		return nil
	})
}

func openOffline(device, stateFile string, adopt func(was, now *state) error) (_ *Offline, err error) {
	o := &Offline{path: stateFile}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("the device of an attached volume: %w", err), o.Close())
		}
	}()
	if o.lock, err = blockdev.Lock(device); err != nil {
		return nil, err
	}
	if o.File, err = blockdev.OpenFile(device, blockdev.OpenOptions{Write: true, Exclusive: true}); err != nil {
		return nil, err
	}
	was, err := readState(stateFile)
	if err != nil {
		return nil, err
	}
	now, err := stateOf(device)
	if err != nil {
		return nil, err
	}
	if was != nil {
		now.Generation = was.Generation
	}
	if err := adopt(was, &now); err != nil {
		return nil, err
	}
	o.state = now
	return o, o.write()
}

func (o *Offline) write() (err error) {
	if o.state.FileSystem, err = fileSystemID(o.File); err != nil {
		return err
	}
	o.state.Generation++
	return writeState(o.path, &o.state)
}

// UUID is the volume's.
func (o *Offline) UUID() [16]byte { return o.state.UUID }

// State is what was kept last.
func (o *Offline) State() []byte { return bytes.Clone(o.state.State) }

// SetState keeps the caller's state; durable on return.
func (o *Offline) SetState(b []byte) error {
	o.state.State = bytes.Clone(b)
	return o.write()
}

// Close gives the device back. It does not flush it.
func (o *Offline) Close() error {
	var errs []error
	if o.File != nil {
		errs = append(errs, o.File.Close())
	}
	if o.lock != nil {
		errs = append(errs, o.lock.Close())
	}
	return errors.Join(errs...)
}
