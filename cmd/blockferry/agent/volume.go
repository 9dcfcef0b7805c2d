package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/attach"
	"blockferry/blockdev/bpf"
	"blockferry/blockdev/deadman"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/protocol"
)

const (
	bpffs   = "/sys/fs/bpf"
	pinRoot = bpffs + "/blockferry"
)

// stage is where a volume stands in the agent.
type stage int

const (
	stageStarting  stage = iota // not looked at yet
	stageAbsent                 // its disk, or one of its others, is not there
	stageBlank                  // its disk is blank: create or restore
	stageBusy                   // somebody else has one of its disks
	stageRefused                // its disk holds what is not this volume
	stageRestoring              // it is being filled
	stageDown                   // the operator took it down
	stageWaiting                // it may not be written here without its lease, or while other nodes are silent
	stageUp
)

// managed is one volume of the agent.
type managed struct {
	agent    *Agent
	config   *config.Volume
	log      *slog.Logger
	replicas []*localReplica
	roles    *switching    // nil: it is always primary here
	poke     chan struct{} // looks again at once
	hooks    *hooks.Runner

	// op is held by whoever brings the volume up or down or restores it. It
	// is taken before mu.
	op sync.Mutex

	mu       sync.Mutex
	split    map[string]bool // replicas that went their own way, as far as hooks were told
	stage    stage
	reason   string
	advice   string
	uuid     volume.UUID
	size     int64
	paused   bool
	progress *restoreProgress
	stack    raised   // while up
	running  *running // replication, while up
	other    *otherPrimary

	// While up: its disk, why that is not there any more ("": it is), and what was in its
	// place then.
	on                    blockdev.Identity
	lostWords, lostAdvice string
	lostFor               blockdev.Identity
}

func newManaged(a *Agent, v *config.Volume) *managed {
	m := &managed{agent: a, config: v, log: a.log.With("volume", v.Name), poke: make(chan struct{}, 1), reason: "the agent is starting",
		hooks: newHooks(a, v), split: map[string]bool{}}
	for _, r := range v.Local() {
		l := newLocalReplica(a, v, r)
		l.opened = func() { m.replicaOpened(r.Name) }
		m.replicas = append(m.replicas, l)
	}
	return m
}

// replicaOpened spares a replica whose disk is there again the pause that the
// failures before it have earned.
func (m *managed) replicaOpened(name string) {
	m.mu.Lock()
	r := m.running
	m.mu.Unlock()
	if r != nil {
		r.primary.Retry(name)
	}
	m.roles.beside().retry(name)
}

// run keeps the volume up until ctx ends; the stack stays.
func (m *managed) run(ctx context.Context) {
	// Replicas are served until the primary has sent its last epoch.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	var replicas sync.WaitGroup
	for _, r := range m.replicas {
		replicas.Go(func() { r.run(serving) })
	}
	defer replicas.Wait()
	defer stop()
	defer m.hooks.Close()
	replicas.Go(func() { m.watchLag(ctx) })
	wait := retryEvery
	before := stageStarting
	for ctx.Err() == nil {
		m.look(ctx)
		now := m.at()
		switch {
		case now == stageBusy && before != now:
			wait = retryBusy // udev or blkid are done in a moment
		case now == stageRefused, now == stageBusy:
			wait = min(2*wait, retryRefused) // each try may write to the label
		case now == stageAbsent:
			wait = m.patience()
		default:
			wait = retryEvery
		}
		before = now
		select {
		case <-ctx.Done():
		case <-m.poke:
		case <-time.After(protocol.Spread(wait)):
		}
	}
	m.op.Lock()
	defer m.op.Unlock()
	if err := m.letGo(); err != nil {
		m.log.Warn("the volume was not let go cleanly", "error", err)
	}
}

// look brings the volume up if it should be and can be.
func (m *managed) look(ctx context.Context) {
	if !m.op.TryLock() {
		return // somebody is at it
	}
	defer m.op.Unlock()
	switch m.at() {
	case stageUp:
		m.lookAtDisk()
		return
	case stageDown, stageRestoring:
		return
	}
	if m.roles.at() != rolePrimary {
		return
	}
	err := m.bringUp(nil)
	if err == nil || ctx.Err() != nil {
		return
	}
	m.restoreUnasked(ctx)
}

// restoreUnasked fills a blank disk without the operator if it may; op is held.
func (m *managed) restoreUnasked(ctx context.Context) {
	if m.at() != stageBlank || !m.restoresItself() {
		return
	}
	if err := m.restoreHere(ctx, "", false, nil); err != nil && ctx.Err() == nil && m.at() == stageBlank {
		m.set(stageBlank, "it is not restored by itself: "+err.Error(), m.blankAdvice())
	}
}

// restoresItself says whether a blank disk is filled without the operator. Which disk a model
// names is chance while several of it come one after another, as at boot, so none is filled
// that is named so.
func (m *managed) restoresItself() bool {
	v := m.config
	return v.AutoRestore && !udev.IsModel(v.Device) && !udev.IsModel(v.CowDevice) && !udev.IsModel(v.MetadataDevice)
}

func (m *managed) at() stage {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stage
}

// set moves to a stage, and says so when it is news.
func (m *managed) set(s stage, reason, advice string) {
	m.mu.Lock()
	news := s != m.stage || reason != m.reason
	if s == stageBlank && m.stage == s && m.restoresItself() {
		news = false // between two tries of a restore
	}
	m.stage, m.reason, m.advice = s, reason, advice
	m.mu.Unlock()
	if !news {
		return
	}
	words := stageWords[s]
	if reason != "" {
		words += ": " + reason
	}
	m.agent.hub.publish(m.config.Name, "", "volume-"+stageWords[s], words)
	level := slog.LevelInfo
	if s == stageRefused || s == stageBusy || s == stageAbsent {
		level = slog.LevelWarn
	}
	m.log.Log(context.Background(), level, "volume is "+stageWords[s], "reason", reason, "advice", advice)
}

var stageWords = map[stage]string{stageStarting: "starting", stageAbsent: "absent", stageBlank: "blank", stageBusy: "busy", stageRefused: "refused",
	stageRestoring: "restoring", stageDown: "down", stageUp: "up", stageWaiting: "waiting"}

// bringUp builds or adopts the stack and starts replication; op is held. The
// stage says how it ended, too. after is what a restore just did, nil if there
// was none.
func (m *managed) bringUp(after *restored) error {
	v := m.config
	if v.Attach {
		return m.bringUpAttached()
	}
	adopt, err := m.stackExists()
	if err != nil {
		return m.refuse(err)
	}
	var state protocol.SourceState
	if adopt {
		// Whatever refuses below, applications do not wait for it behind a
		// device that a dead agent left suspended.
		if err := deadman.FailEnded(m.agent.options.DeadMan, v.Name); err != nil {
			return m.refuse(err)
		}
		if err := volume.Rescue(m.agent.dm, v.Name); err != nil {
			return m.refuse(err)
		}
		if err := m.roles.keeps().mayWrite(); err != nil {
			return m.refuse(err)
		}
	} else {
		// An agent that died while it built the stack, or took it down, left
		// inner devices that hold the disk. Nobody can be writing: there is no
		// top. What was written is in the label and the marks.
		defer m.roles.rise(false)
		if err := volume.Down(m.agent.dm, v.Name); err != nil {
			return m.refuse(err)
		}
		if err := m.inspect(); err != nil {
			return err
		}
		if err := m.roles.keeps().mayWrite(); err != nil {
			return m.refuse(err)
		}
		state, err = m.beginOffline()
		var unfinished *unfinishedRestore
		if errors.As(err, &unfinished) {
			m.set(stageBlank, err.Error(), "to finish it: blockferry restore "+v.Name)
			return exit.Errorf(exit.Refused, "%w; to finish it: blockferry restore %s", err, v.Name)
		}
		if err != nil {
			return m.refuse(err)
		}
	}
	if err := m.roles.keeps().ready(context.Background(), m.roles.cutOnDisk); err != nil {
		return m.refuse(err)
	}
	deadMan := m.agent.options.DeadMan
	deadMan.Log = m.log
	guard, err := deadman.NewGuard(deadMan)
	if err != nil {
		return m.refuse(err)
	}
	at, err := pathsOf(v)
	if err != nil {
		return m.refuse(errors.Join(err, guard.Close()))
	}
	stack, err := volume.Up(m.agent.dm, volume.Options{
		Name: v.Name, Device: at.device, CowDevice: at.cow, MetaDevice: at.metadata,
		EraBlockBytes: v.EraBlockBytes, FinePins: m.finePins(), FineOwner: m.agent.owner(), PreCopy: v.PreCopy, StallBudget: v.StallBudget, FreezeFilesystem: v.FreezeFilesystem, StallLimit: v.StallLimit,
		Guard: guard, Hold: func() error { return m.roles.keeps().guard(m.holdDeadline) }, Log: m.agent.log,
	})
	if errors.Is(err, volume.ErrFenced) && adopt && volume.Down(m.agent.dm, v.Name) == nil {
		// Its lease ended, and there is another one now.
		return errors.Join(guard.Close(), m.bringUp(after))
	}
	if err != nil {
		return m.refuse(errors.Join(err, guard.Close()))
	}
	if after != nil {
		// What changes from here on is marked, so replication goes on from the
		// cut restored. If this fails everything is compared: right, but slow.
		if err := stack.Restored(after.cut, after.eraID); err != nil {
			m.log.Warn("replicas will be compared in full", "error", err)
		}
	}
	if adopt {
		// It may be written at this very moment; its label says so already.
		state, err = m.begin(keptState{stack})
	}
	var r *running
	if err == nil {
		r, err = m.replicate(stack, takeSuspended(stack, v.WhenBusy), guard, state)
	}
	if err != nil {
		return m.refuse(errors.Join(err, stack.Close(), guard.Close()))
	}
	if v.SizeBytes > 0 && v.SizeBytes != stack.Size() {
		m.log.Warn("the volume has another size than the configuration says; it keeps the one it was created with",
			"size-bytes", stack.Size(), "configured-bytes", v.SizeBytes)
	}
	m.nowUp(stack, r)
	return nil
}

func (m *managed) nowUp(stack raised, r *running) {
	on, _ := udev.Look(m.config.Device)
	m.mu.Lock()
	m.stack, m.running, m.uuid, m.size = stack, r, stack.UUID(), stack.Size()
	m.on, m.lostWords, m.lostAdvice = on, "", ""
	m.mu.Unlock()
	m.agent.disks.settle(m.config.Device)
	m.roles.decide(undecided)
	if why := stack.TrackingLost(); why != "" {
		m.log.Warn("what changed before is not known; replicas are compared in full", "reason", why)
	}
	m.roles.know(stack.UUID())
	m.set(stageUp, "", "")
	m.hooks.Tell(hooks.AfterUp, hooks.Info{Device: stack.Path()})
}

// finePins is where fine tracking is pinned, "" if it can't be.
func (m *managed) finePins() string {
	if m.config.EraOnly || !m.agent.options.System.Exists(doctor.KernelTypes) {
		return ""
	}
	if err := bpf.EnsureMounted(bpffs); err != nil {
		m.log.Warn("no fine tracking; what the era marks is compared before it is sent", "error", err)
		return ""
	}
	return pinRoot
}

// foreignContent says that a disk holds what is not ours.
type foreignContent struct{ why string }

func (f *foreignContent) Error() string { return f.why }

// refuse notes that the volume can't be brought up, and is that error.
func (m *managed) refuse(err error) error {
	advice := "see 'blockferry check' and the agent's log; it is tried again by itself, or with 'blockferry up " + m.config.Name + "'"
	stage := stageRefused
	var foreign *foreignContent
	var stale *overtakenError
	var superseded *supersededError
	var silent *silentError
	var waits *noLeaseError
	switch {
	case errors.As(err, &waits):
		stage, advice = stageWaiting, "see 'lease' in blockferry status; it comes up by itself when it has the lease"
	case errors.Is(err, volume.ErrFenced):
		advice = "close what uses it, such as with umount; it is tried again by itself"
	case errors.Is(err, deadman.ErrNoService):
		advice = "a lease needs the dead-man's service: systemctl enable --now blockferry-deadman; it is tried again by itself"
	case errors.As(err, &stale):
		advice = "nothing is written; to fill it from the replica: blockferry restore --force --from " + stale.replica + " " + m.config.Name +
			"; only if the disk's own content is the one that counts: blockferry create --replica " + stale.replica + " --discard-my-data " + m.config.Name +
			" with the agent stopped"
	case errors.Is(err, protocol.ErrSecondary):
		advice = "nothing is written to it; to have it follow the node that is primary: blockferry secondary " + m.config.Name
	case errors.As(err, &superseded):
		advice = switchAdvice(m.config)
	case errors.As(err, &silent):
		stage, advice = stageWaiting, "it comes up by itself when they answer; where it is known that none of them is primary: blockferry primary "+m.config.Name
	case errors.As(err, &foreign):
		advice = "nothing is written to it; if its content may be lost: blockferry restore --force " + m.config.Name + ", or, for a new volume, blockferry create"
	case errors.Is(err, udev.ErrAmbiguous):
		advice = ambiguousAdvice
	case errors.Is(err, attach.ErrUser):
		advice = "an attached device may be used by nothing but file systems that can be frozen; it is tried again by itself"
	case errors.Is(err, volume.ErrOtherVolume), errors.Is(err, attach.ErrOtherDevice):
		advice = "nothing is written to it; check the paths in the configuration, or which disk is attached where"
	case errors.Is(err, unix.EBUSY):
		stage, advice = stageBusy, "end what uses it; it is tried again by itself"
	}
	m.set(stage, err.Error(), advice)
	return exit.Mark(exit.Refused, err)
}

// stackExists says whether an earlier agent left the volume up.
func (m *managed) stackExists() (bool, error) {
	if m.config.Attach { // it has none, and is not up without an agent
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.stack != nil, nil
	}
	info, err := m.agent.dm.Info(m.config.Name)
	return info.Exists && info.HasActive, err
}

// inspect says which disk is missing, or what the volume's holds if it isn't a
// label.
func (m *managed) inspect() error {
	v := m.config
	for _, path := range []string{v.Device, v.CowDevice, v.MetadataDevice} {
		if path == "" {
			continue
		}
		if words, advice := m.agent.disks.missing(path); words != "" {
			m.set(stageAbsent, words, advice)
			return exit.Errorf(exit.Refused, "%s", words)
		}
	}
	disk, err := udev.Open(v.Device, blockdev.OpenOptions{})
	if err != nil {
		return m.refuse(err)
	}
	defer disk.Close()
	content, why := volume.Inspect(disk)
	switch content {
	case volume.Labelled:
		return nil
	case volume.Blank:
		m.set(stageBlank, why, m.blankAdvice())
		return exit.Errorf(exit.Refused, "%s; %s", why, m.blankAdvice())
	case volume.Foreign:
		if err := notAReplica(disk); err != nil {
			return m.refuse(err)
		}
	}
	return m.refuse(&foreignContent{why})
}

// notAReplica refuses a replica's disk in the place of a volume's: paths or
// disks were exchanged, and what is there may be the only copy.
func notAReplica(disk *blockdev.File) error {
	of, found, err := protocol.ProbeReplica(disk)
	if err != nil || !found {
		return err
	}
	return fmt.Errorf("%w: %s holds a replica of volume %s, the volume's own disk is expected there", volume.ErrOtherVolume, disk.Name(), volume.UUID(of))
}

// blankAdvice says what a blank disk is waiting for.
func (m *managed) blankAdvice() string {
	if m.config.AutoRestore && !m.restoresItself() {
		return "a disk named by its model is not restored by itself, as another of that model may come; if it is the right one: blockferry restore " + m.config.Name
	}
	for _, r := range m.replicas {
		if s, open, _, _ := r.status(); open && s.State == protocol.DiskConsistent {
			return "to fill it from replica '" + r.config.Name + "': blockferry restore " + m.config.Name
		}
	}
	return "for a new volume: blockferry create " + m.config.Name + "; if the disk was lost: blockferry restore " + m.config.Name
}

// begin makes the label say, before the device can be written, that an epoch
// is open.
func (m *managed) begin(store protocol.StateStore) (protocol.SourceState, error) {
	state, why, err := protocol.BeginPrimary(store)
	if err == nil {
		m.log.Info("primary", "rule", why, "position", state.Lineage.Tip().String(), "open-epoch", state.OpenEpoch)
	}
	return state, err
}

// beginOffline is begin for a volume that is not up. A restore that did not
// end is told from other reasons.
func (m *managed) beginOffline() (state protocol.SourceState, err error) {
	at, err := pathsOf(m.config)
	if err != nil {
		return state, err
	}
	disk, err := volume.OpenOffline(at.device)
	if err != nil {
		return state, err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	if damage := disk.Label().Damage; damage != "" {
		m.log.Warn("one slot of the label is damaged; the other counts", "damage", damage)
	}
	old, err := protocol.DecodeSourceState(disk.Label().State)
	if err != nil {
		return state, err
	}
	if r := old.Restore; r != nil {
		return state, &unfinishedRestore{r}
	}
	if err := m.overtaken(disk.Label().UUID, old.Effective()); err != nil {
		return state, err
	}
	if err := m.roles.superseded(disk.Label().UUID, old.Effective()); err != nil {
		return state, err
	}
	changed, err := disk.ChangedOutside(at.metadata)
	if err != nil {
		return state, err
	}
	if changed != "" {
		// Which places were written nobody knows; replicas are compared in full.
		m.log.Warn("changed outside", "reason", changed)
		m.agent.hub.publish(m.config.Name, "", "changed-outside", changed)
		if err := disk.ForgetCuts(); err != nil {
			return state, err
		}
	}
	return m.begin(offlineState{disk})
}

// overtaken refuses a disk that one of the replicas here has left behind: an
// SSD that was away while the volume lived on from a restore on another. Once
// it is writable there are two truths.
func (m *managed) overtaken(id volume.UUID, disk protocol.Lineage) error {
	ctx, cancel := context.WithTimeout(context.Background(), replicaPatience)
	defer cancel()
	for _, r := range m.replicas {
		r.settled(ctx)
		s, open, _, _ := r.status()
		if !open || s.VolumeUUID != id || s.State != protocol.DiskConsistent {
			continue
		}
		relation := protocol.Compare(disk, s.Lineage)
		forgot := relation.Kind == protocol.Unrelated && len(disk) > 0 // either may be the newer one
		behind := relation.Kind == protocol.Behind || relation.Kind == protocol.Diverged || forgot
		if m.roles != nil {
			// A volume that comes back from another node left the replica's line, which
			// is the replica's to settle: its plan refuses, or gives it up.
			behind = protocol.Superseded(disk, s.Lineage) || forgot
		}
		if behind {
			return &overtakenError{fmt.Sprintf("%s is out of date: it holds history [%v], replica '%s' on %s holds [%v]: %v",
				m.config.Device, disk, r.config.Name, r.config.Device, s.Lineage, relation), r.config.Name}
		}
	}
	return nil
}

type overtakenError struct{ why, replica string }

func (o *overtakenError) Error() string { return o.why }

// unfinishedRestore says that a disk was not filled to its end.
type unfinishedRestore struct{ *protocol.RestoreState }

func (u *unfinishedRestore) Error() string {
	return fmt.Sprintf("a restore from replica '%s' did not end; %s are there", u.Replica, config.FormatSize(int64(u.OffsetBytes)))
}

// keptState and offlineState keep the primary's state with the volume.
type keptState struct{ raised }

func (s keptState) Load() ([]byte, error)   { return s.State(), nil }
func (s keptState) Save(state []byte) error { return s.SetState(state) }

type offlineState struct{ *volume.Offline }

func (s offlineState) Load() ([]byte, error)   { return s.Label().State, nil }
func (s offlineState) Save(state []byte) error { return s.SetState(state) }

// letGo ends replication and gives the stack back; it stays up. op is held.
func (m *managed) letGo() error {
	m.mu.Lock()
	stack, r := m.stack, m.running
	m.stack, m.running = nil, nil
	m.mu.Unlock()
	var errs []error
	if r != nil {
		errs = append(errs, r.stop())
	}
	if stack != nil {
		errs = append(errs, stack.Close())
	}
	if r != nil {
		errs = append(errs, r.guard.Close())
	}
	return errors.Join(errs...)
}

// up is for after a down.
func (m *managed) up(context.Context) (string, error) {
	m.op.Lock()
	defer m.op.Unlock()
	if err := m.notSecondary(); err != nil { // since it was asked
		return "", err
	}
	return m.upHeld()
}

// upHeld is up with op held.
func (m *managed) upHeld() (string, error) {
	if m.at() == stageUp {
		return "is up already", nil
	}
	if err := m.bringUp(nil); err != nil {
		return "", err
	}
	return "up as " + m.stack.Path(), nil
}
