package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/udev"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/protocol"
)

// localReplica keeps one replica's disk open and served for as long as the
// disk is there.
type localReplica struct {
	agent  *Agent
	volume *config.Volume
	config *config.Replica
	log    *slog.Logger
	opened func() // called when it is served (again); may be nil
	// feeds is called with the open replica and returns what ends what it began; may be nil
	feeds func(*protocol.Replica) (end func())

	receiver *protocol.Receiver // serves it, as name
	name     string
	adopt    chan adoption // what a replica of no volume yet is to become one of
	unparked chan struct{} // room for one
	woken    chan struct{} // room for one: its disk came, went or has another size

	turn sync.Mutex        // held while the disk is in use by it, or while it is parked
	on   blockdev.Identity // the disk that is open; belongs to who has the turn

	mu      sync.Mutex
	parked  bool
	let     context.CancelFunc // ends what holds turn
	replica *protocol.Replica  // nil: not open
	letting context.Context    // ends what uses it beside the receiver; nil: nobody may
	users   sync.WaitGroup     // who does; added to with mu held
	reason  string             // why not
	advice  string
	last    [16]byte      // its volume when it was open last, AnyVolume until it has one
	word    bool          // the operator's, for what it holds, is kept
	noSpill string        // why the configured spill file is not used
	fault   error         // why it could not be served, until it takes an epoch again
	ready   chan struct{} // closed and replaced when the state changes
}

func newLocalReplica(a *Agent, v *config.Volume, r *config.Replica) *localReplica {
	return &localReplica{agent: a, volume: v, config: r, ready: make(chan struct{}), receiver: a.receiver, name: r.Name, adopt: make(chan adoption), unparked: make(chan struct{}, 1), woken: make(chan struct{}, 1),
		log: a.log.With("volume", v.Name, "replica", r.Name), reason: "not opened yet"}
}

// run opens the replica, serves it, and begins again after a fault, until ctx
// ends.
func (l *localReplica) run(ctx context.Context) {
	for ctx.Err() == nil {
		wait := l.serveInTurn(ctx)
		select {
		case <-l.unparked:
			continue
		default:
		}
		select {
		case <-l.unparked:
		case <-l.woken:
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// wake has the disk looked at again, whether it is open or not.
func (l *localReplica) wake() {
	select {
	case l.woken <- struct{}{}:
	default:
	}
}

// serveInTurn returns how long to wait before it is called again.
func (l *localReplica) serveInTurn(ctx context.Context) time.Duration {
	l.turn.Lock()
	defer l.turn.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l.mu.Lock()
	parked := l.parked
	l.let = cancel
	l.mu.Unlock()
	if parked {
		return retryEvery
	}
	err := l.serve(ctx)
	if err != nil && ctx.Err() == nil {
		l.closed(err)
	}
	var absent *absentError
	switch {
	case errors.Is(err, errWent):
		return lookSoon // another may be in its place already
	case errors.As(err, &absent):
		return l.agent.disks.patience(l.config.Device)
	}
	return retryEvery
}

// park ends the serving; the disk is the caller's when it returns, until unpark.
func (l *localReplica) park(why string) {
	l.mu.Lock()
	l.parked = true
	if l.let != nil {
		l.let()
	}
	l.mu.Unlock()
	l.turn.Lock()
	l.set(nil, why, "")
	l.turn.Unlock() // whoever has the turn next sees that it is parked
}

func (l *localReplica) unpark() {
	l.mu.Lock()
	l.parked = false
	l.mu.Unlock()
	select {
	case l.unparked <- struct{}{}:
	default:
	}
}

// serve returns when the replica can't be served, or not any more.
func (l *localReplica) serve(ctx context.Context) (err error) {
	disk, err := udev.Open(l.config.Device, blockdev.OpenOptions{Write: true, Exclusive: true})
	if err != nil {
		return l.agent.disks.absent(l.config.Device, err)
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	if l.on, err = udev.Look(disk.Name()); err != nil {
		return l.agent.disks.absent(l.config.Device, err)
	}
	l.agent.disks.settle(l.config.Device)
	if l.volume.Switches() && l.config == l.volume.Copy {
		if err := settle(disk); err != nil {
			return err
		}
	}
	for {
		become, err := l.serveOn(ctx, disk)
		if become == nil {
			return err
		}
		if err == nil {
			err = become.prepare(disk)
		}
		if err == nil {
			err = protocol.FormatReplica(disk, become.as)
		}
		become.done <- err
		if err != nil {
			return err
		}
	}
}

// serveOn opens the replica on its disk and serves it. An adoption is what it is
// to become; it is closed then.
func (l *localReplica) serveOn(ctx context.Context, disk *blockdev.File) (become *adoption, err error) {
	options, err := l.openOptions(disk)
	if err != nil {
		return nil, err
	}
	replica, err := protocol.OpenReplica(ctx, disk, options)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, replica.Close()) }()
	s := replica.Status()
	l.mu.Lock()
	l.last = s.VolumeUUID
	l.mu.Unlock()
	if s.VolumeUUID == protocol.AnyVolume && l.config != l.volume.Copy {
		return nil, fmt.Errorf("%w: %s was formatted for a volume of another node", protocol.ErrNoSuperblock, l.config.Device)
	} else if s.VolumeUUID == protocol.AnyVolume {
		return l.awaitVolume(ctx, replica, disk.Size())
	}
	if err := l.receiver.Add(l.name, replica); err != nil {
		return nil, err
	}
	defer l.applied(replica)
	defer l.receiver.Remove(s.VolumeUUID, l.name)
	l.recallWord(replica)
	l.set(replica, "", "")
	l.log.Info("replica opened", "device", l.config.Device, "state", s.State.String(), "position", s.Committed.String())
	if words := doctor.JournalDiffers(l.config, s.JournalBytes); words != "" {
		l.log.Warn("the replica "+words, "advice", doctor.JournalAdvice(l.volume, l.config.Name))
	}
	warned := l.warn(s.Warnings, 0)
	l.agent.hub.publish(l.volume.Name, l.config.Name, "replica-opened", "disk:"+s.State.String()+" position:"+s.Committed.String())
	if l.opened != nil {
		l.opened()
	}
	if l.feeds != nil {
		defer l.feeds(replica)()
	}
	defer l.allow()() // ended before the feeding, which may wait for what is held
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			l.set(nil, "the agent is stopping", "")
			return nil, nil
		case <-l.woken:
			if err := l.went(); err != nil {
				return nil, err
			}
		case <-tick.C:
			if err := l.went(); err != nil {
				return nil, err
			}
			now := replica.Status()
			warned = l.warn(now.Warnings, warned)
			if now.Err != nil {
				return nil, now.Err
			}
			l.usedWord(now)
			l.dropKept(replica, keepFor)
		}
	}
}

// went is the error about a disk that went while it was open; nil: it is there.
func (l *localReplica) went() error {
	if udev.There(l.on) {
		return nil
	}
	return l.agent.disks.absent(l.config.Device, fmt.Errorf("%s: %w", describe(l.config.Device, l.on), errWent))
}

// applyPatience is how long the end of the serving may wait. Tests give it less.
var applyPatience = 5 * time.Second

// applied waits for a while until what is committed is applied, once nobody feeds or reads the
// replica any more. One that is opened again applies the rest, but does not know for other
// copies what else that was about.
func (l *localReplica) applied(r *protocol.Replica) {
	s := r.Status()
	if s.PendingEpochs == 0 || s.Err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), applyPatience)
	defer cancel()
	if err := r.WaitApplied(ctx, s.Committed.Epoch); err != nil {
		l.log.Info("not all is applied before the replica is closed", "epochs", r.Status().PendingEpochs, "error", err)
	}
}

// keepFor is how long a part of an epoch waits for the node that fed it.
const keepFor = 24 * time.Hour

// dropKept gives up what is kept of an epoch for longer than a limit.
func (l *localReplica) dropKept(r *protocol.Replica, limit time.Duration) {
	k := r.DropKept(limit)
	if k.Epoch == 0 {
		return
	}
	words := fmt.Sprintf("%d bytes of epoch %d, kept since %s for the node that fed it to go on, are given up; it begins anew", k.Bytes, k.Epoch, k.Since.UTC().Format(time.RFC3339))
	l.log.Warn("replica", "warning", words)
	l.agent.hub.publish(l.volume.Name, l.config.Name, "kept-epoch-given-up", words)
}

// becoming is the reason for which a replica is not open for a moment.
const becoming = "it is being formatted for its volume"

// awaitVolume keeps a replica that has no volume yet until one is offered that fits.
func (l *localReplica) awaitVolume(ctx context.Context, replica *protocol.Replica, diskBytes int64) (*adoption, error) {
	l.set(replica, "", "")
	l.log.Info("the replica waits for its volume", "device", l.config.Device)
	for {
		select {
		case <-ctx.Done():
			l.set(nil, "the agent is stopping", "")
			return nil, nil
		case <-l.woken:
			if err := l.went(); err != nil {
				return nil, err
			}
		case become := <-l.adopt:
			var err error
			if become.as, err = become.format(diskBytes); err != nil {
				become.done <- err
				continue
			}
			l.set(nil, becoming, "")
			return &become, nil
		}
	}
}

// lastVolume is the volume that it was of when it was open last.
func (l *localReplica) lastVolume() [16]byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// look is status without advice, and what is closed when that changes.
func (l *localReplica) look() (s protocol.ReplicaStatus, open bool, reason string, change <-chan struct{}) {
	l.mu.Lock()
	r := l.replica
	reason, change = l.reason, l.ready
	l.mu.Unlock()
	if r == nil {
		return s, false, reason, change
	}
	return r.Status(), true, "", change
}

// warn logs and publishes what is wrong and did not keep the replica from
// going on, from the n-th warning on, and returns how many there are.
func (l *localReplica) warn(warnings []string, n int) int {
	for _, w := range warnings[min(n, len(warnings)):] {
		l.log.Warn("replica", "warning", w)
		l.agent.hub.publish(l.volume.Name, l.config.Name, "replica-damaged", w)
	}
	return len(warnings)
}

// advise says what to do about a replica that can't be served.
func (l *localReplica) advise(err error) string {
	again := fmt.Sprintf("it is tried again every %s", retryEvery)
	switch {
	case errors.Is(err, protocol.ErrUnreadable): // first: what can't be read now is neither missing nor damaged
		return "see what the kernel's log says of " + l.config.Device + l.spillToo() + "; " + again +
			"; only if it is lost for good, to go back to the image the disk has: blockferry recover --drop-journal " + l.config.Device
	case errors.Is(err, protocol.ErrSpill): // next: it may be one that does not exist, or can't be read
		return "bring its spill file back and name it in the configuration; only if it is lost, to go back to the image the disk has: blockferry recover --drop-journal " + l.config.Device
	case errors.Is(err, udev.ErrAmbiguous):
		return ambiguousAdvice
	case errors.Is(err, fs.ErrNotExist):
		return "attach the disk; " + l.agent.disks.whenThere(l.config.Device)
	case errors.Is(err, protocol.ErrTookOver):
		return "to finish that: blockferry primary " + l.volume.Name + "; to make it a replica again: blockferry secondary " + l.volume.Name
	case errors.Is(err, protocol.ErrNoSuperblock):
		return "if it is the right disk, format it, and it alone: " + l.formatCommand()
	case errors.Is(err, protocol.ErrResized):
		return "do not format it: it is a replica; to use the larger disk, with the volume down and the agent stopped: blockferry resize " + l.volume.Name
	case errors.Is(err, protocol.ErrNewerFormat):
		return "do not format it: it is a replica"
	case errors.Is(err, protocol.ErrChangedOutside):
		return "if the volume is up, have it synced in full: blockferry recover --drop-journal " + l.config.Device +
			"; if the volume is lost, leave the disk as it is and look at another replica first: after that this one can't be restored from"
	case errors.Is(err, protocol.ErrJournalDamaged):
		return "to go back to the image it has: blockferry recover --drop-journal " + l.config.Device
	case errors.Is(err, unix.ENOSPC):
		return "make room below " + l.config.Device + "; " + again
	case errors.Is(err, unix.EIO):
		return "see what the kernel's log says of the disk; if it is lost, attach a new one and format it: " + l.formatCommand() + "; until then " + again
	}
	return again
}

// formatCommand formats the replica's disk, and nothing else.
func (l *localReplica) formatCommand() string {
	if l.config == l.volume.Copy {
		if l.volume.Switches() && !l.volume.BeginsSecondary { // else it would be a new volume
			return "with 'role: secondary' of volume '" + l.volume.Name + "' in the configuration: blockferry create " + l.volume.Name
		}
		return "blockferry create " + l.volume.Name
	}
	return "blockferry create --replica " + l.config.Name + " " + l.volume.Name
}

// spillToo is for messages: the spill file's disk, if there is one.
func (l *localReplica) spillToo() string {
	if l.config.Spill == "" {
		return ""
	}
	return " and of the disk of " + l.config.Spill
}

// closed notes why the replica is not served, once.
func (l *localReplica) closed(err error) {
	advice := l.advise(err)
	l.mu.Lock()
	known := l.reason == err.Error()
	l.fault = err
	l.mu.Unlock()
	l.set(nil, err.Error(), advice)
	if !known {
		l.log.Warn("replica not served", "error", err)
		l.agent.hub.publish(l.volume.Name, l.config.Name, "replica-closed", err.Error())
	}
}

func (l *localReplica) set(r *protocol.Replica, reason, advice string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.replica, l.reason, l.advice = r, reason, advice
	close(l.ready)
	l.ready = make(chan struct{})
}

// committed forgets what was wrong before.
func (l *localReplica) committed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fault = nil
}

// adviseOpen says what to do about a replica whose disk is open and that is
// behind all the same; source is the volume's disk.
func (l *localReplica) adviseOpen(source string, connected bool) string {
	l.mu.Lock()
	fault := l.fault
	l.mu.Unlock()
	if fault == nil || connected {
		return "if this goes on, see what the kernel's log says of " + source + " and " + l.config.Device + "; writes go on and are marked"
	}
	return l.advise(fault)
}

// status is the replica's own; false while its disk is not open.
func (l *localReplica) status() (s protocol.ReplicaStatus, open bool, reason, advice string) {
	l.mu.Lock()
	r := l.replica
	reason, advice = l.reason, l.advice
	l.mu.Unlock()
	if r == nil {
		return s, false, reason, advice
	}
	return r.Status(), true, "", ""
}

// settled waits until the replica was opened, or could not be, or ctx ends.
func (l *localReplica) settled(ctx context.Context) {
	for {
		l.mu.Lock()
		done, change := l.replica != nil || l.advice != "", l.ready
		l.mu.Unlock()
		if done {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-change:
		}
	}
}
