package agent

import (
	"context"
	"sync"
	"time"

	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/status"
	"blockferry/protocol"
)

const (
	// cascadeHold is how long the copy's next epochs may wait in its journal for what its
	// replicas read of one.
	cascadeHold = 2 * time.Second
	// cascadeLook is how often is looked whether the copy can be passed on.
	cascadeLook = 500 * time.Millisecond
)

// cascadeLast is how long one that ends may take to bring the newest epoch to its replicas:
// a volume that takes over waits for that. Tests give it more.
var cascadeLast = time.Second

// cascade feeds the replicas beside a copy from it, at the positions of the node that
// writes, while the volume is secondary. Those at other nodes are fed by that node.
type cascade struct {
	managed  *managed
	replicas []*config.Replica

	mu     sync.Mutex
	feeder *protocol.Primary // nil: they are not fed
	why    error             // then
}

// newCascade has a copy feed the replicas beside it; nil: there are none.
func newCascade(m *managed, on *localReplica) *cascade {
	local := m.config.Local()
	if len(local) == 0 {
		return nil
	}
	c := &cascade{managed: m, replicas: local}
	on.feeds = c.begin
	return c
}

// beside is what feeds the replicas beside the copy; nil: there are none. A nil s has none.
func (s *switching) beside() *cascade {
	if s == nil {
		return nil
	}
	return s.cascade
}

// begin feeds them from the open copy until end.
func (c *cascade) begin(from *protocol.Replica) (end func()) {
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c.run(ctx, from)
	}()
	return func() {
		stop()
		<-ended
	}
}

// run begins anew, with nothing remembered, whenever the copy went another way, or was not
// whole for a while.
func (c *cascade) run(ctx context.Context, from *protocol.Replica) {
	defer c.set(nil, nil)
	tick := time.NewTicker(cascadeLook)
	defer tick.Stop()
	for ctx.Err() == nil {
		source, feeder, err := c.feed(from)
		c.set(feeder, err)
		if err == nil {
			err = c.watch(ctx, tick.C, source)
			c.managed.log.Info("the replicas beside the copy are not fed any more", "reason", err)
			c.end(feeder, ctx.Err() != nil)
			continue
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

// feed starts to.
func (c *cascade) feed(from *protocol.Replica) (*protocol.ReplicaSource, *protocol.Primary, error) {
	source, err := protocol.FollowReplica(from)
	if err != nil {
		return nil, nil, err
	}
	m := c.managed
	replicas, err := m.fed(c.replicas)
	if err != nil {
		return nil, nil, err
	}
	feeder, err := protocol.NewFollower(protocol.PrimaryConfig{
		Volume: m.config.Name, VolumeUUID: from.Status().VolumeUUID, Source: source, Replicas: replicas,
		Interval: m.config.Interval, CutLimit: cascadeHold, Events: m.withHooks(m.events()),
	})
	return source, feeder, err
}

// watch returns why the copy can't be passed on any more, or when ctx ends.
func (c *cascade) watch(ctx context.Context, tick <-chan time.Time, source *protocol.ReplicaSource) error {
	for {
		if st := source.Standing(); st.Err != nil {
			return st.Err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick:
		}
	}
}

// end stops the feeder; with last, after what was committed last.
func (c *cascade) end(feeder *protocol.Primary, last bool) {
	ctx, cancel := context.WithTimeout(context.Background(), cascadeLast)
	defer cancel()
	if !last {
		cancel()
	}
	_, _ = feeder.Stop(ctx, nil) // there is nothing to seal
}

func (c *cascade) set(feeder *protocol.Primary, why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.feeder, c.why = feeder, why
}

func (c *cascade) look() (*protocol.Primary, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.feeder, c.why
}

// retry connects at once to a replica that is there again. A nil c does nothing.
func (c *cascade) retry(replica string) {
	if c == nil {
		return
	}
	if feeder, _ := c.look(); feeder != nil {
		feeder.Retry(replica)
	}
}

// status is where they stand beside the copy, which may itself be behind the node that
// writes. A nil c has none.
func (c *cascade) status() (all []status.Replica) {
	if c == nil {
		return nil
	}
	feeder, why := c.look()
	var fed protocol.PrimaryStatus
	if feeder != nil {
		fed = feeder.Status()
	}
	for _, l := range c.managed.replicas {
		s := c.managed.replicaStatus(l, fed)
		if own, open, _, _ := l.status(); open && own.CutUnixNanos > 0 {
			at := time.Unix(0, own.CutUnixNanos).UTC()
			s.CutAt = &at
		}
		if feeder == nil && s.Reason == "" {
			s.Reason = "the copy here is not open"
			if why != nil {
				s.Reason = "the copy here can't be passed on: " + why.Error()
			}
			s.Advice = "see this volume's own reason; it is fed again by itself"
		}
		all = append(all, s)
	}
	return all
}
