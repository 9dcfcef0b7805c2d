package protocol

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// PrimaryStatus is where a volume stands, for people and programs alike.
type PrimaryStatus struct {
	Volume       string          `json:"volume"`
	Role         string          `json:"role"`
	SizeBytes    int64           `json:"size-bytes"`
	Position     string          `json:"position"` // the last cut
	Epoch        uint64          `json:"epoch"`
	Generation   string          `json:"generation"`
	WrittenBytes uint64          `json:"written-bytes"`
	Problem      string          `json:"problem,omitempty"` // why no cut can be taken
	Replicas     []ReplicaReport `json:"replicas"`
}

// ReplicaReport is where one replica stands.
type ReplicaReport struct {
	Name        string `json:"name"`
	Connection  string `json:"connection"`  // StandAlone, Connecting, Connected
	Replication string `json:"replication"` // Off, Established, SyncSource, VerifyS, Paused, Behind
	Disk        string `json:"disk"`        // DUnknown, Blank, Inconsistent, Consistent, UpToDate
	Epoch       uint64 `json:"epoch"`       // the replica holds this cut of ours; 0: none
	Generation  string `json:"generation"`  // in which it was cut; "": none
	// LagSeconds is the age of the oldest write that the replica may lack, 0
	// when it lacks none; LagBytes is how much was written since its cut. While
	// that cut is older than this start of the agent, both are counted from
	// the start and LagIsMinimum is set.
	LagSeconds   float64     `json:"lag-seconds"`
	LagBytes     uint64      `json:"lag-bytes"`
	LagIsMinimum bool        `json:"lag-is-minimum,omitempty"`
	Reason       string      `json:"reason,omitempty"`                 // why it is behind, in words
	Cause        error       `json:"-"`                                // the error behind the reason, to tell kinds; nil: there is none
	LimitBytes   int64       `json:"limit-bytes-per-second,omitempty"` // of what is sent, that in force now; 0: none
	Limited      bool        `json:"limited,omitempty"`                // that limit holds it back just now: it is late or being synced
	Plan         string      `json:"plan,omitempty"`                   // the last decision about it, with its evidence
	JournalFree  *uint64     `json:"journal-free-bytes,omitempty"`
	Sync         *SyncReport `json:"sync,omitempty"`
	LastEpoch    *EpochStats `json:"last-epoch,omitempty"`
	Session      *LinkStats  `json:"session,omitempty"`
}

// ErrTrackingGone is a reason that only a new start of tracking ends.
var ErrTrackingGone = errors.New("tracking is lost")

// SyncReport is a sync under way. A round may be followed by another, smaller one.
type SyncReport struct {
	Round      int      `json:"round"`
	DoneBytes  int64    `json:"done-bytes"`
	TotalBytes int64    `json:"total-bytes"`
	Seconds    float64  `json:"seconds"`               // since it began
	ETASeconds *float64 `json:"eta-seconds,omitempty"` // of this round
}

// Status asks the source for its counter and never waits for a replica.
func (p *Primary) Status() PrimaryStatus {
	written, werr := p.cfg.Source.WrittenBytes()
	now := p.cfg.Clock.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	s := PrimaryStatus{
		Volume: p.cfg.Volume, Role: "Primary", SizeBytes: p.size, WrittenBytes: written,
		Position: p.state.Lineage.Tip().String(), Epoch: p.state.Lineage.Tip().Epoch, Generation: fmt.Sprintf("%x", p.state.Generation),
	}
	for _, err := range []error{p.stateErr, p.cutErr, werr} {
		if err != nil {
			s.Problem = err.Error()
			break
		}
	}
	for _, w := range p.workers {
		s.Replicas = append(s.Replicas, w.report(now, written))
	}
	return s
}

// report is the replica's part; mu is held.
func (w *replicaWorker) report(now time.Time, written uint64) ReplicaReport {
	p := w.p
	r := ReplicaReport{Name: w.cfg.Name, Connection: "Connecting", Replication: "Off", Disk: diskWord(w.disk), Epoch: w.holds, Reason: w.reason, Cause: w.cause, LastEpoch: w.last,
		LimitBytes: w.cfg.Link.Pace.Rate()}
	for _, point := range p.state.Lineage {
		if w.holds > 0 && point.Epoch >= w.holds {
			r.Generation = fmt.Sprintf("%x", point.Generation)
			break
		}
	}
	if w.plan != nil {
		r.Plan = w.plan.String()
	}
	since, from := p.started, p.written
	if c := w.committed; c != nil {
		since, from = c.covers, c.written
	} else {
		r.LagIsMinimum = true
	}
	if written > from || r.LagIsMinimum {
		r.LagSeconds = max(0, now.Sub(since).Seconds())
	}
	if written > from {
		r.LagBytes = written - from
	}
	switch {
	case w.paused:
		r.Connection, r.Replication = "StandAlone", "Paused"
	case w.refused:
		r.Connection = "StandAlone"
	case w.connected:
		r.Connection = "Connected"
		late := r.LagSeconds > 3*p.cfg.Interval.Seconds()+2
		switch {
		case w.sync != nil:
			r.Replication = "SyncSource"
			r.Sync = w.sync.report(now)
		case w.verify != nil:
			r.Replication = "VerifyS"
		case late:
			r.Replication = "Behind"
		default:
			r.Replication = "Established"
		}
		if late && (r.Reason == "" || w.stuck() != "") {
			r.Reason, r.Cause = w.slowReason(), nil
		}
		if words := w.limited(); words != "" && (late || w.sync != nil) {
			r.Limited, r.Reason = true, strings.TrimSuffix(words+r.Reason, "; ")
		}
		if w.disk == DiskConsistent && p.lastCut != nil && w.holds == p.lastCut.epoch {
			r.Disk = "UpToDate"
		}
		if l := w.link; l != nil {
			free, stats := l.JournalFreeBytes(), l.Stats()
			r.JournalFree, r.Session = &free, &stats
		}
	}
	return r
}

// stuckAfter is how long a replica may be silent while it is waited for before
// status says so.
const stuckAfter = 2 * time.Second

// stuck says in words that the replica does not answer, "" if it does; mu is held.
func (w *replicaWorker) stuck() string {
	if w.link == nil {
		return ""
	}
	if s := w.link.Silent(); s > stuckAfter {
		return fmt.Sprintf("it has not answered for %.0f s: its disk is stuck, or the way to it", s.Seconds())
	}
	return ""
}

// ReasonLimit begins the words that a configured limit holds a replica back.
const ReasonLimit = "held back by its limit"

// limited says that the limit holds the replica back, to be followed by more, ""
// if it does not.
func (w *replicaWorker) limited() string {
	pace := w.cfg.Link.Pace
	rate := pace.Rate()
	if rate == 0 || !pace.Holding() {
		return ""
	}
	return fmt.Sprintf("%s of %.3g MiB a second; ", ReasonLimit, float64(rate)/(1<<20))
}

// slowReason guesses what takes long, from the last epoch if nothing is known
// of this one; mu is held.
func (w *replicaWorker) slowReason() string {
	switch e := w.last; {
	case w.stuck() != "":
		return w.stuck()
	case w.sync != nil:
		return "being synced"
	case w.p.stateErr != nil || w.p.cutErr != nil:
		return "no cut can be taken, see the volume's problem"
	case e == nil:
		return "no epoch was committed yet"
	case e.CommitSeconds > e.TotalSeconds/2:
		return fmt.Sprintf("the replica's disk is slow: its last commit took %.1f s", e.CommitSeconds)
	default:
		return fmt.Sprintf("an epoch takes longer than the interval: the last one took %.1f s for %d MiB", e.TotalSeconds, e.Link.SentBytes>>20)
	}
}

func (s *syncProgress) report(now time.Time) *SyncReport {
	r := &SyncReport{Round: int(s.round.Load()), DoneBytes: s.doneBytes.Load(), TotalBytes: s.totalBytes.Load(), Seconds: now.Sub(s.begun).Seconds()}
	if elapsed := now.Sub(*s.roundAt.Load()).Seconds(); r.DoneBytes > 0 && elapsed > 0 {
		eta := float64(r.TotalBytes-r.DoneBytes) / (float64(r.DoneBytes) / elapsed)
		r.ETASeconds = &eta
	}
	return r
}
