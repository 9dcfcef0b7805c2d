// Package layout divides a volume's disks before anything is written: every
// disk must hold the volume and the areas that the other role needs too.
package layout

import (
	"fmt"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/protocol"
)

// Plan says how large the volume is and what goes where, in bytes.
type Plan struct {
	SizeBytes int64
	Volume    volume.LayoutOptions
	Areas     volume.Areas
	Replicas  map[string]protocol.FormatOptions // by name, without the ids
}

// Without a word in the configuration the journal is a sixteenth of the
// volume, so that hours of changes fit; of a small volume half, so that nearly
// any epoch fits, as its whole content may be written within one. The area for
// overwritten blocks is likewise, with a quarter.
const (
	maxAreaBytes    = 64 * config.GiB
	fewJournalBytes = 1 * config.GiB
	fewCowBytes     = 512 * config.MiB
	leastJournal    = 16 * config.MiB
	leastCow        = 16 * config.MiB
)

func areaBytes(size, part, few, least int64) int64 {
	n := max(size/16, min(size/part, few), least)
	return min((n+config.MiB-1)/config.MiB*config.MiB, maxAreaBytes)
}

func journalBytes(r *config.Replica, size int64) int64 {
	if r.JournalBytes > 0 {
		return r.JournalBytes
	}
	return areaBytes(size, 2, fewJournalBytes, leastJournal)
}

func cowBytes(v *config.Volume, size int64) int64 {
	if v.CowBytes > 0 || v.CowDevice != "" {
		return v.CowBytes
	}
	return areaBytes(size, 4, fewCowBytes, leastCow)
}

// Make plans a volume for disks of the given sizes, by path. When it does not
// fit the error says which disk and how large it would have to be.
func Make(v *config.Volume, diskBytes map[string]int64) (Plan, error) {
	if v.SizeBytes > 0 {
		return try(v, diskBytes, v.SizeBytes)
	}
	// What is needed grows with the size: search for the largest that fits.
	least := config.MinVolumeBytes / config.MiB
	if p, err := try(v, diskBytes, least*config.MiB); err != nil {
		return p, err
	}
	low, high := least, diskBytes[v.Device]/config.MiB
	for low < high {
		middle := (low + high + 1) / 2
		if _, err := try(v, diskBytes, middle*config.MiB); err == nil {
			low = middle
		} else {
			high = middle - 1
		}
	}
	return try(v, diskBytes, low*config.MiB)
}

func try(v *config.Volume, diskBytes map[string]int64, size int64) (Plan, error) {
	p := Plan{SizeBytes: size, Replicas: map[string]protocol.FormatOptions{}}
	tail := int64(0)
	if len(v.Local()) == 0 { // the other role needs one all the same
		tail = protocol.TailBytes(size, journalBytes(&config.Replica{}, size))
	}
	for _, r := range v.Local() {
		tail = max(tail, protocol.TailBytes(size, journalBytes(r, size)))
	}
	if v.Switches() {
		tail = max(tail, protocol.TailBytes(size, journalBytes(v.Copy, size)))
	}
	p.Volume = volume.LayoutOptions{
		SizeBytes: size, EraBlockBytes: v.EraBlockBytes, CowBytes: cowBytes(v, size), TailBytes: tail,
		CowDeviceBytes: diskBytes[v.CowDevice], MetaDeviceBytes: diskBytes[v.MetadataDevice],
	}
	areas, err := volume.Layout(diskBytes[v.Device], p.Volume)
	if err != nil {
		return Plan{}, exit.Errorf(exit.Refused, "%s: %w; choose a smaller 'size' or 'cow', or larger disks", v.Device, err)
	}
	p.Areas = areas
	for _, r := range v.Local() {
		o, err := Replica(r, areas, diskBytes[r.Device])
		if err != nil {
			return Plan{}, err
		}
		p.Replicas[r.Name] = o
	}
	return p, nil
}

// Replica says how a replica's disk is divided for a volume with such areas.
func Replica(r *config.Replica, a volume.Areas, diskBytes int64) (protocol.FormatOptions, error) {
	size := a.Data.Length
	o := protocol.FormatOptions{SizeBytes: size, JournalBytes: journalBytes(r, size), ReserveBytes: reserve(a)}
	if need := o.NeededBytes(); need > diskBytes {
		return o, exit.Errorf(exit.Refused, "%s: replica '%s' of a volume of %s needs %d bytes (%s), the disk has %d; choose a smaller 'size', or a larger disk",
			r.Device, r.Name, config.FormatSize(size), need, config.FormatSize(need), diskBytes)
	}
	return o, nil
}

// Secondary says how the disk of a volume that is never more than a replica here
// is divided for a size.
func Secondary(v *config.Volume, size, diskBytes int64) (protocol.FormatOptions, error) {
	a, err := volume.Layout(diskBytes, Switching(v, size))
	if err != nil {
		return protocol.FormatOptions{}, exit.Errorf(exit.Refused, "%s: %w; it needs a larger disk", v.Device, err)
	}
	return Replica(v.Copy, a, diskBytes)
}

// Switching says how the disk of a volume that begins as a replica, and can take
// over, is divided for a size.
func Switching(v *config.Volume, size int64) volume.LayoutOptions {
	return volume.LayoutOptions{SizeBytes: size, EraBlockBytes: v.EraBlockBytes, CowBytes: cowBytes(v, size),
		TailBytes: protocol.TailBytes(size, journalBytes(v.Copy, size))}
}

// OnLabelled is the replica on a disk whose front has a volume's label: its data
// is the volume's, its tail the room that the label leaves free.
func OnLabelled(l *volume.Label) protocol.FormatOptions {
	size := l.Areas.Data.Length
	return protocol.FormatOptions{
		VolumeUUID: l.UUID, SizeBytes: size, DataOffset: l.Areas.Data.Offset,
		JournalBytes: l.Areas.TailBytes - protocol.TailBytes(size, 0), ReserveBytes: l.TailOffset() - (l.Areas.Data.Offset + (size+config.MiB-1)/config.MiB*config.MiB),
	}
}

// Undecided says how it is divided before its volume's size is known.
func Undecided(diskBytes int64) (protocol.FormatOptions, error) {
	o := protocol.FormatOptions{VolumeUUID: protocol.AnyVolume, SizeBytes: config.MinVolumeBytes, JournalBytes: leastJournal}
	if need := o.NeededBytes(); need > diskBytes {
		return o, exit.Errorf(exit.Refused, "the disk has %d bytes, a replica needs at least %d", diskBytes, need)
	}
	return o, nil
}

// reserve is the room a replica keeps for the areas it would need as primary,
// its label included.
func reserve(a volume.Areas) int64 { return a.Cow.Length + a.Meta.Length }

// String is the plan in a few words.
func (p Plan) String() string {
	return fmt.Sprintf("%s, areas of %s (overwritten blocks) and %s (marks)",
		config.FormatSize(p.SizeBytes), config.FormatSize(p.Areas.Cow.Length), config.FormatSize(p.Areas.Meta.Length))
}
