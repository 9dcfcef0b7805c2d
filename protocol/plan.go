package protocol

import "fmt"

// Action is what must be done to bring a replica up to date.
type Action int

// The actions of a Plan.
const (
	Refuse      Action = iota // nothing may be written to the replica
	Nothing                   // it holds what the primary holds
	Incremental               // send what changed since Plan.Since
	CompareAll                // compare checksums over everything, send what differs
	FullCopy                  // send everything
)

func (a Action) String() string {
	switch a {
	case Nothing:
		return "nothing"
	case Incremental:
		return "incremental"
	case CompareAll:
		return "compare"
	case FullCopy:
		return "full"
	default:
		return "refuse"
	}
}

// PlanInput is all that a plan is made from.
type PlanInput struct {
	Primary Lineage   // with the open epoch, if there is one (SourceState.Effective)
	Replica Lineage   // as it said in its Welcome
	Disk    DiskState // likewise
	// NeedsFull: the replica's content is of unknown origin (changed outside,
	// a damaged journal): all of it must be sent or compared.
	NeedsFull bool
	// Tracked: the tracker can say what changed since the replica's tip.
	Tracked bool
	// AllowUnrelated: the operator allowed this replica's content to be
	// overwritten though it has no history in common with the primary.
	AllowUnrelated bool
	// CatchUpInPlace: the operator allowed a replica that is consistent, but
	// whose journal can't take what is missing, to be Inconsistent while it
	// catches up. JournalTooSmall: that was found out.
	CatchUpInPlace  bool
	JournalTooSmall bool
	// Strayed: the replica holds blocks that belong to no cut (Link.Strayed);
	// empty: it does not.
	Strayed string
	// Discard is the position of this replica that the operator gave up; zero:
	// none. It counts for a replica that went its own way and is just there.
	Discard Position
	// SplitBrain decides otherwise, by what changed since the common position.
	SplitBrain                     SplitBrain
	PrimaryChanged, ReplicaChanged ChangedBytes
}

// Plan says how to bring a replica up to date, and why.
type Plan struct {
	Action  Action
	Since   uint64 // Incremental, Nothing: the epoch of the replica's position
	InPlace bool   // frames go straight to the data area: the replica is Inconsistent until the commit
	// Overwrite: the replica's history is unrelated and the operator allowed
	// it to be overwritten; the replica must be told so.
	Overwrite bool
	// Discard is the replica's position, which gives way: what only it has is
	// saved there. With Incremental what changed at the replica is compared, too.
	Discard Position
	// Diverged: the replica went its own way, whatever is done about it.
	Diverged bool
	// Format: with Refuse, only formatting the replica ends that.
	Format   bool
	Rule     string // the rule that decided, a few words
	Evidence string // what both sides said
}

// String is a line for logs: the action, the rule that decided, the evidence.
func (p Plan) String() string {
	return fmt.Sprintf("%v: %s (%s)", p.Action, p.Rule, p.Evidence)
}

// Err is the refusal as an error, nil for any other action.
func (p Plan) Err() error {
	if p.Action != Refuse {
		return nil
	}
	return &PlanRefusedError{p}
}

// PlanRefusedError is a plan that refuses, with its evidence.
type PlanRefusedError struct{ Plan Plan }

func (e *PlanRefusedError) Error() string { return e.Reason() + "; " + e.Plan.Evidence }

// Reason is the error without the evidence: the same as long as the rule is.
func (e *PlanRefusedError) Reason() string { return "the replica may not be written: " + e.Plan.Rule }

// MakePlan decides. It is pure, total, and knows no clock. A replica that is
// ahead is never overwritten, one that diverged or strayed not without the
// operator's word or policy.
func MakePlan(in PlanInput) Plan {
	rel := Compare(in.Replica, in.Primary)
	p := Plan{Evidence: fmt.Sprintf("replica %s at %v, history [%v]; primary at %v, history [%v]; the replica is %v",
		diskWord(in.Disk), in.Replica.Tip(), in.Replica, in.Primary.Tip(), in.Primary, rel)}
	refuse := func(rule string) Plan {
		p.Action, p.Rule = Refuse, rule
		return p
	}
	format := func(rule string) Plan {
		p.Format = true
		return refuse(rule)
	}
	if err := in.Primary.Check(); err != nil {
		return refuse("the primary's own history is malformed: " + err.Error())
	}
	if err := in.Replica.Check(); err != nil {
		return refuse("the replica's history is malformed: " + err.Error())
	}
	if len(in.Primary) == 0 {
		return refuse("the primary has no history: it never became primary")
	}
	switch in.Disk {
	case DiskBlank:
		if len(in.Replica) > 0 {
			return format("a blank replica has no history, yet this one names one; format it anew")
		}
		p.Action, p.InPlace, p.Rule = FullCopy, true, "the replica was never synced"
		return p
	case DiskInconsistent, DiskConsistent:
	default:
		return refuse(fmt.Sprintf("the replica is in an unknown state (%v); upgrade this node", in.Disk))
	}
	inconsistent := in.Disk == DiskInconsistent
	if inconsistent && len(in.Replica) == 0 {
		p.Action, p.InPlace, p.Rule = CompareAll, true, "a first sync was begun and not finished"
		return p
	}
	if rel.Kind == Diverged || in.Strayed != "" && (rel.Kind == Same || rel.Kind == Behind) {
		p.Diverged = true
		return p.diverged(in, rel)
	}
	switch rel.Kind {
	case Same:
		if inconsistent {
			// The label says that blocks were overwritten after its last commit.
			p.Action, p.InPlace, p.Rule = CompareAll, true, "a catch-up in place was begun and not finished"
			return p
		}
		p.Action, p.Rule, p.Since = Nothing, "both hold the same cut", rel.Common.Epoch
		return p
	case Behind:
		p.InPlace = inconsistent || (in.JournalTooSmall && in.CatchUpInPlace)
		p.Since = rel.Common.Epoch
		switch {
		case in.NeedsFull:
			p.Action, p.Rule, p.Since = CompareAll, "the replica's content is not what it last committed", 0
		case in.Tracked && inconsistent:
			// Whatever the unfinished catch-up wrote had changed since that
			// same position, so it is named again.
			p.Action, p.Rule = Incremental, "a catch-up in place was begun and not finished, and what changed since its start is known"
		case in.Tracked:
			p.Action, p.Rule = Incremental, "the replica holds an earlier cut and what changed since is known"
		default:
			p.Action, p.Rule, p.Since = CompareAll, "the replica holds an earlier cut and what changed since is not known", 0
		}
		return p
	case Ahead:
		return format("the replica is ahead of the primary: it may hold writes that the primary lost; " +
			"restore the primary from it, or format the replica to give them up")
	}
	if in.Strayed != "" {
		return format("the two have no history in common, and the replica strayed (" + in.Strayed + "): format it to give it up")
	}
	if !in.AllowUnrelated {
		return format("the two have no history in common: this is another volume's copy, or a very old one; " +
			"format the replica, or allow it to be overwritten")
	}
	p.Action, p.InPlace, p.Overwrite = CompareAll, true, true
	p.Rule = "the two have no history in common, and the operator allowed the replica to be overwritten"
	return p
}

// diskWord is a disk state in DRBD's words.
func diskWord(d DiskState) string {
	switch d {
	case DiskBlank:
		return "Blank"
	case DiskInconsistent:
		return "Inconsistent"
	case DiskConsistent:
		return "Consistent"
	}
	return "DUnknown"
}
