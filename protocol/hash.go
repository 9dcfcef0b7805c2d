package protocol

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"slices"
)

// HashBytes is the size of one checksum, HashKeyBytes of a session's key.
const (
	HashBytes    = 16
	HashKeyBytes = 16
)

// Hasher computes the checksums two copies are compared by: AES-128-GMAC over
// the block with a fixed nonce. As a message authenticator that would be a
// mistake; as a keyed universal hash, whose results only the two ends compare,
// it is what we want: with a random key two different blocks of n bytes
// collide with a probability of about n/16 in 2^128, whoever chose them, and it runs
// at several GB/s. Nobody who writes to the volume may learn the key, so it
// is random in each session.
type Hasher struct {
	gcm   cipher.AEAD
	nonce []byte
}

// NewHasher takes a session's key of HashKeyBytes bytes. The Hasher may be
// used by several goroutines at once.
func NewHasher(key []byte) (*Hasher, error) {
	if len(key) != HashKeyBytes {
		return nil, fmt.Errorf("checksum key of %d bytes, want %d", len(key), HashKeyBytes)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &Hasher{gcm: gcm, nonce: make([]byte, gcm.NonceSize())}, nil
}

// Sum is the checksum of a block of any length.
func (h *Hasher) Sum(block []byte) (sum [HashBytes]byte) {
	copy(sum[:], h.gcm.Seal(nil, h.nonce, nil, block))
	return sum
}

// AppendSums appends the checksums of data cut into pieces of the given
// length, UnitSize or BlockSize; the last piece may be shorter.
func (h *Hasher) AppendSums(dst, data []byte, piece int) []byte {
	// Seal itself would make room for one checksum at a time, and copy all the
	// others for each.
	dst = slices.Grow(dst, (len(data)+piece-1)/piece*HashBytes)
	for len(data) > 0 {
		n := min(piece, len(data))
		dst = h.gcm.Seal(dst, h.nonce, nil, data[:n])
		data = data[n:]
	}
	return dst
}
