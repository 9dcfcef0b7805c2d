package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
	"blockferry/protocol"
)

type createOptions struct {
	force  bool
	dryRun bool
}

func newCreate(g *globalOptions) *cobra.Command {
	var o createOptions
	cmd := &cobra.Command{
		Use:   "create [VOLUME]",
		Short: "Prepare a volume's device and its replicas",
		Long:  "Checks everything first: kernel, disks distinct, large enough, unused and blank. Only\nthen writes the volume's label and formats its replicas. If anything refuses,\nnothing is written.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.create(doctor.Live(), args, o)
		},
	}
	cmd.Flags().BoolVar(&o.force, "force", false, "also on disks that hold something, which is lost")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "check and say what would be done; write nothing")
	return cmd
}

func (g *globalOptions) create(system *doctor.System, args []string, o createOptions) error {
	c, v, err := g.volume(args)
	if err != nil {
		return err
	}
	plan, err := checkCreate(system, c, v, o.force)
	if err != nil {
		return err
	}
	did := "created"
	uuid := volume.NewUUID()
	if o.dryRun {
		did = "would be created"
	} else if err := writeVolume(v, plan, uuid, o.force); err != nil {
		return err
	}
	replicas := make([]string, 0, len(v.Replicas))
	for _, r := range v.Replicas {
		replicas = append(replicas, r.Name)
	}
	return g.say(map[string]any{
		"volume": v.Name, "uuid": uuid.String(), "dry-run": o.dryRun, "size-bytes": plan.SizeBytes, "cow-bytes": plan.Areas.Cow.Length,
		"metadata-bytes": plan.Areas.Meta.Length, "replicas": replicas,
	}, "%s: %s, %v, replicas: %v; start the agent to bring it up", v.Name, did, plan, replicas)
}

// checkCreate looks at everything and writes nothing.
func checkCreate(system *doctor.System, c *config.Config, v *config.Volume, force bool) (layout.Plan, error) {
	if err := system.Kernel().Err(); err != nil {
		return layout.Plan{}, err
	}
	purpose := doctor.Empty
	if force {
		purpose = doctor.EmptyForced
	}
	disks, findings := system.Disks(v, purpose)
	findings = append(findings, system.Distinct(c.DiskUses())...)
	if err := findings.Err(); err != nil {
		return layout.Plan{}, err
	}
	sizes := map[string]int64{}
	for path, d := range disks {
		sizes[path] = d.SizeBytes
	}
	return layout.Make(v, sizes)
}

// writeVolume formats the replicas and, last, the volume: until its label is
// there, nothing of this counts. All disks are held from the first write on.
func writeVolume(v *config.Volume, plan layout.Plan, uuid volume.UUID, force bool) error {
	var opened []*blockdev.File
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	for _, r := range v.Replicas {
		f, err := blockdev.OpenFile(r.Device, blockdev.OpenOptions{Write: true, Exclusive: true})
		if err != nil {
			return exit.Mark(exit.Refused, err)
		}
		opened = append(opened, f)
	}
	for i, r := range v.Replicas {
		options := plan.Replicas[r.Name]
		options.VolumeUUID = uuid
		if err := protocol.FormatReplica(opened[i], options); err != nil {
			return fmt.Errorf("replica '%s': %w", r.Name, err)
		}
	}
	_, err := volume.Format(volume.FormatOptions{
		Device: v.Device, CowDevice: v.CowDevice, MetaDevice: v.MetadataDevice,
		SizeBytes: plan.SizeBytes, EraBlockBytes: v.EraBlockBytes, CowBytes: plan.Volume.CowBytes, TailBytes: plan.Volume.TailBytes,
		UUID: uuid, Overwrite: force,
	})
	return err
}
