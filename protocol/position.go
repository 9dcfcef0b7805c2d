package protocol

import "fmt"

// Generation is a random id that begins when a node becomes primary, or
// starts again after an unclean end.
type Generation [16]byte

// Position is what a copy holds: everything up to and including an epoch. The
// zero value means 'nothing yet'.
type Position struct {
	Generation Generation
	Epoch      uint64
}

// IsZero reports whether the position names no epoch.
func (p Position) IsZero() bool { return p == Position{} }

// String is the generation's first four bytes and the epoch: 1f2e3d4c/17.
func (p Position) String() string {
	if p.IsZero() {
		return "none"
	}
	return fmt.Sprintf("%x/%d", p.Generation[:4], p.Epoch)
}
