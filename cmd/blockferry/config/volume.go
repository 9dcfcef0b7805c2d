package config

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml/ast"

	"blockferry/blockdev/udev"
)

// innerSuffixes name the devices below a volume; a volume's own name must
// not look like one of another volume's.
var innerSuffixes = []string{"-era", "-base", "-data", "-meta", "-cow", "-snap"}

func (r *reader) root(n ast.Node) {
	r.config.RescueDir = DefaultRescueDir
	var node, lease ast.Node
	present := r.fields(n, "the file", []field{{"node", func(n ast.Node) { node = n }}, {"lease", func(n ast.Node) { lease = n }}, {"volumes", r.volumes}})
	if present["volumes"] == nil && len(r.errors) == 0 {
		r.fail(n, "the file needs 'volumes:'")
	}
	r.node(present["node"], node)
	r.lease(present["lease"], lease)
	for _, v := range r.config.Volumes {
		var all *Hooks
		if r.config.Node != nil {
			all = r.config.Node.Hooks
		}
		v.Hooks = v.Hooks.inherit(all)
	}
}

func (r *reader) volumes(n ast.Node) {
	r.mapping(n, "'volumes'", func(pair *ast.MappingValueNode, name string) bool {
		if err := checkName(name); err != nil {
			r.fail(pair.Key, "volume name '%s': %s", name, err)
		} else if slices.Contains(stateFolders, name) {
			r.fail(pair.Key, "volume name '%s': a folder of %s has that name; use another", name, DefaultStateDir)
		}
		v := &Volume{Name: name, SplitBrain: "none", MaxLoss: DefaultMaxLoss, Interval: time.Second, StallLimit: DefaultStallLimit, StallBudget: DefaultStallBudget, EraBlockBytes: MinEraBlockBytes}
		r.volume(pair, v)
		if v.Attach && v.StateFile == "" {
			v.StateFile = filepath.Join(DefaultStateDir, v.Name)
		}
		r.config.Volumes = append(r.config.Volumes, v)
		return true
	})
	if len(r.config.Volumes) == 0 && len(r.errors) == 0 {
		r.fail(n, "'volumes' names no volume")
	}
}

func (r *reader) volume(pair *ast.MappingValueNode, v *Volume) {
	what := "volume '" + v.Name + "'"
	secondary, of := false, &Replica{}
	present := r.fields(pair.Value, what, []field{
		r.hooks(&v.Hooks, what),
		r.choice("role", func(s string) { secondary = s == "secondary" }, "primary", "secondary"),
		r.device("device", &v.Device, what),
		r.choice("mode", func(s string) { v.Attach = s == "attach" }, "mapper", "attach"),
		r.ownFile("state-file", &v.StateFile, what),
		r.duration("stall-budget", &v.StallBudget, MinStallBudget, MaxStallLimit),
		r.choice("when-busy", func(s string) { v.WhenBusy = s }, BusyReport, BusyStall, BusySnapshot),
		r.size("size", &v.SizeBytes, MinVolumeBytes, MaxVolumeBytes, 4096),
		r.duration("interval", &v.Interval, MinInterval, MaxInterval),
		r.duration("stall-limit", &v.StallLimit, MinStallLimit, MaxStallLimit),
		r.choice("cut", func(s string) { v.FreezeFilesystem = s == "filesystem" }, "block", "filesystem"),
		r.choice("tracker", func(s string) { v.EraOnly = s == "era" }, "auto", "era"),
		r.choice("image", func(s string) { v.PreCopy = s == "pre-copy" }, "snapshot", "pre-copy"),
		r.size("era-block", &v.EraBlockBytes, MinEraBlockBytes, MaxEraBlockBytes, MinEraBlockBytes),
		r.size("cow", &v.CowBytes, MinCowBytes, MaxCowBytes, 4096),
		r.device("cow-device", &v.CowDevice, what),
		r.device("metadata-device", &v.MetadataDevice, what),
		r.choice("restore", func(s string) { v.AutoRestore = s == "auto" }, "manual", "auto"),
		r.choice("split-brain", func(s string) { v.SplitBrain = s }, "none", "discard-older-primary", "discard-least-changes", "discard-zero-changes"),
		r.choice("promote", func(s string) { v.AutoPromote = s == "auto" }, "manual", "auto"),
		r.duration("max-loss", &v.MaxLoss, MinMaxLoss, MaxMaxLoss),
		{"replicas", func(n ast.Node) { r.replicas(n, v) }},
		{"peers", func(n ast.Node) { r.peers(n, v) }},
		r.size("journal", &of.JournalBytes, MinJournalBytes, MaxJournalBytes, 4096),
		r.ownFile("spill", &of.Spill, what),
		r.size("spill-limit", &of.SpillLimitBytes, MinJournalBytes, MaxJournalBytes, 4096),
	})
	switch {
	case secondary && present["replicas"] == nil:
		r.secondary(pair, v, of, present)
		return
	case secondary || present["peers"] != nil:
		v.BeginsSecondary = secondary
		r.switches(pair, v, of, present)
	default:
		for _, key := range secondaryKeys {
			if present[key] != nil {
				r.fail(present[key], "%s has '%s', which is for volumes with 'peers'", what, key)
			}
		}
	}
	r.promote(v, present)
	switch {
	case present["device"] == nil:
		r.fail(pair.Key, "%s needs 'device:', the disk that holds it", what)
	case present["replicas"] == nil:
		r.fail(pair.Key, "%s needs 'replicas:', at least one", what)
	}
	mode, other, keys := "mapper", "attach", []string{"state-file"}
	if v.Attach {
		mode, other, keys = "attach", "mapper", []string{"size", "cut", "tracker", "image", "era-block", "cow", "cow-device", "metadata-device", "restore"}
	}
	for _, key := range keys {
		if present[key] != nil {
			r.fail(present[key], "%s has 'mode: %s'; '%s' is for 'mode: %s'", what, mode, key, other)
		}
	}
	for _, key := range []string{"stall-budget", "when-busy"} {
		if present[key] != nil && !v.Attach && !v.PreCopy {
			r.fail(present[key], "%s has '%s', which is for 'image: pre-copy'", what, key)
		}
	}
	switch {
	case v.Attach && v.WhenBusy == BusySnapshot:
		r.fail(present["when-busy"], "%s has 'mode: attach' and 'when-busy: snapshot': there is no room for one; 'report' and 'stall' are there for it", what)
	case v.WhenBusy == "" && v.Attach:
		v.WhenBusy = BusyReport
	case v.WhenBusy == "":
		v.WhenBusy = BusySnapshot
	}
	switch {
	case present["stall-budget"] == nil:
		v.StallBudget = min(v.StallBudget, v.StallLimit/2)
	case v.StallBudget > v.StallLimit:
		r.fail(present["stall-budget"], "%s has a 'stall-budget' of %s, which is more than its 'stall-limit' of %s", what, v.StallBudget, v.StallLimit)
	}
	if v.PreCopy && v.EraOnly {
		r.fail(present["image"], "%s has 'image: pre-copy', which needs more than 'tracker: era'", what)
	}
	if present["cow"] != nil && present["cow-device"] != nil {
		r.fail(present["cow-device"], "%s has both 'cow' and 'cow-device'; keep one", what)
	}
}

func (r *reader) replicas(n ast.Node, v *Volume) {
	what := "'replicas' of volume '" + v.Name + "'"
	before := len(r.errors)
	r.mapping(n, what, func(pair *ast.MappingValueNode, name string) bool {
		if err := checkName(name); err != nil {
			r.fail(pair.Key, "replica name '%s': %s", name, err)
		}
		p := &Replica{Name: name, Compression: CompressionAuto}
		r.replica(pair, v, p)
		v.Replicas = append(v.Replicas, p)
		return true
	})
	if len(v.Replicas) == 0 && len(r.errors) == before {
		r.fail(n, "%s names no replica", what)
	}
}

func (r *reader) replica(pair *ast.MappingValueNode, v *Volume, p *Replica) {
	what := fmt.Sprintf("replica '%s' of volume '%s'", p.Name, v.Name)
	present := r.fields(pair.Value, what, []field{
		r.device("device", &p.Device, what),
		r.address("address", &p.Address),
		r.peer("peer", &p.Peer),
		r.choice("compression", func(s string) { p.Compression = s }, CompressionAuto, "none", "s2", "zstd"),
		r.rate("rate", &p.Rate, what),
		r.size("journal", &p.JournalBytes, MinJournalBytes, MaxJournalBytes, 4096),
		r.ownFile("spill", &p.Spill, what),
		r.size("spill-limit", &p.SpillLimitBytes, MinJournalBytes, MaxJournalBytes, 4096),
		r.choice("catch-up", func(s string) { p.InPlace = s == "in-place" }, "journal", "in-place"),
	})
	if present["address"] != nil {
		r.remote(p, what, present)
	} else if present["device"] == nil {
		r.fail(pair.Key, "%s needs 'device:', the disk that holds the copy, or 'address:' and 'peer:', the node that does", what)
	} else if present["peer"] != nil {
		r.fail(present["peer"], "%s has 'peer', but no 'address' to reach that node at", what)
	}
	r.spill(p, what, present)
}

// spill checks the keys about a replica's spill file.
func (r *reader) spill(p *Replica, what string, present map[string]ast.Node) {
	if present["spill-limit"] != nil && present["spill"] == nil {
		r.fail(present["spill-limit"], "%s has 'spill-limit', but no 'spill', the file it is for", what)
	}
	if len(p.Spill) > MaxSpillPath {
		r.fail(present["spill"], "the path of %s's spill file has %d bytes, at most %d are allowed", what, len(p.Spill), MaxSpillPath)
	}
}

// device reads the name of a disk, its path or what it is, and refuses one that is used twice. Two names of
// one disk are found later, when devices are opened.
func (r *reader) device(key string, into *string, what string) field {
	return r.text(key, func(s string) error {
		if err := udev.CheckName(s); err != nil {
			return err
		}
		if !udev.IsName(s) {
			s = filepath.Clean(s)
		}
		return r.once(key, s, into, what)
	})
}

// ownFile reads the path of a file of ours, which nothing else may use.
func (r *reader) ownFile(key string, into *string, what string) field {
	return r.text(key, func(s string) error {
		if !filepath.IsAbs(s) {
			return fmt.Errorf("'%s' is not a whole path", s)
		}
		return r.once(key, filepath.Clean(s), into, what)
	})
}

// once notes what a disk or file is used for.
func (r *reader) once(key, name string, into *string, what string) error {
	if first, taken := r.disks[name]; taken {
		return fmt.Errorf("%s is already the %s", name, first)
	}
	r.disks[name] = fmt.Sprintf("%s of %s", key, what)
	*into = name
	return nil
}

// InnerSuffixes are the ends of the names of a volume's inner devices.
func InnerSuffixes() []string { return append([]string(nil), innerSuffixes...) }

// stateFolders are beside the state files of attached volumes, in DefaultStateDir.
var stateFolders = []string{"given-up", "heard", "rescue"}

// checkName keeps a name usable as a device-mapper name and as a word in
// status lines.
func checkName(name string) error {
	if name == "" || len(name) > MaxNameLength {
		return fmt.Errorf("1 to %d characters are allowed", MaxNameLength)
	}
	for _, c := range name {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return errors.New("only a-z, 0-9 and '-' are allowed")
		}
	}
	if name[0] == '-' || name[len(name)-1] == '-' {
		return errors.New("it must not begin or end with '-'")
	}
	for _, suffix := range innerSuffixes {
		if strings.HasSuffix(name, suffix) {
			return fmt.Errorf("the end '%s' is kept for inner devices", suffix)
		}
	}
	return nil
}
