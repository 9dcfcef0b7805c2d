package protocol

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	pb "google.golang.org/protobuf/proto"

	"blockferry/proto"
)

// Round is one pass over some ranges of the open epoch.
type Round struct {
	Number uint32 // never falls within an attempt; below MaxRounds
	Source io.ReaderAt
	Ranges []Range // ascending, disjoint, whole blocks
	// Narrow: compare with the replica first and send what differs. Blocks
	// that an earlier round of the attempt described are sent in any case:
	// the replica compares with the image below them.
	Narrow bool
	// Stop, when closed, ends reading early; what was not read is returned.
	Stop <-chan struct{}
	// ReadsDone is called once, after the last read of Source and mostly
	// before the last frame has left. Its error is SendRound's.
	ReadsDone func() error
	// Progress is told the bytes of Ranges done, from several goroutines.
	Progress func(bytes int64)
}

// SendRound reads, narrows, packs and sends. Everything but rest is then on its way
// to the replica, or equal there; also after an error, but for one of ReadsDone:
// then what was sent may be wrong.
func (l *Link) SendRound(ctx context.Context, r Round) (rest []Range, err error) {
	if !l.open {
		return r.Ranges, fmt.Errorf("replica %q: no epoch is open", l.cfg.Replica)
	}
	if r.Number >= MaxRounds {
		return r.Ranges, fmt.Errorf("replica %q: round %d of epoch %d, at most %d are allowed", l.cfg.Replica, r.Number, l.start.Epoch, MaxRounds)
	}
	meta := FrameMeta{Epoch: l.start.Epoch, Attempt: l.start.Attempt, Round: r.Number}
	l.roundBegins(totalBytes(r.Ranges))
	rest, err = l.pass(ctx, r, func(ctx context.Context, batch []Range, data *lent, p *packer) error {
		return l.sendBatch(ctx, r, meta, batch, data, p)
	})
	l.roundEnds(err)
	return rest, err
}

// CompareRound compares ranges of a frozen image with the replica's committed
// one and reports, in any order, what differs. Nothing is sent.
func (l *Link) CompareRound(ctx context.Context, r Round, differs func([]Range)) (rest []Range, err error) {
	if !l.narrow {
		return r.Ranges, fmt.Errorf("replica %q can't compare: upgrade it", l.cfg.Replica)
	}
	return l.pass(ctx, r, func(ctx context.Context, batch []Range, data *lent, _ *packer) error {
		d, err := l.compareBatch(ctx, batch, data.b[:totalBytes(batch)])
		if err == nil && len(d) > 0 {
			differs(d)
		}
		return err
	})
}

// packer is what one worker needs for a batch.
type packer struct {
	codec *Compressor
	out   *bundle // the next message; nil: nothing is packed
	todo  []Range // of the batch: neither sent nor known to be equal
	begun time.Time
	cost  packCost // of the batch
}

// begin is called before a batch is worked on.
func (p *packer) begin() {
	p.begun, p.cost, p.codec.given = time.Now(), packCost{}, 0
}

// drop forgets what is packed and not sent.
func (p *packer) drop() {
	if p.out != nil {
		p.out.free()
		p.out = nil
	}
}

// batchFunc is told the ranges of a batch and the buffer that holds them, one
// after another from its start.
type batchFunc func(ctx context.Context, batch []Range, data *lent, p *packer) error

// pass is one walk over a round's ranges.
type pass struct {
	r       Round
	mu      sync.Mutex
	batches *batcher
	left    []Range // of batches that failed
	reading int     // batches being read
	last    bool    // no further batch will be taken
	allRead chan struct{}
	closed  bool
}

// take is the next batch to read, nil when there is none any more.
func (p *pass) take(ctx context.Context) []Range {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-ctx.Done():
		p.last = true
	case <-p.r.Stop: // nil: never
		p.last = true
	default:
	}
	var batch []Range
	if !p.last {
		if batch = p.batches.next(); batch != nil {
			p.reading++
		}
		p.last = len(p.batches.ranges) == 0
	}
	p.check()
	return batch
}

func (p *pass) readDone() {
	p.mu.Lock()
	p.reading--
	p.check()
	p.mu.Unlock()
}

func (p *pass) end() {
	p.mu.Lock()
	p.last = true
	p.check()
	p.mu.Unlock()
}

// leave notes what a batch that failed left undone.
func (p *pass) leave(pk *packer) {
	pk.drop()
	p.mu.Lock()
	p.left = append(p.left, pk.todo...)
	p.mu.Unlock()
	pk.todo = nil
}

func (p *pass) check() {
	if p.last && p.reading == 0 && !p.closed {
		p.closed = true
		close(p.allRead)
	}
}

// pass reads batches and hands each to do, several at once. The last read does
// not wait for the last send: a frozen image costs the application something
// as long as it is held.
func (l *Link) pass(ctx context.Context, r Round, do batchFunc) (rest []Range, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p := &pass{r: r, batches: newBatcher(r.Ranges, int64(l.cfg.BatchBytes)), allRead: make(chan struct{})}
	l.count.marked.Add(uint64(totalBytes(r.Ranges)))
	var working sync.WaitGroup
	for range l.cfg.Batches {
		working.Go(func() {
			pk := <-l.packers
			defer func() { l.packers <- pk }()
			for {
				pk.begin()
				data, err := l.buffer(ctx)
				pk.cost.link = time.Since(pk.begun)
				if err != nil {
					cancel(err)
					return
				}
				batch := p.take(ctx)
				if batch == nil {
					data.release()
					return
				}
				pk.todo = batch
				err = l.read(ctx, r.Source, batch, data.b[:totalBytes(batch)])
				p.readDone()
				if err == nil {
					err = do(ctx, batch, data, pk)
				}
				data.release()
				if err != nil {
					p.leave(pk)
					cancel(err)
					return
				}
				if r.Progress != nil {
					r.Progress(totalBytes(batch))
				}
			}
		})
	}
	select {
	case <-p.allRead:
	case <-r.Stop:
	case <-ctx.Done():
	}
	p.end()
	<-p.allRead
	var doneErr error
	if r.ReadsDone != nil {
		if doneErr = r.ReadsDone(); doneErr != nil {
			cancel(doneErr)
		}
	}
	working.Wait()
	if doneErr != nil {
		return nil, doneErr
	}
	rest = uniteRanges(p.left, p.batches.ranges)
	if err = context.Cause(ctx); err != nil {
		l.count.marked.Add(-uint64(totalBytes(rest))) // named again when it is gone on with
	}
	return rest, err
}

// buffer is one to read into, once there is one.
func (l *Link) buffer(ctx context.Context) (*lent, error) {
	if _, err := wait(ctx, l, l.buffers.room); err != nil {
		return nil, err
	}
	return l.buffers.lend(), nil
}

// read fills data with the batch's ranges, one after another. Many small
// ranges are read several at once.
func (l *Link) read(ctx context.Context, src io.ReaderAt, batch []Range, data []byte) error {
	var next atomic.Int64
	var mu sync.Mutex
	var first error
	starts := make([]int64, len(batch))
	var at int64
	for i, r := range batch {
		starts[i] = at
		at += r.Length
	}
	work := func() {
		for {
			i := int(next.Add(1)) - 1
			if i >= len(batch) || ctx.Err() != nil {
				return
			}
			l.readers <- struct{}{}
			r := batch[i]
			n, err := src.ReadAt(data[starts[i]:starts[i]+r.Length], r.Offset)
			<-l.readers
			if int64(n) == r.Length {
				err = nil // io.ReaderAt may say EOF with the last byte
			} else if err == nil {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				mu.Lock()
				if first == nil {
					first = &SourceReadError{Range: r, Err: err}
				}
				mu.Unlock()
				return
			}
		}
	}
	var wg sync.WaitGroup
	for range min(len(batch), 1+l.cfg.Readers/l.cfg.Batches) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	l.count.read.Add(uint64(at))
	if first == nil {
		return ctx.Err()
	}
	return first
}

// SourceReadError says that the source, or a frozen view of it, can't be read.
type SourceReadError struct {
	Range Range
	Err   error
}

func (e *SourceReadError) Error() string {
	return fmt.Sprintf("read %d bytes of the source at %d: %v", e.Range.Length, e.Range.Offset, e.Err)
}

func (e *SourceReadError) Unwrap() error { return e.Err }

// compareBatch asks the replica which blocks of a batch differ.
func (l *Link) compareBatch(ctx context.Context, batch []Range, data []byte) ([]Range, error) {
	l.mu.Lock()
	l.lastID++
	id := l.lastID
	l.mu.Unlock()
	ask := question(l.hasher, id, batch, data)
	asked := pb.Size(ask)
	if err := l.cfg.Pace.take(ctx, asked); err != nil {
		return nil, err
	}
	l.count.check.Add(uint64(asked))
	answer := make(chan *proto.Differences, 1)
	l.mu.Lock()
	l.pending[id] = answer // from here on an answer may come
	l.mu.Unlock()
	if err := l.send(&proto.FromPrimary{Message: &proto.FromPrimary_Compare{Compare: ask}}); err != nil {
		return nil, err
	}
	d, err := wait(ctx, l, answer)
	if err != nil {
		return nil, err
	}
	l.count.check.Add(uint64(pb.Size(d)))
	out, err := resolve(l.hasher, batch, data, d)
	if err != nil {
		l.fail(err)
		l.cancel()
		return nil, l.deadErr
	}
	l.count.compared.Add(uint64(len(data)))
	return out, nil
}

func (l *Link) sendBatch(ctx context.Context, r Round, meta FrameMeta, batch []Range, in *lent, p *packer) error {
	send, data := batch, in.b[:totalBytes(batch)]
	l.mu.Lock()
	compare := r.Narrow && l.narrow && l.advisor.worthwhile(int64(len(data)))
	l.mu.Unlock()
	if compare {
		differ, err := l.compareBatch(ctx, batch, data)
		if err != nil {
			return err
		}
		l.mu.Lock()
		l.advisor.learned(int64(len(data)), totalBytes(differ))
		var again []Range
		for _, b := range batch {
			again = l.sent.within(again, b)
		}
		l.mu.Unlock()
		send = uniteRanges(differ, again)
	}
	p.todo = send
	if l.packing != nil {
		p.cost.codec = l.packing.codec()
		p.codec.use(p.cost.codec)
	}
	if totalBytes(send) < int64(len(data)/2) {
		in = nil // copied: a little must not keep a whole buffer busy
	}
	// Each range to send lies within one of the batch's.
	var at int64
	i := 0
	for _, s := range send {
		for s.Offset >= batch[i].End() {
			at += batch[i].Length
			i++
		}
		from := at + s.Offset - batch[i].Offset
		if err := l.pack(ctx, meta, s, data[from:from+s.Length], in, p); err != nil {
			return err
		}
	}
	err := l.flush(ctx, p)
	if err == nil {
		l.packed(p)
	}
	return err
}

// pack makes frames of data, which lies in a buffer if in is not nil.
func (l *Link) pack(ctx context.Context, meta FrameMeta, r Range, data []byte, in *lent, p *packer) error {
	l.mu.Lock()
	l.sent.add(r)
	l.mu.Unlock()
	l.count.sent.Add(uint64(r.Length))
	for len(data) > 0 {
		n := min(MaxDataFrameBytes, len(data))
		if p.out != nil && p.out.bytes+n+n/BlockSize*FrameHeaderBytes > MaxFramesBytes {
			if err := l.flush(ctx, p); err != nil {
				return err
			}
		}
		if p.out == nil {
			p.out = &bundle{memory: l.frames.get(), pool: l.frames, summed: l.local}
		}
		begun := time.Now()
		p.out.add(meta, r.Offset, data[:n], p.codec, in)
		if l.cfg.packs != nil {
			l.cfg.packs(p.codec.codec, n)
		}
		p.cost.pack += time.Since(begun)
		data = data[n:]
		r.Offset += int64(n)
	}
	return nil
}

// described is how much of some ranges the frames of this attempt hold.
func (l *Link) described(ranges []Range) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []Range
	for _, r := range ranges {
		out = l.sent.within(out, r)
	}
	return totalBytes(out)
}

// flush sends what is packed, as soon as the window has room for it.
func (l *Link) flush(ctx context.Context, p *packer) error {
	if p.out == nil {
		return nil
	}
	waits := time.Now()
	defer func() { p.cost.link += time.Since(waits) }()
	// Before the window: what is held back here must not look like an answer
	// that the replica owes.
	if err := l.cfg.Pace.take(ctx, p.out.bytes); err != nil {
		return err
	}
	if err := l.take(ctx, uint64(p.out.bytes)); err != nil {
		return err
	}
	l.sendMu.Lock()
	defer l.sendMu.Unlock()
	// The digest is over the frames in the order in which they leave.
	var ranges []Range
	for _, f := range p.out.frames {
		l.digest.Add(f.Header)
		ranges = appendRange(ranges, f.Range())
	}
	p.todo = subtractRanges(p.todo, ranges)
	l.mu.Lock()
	l.left += uint64(p.out.bytes)
	if l.log.stored != nil {
		l.log.add(sentMessage{l.digest.Clone(), l.left, ranges})
	}
	l.mu.Unlock()
	l.count.frames.Add(uint64(len(p.out.frames)))
	l.count.wire.Add(uint64(p.out.bytes))
	p.cost.wire += int64(p.out.bytes)
	b := p.out
	p.out = nil // the receiver's, or the codec's
	return l.sendLocked(b.message())
}

// take waits until the window has room for n bytes and takes it.
func (l *Link) take(ctx context.Context, n uint64) error {
	for {
		l.mu.Lock()
		if l.credit >= n {
			l.credit -= n
			l.mu.Unlock()
			return nil
		}
		more := l.more
		l.mu.Unlock()
		if _, err := wait(ctx, l, more); err != nil {
			return err
		}
	}
}

// compareAdvisor finds out whether comparing pays: when nearly all that was
// compared had to be sent all the same, it is left out for a while, then tried
// again.
type compareAdvisor struct {
	compared, differed int64 // bytes, recent ones
	skip               int64 // bytes still to be sent without comparing
}

const (
	adviseAfterBytes = 32 << 20
	adviseSkipBytes  = 512 << 20
)

func (a *compareAdvisor) worthwhile(n int64) bool {
	if a.skip > 0 {
		a.skip -= n
		return false
	}
	return true
}

func (a *compareAdvisor) learned(compared, differed int64) {
	a.compared += compared
	a.differed += differed
	if a.compared < adviseAfterBytes {
		return
	}
	if a.differed*10 > a.compared*9 {
		a.skip = adviseSkipBytes
	}
	a.compared, a.differed = 0, 0
}
