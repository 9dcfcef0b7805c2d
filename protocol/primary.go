package protocol

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"blockferry/proto"
)

// StateStore keeps the primary's SourceState, encoded, where it survives. A
// Save that returned nil is durable; after one that failed either state may be
// there.
type StateStore interface {
	Load() ([]byte, error)
	Save(state []byte) error
}

// Clock is the passing of time; tests bring their own. Times are compared
// and subtracted only, so they should be monotonic.
type Clock interface {
	Now() time.Time
	After(d time.Duration) <-chan time.Time
}

type realClock struct{}

func (realClock) Now() time.Time                         { return time.Now() }
func (realClock) After(d time.Duration) <-chan time.Time { return time.After(d) }

// ReplicaConfig is one replica of a primary's volume.
type ReplicaConfig struct {
	Name string
	// Client reaches the Receiver that serves it; its connection stays the
	// caller's. It should fail at once while it is not connected (gRPC's default).
	Client proto.ReplicationClient
	// Link sizes the pipeline, names the codec and, unless it is Name, what the
	// replica is called where it is; the rest is filled in.
	Link LinkConfig
	// RetryMax is the longest wait after a failed session; 0: the volume's.
	RetryMax time.Duration
	// AllowUnrelated and CatchUpInPlace: see PlanInput.
	AllowUnrelated bool
	CatchUpInPlace bool
	// SplitBrain decides when the replica went its own way; empty: the operator
	// does, by Replica.GiveUp.
	SplitBrain SplitBrain
}

// PrimaryConfig is a volume and its replicas. Zero values mean the defaults.
type PrimaryConfig struct {
	Volume     string
	VolumeUUID [16]byte
	Source     Source
	State      StateStore
	Replicas   []ReplicaConfig

	Interval       time.Duration // between cuts while something is written; 0: 1 s
	CutLimit       time.Duration // the longest a frozen view is held for slow replicas; 0: 30 s
	LiveRestBytes  int64         // what may be left after live rounds for the frozen one; 0: 64 MiB
	MaxLiveRounds  int           // 0: 5
	ConnectTimeout time.Duration // for a handshake; 0: 15 s
	RetryMin       time.Duration // the first wait after a failed session; 0: 500 ms
	RetryMax       time.Duration // 0: 60 s

	Clock  Clock // nil: the real one
	Events PrimaryEvents
}

func (c PrimaryConfig) withDefaults() PrimaryConfig {
	setDuration := func(d *time.Duration, def time.Duration) {
		if *d <= 0 {
			*d = def
		}
	}
	setDuration(&c.Interval, time.Second)
	setDuration(&c.CutLimit, 30*time.Second)
	setDuration(&c.ConnectTimeout, 15*time.Second)
	setDuration(&c.RetryMin, 500*time.Millisecond)
	setDuration(&c.RetryMax, time.Minute)
	if c.LiveRestBytes <= 0 {
		c.LiveRestBytes = 64 << 20
	}
	if c.MaxLiveRounds <= 0 {
		c.MaxLiveRounds = 5
	}
	if c.Clock == nil {
		c.Clock = realClock{}
	}
	return c
}

// PrimaryEvents are called as things happen, from the goroutine concerned;
// they must not block nor call the Primary. Any may be nil.
type PrimaryEvents struct {
	Connected    func(replica string, plan Plan)
	Disconnected func(replica string, err error)
	Cut          func(c CutInfo)
	CutFailed    func(epoch uint64, err error)
	Changed      func(replica string, c ChangedInfo)
	Committed    func(replica string, e EpochStats)
	Void         func(replica string, epoch uint64, err error) // an epoch that did not happen
	Behind       func(replica, reason string, cause error)     // reason empty: not behind any more; cause: ReplicaReport.Cause
	Packing      func(replica string, now Codec, why string)   // LinkConfig.Packing
}

// CutInfo describes a cut that was taken.
type CutInfo struct {
	Epoch   uint64
	View    bool
	Stalled time.Duration
}

// ChangedInfo is what a replica's next round is about: what the tracker named
// as changed from Since to Epoch, with what an earlier round left.
type ChangedInfo struct {
	Epoch, Since uint64
	Ranges       int
	Bytes        int64
	Took         time.Duration // to find out
}

// BeginPrimary makes it durable that this node is primary, before the device
// becomes writable. It says in words how the history goes on.
func BeginPrimary(store StateStore) (SourceState, string, error) {
	raw, err := store.Load()
	if err != nil {
		return SourceState{}, "", fmt.Errorf("read the source state: %w", err)
	}
	old, err := DecodeSourceState(raw)
	if err != nil {
		return SourceState{}, "", err
	}
	var fresh Generation
	if _, err := rand.Read(fresh[:]); err != nil {
		return SourceState{}, "", err
	}
	s, why, err := StartPrimary(old, fresh)
	if err != nil {
		return SourceState{}, "", err
	}
	return s, why, saveState(store, s)
}

func saveState(store StateStore, s SourceState) error {
	b, err := s.Encode()
	if err != nil {
		return err
	}
	if err := store.Save(b); err != nil {
		return fmt.Errorf("write the source state: %w", err)
	}
	return nil
}

// ErrStopped is what a Primary that was stopped returns.
var ErrStopped = errors.New("the primary was stopped")

// Primary keeps the replicas of one volume up to date. Its methods may be
// called from several goroutines.
//
// Goroutines: one takes the cuts and holds them until every replica that
// joined has read what it needs; one for each replica connects, plans and
// sends. Neither ever waits for the other longer than the cut's limit, unless
// tracking is lost for good.
type Primary struct {
	cfg     PrimaryConfig
	follow  Follower // the source, if that stands at another node's cuts; nil: it makes its own
	size    int64
	ctx     context.Context // ends everything
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	started time.Time
	written uint64        // WrittenBytes at the start
	kick    chan struct{} // room for one: the cutter should look again

	mu       sync.Mutex
	state    SourceState // what is durable
	changed  chan struct{}
	workers  []*replicaWorker
	lastCut  *cutRecord
	syncTo   uint64 // replicas that hold less are wanted a cut at once
	cutErr   error  // of the last try, nil when it succeeded
	stateErr error
	stopping bool
	together context.Context // while it lasts the last cut waits until all are ready for it; may be nil
}

// cutRecord remembers a cut after its release.
type cutRecord struct {
	epoch   uint64
	written uint64    // WrittenBytes at the cut
	covers  time.Time // nothing was written between the cut and then
	// durable: the source was flushed after it. Set at any time.
	durable atomic.Bool
}

// NewPrimary starts replication of a volume whose state BeginPrimary returned.
func NewPrimary(cfg PrimaryConfig, s SourceState) (*Primary, error) {
	if s.OpenEpoch == 0 {
		return nil, fmt.Errorf("volume %q: no epoch is open: BeginPrimary comes first", cfg.Volume)
	}
	return startPrimary(cfg, s, nil)
}

func startPrimary(cfg PrimaryConfig, s SourceState, follow Follower) (*Primary, error) {
	cfg = cfg.withDefaults()
	written, err := cfg.Source.WrittenBytes()
	if err != nil {
		return nil, fmt.Errorf("volume %q: %w", cfg.Volume, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &Primary{
		cfg: cfg, follow: follow, size: cfg.Source.Size(), ctx: ctx, cancel: cancel, state: s,
		started: cfg.Clock.Now(), written: written, kick: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	seen := map[string]bool{}
	for _, rc := range cfg.Replicas {
		if seen[rc.Name] || rc.Name == "" {
			cancel()
			return nil, fmt.Errorf("volume %q: replica name %q is empty or comes twice", cfg.Volume, rc.Name)
		}
		seen[rc.Name] = true
		p.workers = append(p.workers, newReplicaWorker(p, rc))
	}
	p.wg.Go(func() { p.cutter(ctx) })
	for _, w := range p.workers {
		p.wg.Go(func() { w.run(ctx) })
	}
	return p, nil
}

// Lineage is what the volume stands for at this moment, with the epoch that is open.
func (p *Primary) Lineage() Lineage {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.history()
}

// Cut is the last cut that is durable with the volume's state: its disk holds it from now on, also
// after a crash. The zero Position: there was none yet.
func (p *Primary) Cut() Position {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state.Lineage.Tip()
}

// notify wakes everybody who waits for a change; mu is held.
func (p *Primary) notify() {
	close(p.changed)
	p.changed = make(chan struct{})
}

// wake makes the cutter look again.
func (p *Primary) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// waitFor returns when ready, called under mu, says so.
func (p *Primary) waitFor(ctx context.Context, ready func() bool) error {
	for {
		p.mu.Lock()
		ok, c, stopping := ready(), p.changed, p.stopping
		p.mu.Unlock()
		switch {
		case ok:
			return nil
		case stopping && p.ctx.Err() != nil:
			return ErrStopped
		}
		select {
		case <-c:
		case <-ctx.Done():
			return ctx.Err()
		case <-p.ctx.Done():
			return ErrStopped
		}
	}
}

// SyncNow takes a cut and returns when every replica holds it or a later one:
// the number of that cut, and the names of the replicas that hold it. When ctx ends
// earlier the error names those that do not.
func (p *Primary) SyncNow(ctx context.Context) (epoch uint64, committed []string, err error) {
	return p.syncNow(ctx, false, func(*replicaWorker) bool { return false })
}

// worker finds a replica by name; its error names what there is.
func (p *Primary) worker(name string) (*replicaWorker, error) {
	i := slices.IndexFunc(p.workers, func(w *replicaWorker) bool { return w.cfg.Name == name })
	if i < 0 {
		var names []string
		for _, w := range p.workers {
			names = append(names, w.cfg.Name)
		}
		return nil, fmt.Errorf("volume %q has no replica %q, only %v", p.cfg.Volume, name, names)
	}
	return p.workers[i], nil
}

// Pause ends the session with a replica, or with all for an empty name, until
// Resume. A sync under way then goes on where it was, or by comparing if its
// replica was opened anew meanwhile.
func (p *Primary) Pause(replica string) error { return p.setPaused(replica, true) }

// Resume undoes Pause, and connects anew at once to a replica that was
// refused or is waited with.
func (p *Primary) Resume(replica string) error { return p.setPaused(replica, false) }

// Retry connects at once to a replica that is waited with after a failure: what
// was in its way may be gone. An unknown name, or one that is paused, is no error.
func (p *Primary) Retry(replica string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.workers {
		if w.cfg.Name == replica && !w.connected {
			w.retryNow = true
		}
	}
	p.notify()
}

func (p *Primary) setPaused(replica string, paused bool) error {
	ws := p.workers
	if replica != "" {
		w, err := p.worker(replica)
		if err != nil {
			return err
		}
		ws = []*replicaWorker{w}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range ws {
		w.paused = paused
		if paused && w.stopSession != nil {
			w.stopSession()
		}
		if !paused {
			w.retryNow = true
		}
	}
	p.notify()
	return nil
}

// Stop ends replication. Until ctx ends it brings a last cut to every replica
// that is connected. seal, which may be nil, must make the device unwritable for
// everybody, yet leave Source.WrittenBytes answering; if it returns nil and
// nothing was written since the last cut, the end is recorded as clean: the
// device holds exactly that cut. clean says so. All goroutines have ended when
// Stop returns.
func (p *Primary) Stop(ctx context.Context, seal func() error) (clean bool, err error) {
	p.mu.Lock()
	if p.stopping {
		p.mu.Unlock()
		return false, ErrStopped
	}
	p.stopping = true
	epoch := p.newest()
	anyConnected := false
	for _, w := range p.workers {
		anyConnected = anyConnected || w.connected
	}
	if p.follow == nil && p.unchangedLocked() {
		epoch = p.lastCut.epoch
	}
	p.syncTo = max(p.syncTo, epoch)
	if anyConnected && seal != nil {
		var end func()
		p.together, end = halfOf(ctx)
		defer end()
	}
	p.mu.Unlock()
	if anyConnected {
		p.wake()
		// Replicas that are away get it later; they are no reason to fail.
		_ = p.waitFor(ctx, func() bool {
			// When nothing is written any more all are to end at one cut, the last: of two that
			// take turns each would lack the other's number, though it lacks nothing else.
			if tip := p.state.Lineage.Tip().Epoch; tip > epoch && p.unchangedLocked() {
				epoch, p.syncTo = tip, max(p.syncTo, tip)
				p.wake()
			}
			for _, w := range p.workers {
				if w.connected && w.holds < epoch {
					return false
				}
			}
			return true
		})
	}
	p.cancel()
	p.wg.Wait()
	if seal == nil {
		return false, nil
	}
	return p.close(seal)
}

// halfOf is a context that ends after half of the time that another one has left.
func halfOf(ctx context.Context) (context.Context, context.CancelFunc) {
	if deadline, ok := ctx.Deadline(); ok {
		return context.WithTimeout(ctx, time.Until(deadline)/2)
	}
	return context.WithCancel(ctx)
}

// unchangedLocked reports whether nothing was written since the last cut; mu is held.
func (p *Primary) unchangedLocked() bool {
	if p.lastCut == nil {
		return false
	}
	n, err := p.cfg.Source.WrittenBytes()
	return err == nil && n == p.lastCut.written
}

// close takes the last cut if one is needed, one that is flushed, seals the device and records a
// clean end. No goroutine is left.
func (p *Primary) close(seal func() error) (bool, error) {
	if !p.unchangedLocked() || !p.lastCut.durable.Load() {
		ctx, cancel := context.WithTimeout(context.Background(), p.cfg.CutLimit)
		defer cancel()
		cut, err := p.takeCut(ctx, CutWish{})
		if err == nil {
			err = errors.Join(cut.FlushSource(), cut.Release())
		}
		if err != nil {
			return false, errors.Join(fmt.Errorf("volume %q: the last cut: %w", p.cfg.Volume, err), seal())
		}
	}
	if err := seal(); err != nil {
		return false, fmt.Errorf("volume %q: %w", p.cfg.Volume, err)
	}
	if !p.unchangedLocked() {
		return false, nil
	}
	s := p.state.Close()
	if err := saveState(p.cfg.State, s); err != nil {
		return false, err
	}
	p.state = s
	return true, nil
}

// forget tells the source what no replica will ask about any more. One whose
// position is not known may ask about anything.
func (p *Primary) forget() {
	f, ok := p.cfg.Source.(Forgetter)
	if !ok {
		return
	}
	oldest := uint64(math.MaxUint64)
	p.mu.Lock()
	for _, w := range p.workers {
		oldest = min(oldest, w.holds)
	}
	p.mu.Unlock()
	if oldest > 0 {
		f.Forget(oldest)
	}
}

// useEpoch makes the next epoch's number durable.
func (p *Primary) useEpoch() (epoch uint64, err error) {
	p.mu.Lock()
	next, err := p.state.UseEpoch()
	p.mu.Unlock()
	if err == nil {
		err = saveState(p.cfg.State, next)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stateErr = err; err != nil {
		return 0, err
	}
	p.state = next
	return next.Lineage.Tip().Epoch, nil
}

// takeCut takes a cut, whose number is durable before. Only the cutter calls it, and
// close after it.
func (p *Primary) takeCut(ctx context.Context, wish CutWish) (Cut, error) {
	var epoch uint64
	if p.follow == nil {
		var err error
		if epoch, err = p.useEpoch(); err != nil {
			return nil, err
		}
	}
	before := p.cfg.Clock.Now()
	cut, err := p.cfg.Source.Cut(ctx, epoch, wish)
	if err == nil && p.follow != nil {
		epoch = cut.Epoch()
	}
	if err == nil && wish.View && cut.View() == nil && cut.NoView() == nil {
		err = errors.Join(errors.New("the source gave no view"), cut.Release())
	}
	if err != nil {
		p.mu.Lock()
		p.cutErr = fmt.Errorf("cut %d: %w", epoch, err)
		err = p.cutErr
		p.mu.Unlock()
		if f := p.cfg.Events.CutFailed; f != nil {
			f(epoch, err)
		}
		return nil, err
	}
	p.mu.Lock()
	p.cutErr = nil
	if c, ok := cut.(FollowedCut); ok {
		p.state = followState(c.Lineage())
	}
	p.lastCut = &cutRecord{epoch: epoch, written: cut.WrittenBytes(), covers: before}
	p.mu.Unlock()
	if f := p.cfg.Events.Cut; f != nil {
		f(CutInfo{epoch, cut.View() != nil, cut.Stalled()})
	}
	return cut, nil
}
