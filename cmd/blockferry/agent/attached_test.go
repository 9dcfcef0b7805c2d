package agent

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"blockferry/blockdev/attach"
	"blockferry/blockdev/precopy"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
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
		take := takeFrozen(busy{tooMuch}, map[bool]string{true: config.BusyStall, false: config.BusyReport}[stall])
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
	take := takeFrozen(busy{attach.ErrTrackingLost}, config.BusyReport)
	if c, err := take(t.Context(), 1, protocol.CutWish{View: true}); err != nil || !errors.Is(c.NoView(), attach.ErrTrackingLost) || c.other != nil {
		t.Errorf("with tracking lost: %v, %v, %v", err, c.noView, c.other)
	}
	s := &source{take: takeFrozen(busy{attach.ErrDiscards}, config.BusyReport)}
	if c, err := s.Cut(t.Context(), 1, protocol.CutWish{View: true}); err != nil || !errors.Is(c.NoView(), attach.ErrDiscards) {
		t.Errorf("while it is trimmed: %v, %v", c, err)
	} else if said := s.lastCutStatus().Reason; !strings.Contains(said, "fstrim runs") {
		t.Errorf("while it is trimmed status says '%s'", said)
	}
	take = takeFrozen(trimmed{}, config.BusyReport)
	if _, err := take(t.Context(), 1, protocol.CutWish{View: true}); !errors.Is(err, protocol.ErrPasses) {
		t.Errorf("no cut at all while it is trimmed: %v", err)
	}
	take = takeFrozen(busy{errors.New("anything else")}, config.BusyStall)
	if _, err := take(t.Context(), 1, protocol.CutWish{View: true}); err == nil {
		t.Error("an error is taken for too much that changes")
	}
}

// busyMapper is a volume of which an image in memory can be had by force only.
type busyMapper struct {
	why   error
	views *int // frozen ones that were made
}

func (b busyMapper) CutSince(_ context.Context, _ uint64, want volume.Want) (*volume.Cut, error) {
	switch {
	case want.Force:
	case want.OnlyMemory:
		return nil, fmt.Errorf("volume data: %w", b.why)
	default:
		*b.views++
	}
	return &volume.Cut{}, nil
}

func (busyMapper) Cut(context.Context, uint64, bool) (*volume.Cut, error) { return &volume.Cut{}, nil }

// On a mapper a pre-copy that does not converge ends in a frozen view by default. With
// 'report' no cut has one, with 'stall' writers are stopped for longer after some rounds in
// a row that were read of the live device; both say why there is no image.
func TestWhenBusyOnMapper(t *testing.T) {
	tooMuch := &precopy.TooMuchError{Reason: precopy.ReasonRounds, Bytes: 5, Limit: 4, Rounds: 8}
	for _, whenBusy := range []string{config.BusySnapshot, config.BusyReport, config.BusyStall} {
		views := 0
		s := &source{take: takeSuspended(busyMapper{tooMuch, &views}, whenBusy)}
		for rounds := range 8 {
			image := whenBusy == config.BusySnapshot || whenBusy == config.BusyStall && rounds >= forceAfter
			got, err := s.Cut(t.Context(), uint64(rounds+1), protocol.CutWish{View: true, Since: 1, LiveRounds: rounds})
			if err != nil {
				t.Fatal(err)
			}
			if why := got.NoView(); (why == nil) != image || !image && !errors.Is(why, precopy.ErrTooMuch) {
				t.Errorf("when-busy: %s, after %d rounds: %v", whenBusy, rounds, why)
			}
			if said := s.lastCutStatus().Reason; (said == "") != image || !image && said != got.NoView().Error() {
				t.Errorf("when-busy: %s, after %d rounds status says '%s'", whenBusy, rounds, said)
			}
		}
		if whenBusy == config.BusySnapshot != (views == 8) || whenBusy != config.BusySnapshot && views > 0 {
			t.Errorf("when-busy: %s: %d frozen views", whenBusy, views)
		}
	}
	views := 0
	take := takeSuspended(busyMapper{errors.New("anything else"), &views}, config.BusyReport)
	if _, err := take(t.Context(), 1, protocol.CutWish{View: true}); err == nil {
		t.Error("an error is taken for too much that changes")
	}
}
