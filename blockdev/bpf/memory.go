package bpf

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapWords maps the memory of a map of the kernel, shared with it, as words; its
// length is that many words, rounded up to pages.
func mapWords(fd int, words int64) ([]uint64, error) {
	page := int64(unix.Getpagesize())
	size := (words*8 + page - 1) / page * page
	b, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), size/8), nil
}

// unmapWords undoes mapWords.
func unmapWords(words []uint64) error {
	if len(words) == 0 {
		return nil
	}
	return unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), len(words)*8))
}
