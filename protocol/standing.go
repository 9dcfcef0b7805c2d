package protocol

import (
	"context"
	"errors"
	"fmt"
)

// ErrWaitIsVain says that a replica is not brought up to date by waiting.
var ErrWaitIsVain = errors.New("waiting does not help")

// Drain is SyncNow that ends at once, with ErrWaitIsVain, when a replica that lacks the
// cut is paused, or refused for what only the operator changes; those are tried once
// more before, as that may have changed since. With others it ends only when no other
// replica lacks the cut.
func (p *Primary) Drain(ctx context.Context, others bool) (epoch uint64, committed []string, err error) {
	before := map[*replicaWorker]uint64{}
	p.mu.Lock()
	for _, w := range p.workers {
		before[w] = w.begun
		w.retryNow = true
	}
	p.notify()
	p.mu.Unlock()
	return p.syncNow(ctx, others, func(w *replicaWorker) bool { return w.paused || w.lasting > before[w] })
}

// syncNow gives up when a replica lacks the cut that vain, called under mu, says of that
// it does not get it; with others when all that lack it do not.
func (p *Primary) syncNow(ctx context.Context, others bool, vain func(*replicaWorker) bool) (epoch uint64, committed []string, err error) {
	p.mu.Lock()
	if p.stopping {
		p.mu.Unlock()
		return 0, nil, ErrStopped
	}
	epoch = p.newest()
	p.syncTo = max(p.syncTo, epoch)
	p.mu.Unlock()
	p.wake()
	var missing []string
	gaveUp := false
	err = p.waitFor(ctx, func() bool {
		committed, missing = nil, nil
		hopeless := 0
		for _, w := range p.workers {
			if w.holds >= epoch {
				committed = append(committed, w.cfg.Name)
				continue
			}
			missing = append(missing, fmt.Sprintf("%s (%s)", w.cfg.Name, w.whyBehind()))
			if vain(w) {
				hopeless++
			}
		}
		gaveUp = hopeless > 0 && (!others || hopeless == len(missing))
		return gaveUp || len(missing) == 0
	})
	if err == nil && gaveUp {
		err = ErrWaitIsVain
	}
	if err != nil {
		err = fmt.Errorf("volume %q: epoch %d is not yet at %v: %w", p.cfg.Volume, epoch, missing, err)
	}
	return epoch, committed, err
}

// Behind lists the replicas that do not hold the primary's last cut, by name.
func (p *Primary) Behind() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var behind []string
	for _, w := range p.workers {
		if w.holds != p.state.Lineage.Tip().Epoch {
			behind = append(behind, w.cfg.Name)
		}
	}
	return behind
}

// Superseded says whether a primary's copy was left behind by another: that went
// on from what the copy holds, or took over from it while it went on as before. Of two
// that both took over from a third neither is, nor of two where one took over and the
// other began anew in a generation of its own: whether one serves decides there.
func Superseded(mine, other Lineage) bool {
	switch rel := Compare(mine, other); rel.Kind {
	case Behind:
		return true
	case Diverged:
		return wentOn(mine, rel.Common) && !wentOn(other, rel.Common)
	}
	return false
}
