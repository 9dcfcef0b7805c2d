package doctor

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/protocol"
)

// roleReplica is a replica's Part.Role.
const roleReplica = "replica"

var roleWords = map[string]string{
	string(volume.RoleDisk): "the label of volume %s", string(volume.RoleCow): "the COW area of volume %s",
	string(volume.RoleMetadata): "the era metadata of volume %s", roleReplica: "a replica of volume %s",
}

func (p Part) String() string {
	of := p.Volume
	if of == "" {
		of = "that can't be told"
	}
	return fmt.Sprintf(roleWords[p.Role], of)
}

// inspected is what was found at each path.
type inspected map[string]inspectedDisk

type inspectedDisk struct {
	Disk
	use config.DiskUse
	err error
}

func (s *System) inspect(uses []config.DiskUse) inspected {
	all := inspected{}
	for _, u := range uses {
		d, err := s.Inspect(u.Path)
		all[u.Path] = inspectedDisk{d, u, err}
	}
	return all
}

// found is what could be opened.
func (all inspected) found() map[string]Disk {
	disks := map[string]Disk{}
	for path, d := range all {
		if d.err == nil {
			disks[path] = d.Disk
		}
	}
	return disks
}

func (d Disk) part(role string) (Part, bool) {
	for _, p := range d.Parts {
		if p.Role == role {
			return p, true
		}
	}
	return Part{}, false
}

// roleOf is what a volume's configuration wants the disk at a path to be.
func roleOf(v *config.Volume, path string) string {
	switch {
	case v.Secondary():
		return roleReplica
	case path == v.Device:
		return string(volume.RoleDisk)
	case path == v.CowDevice:
		return string(volume.RoleCow)
	case path == v.MetadataDevice:
		return string(volume.RoleMetadata)
	}
	return roleReplica
}

// volumeOf is the UUID that a volume's other disks are held against, and the
// path of the disk that says so: the first that is what it should be, its own
// device before all others.
func (all inspected) volumeOf(v *config.Volume) (uuid, path string) {
	for _, u := range v.DiskUses() {
		if p, ok := all[u.Path].part(roleOf(v, u.Path)); ok && p.Volume != "" {
			return p.Volume, u.Path
		}
	}
	return "", ""
}

// misplaced says what a disk holds and what was expected there, "" if it is the
// right one or none of blockferry's.
func (all inspected) misplaced(v *config.Volume, u config.DiskUse) string {
	d := all[u.Path].Disk
	if len(d.Parts) == 0 {
		return ""
	}
	uuid, by := all.volumeOf(v)
	want := Part{Role: roleOf(v, u.Path), Volume: uuid}
	have, ok := d.part(want.Role)
	if !ok && v.Switches() && u.Path == v.Device {
		have, ok = d.part(roleReplica) // until it has its volume it has no label
	}
	if ok && (have.Volume == "" || uuid == "" || have.Volume == uuid) {
		return ""
	}
	holds := have.String()
	if !ok {
		var words []string
		for _, p := range d.Parts {
			words = append(words, p.String())
		}
		holds = strings.Join(words, " and ")
	}
	expected := want.String() + " is expected there"
	if uuid == "" {
		expected = fmt.Sprintf(roleWords[want.Role], "'"+v.Name+"'") + " is expected there"
	} else if by != u.Path {
		expected += ", which " + all[by].use.What + ", " + by + ", belongs to"
	}
	for _, path := range slices.Sorted(maps.Keys(all)) {
		// Without a UUID to go by, only a disk of this very volume is worth a word.
		own := slices.ContainsFunc(v.DiskUses(), func(u config.DiskUse) bool { return u.Path == path })
		p, ok := all[path].part(want.Role)
		if ok && path != u.Path && path != by && (uuid != "" && p.Volume == uuid || uuid == "" && own) {
			expected += "; there is one on " + path + ", " + all[path].use.What
			break
		}
	}
	return "holds " + holds + ", " + expected
}

// otherJournal says that a replica's journal is not of the size configured.
func otherJournal(v *config.Volume, d Disk) string {
	for _, r := range replicas(v) {
		if p, ok := d.part(roleReplica); ok && r.Device == d.Path {
			return JournalDiffers(r, p.JournalBytes)
		}
	}
	return ""
}

// JournalDiffers says that a replica's journal of a size (0: not known) is not
// as large as configured, "" if it is.
func JournalDiffers(r *config.Replica, have int64) string {
	if have == 0 || r.JournalBytes == 0 || protocol.JournalBytes(r.JournalBytes) == have {
		return ""
	}
	return fmt.Sprintf("has a journal of %s, the configuration says %s; it keeps the one it was made with", config.FormatSize(have), config.FormatSize(r.JournalBytes))
}

// JournalAdvice says how a journal gets another size.
func JournalAdvice(v *config.Volume, replica string) string {
	which := "--replica " + replica + " "
	if v.Secondary() {
		which = ""
	}
	return "say so in the configuration, or make the replica anew, which loses this copy until it is filled again: stop the agent, blockferry create " +
		which + "--discard-my-data " + v.Name + ", start the agent"
}
