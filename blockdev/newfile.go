package blockdev

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// CreateFile puts a regular file at path that begins with head and is a hole
// from there to size bytes. It has its mode, whatever the umask, before it has its
// name. The error wraps fs.ErrExist where something stands
// already, also where another did the same at this moment: that stays as it
// is. The file, and its name, are durable when it returns.
func CreateFile(path string, head []byte, size int64, mode fs.FileMode) error {
	return putFile(path, head, size, mode, func(made string) error {
		return errors.Join(os.Link(made, path), os.Remove(made)) // a rename would replace
	})
}

// ReplaceFile does what CreateFile does, and replaces a file that stands there, in one step.
func ReplaceFile(path string, head []byte, size int64, mode fs.FileMode) error {
	return putFile(path, head, size, mode, func(made string) error { return os.Rename(made, path) })
}

// putFile makes a file beside path, whole, and has it put into its place.
func putFile(path string, head []byte, size int64, mode fs.FileMode, place func(made string) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("create file: %w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
			err = fmt.Errorf("create file %s: %w", path, err)
		}
	}()
	_, err = f.Write(head)
	if err == nil {
		err = f.Chmod(mode) // it was 0600
	}
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := place(f.Name()); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Empty gives back the room of all that a regular file holds from an offset
// on; from there to the new size it is a hole. No other method runs meanwhile.
func (d *File) Empty(from, size int64) error {
	for _, n := range []int64{from, size} {
		if err := d.file.Truncate(n); err != nil {
			return d.failed("truncation", n, 0, err)
		}
	}
	d.size = size &^ (BlockSize - 1)
	return nil
}

// InPlace is nil while the path that the file was opened by leads to it.
func (d *File) InPlace() error {
	mine, err := d.file.Stat()
	if err != nil {
		return err
	}
	there, err := os.Stat(d.path)
	if err != nil {
		return fmt.Errorf("%s was removed while it was in use: %w", d.path, err)
	}
	if !os.SameFile(mine, there) {
		return fmt.Errorf("%s was replaced while it was in use", d.path)
	}
	return nil
}
