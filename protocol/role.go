package protocol

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
)

// This file is about devices that change their role. A replica takes over: its
// superblock says so before its label names a new generation, and that before
// anybody can write. A primary stands down: its label says so before its disk gets the
// superblock of a replica. Each can be repeated wherever it was cut off, and at no
// moment do both say that the device may be used.

// ErrPrimaryAlive says that another node is known to be primary.
var ErrPrimaryAlive = errors.New("another primary is alive")

// ErrWouldLose says that the primary's last writes may be lost by taking over.
var ErrWouldLose = errors.New("writes may be lost")

// ErrUnclean says that a primary's end was not clean: its device may hold writes
// that no copy has.
var ErrUnclean = errors.New("the end was not clean")

// Heard is what a node knows of the primary that its copy followed.
type Heard struct {
	Lineage Lineage // with the epoch that was open, if one was; empty: not known
	Alive   bool    // it is primary now, as far as anybody knows
	// Seconds is how long it had gone on from the copy's cut when it was last heard of;
	// nil: not known. The clock is the listener's.
	Seconds *float64
	// OldSeconds is how long ago that was, where this process was started since, so that
	// it may have been heard by nobody for as long; nil: it was listened to all the time.
	OldSeconds *float64
	// BehindBytes is what it had written after the copy's cut, as it last said;
	// nil: it did not say.
	BehindBytes *uint64
}

// Loss is what a copy lacks of what its primary is known to have had.
type Loss struct {
	None        bool     // the copy holds all there ever was
	Known       bool     // the rest says how much it is at least
	Cuts        uint64   // of the primary, after the copy's
	Seconds     float64  // from the copy's cut until the primary was last heard of; below 0: not known
	BehindBytes *uint64  // nil: not known
	OldSeconds  *float64 // Heard.OldSeconds
}

func (l Loss) String() string {
	if l.None {
		return "nothing is lost"
	}
	if !l.Known {
		return "what is lost is not known: nothing was heard of the primary"
	}
	parts := []string{fmt.Sprintf("what was written after the copy's cut is lost: %d later cuts and an open epoch", l.Cuts)}
	if l.Seconds >= 0 {
		parts = append(parts, fmt.Sprintf("%.1f s until the primary was last heard of", l.Seconds))
	}
	if l.BehindBytes != nil {
		parts = append(parts, fmt.Sprintf("%d bytes by then", *l.BehindBytes))
	}
	if l.OldSeconds != nil {
		parts = append(parts, fmt.Sprintf("which was %.0f s ago, and the agent here was started since: nobody listened to what came after", *l.OldSeconds))
	}
	return strings.Join(parts, ", ")
}

// loss compares a copy with what was heard of its primary.
func loss(st ReplicaStatus, h Heard) Loss {
	if len(h.Lineage) == 0 {
		return Loss{}
	}
	rel := Compare(st.Lineage, h.Lineage)
	if rel.Kind == Same || rel.Kind == Ahead {
		return Loss{None: true}
	}
	l := Loss{Known: true, Seconds: -1, BehindBytes: h.BehindBytes, OldSeconds: h.OldSeconds}
	if n := h.Lineage.Tip().Epoch; n > rel.Common.Epoch {
		l.Cuts = n - rel.Common.Epoch - 1 // the last one is open
	}
	if h.Seconds != nil {
		l.Seconds = *h.Seconds
	}
	return l
}

// TakeOverOptions says how a replica takes over.
type TakeOverOptions struct {
	Heard Heard
	// Force: also when another primary is known to be alive, when writes may be
	// lost, and when the copy strayed.
	Force bool
	Fresh Generation // the new generation; zero: a random one
}

// Promotion is how a replica's device begins as primary.
type Promotion struct {
	State SourceState
	Loss  Loss
}

// PlanTakeOver decides whether a copy may take over, and gives the state with
// which its device begins. It is pure and writes nothing. The errors wrap
// ErrNotConsistent, ErrStrayed, ErrPrimaryAlive or ErrWouldLose.
func PlanTakeOver(st ReplicaStatus, o TakeOverOptions) (Promotion, error) {
	tip := st.Lineage.Tip()
	p := Promotion{Loss: loss(st, o.Heard)}
	refuse := func(err error, format string, args ...any) (Promotion, error) {
		return p, fmt.Errorf("the copy at %v does not take over: %w: %s", tip, err, fmt.Sprintf(format, args...))
	}
	const force = "; force it to go on all the same"
	switch {
	case st.State != DiskConsistent || st.NeedsFull || len(st.Lineage) == 0 || st.PendingEpochs > 0:
		return refuse(ErrNotConsistent, "it is %s %s: it holds no whole image; sync it, or take over elsewhere", st.State, st.Reason)
	case o.Fresh == Generation{}:
		return p, errors.New("a generation can't be all zero")
	case o.Force:
	case st.Strayed != "":
		return refuse(ErrStrayed, "%s%s", st.Strayed, force)
	case o.Heard.Alive:
		return refuse(ErrPrimaryAlive, "it is at %v: let it stand down first; %s%s", o.Heard.Lineage.Tip(), p.Loss, force)
	case !p.Loss.None:
		return refuse(ErrWouldLose, "%s%s", p.Loss, force)
	}
	// No number is used twice that is known to be used.
	next := max(tip.Epoch, o.Heard.Lineage.Tip().Epoch) + 1
	p.State = SourceState{Lineage: st.Lineage.Clone(), Generation: o.Fresh, OpenEpoch: next}
	return p, p.State.Check()
}

// TakeOver makes the replica's device a primary's. What is committed is applied,
// an open epoch dropped, and images that are read are waited for; then the superblock says that the device took over, and the
// label gets the state with which it begins, the first of a new generation. Nobody
// may write to the device before it returns nil; the replica is to be closed then.
//
// It may be repeated after an error or a crash, with OpenOptions.TookOver, or be
// undone by StandDown. When the label went on since, the error is ErrTookOver: the device
// is primary, or was. Otherwise errors are those of PlanTakeOver; nothing was written then.
func (r *Replica) TakeOver(ctx context.Context, label StateStore, o TakeOverOptions) (Promotion, error) {
	if o.Fresh == (Generation{}) {
		rand.Read(o.Fresh[:]) // never fails
	}
	r.epochMu.Lock()
	defer r.epochMu.Unlock()
	r.dropOpen()
	idle := func() (bool, error) { return len(r.pending) == 0 && !r.applying && r.holds == 0, nil }
	if err := r.wait(ctx, idle); err != nil {
		return Promotion{}, err
	}
	raw, err := label.Load()
	var old SourceState
	if err == nil {
		old, err = DecodeSourceState(raw)
	}
	if err != nil {
		return Promotion{}, fmt.Errorf("%s: its label: %w", r.store.Name(), err)
	}
	st := r.Status()
	switch {
	case !st.TookOver.IsZero() && r.sb.label != labelDigest(raw):
		return Promotion{}, fmt.Errorf("%s: %w as %v already: start it, or let it stand down", r.store.Name(), ErrTookOver, st.TookOver)
	case old.OpenEpoch != 0 && !old.Secondary:
		return Promotion{}, fmt.Errorf("%s: its label says that it is primary, at %v, and its superblock that it is a replica at %v: let it stand down first",
			r.store.Name(), old.Effective().Tip(), st.Committed)
	}
	p, err := PlanTakeOver(st, o)
	if err != nil {
		return p, fmt.Errorf("%s: %w", r.store.Name(), err)
	}
	as := Position{p.State.Generation, p.State.OpenEpoch}
	if err := r.writeSuper(2, func(sb *superblock) { sb.tookOver, sb.label = as, labelDigest(raw) }, nil); err != nil {
		return p, err
	}
	// Who came in between reads to the end; nobody gets an image from here on.
	if err := r.wait(ctx, idle); err != nil {
		return p, err
	}
	return p, saveState(label, p.State)
}

// StandDownOptions says how a primary's device becomes a replica.
type StandDownOptions struct {
	Format FormatOptions // Holds is filled in
	// ChangedSince is what the tracker knows: what may have changed after the cut
	// with a number, up to now. The error is ErrTrackingLost when it can't tell. Nil: there
	// is no tracker.
	ChangedSince func(epoch uint64) ([]Range, error)
	// Follow is the lineage of the node to follow; empty: not known yet.
	Follow Lineage
	// Outside says, in words, that the device was written past its tracker; "": it was not.
	// The end was not clean then, and what changed is not known.
	Outside string
	// Stray: also when the end was not clean. The copy then counts as strayed.
	Stray bool
	// CutUnixNanos is the wall clock of the last cut, for people only.
	CutUnixNanos int64
}

// PlanStandDown says what a device holds whose label has the state. It writes
// nothing. The error is ErrUnclean when there may be writes after the last cut and
// Stray is not set.
func PlanStandDown(s SourceState, o StandDownOptions) (*Holding, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	tip := s.Lineage.Tip()
	switch r := s.Restore; {
	case r != nil:
		return nil, fmt.Errorf("a restore of %v from replica %q is not finished: there is no whole image; format the device as a blank replica", r.Lineage.Tip(), r.Replica)
	case len(s.Effective()) == 0:
		return nil, errors.New("it was never primary: format it as a blank replica")
	}
	changed := func(since uint64) ([]Range, error) {
		if o.ChangedSince == nil || since == 0 || o.Outside != "" {
			return nil, ErrTrackingLost
		}
		return o.ChangedSince(since)
	}
	h := &Holding{Lineage: s.Lineage.Clone(), CutUnixNanos: o.CutUnixNanos}
	if o.Outside != "" {
		if s.Clean { // an epoch tells the content from the last cut
			s.Clean, s.OpenEpoch = false, tip.Epoch+1
		}
		h.Lineage, h.Strayed = s.Effective(), o.Outside[:min(len(o.Outside), MaxStrayedReason)]
		if !o.Stray {
			return nil, fmt.Errorf("%w: %s", ErrUnclean, o.Outside)
		}
	} else if !s.Clean {
		after, err := changed(tip.Epoch)
		if err != nil && !errors.Is(err, ErrTrackingLost) {
			return nil, err
		}
		if err != nil || len(after) > 0 {
			h.Lineage = s.Effective()
			h.Strayed = fmt.Sprintf("written as primary after its last cut, %v", tip)
		}
	}
	if h.Strayed != "" && !o.Stray {
		return nil, fmt.Errorf("%w: epoch %d was open, and what was written in it no copy may have: start it and drain it, or allow it to stray", ErrUnclean, s.OpenEpoch)
	}
	// What changed since the two were the same makes the resync small.
	since := tip.Epoch
	if common := Compare(h.Lineage, o.Follow).Common; !common.IsZero() {
		since = min(since, common.Epoch)
	}
	if since == tip.Epoch && h.Strayed == "" {
		h.Since = since
		return h, nil
	}
	ranges, err := changed(since)
	switch {
	case err == nil:
		h.Since, h.Changed = since, ranges
	case !errors.Is(err, ErrTrackingLost):
		return nil, err
	}
	return h, nil
}

// StandDown makes a primary's device a replica around the data that it has. The
// volume is down, so nobody can write; its areas are laid out as o.Format says. It
// returns what the device holds, without what may wait in its journal. It may be
// repeated after a crash: a device that is a replica already stays what it is, and
// one that had only begun to take over is a replica again.
func StandDown(label StateStore, device Store, o StandDownOptions) (*Holding, error) {
	raw, err := label.Load()
	var s SourceState
	if err == nil {
		s, err = DecodeSourceState(raw)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: its label: %w", device.Name(), err)
	}
	sb, _, err := newestSuperblock(device)
	if err != nil {
		return nil, err
	}
	if sb != nil && sb.volume == o.Format.VolumeUUID {
		undo := !sb.tookOver.IsZero() && sb.label == labelDigest(raw)
		if undo || sb.tookOver.IsZero() && (s.Secondary || len(s.Effective()) == 0) {
			return sb.stayReplica(label, device, s, undo)
		}
	}
	if past, err := sb.inheritance(device, o.Format.VolumeUUID, o.Format.SizeBytes, s.Effective()); err == nil && o.ChangedSince != nil {
		tracked := o.ChangedSince
		o.ChangedSince = func(since uint64) ([]Range, error) {
			changed, err := tracked(since)
			if errors.Is(err, ErrTrackingLost) {
				return past.ChangedSince(since, tracked)
			}
			return changed, err
		}
	}
	h, err := PlanStandDown(s, o)
	if err != nil {
		return nil, fmt.Errorf("%s does not stand down: %w", device.Name(), err)
	}
	o.Format.Holds = h
	if err := o.Format.Fits(device.Size()); err != nil {
		return nil, fmt.Errorf("%s does not stand down: %w", device.Name(), err)
	}
	// One from an earlier life as a replica must not vouch for what was written since,
	// once the label says secondary.
	if sb != nil {
		if err := zeroSuperblocks(device, device.Size()/layoutAlign*layoutAlign-superAreaBytes); err != nil {
			return nil, fmt.Errorf("%s does not stand down: %w", device.Name(), err)
		}
	}
	s.Secondary = true
	if err := saveState(label, s); err != nil {
		return nil, err
	}
	return h, FormatReplica(device, o.Format)
}

// stayReplica leaves a device as the replica that it is; undo: it had begun to
// take over, and its label does not know, so it was not written.
func (sb *superblock) stayReplica(label StateStore, device Store, s SourceState, undo bool) (*Holding, error) {
	if undo {
		if err := writeSuperblock(device, *sb); err != nil { // it may be in the cache alone (Replica.writeSuper)
			return nil, err
		}
		sb.tookOver, sb.label = Position{}, [16]byte{}
		for range 2 {
			sb.sequence++
			if err := writeSuperblock(device, *sb); err != nil {
				return nil, err
			}
		}
	}
	if !s.Secondary {
		s.Secondary = true
		if err := saveState(label, s); err != nil {
			return nil, err
		}
	}
	return &Holding{Lineage: sb.lineage, Strayed: sb.strayed, Since: sb.mapBase, CutUnixNanos: sb.cutNanos}, nil
}
