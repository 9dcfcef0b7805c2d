// Package doctor looks at a configuration, a kernel and disks and says what
// would keep blockferry from working, each finding with what to do. `check`
// prints the findings; `create` and the agent refuse because of them before
// anything is written.
package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"blockferry/blockdev/udev"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
)

// Level is how bad a finding is.
type Level string

// Levels. Only Refuse keeps anything from starting.
const (
	Good   Level = "ok"
	Note   Level = "note"
	Refuse Level = "refuse"
)

// Finding is one thing that was looked at.
type Finding struct {
	Level   Level  `json:"level"`
	Subject string `json:"subject"`
	Message string `json:"message"`
	// Advice says what to do; every finding but a good one has it.
	Advice string `json:"advice,omitempty"`
	// Code is how a command ends that is kept from working by this.
	Code exit.Code `json:"-"`
}

func (f Finding) String() string {
	s := fmt.Sprintf("%-6s %s: %s", f.Level, f.Subject, f.Message)
	if f.Advice != "" {
		s += "; " + f.Advice
	}
	return s
}

// Findings in the order they were made.
type Findings []Finding

func (f *Findings) good(subject, format string, args ...any) {
	*f = append(*f, Finding{Level: Good, Subject: subject, Message: fmt.Sprintf(format, args...)})
}

func (f *Findings) note(subject, message, advice string) {
	*f = append(*f, Finding{Level: Note, Subject: subject, Message: message, Advice: advice})
}

func (f *Findings) refuse(code exit.Code, subject, message, advice string) {
	*f = append(*f, Finding{Level: Refuse, Subject: subject, Message: message, Advice: advice, Code: code})
}

// Err is nil when nothing refuses; otherwise one error that names all that
// does, with the code of the first.
func (f Findings) Err() error {
	var lines []string
	code := exit.OK
	for _, one := range f {
		if one.Level != Refuse {
			continue
		}
		if code == exit.OK {
			code = one.Code
		}
		lines = append(lines, one.Subject+": "+one.Message+"; "+one.Advice)
	}
	if len(lines) == 0 {
		return nil
	}
	return exit.Errorf(code, "%s", strings.Join(lines, "\n"))
}

// System is what the doctor asks the machine. Tests replace single questions.
type System struct {
	Euid    func() int
	Release func() (string, error)
	// Targets lists device-mapper's targets; an error means that there is no
	// device-mapper.
	Targets  func() ([]string, error)
	Modprobe func(module string) error
	// Distribution is ID and ID_LIKE of os-release.
	Distribution func() string
	Inspect      func(path string) (Disk, error)
	SameDisk     func(a, b string) (bool, error)
	Exists       func(path string) bool
	// Survives is nil if a file at a path outlives the machine and a disk.
	Survives func(path, disk string) error
	// DiscardsOff is volume.DiscardsOff.
	DiscardsOff func(device string, eraBlockBytes int64) string
}

// Disk is what was found out about a disk, without changing it.
type Disk struct {
	Path      string
	SizeBytes int64
	Users     []User
	// Content says what it holds: empty means all that was looked at is zero.
	Content string
	// Ours: the content is blockferry's.
	Ours bool
	// Parts are what the disk is to which volumes, by all that stands on it: a
	// disk that served as one before may show both.
	Parts []Part
}

// Part is what a disk is to a volume.
type Part struct {
	Role   string // a Role of package volume, or "replica"
	Volume string // UUID; "": not known
	// JournalBytes is the size of a replica's journal, 0: not known.
	JournalBytes int64
}

// User is somebody who has a disk in use: Kind is blockdev.Use's. Holder is the
// name of the device built on it, if that is what it is.
type User struct{ Kind, Words, Holder string }

// Kernel looks at root, kernel and modules, as far as the volumes need them. It
// loads modules that are missing.
func (s *System) Kernel(volumes ...*config.Volume) Findings {
	var f Findings
	if s.Euid() != 0 {
		f.refuse(exit.Prerequisite, "user", "device-mapper and BPF need root", "run it with sudo")
		return f
	}
	if len(volumes) > 0 {
		volumes = slices.DeleteFunc(slices.Clone(volumes), (*config.Volume).Secondary)
		if len(volumes) == 0 {
			f.good("kernel", "replicas alone need nothing of it")
			return f
		}
	}
	attach := func(v *config.Volume) bool { return v.Attach }
	if slices.ContainsFunc(volumes, attach) {
		if s.Exists(KernelTypes) {
			f.good("bpf", "the kernel describes its types in %s", KernelTypes)
		} else {
			f.refuse(exit.Prerequisite, "bpf", "this kernel does not describe its types: "+KernelTypes+" is not there, so changes can't be tracked on a device in use",
				"boot a kernel with CONFIG_DEBUG_INFO_BTF, as the distributions' are, or use 'mode: mapper'")
		}
	}
	if len(volumes) > 0 && !slices.ContainsFunc(volumes, func(v *config.Volume) bool { return !attach(v) }) {
		return f
	}
	release, err := s.Release()
	switch {
	case err != nil:
		f.note("kernel", "its release can't be read: "+err.Error(), "make sure that it is Linux 5.12 or later")
	case older(release, 5, 12):
		f.refuse(exit.Prerequisite, "kernel", release+" loses dm-era's marks in a crash (fixed in 5.12)", "boot a kernel of 5.12 or later")
	default:
		f.good("kernel", "%s", release)
	}
	s.targets(&f, release)
	return f
}

// KernelTypes is what BPF programs are fitted to a kernel with.
const KernelTypes = "/sys/kernel/btf/vmlinux"

// wanted maps each device-mapper target to the module that holds it.
var wanted = []struct{ target, module string }{
	{"linear", "dm-mod"}, {"era", "dm-era"}, {"snapshot", "dm-snapshot"}, {"snapshot-origin", "dm-snapshot"},
}

func (s *System) targets(f *Findings, release string) {
	have, err := s.Targets()
	if err != nil {
		if s.Modprobe("dm-mod") == nil {
			have, err = s.Targets()
		}
		if err != nil {
			f.refuse(exit.Prerequisite, "device-mapper", "this kernel has none ("+err.Error()+")", s.moduleAdvice("dm-mod", release))
			return
		}
	}
	asked := map[string]bool{}
	for _, w := range wanted {
		if slices.Contains(have, w.target) || asked[w.module] {
			continue
		}
		asked[w.module] = true
		if err := s.Modprobe(w.module); err == nil {
			if have, err = s.Targets(); err == nil && slices.Contains(have, w.target) {
				continue
			}
		}
		f.refuse(exit.Prerequisite, w.module, "this kernel ("+release+") has no device-mapper target '"+w.target+"'", s.moduleAdvice(w.module, release))
	}
	if f.Err() == nil {
		f.good("device-mapper", "linear, era, snapshot, snapshot-origin")
	}
}

// DeadMan says whether the dead-man's service is there, on a machine that has a
// manager of services.
func (s *System) DeadMan(socket string) Findings {
	var f Findings
	switch {
	case !s.Exists("/run/systemd/system"):
	case s.Exists(socket):
		f.good("dead-man", "its service runs")
	default:
		f.note("dead-man", "its service does not run ("+socket+" is not there): the agent starts one of its own, and whatever kills the agent's control group kills both",
			"run: systemctl enable --now blockferry-deadman")
	}
	return f
}

// moduleAdvice names the package that brings a module.
func (s *System) moduleAdvice(module, release string) string {
	d := strings.Fields(s.Distribution())
	switch {
	case slices.Contains(d, "ubuntu"):
		return "install linux-modules-extra-" + release + " (apt-get install linux-modules-extra-" + release + "), then: modprobe " + module
	case slices.Contains(d, "debian"):
		return "install the package linux-image-amd64 (or linux-image-cloud-amd64) and boot it, then: modprobe " + module
	case slices.Contains(d, "amzn"), slices.Contains(d, "fedora"), slices.Contains(d, "rhel"), slices.Contains(d, "centos"):
		return "install kernel-modules-extra for " + release + " (dnf install kernel-modules-extra), then: modprobe " + module
	}
	return "install your distribution's package with the extra kernel modules (linux-modules-extra, kernel-modules-extra, linux-image-amd64), then: modprobe " + module
}

// older reports whether a release like 6.1.0-28-cloud is before major.minor.
func older(release string, major, minor int) bool {
	var a, b int
	if n, _ := fmt.Sscanf(release, "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a < major || (a == major && b < minor)
}

// Purpose is what the disks are looked at for.
type Purpose int

// AsFound: the agent is to run with them, or runs already. Empty: they are to
// be formatted. EmptyForced: likewise, and what others left on them may be
// lost. EmptyDiscard: so may volumes and replicas of blockferry.
const (
	AsFound Purpose = iota
	Empty
	EmptyForced
	EmptyDiscard
)

// Disks looks at every disk of a volume: there, not in use by others, and
// holding what the purpose wants. The disks are returned by path.
func (s *System) Disks(v *config.Volume, purpose Purpose) (map[string]Disk, Findings) {
	var f Findings
	disks := s.inspect(v.DiskUses())
	for _, u := range v.DiskUses() {
		s.disk(&f, v, u, purpose, disks)
	}
	return disks.found(), f
}

// Volumes looks at the disks of all volumes, as found. One that stands in
// another's place is named with the place where it should be.
func (s *System) Volumes(c *config.Config) map[*config.Volume]Findings {
	disks := s.inspect(c.DiskUses())
	all := map[*config.Volume]Findings{}
	for _, v := range c.Volumes {
		var f Findings
		for _, u := range v.DiskUses() {
			s.disk(&f, v, u, AsFound, disks)
		}
		all[v] = f
	}
	return all
}

// Disk looks at one disk of a volume as Disks does.
func (s *System) Disk(v *config.Volume, path string, purpose Purpose) (Disk, Findings) {
	var f Findings
	var disks inspected
	for _, u := range v.DiskUses() {
		if u.Path == path {
			disks = s.inspect([]config.DiskUse{u})
			s.disk(&f, v, u, purpose, disks)
		}
	}
	return disks[path].Disk, f
}

func (s *System) disk(f *Findings, v *config.Volume, u config.DiskUse, purpose Purpose, disks inspected) {
	d, err := disks[u.Path].Disk, disks[u.Path].err
	switch {
	case errors.Is(err, udev.ErrAmbiguous):
		f.refuse(exit.Refused, u.Path, u.What+" can't be told: "+err.Error(), "correct the configuration")
		return
	case err != nil:
		f.refuse(exit.Prerequisite, u.Path, u.What+" can't be opened: "+err.Error(), "attach it, or correct the path in the configuration")
		return
	}
	if v.Attach && u.Path == v.Device {
		s.attached(f, u, d)
		return
	}
	others := notOurs(v.Name, d.Users)
	misplaced, journal := "", ""
	if purpose == AsFound {
		misplaced, journal = disks.misplaced(v, u), otherJournal(v, d)
	}
	switch {
	case len(others) > 0:
		f.refuse(exit.Refused, u.Path, u.What+" is in use: "+strings.Join(others, ", "), "unmount or detach it there first")
	case len(d.Users) > 0 && purpose != AsFound:
		f.refuse(exit.Refused, u.Path, u.What+" is in use by blockferry itself", "take the volume down first: blockferry down "+v.Name)
	case purpose != AsFound && purpose != EmptyDiscard && d.Ours:
		f.refuse(exit.Refused, u.Path, u.What+" holds "+d.Content,
			"nothing was written; if only another disk was lost, see 'blockferry restore' and 'blockferry create --replica'; if this copy may be lost for good, repeat with --discard-my-data")
	case purpose == Empty && d.Content != "":
		f.refuse(exit.Refused, u.Path, u.What+" holds "+d.Content, "nothing was written; if it may be lost, repeat with --force")
	case misplaced != "":
		f.refuse(exit.Refused, u.Path, u.What+" "+misplaced, "nothing is written to it; check the paths in the configuration, or which disk is attached where")
	case purpose == AsFound && !d.Ours && v.Secondary():
		f.note(u.Path, u.What+" is none yet, it is "+contentWords(d.Content), "if it may become one, run: blockferry create "+v.Name)
	case purpose == AsFound && d.Content != "" && !d.Ours && u.Path == v.Device:
		f.refuse(exit.Refused, u.Path, u.What+" holds "+d.Content, "if it may be lost, run: blockferry create --force "+v.Name)
	case purpose == AsFound && d.Content == "" && u.Path == v.Device:
		f.note(u.Path, u.What+" is blank", "for a new volume run: blockferry create "+v.Name+"; if only this disk was lost: blockferry restore "+v.Name)
	case purpose == AsFound && !d.Ours && isReplica(v, u.Path):
		f.note(u.Path, u.What+" is no replica yet, it is "+contentWords(d.Content),
			"for a new volume run: blockferry create "+v.Name+"; if only this disk was lost or exchanged: blockferry create --replica "+replicaAt(v, u.Path)+" "+v.Name)
	case journal != "":
		f.note(u.Path, u.What+" "+journal, JournalAdvice(v, replicaAt(v, u.Path)))
	default:
		f.good(u.Path, "%s, %s, %s", u.What, config.FormatSize(d.SizeBytes), contentWords(d.Content))
	}
}

// attached looks at a device that is replicated as it is. What it holds is the
// application's.
func (s *System) attached(f *Findings, u config.DiskUse, d Disk) {
	var users []string
	for _, user := range d.Users {
		users = append(users, user.Words)
		if user.Kind != "mount" {
			f.refuse(exit.Refused, u.Path, u.What+" is in use by what can't be stopped for a cut: "+user.Words, "only mounted file systems can; use 'mode: mapper' for the others")
			return
		}
	}
	if len(users) == 0 {
		f.note(u.Path, u.What+" is not mounted: nobody who writes to it can be stopped for a cut", "mount it")
		return
	}
	f.good(u.Path, "%s, %s, %s", u.What, config.FormatSize(d.SizeBytes), strings.Join(users, ", "))
}

// replicas are those on disks of this machine.
func replicas(v *config.Volume) []*config.Replica {
	if v.Secondary() {
		return []*config.Replica{v.Copy}
	}
	return v.Local()
}

func replicaAt(v *config.Volume, path string) string {
	for _, r := range replicas(v) {
		if r.Device == path {
			return r.Name
		}
	}
	return ""
}

func isReplica(v *config.Volume, path string) bool { return replicaAt(v, path) != "" }

// notOurs leaves out users that are the volume's own inner devices.
func notOurs(volume string, users []User) []string {
	var others []string
	for _, u := range users {
		own := u.Holder != "" && u.Holder == volume
		for _, inner := range config.InnerSuffixes() {
			own = own || u.Holder == volume+inner
		}
		if !own {
			others = append(others, u.Words)
		}
	}
	return others
}

// Distinct finds paths that lead to one disk.
func (s *System) Distinct(uses []config.DiskUse) Findings {
	var f Findings
	for i, a := range uses {
		for _, b := range uses[i+1:] {
			if same, err := s.SameDisk(a.Path, b.Path); err == nil && same {
				f.refuse(exit.Refused, b.Path, b.What+" is the same disk as "+a.Path+", "+a.What, "name two different disks in the configuration")
			}
		}
	}
	return f
}

func contentWords(content string) string {
	if content == "" {
		return "blank"
	}
	return "holds " + content
}

// Spills looks at where the spill files of a volume's replicas are.
func (s *System) Spills(v *config.Volume) Findings {
	var f Findings
	for _, r := range replicas(v) {
		if r.Spill == "" {
			continue
		}
		if err := s.Survives(r.Spill, v.Device); err != nil {
			f.refuse(exit.Refused, r.Spill, "the spill file of replica '"+r.Name+"' can't be there: "+err.Error(),
				"name a place that stays with the replica: another disk, attached as the replica's is")
			continue
		}
		f.good(r.Spill, "the spill file of replica '%s'", r.Name)
	}
	return f
}

// DistinctSpills finds spill files that are one file: it is a part of one replica.
func (s *System) DistinctSpills(c *config.Config) Findings {
	var f Findings
	type spill struct{ path, real, what string }
	var seen []spill
	for _, v := range c.Volumes {
		for _, r := range replicas(v) {
			if r.Spill == "" {
				continue
			}
			one := spill{r.Spill, realPath(r.Spill), "replica '" + r.Name + "' of volume '" + v.Name + "'"}
			for _, other := range seen {
				same, err := s.SameDisk(one.path, other.path) // two names of one file; an error: not there yet
				if one.real == other.real || err == nil && same {
					f.refuse(exit.Refused, one.path, "the spill file of "+one.what+" is the same file as "+other.path+", that of "+other.what, "name a file for each replica")
				}
			}
			seen = append(seen, one)
		}
	}
	return f
}

// realPath is a path without links, of a file that need not be there yet.
func realPath(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	if to, err := os.Readlink(path); err == nil {
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(path), to)
		}
		path = to
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return path
	}
	return filepath.Join(dir, filepath.Base(path))
}

// Discards says what becomes of them on a volume.
func (s *System) Discards(v *config.Volume) Finding {
	f := Finding{Level: Good, Subject: "volume '" + v.Name + "'", Message: "discards (fstrim) are tracked and replicated as zeros"}
	if v.Attach {
		return f
	}
	if why := s.DiscardsOff(v.Device, v.EraBlockBytes); why != "" {
		f.Level, f.Message = Note, "discards (fstrim) are off: "+why
		f.Advice = "nothing needs to be done; a larger 'era-block' helps where that is the reason"
		return f
	}
	f.Message = "discards (fstrim) pass to the disk, are tracked and replicated as zeros; those issued while an epoch is read from a frozen view are dropped"
	return f
}
