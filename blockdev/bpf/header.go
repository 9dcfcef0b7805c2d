package bpf

import (
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"sync/atomic"
)

// header is the page pinned beside the maps: whose marks they are, and what they
// cover. Words of 8 bytes, as the processor has them; it never leaves the boot.
//
//	0 magic   1 digest of the programs   2-3 boot id
//	4 disk's major << 32 | minor   5 disk's sequence number   6 disk's size   7 start of the volume on it
//	8 length of the volume   9 grain   10 digest of the disk's serial number and worldwide name   (6 to 9 in bytes)
//	16 state   17 first cut covered   18 last cut sealed   19 1: taken from active since the last cut
//	20 sectors written that the disk's statistics are ahead of the counts of what ended   21 the same, discarded
//	22-23 the same of what began   24-25 misses of the programs of each side then   26 what they could not follow
//	27 requests that began more than once   28 bits: 1 20-21 are known, 2 22-23 are, 4 the last seal was with writers stopped
//	64-127 why the last coverage ended, text padded with zeros   128-131 SHA-256 of the owner, 0: none
//	192-207 the volume's name, text padded with zeros
type header []uint64

const (
	headerWords = 512 // a page
	headerMagic = 0x3142_5246_4b4c_4221

	headMagic    = 0
	headIdentity = 1 // to headIdentityEnd
	headState    = 16
	headFirst    = 17
	headLast     = 18
	headOpen     = 19
	headBase     = 20 // nine words
	headReason   = 64
	headOwner    = 128
	headVolume   = 192

	headIdentityEnd = 11
	reasonBytes     = 512
	volumeBytes     = 128
)

// Values of the state. 0 is that of a header nobody has finished.
const (
	stateBare    = 1 // marks are kept, no cut is covered yet
	stateCovered = 2
)

func (h header) get(at int) uint64        { return atomic.LoadUint64(&h[at]) }
func (h header) put(at int, value uint64) { atomic.StoreUint64(&h[at], value) }

func (h header) reason() string { return h.text(headReason, reasonBytes) }

func (h header) setReason(reason string) { h.setText(headReason, reasonBytes, reason) }

func (h header) text(at, length int) string {
	text := make([]byte, 0, length)
	for i := range length {
		text = append(text, byte(h.get(at+i/8)>>(i%8*8)))
	}
	return strings.TrimRight(string(text), "\x00")
}

// setText keeps as much as there is room for.
func (h header) setText(at, length int, text string) {
	words := make([]uint64, length/8)
	for i := range min(len(text), length) {
		words[i/8] |= uint64(text[i]) << (i % 8 * 8)
	}
	for i, w := range words {
		h.put(at+i, w)
	}
}

// ownerWords tell owners apart.
func ownerWords(owner string) (words [4]uint64) {
	if owner == "" {
		return words
	}
	sum := sha256.Sum256([]byte(owner))
	for i := range words {
		words[i] = binary.NativeEndian.Uint64(sum[i*8:])
	}
	return words
}

func (h header) owner() (words [4]uint64) {
	for i := range words {
		words[i] = h.get(headOwner + i)
	}
	return words
}

// setOwner says whose the tracking is.
func (h header) setOwner(owner, volume string) {
	for i, w := range ownerWords(owner) {
		h.put(headOwner+i, w)
	}
	h.setText(headVolume, volumeBytes, volume)
}
