package protocol

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"blockferry/proto"
)

// MaxFramesBytes is how much one Frames message holds, MaxDataFrameBytes of
// data and their headers; a window is at least this large.
const MaxFramesBytes = MaxDataFrameBytes + MaxDataFrameBytes/BlockSize*FrameHeaderBytes

// ErrLinkSilent says that a replica answered nothing for too long.
var ErrLinkSilent = errors.New("the replica does not answer")

// LocalBatchBytes and LocalWindowBytes suit a replica of the same process: no
// answer is waited for long, and what is small stays in the CPU's cache.
const (
	LocalBatchBytes  = 1 << 20
	LocalWindowBytes = 8 << 20
)

// LinkConfig says whom a Link feeds and how. Zero values mean the defaults.
type LinkConfig struct {
	Volume     string // name, for messages
	VolumeUUID [16]byte
	SizeBytes  int64
	Replica    string
	Codec      Codec
	Adapt      bool // begins with Codec and goes on with what suits link and processor

	BatchBytes    int           // read, compared and packed as one; a multiple of UnitSize up to MaxCompareBytes; 0: 4 MiB
	Batches       int           // worked on at once; 0: 4
	Readers       int           // reads at once over all batches; 0: 16
	AnswerTimeout time.Duration // the replica must say something while it is waited for; 0: 2 min
	Pace          *Pace         // of what is sent: frames, and questions of comparisons; nil: none

	// Packing is told, with Adapt, what data is packed with from now on, and why;
	// from several goroutines. It must not block. nil: nobody is.
	Packing func(now Codec, why string)

	packs func(c Codec, bytes int) // of tests: called as a part of packing
}

// buffersPerBatch is how many buffers there are for each batch worked on: one
// to read into, the others still being written to the wire or to the replica.
const buffersPerBatch = 3

func (c LinkConfig) withDefaults() LinkConfig {
	if c.BatchBytes <= 0 {
		c.BatchBytes = 4 << 20
	}
	c.BatchBytes = int(min(MaxCompareBytes, roundUp(int64(c.BatchBytes), UnitSize)))
	if c.Batches <= 0 {
		c.Batches = 4
	}
	if c.Readers <= 0 {
		c.Readers = 16
	}
	if c.AnswerTimeout <= 0 {
		c.AnswerTimeout = 2 * time.Minute
	}
	return c
}

// LinkStats counts since the link was connected; bytes of the volume unless
// said otherwise.
type LinkStats struct {
	MarkedBytes   uint64 `json:"marked-bytes"`   // named as changed
	ReadBytes     uint64 `json:"read-bytes"`     // read from the source
	ComparedBytes uint64 `json:"compared-bytes"` // compared by checksums
	SentBytes     uint64 `json:"sent-bytes"`     // described by frames, zeros included
	WireBytes     uint64 `json:"wire-bytes"`     // of frames on the wire, packed
	CheckBytes    uint64 `json:"check-bytes"`    // of comparisons on the wire, questions and answers
	Frames        uint64 `json:"frames"`
}

func (s LinkStats) sub(o LinkStats) LinkStats {
	return LinkStats{s.MarkedBytes - o.MarkedBytes, s.ReadBytes - o.ReadBytes, s.ComparedBytes - o.ComparedBytes,
		s.SentBytes - o.SentBytes, s.WireBytes - o.WireBytes, s.CheckBytes - o.CheckBytes, s.Frames - o.Frames}
}

type linkCounters struct{ marked, read, compared, sent, wire, check, frames atomic.Uint64 }

// Link is one replica's session, seen from the primary. One goroutine at a
// time calls its methods, but Stats, Welcome, Applied and Close. Its memory is
// at most 3 buffers of BatchBytes for each of Batches, and as much as the
// replica's window for what is packed.
type Link struct {
	cfg     LinkConfig
	welcome *proto.Welcome
	lineage Lineage // the replica's at the handshake
	hasher  *Hasher
	narrow  bool // the replica can compare

	stream  proto.Replication_ReplicateClient
	cancel  context.CancelFunc
	readers chan struct{}
	buffers *buffers // what is read into, BatchBytes each: all the memory of data there is
	packers chan *packer
	packing *packing // nil: Codec it is
	frames  *framePool
	local   bool // the replica is of this process

	done    chan struct{} // closed when the reader has ended
	dead    chan struct{} // closed when the session ended
	deadErr error         // why; set before dead is closed
	deadOne sync.Once

	answers chan *proto.FromReplica // Begun, Committed, Aborted, Changes
	heard   atomic.Int64            // messages received: the sign of life
	silence silence

	mu       sync.Mutex
	credit   uint64
	more     chan struct{} // closed and replaced when credit grows
	pending  map[uint64]chan *proto.Differences
	lastID   uint64
	applied  uint64
	freeRoom uint64
	advisor  compareAdvisor
	sent     blockSet // blocks that frames of this attempt describe
	log      sentLog  // of the open epoch, if it may be resumed
	left     uint64   // frame bytes that left
	granted  uint64   // of these are stored

	sendMu  sync.Mutex
	digest  *StreamDigest
	start   EpochStart
	attempt uint32
	open    bool
	// overwrite: Begin allowed unrelated history to be overwritten
	overwrite bool

	count linkCounters
}

// Connect makes the handshake. client may be a LocalClient, or one over a Unix
// socket or TLS, whose connection stays the caller's. A refusal is a
// *RefusedError.
func Connect(ctx context.Context, client proto.ReplicationClient, cfg LinkConfig, primary Lineage) (*Link, error) {
	cfg = cfg.withDefaults()
	key := make([]byte, HashKeyBytes)
	if _, err := rand.Read(key); err != nil {
		return nil, err
	}
	hasher, err := NewHasher(key)
	if err != nil {
		return nil, err
	}
	// The stream outlives ctx, which is for the handshake alone.
	streamCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l := &Link{
		cfg: cfg, hasher: hasher, cancel: cancel,
		readers: make(chan struct{}, cfg.Readers), packers: make(chan *packer, cfg.Batches),
		done: make(chan struct{}), dead: make(chan struct{}), answers: make(chan *proto.FromReplica, 4),
		more: make(chan struct{}), pending: map[uint64]chan *proto.Differences{},
	}
	l.frames = &framePool{}
	var options []grpc.CallOption
	if c, ok := client.(localClient); ok {
		l.frames, l.local = &c.receiver.frames, true
	} else {
		options = append(options, grpc.ForceCodecV2(frameCodec{}))
	}
	l.buffers = newBuffers(buffersPerBatch*cfg.Batches, cfg.BatchBytes)
	stop := context.AfterFunc(ctx, cancel)
	fail := func(err error) (*Link, error) {
		stop()
		cancel()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fmt.Errorf("replica %q: %w", cfg.Replica, err)
	}
	if l.stream, err = client.Replicate(streamCtx, options...); err != nil {
		return fail(err)
	}
	// An error of Send is told by Recv.
	_ = l.stream.Send(&proto.FromPrimary{Message: &proto.FromPrimary_Hello{Hello: &proto.Hello{
		Version: ProtocolVersion, MinVersion: MinProtocolVersion, Features: Features(),
		Volume: cfg.Volume, VolumeUuid: cfg.VolumeUUID[:], SizeBytes: uint64(cfg.SizeBytes),
		Replica: cfg.Replica, HashKey: key, Lineage: primary.Proto(),
	}}})
	m, err := l.stream.Recv()
	if err != nil {
		return fail(err)
	}
	if r := m.GetRefused(); r != nil {
		return fail(refusedFromProto(r))
	}
	if l.welcome = m.GetWelcome(); l.welcome == nil {
		return fail(errors.New("it did not answer the Hello with a Welcome"))
	}
	if v := l.welcome.Version; v < MinProtocolVersion || v > ProtocolVersion {
		return fail(fmt.Errorf("it chose protocol version %d, this node speaks %d to %d", v, MinProtocolVersion, ProtocolVersion))
	}
	if l.lineage, err = LineageFromProto(l.welcome.Lineage); err != nil {
		return fail(err)
	}
	if l.welcome.WindowBytes < MaxFramesBytes {
		return fail(fmt.Errorf("its window of %d bytes is smaller than a message", l.welcome.WindowBytes))
	}
	codec := cfg.Codec
	if codec != CodecNone && !slices.Contains(l.welcome.Features, codec.String()) {
		codec = CodecNone
	}
	if cfg.Adapt {
		l.packing = newPacking(codec, l.welcome.Features)
		codec = l.packing.strongest() // one that can do the others, too
	}
	for range cfg.Batches {
		p, err := NewCompressor(codec)
		if err != nil {
			return fail(err)
		}
		l.packers <- &packer{codec: p}
	}
	l.narrow = slices.Contains(l.welcome.Features, FeatureCompare)
	l.credit, l.freeRoom = l.welcome.WindowBytes, l.welcome.JournalFreeBytes
	if !stop() {
		return fail(ctx.Err())
	}
	go l.receive()
	return l, nil
}

// Lineage is the replica's, as it stood at the handshake.
func (l *Link) Lineage() Lineage { return l.lineage.Clone() }

// Disk is the state of the replica's data at the handshake; needsFull says that
// its content is not what it last committed.
func (l *Link) Disk() (state DiskState, needsFull bool) {
	return DiskState(l.welcome.DiskState), l.welcome.NeedsFull
}

// JournalFreeBytes is the room the replica last said it has for one epoch.
func (l *Link) JournalFreeBytes() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.freeRoom
}

// Applied is the newest epoch the replica said its data area holds, 0 for none.
func (l *Link) Applied() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.applied
}

// Stats is a snapshot of the counters.
func (l *Link) Stats() LinkStats {
	c := &l.count
	return LinkStats{c.marked.Load(), c.read.Load(), c.compared.Load(), c.sent.Load(), c.wire.Load(), c.check.Load(), c.frames.Load()}
}

// Dead is closed when the session has ended; Err then says why.
func (l *Link) Dead() <-chan struct{} { return l.dead }

// Err is why the session ended, nil while it lives.
func (l *Link) Err() error {
	select {
	case <-l.dead:
		return l.deadErr
	default:
		return nil
	}
}

// anyStored says whether anything that was sent is stored at the replica.
func (l *Link) anyStored() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.granted > 0
}

// Close ends the session and waits for its goroutine. An epoch that is open
// did not happen, but another session may go on with it.
func (l *Link) Close() {
	l.fail(errors.New("closed by this node"))
	l.cancel()
	<-l.done
}

func (l *Link) fail(err error) {
	l.deadOne.Do(func() {
		l.deadErr = fmt.Errorf("replica %q: %w", l.cfg.Replica, err)
		close(l.dead)
	})
}

func (l *Link) receive() {
	defer close(l.done)
	defer l.cancel()
	for {
		m, err := l.stream.Recv()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("it ended the session")
			}
			l.fail(err)
			return
		}
		l.heard.Add(1)
		l.silence.heard()
		if err := l.dispatch(m); err != nil {
			l.fail(err)
			return
		}
	}
}

func (l *Link) dispatch(m *proto.FromReplica) error {
	switch {
	case m.GetRefused() != nil:
		return refusedFromProto(m.GetRefused())
	case m.GetWindow() != nil:
		return l.window(m.GetWindow().Bytes)
	case m.GetDifferences() != nil:
		l.mu.Lock()
		defer l.mu.Unlock()
		d := m.GetDifferences()
		c := l.pending[d.Id]
		if c == nil {
			return fmt.Errorf("it answered comparison %d, which nobody asked", d.Id)
		}
		delete(l.pending, d.Id)
		c <- d // has room for one
	case m.GetApplied() != nil:
		l.mu.Lock()
		defer l.mu.Unlock()
		l.applied, l.freeRoom = m.GetApplied().Epoch, m.GetApplied().JournalFreeBytes
	case m.GetBegun() != nil, m.GetCommitted() != nil, m.GetAborted() != nil, m.GetChanges() != nil:
		if c := m.GetCommitted(); c != nil {
			l.mu.Lock()
			l.freeRoom = c.JournalFreeBytes
			l.mu.Unlock()
		}
		if m.GetCommitted() != nil || m.GetAborted() != nil {
			l.allStored()
		}
		select {
		case l.answers <- m:
		default:
			return errors.New("it answers what was not asked")
		}
	default:
		return errors.New("an unknown message came; the replica may be newer than this node")
	}
	return nil
}

// window takes what the replica has stored, and grants anew.
func (l *Link) window(bytes uint64) error {
	l.mu.Lock()
	l.credit += bytes
	l.granted += bytes
	l.log.granted(l.granted)
	if l.credit > l.welcome.WindowBytes {
		l.mu.Unlock()
		return fmt.Errorf("it granted more than its window of %d bytes", l.welcome.WindowBytes)
	}
	close(l.more)
	l.more = make(chan struct{})
	all := l.granted == l.left
	l.mu.Unlock()
	if all {
		l.allStored()
	}
	return nil
}

// send passes one message on. What went wrong is told by the reader.
func (l *Link) send(m *proto.FromPrimary) error {
	l.sendMu.Lock()
	defer l.sendMu.Unlock()
	return l.sendLocked(m)
}

func (l *Link) sendLocked(m *proto.FromPrimary) error {
	if err := l.Err(); err != nil {
		return err
	}
	if err := l.stream.Send(m); err != nil {
		<-l.dead
		return l.deadErr
	}
	return nil
}

// wait returns when c has something, the session or ctx ends, or the replica
// has said nothing at all for the answer timeout.
func wait[T any](ctx context.Context, l *Link, c <-chan T) (T, error) {
	var none T
	select {
	case v := <-c:
		return v, l.Err()
	default:
	}
	l.silence.wait(1)
	defer l.silence.wait(-1)
	heard := l.heard.Load()
	t := time.NewTicker(l.cfg.AnswerTimeout)
	defer t.Stop()
	for {
		select {
		case v := <-c:
			return v, nil
		case <-l.dead:
			return none, l.deadErr
		case <-ctx.Done():
			return none, ctx.Err()
		case <-t.C:
			now := l.heard.Load()
			if now == heard {
				l.fail(fmt.Errorf("%w: nothing came for %v", ErrLinkSilent, l.cfg.AnswerTimeout))
				l.cancel()
				return none, l.deadErr
			}
			heard = now
		}
	}
}

// Silent is for how long the replica has been waited for without any word from
// it, 0 while nothing is wanted of it.
func (l *Link) Silent() time.Duration { return l.silence.lasts() }

// silence measures how long nothing was heard while somebody waited.
type silence struct {
	mu      sync.Mutex
	waiting int
	since   time.Time
}

func (s *silence) wait(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting == 0 {
		s.since = time.Now()
	}
	s.waiting += n
}

func (s *silence) heard() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting > 0 { // else the next wait sets it; asking for the time is not free everywhere
		s.since = time.Now()
	}
}

func (s *silence) lasts() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting == 0 {
		return 0
	}
	return time.Since(s.since)
}

// Begin opens an epoch at the replica. The attempt is counted here.
func (l *Link) Begin(ctx context.Context, s EpochStart, overwriteUnrelated bool) error {
	if l.open {
		return fmt.Errorf("replica %q: epoch %d is open", l.cfg.Replica, l.start.Epoch)
	}
	l.attempt++
	s.Attempt, s.Token = l.attempt, l.newToken(s)
	log := sentLog{}
	if s.Token != (token{}) {
		log.stored = NewStreamDigest()
	}
	l.mu.Lock()
	l.sent, l.log = blockSet{}, log
	l.mu.Unlock()
	l.start, l.overwrite, l.digest = s, overwriteUnrelated, NewStreamDigest()
	return l.begin(ctx, false)
}

// begin announces l.start.
func (l *Link) begin(ctx context.Context, resume bool) error {
	s := l.start
	mode := proto.Mode_MODE_JOURNAL
	if s.Mode == ModeInPlace {
		mode = proto.Mode_MODE_IN_PLACE
	}
	begin := &proto.Begin{
		Epoch: s.Epoch, Attempt: s.Attempt, Mode: mode, Lineage: s.Lineage.Proto(), CutUnixNanos: s.CutUnixNanos,
		Full: s.Full, OverwriteUnrelated: l.overwrite, Resume: resume,
	}
	if s.Token != (token{}) {
		begin.Token = s.Token[:]
	}
	if !s.Discard.IsZero() {
		begin.Discard = s.Discard.proto()
	}
	err := l.send(&proto.FromPrimary{Message: &proto.FromPrimary_Begin{Begin: begin}})
	if err != nil {
		return err
	}
	m, err := wait(ctx, l, l.answers)
	if err != nil {
		return err
	}
	if b := m.GetBegun(); b == nil || b.Epoch != s.Epoch || b.Attempt != s.Attempt {
		return l.confused("Begin", m)
	}
	l.open = true
	return nil
}

// Commit decides the open epoch for a lineage whose tip is the last cut. When
// it returns nil the replica holds that cut, durably.
func (l *Link) Commit(ctx context.Context, lineage Lineage, cutUnixNanos int64) error {
	if !l.open {
		return fmt.Errorf("replica %q: no epoch is open", l.cfg.Replica)
	}
	sum := l.digest.Sum()
	err := l.send(&proto.FromPrimary{Message: &proto.FromPrimary_Commit{Commit: &proto.Commit{
		Epoch: l.start.Epoch, Attempt: l.start.Attempt, Lineage: lineage.Proto(), CutUnixNanos: cutUnixNanos,
		Streams: []*proto.StreamSum{{Frames: sum.Frames, Digest: sum.Digest[:]}},
	}}})
	if err != nil {
		return err
	}
	m, err := wait(ctx, l, l.answers)
	if err != nil {
		return err
	}
	if c := m.GetCommitted(); c == nil || c.Epoch != lineage.Tip().Epoch {
		return l.confused("Commit", m)
	}
	l.open = false
	return nil
}

// Abort drops the open epoch, if there is one.
func (l *Link) Abort(ctx context.Context, reason string) error {
	if !l.open {
		return nil
	}
	err := l.send(&proto.FromPrimary{Message: &proto.FromPrimary_Abort{Abort: &proto.Abort{
		Epoch: l.start.Epoch, Attempt: l.start.Attempt, Reason: reason,
	}}})
	if err != nil {
		return err
	}
	m, err := wait(ctx, l, l.answers)
	if err != nil {
		return err
	}
	if a := m.GetAborted(); a == nil || a.Epoch != l.start.Epoch || a.Attempt != l.start.Attempt {
		return l.confused("Abort", m)
	}
	l.open = false
	return nil
}

func (l *Link) confused(asked string, m *proto.FromReplica) error {
	l.fail(fmt.Errorf("it answered %s with %T", asked, m.GetMessage()))
	l.cancel()
	return l.deadErr
}
