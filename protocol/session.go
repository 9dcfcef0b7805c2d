package protocol

import (
	"fmt"
	"slices"

	"blockferry/proto"
)

// Versions of the wire protocol this program speaks, and the features it
// knows beyond the bare protocol.
const (
	ProtocolVersion    = 1
	MinProtocolVersion = 1

	FeatureCompare = "compare"
	FeatureS2      = "s2"
	FeatureZstd    = "zstd"
	// FeatureStrayed: knows of copies that hold blocks of no committed position.
	FeatureStrayed = "strayed"
	// FeatureResume: an epoch may go on in the session after the one that began it.
	FeatureResume = "resume"
)

// Limits of a session. MaxMessageBytes is what both ends must allow gRPC to
// receive; MaxCompareBytes is the most one Compare asks about.
const (
	MaxMessageBytes = 16 << 20
	MaxCompareBytes = 16 << 20
)

// Features lists what this program knows, in order of preference.
func Features() []string {
	return []string{FeatureCompare, FeatureS2, FeatureZstd, FeatureStrayed, FeatureResume}
}

// RefusedError is a refusal: what the replica said, or will say before it
// ends the stream.
type RefusedError struct {
	Reason  proto.Reason
	Message string
	Lineage Lineage // with Reason_REASON_PRIMARY: of the primary that is there
}

func (e *RefusedError) Error() string { return "refused by the replica: " + e.Message }

func refuse(reason proto.Reason, format string, args ...any) error {
	return &RefusedError{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

func outOfOrder(format string, args ...any) error {
	return refuse(proto.Reason_REASON_PROTOCOL, format, args...)
}

// SessionConfig is what a session knows before the first message.
type SessionConfig struct {
	Replica          string
	VolumeUUID       [16]byte
	SizeBytes        int64
	State            DiskState
	NeedsFull        bool
	Strayed          string // ReplicaStatus.Strayed
	Lineage          Lineage
	GivenUp          Position // ReplicaStatus.GivenUp
	WindowBytes      uint64
	JournalFreeBytes uint64
	Kept             *KeptEpoch // what the session before left; nil: nothing
	Features         []string   // nil: Features()
}

// ActionKind is what the caller of Session.Step must do.
type ActionKind int

// What Step asks for. Each names the fields of SessionAction that are set.
const (
	ActWelcome ActionKind = iota + 1 // send Welcome; HashKey is the session's
	ActBegin                         // Replica.Begin(Start), or with Resume Replica.Resume(Start), then send Begun
	ActAppend                        // append Frames and free them, then Granted and send Window
	ActCompare                       // answer from the committed image: Compare, Ranges
	ActCommit                        // Replica.Commit(Commit), then Committed and send Committed, later Applied
	ActAbort                         // Replica.Abort, then send Aborted
	ActChanges                       // send Changes since Since; Told if they are known
)

// SessionAction is the one thing a message leads to.
type SessionAction struct {
	Kind    ActionKind
	Welcome *proto.Welcome
	HashKey []byte
	Peer    Lineage // ActWelcome: the primary's
	Start   EpochStart
	Resume  bool // ActBegin
	Frames  *bundle
	Compare *proto.Compare
	Ranges  []Range
	Commit  EpochCommit
	Reason  string   // ActAbort: why, in words
	Since   Position // ActChanges
}

type sessionState int

const (
	sessionNew  sessionState = iota // waiting for Hello
	sessionIdle                     // no epoch is open
	sessionOpen                     // an epoch is open
	sessionDead                     // refused: nothing follows
)

// Session is the receiving side of one stream, as a state machine without
// I/O and clock. It checks that what comes may come now, that it is about
// this volume, and that what is committed is what was sent. It is for one
// goroutine at a time.
//
// The caller performs each SessionAction before the next Step. A refusal ends the
// session; an open epoch is then aborted by the caller.
type Session struct {
	cfg    SessionConfig
	state  sessionState
	cutOff bool   // a refusal came while an epoch was open
	window uint64 // bytes the primary may still send

	told    Position   // the primary knows what changed here since; zero: it does not
	attempt uint32     // the last one begun
	start   EpochStart // while open
	round   uint32     // highest in this attempt
	digest  *StreamDigest
}

// NewSession begins a session.
func NewSession(cfg SessionConfig) *Session {
	if cfg.Features == nil {
		cfg.Features = Features()
	}
	return &Session{cfg: cfg, window: cfg.WindowBytes}
}

// Open reports whether an epoch was begun and neither committed nor aborted, also
// after a refusal.
func (s *Session) Open() bool { return s.state == sessionOpen || s.cutOff }

// Step takes the next message. An error is always a *RefusedError.
func (s *Session) Step(m *proto.FromPrimary) (SessionAction, error) {
	a, err := s.step(m)
	if err != nil {
		s.cutOff = s.Open()
		s.state = sessionDead
	}
	return a, err
}

func (s *Session) step(m *proto.FromPrimary) (SessionAction, error) {
	if s.state == sessionDead {
		return SessionAction{}, outOfOrder("a message after the refusal")
	}
	if h := m.GetHello(); h != nil {
		return s.hello(h)
	}
	if s.state == sessionNew {
		return SessionAction{}, outOfOrder("the first message is not a Hello")
	}
	switch {
	case m.GetBegin() != nil:
		return s.begin(m.GetBegin())
	case isFrames(m):
		return s.frames(m)
	case m.GetCompare() != nil:
		return s.compare(m.GetCompare())
	case m.GetCommit() != nil:
		return s.commit(m.GetCommit())
	case m.GetAbort() != nil:
		return s.abort(m.GetAbort())
	case m.GetAskChanges() != nil:
		return s.changes(m.GetAskChanges())
	}
	return SessionAction{}, outOfOrder("an empty or unknown message; the primary may be newer than this replica: upgrade it")
}

func (s *Session) hello(h *proto.Hello) (SessionAction, error) {
	if s.state != sessionNew {
		return SessionAction{}, outOfOrder("a second Hello")
	}
	version := min(h.Version, ProtocolVersion)
	if version < max(h.MinVersion, MinProtocolVersion) {
		return SessionAction{}, refuse(proto.Reason_REASON_VERSION,
			"the primary speaks protocol versions %d to %d, this replica %d to %d: upgrade the older node",
			h.MinVersion, h.Version, MinProtocolVersion, ProtocolVersion)
	}
	if string(h.VolumeUuid) != string(s.cfg.VolumeUUID[:]) {
		return SessionAction{}, refuse(proto.Reason_REASON_WRONG_VOLUME,
			"replica %q holds volume %x, the primary offers volume %q with id %x: check the addresses, or format the replica for it",
			s.cfg.Replica, s.cfg.VolumeUUID, clip(h.Volume), clip(string(h.VolumeUuid)))
	}
	if h.Replica != s.cfg.Replica {
		return SessionAction{}, refuse(proto.Reason_REASON_UNKNOWN_REPLICA, "this is replica %q, the primary asks for %q", s.cfg.Replica, clip(h.Replica))
	}
	if h.SizeBytes != uint64(s.cfg.SizeBytes) {
		return SessionAction{}, refuse(proto.Reason_REASON_SIZE,
			"replica %q was formatted for a volume of %d bytes, the primary's has %d: if that grew, with the agent of that replica stopped: blockferry resize --size %d; otherwise format it anew",
			s.cfg.Replica, s.cfg.SizeBytes, h.SizeBytes, h.SizeBytes)
	}
	if len(h.HashKey) != HashKeyBytes {
		return SessionAction{}, outOfOrder("checksum key of %d bytes, want %d", len(h.HashKey), HashKeyBytes)
	}
	peer, err := LineageFromProto(h.Lineage)
	if err != nil {
		return SessionAction{}, refuse(proto.Reason_REASON_LINEAGE, "the primary's history: %v", err)
	}
	if s.cfg.Strayed != "" && !slices.Contains(h.Features, FeatureStrayed) {
		return SessionAction{}, refuse(proto.Reason_REASON_VERSION,
			"replica %q at %v strayed (%s), and the primary does not know of such: upgrade it", s.cfg.Replica, s.cfg.Lineage.Tip(), s.cfg.Strayed)
	}
	s.state = sessionIdle
	w := &proto.Welcome{
		Version: version, DiskState: proto.DiskState(s.cfg.State), Lineage: s.cfg.Lineage.Proto(),
		WindowBytes: s.cfg.WindowBytes, JournalFreeBytes: s.cfg.JournalFreeBytes, NeedsFull: s.cfg.NeedsFull,
		Strayed: s.cfg.Strayed,
	}
	if !s.cfg.GivenUp.IsZero() {
		w.GivenUp = s.cfg.GivenUp.proto()
	}
	if s.cfg.Kept != nil && slices.Contains(h.Features, FeatureResume) {
		w.Kept = s.cfg.Kept.proto()
	}
	for _, mine := range s.cfg.Features {
		for _, theirs := range h.Features {
			if mine == theirs {
				w.Features = append(w.Features, mine)
				break
			}
		}
	}
	return SessionAction{Kind: ActWelcome, Welcome: w, HashKey: h.HashKey, Peer: peer}, nil
}

func (s *Session) begin(b *proto.Begin) (SessionAction, error) {
	if s.state == sessionOpen {
		return SessionAction{}, outOfOrder("Begin of epoch %d while epoch %d is open", b.Epoch, s.start.Epoch)
	}
	if b.Attempt <= s.attempt {
		return SessionAction{}, outOfOrder("attempt %d of epoch %d does not follow attempt %d", b.Attempt, b.Epoch, s.attempt)
	}
	l, err := LineageFromProto(b.Lineage)
	if err == nil && l.Tip().Epoch != b.Epoch {
		err = fmt.Errorf("it ends with epoch %d, the epoch begun is %d", l.Tip().Epoch, b.Epoch)
	}
	if err != nil {
		return SessionAction{}, refuse(proto.Reason_REASON_LINEAGE, "history of epoch %d: %v", b.Epoch, err)
	}
	inPlace := b.Mode == proto.Mode_MODE_IN_PLACE
	if !inPlace && b.Mode != proto.Mode_MODE_JOURNAL {
		return SessionAction{}, outOfOrder("epoch %d has unknown mode %d", b.Epoch, b.Mode)
	}
	var discard Position
	if b.Discard != nil {
		if discard, err = positionFromProto(b.Discard); err != nil {
			return SessionAction{}, refuse(proto.Reason_REASON_LINEAGE, "what epoch %d gives up: %v", b.Epoch, err)
		}
	}
	// The replica guards itself: whatever the primary planned, an image that
	// holds more than the epoch's history accounts for is not written, unless that
	// very position was given up.
	if len(s.cfg.Lineage) > 0 {
		rel := Compare(s.cfg.Lineage, l)
		allowed := rel.Kind == Behind && s.cfg.Strayed == "" && discard.IsZero() ||
			rel.Kind == Unrelated && b.OverwriteUnrelated && b.Full && inPlace ||
			(rel.Kind == Diverged || rel.Kind == Behind && s.cfg.Strayed != "") && !inPlace && discard == s.cfg.Lineage.Tip() &&
				(b.Full || s.told == rel.Common)
		if !allowed {
			return SessionAction{}, refuse(proto.Reason_REASON_LINEAGE,
				"replica %q at %v, history [%v], is %v when compared with the epoch offered, %v, history [%v]: nothing was written",
				s.cfg.Replica, s.cfg.Lineage.Tip(), s.cfg.Lineage, rel, l.Tip(), l)
		}
	}
	if s.cfg.State != DiskConsistent {
		if !inPlace {
			return SessionAction{}, outOfOrder("replica %q is %s: it has no image to journal onto, epoch %d must be in place", s.cfg.Replica, diskWord(s.cfg.State), b.Epoch)
		}
		if !b.Full && (s.cfg.NeedsFull || len(s.cfg.Lineage) == 0) {
			return SessionAction{}, outOfOrder("replica %q is %s and needs a full epoch; epoch %d brings only changes", s.cfg.Replica, diskWord(s.cfg.State), b.Epoch)
		}
	}
	start := EpochStart{Epoch: b.Epoch, Attempt: b.Attempt, Mode: ModeJournal, Full: b.Full, Lineage: l, Discard: discard, CutUnixNanos: b.CutUnixNanos}
	if n := copy(start.Token[:], b.Token); n != len(b.Token) || n > 0 && n < len(start.Token) {
		return SessionAction{}, outOfOrder("epoch %d has a token of %d bytes, want none or %d", b.Epoch, len(b.Token), len(start.Token))
	}
	if inPlace {
		start.Mode = ModeInPlace
	}
	if b.Resume {
		return s.resume(start)
	}
	s.state, s.attempt, s.start, s.round, s.digest, s.cfg.Kept = sessionOpen, b.Attempt, start, 0, NewStreamDigest(), nil
	if inPlace {
		// From here on the image is torn, and only what this epoch was to
		// bring makes it whole.
		s.cfg.NeedsFull = s.cfg.NeedsFull || b.Full || len(s.cfg.Lineage) == 0
		s.cfg.State = DiskInconsistent
	}
	return SessionAction{Kind: ActBegin, Start: s.start}, nil
}

func (s *Session) changes(a *proto.AskChanges) (SessionAction, error) {
	since, err := positionFromProto(a.Since)
	switch {
	case err != nil:
		return SessionAction{}, outOfOrder("changes since: %v", err)
	case s.state != sessionIdle || s.cfg.State != DiskConsistent:
		return SessionAction{}, outOfOrder("changes are asked for while an epoch is open, or of a replica that is %s", diskWord(s.cfg.State))
	case s.cfg.Lineage.Until(since) == nil:
		return SessionAction{}, refuse(proto.Reason_REASON_LINEAGE, "changes since %v are asked for: replica %q was never there, its history is [%v]",
			since, s.cfg.Replica, s.cfg.Lineage)
	}
	return SessionAction{Kind: ActChanges, Since: since}, nil
}

// Told says that the primary was told what changed at the replica since a position.
func (s *Session) Told(since Position) { s.told = since }

func (s *Session) frames(m *proto.FromPrimary) (SessionAction, error) {
	if s.state != sessionOpen {
		return SessionAction{}, outOfOrder("frames while no epoch is open")
	}
	b, err := bundleOf(m) // Replica.Append checks the payloads
	if err != nil {
		return SessionAction{}, outOfOrder("epoch %d: %v", s.start.Epoch, err)
	}
	if uint64(b.bytes) > s.window {
		return SessionAction{}, outOfOrder("%d bytes of frames, the window has %d", b.bytes, s.window)
	}
	if b.bytes > MaxAppendBytes {
		return SessionAction{}, outOfOrder("%d bytes of frames in one message, at most %d are allowed", b.bytes, MaxAppendBytes)
	}
	for _, fr := range b.frames {
		switch {
		case fr.Epoch != s.start.Epoch || fr.Attempt != s.start.Attempt:
			return SessionAction{}, outOfOrder("a frame of epoch %d, attempt %d; open is epoch %d, attempt %d", fr.Epoch, fr.Attempt, s.start.Epoch, s.start.Attempt)
		case fr.Round < s.round || fr.Round >= MaxRounds:
			return SessionAction{}, outOfOrder("epoch %d: a frame of round %d after round %d; rounds do not fall and stay below %d", fr.Epoch, fr.Round, s.round, MaxRounds)
		case fr.Range().End() > s.cfg.SizeBytes:
			return SessionAction{}, outOfOrder("epoch %d: a frame of %d bytes at %d, the volume has %d", fr.Epoch, fr.Length, fr.Offset, s.cfg.SizeBytes)
		}
		s.round = fr.Round
		s.digest.Add(fr.Header)
	}
	s.window -= uint64(b.bytes)
	return SessionAction{Kind: ActAppend, Frames: b}, nil
}

func (s *Session) compare(c *proto.Compare) (SessionAction, error) {
	switch {
	case s.cfg.State == DiskBlank, s.cfg.State == DiskInconsistent && s.state != sessionOpen:
		return SessionAction{}, outOfOrder("replica %q is %s: there is nothing to compare with", s.cfg.Replica, diskWord(s.cfg.State))
	case len(c.Offsets) != len(c.Lengths):
		return SessionAction{}, outOfOrder("comparison %d names %d offsets and %d lengths", c.Id, len(c.Offsets), len(c.Lengths))
	}
	var units, total int64
	ranges := make([]Range, 0, len(c.Offsets))
	for i, o := range c.Offsets {
		r := Range{int64(o), int64(c.Lengths[i])}
		if o%BlockSize != 0 || r.Length == 0 || r.Length%BlockSize != 0 || o > uint64(s.cfg.SizeBytes) || r.End() > s.cfg.SizeBytes {
			return SessionAction{}, outOfOrder("comparison %d: a range of %d bytes at %d in a volume of %d", c.Id, r.Length, o, s.cfg.SizeBytes)
		}
		units += (r.Length + UnitSize - 1) / UnitSize
		total += r.Length
		if total > MaxCompareBytes {
			return SessionAction{}, outOfOrder("comparison %d asks about more than %d bytes", c.Id, MaxCompareBytes)
		}
		ranges = append(ranges, r)
	}
	if int64(len(c.UnitHashes)) != units*HashBytes {
		return SessionAction{}, outOfOrder("comparison %d has %d bytes of checksums, %d units need %d", c.Id, len(c.UnitHashes), units, units*HashBytes)
	}
	return SessionAction{Kind: ActCompare, Compare: c, Ranges: ranges}, nil
}

func (s *Session) commit(c *proto.Commit) (SessionAction, error) {
	if err := s.named("Commit", c.Epoch, c.Attempt); err != nil {
		return SessionAction{}, err
	}
	e := EpochCommit{Epoch: c.Epoch, Attempt: c.Attempt, Lineage: s.start.Lineage, CutUnixNanos: c.CutUnixNanos}
	if c.Lineage != nil {
		l, err := LineageFromProto(c.Lineage)
		if err != nil {
			return SessionAction{}, refuse(proto.Reason_REASON_LINEAGE, "history committed with epoch %d: %v", c.Epoch, err)
		}
		if rel := Compare(s.start.Lineage, l); rel.Kind != Same && rel.Kind != Behind {
			return SessionAction{}, refuse(proto.Reason_REASON_LINEAGE, "epoch %d was begun for history [%v] and is to be committed as [%v]: %v",
				c.Epoch, s.start.Lineage, l, rel)
		}
		e.Lineage = l
	}
	if len(c.Streams) > 1 {
		return SessionAction{}, outOfOrder("epoch %d: %d streams, this replica takes one", c.Epoch, len(c.Streams))
	}
	want := s.digest.Sum()
	var got StreamSum
	if len(c.Streams) == 1 {
		got.Frames = c.Streams[0].Frames
		if copy(got.Digest[:], c.Streams[0].Digest) != len(got.Digest) || len(c.Streams[0].Digest) != len(got.Digest) {
			return SessionAction{}, outOfOrder("epoch %d: a digest has %d bytes, not %d", c.Epoch, len(got.Digest), len(c.Streams[0].Digest))
		}
	} else {
		got = NewStreamDigest().Sum()
	}
	if got != want {
		return SessionAction{}, outOfOrder("epoch %d: the primary sent %d frames with digest %x, %d arrived with digest %x",
			c.Epoch, got.Frames, got.Digest[:4], want.Frames, want.Digest[:4])
	}
	e.Streams = []StreamSum{got}
	return SessionAction{Kind: ActCommit, Commit: e}, nil
}

func (s *Session) abort(a *proto.Abort) (SessionAction, error) {
	if err := s.named("Abort", a.Epoch, a.Attempt); err != nil {
		return SessionAction{}, err
	}
	s.state = sessionIdle
	return SessionAction{Kind: ActAbort, Start: s.start, Reason: clip(a.Reason)}, nil
}

func (s *Session) named(what string, epoch uint64, attempt uint32) error {
	if s.state != sessionOpen {
		return outOfOrder("%s of epoch %d while no epoch is open", what, epoch)
	}
	if epoch != s.start.Epoch || attempt != s.start.Attempt {
		return outOfOrder("%s of epoch %d, attempt %d; open is epoch %d, attempt %d", what, epoch, attempt, s.start.Epoch, s.start.Attempt)
	}
	return nil
}

// Granted says that the bytes of an ActAppend are stored, so that as many
// more may come.
func (s *Session) Granted(bytes int) { s.window += uint64(bytes) }

// Committed says that an ActCommit is durable: the replica's position is now
// the commit's.
func (s *Session) Committed(c EpochCommit) {
	s.state = sessionIdle
	s.cfg.State, s.cfg.NeedsFull, s.cfg.Lineage = DiskConsistent, false, c.Lineage.Clone()
	s.cfg.Strayed, s.told = "", Position{}
}

// clipBytes has room for two long paths and the cause at the end.
const clipBytes = 1000

// clip keeps what the other side says from filling our messages.
func clip(s string) string {
	if len(s) > clipBytes {
		return s[:clipBytes] + "..."
	}
	return s
}
