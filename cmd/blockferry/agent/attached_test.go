package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"blockferry/blockdev/attach"
	"blockferry/blockdev/precopy"
	"blockferry/protocol"
)

// busy is a device of which an image can be had by force only.
type busy struct{ why error }

func (b busy) Cut(_ context.Context, _ uint64, want attach.Want) (*attach.Cut, error) {
	if want.View && !want.Force {
		return nil, fmt.Errorf("volume data: %w", b.why)
	}
	return &attach.Cut{}, nil
}

// trimmed is a disk without requests while it is trimmed: there is no cut at all.
type trimmed struct{}

func (trimmed) Cut(context.Context, uint64, attach.Want) (*attach.Cut, error) {
	return nil, attach.ErrDiscards
}

// With 'when-busy: stall' writers are stopped for longer after some rounds in a row
// were read of the live device, and not before; with 'report' never. Each cut
// without an image says why, and status the same of one for which too much changed.
func TestWhenBusy(t *testing.T) {
	tooMuch := &precopy.TooMuchError{Reason: precopy.ReasonRounds, Bytes: 5, Limit: 4, Rounds: 8}
	for _, stall := range []bool{false, true} {
		take := takeFrozen(busy{tooMuch}, stall)
		s := &source{take: take}
		for rounds := range 8 {
			forced := stall && rounds >= forceAfter
			got, err := s.Cut(t.Context(), uint64(rounds+1), protocol.CutWish{View: true, Since: 1, LiveRounds: rounds})
			if err != nil {
				t.Fatal(err)
			}
			if why := got.NoView(); (why == nil) != forced || !forced && !errors.Is(why, precopy.ErrTooMuch) {
				t.Errorf("stall %v, after %d rounds: %v", stall, rounds, why)
			}
			if said := s.lastCutStatus().Reason; (said == "") != forced || !forced && said != got.NoView().Error() {
				t.Errorf("stall %v, after %d rounds status says '%s'", stall, rounds, said)
			}
		}
	}
	take := takeFrozen(busy{attach.ErrTrackingLost}, false)
	if c, err := take(t.Context(), 1, protocol.CutWish{View: true}); err != nil || !errors.Is(c.NoView(), attach.ErrTrackingLost) || c.other != nil {
		t.Errorf("with tracking lost: %v, %v, %v", err, c.noView, c.other)
	}
	s := &source{take: takeFrozen(busy{attach.ErrDiscards}, false)}
	if c, err := s.Cut(t.Context(), 1, protocol.CutWish{View: true}); err != nil || !errors.Is(c.NoView(), attach.ErrDiscards) {
		t.Errorf("while it is trimmed: %v, %v", c, err)
	} else if said := s.lastCutStatus().Reason; !strings.Contains(said, "fstrim runs") {
		t.Errorf("while it is trimmed status says '%s'", said)
	}
	take = takeFrozen(trimmed{}, false)
	if _, err := take(t.Context(), 1, protocol.CutWish{View: true}); !errors.Is(err, protocol.ErrPasses) {
		t.Errorf("no cut at all while it is trimmed: %v", err)
	}
	take = takeFrozen(busy{errors.New("anything else")}, true)
	if _, err := take(t.Context(), 1, protocol.CutWish{View: true}); err == nil {
		t.Error("an error is taken for too much that changes")
	}
}
