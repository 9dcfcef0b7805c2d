// Package config reads blockferry's configuration: one YAML file, checked
// without touching any device. Every error names file, line and column, and
// all errors of a file are reported at once.
package config

import (
	"sort"
	"strings"
	"time"
)

// DefaultPath is where commands look when --config is not given.
const DefaultPath = "/etc/blockferry/blockferry.yaml"

// Ranges of what a file may say. Sizes are in bytes.
const (
	KiB = int64(1) << 10
	MiB = int64(1) << 20
	GiB = int64(1) << 30
	TiB = int64(1) << 40

	MinVolumeBytes   = 1 * MiB
	MaxVolumeBytes   = 256 * TiB
	MinEraBlockBytes = 64 * KiB
	MaxEraBlockBytes = 4 * MiB
	MinCowBytes      = 16 * MiB
	MaxCowBytes      = 4 * TiB
	MinJournalBytes  = 16 * MiB
	MaxJournalBytes  = 4 * TiB

	MinInterval = 100 * time.Millisecond
	MaxInterval = time.Hour

	MinStallLimit     = 10 * time.Millisecond
	MaxStallLimit     = time.Minute
	DefaultStallLimit = time.Second

	MinStallBudget     = time.Millisecond
	DefaultStallBudget = 20 * time.Millisecond

	// DefaultStateDir holds the state files of attached volumes, and what agents remember.
	DefaultStateDir = "/var/lib/blockferry"

	// DefaultRescueDir takes rescue files.
	DefaultRescueDir = DefaultStateDir + "/rescue"

	// MaxSpillPath is the longest path of a spill file: the replica's disk keeps it.
	MaxSpillPath = 212

	// MaxNameLength leaves room for the suffixes of the inner devices in the
	// kernel's 127 bytes.
	MaxNameLength = 63
)

// CompressionAuto has what is sent to a replica packed as suits link and processor.
const CompressionAuto = "auto"

// Values of Volume.WhenBusy.
const (
	BusyReport   = "report"   // no image is taken; default with Attach
	BusyStall    = "stall"    // the same, but not for long: then writers are stopped for up to StallLimit
	BusySnapshot = "snapshot" // a frozen view; default without Attach, where there is none
)

// Config is a whole file. Volumes and replicas are sorted by name.
type Config struct {
	Path    string
	Node    *Node  // nil: no other machine is known
	Lease   *Lease // nil: none
	Volumes []*Volume
	// RescueDir is the folder for what one copy alone had when it was overwritten.
	RescueDir string
}

// Volume is one replicated device.
type Volume struct {
	Name string
	// Copy is set when the volume may be a replica here, fed by another node: it
	// is that replica, on Device. Peers are the nodes that may feed it. Without
	// Replicas it is never more than that; with them it has either role, and
	// BeginsSecondary says which one before its disk tells.
	Copy            *Replica
	Peers           []string
	BeginsSecondary bool
	// Hooks are never nil.
	Hooks *Hooks
	// Device is the disk that holds the volume: its path, or what it is (package udev).
	Device string
	// Attach replicates Device as it is, mounted and in use, without a device
	// above it.
	Attach bool
	// StateFile keeps what a label keeps otherwise; only with Attach.
	StateFile string
	// PreCopy reads what changed into memory for a cut, where fine tracking knows
	// what that is.
	PreCopy bool
	// StallBudget is how long writers may be stopped to read what changed last, and WhenBusy
	// what is done when more is written than can be read in time: BusyReport, BusyStall or
	// BusySnapshot; both only with Attach or PreCopy.
	StallBudget time.Duration
	WhenBusy    string
	// SizeBytes is the volume's size, a multiple of 4096; 0 means as large as
	// fits on all its devices.
	SizeBytes int64
	// Interval is the time from one cut to the next.
	Interval time.Duration
	// FreezeFilesystem asks for a file-system freeze at each cut.
	FreezeFilesystem bool
	// StallLimit is how long writers may be stopped for a cut; a cut that takes
	// longer is void.
	StallLimit time.Duration
	// EraOnly leaves fine tracking out, where the kernel could do it.
	EraOnly bool
	// EraBlockBytes is the grain of the kernel's mark, a multiple of 64 KiB.
	EraBlockBytes int64
	// CowBytes is the size of the area that keeps what is overwritten while
	// an epoch is read; 0 means chosen by the volume's size.
	CowBytes int64
	// CowDevice, when not empty, is used instead of an area on Device.
	CowDevice string
	// MetadataDevice, when not empty, holds the kernel's marks.
	MetadataDevice string
	// AutoRestore lets the agent restore a blank Device by itself, but one named by its model.
	AutoRestore bool
	// SplitBrain says what gives way when a replica was written on its own: none,
	// discard-older-primary, discard-least-changes or discard-zero-changes.
	SplitBrain string
	// AutoPromote has the volume written only by the node that has its lease; another
	// node's copy takes over by itself when that has ended, if it lacked no more than
	// MaxLoss when the holder renewed it last.
	AutoPromote bool
	MaxLoss     time.Duration
	Replicas    []*Replica
}

// Replica is one copy of a volume: on Device, or at another node, at Address.
type Replica struct {
	Name   string
	Device string
	// Address is where the node Peer answers: HOST:PORT, or unix:PATH. Device,
	// the journal and the spill file are that node's to know.
	Address     string
	Peer        string
	Compression string // none, s2, zstd or CompressionAuto
	// Rate limits what is sent to it, packed.
	Rate *Rate
	// JournalBytes is the room for epochs that are not complete yet; 0 means
	// chosen by the volume's size.
	JournalBytes int64
	// Spill, when not empty, is the file that takes what an epoch has beyond the
	// journal; it becomes a part of the replica.
	Spill string
	// SpillLimitBytes is how much of one epoch it takes; 0 means as much as the
	// volume has.
	SpillLimitBytes int64
	// InPlace allows a catch-up that is larger than the journal to write
	// straight over the old image.
	InPlace bool
}

// Volume returns the named volume; with an empty name the only one.
func (c *Config) Volume(name string) (*Volume, error) {
	if name == "" {
		switch len(c.Volumes) {
		case 1:
			return c.Volumes[0], nil
		default:
			return nil, &Error{File: c.Path, Message: "several volumes are configured (" +
				strings.Join(c.names(), ", ") + "): say which one"}
		}
	}
	for _, v := range c.Volumes {
		if v.Name == name {
			return v, nil
		}
	}
	return nil, &Error{File: c.Path, Message: "no volume '" + name + "' is configured" +
		didYouMean(name, c.names())}
}

func (c *Config) names() []string {
	names := make([]string, 0, len(c.Volumes))
	for _, v := range c.Volumes {
		names = append(names, v.Name)
	}
	return names
}

// Replica returns the named replica; with an empty name the only one.
func (v *Volume) Replica(name string) (*Replica, error) {
	var names []string
	for _, r := range v.Replicas {
		if r.Name == name || (name == "" && len(v.Replicas) == 1) {
			return r, nil
		}
		names = append(names, r.Name)
	}
	if name == "" {
		return nil, &Error{Message: "volume '" + v.Name + "' has several replicas (" +
			strings.Join(names, ", ") + "): say which one with --from"}
	}
	return nil, &Error{Message: "volume '" + v.Name + "' has no replica '" + name + "'" + didYouMean(name, names)}
}

func (c *Config) sort() {
	sort.Slice(c.Volumes, func(i, j int) bool { return c.Volumes[i].Name < c.Volumes[j].Name })
	for _, v := range c.Volumes {
		sort.Slice(v.Replicas, func(i, j int) bool { return v.Replicas[i].Name < v.Replicas[j].Name })
	}
}

// Resolve has the disks that are named by what they are named by their paths from now on, for
// a command that ends soon. find is asked for each; one that it does not find keeps its name.
func (c *Config) Resolve(find func(name string) (path string, err error)) {
	for _, v := range c.Volumes {
		names := []*string{&v.Device, &v.CowDevice, &v.MetadataDevice}
		for _, r := range v.Replicas {
			names = append(names, &r.Device)
		}
		if v.Copy != nil {
			names = append(names, &v.Copy.Device)
		}
		for _, name := range names {
			if path, err := find(*name); err == nil {
				*name = path
			}
		}
	}
}

// DiskUse is a disk and what it is for.
type DiskUse struct{ Path, What string }

// DiskUses lists every disk of a volume.
func (v *Volume) DiskUses() []DiskUse {
	if v.Secondary() {
		return []DiskUse{{v.Device, "the replica of volume '" + v.Name + "'"}}
	}
	uses := []DiskUse{{v.Device, "the device of volume '" + v.Name + "'"}}
	if v.MetadataDevice != "" {
		uses = append(uses, DiskUse{v.MetadataDevice, "the metadata device of volume '" + v.Name + "'"})
	}
	if v.CowDevice != "" {
		uses = append(uses, DiskUse{v.CowDevice, "the cow device of volume '" + v.Name + "'"})
	}
	for _, r := range v.Local() {
		uses = append(uses, DiskUse{r.Device, "replica '" + r.Name + "' of volume '" + v.Name + "'"})
	}
	return uses
}

// Local lists the replicas that are on disks of this machine.
func (v *Volume) Local() []*Replica {
	var local []*Replica
	for _, r := range v.Replicas {
		if r.Address == "" {
			local = append(local, r)
		}
	}
	return local
}

// Secondary reports whether the volume is never more than a replica here.
func (v *Volume) Secondary() bool { return v.Copy != nil && len(v.Replicas) == 0 }

// Switches reports whether the volume can be primary and secondary here.
func (v *Volume) Switches() bool { return v.Copy != nil && len(v.Replicas) > 0 }

// AddressOf is where a node answers that is replicated to; "": not known.
func (v *Volume) AddressOf(node string) string {
	for _, r := range v.Replicas {
		if r.Address != "" && r.Peer == node {
			return r.Address
		}
	}
	return ""
}

// DiskUses lists every disk of every volume.
func (c *Config) DiskUses() []DiskUse {
	var uses []DiskUse
	for _, v := range c.Volumes {
		uses = append(uses, v.DiskUses()...)
	}
	return uses
}
