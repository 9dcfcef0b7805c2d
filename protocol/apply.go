package protocol

import (
	"crypto/sha256"
	"fmt"
	"sync"
)

// A writePipe holds applyInFlight+1 buffers of applyRunBytes.
const (
	applyWorkers  = 4
	applyInFlight = 6
	applyRunBytes = 5 << 18  // contiguous frames are written together up to this
	applyFill     = 64 << 10 // zero frames up to this are written as zeros to keep a run going
)

// writePipe lays frames over a volume's data area: it unpacks them, joins
// contiguous ones, and writes in a few goroutines. Where frames overlap the
// later put wins. put, drain and close are for one goroutine.
type writePipe struct {
	store Store
	base  int64 // of the volume in the store
	dec   *Decompressor
	runs  *sync.Pool // of *[]byte, applyRunBytes each
	jobs  chan *applyRun
	wg    sync.WaitGroup
	run   *applyRun

	mu       sync.Mutex
	changed  sync.Cond
	inFlight []*applyRun
	err      error
}

// applyRun is contiguous frames: zeros, a copy of what they hold, or memory of
// somebody else's that holds just that.
type applyRun struct {
	Range
	buf  *[]byte // a copy of what the range holds, or nil
	raw  []byte  // what the range holds, as it lies in data; or nil
	data *lent   // held for as long as it is read
}

// done gives the run's memory back.
func (r *applyRun) done(runs *sync.Pool) {
	if r.buf != nil {
		runs.Put(r.buf)
	}
	r.data.release()
	r.buf, r.raw, r.data = nil, nil, nil
}

// newRunPool is the memory that pipes and segment writers share, one after
// another; a run holds any segment. Fresh memory costs a page fault for each
// 4 KiB.
func newRunPool() *sync.Pool {
	return &sync.Pool{New: func() any { b := make([]byte, applyRunBytes); return &b }}
}

func newWritePipe(store Store, base int64, dec *Decompressor, runs *sync.Pool) *writePipe {
	p := &writePipe{store: store, base: base, dec: dec, runs: runs, jobs: make(chan *applyRun, applyInFlight)}
	p.changed.L = &p.mu
	for range applyWorkers {
		p.wg.Go(p.work)
	}
	return p
}

// put takes a frame. Its memory is the caller's again when put returns, but
// for a raw payload that lies in data, which the pipe then holds until it is
// written. The error is the first any frame met.
func (p *writePipe) put(f Frame, data *lent) error {
	if r := p.run; r != nil && r.End() == f.Offset && p.fits(r, f, data) {
		return p.extend(r, f)
	}
	if err := p.submit(); err != nil {
		return err
	}
	p.run = &applyRun{Range: Range{f.Offset, 0}}
	if data != nil && f.Kind == FrameData && f.Codec == CodecNone {
		p.run.data = data.hold()
	}
	return p.extend(p.run, f)
}

// fits says whether a frame at a run's end can be written with it.
func (p *writePipe) fits(r *applyRun, f Frame, data *lent) bool {
	isData, small, joined := f.Kind == FrameData, f.Length <= applyFill, r.Length+f.Length
	switch {
	case r.data != nil && isData:
		return r.data == data && f.Codec == CodecNone && follows(r.raw, f.Payload)
	case r.data != nil: // zeros that lie there too
		n := int(r.Length)
		return small && cap(r.raw)-n >= int(f.Length) && allZero(r.raw[n:joined])
	case isData && data != nil && f.Codec == CodecNone:
		return false
	case r.buf == nil && !isData:
		return true
	}
	return joined <= applyRunBytes && (isData || small) && (r.buf != nil || r.Length <= applyFill)
}

// follows says whether b begins right behind a, in the same piece of memory.
func follows(a, b []byte) bool {
	return len(b) > 0 && cap(a)-len(a) >= len(b) && &a[:len(a)+1][len(a)] == &b[0]
}

// extend adds a frame at a run's end.
func (p *writePipe) extend(r *applyRun, f Frame) error {
	isData := f.Kind == FrameData
	if r.data != nil {
		if r.raw == nil {
			r.raw = f.Payload[:0]
		}
		r.Length += f.Length
		r.raw = r.raw[:r.Length]
		return nil
	}
	if isData && r.buf == nil {
		r.buf = p.runs.Get().(*[]byte)
		clear((*r.buf)[:r.Length])
	}
	if r.buf != nil {
		to := (*r.buf)[r.Length : r.Length+f.Length]
		if !isData {
			clear(to)
		} else if err := p.dec.Decode(to, f); err != nil {
			return err
		}
	}
	r.Length += f.Length
	return nil
}

// letGo submits what is being collected if it lies in somebody else's memory.
func (p *writePipe) letGo() error {
	if p.run == nil || p.run.data == nil {
		return nil
	}
	return p.submit()
}

// submit hands the run being collected to the workers, after whatever it
// overlaps.
func (p *writePipe) submit() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.run
	if r == nil || p.err != nil {
		return p.err
	}
	for len(p.inFlight) >= applyInFlight || p.overlaps(r) {
		p.changed.Wait()
	}
	if p.err != nil {
		return p.err
	}
	p.inFlight = append(p.inFlight, r)
	p.run = nil
	p.jobs <- r // has room for all that may be in flight
	return nil
}

func (p *writePipe) overlaps(r *applyRun) bool {
	for _, o := range p.inFlight {
		if o.Offset < r.End() && r.Offset < o.End() {
			return true
		}
	}
	return false
}

// drain returns when everything put was written (not flushed).
func (p *writePipe) drain() error {
	err := p.submit()
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.inFlight) > 0 {
		p.changed.Wait()
	}
	if p.err != nil {
		return p.err
	}
	return err
}

// close ends the goroutines; what is still being collected is dropped.
func (p *writePipe) close() {
	close(p.jobs)
	p.wg.Wait()
	if p.run != nil {
		p.run.done(p.runs)
		p.run = nil
	}
}

func (p *writePipe) work() {
	for r := range p.jobs {
		err := p.write(r)
		r.done(p.runs)
		p.mu.Lock()
		if err != nil && p.err == nil {
			p.err = err
		}
		for i, o := range p.inFlight {
			if o == r {
				p.inFlight = append(p.inFlight[:i], p.inFlight[i+1:]...)
				break
			}
		}
		p.changed.Broadcast()
		p.mu.Unlock()
	}
}

func (p *writePipe) write(r *applyRun) error {
	at, b := p.base+r.Offset, r.raw
	if r.buf != nil {
		b = (*r.buf)[:r.Length]
	}
	if b == nil {
		if err := p.store.ZeroOut(at, r.Length); err != nil {
			return fmt.Errorf("%s: zeros for %d bytes at %d: %w", p.store.Name(), r.Length, at, err)
		}
		return nil
	}
	if _, err := p.store.WriteAt(b, at); err != nil {
		return fmt.Errorf("%s: %d bytes at %d: %w", p.store.Name(), r.Length, at, err)
	}
	return nil
}

// maxWatchedBytes is the longest watched place.
const maxWatchedBytes = ChunkBytes

// watchedPlace is a stretch of the volume that any mount rewrites, with the
// digest of what it held after the last apply.
type watchedPlace struct {
	offset, length int64
	digest         [sha256.Size]byte
}

// watchPlaces picks what to watch: the first MiB, where nearly every file
// system has its superblock, the last chunk, and those where xfs by default
// keeps those of its allocation groups.
func watchPlaces(sizeBytes int64) (out []watchedPlace) {
	const last = maxWatched - 1
	var end int64
	for i := range int64(maxWatched) {
		offset := i * ChunkBytes
		if i >= 4 {
			offset = sizeBytes / 4 * (i - 3) / ChunkBytes * ChunkBytes
		}
		if i == last {
			offset = (sizeBytes - 1) / ChunkBytes * ChunkBytes
		}
		if offset < end || offset >= sizeBytes {
			continue
		}
		end = min(offset+ChunkBytes, sizeBytes)
		out = append(out, watchedPlace{offset: offset, length: end - offset})
	}
	return out
}

// watch returns the digests of the watched places; those in old that did not
// change are taken as they are.
func watch(store Store, l layout, old []watchedPlace, changed func(Range) bool) ([]watchedPlace, error) {
	places := watchPlaces(l.size)
	buf := make([]byte, maxWatchedBytes)
	for i := range places {
		w := &places[i]
		if len(old) == len(places) && !changed(Range{w.offset, w.length}) {
			*w = old[i]
			continue
		}
		if err := w.read(store, l, buf); err != nil {
			return nil, err
		}
	}
	return places, nil
}

func (w *watchedPlace) read(store Store, l layout, buf []byte) error {
	if _, err := store.ReadAt(buf[:w.length], l.dataOffset+w.offset); err != nil {
		return fmt.Errorf("%s: watched place at %d: %w", store.Name(), l.dataOffset+w.offset, err)
	}
	w.digest = sha256.Sum256(buf[:w.length])
	return nil
}

// changedOutside reads the watched places again and names the first that
// differs; "" when none does. Places that t touches are left out: they are
// being rewritten by an apply that a crash cut short.
func changedOutside(store Store, l layout, watched []watchedPlace, t *touched) (string, error) {
	buf := make([]byte, maxWatchedBytes)
	for _, w := range watched {
		if t != nil && t.has(Range{w.offset, w.length}) {
			continue
		}
		now := w
		if err := now.read(store, l, buf); err != nil {
			return "", err
		}
		if now.digest != w.digest {
			return fmt.Sprintf("%d bytes at volume offset %d are not what the last apply left there", w.length, w.offset), nil
		}
	}
	return "", nil
}
