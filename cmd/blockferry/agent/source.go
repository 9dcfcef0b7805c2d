package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

// source is a volume as protocol sees it.
type source struct {
	*volume.Volume

	mu      sync.Mutex
	lastCut uint64 // WrittenBytes at it
	number  uint64 // its number
	at      time.Time
	stalled time.Duration
	sealed  bool // the stack is gone
	written bool // ... and something may have been written since the last cut
}

var _ protocol.Source = (*source)(nil)

// WrittenBytes is, once the stack is gone, what the kernel's marks prove: the
// count at the last cut, or one more if they prove nothing.
func (s *source) WrittenBytes() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.sealed:
		return s.Volume.WrittenBytes()
	case s.written:
		return s.lastCut + 1, nil
	}
	return s.lastCut, nil
}

// seal says that the stack is gone.
func (s *source) seal(written bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sealed, s.written = true, written
}

// last is the number of the last cut.
func (s *source) last() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.number
}

// lastCutStatus describes the last cut, nil before the first.
func (s *source) lastCutStatus() *status.Cut {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.number == 0 {
		return nil
	}
	at, stalled := s.at.UTC(), s.stalled.Seconds()
	return &status.Cut{Epoch: s.number, At: &at, StalledSeconds: &stalled}
}

func (s *source) Cut(ctx context.Context, epoch uint64, wish protocol.CutWish) (protocol.Cut, error) {
	c, err := s.Volume.Cut(ctx, epoch, wish.View)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.lastCut, s.number, s.at, s.stalled = c.WrittenBytes(), epoch, c.At(), c.Stalled()
	s.mu.Unlock()
	return cut{c}, nil
}

// cut is a volume's cut as protocol sees it.
type cut struct{ c *volume.Cut }

func (c cut) Epoch() uint64          { return c.c.Number() }
func (c cut) NoView() error          { return nil }
func (c cut) WholeView() bool        { return true }
func (c cut) Valid() error           { return c.c.Valid() }
func (c cut) FlushSource() error     { return c.c.FlushSource() }
func (c cut) Stalled() time.Duration { return c.c.Stalled() }
func (c cut) WrittenBytes() uint64   { return c.c.WrittenBytes() }
func (c cut) Release() error         { return c.c.Release() }

func (c cut) View() io.ReaderAt {
	if v := c.c.View(); v != nil {
		return v
	}
	return nil // not an interface that holds a nil
}

func (c cut) Changed(since uint64) ([]protocol.Range, error) {
	extents, err := c.c.Changed(since)
	if errors.Is(err, volume.ErrTrackingLost) {
		return nil, fmt.Errorf("%w: %w", protocol.ErrTrackingLost, err)
	}
	if err != nil {
		return nil, err
	}
	ranges := make([]protocol.Range, len(extents))
	for i, e := range extents {
		ranges[i] = protocol.Range{Offset: e.Offset, Length: e.Length}
	}
	return ranges, nil
}
