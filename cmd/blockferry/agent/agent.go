// Package agent is the long-running part of blockferry: it brings volumes up,
// replicates them, keeps local replicas, and answers the commands. It joins
// blockdev and protocol and decides nothing that they can decide.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"blockferry/blockdev/bpf"
	"blockferry/blockdev/deadman"
	"blockferry/blockdev/dm"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/status"
	"blockferry/cmd/blockferry/transport"
	"blockferry/proto"
	"blockferry/protocol"
)

const (
	// stopLimit is how long a stop may take; what is unfinished then is void
	// and is done again after the next start.
	stopLimit = 20 * time.Second
	// retryEvery is how often something that is not there is looked for.
	retryEvery = 5 * time.Second
	// retryBusy is the same for a disk that somebody else has, at first.
	retryBusy = time.Second
	// retryRefused is the same, at most, for what was refused.
	retryRefused = time.Minute
	// retryPeer is how long at most a node that is away is waited with.
	retryPeer = 10 * time.Second
)

// Options is what an agent is started with.
type Options struct {
	Config  *config.Config
	Socket  string
	Log     *slog.Logger
	Version string
	System  *doctor.System
	// DeadMan says who resumes devices that the agent left suspended.
	DeadMan deadman.GuardOptions
	// StateDir is the folder of what is remembered until the next start; "": nothing is.
	StateDir string
}

// Agent runs the volumes of one configuration.
type Agent struct {
	options  Options
	log      *slog.Logger
	hub      *hub
	dm       *dm.Control // nil: no volume is on a mapper
	receiver *protocol.Receiver
	volumes  []*managed
	roles    []*switching        // of those that have both roles
	identity *transport.Identity // nil: no other node is known
	leases   leaseStore          // nil: no volume has a lease
	peers    *peers              // nil: nothing is taken from other nodes
	stopping chan struct{}       // closed when the agent begins to stop
	disks    *disks              // those of all volumes
	asking   atomic.Bool         // alive waits for an answer
}

// Run is an agent's whole life. It returns when ctx ends, nil if it stopped
// in an orderly way; volumes stay up.
func Run(ctx context.Context, o Options) error {
	kernel := o.System.Kernel(o.Config.Volumes...)
	if err := kernel.Err(); err != nil {
		return err
	}
	a := &Agent{options: o, log: o.Log, hub: newHub(), stopping: make(chan struct{})}
	listener, closeListener, err := Listen(o.Socket, "agent", "--socket")
	if err != nil {
		return err
	}
	defer closeListener()
	// What a cut needs must not have to be read from the disk it stopped.
	if err := deadman.LockMemory(); err != nil {
		a.log.Warn("memory is not locked; a machine short of memory may void cuts", "error", err)
	}
	if slices.ContainsFunc(o.Config.Volumes, func(v *config.Volume) bool { return !v.Attach && !v.Secondary() }) {
		if a.dm, err = dm.Open(); err != nil {
			return exit.Mark(exit.Prerequisite, err)
		}
		defer a.dm.Close()
	}
	a.receiver = protocol.NewReceiver(protocol.ReceiverConfig{WindowBytes: protocol.LocalWindowBytes})
	defer a.receiver.Close()
	if node := o.Config.Node; node != nil {
		a.identity = transport.NewIdentity(node.Name, node.Certs, a.log)
		if node.Listen != "" {
			a.peers = newPeers(a)
			defer a.peers.receiver.Close()
		}
	}
	defer a.openLeases()()
	for _, v := range o.Config.Volumes {
		switch {
		case v.Secondary():
			a.peers.add(v)
		case v.Switches():
			s := newSwitching(newManaged(a, v), a.peers.add(v))
			a.volumes, a.roles = append(a.volumes, s.managed), append(a.roles, s)
		default:
			a.volumes = append(a.volumes, newManaged(a, v))
		}
	}
	a.disks = newDisks(a)
	a.unpinStale(pinRoot)
	server := grpc.NewServer(grpc.UnaryInterceptor(a.wireUnary), grpc.StreamInterceptor(a.wireStream))
	proto.RegisterControlServer(server, control{agent: a})
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()

	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var running sync.WaitGroup
	running.Go(func() { a.disks.run(work) })
	for _, v := range a.volumes {
		running.Go(func() { v.run(work) })
	}
	if a.peers != nil {
		running.Go(func() { a.peers.run(work) })
	}
	for _, s := range a.roles {
		running.Go(func() { s.run(work) })
		if s.lease != nil {
			running.Go(func() { s.watchLease(work) })
		}
	}
	n := notifier{a.log}
	running.Go(func() { n.watch(work, a.alive, a.summary) })
	n.ready()
	a.log.Info("agent started", "version", o.Version, "socket", o.Socket, "volumes", len(o.Config.Volumes), "pid", os.Getpid())

	select {
	case <-ctx.Done():
		err = nil
	case err = <-served:
		err = fmt.Errorf("the socket's server ended: %w", err)
	}
	n.stopping()
	close(a.stopping)
	stop()
	return errors.Join(err, a.stop(server, &running))
}

// owner names this agent to what it leaves in the kernel.
func (a *Agent) owner() string {
	path, err := filepath.Abs(a.options.Config.Path)
	if err != nil {
		return a.options.Config.Path
	}
	return path
}

// unpinStale ends the tracking of volumes that this configuration had once: each
// costs every write to its disk some time, until the machine is started anew.
func (a *Agent) unpinStale(root string) {
	ended, err := bpf.UnpinStale(root, a.owner(), func(name string) bool {
		return slices.ContainsFunc(a.options.Config.Volumes, func(v *config.Volume) bool { return v.Name == name })
	})
	for _, name := range ended {
		a.log.Info("tracking ended of a volume that is not configured any more", "volume", name)
	}
	if err != nil {
		a.log.Warn("tracking of volumes that are not configured any more may go on", "error", err)
	}
}

// stop waits for everything, at most for stopLimit.
func (a *Agent) stop(server *grpc.Server, running *sync.WaitGroup) error {
	done := make(chan struct{})
	go func() { running.Wait(); server.Stop(); close(done) }()
	select {
	case <-done:
		a.log.Info("agent stopped; volumes stay up")
		return nil
	case <-time.After(stopLimit):
		return exit.Errorf(exit.Timeout, "the agent did not stop within %s; the process ends all the same, devices are resumed by the dead-man", stopLimit)
	}
}

// untilStop is a context that also ends when the agent begins to stop: no
// request keeps it from that.
func (a *Agent) untilStop(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-a.stopping:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// one finds a volume by name; with an empty name the only one.
func (a *Agent) one(name string) (*managed, error) {
	v, err := a.options.Config.Volume(name)
	if err != nil {
		return nil, err
	}
	for _, m := range a.volumes {
		if m.config == v {
			return m, m.notSecondary()
		}
	}
	if v.Secondary() {
		return nil, exit.Errorf(exit.Refused, "volume '%s' is only a replica here ('role: secondary'): that is said to the node that writes it, one of %s", v.Name, strings.Join(v.Peers, ", "))
	}
	return nil, fmt.Errorf("volume '%s' is not managed", name)
}

// notSecondary refuses what is for a primary. The role changes with op held: what acts on
// the volume asks again then.
func (m *managed) notSecondary() error {
	if m.roles.at() != roleSecondary {
		return nil
	}
	return exit.Errorf(exit.Refused, "volume '%s' is secondary here: that is said to the node that writes it, one of %s; to write it here: blockferry primary %[1]s",
		m.config.Name, strings.Join(m.config.Peers, ", "))
}

// statuses are those of all volumes, or of one, in the order of their names.
func (a *Agent) statuses(name string) ([]status.Volume, error) {
	found := []status.Volume{}
	for _, v := range a.volumes {
		if (name == "" || v.config.Name == name) && v.roles.at() != roleSecondary {
			found = append(found, v.status())
		}
	}
	if a.peers != nil {
		for _, s := range a.peers.volumes {
			if (name == "" || s.config.Name == name) && (s.roles == nil || s.roles.at() == roleSecondary) {
				found = append(found, s.status())
			}
		}
	}
	if len(found) == 0 && name != "" {
		_, err := a.one(name)
		return nil, err
	}
	slices.SortFunc(found, func(a, b status.Volume) int { return strings.Compare(a.Name, b.Name) })
	return found, nil
}

// alive asks every volume for an answer: one that is stuck keeps the
// watchdog from being fed.
func (a *Agent) alive(ctx context.Context) error {
	if !a.asking.CompareAndSwap(false, true) {
		return errors.New("a volume has not answered since it was asked the last time")
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		defer a.asking.Store(false)
		_, _ = a.statuses("")
	}()
	select {
	case <-answered:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// summary is a line for the service manager.
func (a *Agent) summary() string {
	var words []string
	all, _ := a.statuses("")
	for i := range all {
		s := &all[i]
		word := s.Name + " " + s.Disk
		for _, r := range s.Replicas {
			word += ", " + r.Name + " " + r.Disk
		}
		words = append(words, word)
	}
	return strings.Join(words, "; ")
}

// present is the state as events, ended by 'now'.
func (a *Agent) present() []*proto.Event {
	at := time.Now().UnixNano()
	var events []*proto.Event
	all, _ := a.statuses("")
	for i := range all {
		s := &all[i]
		events = append(events, &proto.Event{UnixNanos: at, Volume: s.Name, Kind: "volume", Message: "role:" + s.Role + " disk:" + s.Disk})
		for _, r := range s.Replicas {
			events = append(events, &proto.Event{UnixNanos: at, Volume: s.Name, Replica: r.Name, Kind: "replica",
				Message: "connection:" + r.Connection + " replication:" + r.Replication + " disk:" + r.Disk})
		}
	}
	return append(events, &proto.Event{UnixNanos: at, Kind: "now"})
}
