// Package spill keeps a replica's spill file in a file system.
package spill

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"blockferry/blockdev"
	"blockferry/protocol"
)

// File is a replica's spill file at a path, as large as one epoch may need.
type File struct {
	Path       string
	LimitBytes int64
}

var _ protocol.SpillFile = (*File)(nil)

// store is an open one.
type store struct {
	*blockdev.File
	sizeBytes int64
}

// Empty implements protocol.SpillStore.
func (s *store) Empty() error { return s.File.Empty(blockdev.BlockSize, s.sizeBytes) }

// Name implements protocol.SpillFile.
func (f *File) Name() string { return f.Path }

// Open implements protocol.SpillFile. It refuses what is no regular file.
func (f *File) Open() (protocol.SpillStore, error) {
	if info, err := os.Stat(f.Path); err == nil && !info.Mode().IsRegular() {
		return nil, errors.New("it is no regular file")
	}
	file, err := blockdev.OpenFile(f.Path, blockdev.OpenOptions{Write: true, Exclusive: true})
	if err != nil {
		return nil, err
	}
	return &store{file, f.size()}, nil
}

// Create implements protocol.SpillFile. What a link leads to is replaced, not
// the link: the file belongs where it was looked at, not beside the link.
func (f *File) Create(header []byte, replace bool) (protocol.SpillStore, error) {
	path := f.Path
	if to, err := os.Readlink(path); err == nil {
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return nil, fmt.Errorf("it is a link to %s, which is not there: mount what holds that, or name the file itself", to)
		}
	}
	put := blockdev.CreateFile
	if replace {
		put = blockdev.ReplaceFile
	}
	if err := put(path, header, f.size(), 0o600); err != nil {
		return nil, err
	}
	return f.Open()
}

func (f *File) size() int64 { return blockdev.BlockSize + f.LimitBytes }
