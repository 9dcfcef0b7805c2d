package volume

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"

	"blockferry/blockdev"
)

// Content is what a device holds, as far as it was looked at.
type Content int

const (
	// Unknown: it could not be read, or a label is damaged. Never taken for
	// empty.
	Unknown Content = iota
	// Blank: everything looked at is zero.
	Blank
	// Labelled: a valid label.
	Labelled
	// Foreign: something else.
	Foreign
)

func (c Content) String() string {
	return [...]string{"unknown", "blank", "labelled", "foreign"}[c]
}

const (
	blankSamples  = 1000
	blankEndBytes = 1 << 20
)

// Inspect says what a device holds, with the evidence in words. It reads the
// label's place, both ends and 1,000 sampled places. Only what was found to be
// zero is blank, whichever disk it is: one with another serial and content is not.
func Inspect(d blockdev.Device) (Content, string) {
	label, err := ReadLabel(d)
	switch {
	case err == nil:
		return Labelled, fmt.Sprintf("%s holds the label of volume %s", d.Name(), label.UUID)
	case !errors.Is(err, ErrNoLabel):
		return Unknown, err.Error()
	case d.Size() < 2*blankEndBytes:
		return Unknown, fmt.Sprintf("%s has only %d bytes", d.Name(), d.Size())
	}
	buffer := blockdev.AlignedBuffer(blankEndBytes)
	look := func(at, length int64) (Content, string) {
		b := buffer[:length]
		if _, err := d.ReadAt(b, at); err != nil {
			return Unknown, fmt.Sprintf("%s: read at %d: %v", d.Name(), at, err)
		}
		if i := firstNonzero(b); i >= 0 {
			what := unknownContent
			if at == 0 {
				what = signature(b)
			}
			return Foreign, fmt.Sprintf("%s holds %s (byte %d)", d.Name(), what, at+int64(i))
		}
		return Blank, ""
	}
	for _, at := range []int64{0, d.Size() - blankEndBytes} {
		if c, why := look(at, blankEndBytes); c != Blank {
			return c, why
		}
	}
	// One place in each of 1,000 equal stretches, at random within it.
	blocks := uint64(d.Size() / blockdev.BlockSize)
	for i := range uint64(blankSamples) {
		from, to := blocks*i/blankSamples, blocks*(i+1)/blankSamples
		if from == to {
			continue
		}
		var random [8]byte
		rand.Read(random[:])
		at := from + binary.NativeEndian.Uint64(random[:])%(to-from)
		if c, why := look(int64(at)*blockdev.BlockSize, blockdev.BlockSize); c != Blank {
			return c, why
		}
	}
	return Blank, fmt.Sprintf("%s: the label's place, both ends and %d sampled places are zero", d.Name(), blankSamples)
}

func firstNonzero(b []byte) int {
	for i, v := range b {
		if v != 0 {
			return i
		}
	}
	return -1
}

const unknownContent = "content that is not zero"

// signature names what a device's first MiB begins with.
func signature(b []byte) string {
	at := func(offset int, magic string) bool {
		return bytes.HasPrefix(b[offset:], []byte(magic))
	}
	switch {
	case at(0, "XFSB"):
		return "an XFS file system"
	case at(1080, "\x53\xef"):
		return "an ext2, ext3 or ext4 file system"
	case at(65600, "_BHRfS_M"):
		return "a btrfs file system"
	case at(0, "LABELONE"), at(512, "LABELONE"):
		return "an LVM physical volume"
	case at(0, "\xfc\x4e\x2b\xa9"), at(4096, "\xfc\x4e\x2b\xa9"):
		return "an md RAID member"
	case at(4086, "SWAPSPACE2"):
		return "swap space"
	case at(0, "LUKS\xba\xbe"):
		return "a LUKS volume"
	case at(512, "EFI PART"), at(4096, "EFI PART"):
		return "a GPT partition table"
	case at(510, "\x55\xaa"):
		return "an MBR partition table or a boot sector"
	}
	return unknownContent
}
