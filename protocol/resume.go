package protocol

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"time"

	"blockferry/proto"
)

// This file is about epochs that outlive their session. The replica keeps what it has of
// one, under the token that it was begun with, and says in its next Welcome how
// much that is; the primary, which remembers what it sent, goes on behind it. Both keep
// this in memory alone. Whatever does not fit together, or was restarted since, means
// that the epoch is begun anew.

// token names an epoch that is to outlive its session; zero: none.
type token [16]byte

// KeptEpoch is what a replica has of an epoch whose session was lost.
type KeptEpoch struct {
	Start  EpochStart
	Round  uint32        // the highest of its frames
	Digest *StreamDigest // of its frames, which all came by stream 0
}

func (k *KeptEpoch) proto() *proto.Kept {
	sum := k.Digest.Sum()
	return &proto.Kept{Token: k.Start.Token[:], Epoch: k.Start.Epoch, Attempt: k.Start.Attempt,
		Streams: []*proto.StreamSum{{Frames: sum.Frames, Digest: sum.Digest[:]}}}
}

// keepable says whether the epoch can go on in another session: every frame that it
// counts is stored, and nothing is decided.
func (o *openEpoch) keepable() bool {
	for _, d := range o.digests[1:] {
		if d != nil {
			return false
		}
	}
	return o.start.Token != token{} && o.start.Discard.IsZero() && o.broken == nil && !o.decided
}

// Interrupt says that nobody feeds the open epoch any more. One that was begun with a
// token stays for Resume, with what it takes of the journal and the spill file, until
// another is begun, the device takes over, DropKept finds it too old or the replica is closed. Any
// other is dropped, as by Abort.
func (r *Replica) Interrupt() error {
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	if r.open != nil && !r.open.keepable() {
		r.dropOpen()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.open != nil && r.kept.Epoch == 0 {
		r.kept = KeptStatus{Epoch: r.open.start.Epoch, Bytes: r.open.length, Since: time.Now()}
	}
	return r.usable()
}

// KeptStatus tells of an epoch that Interrupt kept, and which nobody goes on with so far.
type KeptStatus struct {
	Epoch uint64    // 0: none is kept
	Bytes int64     // of its frames
	Since time.Time // when it was interrupted
}

// DropKept drops what Interrupt kept if nobody went on with it for as long as limit, and
// says what that was.
func (r *Replica) DropKept(limit time.Duration) (dropped KeptStatus) {
	tooOld := func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		dropped = r.kept
		return dropped.Epoch > 0 && time.Since(dropped.Since) >= limit
	}
	if !tooOld() { // without waiting for who feeds it
		return KeptStatus{}
	}
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	if !tooOld() {
		return KeptStatus{}
	}
	r.dropOpen()
	return dropped
}

// Kept is what Interrupt left, nil for nothing. It is for one who has the replica
// to himself: an epoch that is being fed looks the same.
func (r *Replica) Kept() *KeptEpoch {
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	o := r.open
	r.mu.Lock()
	usable := r.usable()
	r.mu.Unlock()
	if o == nil || usable != nil || !o.keepable() {
		return nil
	}
	k := &KeptEpoch{Start: o.start, Round: o.rounds.last, Digest: NewStreamDigest()}
	if o.digests[0] != nil {
		k.Digest = o.digests[0].Clone()
	}
	return k
}

// Resume goes on with the epoch that Interrupt kept, begun as s says.
func (r *Replica) Resume(s EpochStart) error {
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	if err := r.mayBegin(s); err != nil {
		return err
	}
	if o := r.open; o == nil || !o.keepable() || !o.start.same(s) {
		return fmt.Errorf("%s: epoch %d attempt %d is not kept: begin it anew", r.store.Name(), s.Epoch, s.Attempt)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.kept = KeptStatus{}
	r.notify()
	return nil
}

// same says whether two announcements are of one and the same epoch.
func (s EpochStart) same(o EpochStart) bool {
	return s.Token == o.Token && s.Epoch == o.Epoch && s.Attempt == o.Attempt && s.Mode == o.Mode && s.Full == o.Full &&
		s.Discard == o.Discard && s.Lineage.Equal(o.Lineage)
}

// resume is a Begin that goes on with the kept epoch.
func (s *Session) resume(start EpochStart) (SessionAction, error) {
	k := s.cfg.Kept
	s.cfg.Kept = nil
	if k == nil || !k.Start.same(start) {
		return SessionAction{}, outOfOrder("epoch %d, attempt %d is to be resumed, which replica %q does not keep: begin it anew", start.Epoch, start.Attempt, s.cfg.Replica)
	}
	s.state, s.attempt, s.start, s.round, s.digest = sessionOpen, start.Attempt, k.Start, k.Round, k.Digest
	return SessionAction{Kind: ActBegin, Start: k.Start, Resume: true}, nil
}

// maxUnstored is how many messages may be under way in an epoch that can be
// resumed. With more, small ones to a replica that takes long, it can't any more.
const maxUnstored = 4096

// sentLog remembers what left in the open epoch and may not be stored.
type sentLog struct {
	stored   *StreamDigest // of the frames before messages; nil: nothing is remembered
	messages []sentMessage
}

type sentMessage struct {
	upTo   *StreamDigest // of all frames to this message's end
	end    uint64        // frame bytes of the session to its end
	ranges []Range       // what it describes; ascending
}

// add remembers a message that is about to leave.
func (s *sentLog) add(m sentMessage) {
	if len(s.messages) == maxUnstored {
		*s = sentLog{}
		return
	}
	s.messages = append(s.messages, m)
}

// granted forgets what is stored: so many frame bytes of the session.
func (s *sentLog) granted(bytes uint64) {
	for len(s.messages) > 0 && s.messages[0].end <= bytes {
		s.stored, s.messages = s.messages[0].upTo, s.messages[1:]
	}
}

// missing cuts off what the replica says it has, by its sum, and returns
// what the rest described. Not ok: what it has is not the beginning of what left.
func (s *sentLog) missing(sum StreamSum) (lost []Range, ok bool) {
	at := s.stored
	for at != nil && at.Sum() != sum {
		if len(s.messages) == 0 {
			return nil, false
		}
		at, s.messages = s.messages[0].upTo, s.messages[1:]
	}
	if at == nil {
		return nil, false
	}
	for _, m := range s.messages {
		lost = append(lost, m.ranges...)
	}
	s.stored, s.messages = at, nil
	return uniteRanges(lost, nil), true
}

// interruptedEpoch is one whose session was lost, as the primary remembers it.
type interruptedEpoch struct {
	start     EpochStart
	overwrite bool
	log       sentLog
	sent      blockSet // blocks that its frames describe, stored or not
}

// newToken is a name for an epoch of this link; none if it can't be kept there.
func (l *Link) newToken(s EpochStart) (t token) {
	if slices.Contains(l.welcome.Features, FeatureResume) && s.Discard.IsZero() {
		rand.Read(t[:]) // never fails
	}
	return t
}

// interrupted is the open epoch, for another link to go on with; nil if none can. Nothing is being sent.
func (l *Link) interrupted() *interruptedEpoch {
	if !l.open || l.start.Token == (token{}) {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.log.stored == nil {
		return nil
	}
	return &interruptedEpoch{l.start, l.overwrite, l.log, l.sent}
}

// kept compares an epoch with what the replica said at the handshake that it keeps. If it
// is that one, missing is what was sent and is not there; asked again, by this link or
// another, it is only what got lost since.
func (l *Link) kept(e *interruptedEpoch) (missing []Range, ok bool) {
	k := l.welcome.Kept
	if k == nil || string(k.Token) != string(e.start.Token[:]) || k.Epoch != e.start.Epoch || k.Attempt != e.start.Attempt || len(k.Streams) != 1 {
		return nil, false
	}
	sum := StreamSum{Frames: k.Streams[0].Frames}
	if copy(sum.Digest[:], k.Streams[0].Digest) != len(k.Streams[0].Digest) {
		return nil, false
	}
	return e.log.missing(sum)
}

// resume opens the epoch again, which kept said is there.
func (l *Link) resume(ctx context.Context, e *interruptedEpoch) error {
	if l.open {
		return fmt.Errorf("replica %q: epoch %d is open", l.cfg.Replica, l.start.Epoch)
	}
	l.mu.Lock()
	l.sent, l.log = e.sent, sentLog{stored: e.log.stored.Clone()}
	l.mu.Unlock()
	l.attempt, l.start, l.overwrite, l.digest = e.start.Attempt, e.start, e.overwrite, e.log.stored.Clone()
	return l.begin(ctx, true)
}
