package precopy

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"blockferry/blockdev"
)

// Cut is a point in time, held in memory. ReadAt and what describes it may be
// used from several goroutines; Release ends it.
type Cut struct {
	engine  *Engine
	number  uint64
	at      time.Time
	stalled time.Duration
	rounds  int
	inside  int64
	read    int64

	mu       sync.RWMutex // held for writing by Release
	extents  []blockdev.Extent
	released bool
}

// Number is the cut's number.
func (c *Cut) Number() uint64 { return c.number }

// At is when it was, for people only.
func (c *Cut) At() time.Time { return c.at }

// Stalled is how long writers were stopped, stops in vain included.
func (c *Cut) Stalled() time.Duration { return c.stalled }

// Rounds is how many were read while writes went on.
func (c *Cut) Rounds() int { return c.rounds }

// InsideBytes is what was read with writers stopped, RoundBytes before.
func (c *Cut) InsideBytes() int64 { return c.inside }

// RoundBytes is what was read while writes went on, in bytes.
func (c *Cut) RoundBytes() int64 { return c.read }

// Extents is what the cut holds, ascending and disjoint.
func (c *Cut) Extents() []blockdev.Extent { return slices.Clone(c.extents) }

// ReadAt reads the device as it was at the cut. A range that is not within
// Extents is ErrOutside.
func (c *Cut) ReadAt(p []byte, offset int64) (int, error) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.released {
		return 0, fmt.Errorf("%s: cut %d was released", c.engine.o.Source.Name(), c.number)
	}
	n := c.engine.pool.readAt(p, offset)
	if n < len(p) {
		return n, fmt.Errorf("%s: cut %d: %d bytes at offset %d: %w: it holds what changed since its base", c.engine.o.Source.Name(), c.number, len(p), offset, ErrOutside)
	}
	return n, nil
}

// Valid says whether what was read was the cut: memory keeps it until Release.
func (c *Cut) Valid() error {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.released {
		return fmt.Errorf("%s: cut %d was released", c.engine.o.Source.Name(), c.number)
	}
	return nil
}

// Release gives the memory back. It may be called twice.
func (c *Cut) Release() error {
	c.engine.mu.Lock()
	defer c.engine.mu.Unlock()
	return c.drop()
}

func (c *Cut) drop() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.released {
		return nil
	}
	c.released = true
	c.engine.cut = nil
	return c.engine.pool.reset()
}
