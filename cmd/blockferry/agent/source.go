package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/attach"
	"blockferry/blockdev/precopy"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

// raised is a volume that is up, on a stack of its own or attached to a device
// that is in use as it is.
type raised interface {
	io.ReaderAt
	Size() int64
	UUID() volume.UUID
	Path() string
	WrittenBytes() (uint64, error)
	TrackingLost() string
	State() []byte
	SetState(state []byte) error
	Forget(upTo uint64)
	Close() error
}

// taken is a cut of either.
type taken interface {
	Number() uint64
	At() time.Time
	Stalled() time.Duration
	WrittenBytes() uint64
	Changed(since uint64) ([]blockdev.Extent, error)
	Valid() error
	FlushSource() error
	Release() error
}

// takeFunc cuts a volume.
type takeFunc func(ctx context.Context, epoch uint64, wish protocol.CutWish) (cut, error)

// source is a volume as protocol sees it.
type source struct {
	raised
	take   takeFunc
	device string // the disk, whose tail may tell of the time before the volume was here; "": it has none

	mu      sync.Mutex
	lastCut uint64 // WrittenBytes at it
	number  uint64 // its number
	at      time.Time
	stalled time.Duration
	other   error // cut.other
	sealed  bool  // the stack is gone
	written bool  // ... and something may have been written since the last cut
}

var _ protocol.Source = (*source)(nil)

// WrittenBytes is, once the stack is gone, what the kernel's marks prove: the
// count at the last cut, or one more if they prove nothing.
func (s *source) WrittenBytes() (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.sealed:
		return s.raised.WrittenBytes()
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
	c := &status.Cut{Epoch: s.number, At: &at, StalledSeconds: &stalled}
	if s.other != nil {
		c.Reason = s.other.Error()
	}
	return c
}

func (s *source) Cut(ctx context.Context, epoch uint64, wish protocol.CutWish) (protocol.Cut, error) {
	c, err := s.take(ctx, epoch, wish)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.lastCut, s.number, s.at, s.stalled, s.other = c.WrittenBytes(), epoch, c.At(), c.Stalled(), c.other
	s.mu.Unlock()
	if s.device != "" {
		c.before = s.changedBefore
	}
	return c, nil
}

// changedBefore answers what tracked, a cut's, does not know as the volume was not written
// here then, by what the disk holds of its time as a replica.
func (s *source) changedBefore(since uint64, tracked func(uint64) ([]protocol.Range, error)) (_ []protocol.Range, err error) {
	disk, err := udev.Open(s.device, blockdev.OpenOptions{})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", protocol.ErrTrackingLost, err)
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	state, err := protocol.DecodeSourceState(s.State())
	if err != nil {
		return nil, err
	}
	past, err := protocol.ReadInheritance(disk, s.UUID(), s.Size(), state.Effective())
	if err != nil {
		return nil, err
	}
	return past.ChangedSince(since, tracked)
}

// forceAfter is how many live rounds in a row are given to a volume that is too
// busy, before 'when-busy: stall' stops writers for longer.
const forceAfter = 5

// suspendable is a *volume.Volume.
type suspendable interface {
	Cut(ctx context.Context, number uint64, withView bool) (*volume.Cut, error)
	CutSince(ctx context.Context, number uint64, want volume.Want) (*volume.Cut, error)
}

// takeSuspended cuts a volume on a stack of its own. When it is asked for a view it has
// one, unless its pre-copy does not converge and another way was chosen for that.
func takeSuspended(v suspendable, whenBusy string) takeFunc {
	return func(ctx context.Context, epoch uint64, wish protocol.CutWish) (cut, error) {
		var c *volume.Cut
		var err, noView error
		if wish.View {
			c, err = v.CutSince(ctx, epoch, volume.Want{Since: wish.Since, OnlyMemory: whenBusy != config.BusySnapshot,
				Force: whenBusy == config.BusyStall && wish.LiveRounds >= forceAfter})
			if errors.Is(err, precopy.ErrTooMuch) {
				noView = err
			}
		}
		if !wish.View || noView != nil {
			c, err = v.Cut(ctx, epoch, false)
		}
		if err != nil {
			return cut{}, err
		}
		made := cut{taken: c, view: c.View(), noView: noView, other: noView, whole: c.WholeView(), exact: c.Exact}
		if why := c.TooMuch(); why != nil {
			made.other = fmt.Errorf("with a frozen view, not read into memory: %w", why)
		}
		return made, nil
	}
}

// cut is a volume's cut as protocol sees it.
type cut struct {
	taken
	view   io.ReaderAt // nil: none
	noView error
	other  error // why it was not made as configured, only in another way
	whole  bool
	exact  func(since uint64) bool
	before func(since uint64, tracked func(uint64) ([]protocol.Range, error)) ([]protocol.Range, error) // may be nil
}

var _ protocol.DatedCut = cut{}

func (c cut) Epoch() uint64                  { return c.Number() }
func (c cut) CutUnixNanos() int64            { return c.At().UnixNano() }
func (c cut) View() io.ReaderAt              { return c.view }
func (c cut) NoView() error                  { return c.noView }
func (c cut) WholeView() bool                { return c.whole }
func (c cut) ChangedExact(since uint64) bool { return c.exact(since) }

// Changed asks the tracker, then the disk.
func (c cut) Changed(since uint64) ([]protocol.Range, error) {
	changed, err := c.tracked(since)
	if c.before == nil || !errors.Is(err, protocol.ErrTrackingLost) {
		return changed, err
	}
	changed, lost := c.before(since, c.tracked)
	if lost != nil {
		return nil, fmt.Errorf("%w; %w", err, lost)
	}
	return changed, nil
}

func (c cut) tracked(since uint64) ([]protocol.Range, error) {
	extents, err := c.taken.Changed(since)
	if errors.Is(err, volume.ErrTrackingLost) || errors.Is(err, attach.ErrTrackingLost) {
		return nil, fmt.Errorf("%w: %w", protocol.ErrTrackingLost, err)
	}
	if err != nil {
		return nil, err
	}
	return ranges(extents), nil
}

func ranges(extents []blockdev.Extent) []protocol.Range {
	out := make([]protocol.Range, len(extents))
	for i, e := range extents {
		out[i] = protocol.Range{Offset: e.Offset, Length: e.Length}
	}
	return out
}
