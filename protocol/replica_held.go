package protocol

import (
	"context"
	"fmt"
)

// HoldDevice is Hold for somebody who takes a snapshot of the whole device while the image is
// held: at each moment until Release the data area is the image's epoch, flushed, under a
// superblock that says so, and nothing that the device needs lies elsewhere. Epochs go on
// being committed to the journal, up to 64 and as far as it has room; those that went
// on in the spill file wait. So do in-place epochs, and comparisons but for an epoch's, which
// are told that what waits in the journal differs.
//
// A copy of the device as it was at one moment, or as a power cut then would leave it, is a
// replica that holds the image's epoch or a later one. A copy that was read place by place while epochs came is
// not: of that the data area alone is good.
//
// One at a time: else the error is ErrHeld. A copy that strayed is no epoch: ErrStrayed.
func (r *Replica) HoldDevice(ctx context.Context) (*Image, error) {
	i := &Image{r: r}
	r.mu.Lock()
	if r.device != nil {
		r.mu.Unlock()
		return nil, fmt.Errorf("%s: %w for a snapshot", r.store.Name(), ErrHeld)
	}
	r.device = i // from here on no part of the committed comes to lie in the spill file
	r.mu.Unlock()
	err := r.hold(ctx, i, func(w *holdWaiter) (bool, error) {
		if r.sb.strayed != "" {
			return false, fmt.Errorf("%s: %w: %s", r.store.Name(), ErrStrayed, r.sb.strayed)
		}
		for _, p := range r.pending {
			if p.spill != nil && w.target < r.commits { // decided when this began
				w.target = r.commits
				r.notify()
			}
		}
		return r.applies >= w.target && !r.spilling, nil
	})
	if err != nil {
		r.letDevice(i)
		return nil, err
	}
	return i, nil
}

// letDevice ends a HoldDevice, if it was one.
func (r *Replica) letDevice(i *Image) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.device == i {
		r.device = nil
		r.notify()
	}
}

// Err is why what was read, or copied, since the image was held may be something else; nil: it is the image.
func (i *Image) Err() error {
	i.r.mu.Lock()
	defer i.r.mu.Unlock()
	return i.r.usable()
}

// deviceHeld says that a HoldDevice was granted; mu is held.
func (r *Replica) deviceHeld() bool { return r.device != nil && r.device.lineage != nil }

// heldAt is what it was granted at; mu is held.
func (r *Replica) heldAt() (at Position) {
	if r.deviceHeld() {
		at = r.device.Position()
	}
	return at
}

// mostPending is how many epochs may wait for their apply; mu is held.
func (r *Replica) mostPending() int {
	if r.deviceHeld() {
		return maxHeldEpochs
	}
	return maxPendingEpochs
}

// notSpilling ends what Commit began.
func (r *Replica) notSpilling() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.spilling {
		r.spilling = false
		r.notify()
	}
}
