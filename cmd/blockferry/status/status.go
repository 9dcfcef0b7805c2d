// Package status is what `blockferry status` shows: one document, as text
// for people and as JSON for programs. JSON keys are in kebab-case and carry
// their unit; what is not known is left out, never 0 or -1.
package status

import "time"

// Document is the state of an agent.
type Document struct {
	Version string   `json:"version"`
	Volumes []Volume `json:"volumes"`
}

// Volume is a volume as its primary sees it.
type Volume struct {
	Name string `json:"name"`
	UUID string `json:"uuid,omitempty"`
	// Device is the disk, Path what the application opens while it is up.
	Device string `json:"device"`
	Path   string `json:"path,omitempty"`
	// Role is Primary while the volume is up, Secondary after a down or while it
	// is only a replica here, Unknown otherwise.
	Role string `json:"role"`
	// Disk is UpToDate while it is up, Consistent after a down, Diskless while
	// the disk is absent (also if it went while the volume was up), blank or being
	// restored, else DUnknown.
	Disk string `json:"disk"`
	Up   bool   `json:"up"`
	// BothRoles: it can be primary and secondary here.
	BothRoles bool `json:"both-roles,omitempty"`
	// Stage is where the agent is with it: starting (not looked at yet),
	// absent, blank, busy (somebody else has a disk), refused, restoring, waiting (for its lease, or for other nodes to answer),
	// down or up; or secondary: it is only a replica here.
	Stage string `json:"stage"`
	// Lease is that of a volume with 'promote: auto'.
	Lease *Lease `json:"lease,omitempty"`
	// Restore says what happens to a blank disk: manual or auto.
	Restore string `json:"restore"`
	// Of RestoreTotalBytes, RestoreDoneBytes are back, while it is restoring.
	RestoreDoneBytes  *uint64   `json:"restore-done-bytes,omitempty"`
	RestoreTotalBytes *uint64   `json:"restore-total-bytes,omitempty"`
	Paused            bool      `json:"paused"`
	SizeBytes         int64     `json:"size-bytes,omitempty"`
	IntervalSeconds   float64   `json:"interval-seconds,omitempty"`
	Position          *Position `json:"position,omitempty"`
	LastCut           *Cut      `json:"last-cut,omitempty"`
	WrittenBytes      *uint64   `json:"written-bytes,omitempty"`
	// Of a replica here: the nodes that may feed it, the one that does (NODE@HOST), and when
	// what it holds was cut, by that node's clock. How far it is behind, only that
	// node knows.
	Peers []string   `json:"peers,omitempty"`
	FedBy string     `json:"fed-by,omitempty"`
	CutAt *time.Time `json:"cut-at,omitempty"`
	// Kept is what a replica here has of an epoch whose link broke.
	Kept *Kept `json:"kept,omitempty"`
	// TakeOver is, of a copy that can become primary here, what that would mean.
	TakeOver *TakeOver `json:"take-over,omitempty"`
	// Reason says why it is not as it should be, Advice what to do then.
	Reason   string    `json:"reason,omitempty"`
	Advice   string    `json:"advice,omitempty"`
	Replicas []Replica `json:"replicas"`
}

// Kept is a part of an epoch that waits for the node that fed it to go on. It takes room
// in the journal or the spill file, until that node begins another epoch, or for a day.
type Kept struct {
	Epoch uint64    `json:"epoch"`
	Bytes uint64    `json:"bytes"`
	Since time.Time `json:"since"`
}

// TakeOver is what is known here, without asking, of a copy that might take over.
type TakeOver struct {
	// Possible: it is a whole image of the line that the volume went. Reason says why not.
	Possible bool   `json:"possible"`
	Reason   string `json:"reason,omitempty"`
	// MissingCuts is how many later cuts are known of, of the node that is, or was, primary, or
	// of a better copy. What was written after the last cut comes on top. Left out: nobody was heard.
	MissingCuts *uint64 `json:"missing-cuts,omitempty"`
}

// Lease is who may write a volume.
type Lease struct {
	// Holder is the node that has it, as far as is known here.
	Holder string `json:"holder,omitempty"`
	// SecondsLeft is, at the holder, when writes fail unless it is renewed. Ending: it
	// will not be; the volume is given up.
	SecondsLeft *float64 `json:"seconds-left,omitempty"`
	Ending      bool     `json:"ending,omitempty"`
	// Reason says why it is not held here, or what keeps it from being renewed.
	Reason string `json:"reason,omitempty"`
}

// Position is what a copy holds.
type Position struct {
	Generation string `json:"generation"`
	Epoch      uint64 `json:"epoch"`
}

// Cut is the last point in time that was fixed.
type Cut struct {
	Epoch          uint64     `json:"epoch"`
	At             *time.Time `json:"at,omitempty"`
	StalledSeconds *float64   `json:"stalled-seconds,omitempty"`
	// Reason says why it was not made as configured, only in another way.
	Reason string `json:"reason,omitempty"`
}

// Replica is one copy.
type Replica struct {
	Name   string `json:"name"`
	Device string `json:"device,omitempty"`
	// Peer is the node it is at, Address where that answers.
	Peer    string `json:"peer,omitempty"`
	Address string `json:"address,omitempty"`
	// Connection is StandAlone, Connecting or Connected; Replication is Off,
	// Established, SyncSource, PausedSyncS, VerifyS or Behind; Disk is
	// Inconsistent, Consistent, UpToDate or DUnknown.
	Connection  string    `json:"connection"`
	Replication string    `json:"replication"`
	Disk        string    `json:"disk"`
	Position    *Position `json:"position,omitempty"`
	// CutAt is, of one beside a copy that follows another node, when what it holds was cut, by
	// that node's clock.
	CutAt *time.Time `json:"cut-at,omitempty"`
	// BehindSeconds and BehindBytes are what a loss of the primary would cost; beside a copy,
	// what the copy has and it lacks, from when it came there.
	BehindSeconds *float64 `json:"behind-seconds,omitempty"`
	BehindBytes   *uint64  `json:"behind-bytes,omitempty"`
	// BehindIsMinimum: it may be more, as that was not counted before the
	// agent's start.
	BehindIsMinimum bool `json:"behind-is-minimum,omitempty"`
	// Mode is how the epoch on its way travels, Done and Total how far it is.
	Mode             string   `json:"mode,omitempty"`
	DoneBytes        *uint64  `json:"done-bytes,omitempty"`
	TotalBytes       *uint64  `json:"total-bytes,omitempty"`
	EtaSeconds       *float64 `json:"eta-seconds,omitempty"`
	JournalFreeBytes *uint64  `json:"journal-free-bytes,omitempty"`
	// LimitBytes may be sent to it a second at this time of day; Limited: that is
	// what holds it back.
	LimitBytes   *uint64 `json:"limit-bytes-per-second,omitempty"`
	Limited      bool    `json:"limited,omitempty"`
	SpilledBytes *uint64 `json:"spilled-bytes,omitempty"`
	Reason       string  `json:"reason,omitempty"`
	Advice       string  `json:"advice,omitempty"`
}
