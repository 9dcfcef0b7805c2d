package agent

import (
	"context"
	"encoding/hex"
	"fmt"
	"time"

	"blockferry/blockdev/dm"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/cmd/blockferry/lease"
	"blockferry/protocol"
)

// This file is about what a node does with a lease: who may take it by itself, when a copy
// takes over, when a volume is given up.

// copies is the record of a volume that is up here: what its disk holds, and the copies that
// lack no more than may be lost. nil: as it was.
func (s *switching) copies() *lease.Record {
	m := s.managed
	m.mu.Lock()
	r, at := m.running, m.stage
	m.mu.Unlock()
	if r != nil {
		return recordOf(s.lease.node, s.config, r.primary.Cut(), r.primary.Status().Replicas)
	}
	// It may be written, and nothing replicates that: what is on record must not count for longer.
	if (at == stageRefused || at == stageBusy) && m.leftUp() {
		if cut, err := s.cutOnDisk(); err == nil {
			return recordOf(s.lease.node, s.config, cut, nil)
		}
		return &lease.Record{Node: s.lease.node}
	}
	return nil
}

// recordOf is the record of a volume whose disk holds a cut. Of several copies beside the disk the
// furthest counts: it would be filled from that.
func recordOf(node string, v *config.Volume, cut protocol.Position, reports []protocol.ReplicaReport) *lease.Record {
	record := &lease.Record{Node: node, Copies: map[string]lease.Copy{}}
	if cut != (protocol.Position{}) {
		record.Disk = &lease.Copy{Generation: fmt.Sprintf("%x", cut.Generation), Epoch: cut.Epoch}
	}
	for _, c := range v.Replicas {
		at := c.Peer
		if at == "" {
			at = node
		}
		for i := range reports {
			r := &reports[i]
			if r.Name == c.Name && r.Connection == "Connected" && r.Epoch > record.Copies[at].Epoch && !r.LagIsMinimum && r.LagSeconds <= v.MaxLoss.Seconds() {
				record.Copies[at] = lease.Copy{Generation: r.Generation, Epoch: r.Epoch}
			}
		}
	}
	return record
}

// mayFollow says why a node's copy may not go on by itself where the last holder
// stopped; "": it may.
func mayFollow(r *lease.Record, node string, primary bool, has protocol.Lineage) string {
	switch {
	case r == nil && primary:
		return "" // nobody had it yet; what its disk says counts
	case r == nil:
		return "no node had the lease yet; at the one that is to begin: "
	}
	c, listed := r.Copies[node]
	switch {
	case r.Node == node && !listed && r.Disk == nil:
		return ""
	case r.Node == node && !listed:
		c = *r.Disk
	case !listed:
		return fmt.Sprintf("node '%s', which had it last, did not have this copy as close enough: it was away, or 'max-loss' behind; better take over where that is not so, or have that node back; else: ", r.Node)
	}
	var at protocol.Position
	raw, err := hex.DecodeString(c.Generation)
	if err != nil || len(raw) != len(at.Generation) {
		return fmt.Sprintf("the record names generation '%s', which is none; after a look: ", c.Generation)
	}
	copy(at.Generation[:], raw)
	at.Epoch = c.Epoch
	switch {
	case has.Until(at) != nil:
		return ""
	case r.Node == node:
		return fmt.Sprintf("this node had it last, with %v on its disk, which is at %v now: it went back, as by a snapshot that was restored; better take over where there is more; else, after a look: ", at, has.Tip())
	}
	return fmt.Sprintf("node '%s', which had it last, knew of %v here, and this copy is at %v: it went back; after a look: ", r.Node, at, has.Tip())
}

// watchLease takes the lease when it can be had, gives the volume up when it can't be
// kept, and has the copy here take over when it should, until ctx ends.
func (s *switching) watchLease(ctx context.Context) {
	k := s.lease
	var changed <-chan struct{}
	var of volume.UUID // which changed is about
	unwatch := func() {}
	defer func() { unwatch() }()
	for ctx.Err() == nil {
		s.findID()
		r, uuid, role := s.look()
		if uuid != of && !uuid.IsZero() {
			unwatch()
			watching, end := context.WithCancel(ctx)
			changed, of, unwatch = k.store.Watch(watching, uuid.String()), uuid, end
		}
		if r != roleUnknown && !uuid.IsZero() && s.op.TryLock() { // else a change of role is under way
			s.lookAtLease(ctx, r, uuid)
			s.op.Unlock()
		}
		var ending <-chan struct{}
		wait := k.ttl / 5
		if n := k.held(); n != nil {
			if _, ended, _ := n.state(); ended {
				wait = renewAgain / 2
			} else {
				ending = n.ending
			}
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-role:
		case <-ending:
		case <-time.After(wait):
		}
	}
	s.managed.op.Lock()
	s.releaseUnder(func(at stage) bool { return at == stageDown })
	s.managed.op.Unlock()
	// The volume stays up: the next agent has as long as can be.
	if n := k.held(); n != nil {
		n.stop()
		// Not where nothing replicates: what is on record would count for longer.
		if record := n.record(); record != nil {
			if _, ended, _ := n.state(); !ended {
				_ = n.renew(context.WithoutCancel(ctx), record)
			}
		}
	}
}

// findID reads the volume's id where the agent began before the disk had a label: with a
// lease it is needed before it is up.
func (s *switching) findID() {
	if r, uuid, _ := s.look(); r != rolePrimary || !uuid.IsZero() || !s.op.TryLock() {
		return
	}
	defer s.op.Unlock()
	if r, uuid, err := s.read(); err == nil && r == rolePrimary && !uuid.IsZero() {
		s.know(uuid)
	}
}

// lookAtLease does what is to be done now; op is held.
func (s *switching) lookAtLease(ctx context.Context, r role, uuid volume.UUID) {
	k := s.lease
	if n := k.held(); n != nil {
		if _, ended, why := n.state(); ended {
			s.giveUp(n, why)
		} else {
			k.told = false
			s.makeRoom()
		}
		return
	}
	k.busy = time.Time{}
	if r == rolePrimary {
		if err := s.managed.clearFenced(); err != nil {
			k.say("", "it ended here, and everything on the volume fails: %v", err)
			s.tellEnd("its lease ended, and everything on it fails") // the agent may have been away then
			s.waiting("close what uses it, such as with umount; then it can come up again, here or as another node's copy")
			return
		}
	}
	asking, cancel := context.WithTimeout(ctx, askEtcd)
	defer cancel()
	standing, err := k.store.Look(asking, uuid.String())
	h := standing.Holder
	if err != nil || h != nil {
		k.vacant = time.Time{}
	}
	if h != nil && h.Node != k.node {
		k.declined = false
	}
	switch {
	case err != nil:
		k.say("", "etcd does not say who has it: %v", err)
	case k.ours(h):
		s.resumeLease(asking, r, uuid, *h)
	case h != nil && h.Node == k.node:
		k.say(h.Node, "this node had it before the machine was started anew, or another machine of its name has it; it is taken when it has ended")
	case h != nil && r == rolePrimary:
		k.say(h.Node, "node '%s' has it", h.Node)
		s.follow(ctx, h.Node)
	case h != nil:
		k.say(h.Node, "node '%s' has it", h.Node)
	default:
		s.campaign(ctx, r, uuid, standing.Record)
	}
	s.waiting("")
}

// makeRoom gives the lease up of a volume that can't be brought up here: nobody can be
// writing it, and another node may be able to bring it up.
func (s *switching) makeRoom() {
	k, m := s.lease, s.managed
	if !m.op.TryLock() {
		return // it may be coming up right now
	}
	defer m.op.Unlock()
	if m.at() != stageBusy {
		k.busy = time.Time{}
	} else if k.busy.IsZero() {
		k.busy = time.Now()
	}
	why := m.why()
	if s.releaseUnder(func(at stage) bool {
		return at == stageRefused || at == stageAbsent || at == stageBlank || at == stageBusy && time.Since(k.busy) >= k.ttl
	}) {
		k.log.Warn("the lease is given up: the volume can't be brought up here", "reason", why)
		k.pause, k.left = time.Now().Add(2*k.ttl), why
		k.busy = time.Time{}
	}
}

// releaseUnder gives the lease up if the volume is where it must be for that, and down;
// managed.op is held, so that it does not come up meanwhile.
func (s *switching) releaseUnder(at func(stage) bool) bool {
	if s.lease.held() == nil || !at(s.managed.at()) || s.managed.leftUp() {
		return false
	}
	s.lease.release()
	return true
}

// waiting says of a primary without its lease what it waits for.
func (s *switching) waiting(advice string) {
	if err := s.lease.mayWrite(); err != nil && s.at() == rolePrimary {
		switch m := s.managed; m.at() {
		case stageStarting, stageWaiting:
			m.set(stageWaiting, err.Error(), advice)
		}
	}
}

// clearFenced takes a volume down whose lease ended, so that everything on it fails.
// Those who use it keep it up.
func (m *managed) clearFenced() error {
	m.op.Lock()
	defer m.op.Unlock()
	exists, err := m.stackExists()
	if err != nil || !exists {
		return nil // which is said elsewhere
	}
	if table, err := m.agent.dm.Table(m.config.Name); err != nil || !dm.Failing(table) {
		return nil
	}
	return volume.Down(m.agent.dm, m.config.Name)
}

// resumeLease goes on where an earlier process of this node stopped.
func (s *switching) resumeLease(ctx context.Context, r role, uuid volume.UUID, h lease.Claim) {
	k := s.lease
	if r != rolePrimary {
		// It was to take over, and did not: nobody writes.
		k.say(k.node, "it was taken to take over, which did not come to its end; it ends by itself")
		return
	}
	l, err := k.store.Resume(ctx, uuid.String(), h)
	if err != nil {
		k.say(k.node, "it was had by an earlier process here, and can't be taken over: %v", err)
		return
	}
	k.log.Info("the lease is taken over from an earlier process", "lease", h.Lease)
	k.have(l)
	s.managed.wake()
}

// campaign is for a lease that nobody has.
func (s *switching) campaign(ctx context.Context, r role, uuid volume.UUID, record *lease.Record) {
	k := s.lease
	if k.vacant.IsZero() {
		k.vacant = time.Now()
	}
	if k.declined {
		k.say("", "nobody has it; the operator had this node stand down")
		return
	}
	has, err := s.holds(r)
	if err != nil {
		k.say("", "nobody has it, and this copy can't take over: %v", err)
		return
	}
	if why := mayFollow(record, k.node, r == rolePrimary, has); why != "" {
		k.say("", "nobody has it; this copy does not take over by itself: %sblockferry primary --force %s", why, s.config.Name)
		return
	}
	if down := s.managed.at() == stageDown && r == rolePrimary; down || time.Now().Before(k.pause) {
		why := k.left
		if down {
			why = s.managed.why()
		}
		k.say("", "nobody has it; it is left to others: %s", why)
		return
	}
	if r == rolePrimary {
		if err := k.need(ctx, uuid, true, has, false); err != nil {
			k.say("", "%v", err)
			return
		}
		s.managed.wake()
		return
	}
	// The one that has more comes first, for a while.
	switch ahead := s.ahead(ctx, uuid, has); {
	case ahead != "" && record.Node == k.node:
		k.say("", "nobody has it; this node wrote the volume last, but %s has more: the copy here went back. After a look: blockferry primary --force %s", ahead, s.config.Name)
		return
	case ahead != "" && time.Since(k.vacant) < k.ttl/2:
		k.say("", "nobody has it; %s has more, and is waited for", ahead)
		return
	}
	k.say("", "nobody has it; this copy takes over")
	message, err := s.primary(ctx, true)
	if err != nil {
		k.log.Warn("it does not take over by itself", "error", err)
		k.say("", "it does not take over by itself: %v", err)
		k.pause, k.left = time.Now().Add(k.ttl/2), err.Error()
		return
	}
	k.log.Info("took over by itself", "detail", message)
}

// holds is what the disk here holds, as primary or as a copy that could take over.
func (s *switching) holds(r role) (protocol.Lineage, error) {
	if r == rolePrimary {
		return s.onDisk()
	}
	st, err := s.promotable()
	if err == nil && (st.State != protocol.DiskConsistent || st.NeedsFull) {
		err = fmt.Errorf("it is %s %s", st.State, st.Reason)
	}
	return st.Lineage, err
}

// ahead names a node that says that it has more, or other, than a copy here; "": none does.
func (s *switching) ahead(ctx context.Context, uuid volume.UUID, has protocol.Lineage) string {
	ctx, cancel := context.WithTimeout(ctx, askNode/3)
	defer cancel()
	said, _ := s.ask(ctx, uuid)
	for node, h := range said {
		if kind := protocol.Compare(has, h.lineage).Kind; len(h.lineage) > 0 && kind != protocol.Ahead && kind != protocol.Same {
			return "node '" + node + "'"
		}
	}
	return ""
}

// follow has a disk that was primary follow the node that has the lease.
func (s *switching) follow(ctx context.Context, node string) {
	// A stack from before the volume had a lease is nobody else's to fail.
	s.managed.op.Lock()
	err := s.lease.fail()
	s.managed.op.Unlock()
	if err != nil {
		s.lease.say(node, "node '%s' has it, and the volume here may still be written: %v", node, err)
		return
	}
	message, err := s.secondary(ctx, true)
	s.lease.declined = false // it is not the operator's word
	if err != nil {
		s.lease.say(node, "node '%s' has it, and this one does not follow it yet: %v", node, err)
		return
	}
	s.log.Warn("stood down: another node has the lease", "node", node, "detail", message)
}

// giveUp takes a volume down whose lease ends: in order, if nobody uses it; else it
// fails at its deadline, and is down when those who use it have closed it.
func (s *switching) giveUp(n *tenure, why string) {
	s.tellEnd(why)
	m := s.managed
	m.op.Lock()
	defer m.op.Unlock()
	m.mu.Lock()
	stack, _ := m.stack.(*volume.Volume)
	r := m.running
	m.mu.Unlock()
	left := n.left()
	if stack != nil && left > 0 {
		if stack.Opened() != nil {
			return // it is the dead-man's
		}
		ctx, cancel := context.WithTimeout(context.Background(), left)
		defer cancel()
		stack.RollNext()
		_, _, _ = r.primary.SyncNow(ctx) // as far as it comes
		clean, gone, err := m.sealAndStop(ctx, stack, r)
		m.forget()
		s.log.Warn("the volume was given up", "reason", why, "clean", clean, "error", err)
		if gone {
			s.lease.release()
		}
		s.lost(why)
		return
	}
	if left > 0 && stack == nil {
		if exists, err := m.stackExists(); err == nil && !exists {
			s.lease.release()
			s.lost(why)
			return
		}
	}
	if left > 0 {
		return
	}
	// The dead-man has done so, unless it was killed, or never had the deadline.
	if err := s.lease.fail(); err != nil {
		if words := err.Error(); words != s.lease.unfenced {
			s.lease.unfenced = words
			s.log.Error("a volume whose lease has ended may still be written", "error", err)
		}
		return
	}
	s.lease.unfenced = ""
	if err := m.letGo(); err != nil {
		s.log.Warn("the volume was not let go cleanly", "error", err)
	}
	s.lease.drop()
	s.lost(why)
}

// tellEnd has what uses a volume end whose lease ends, or has ended, once, and does not wait for it:
// the deadline comes whether or not it has ended.
func (s *switching) tellEnd(why string) {
	if s.lease.told {
		return
	}
	s.lease.told = true
	s.managed.hooks.Tell(hooks.BeforeDemote, hooks.Info{Device: s.managed.path(), Reason: why})
}

// lost says that a volume has no lease any more. One that the operator took down stays so.
func (s *switching) lost(why string) {
	if s.managed.at() != stageDown {
		s.managed.set(stageWaiting, "its lease ended: "+why, "close what uses it; another node may write the volume")
	}
	s.lease.say("", "it ended here: %s", why)
}
