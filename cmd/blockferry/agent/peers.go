package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
	"blockferry/cmd/blockferry/status"
	"blockferry/cmd/blockferry/transport"
	"blockferry/proto"
	"blockferry/protocol"
)

// adoptLimit is how long a replica has to be formatted for its volume.
const adoptLimit = 10 * time.Second

// peers takes what other nodes write to this node's replicas of their volumes.
// It serves those alone: no replica of a volume that is written here, and no
// command.
type peers struct {
	agent    *Agent
	node     *config.Node
	log      *slog.Logger
	receiver *protocol.Receiver
	server   *transport.Server
	volumes  []*secondary

	adopting  sync.Mutex
	listening chan struct{} // closed once other nodes can call

	mu   sync.Mutex
	said map[string]*feeding // by volume
}

// feeding is what was logged of who feeds a replica.
type feeding struct {
	from    string
	quiet   bool   // a session of it ended that had brought nothing: others like it are no news
	brought bool   // this one has brought an epoch
	last    string // how the last one ended
}

// secondary is a volume that is only a replica here.
type secondary struct {
	peers   *peers
	config  *config.Volume
	replica *localReplica
	roles   *switching // nil: it is never more than a replica
}

// adoption is what a replica that has no volume yet becomes.
type adoption struct {
	format func(diskBytes int64) (protocol.FormatOptions, error)
	label  func(*blockdev.File) (protocol.FormatOptions, error) // done before it is formatted; may be nil
	as     protocol.FormatOptions
	done   chan error // room for one
}

// prepare labels a disk that is to have either role.
func (a *adoption) prepare(disk *blockdev.File) (err error) {
	if a.label != nil {
		a.as, err = a.label(disk)
	}
	return err
}

func newPeers(a *Agent) *peers {
	p := &peers{agent: a, node: a.options.Config.Node, log: a.log, said: map[string]*feeding{}, listening: make(chan struct{})}
	p.receiver = protocol.NewReceiver(protocol.ReceiverConfig{Admit: p.admit, Events: protocol.ReceiverEvents{
		Connected: p.fed, Committed: p.brought, Disconnected: p.notFed,
		Refused: func(ctx context.Context, err *protocol.RefusedError) { p.server.Refused(ctx, errors.New(err.Message)) },
	}})
	p.server = transport.NewServer(transport.ServerOptions{
		Identity: a.identity, Log: a.log, Service: peerService{p.receiver, p}, Known: p.known, Volumes: len(a.options.Config.Volumes),
		Refused: func(who, why string) { a.hub.publish("", "", "peer-refused", who+": "+why) },
	})
	return p
}

// fed, brought and notFed log sessions, but not each of a node that comes again and
// again and brings nothing: its plan is to refuse, or what it offers is refused.
func (p *peers) fed(volume, from string, at protocol.Position) {
	p.mu.Lock()
	f := p.said[volume]
	if f == nil || f.from != from {
		f = &feeding{from: from}
		p.said[volume] = f
	}
	f.brought = false
	quiet := f.quiet
	p.mu.Unlock()
	p.say(quiet, "fed by", "volume", volume, "from", from, "position", at.String())
}

func (p *peers) brought(volume string, at protocol.Position) {
	p.mu.Lock()
	f := p.said[volume]
	news := f.quiet
	f.brought, f.quiet = true, false
	p.mu.Unlock()
	if news {
		p.say(false, "fed by", "volume", volume, "from", f.from, "position", at.String())
	}
}

func (p *peers) notFed(volume, from string, err error) {
	words := "it closed the session"
	if err != nil {
		words = err.Error()
	}
	p.mu.Lock()
	f := p.said[volume]
	known := f.quiet && f.last == words
	f.quiet, f.last = !f.brought, words
	p.mu.Unlock()
	p.say(known, "not fed any more", "volume", volume, "from", from, "reason", words)
}

// say logs what is no news for those alone who look closely.
func (p *peers) say(known bool, what string, args ...any) {
	level := slog.LevelInfo
	if known {
		level = slog.LevelDebug
	}
	p.log.Log(context.Background(), level, what, args...)
}

func (p *peers) add(v *config.Volume) *secondary {
	l := newLocalReplica(p.agent, v, v.Copy)
	l.receiver, l.name = p.receiver, v.Name // names differ, whatever ids disks turn out to have
	s := &secondary{peers: p, config: v, replica: l}
	p.volumes = append(p.volumes, s)
	return s
}

// run serves until ctx ends.
func (p *peers) run(ctx context.Context) {
	if p.agent.identity.Plaintext() {
		p.log.Warn("other nodes are not asked for certificates: nothing is encrypted, and who reaches "+p.node.Listen+" may write to replicas here", "listen", p.node.Listen)
	}
	var running sync.WaitGroup
	for _, s := range p.volumes {
		running.Go(func() { s.replica.run(ctx) })
	}
	running.Go(func() {
		<-ctx.Done()
		p.server.Stop()
	})
	said := ""
	heard := sync.OnceFunc(func() { close(p.listening) })
	for ctx.Err() == nil {
		l, err := transport.Listen(ctx, p.node.Listen)
		if err == nil {
			p.log.Info("listening for other nodes", "listen", l.Addr().String())
			said = ""
			heard()
			err = p.server.Serve(l) // closes it
		}
		if err != nil && ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			p.log.Warn("other nodes can't connect; it is tried again by itself", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryEvery):
		}
	}
	running.Wait()
}

// heardHere waits until other nodes can ask, for as long as one has to answer: who asks
// before that may be missed by one that asks at the same time.
func (p *peers) heardHere() {
	select {
	case <-p.listening:
	case <-time.After(askNode):
		p.log.Warn("other nodes are asked though none can ask here yet", "listen", p.node.Listen)
	}
}

// known reports whether a node has any business here.
func (p *peers) known(node string) bool {
	return slices.ContainsFunc(p.volumes, func(s *secondary) bool { return slices.Contains(s.config.Peers, node) }) ||
		slices.ContainsFunc(p.agent.volumes, func(m *managed) bool { return m.isPeer(node) })
}

func wrongVolume(format string, args ...any) error {
	return &protocol.RefusedError{Reason: proto.Reason_REASON_WRONG_VOLUME, Message: fmt.Sprintf(format, args...)}
}

// admit decides about one call: the node must be among the 'peers' of the volume it
// means, and a replica that has no volume yet becomes one of the first that is
// offered to it by its name.
func (p *peers) admit(ctx context.Context, a protocol.Admission) (protocol.Admitted, error) {
	return p.admitNode(ctx, transport.Caller(ctx), transport.Who(ctx), a)
}

func (p *peers) admitNode(ctx context.Context, node, from string, a protocol.Admission) (protocol.Admitted, error) {
	if a.Replica != p.node.Name {
		return protocol.Admitted{}, &protocol.RefusedError{Reason: proto.Reason_REASON_UNKNOWN_REPLICA,
			Message: fmt.Sprintf("this is node '%s', asked for is a replica at node '%s': see 'address' and 'peer' at node '%s'", p.node.Name, a.Replica, node)}
	}
	if a.VolumeUUID == protocol.AnyVolume {
		return protocol.Admitted{}, wrongVolume("%x is no volume's id", a.VolumeUUID)
	}
	if err := p.primaryHere(node, a); err != nil {
		return protocol.Admitted{}, err
	}
	s, err := p.find(node, a)
	if err != nil {
		return protocol.Admitted{}, err
	}
	who := protocol.Admitted{From: from, Name: s.config.Name}
	st, open, reason, _ := s.replica.status()
	switch {
	case !open:
		return who, &protocol.RefusedError{Reason: proto.Reason_REASON_STORAGE,
			Message: fmt.Sprintf("the replica of volume '%s' at node '%s' is not open: %s", s.config.Name, p.node.Name, reason)}
	case st.VolumeUUID == a.VolumeUUID:
		return who, nil
	case st.VolumeUUID != protocol.AnyVolume:
		return who, wrongVolume("volume '%s' at node '%s' is a replica of volume %s, node '%s' offers volume %s; nothing was written; only if what is there may be lost, at node '%[2]s': blockferry create --discard-my-data %[1]s",
			s.config.Name, p.node.Name, volume.UUID(st.VolumeUUID), node, volume.UUID(a.VolumeUUID))
	}
	for _, o := range p.volumes {
		if o != s && o.replica.lastVolume() == a.VolumeUUID {
			return who, wrongVolume("volume %s is '%s' at node '%s', and not '%s'", volume.UUID(a.VolumeUUID), o.config.Name, p.node.Name, s.config.Name)
		}
	}
	return who, s.become(ctx, node, a)
}

// find is the replica that a node means, and may have: of that id, or of that name.
func (p *peers) find(node string, a protocol.Admission) (named *secondary, err error) {
	for _, s := range p.volumes {
		st, open, _, _ := s.replica.status()
		same := open && st.VolumeUUID == a.VolumeUUID
		switch allowed := slices.Contains(s.config.Peers, node); {
		case same && allowed:
			return s, nil
		case same:
			verb := "written by"
			if a.Restore {
				verb = "read by"
			}
			err = wrongVolume("the replica of volume '%s' (%s) at node '%s' may not be %s node '%s': it is not among its 'peers'",
				s.config.Name, volume.UUID(a.VolumeUUID), p.node.Name, verb, node)
		case allowed && s.config.Name == a.Volume:
			named = s
		}
	}
	if named == nil && err == nil {
		err = wrongVolume("volume '%s' (%s) of node '%s' has no replica at node '%s': a volume has one name at all nodes, and 'peers' there lists those that may write to it",
			a.Volume, volume.UUID(a.VolumeUUID), node, p.node.Name)
	}
	return named, err
}

// become formats a replica that has no volume yet for the one that is offered.
func (s *secondary) become(ctx context.Context, node string, a protocol.Admission) error {
	ctx, cancel := context.WithTimeout(ctx, adoptLimit)
	defer cancel()
	// One at a time: the next finds a replica that has its volume.
	s.peers.adopting.Lock()
	defer s.peers.adopting.Unlock()
	if st, open, _, _ := s.replica.status(); open && st.VolumeUUID == a.VolumeUUID {
		return nil
	}
	size := int64(a.SizeBytes)
	if size < config.MinVolumeBytes || size > config.MaxVolumeBytes || size%protocol.BlockSize != 0 {
		return &protocol.RefusedError{Reason: proto.Reason_REASON_SIZE, Message: fmt.Sprintf("%d bytes are no volume's size", a.SizeBytes)}
	}
	one := adoption{format: func(diskBytes int64) (protocol.FormatOptions, error) {
		format, err := layout.Secondary(s.config, size, diskBytes)
		format.VolumeUUID = a.VolumeUUID
		return format, err
	}}
	if s.roles != nil {
		one.label = func(disk *blockdev.File) (protocol.FormatOptions, error) {
			return s.roles.label(disk, size, a.VolumeUUID)
		}
	}
	err := s.format(ctx, one, a.VolumeUUID)
	if err != nil {
		reason := proto.Reason_REASON_STORAGE
		if exit.Of(err) == exit.Refused {
			reason = proto.Reason_REASON_SIZE
		}
		return &protocol.RefusedError{Reason: reason,
			Message: fmt.Sprintf("the replica of volume '%s' at node '%s' can't take it: %v", s.config.Name, s.peers.node.Name, err)}
	}
	s.peers.log.Info("the replica is of this volume from now on", "volume", s.config.Name, "uuid", volume.UUID(a.VolumeUUID).String(), "size-bytes", size, "first-from", node)
	s.peers.agent.hub.publish(s.config.Name, "", "replica-adopted", "volume "+volume.UUID(a.VolumeUUID).String()+" of node "+node)
	return nil
}

// format has the replica formatted, and returns when it is open again.
func (s *secondary) format(ctx context.Context, become adoption, of [16]byte) error {
	become.done = make(chan error, 1)
	select {
	case s.replica.adopt <- become:
	case <-ctx.Done():
		return fmt.Errorf("it is not open: %w", ctx.Err())
	}
	if err := <-become.done; err != nil {
		return err
	}
	for {
		st, open, reason, change := s.replica.look()
		switch {
		case open && st.VolumeUUID == of:
			return nil
		case !open && reason != becoming:
			return errors.New(reason)
		}
		select {
		case <-change:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fedBy is the node that feeds the replica, "" if none does.
func (s *secondary) fedBy() string {
	for _, served := range s.peers.receiver.Status() {
		if served.Replica == s.config.Name && served.Session != nil {
			return served.Session.From
		}
	}
	return ""
}

// status is the replica as this node knows it.
func (s *secondary) status() status.Volume {
	v := status.Volume{Name: s.config.Name, Device: s.config.Device, Role: "Secondary", Disk: "DUnknown", Stage: "secondary", Restore: "manual",
		BothRoles: s.config.Switches(), Peers: s.config.Peers, Replicas: []status.Replica{}}
	st, open, reason, advice := s.replica.status()
	v.Reason, v.Advice, v.Lease = reason, advice, s.roles.keeps().status()
	v.Replicas = append(v.Replicas, s.roles.beside().status()...)
	if !open {
		return v
	}
	v.Disk = diskWord(st.State)
	if st.VolumeUUID == protocol.AnyVolume {
		v.Reason, v.Advice = "waiting for the first of "+strings.Join(s.config.Peers, ", ")+" to connect with a volume of this name",
			"at that node, name this one among the volume's 'replicas', with 'address' and 'peer: "+s.peers.node.Name+"'"
		return v
	}
	v.UUID, v.SizeBytes, v.TakeOver = volume.UUID(st.VolumeUUID).String(), st.SizeBytes, s.roles.takeOverStatus()
	if !st.Committed.IsZero() {
		v.Position = position(fmt.Sprintf("%x", st.Committed.Generation), st.Committed.Epoch)
		if st.CutUnixNanos > 0 {
			at := time.Unix(0, st.CutUnixNanos).UTC()
			v.CutAt = &at
		}
	}
	v.FedBy = s.fedBy()
	if k := st.Kept; k.Epoch > 0 {
		v.Kept = &status.Kept{Epoch: k.Epoch, Bytes: uint64(k.Bytes), Since: k.Since.UTC()}
	}
	switch {
	case st.Err != nil:
		v.Reason, v.Advice = st.Err.Error(), s.replica.advise(st.Err)
	case st.Reason != "":
		v.Reason = st.Reason
	case v.FedBy == "":
		v.Reason = "nobody feeds it: none of " + strings.Join(s.config.Peers, ", ") + " is connected; how far it is behind is known only there"
		v.Advice = "see 'blockferry status' at that node, and what is refused in the agent's log here"
	}
	if v.Reason == "" {
		v.Reason, v.Advice = s.peers.agent.disks.resizedWords(s.config.Device, s.config.Name)
	}
	if words, todo := s.replica.spillWords(st); words != "" && v.Reason == "" {
		v.Reason, v.Advice = words, todo
	}
	v.Reason = withHeld(v.Reason, st)
	return v
}
