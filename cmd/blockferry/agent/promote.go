package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/cmd/blockferry/layout"
	"blockferry/cmd/blockferry/progress"
	"blockferry/proto"
	"blockferry/protocol"
)

// reached runs the hook of a point in a change of role; op is held, managed.op is not.
// Only what is before it can refuse it; elsewhere what failed is logged, by the hook.
func (s *switching) reached(ctx context.Context, at hooks.Event, position protocol.Position, words string) error {
	s.log.Info("change of role", "at", string(at), "detail", words)
	s.agent.hub.publish(s.config.Name, "", string(at), words)
	before := at == hooks.BeforePromote || at == hooks.BeforeDemote
	if !before {
		ctx = context.WithoutCancel(ctx) // it has happened, even if whoever asked for it has gone
	}
	err := s.hook(ctx, at, hooks.Info{Device: s.managed.path(), Generation: fmt.Sprintf("%x", position.Generation), Epoch: position.Epoch, Reason: words})
	if before {
		return err
	}
	return nil
}

// hook runs a hook and waits for it. Commands that would wait for op are refused
// meanwhile: they may come from that very hook.
func (s *switching) hook(ctx context.Context, at hooks.Event, info hooks.Info) error {
	s.waitFor(at)
	defer s.waitFor("")
	return s.managed.hooks.Run(ctx, at, info)
}

func (s *switching) waitFor(hook hooks.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waits = hook
}

// lock takes op, unless it is held for a hook.
func (s *switching) lock() error {
	if s.op.TryLock() {
		return nil
	}
	s.mu.Lock()
	hook := s.waits
	s.mu.Unlock()
	if hook != "" {
		return exit.Errorf(exit.Refused, "volume '%s': its role is being changed, and hook '%s' of that has not ended; repeat it then; a hook that changes the role itself would wait for its own end: have it start that by the service manager (systemd-run), and end",
			s.config.Name, hook)
	}
	s.op.Lock()
	return nil
}

// fence has the hook see to it that the nodes which do not answer write no more; off is known to.
func (s *switching) fence(ctx context.Context, silent map[string]string, off []string, position protocol.Position) error {
	for _, node := range s.config.Peers {
		why, is := silent[node]
		if !is || slices.Contains(off, node) {
			continue
		}
		info := hooks.Info{Peer: node, Generation: fmt.Sprintf("%x", position.Generation), Epoch: position.Epoch, Reason: why}
		for _, r := range s.config.Replicas {
			if r.Peer == node {
				info.Replica = r.Name
			}
		}
		if err := s.hook(ctx, hooks.FencePeer, info); err != nil {
			return err
		}
	}
	return nil
}

// changeRole is a command that changes a volume's role.
func (c control) changeRole(ctx context.Context, r *proto.VolumeRequest, do func(*switching, context.Context, bool) (string, error)) (*proto.Done, error) {
	v, err := c.agent.options.Config.Volume(r.Volume)
	if err != nil {
		return nil, err
	}
	for _, s := range c.agent.roles {
		if s.config != v {
			continue
		}
		ctx, end := c.agent.untilStop(ctx)
		defer end()
		if err := s.lock(); err != nil {
			return nil, err
		}
		defer s.op.Unlock()
		message, err := do(s, ctx, r.Force)
		if err != nil {
			s.log.Warn("the role was not changed", "error", err)
			return nil, err
		}
		return &proto.Done{Message: v.Name + ": " + message}, nil
	}
	return nil, exit.Errorf(exit.Refused, "volume '%s' has one role here: to have both it needs 'peers' and 'replicas' in the configuration", v.Name)
}

// primary has the copy here take over; op is held.
func (s *switching) primary(ctx context.Context, force bool) (string, error) {
	return s.primaryWithout(ctx, force, nil)
}

// primaryWithout is primary where the nodes off are known to write the volume no more: they
// need not answer, and what only they have is given up. Any other node counts as ever.
func (s *switching) primaryWithout(ctx context.Context, force bool, off []string) (string, error) {
	for _, node := range off {
		if !slices.Contains(s.config.Peers, node) {
			return "", exit.Errorf(exit.Usage, "volume '%s': node '%s' is not among its 'peers' (%s)", s.config.Name, node, strings.Join(s.config.Peers, ", "))
		}
	}
	switch s.at() {
	case roleUnknown:
		return "", exit.Errorf(exit.Refused, "volume '%s': %s", s.config.Name, s.managed.why())
	case rolePrimary:
		if err := s.needHere(ctx, force); err != nil {
			return "", err
		}
		s.decide(forcedIf(force)) // by force also where another node went on from what it has
		message, err := s.managed.up(ctx)
		s.decide(undecided) // it counts for this try alone: what is found later may be another node's
		if err != nil {
			return "", err
		}
		return "is primary already: " + message, nil
	}
	begun := time.Now()
	st, err := s.promotable()
	if err != nil {
		return "", err
	}
	// Of two that are asked to take over at once, at least one hears of the other.
	s.promote(st.Lineage)
	defer s.promote(nil)
	if err := s.lease.need(ctx, st.VolumeUUID, false, st.Lineage, force); err != nil {
		return "", err
	}
	taken := false
	defer func() {
		if !taken {
			s.lease.release()
		}
	}()
	heard, plan, words, silent, err := s.planTakeOver(ctx, st, force, nil, off)
	if err != nil {
		return "", err
	}
	s.log.Info("takes over", "position", st.Lineage.Tip().String(), "forced", force, "fenced", off, "loss", plan.Loss.String(), "heard", words)
	if err := s.reached(ctx, hooks.BeforePromote, st.Lineage.Tip(), plan.Loss.String()); err != nil {
		return "", exit.Mark(exit.Refused, err)
	}
	if err := s.fence(ctx, silent, off, st.Lineage.Tip()); err != nil {
		return "", exit.Mark(exit.Refused, err)
	}
	if !s.managed.hooks.Has(hooks.FencePeer) {
		silent = nil
	}
	if s.managed.hooks.Has(hooks.BeforePromote) || len(silent) > 0 { // they may have taken long
		if st, err = s.promotable(); err != nil {
			return "", err
		}
		if heard, _, _, _, err = s.planTakeOver(ctx, st, force, silent, off); err != nil {
			return "", err
		}
	}
	s.copy.replica.park("it takes over")
	if err := s.lease.proved(ctx); err != nil { // what was before may have taken longer than it lives
		s.copy.replica.unpark()
		return "", exit.Errorf(exit.Refused, "volume '%s': the copy here does not take over: its lease ends: %w; repeat it", s.config.Name, err)
	}
	did, err := s.takeOver(ctx, heard, force || heard.givenUp)
	if err != nil && !errors.Is(err, protocol.ErrTookOver) {
		if s.roleOnDisk() == rolePrimary { // what failed came after the label
			taken = true
			s.decide(forcedIf(force))
			s.set(rolePrimary, st.VolumeUUID)
			s.unhear()
			return "", fmt.Errorf("it is primary, and is brought up by itself: %w", err)
		}
		s.copy.replica.unpark() // where the disk is settled
		return "", exit.Mark(exit.Refused, err)
	}
	taken = true
	s.decide(forced) // the nodes were asked just now, and hear of this one since
	up, err := s.startTaken(st.VolumeUUID)
	if err != nil {
		s.decide(forcedIf(force))
		return "", fmt.Errorf("it is primary, and not up: %w", err)
	}
	message := fmt.Sprintf("primary from %v on, %s, in %s: %s", st.Lineage.Tip(), up, progress.FormatDuration(time.Since(begun)), did.Loss)
	return message, s.reached(ctx, hooks.AfterPromote, st.Lineage.Tip(), message)
}

// needHere takes the lease for a disk that is a primary's already.
func (s *switching) needHere(ctx context.Context, force bool) error {
	if s.lease == nil {
		return nil
	}
	_, uuid, _ := s.look()
	has, err := s.onDisk()
	if err != nil {
		return exit.Mark(exit.Refused, err)
	}
	return s.lease.need(ctx, uuid, true, has, force)
}

// startTaken brings up what took over. The volume's own look comes after that: a stack
// is adopted once.
func (s *switching) startTaken(uuid volume.UUID) (string, error) {
	m := s.managed
	m.op.Lock()
	defer m.op.Unlock()
	m.set(stageStarting, "it took over", "")
	s.set(rolePrimary, uuid)
	s.unhear()
	return m.upHeld()
}

// roleOnDisk is the role that counts after an error; unknown: it can't be read.
func (s *switching) roleOnDisk() role {
	r, _, err := s.read()
	if err != nil {
		s.log.Warn("the role can't be read from the disk", "error", err)
		return roleUnknown
	}
	return r
}

// planTakeOver asks the other nodes and says what taking over would lose, or why it is
// refused; words tell what they said, and silent why some did not. Where one serves that was
// fenced, by the hook or by the word of who asks (off), it is refused by force, too: whoever
// trusts a fence has no second writer.
func (s *switching) planTakeOver(ctx context.Context, st protocol.ReplicaStatus, force bool, fenced map[string]string, off []string) (_ knowledge, _ protocol.Promotion, words string, silent map[string]string, err error) {
	heard, words, silent := s.hear(ctx, st, fenced, off)
	if node := heard.unended; node != "" {
		who, mend := "hook 'fence-peer'", "mend the hook"
		if slices.Contains(off, node) {
			who, mend = "--fenced", "fence it"
		}
		s.log.Error("a node writes the volume though it was fenced", "node", node, "by the word of", who)
		return heard, protocol.Promotion{}, words, silent, exit.Errorf(exit.Refused, "volume '%s': the copy here does not take over, also by --force: %s said that node '%s' writes the volume no more, and that node says that it is primary and up; "+
			"%s, or at that node: blockferry down %[1]s; then repeat it", s.config.Name, who, node, mend)
	}
	st.PendingEpochs = 0 // they are applied first
	plan, err := protocol.PlanTakeOver(st, protocol.TakeOverOptions{Heard: heard.beside(st.Lineage), Force: force || heard.givenUp, Fresh: protocol.Generation{1}})
	if err != nil {
		err = exit.Errorf(exit.Refused, "volume '%s': %w (%s)", s.config.Name, err, words)
	}
	return heard, plan, words, silent, err
}

// promotable is the state of a copy that may take over as far as it knows itself.
func (s *switching) promotable() (protocol.ReplicaStatus, error) {
	refuse := func(format string, args ...any) (protocol.ReplicaStatus, error) {
		return protocol.ReplicaStatus{}, exit.Errorf(exit.Refused, "volume '%s': the copy here does not take over: "+format, append([]any{s.config.Name}, args...)...)
	}
	st, open, reason, advice := s.copy.replica.status()
	switch {
	case !open:
		return refuse("it is not open: %s; %s", reason, advice)
	case st.VolumeUUID == protocol.AnyVolume:
		return refuse("it never had a volume")
	case st.Err != nil:
		return refuse("%w; it is opened again by itself", st.Err)
	case st.DataOffset == 0:
		return refuse("its disk was formatted when it was only a replica here, and has no room for a label; make it anew, which loses this copy until it is filled again: "+
			"stop the agent, have 'role: secondary' in the configuration, blockferry create --discard-my-data %s, start the agent", s.config.Name)
	}
	return st, nil
}

// takeOver has the parked replica's disk become the volume's.
func (s *switching) takeOver(ctx context.Context, heard knowledge, force bool) (did protocol.Promotion, err error) {
	disk, err := udev.Open(s.config.Device, blockdev.OpenOptions{Write: true, Exclusive: true})
	if err != nil {
		return did, err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	options, err := s.copy.replica.openOptions(disk)
	if err != nil {
		return did, err
	}
	return takeOver(ctx, disk, options, heard, force)
}

// takeOver has a disk's replica become the volume that its label names.
func takeOver(ctx context.Context, disk blockdev.Device, options protocol.OpenOptions, heard knowledge, force bool) (did protocol.Promotion, err error) {
	options.TookOver = true
	replica, err := protocol.OpenReplica(ctx, disk, options)
	if err != nil {
		return did, err
	}
	defer func() { err = errors.Join(err, replica.Close()) }()
	label, err := volume.OfflineOn(disk)
	if err != nil {
		return did, err
	}
	return replica.TakeOver(ctx, takeOverState{label}, protocol.TakeOverOptions{Heard: heard.beside(replica.Status().Lineage), Force: force})
}

// secondary has the volume stand down; op is held.
func (s *switching) secondary(ctx context.Context, force bool) (string, error) {
	switch s.at() {
	case roleUnknown:
		return "", exit.Errorf(exit.Refused, "volume '%s': %s", s.config.Name, s.managed.why())
	case roleSecondary:
		return "is secondary already", nil
	}
	if err := s.room(); err != nil {
		return "", err
	}
	if err := s.drainFirst(ctx, force); err != nil {
		return "", err
	}
	was := s.managed.upNow()
	if err := s.endUse(ctx, force); err != nil {
		s.useAgain(was)
		return "", err
	}
	at, message, err := s.standDownNow(ctx, force)
	if err != nil {
		s.useAgain(was)
		return "", err
	}
	return message, s.reached(ctx, hooks.AfterDemote, at, message)
}

// drainFirst refuses before the hook ends what uses the volume, if a replica can't have what was
// written so far; and what is left to send while nobody uses it is little.
func (s *switching) drainFirst(ctx context.Context, force bool) error {
	m := s.managed
	m.mu.Lock()
	r := m.running
	m.mu.Unlock()
	if force || r == nil || !m.hooks.Has(hooks.BeforeDemote) {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, downSend)
	defer cancel()
	if _, _, err := r.primary.Drain(limited, false); err != nil {
		return exit.Errorf(exit.Refused, "%w%s%s", err, allTheSame, s.config.Name)
	}
	return nil
}

// useAgain has the hook start what uses the volume, which it may have ended for nothing: the
// volume is up as it was, and does not fail soon with its lease. One that went down and is up again was told of by that.
func (s *switching) useAgain(was raised) {
	if ending := s.lease != nil && s.lease.told; was != nil && !ending && s.managed.upNow() == was {
		s.managed.hooks.Tell(hooks.AfterUp, hooks.Info{Device: was.Path(), Reason: "it did not stand down"})
	}
}

// endUse has the hook end what uses the volume here, before it stands down. Only an order without force
// is refused by it: a lease that is another's, or an operator, does not wait for it.
func (s *switching) endUse(ctx context.Context, force bool) error {
	if s.managed.path() == "" {
		return nil // nobody can be using it
	}
	position, _ := s.cutOnDisk()
	err := s.reached(ctx, hooks.BeforeDemote, position, "")
	if err == nil || force {
		return nil
	}
	return exit.Errorf(exit.Refused, "volume '%s' stays primary, and up: %w; what uses it may have ended all the same; to stand down whatever the hook says, if nobody uses it: blockferry secondary --force %[1]s", s.config.Name, err)
}

// standDownNow has the volume stand down, and says where it is then.
func (s *switching) standDownNow(ctx context.Context, force bool) (at protocol.Position, message string, err error) {
	m := s.managed
	m.op.Lock()
	defer m.op.Unlock()
	if err := s.room(); err != nil {
		return at, "", err
	}
	waited, err := s.goDown(ctx, force)
	if err != nil {
		return at, "", err
	}
	m.set(stageDown, "it stands down", "")
	h, err := s.standDown(force)
	if err != nil && s.roleOnDisk() == roleSecondary { // what failed came after the label
		s.unhear()
		s.decide(undecided)
		s.set(roleSecondary, volume.UUID{})
		s.lease.decline()
		return at, "", fmt.Errorf("it is secondary, and its disk is settled by itself: %w", err)
	}
	if err != nil {
		m.set(stageStarting, err.Error(), "")
		if errors.Is(err, protocol.ErrUnclean) {
			err = fmt.Errorf("%w; to keep what was written last for its rescue, and stand down: blockferry secondary --force %s", err, s.config.Name)
		}
		return at, "", exit.Mark(exit.Refused, err)
	}
	s.unhear()
	s.decide(undecided)
	s.set(roleSecondary, volume.UUID{})
	s.lease.decline()
	at = h.Lineage.Tip()
	message = fmt.Sprintf("secondary at %v", at)
	switch {
	case h.Strayed != "":
		message += ": " + h.Strayed + "; no other node may have that"
	case len(waited) > 0:
		message += ", which " + strings.Join(waited, " and ") + " holds, too: nothing is lost; at the node that is to take over: blockferry primary " + s.config.Name
	default:
		message += "; whether a replica has all of that was not looked at"
	}
	return at, message, nil
}

const allTheSame = "; to stand down all the same: blockferry secondary --force "

// goDown takes the volume down after all replicas have what was written; it
// returns their names. If that can't be had it is up again. m.op is held.
func (s *switching) goDown(ctx context.Context, force bool) (waited []string, err error) {
	m := s.managed
	m.mu.Lock()
	stack, _ := m.stack.(*volume.Volume)
	r := m.running
	m.mu.Unlock()
	if stack == nil {
		exists, err := m.stackExists()
		switch {
		case err != nil:
			return nil, err
		case exists && !force:
			return nil, exit.Errorf(exit.Refused, "volume '%s' is up but not managed: %s%s%[1]s", m.config.Name, m.why(), allTheSame)
		case exists:
			err = volume.Down(m.agent.dm, m.config.Name)
		}
		return nil, exit.Mark(exit.Refused, err)
	}
	if err := stack.Opened(); err != nil {
		return nil, exit.Mark(exit.Refused, err)
	}
	stack.RollNext()
	patience := downSend
	if force {
		patience = stopSend
	}
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, _, err := r.primary.Drain(limited, force); err != nil && !force {
		return nil, exit.Errorf(exit.Refused, "%w%s%s", err, allTheSame, m.config.Name)
	}
	clean, gone, err := m.sealAndStop(limited, stack, r)
	m.forget()
	behind := r.primary.Behind()
	if err == nil && (force || clean && len(behind) == 0) {
		if len(behind) == 0 && clean {
			for _, c := range m.config.Replicas {
				waited = append(waited, "'"+c.Name+"'")
			}
		}
		return waited, nil
	}
	if err == nil {
		err = fmt.Errorf("something was written while it went down (behind: %v)", behind)
	}
	m.set(stageStarting, err.Error(), "")
	m.log.Warn("it does not stand down", "error", err, "stack-gone", gone)
	s.decide(forced) // it goes on as it was
	defer s.decide(undecided)
	if up := m.bringUp(nil); up != nil {
		return nil, errors.Join(err, up)
	}
	return nil, exit.Errorf(exit.Refused, "volume '%s' is up again, and primary: %w; repeat it", m.config.Name, err)
}

// room refuses a disk that can't hold a replica beside the volume, before that is
// taken down.
func (s *switching) room() error {
	disk, err := udev.Open(s.config.Device, blockdev.OpenOptions{})
	if err != nil {
		return exit.Mark(exit.Refused, err)
	}
	defer disk.Close()
	label, err := volume.ReadLabel(disk)
	if err != nil {
		return exit.Mark(exit.Refused, err)
	}
	if err := layout.OnLabelled(label).Fits(disk.Size()); err != nil {
		return exit.Errorf(exit.Refused, "volume '%s' does not stand down, and is as it was: %s was divided without room for a replica: %w; to change roles the disk has to be made anew: with the agent stopped, blockferry create --discard-my-data %[1]s",
			s.config.Name, s.config.Device, err)
	}
	return nil
}

// standDown makes the disk of a volume that is down a replica.
func (s *switching) standDown(force bool) (h *protocol.Holding, err error) {
	disk, err := udev.Open(s.config.Device, blockdev.OpenOptions{Write: true, Exclusive: true})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	o, err := volume.OfflineOn(disk)
	if err != nil {
		return nil, err
	}
	s.know(o.Label().UUID)
	metadata, err := pathOf(s.config.MetadataDevice)
	if err != nil {
		return nil, err
	}
	outside, err := o.ChangedOutside(metadata)
	if err != nil {
		return nil, err
	}
	var follow protocol.Lineage
	if label := o.Label(); force {
		// A node that took over meanwhile: what changed since it did is worth knowing.
		ctx, cancel := context.WithTimeout(context.Background(), askNode)
		defer cancel()
		said, _ := s.ask(ctx, label.UUID)
		for _, other := range said {
			if other.primary {
				follow = other.lineage
			}
		}
	}
	return standDown(disk, o, follow, outside, force)
}

// switchAdvice says what to do about a primary that another has left behind.
func switchAdvice(v *config.Volume) string {
	return "nothing is written to it; to follow the other node: blockferry secondary " + v.Name + " (--force keeps what only this disk has for its rescue), then blockferry discard " + v.Name + "; only if this disk's content is the one that counts: blockferry primary --force " + v.Name
}
