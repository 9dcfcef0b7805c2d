package protocol

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// checkRead says whether n bytes at an offset are whole blocks of the volume.
func (r *Replica) checkRead(n int, offset int64) error {
	if offset < 0 || offset%BlockSize != 0 || n%BlockSize != 0 || offset > r.lay.size-int64(n) {
		return fmt.Errorf("%s: read of %d bytes at volume offset %d: want whole blocks of the volume's %d bytes", r.store.Name(), n, offset, r.lay.size)
	}
	return nil
}

func (r *Replica) read(p []byte, offset int64) error {
	if _, err := r.store.ReadAt(p, r.lay.dataOffset+offset); err != nil {
		return fmt.Errorf("%s: read of %d bytes at %d: %w", r.store.Name(), len(p), r.lay.dataOffset+offset, err)
	}
	return nil
}

// ReadData reads what the open epoch's frames are laid over: the committed
// image if the replica is consistent, otherwise whatever is there, with what an
// in-place epoch has brought so far. It waits until all committed epochs are
// applied. Offset and len(p) are multiples of BlockSize.
func (r *Replica) ReadData(ctx context.Context, p []byte, offset int64) error {
	_, err := r.readData(ctx, p, offset, false)
	return err
}

// readData is ReadData. With held it does not wait for the end of a HoldDevice, but reads the
// image that is held, and returns what the epochs committed since then touch.
func (r *Replica) readData(ctx context.Context, p []byte, offset int64, held bool) (over []*touched, err error) {
	if err := r.checkRead(len(p), offset); err != nil {
		return nil, err
	}
	inPlace := false
	err = r.wait(ctx, func() (bool, error) {
		if inPlace = r.inPlace; inPlace {
			return true, nil
		}
		if r.applying || len(r.pending) > 0 && !(held && r.deviceHeld()) {
			return false, nil
		}
		for _, p := range r.pending {
			over = append(over, p.touched)
		}
		r.holds++
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	if !inPlace {
		defer r.release()
		if err := r.read(p, offset); err != nil {
			// The disk may come back as another, or without what it had cached.
			return nil, r.failed(err)
		}
		return over, nil
	}
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	if r.open != nil && r.open.pipe != nil {
		if err := r.open.pipe.drain(); err != nil {
			return nil, r.pipeFailed(err)
		}
	}
	return nil, r.read(p, offset)
}

func (r *Replica) release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.holds--
	r.notify()
}

// Image is one committed epoch of a replica, held for reading.
type Image struct {
	r       *Replica
	once    sync.Once
	lineage Lineage
	cut     int64
	mapBase uint64
}

// Hold waits until the data area holds the epoch that is now the last
// committed, and keeps the image it has then until Release: epochs can still
// be committed, but wait in the journal; when that is full, so does Append.
// Without an image the error is ErrNotConsistent.
func (r *Replica) Hold(ctx context.Context) (*Image, error) {
	i := &Image{r: r}
	if err := r.hold(ctx, i, func(*holdWaiter) (bool, error) { return true, nil }); err != nil {
		return nil, err
	}
	return i, nil
}

// hold waits for an image; ready is called with mu held when it might be granted.
func (r *Replica) hold(ctx context.Context, i *Image, ready func(*holdWaiter) (bool, error)) error {
	w := &holdWaiter{}
	r.mu.Lock()
	w.target = r.commits
	r.waiting = append(r.waiting, w)
	r.mu.Unlock()
	err := r.wait(ctx, func() (bool, error) {
		if !r.sb.tookOver.IsZero() {
			return false, fmt.Errorf("%s: %w: it took over as %v", r.store.Name(), ErrNotConsistent, r.sb.tookOver)
		}
		if r.inPlace || r.sb.state != DiskConsistent && len(r.pending) == 0 && !r.applying {
			return false, fmt.Errorf("%s: %w: %s", r.store.Name(), ErrNotConsistent, r.sb.state)
		}
		if r.applying || r.applies < w.target {
			return false, nil
		}
		if ok, err := ready(w); !ok || err != nil {
			return false, err
		}
		r.holds++
		i.lineage, i.cut, i.mapBase = r.sb.lineage.Clone(), r.sb.cutNanos, r.sb.mapBase
		return true, nil
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting = slices.DeleteFunc(r.waiting, func(o *holdWaiter) bool { return o == w })
	r.notify()
	return err
}

// Position is the epoch the image holds.
func (i *Image) Position() Position { return i.lineage.Tip() }

// Lineage is the image's; its last point is Position.
func (i *Image) Lineage() Lineage { return i.lineage.Clone() }

// SizeBytes is the volume's size.
func (i *Image) SizeBytes() int64 { return i.r.lay.size }

// CutUnixNanos is the wall clock of the image's cut, for people only.
func (i *Image) CutUnixNanos() int64 { return i.cut }

// ReadAt reads from the image; offset and len(p) are multiples of BlockSize.
func (i *Image) ReadAt(p []byte, offset int64) (int, error) {
	if err := i.r.checkRead(len(p), offset); err != nil {
		return 0, err
	}
	if err := i.r.read(p, offset); err != nil {
		return 0, err
	}
	return len(p), nil
}

// DataRanges lists, ascending and without overlap, the ranges that may hold
// anything but zeros.
func (i *Image) DataRanges() ([]Range, error) {
	return i.named(i.r.cmap.ranges(func(e mapEntry, _ uint32) bool { return !e.zeros() }))
}

// ChangedSince lists, ascending, the ranges that may have changed between an
// epoch of the image's lineage and the image. It may name too much, never too
// little; when the map doesn't reach back, the error is ErrTrackingLost.
func (i *Image) ChangedSince(epoch uint64) ([]Range, error) {
	if epoch < i.mapBase {
		return nil, fmt.Errorf("%s: %w: the change map reaches back to epoch %d, not to %d", i.r.store.Name(), ErrTrackingLost, i.mapBase, epoch)
	}
	return i.named(i.r.cmap.changedSince(epoch))
}

func (i *Image) named(out []Range, damaged []string, err error) ([]Range, error) {
	i.r.warn(damaged)
	return out, err
}

// Release lets the image go. It may be called more than once; the image must
// not be used afterwards.
func (i *Image) Release() {
	i.once.Do(func() {
		i.r.letDevice(i)
		i.r.release()
	})
}
