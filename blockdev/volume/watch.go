package volume

import (
	"crypto/sha256"
	"fmt"

	"blockferry/blockdev"
	"blockferry/blockdev/era"
)

const (
	// watchBytes is the length of a watched place; the volume's last may be shorter.
	watchBytes   = 64 << 10
	watchedBytes = 8 + sha256.Size // of one in the label
	maxWatched   = 32
)

// Watch is what a volume held at a cut in places that any mount rewrites. The
// kernel marks only what is written by way of the volume: when its disk is
// written past it, while it is down, a place changes without a mark.
type Watch struct {
	Cut    uint64
	Places []WatchedPlace // ascending
}

// WatchedPlace is a stretch of the volume of 64 KiB, or up to its end.
type WatchedPlace struct {
	Offset int64 // in the volume
	Digest [sha256.Size]byte
}

func (w WatchedPlace) extent(size int64) blockdev.Extent {
	return blockdev.Extent{Offset: w.Offset, Length: min(watchBytes, size-w.Offset)}
}

func (w Watch) check(size int64) error {
	end := int64(0)
	for _, p := range w.Places {
		if p.Offset < end || p.Offset%watchBytes != 0 || p.Offset >= size {
			return fmt.Errorf("a watched place at %d", p.Offset)
		}
		end = p.Offset + watchBytes
	}
	return nil
}

// watchOffsets are the places to watch: the first MiB, where nearly every file
// system has its superblock, the last place, and the starts of xfs's other
// allocation groups.
func watchOffsets(size int64) (out []int64) {
	add := func(at int64) {
		if at = at / watchBytes * watchBytes; at >= 0 && at < size && (len(out) == 0 || at > out[len(out)-1]) {
			out = append(out, at)
		}
	}
	for at := int64(0); at < 1<<20; at += watchBytes {
		add(at)
	}
	for i := range int64(3) {
		add(size / 4 * (i + 1))
	}
	add(size - 1)
	return out
}

// Remember keeps in the label what the volume holds now in the places that any
// mount rewrites, as that of a cut since which nothing was written.
func (o *Offline) Remember(cut uint64) error {
	w := Watch{Cut: cut}
	for _, at := range watchOffsets(o.Size()) {
		p := WatchedPlace{Offset: at}
		var err error
		if p.Digest, err = o.digest(p.extent(o.Size())); err != nil {
			return err
		}
		w.Places = append(w.Places, p)
	}
	return o.change(func(l *Label) { l.Watch = w })
}

func (o *Offline) digest(e blockdev.Extent) ([sha256.Size]byte, error) {
	b := blockdev.AlignedBuffer(int(e.Length))
	if _, err := o.ReadAt(b, e.Offset); err != nil {
		return [sha256.Size]byte{}, err
	}
	return sha256.Sum256(b), nil
}

// ChangedOutside says, in words, that the disk was written past the volume:
// a place is not what Remember found there, and the kernel's marks since that cut
// do not name it. "" when no such place was found, or nothing was remembered. metaDevice
// is where the marks are when not on the disk; when they can't be read, any
// place that differs counts.
func (o *Offline) ChangedOutside(metaDevice string) (string, error) {
	w := o.label.Watch
	from, known := o.label.Cuts.Since(w.Cut)
	if len(w.Places) == 0 || !known {
		return "", nil
	}
	marked, err := o.markedSince(from, metaDevice)
	unmarked := "nothing was written there by way of the volume"
	if err != nil {
		unmarked = fmt.Sprintf("whether that was written by way of the volume is not known (%v)", err)
	}
	for _, p := range w.Places {
		e := p.extent(o.Size())
		if len(blockdev.Intersect([]blockdev.Extent{e}, marked)) > 0 {
			continue
		}
		now, err := o.digest(e)
		if err != nil {
			return "", err
		}
		if now != p.Digest {
			return fmt.Sprintf("%s was written past its volume: %d bytes at %d of the volume (%d of the disk) are not what cut %d left there, and %s",
				o.Name(), e.Length, e.Offset, o.label.Areas.Data.Offset+e.Offset, w.Cut, unmarked), nil
		}
	}
	return "", nil
}

// ForgetCuts drops the table of cuts, and what was remembered: every question
// about an earlier cut is answered by ErrTrackingLost. Durable on return.
func (o *Offline) ForgetCuts() error {
	return o.change(func(l *Label) { l.Cuts, l.Watch = nil, Watch{} })
}

// markedSince is what the kernel's marks name since an era.
func (o *Offline) markedSince(from uint32, metaDevice string) (_ []blockdev.Extent, err error) {
	meta := o.disk
	if o.label.MetaElsewhere {
		f, err := blockdev.OpenFile(metaDevice, blockdev.OpenOptions{Exclusive: true})
		if err != nil {
			return nil, err
		}
		defer f.Close()
		meta = f
	}
	at := o.label.Areas.Meta.Offset
	id, err := readAux(meta, at)
	if err == nil && (id.volume != o.label.UUID || id.era != o.label.EraID) {
		err = errNoAux
	}
	if err != nil {
		return nil, err
	}
	marks, err := era.ChangedInactive(section{meta, at + auxIDBytes}, from)
	return blockdev.Clip(o.label.marked(marks), o.Size()), err
}
