package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/transport"
	"blockferry/proto"
	"blockferry/protocol"
)

// tellEvery is how often a node tells those that watch it.
const tellEvery = 500 * time.Millisecond

const (
	// heardFor is how long what a node said counts as what it says: several times as long as
	// from one word of its to the next.
	heardFor = 10 * tellEvery
	// askOff is how long a node has that is known to write no more, if it was listened to in vain for
	// heardFor: whoever waits is a failover.
	askOff = time.Second
)

// askNode is how long another node has to say where it stands; tests give it more.
var askNode = 3 * time.Second

// peerService is what other nodes can call: replication, and where a volume stands.
type peerService struct {
	*protocol.Receiver
	peers *peers
}

// Watch implements proto.ReplicationServer.
func (p peerService) Watch(r *proto.WatchRequest, stream proto.Replication_WatchServer) error {
	ctx := stream.Context()
	node := transport.Caller(ctx)
	var uuid volume.UUID
	copy(uuid[:], r.VolumeUuid)
	i := slices.IndexFunc(p.peers.volumes, func(s *secondary) bool {
		if s.roles == nil || !slices.Contains(s.config.Peers, node) || len(r.VolumeUuid) != len(uuid) {
			return false
		}
		_, of, _ := s.roles.look()
		return of == uuid && !of.IsZero()
	})
	if i < 0 {
		return status.Errorf(codes.PermissionDenied, "node '%s' has no volume %s that node '%s' may ask about", p.peers.node.Name, uuid, node)
	}
	roles := p.peers.volumes[i].roles
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		if standing, known := roles.standing(node); known {
			if err := stream.Send(standing); err != nil {
				return err
			}
		}
		_, _, change := roles.look()
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.peers.agent.stopping:
			return status.Error(codes.Unavailable, "the agent is stopping")
		case <-tick.C:
		case <-change:
		}
	}
}

// heard is what another node said of the volume last.
type heard struct {
	primary bool
	serving bool // as primary, the volume is up, or comes up at this moment, or may be up
	lineage protocol.Lineage
	behind  *uint64
	at      time.Time
	cuts    []cutHeard // after the copy here, oldest first, of a primary
	before  bool       // the agent here was started since: at has no monotonic part
}

// cutHeard is when it was first heard that an epoch was open, so that the cut before it
// was taken.
type cutHeard struct {
	open uint64
	at   time.Time
}

// maxCutsHeard bounds how many are remembered of a primary that the copy does not follow:
// of those after it the oldest count.
const maxCutsHeard = 256

// after is what was heard now, with the cuts heard before that the copy does not hold.
func (h heard) after(last heard, holds uint64) heard {
	if !h.primary || len(h.lineage) == 0 {
		return h
	}
	for _, c := range last.cuts {
		if last.primary && c.open > holds {
			h.cuts = append(h.cuts, c)
		}
	}
	open := h.lineage.Tip().Epoch
	if n := len(h.cuts); open > holds && n < maxCutsHeard && (n == 0 || open > h.cuts[n-1].open) {
		h.cuts = append(h.cuts, cutHeard{open, h.at})
	}
	return h
}

// known is what is to be held against the copy here. Times are of this node alone, by its
// monotonic clock unless it was started since: the clocks of two machines differ.
func (h heard) known(holds uint64) protocol.Heard {
	k := protocol.Heard{Lineage: h.lineage, BehindBytes: h.behind}
	if len(h.lineage) > 0 && h.lineage.Tip().Epoch <= holds {
		k.Seconds = new(float64) // it was heard before the copy's cut
	}
	for _, c := range h.cuts {
		if c.open > holds {
			seconds := max(0, h.at.Sub(c.at).Seconds())
			k.Seconds = &seconds
			break
		}
	}
	if h.before {
		ago := max(0, time.Since(h.at).Seconds())
		k.OldSeconds = &ago
	}
	return k
}

// keepEvery is how often what a primary says is written down while it goes on.
const keepEvery = 10 * time.Second

// note remembers what a node says.
func (s *switching) note(node string, h heard) {
	st, _, _, _ := s.copy.replica.status()
	s.mu.Lock()
	if s.role != roleSecondary { // there is no copy to hold it against
		s.mu.Unlock()
		return
	}
	last := s.heard[node]
	h = h.after(last, st.Committed.Epoch)
	s.heard[node] = h
	news := h.primary != last.primary || h.primary && !h.lineage.Equal(last.lineage) && time.Since(s.keptAt) > keepEvery
	if news {
		s.keptAt = time.Now()
	}
	s.mu.Unlock()
	if news {
		s.keepHeard()
	}
}

// backoff is how long a node that does not answer is waited with before it is asked again.
type backoff struct {
	least, most time.Duration
	next        time.Duration // 0: least
}

// wait is that time, spread.
// Once it was heard it begins anew.
func (b *backoff) wait(heard bool) time.Duration {
	if heard || b.next == 0 {
		b.next = b.least
	}
	d := b.next
	b.next = min(2*b.next, b.most)
	return protocol.Spread(d)
}

// listen keeps what a node says, while the volume is secondary here.
func (s *switching) listen(ctx context.Context, node string, again backoff) {
	for ctx.Err() == nil {
		r, uuid, change := s.look()
		wait := time.Hour // until there is something to hear
		if r == roleSecondary && !uuid.IsZero() {
			spoke := false
			s.hearFrom(ctx, node, uuid, change, func(h heard) bool {
				spoke = true
				s.note(node, h)
				return true
			})
			wait = again.wait(spoke)
		}
		select {
		case <-ctx.Done():
		case <-change:
			again.next = 0
		case <-time.After(wait):
		}
	}
}

// hearFrom calls told with all that a node says, until it returns false, the node
// is gone, or enough is closed, which may be nil.
func (s *switching) hearFrom(ctx context.Context, node string, uuid volume.UUID, enough <-chan struct{}, told func(heard) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if enough != nil {
		go func() {
			select {
			case <-enough:
				cancel()
			case <-ctx.Done():
			}
		}()
	}
	stream, err := s.agent.identity.Client(node, s.config.AddressOf(node)).Watch(ctx, &proto.WatchRequest{VolumeUuid: uuid[:]})
	for err == nil {
		var m *proto.Standing
		if m, err = stream.Recv(); err != nil {
			break
		}
		h := heard{primary: m.Primary, serving: m.Serving, behind: m.BehindBytes, at: time.Now()}
		if h.lineage, err = protocol.LineageFromProto(m.Lineage); err == nil && !told(h) {
			return nil
		}
	}
	return err
}

// ask asks every node that may be primary where it stands. Those that did not
// say are in silent, with the reason. The nodes off are known to write no more.
func (s *switching) ask(ctx context.Context, uuid volume.UUID, off ...string) (said map[string]heard, silent map[string]string) {
	said, silent = map[string]heard{}, map[string]string{}
	ctx, cancel := context.WithTimeout(ctx, askNode)
	defer cancel()
	var mu sync.Mutex
	var asking sync.WaitGroup
	for _, node := range s.config.Peers {
		if s.config.AddressOf(node) == "" {
			silent[node] = "no replica of 'replicas' has its address"
			continue
		}
		asking.Go(func() {
			ctx := ctx
			if slices.Contains(off, node) && s.fellSilent(node) {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, askOff)
				defer cancel()
			}
			err := s.hearFrom(ctx, node, uuid, nil, func(h heard) bool {
				mu.Lock()
				defer mu.Unlock()
				said[node] = h
				return false
			})
			mu.Lock()
			defer mu.Unlock()
			if _, ok := said[node]; !ok {
				silent[node] = fmt.Sprint(err)
			}
		})
	}
	asking.Wait()
	return said, silent
}

// fellSilent says whether a node was heard since the agent's start, and was listened to in vain since.
func (s *switching) fellSilent(node string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	h, was := s.heard[node]
	return was && !h.before && time.Since(h.at) >= heardFor
}

// knowledge is what is known of the primary that a copy followed. written says that
// it was primary when it was heard last, so it went on from whatever the copy holds.
type knowledge struct {
	protocol.Heard
	written bool
	unended string // a node that was fenced, and serves as primary; "": none
	ahead   string // one that is secondary, and holds what the copy does not; "": none
	// givenUp: all that do not answer are known to write no more, and of the others none stands
	// against the copy. What it lacks is given up, then, and nothing else.
	givenUp bool
}

// beside is the knowledge held against a copy, which may have got further than what
// was heard last: there is an open epoch behind every cut of a primary.
func (k knowledge) beside(mine protocol.Lineage) protocol.Heard {
	if !k.written || len(k.Lineage) == 0 || len(mine) == 0 {
		return k.Heard
	}
	if kind := protocol.Compare(mine, k.Lineage).Kind; kind != protocol.Same && kind != protocol.Ahead {
		return k.Heard
	}
	tip := mine.Tip()
	h := k.Heard
	h.Lineage = mine.Extend(protocol.Position{Generation: tip.Generation, Epoch: tip.Epoch + 1})
	h.BehindBytes = nil // that was of an earlier cut
	return h
}

// hear joins what other nodes say now, and said before, to what is known of the
// primary that a copy followed. It also says so in words, and which nodes did not
// answer, and why. fenced are those that were fenced since they were asked last, off those that
// who asks knows to write no more.
func (s *switching) hear(ctx context.Context, st protocol.ReplicaStatus, fenced map[string]string, off []string) (k knowledge, words string, silent map[string]string) {
	said, silent := s.ask(ctx, st.VolumeUUID, off...)
	unended, unknown := "", false
	for _, node := range s.config.Peers {
		if _, is := silent[node]; is && !slices.Contains(off, node) {
			unknown = true
		}
		if _, was := fenced[node]; (was || slices.Contains(off, node)) && said[node].primary && said[node].serving {
			if said[node] = s.settled(ctx, node, st.VolumeUUID, said[node]); said[node].primary && said[node].serving {
				unended = node
			}
		}
	}
	k, words = s.weigh(st, said, silent)
	k.unended = unended
	k.givenUp = len(silent) > 0 && !unknown && !k.Alive && k.ahead == "" && st.Strayed == ""
	return k, words, silent
}

// settled is what a node says in the end that serves, or comes up: one that was reset and boots does
// not go on with that once it has heard of a take-over.
func (s *switching) settled(ctx context.Context, node string, uuid volume.UUID, last heard) heard {
	ctx, cancel := context.WithTimeout(ctx, 2*askNode) // it asks other nodes, too
	defer cancel()
	_ = s.hearFrom(ctx, node, uuid, nil, func(h heard) bool {
		last = h
		return h.primary && h.serving
	})
	return last
}

// weigh is hear when all were asked.
func (s *switching) weigh(st protocol.ReplicaStatus, said map[string]heard, silent map[string]string) (knowledge, string) {
	holds := st.Lineage.Tip().Epoch
	var words []string
	ahead := ""
	far := protocol.Heard{Lineage: st.Lineage}
	for _, node := range s.config.Peers {
		h, ok := said[node]
		switch {
		case !ok:
			words = append(words, "node '"+node+"' does not say where it stands: "+silent[node])
		case h.primary:
			s.mu.Lock()
			k := h.after(s.heard[node], holds).known(holds)
			s.mu.Unlock()
			k.Alive = true
			return knowledge{Heard: k, written: true}, "node '" + node + "' is primary"
		default:
			words = append(words, h.inWords(st.Lineage, node))
			if kind := protocol.Compare(st.Lineage, h.lineage).Kind; len(h.lineage) > 0 && kind != protocol.Ahead && kind != protocol.Same {
				ahead = node
			}
			if kind := protocol.Compare(far.Lineage, h.lineage).Kind; len(h.lineage) > 0 && kind != protocol.Ahead && kind != protocol.Same {
				far = protocol.Heard{Lineage: h.lineage}
			}
		}
	}
	if from := s.copy.fedBy(); from != "" {
		return knowledge{Heard: protocol.Heard{Alive: true}, written: true}, "it is fed by " + from
	}
	if len(silent) == 0 {
		// Every node that could be primary is a replica, and what they hold is known.
		return knowledge{Heard: far, ahead: ahead}, strings.Join(words, ", ")
	}
	// What the silent ones said last counts only from a primary: who was secondary
	// may be primary since.
	var last heard
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, node := range s.config.Peers {
		if _, is := silent[node]; !is {
			continue
		}
		if h := s.heard[node]; h.primary && (!last.primary || h.outdoes(last)) {
			last = h
		}
	}
	return knowledge{Heard: last.known(holds), written: last.primary, ahead: ahead}, strings.Join(words, ", ")
}

// outdoes says which of two primaries counts of which none answers: what was heard before
// the agent's start has a time of a clock that may have jumped since.
func (h heard) outdoes(other heard) bool {
	switch {
	case h.before != other.before:
		return other.before
	case !h.before:
		return h.at.After(other.at)
	}
	return len(h.lineage) > 0 && len(other.lineage) > 0 && protocol.Compare(h.lineage, other.lineage).Kind == protocol.Ahead
}

// inWords says where another node that is secondary stands, and whether it is the better
// one to take over.
func (h heard) inWords(mine protocol.Lineage, node string) string {
	words := fmt.Sprintf("node '%s' is secondary at %v", node, h.lineage.Tip())
	if len(mine) > 0 && protocol.Compare(mine, h.lineage).Kind == protocol.Behind {
		words += ", ahead of the copy here: it loses less if that one takes over"
	}
	return words
}

// superseded refuses a primary's disk, before anybody can write to it, that
// another node's copy has left behind, or that may have been while a node is silent: unless
// the volume has a lease, which tells that, or the operator decided. From before they are
// asked, whether or not they are, other nodes hear that it comes up, until rise(false): of two
// that come up at once at least one hears of the other. A nil s asks nobody.
func (s *switching) superseded(uuid volume.UUID, disk protocol.Lineage) error {
	if s == nil {
		return nil
	}
	s.know(uuid) // or nobody could ask
	s.rise(true)
	if len(disk) == 0 {
		return nil
	}
	s.mu.Lock()
	word := s.decided
	s.mu.Unlock()
	if word == forced {
		return nil
	}
	s.agent.peers.heardHere()
	said, silent := s.ask(context.Background(), uuid)
	s.mu.Lock()
	defer s.mu.Unlock()
	for node, h := range said {
		delete(s.overtaken, node)
		if why := h.supersedes(disk, node); why != "" {
			s.overtaken[node] = h
			return &supersededError{s.config.Device + " " + why}
		}
	}
	for node, why := range silent {
		// It took over, whether or not it answers at this moment.
		if h, was := s.overtaken[node]; was && (protocol.Superseded(disk, h.lineage) || protocol.Compare(disk, h.lineage).Kind == protocol.Unrelated) {
			return &supersededError{s.config.Device + " " + h.supersedes(disk, node) + ", as it said before; now it does not answer: " + why}
		}
	}
	if len(silent) > 0 && word == undecided && s.lease == nil {
		return &silentError{silent}
	}
	for node, why := range silent {
		s.log.Info("another node does not say where it stands", "node", node, "reason", why)
	}
	return nil
}

// silentError says that some nodes do not say where they stand: any may have taken over.
type silentError struct{ silent map[string]string }

func (s *silentError) Error() string {
	words := "it was primary when it went down, and since then another node may have taken over:"
	for i, node := range slices.Sorted(maps.Keys(s.silent)) {
		if i > 0 {
			words += ";"
		}
		words += fmt.Sprintf(" node '%s' does not say where it stands (%s)", node, s.silent[node])
	}
	return words
}

// supersedes says why a primary's disk is not written beside what another node said;
// "": it may be. Of two that went their own ways from where both were, none is out of
// date, and of two that forgot where that was either may be; and one that serves, or comes up at this moment, is not joined by a second.
func (h heard) supersedes(disk protocol.Lineage, node string) string {
	switch {
	case len(h.lineage) == 0:
		return ""
	case protocol.Superseded(disk, h.lineage):
		how := "that node took over"
		if !h.primary {
			how = "the copy there is of a primary that took over, or newer"
		}
		return fmt.Sprintf("is out of date: it holds history [%v], node '%s' [%v]: %s", disk, node, h.lineage, how)
	case protocol.Compare(disk, h.lineage).Kind == protocol.Unrelated:
		return fmt.Sprintf("may be out of date: it holds history [%v], node '%s' [%v]: neither remembers what both held once", disk, node, h.lineage)
	case h.primary && h.serving:
		return fmt.Sprintf("would be a second primary: it holds history [%v], node '%s' [%v], and that node is primary and up, comes up at this moment, or can't tell whether it is up", disk, node, h.lineage)
	}
	return ""
}

type supersededError struct{ why string }

func (s *supersededError) Error() string { return s.why }
