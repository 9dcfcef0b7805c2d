package agent

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/protocol"
)

// What an agent has to remember when it is started again, and no disk can tell, is in small
// files of the folder Options.StateDir. Each is one JSON object with its version and is
// replaced as a whole; one that is missing, or makes no sense, is as if nothing were known.
//
//	heard/NODE/VOLUME     {"version":1,"volume":UUID,"primaries":[
//	                        {"node":NAME,"history":[{"generation":32 hexadecimal digits,"epoch":N},...],
//	                         "behind-bytes":N,"at":TIME,"behind-since":TIME}]}
//	given-up/REPLICA-UUID {"version":1,"at":{"generation":...,"epoch":N}}
//
// heard is of this node NODE, and has what others said that were primary when they were
// heard last; both times are of this machine's clock, and behind-bytes and behind-since are
// left out when they are not known. given-up is the operator's word for a replica's copy.
const keptVersion = 1

type keptPoint struct {
	Generation string `json:"generation"`
	Epoch      uint64 `json:"epoch"`
}

type keptWord struct {
	Version int       `json:"version"`
	At      keptPoint `json:"at"`
}

type keptHeard struct {
	Version   int           `json:"version"`
	Volume    string        `json:"volume"`
	Primaries []keptPrimary `json:"primaries"`
}

type keptPrimary struct {
	Node        string      `json:"node"`
	History     []keptPoint `json:"history"`
	BehindBytes *uint64     `json:"behind-bytes,omitempty"`
	At          time.Time   `json:"at"`
	BehindSince *time.Time  `json:"behind-since,omitempty"`
}

func keepPoint(p protocol.Position) keptPoint {
	return keptPoint{hex.EncodeToString(p.Generation[:]), p.Epoch}
}

func (k keptPoint) position() (p protocol.Position, err error) {
	g, err := hex.DecodeString(k.Generation)
	if err == nil && len(g) != len(p.Generation) {
		err = fmt.Errorf("a generation of %d bytes", len(g))
	}
	copy(p.Generation[:], g)
	p.Epoch = k.Epoch
	return p, err
}

// keep replaces a file of the state folder; what is nil is removed. Without a folder
// nothing is kept.
func (a *Agent) keep(what any, name ...string) error {
	if a.options.StateDir == "" {
		return nil
	}
	path := filepath.Join(append([]string{a.options.StateDir}, name...)...)
	if what == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	b, err := json.Marshal(what)
	if err != nil {
		return err
	}
	return blockdev.ReplaceFile(path, b, int64(len(b)), 0o600)
}

// maxKept bounds what is read of a file.
const maxKept = 1 << 20

// kept reads one; false: there is none.
func (a *Agent) kept(what any, name ...string) (bool, error) {
	if a.options.StateDir == "" {
		return false, nil
	}
	path := filepath.Join(append([]string{a.options.StateDir}, name...)...)
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil && info.Size() > maxKept {
		err = fmt.Errorf("%s has %d bytes", path, info.Size())
	}
	if err != nil {
		return false, err
	}
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, what)
	}
	if err != nil {
		return false, fmt.Errorf("%s: %w", path, err)
	}
	return true, nil
}

// keepHeard writes down what is known of other nodes that were primary, or that nothing is.
func (s *switching) keepHeard() {
	s.keeping.Lock()
	defer s.keeping.Unlock()
	s.mu.Lock()
	k := &keptHeard{Version: keptVersion, Volume: s.uuid.String()}
	for _, node := range s.config.Peers {
		h, ok := s.heard[node]
		if !ok || !h.primary {
			continue
		}
		one := keptPrimary{Node: node, BehindBytes: h.behind, At: h.at}
		for _, p := range h.lineage {
			one.History = append(one.History, keepPoint(p))
		}
		if len(h.cuts) > 0 {
			one.BehindSince = &h.cuts[0].at
		}
		k.Primaries = append(k.Primaries, one)
	}
	s.mu.Unlock()
	var what any
	if len(k.Primaries) > 0 {
		what = k
	}
	if err := s.agent.keep(what, "heard", s.agent.nodeName(), s.config.Name); err != nil {
		s.log.Warn("what other nodes say of the volume is not kept for the next start", "error", err)
	}
}

// unhear forgets what other nodes said: it was held against a copy that is gone.
func (s *switching) unhear() {
	s.mu.Lock()
	clear(s.heard)
	s.mu.Unlock()
	s.keepHeard()
}

// recallHeard is keepHeard's other end; what was heard since is not replaced.
func (s *switching) recallHeard(uuid volume.UUID) error {
	var k keptHeard
	found, err := s.agent.kept(&k, "heard", s.agent.nodeName(), s.config.Name)
	if err != nil || !found || k.Version != keptVersion || k.Volume != uuid.String() {
		return err
	}
	for _, one := range k.Primaries {
		h := heard{primary: true, behind: one.BehindBytes, at: one.At, before: true}
		for _, p := range one.History {
			at, err := p.position()
			if err != nil {
				return err
			}
			h.lineage = append(h.lineage, at)
		}
		if err := h.lineage.Check(); err != nil {
			return err
		}
		if one.BehindSince != nil {
			h.cuts = []cutHeard{{h.lineage.Tip().Epoch, *one.BehindSince}}
		}
		s.mu.Lock()
		if _, since := s.heard[one.Node]; !since {
			s.heard[one.Node] = h
		}
		s.mu.Unlock()
	}
	return nil
}

func (a *Agent) nodeName() string {
	if a.options.Config.Node == nil {
		return ""
	}
	return a.options.Config.Node.Name
}

// keepWord has the operator's word for a copy outlive the agent; nil takes it away.
func (l *localReplica) keepWord(replica [16]byte, at *protocol.Position) error {
	var what any
	if at != nil {
		what = keptWord{keptVersion, keepPoint(*at)}
	}
	if err := l.agent.keep(what, "given-up", hex.EncodeToString(replica[:])); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.word = at != nil
	return nil
}

// usedWord takes the word away once it was used, or the copy moved on: no disk that is
// brought back later is meant.
func (l *localReplica) usedWord(now protocol.ReplicaStatus) {
	l.mu.Lock()
	word := l.word
	l.mu.Unlock()
	if word && now.GivenUp.IsZero() {
		if err := l.keepWord(now.ReplicaUUID, nil); err != nil {
			l.log.Warn("the operator's word is not taken away", "error", err)
		}
	}
}

// recallWord gives the operator's word again after a start. It is for the position at which
// the copy was, and for no other.
func (l *localReplica) recallWord(r *protocol.Replica) {
	st := r.Status()
	var k keptWord
	found, err := l.agent.kept(&k, "given-up", hex.EncodeToString(st.ReplicaUUID[:]))
	var at protocol.Position
	if err == nil && found && k.Version == keptVersion {
		if at, err = k.At.position(); err == nil && at == st.Committed {
			if err = r.GiveUp(at); err == nil {
				l.mu.Lock()
				l.word = true
				l.mu.Unlock()
				l.log.Warn("given up by the operator, before this start", "position", at.String())
				return
			}
		}
	}
	if found && err == nil {
		err = l.keepWord(st.ReplicaUUID, nil) // it moved on
	}
	if err != nil {
		l.log.Warn("what the operator gave up is not known any more", "error", err)
	}
}
