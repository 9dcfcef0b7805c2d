package blockdev

import "unsafe"

// AlignedBuffer returns n zero bytes whose address is a multiple of BlockSize,
// fit for direct I/O. It is ordinary memory of the garbage collector.
func AlignedBuffer(n int) []byte {
	// The allocator gives page-aligned memory to anything of a page or more,
	// so the first try nearly always holds; nothing promises it, though.
	if b := make([]byte, n); n > 0 && misalignment(b) == 0 {
		return b
	}
	b := make([]byte, n+BlockSize)
	skip := 0
	if off := misalignment(b); off != 0 {
		skip = BlockSize - off
	}
	return b[skip : skip+n : skip+n]
}

// misalignment is how far b's address is beyond a multiple of BlockSize.
func misalignment(b []byte) int {
	return int(uintptr(unsafe.Pointer(unsafe.SliceData(b))) % BlockSize)
}
