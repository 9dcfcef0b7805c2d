package main

import (
	"strings"

	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
	"blockferry/protocol"
)

// createSecondary formats the disk of a volume that is only a replica here, for
// whichever volume of its name a peer offers first.
func (g *globalOptions) createSecondary(system *doctor.System, c *config.Config, v *config.Volume, o createOptions) error {
	disk, findings := system.Disk(v, v.Device, o.purpose())
	findings = append(findings, system.Distinct(c.DiskUses())...)
	if err := findings.Err(); err != nil {
		return err
	}
	options, err := layout.Undecided(disk.SizeBytes)
	if err != nil {
		return exit.Errorf(exit.Refused, "%s: %w", v.Device, err)
	}
	did := "formatted"
	if o.dryRun {
		did = "would be formatted"
	} else {
		f, err := claim(v.Device)
		if err != nil {
			return err
		}
		defer f.Close()
		// First what an old replica's superblocks say: without its label that would be
		// served as it was.
		if err := protocol.FormatReplica(f, options); err != nil {
			return err
		}
		if v.Switches() { // a label that stayed there would say which role it has
			if err := volume.WipeLabel(f); err != nil {
				return err
			}
		}
	}
	return g.say(map[string]any{"volume": v.Name, "dry-run": o.dryRun, "replica": v.Name, "device": v.Device, "peers": v.Peers},
		"%s: %s %s; it becomes a replica of the first volume of this name that %s connects with", v.Name, v.Device, did, strings.Join(v.Peers, " or "))
}
