package protocol

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sort"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"blockferry/proto"
)

// DefaultWindowBytes is how many frame bytes may be under way to a replica.
const DefaultWindowBytes = 32 << 20

// ReceiverConfig is what a Receiver is told; the zero value will do.
type ReceiverConfig struct {
	WindowBytes    uint64        // 0: DefaultWindowBytes; at least MaxFramesBytes
	CompareWorkers int           // comparisons answered at once per session; 0: 4
	HelloTimeout   time.Duration // 0: 10 s
	Admit          AdmitFunc     // nil: everybody who can call
	Events         ReceiverEvents
}

// ReceiverEvents are called as things happen, from the goroutine of the
// session concerned; they must not block. Any may be nil.
type ReceiverEvents struct {
	Connected    func(replica, from string, primary Position)
	Disconnected func(replica, from string, err error) // err nil: the primary closed the session
	Committed    func(replica string, at Position)
	Applied      func(replica string, epoch uint64)
	// Refused: a session was refused, or ended by a refusal; ctx is its
	// stream's.
	Refused func(ctx context.Context, err *RefusedError)
}

// Receiver answers the Replication service for the replicas it was given.
type Receiver struct {
	proto.UnimplementedReplicationServer
	cfg ReceiverConfig

	frames framePool

	mu       sync.Mutex
	replicas map[replicaKey]*servedReplica
	closed   bool
}

type replicaKey struct {
	volume [16]byte
	name   string
}

type servedReplica struct {
	key  replicaKey
	rep  *Replica
	size int64

	// Guarded by Receiver.mu.
	removed bool
	session *ReceiverSession   // nil: none
	cancel  context.CancelFunc // ends everything that uses the replica
	ctx     context.Context
	users   sync.WaitGroup // sessions and restores
}

// ReceiverSession describes the session that feeds a replica.
type ReceiverSession struct {
	From          string    `json:"from"`
	Primary       string    `json:"primary-position"`
	Since         time.Time `json:"since"`
	ReceivedBytes uint64    `json:"received-bytes"` // frames
	ComparedBytes uint64    `json:"compared-bytes"`
	Epochs        uint64    `json:"epochs-committed"`
}

// ReceiverStatus is one replica as the receiver sees it.
type ReceiverStatus struct {
	Replica    string
	VolumeUUID [16]byte
	Session    *ReceiverSession // nil: no primary is connected
	Disk       ReplicaStatus
}

// NewReceiver makes a Receiver that serves nothing yet.
func NewReceiver(cfg ReceiverConfig) *Receiver {
	if cfg.WindowBytes == 0 {
		cfg.WindowBytes = DefaultWindowBytes
	}
	cfg.WindowBytes = max(cfg.WindowBytes, MaxFramesBytes)
	if cfg.CompareWorkers <= 0 {
		cfg.CompareWorkers = 4
	}
	if cfg.HelloTimeout <= 0 {
		cfg.HelloTimeout = 10 * time.Second
	}
	return &Receiver{cfg: cfg, replicas: map[replicaKey]*servedReplica{}}
}

// Add serves a replica under a name; what its primary calls it is told to Admit. The replica stays the caller's: Remove
// it before it is closed.
func (r *Receiver) Add(name string, rep *Replica) error {
	st := rep.Status()
	if name == "" || len(name) > maxNameBytes {
		return fmt.Errorf("replica name of %d bytes: want 1 to %d", len(name), maxNameBytes)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key := replicaKey{st.VolumeUUID, name}
	switch {
	case r.closed:
		return errors.New("the receiver is closed")
	case r.replicas[key] != nil:
		return fmt.Errorf("replica %q of volume %x is served already", name, st.VolumeUUID)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.replicas[key] = &servedReplica{key: key, rep: rep, size: st.SizeBytes, ctx: ctx, cancel: cancel}
	return nil
}

// Remove ends what uses the replica and waits for it. A replica that is not
// served is no error.
func (r *Receiver) Remove(volume [16]byte, name string) {
	r.mu.Lock()
	s := r.replicas[replicaKey{volume, name}]
	if s != nil {
		s.removed = true
		delete(r.replicas, s.key)
	}
	r.mu.Unlock()
	if s != nil {
		s.cancel()
		s.users.Wait()
	}
}

// Close removes every replica; the service then refuses everything.
func (r *Receiver) Close() {
	r.mu.Lock()
	r.closed = true
	var keys []replicaKey
	for k := range r.replicas {
		keys = append(keys, k)
	}
	r.mu.Unlock()
	for _, k := range keys {
		r.Remove(k.volume, k.name)
	}
}

// Status lists the replicas served, by name.
func (r *Receiver) Status() []ReceiverStatus {
	r.mu.Lock()
	var out []ReceiverStatus
	var reps []*Replica
	for _, s := range r.replicas {
		st := ReceiverStatus{Replica: s.key.name, VolumeUUID: s.key.volume}
		if s.session != nil {
			c := *s.session
			st.Session = &c
		}
		out = append(out, st)
		reps = append(reps, s.rep)
	}
	r.mu.Unlock()
	for i := range out {
		out[i].Disk = reps[i].Status()
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Replica < out[j].Replica })
	return out
}

// acquire finds a replica and counts the caller as a user, who calls
// users.Done. When only a replica of that name of another volume is there,
// that one is returned with other set.
func (r *Receiver) acquire(volume []byte, name string) (s *servedReplica, other bool, err error) {
	var key replicaKey
	key.name = name
	r.mu.Lock()
	defer r.mu.Unlock()
	if copy(key.volume[:], volume) == len(key.volume) && len(volume) == len(key.volume) {
		s = r.replicas[key]
	}
	if s == nil {
		for _, o := range r.replicas {
			if o.key.name == name {
				s, other = o, true
			}
		}
	}
	if s == nil {
		return nil, false, refuse(proto.Reason_REASON_UNKNOWN_REPLICA, "no replica %q is served here: check its name and that it is attached", clip(name))
	}
	s.users.Add(1)
	return s, other, nil
}

// Replicate is one session; see the .proto file.
func (r *Receiver) Replicate(stream proto.Replication_ReplicateServer) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	rs := &receiverSession{r: r, stream: stream, ctx: ctx, messages: make(chan *proto.FromPrimary, 4), from: "local"}
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil && p.Addr.String() != "" {
		rs.from = p.Addr.String()
	}
	// The reader ends with the stream, which ends when this function returns.
	go rs.receive()

	var hello *proto.FromPrimary
	timer := time.NewTimer(r.cfg.HelloTimeout)
	defer timer.Stop()
	select {
	case hello = <-rs.messages:
	case <-timer.C:
		return status.Error(codes.DeadlineExceeded, "no Hello came")
	case <-ctx.Done():
		return ctx.Err()
	}
	if hello == nil {
		return rs.recvErr
	}
	if hello.GetHello() == nil {
		return rs.end(outOfOrder("the first message is not a Hello"))
	}
	if err := r.admitSession(rs, hello.GetHello()); err != nil {
		return rs.end(err)
	}
	s, _, err := r.acquire(hello.GetHello().GetVolumeUuid(), rs.name)
	if err != nil {
		return rs.end(err)
	}
	defer s.users.Done()
	defer context.AfterFunc(s.ctx, cancel)()
	rs.served = s
	if err := r.enter(rs); err != nil {
		return rs.end(err)
	}
	err = rs.run(hello)
	r.leave(rs)
	if f := r.cfg.Events.Disconnected; f != nil && rs.welcomed {
		f(s.key.name, rs.from, err)
	}
	return rs.end(err)
}

// enter takes the replica's one place for a session.
func (r *Receiver) enter(rs *receiverSession) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := rs.served
	switch {
	case s.removed:
		return refuse(proto.Reason_REASON_UNKNOWN_REPLICA, "replica %q was just detached", rs.asked)
	case s.session != nil:
		return refuse(proto.Reason_REASON_BUSY, "replica %q is fed by %s; it takes one primary at a time",
			rs.asked, s.session.From) // the same words each time: they are logged once
	}
	s.session = &ReceiverSession{From: rs.from, Since: time.Now()}
	return nil
}

func (r *Receiver) leave(rs *receiverSession) {
	r.mu.Lock()
	rs.served.session = nil
	r.mu.Unlock()
}

// note changes the session's figures under the lock.
func (r *Receiver) note(s *servedReplica, f func(*ReceiverSession)) {
	r.mu.Lock()
	f(s.session)
	r.mu.Unlock()
}

// receiverSession performs what the state machine asks for.
type receiverSession struct {
	r        *Receiver
	stream   proto.Replication_ReplicateServer
	ctx      context.Context
	served   *servedReplica
	from     string
	asked    string // what the primary calls the replica
	name     string // under which it is served
	welcomed bool

	messages chan *proto.FromPrimary // closed at the stream's end, after recvErr is set
	recvErr  error

	sendMu    sync.Mutex
	session   *Session
	hasher    *Hasher
	ungranted int // bytes stored and not yet granted again

	compares   sync.WaitGroup
	compareSem chan struct{}
	compareErr chan error // the first failure of a comparison

	applied chan uint64 // the newest committed epoch, for the one who waits for its apply
}

func (rs *receiverSession) receive() {
	defer close(rs.messages)
	for {
		m, err := rs.stream.Recv()
		if err != nil {
			if !errors.Is(err, io.EOF) {
				rs.recvErr = err
			}
			return
		}
		select {
		case rs.messages <- m:
		case <-rs.ctx.Done():
			rs.recvErr = rs.ctx.Err()
			return
		}
	}
}

func (rs *receiverSession) send(m *proto.FromReplica) error {
	rs.sendMu.Lock()
	defer rs.sendMu.Unlock()
	return rs.stream.Send(m)
}

// end tells the primary why the session ends, and is the stream's status.
func (rs *receiverSession) end(err error) error {
	var refused *RefusedError
	if errors.As(err, &refused) {
		if f := rs.r.cfg.Events.Refused; f != nil {
			f(rs.ctx, refused)
		}
		_ = rs.send(&proto.FromReplica{Message: &proto.FromReplica_Refused{
			Refused: &proto.Refused{Reason: refused.Reason, Message: refused.Message, Lineage: refused.Lineage.Proto()}}})
		return nil
	}
	return err
}

func (rs *receiverSession) run(hello *proto.FromPrimary) (err error) {
	rep := rs.served.rep
	st := rep.Status()
	rs.session = NewSession(SessionConfig{
		Replica: rs.asked, VolumeUUID: st.VolumeUUID, SizeBytes: st.SizeBytes, State: st.State, NeedsFull: st.NeedsFull, Strayed: st.Strayed, GivenUp: st.GivenUp,
		Lineage: st.Lineage, WindowBytes: rs.r.cfg.WindowBytes, JournalFreeBytes: uint64(max(0, st.JournalFreeBytes)), Kept: rep.Kept(),
	})
	rs.compareSem = make(chan struct{}, rs.r.cfg.CompareWorkers)
	rs.compareErr = make(chan error, 1)
	rs.applied = make(chan uint64, 1)
	ctx, cancel := context.WithCancel(rs.ctx)
	var background sync.WaitGroup
	background.Go(func() { rs.reportApplied(ctx) })
	defer func() {
		cancel()
		rs.compares.Wait()
		background.Wait()
		if rs.session.Open() {
			// What came in place stays labelled.
			end := rep.Abort
			if rs.lost(err) {
				end = rep.Interrupt
			}
			if e := end(); e != nil && err == nil {
				err = rs.storage(e)
			}
		}
	}()
	m := hello
	for {
		a, err := rs.session.Step(m)
		if err == nil {
			err = rs.perform(ctx, a)
		}
		if err != nil {
			return err
		}
		if err := rs.grant(); err != nil {
			return err
		}
		if m, err = rs.next(ctx); m == nil {
			return err
		}
	}
}

// next is the next message, nil at the session's end. What ends it comes before
// messages that wait.
func (rs *receiverSession) next(ctx context.Context) (*proto.FromPrimary, error) {
	select {
	case err := <-rs.compareErr:
		return nil, err
	default:
	}
	if ctx.Err() == nil {
		select {
		case m, ok := <-rs.messages:
			if !ok {
				return nil, rs.recvErr
			}
			return m, nil
		case err := <-rs.compareErr:
			return nil, err
		case <-ctx.Done():
		}
	}
	if rs.served.ctx.Err() != nil {
		return nil, refuse(proto.Reason_REASON_UNKNOWN_REPLICA, "replica %q is being detached", rs.asked)
	}
	return nil, ctx.Err()
}

// lost says that a session ended because its stream did, not for what was said in it.
func (rs *receiverSession) lost(err error) bool {
	var refused *RefusedError
	return !errors.As(err, &refused) && rs.served.ctx.Err() == nil
}

// storage turns a replica's error into a refusal.
func (rs *receiverSession) storage(err error) error {
	var refused *RefusedError
	switch {
	case err == nil, errors.As(err, &refused):
		return err
	case errors.Is(err, ErrJournalFull):
		return refuse(proto.Reason_REASON_JOURNAL_FULL, "replica %q: %v", rs.asked, err)
	case errors.Is(err, ErrNeedsFull):
		return refuse(proto.Reason_REASON_NEEDS_FULL, "replica %q: %v", rs.asked, err)
	case errors.Is(err, ErrNotForward), errors.Is(err, ErrStrayed):
		return refuse(proto.Reason_REASON_LINEAGE, "replica %q: %v", rs.asked, err)
	case errors.Is(err, ErrSums), errors.Is(err, ErrBadFrame):
		return refuse(proto.Reason_REASON_PROTOCOL, "replica %q: %v", rs.asked, err)
	case rs.ctx.Err() != nil && errors.Is(err, context.Canceled):
		return rs.ctx.Err()
	}
	return refuse(proto.Reason_REASON_STORAGE, "replica %q: %v", rs.asked, err)
}

func (rs *receiverSession) perform(ctx context.Context, a SessionAction) error {
	rep, name, ev := rs.served.rep, rs.served.key.name, rs.r.cfg.Events
	if a.Kind == ActBegin || a.Kind == ActCommit || a.Kind == ActAbort {
		// A comparison is about the image of before.
		rs.compares.Wait()
	}
	switch a.Kind {
	case ActWelcome:
		h, err := NewHasher(a.HashKey)
		if err != nil {
			return err
		}
		rs.hasher, rs.welcomed = h, true
		rs.r.note(rs.served, func(s *ReceiverSession) { s.Primary = a.Peer.Tip().String() })
		if ev.Connected != nil {
			ev.Connected(name, rs.from, a.Peer.Tip())
		}
		return rs.send(&proto.FromReplica{Message: &proto.FromReplica_Welcome{Welcome: a.Welcome}})
	case ActBegin:
		begin := rep.Begin
		if a.Resume {
			begin = func(_ context.Context, s EpochStart) error { return rep.Resume(s) }
		}
		if err := begin(ctx, a.Start); err != nil {
			return rs.storage(err)
		}
		return rs.send(&proto.FromReplica{Message: &proto.FromReplica_Begun{
			Begun: &proto.Begun{Epoch: a.Start.Epoch, Attempt: a.Start.Attempt}}})
	case ActAppend:
		n := a.Frames.bytes
		err := rep.appendBundle(ctx, 0, a.Frames, nil)
		a.Frames.free()
		if err != nil {
			return rs.storage(err)
		}
		rs.ungranted += n
		rs.r.note(rs.served, func(s *ReceiverSession) { s.ReceivedBytes += uint64(n) })
		return nil
	case ActCompare:
		return rs.compare(ctx, a)
	case ActChanges:
		m, err := changesMessage(ctx, rep, a.Since)
		if err != nil {
			return rs.storage(err)
		}
		if m.Known {
			rs.session.Told(a.Since)
		}
		return rs.send(&proto.FromReplica{Message: &proto.FromReplica_Changes{Changes: m}})
	case ActCommit:
		if err := rep.Commit(ctx, a.Commit); err != nil {
			return rs.storage(err)
		}
		rs.session.Committed(a.Commit)
		at := a.Commit.Lineage.Tip()
		rs.r.note(rs.served, func(s *ReceiverSession) { s.Epochs++; s.Primary = at.String() })
		if ev.Committed != nil {
			ev.Committed(name, at)
		}
		if err := rs.send(&proto.FromReplica{Message: &proto.FromReplica_Committed{
			Committed: &proto.Committed{Epoch: at.Epoch, JournalFreeBytes: uint64(max(0, rep.JournalFree()))}}}); err != nil {
			return err
		}
		select { // the newest counts
		case <-rs.applied:
		default:
		}
		rs.applied <- at.Epoch
		return nil
	case ActAbort:
		if err := rep.Abort(); err != nil {
			return rs.storage(err)
		}
		return rs.send(&proto.FromReplica{Message: &proto.FromReplica_Aborted{
			Aborted: &proto.Aborted{Epoch: a.Start.Epoch, Attempt: a.Start.Attempt}}})
	}
	return nil
}

// grant gives the window back in pieces worth a message.
func (rs *receiverSession) grant() error {
	n := rs.ungranted
	if n == 0 || (n < int(rs.r.cfg.WindowBytes/8) && len(rs.messages) > 0) {
		return nil
	}
	rs.ungranted = 0
	rs.session.Granted(n)
	return rs.send(&proto.FromReplica{Message: &proto.FromReplica_Window{Window: &proto.Window{Bytes: uint64(n)}}})
}

// compare answers in the background, a few at once.
func (rs *receiverSession) compare(ctx context.Context, a SessionAction) error {
	select {
	case rs.compareSem <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	rs.served.rep.compared(a.Ranges)
	// What is compared for an epoch may be named though it is equal; a verify may not.
	coarse := rs.session.Open()
	rs.compares.Go(func() {
		defer func() { <-rs.compareSem }()
		read := func(p []byte, at int64) ([]*touched, error) { return rs.served.rep.readData(ctx, p, at, coarse) }
		d, n, err := differences(rs.hasher, a.Compare, a.Ranges, read)
		if err == nil {
			rs.r.note(rs.served, func(s *ReceiverSession) { s.ComparedBytes += uint64(n) })
			err = rs.send(&proto.FromReplica{Message: &proto.FromReplica_Differences{Differences: d}})
		} else {
			err = rs.storage(err)
		}
		if err != nil {
			select {
			case rs.compareErr <- err:
			default:
			}
		}
	})
	return nil
}

// reportApplied tells the primary when what it committed is applied.
func (rs *receiverSession) reportApplied(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case epoch := <-rs.applied:
			if rs.served.rep.WaitApplied(ctx, epoch) != nil {
				continue // the next Begin or Append says what is wrong
			}
			if f := rs.r.cfg.Events.Applied; f != nil {
				f(rs.served.key.name, epoch)
			}
			if rs.send(&proto.FromReplica{Message: &proto.FromReplica_Applied{
				Applied: &proto.Applied{Epoch: epoch, JournalFreeBytes: uint64(max(0, rs.served.rep.JournalFree()))}}}) != nil {
				return
			}
		}
	}
}
