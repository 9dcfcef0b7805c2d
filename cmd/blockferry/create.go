package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/attach"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
	"blockferry/protocol"
)

type createOptions struct {
	force   bool
	discard bool
	dryRun  bool
	replica string
}

// purpose is what the disks are looked at for.
func (o createOptions) purpose() doctor.Purpose {
	switch {
	case o.discard:
		return doctor.EmptyDiscard
	case o.force:
		return doctor.EmptyForced
	}
	return doctor.Empty
}

func newCreate(g *globalOptions) *cobra.Command {
	var o createOptions
	cmd := &cobra.Command{
		Use:   "create [VOLUME]",
		Short: "Prepare a volume's device and its replicas",
		Long:  "Checks everything first: kernel, disks distinct, large enough, unused and blank. Only\nthen writes the volume's label and formats its replicas. If anything refuses,\nnothing is written. With --replica only that replica's disk is formatted: a new disk\nin the place of a lost one, for a volume that exists.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.replica != "" {
				return g.createReplica(doctor.Live(), args, o)
			}
			return g.create(doctor.Live(), args, o)
		},
	}
	cmd.Flags().BoolVar(&o.force, "force", false, "also on disks that hold something, which is lost")
	cmd.Flags().BoolVar(&o.discard, "discard-my-data", false, "also on disks that hold a volume or a replica of blockferry, which is lost")
	cmd.Flags().StringVar(&o.replica, "replica", "", "only this replica's disk, of a volume that exists")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "check and say what would be done; write nothing")
	return cmd
}

func (g *globalOptions) create(system *doctor.System, args []string, o createOptions) error {
	c, v, err := g.volumeDisks(args)
	if err != nil {
		return err
	}
	if v.Secondary() || v.BeginsSecondary {
		return g.createSecondary(system, c, v, o)
	}
	if v.Attach {
		return exit.Errorf(exit.Usage, "volume '%s' has 'mode: attach': blockferry attach %s", v.Name, v.Name)
	}
	plan, err := checkCreate(system, c, v, o.purpose())
	if err != nil {
		return err
	}
	did := "created"
	uuid := volume.NewUUID()
	if o.dryRun {
		did = "would be created"
	} else if err := writeVolume(v, plan, uuid, o.force || o.discard); err != nil {
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
func checkCreate(system *doctor.System, c *config.Config, v *config.Volume, purpose doctor.Purpose) (layout.Plan, error) {
	if err := system.Kernel(v).Err(); err != nil {
		return layout.Plan{}, err
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
// there, nothing of this counts. The first write comes after every disk could
// be claimed.
func writeVolume(v *config.Volume, plan layout.Plan, uuid volume.UUID, force bool) error {
	replicas, release, err := claimReplicas(v)
	if err != nil {
		return err
	}
	defer release()
	for _, path := range []string{v.Device, v.CowDevice, v.MetadataDevice} {
		if path == "" {
			continue
		}
		f, err := claim(path)
		if err != nil {
			return err
		}
		f.Close() // volume.Format claims it again
	}
	if err := formatReplicas(v, replicas, plan.Replicas, uuid); err != nil {
		return err
	}
	_, err = volume.Format(volume.FormatOptions{
		Device: v.Device, CowDevice: v.CowDevice, MetaDevice: v.MetadataDevice,
		SizeBytes: plan.SizeBytes, EraBlockBytes: v.EraBlockBytes, CowBytes: plan.Volume.CowBytes, TailBytes: plan.Volume.TailBytes,
		UUID: uuid, Overwrite: force, Wait: claimPatience,
	})
	return err
}

// claimPatience is how long a disk may be in use: an agent looks at each of its
// configuration every few seconds, and has it to itself for that moment. Tests
// give it less.
var claimPatience = 5 * time.Second

// claim opens a disk, by its path or its name, for nobody else to use.
func claim(path string) (*blockdev.File, error) {
	f, err := udev.Open(path, blockdev.OpenOptions{Write: true, Exclusive: true, Wait: claimPatience})
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w; nothing was written; if it is blockferry's agent, stop that first: systemctl stop blockferry", err)
	}
	return f, exit.Mark(exit.Refused, err)
}

// claimReplicas opens the disks of all replicas, in their order, for nobody else
// to use until release. Nothing is written.
func claimReplicas(v *config.Volume) (opened []*blockdev.File, release func(), err error) {
	release = func() {
		for _, f := range opened {
			f.Close()
		}
	}
	for _, r := range v.Local() {
		f, err := claim(r.Device)
		if err != nil {
			release()
			return nil, nil, err
		}
		opened = append(opened, f)
	}
	return opened, release, nil
}

// formatReplicas formats what claimReplicas opened, each as its name's format
// says.
func formatReplicas(v *config.Volume, opened []*blockdev.File, formats map[string]protocol.FormatOptions, uuid volume.UUID) error {
	for i, r := range v.Local() {
		options := formats[r.Name]
		options.VolumeUUID = uuid
		if err := protocol.FormatReplica(opened[i], options); err != nil {
			return fmt.Errorf("replica '%s': %w", r.Name, err)
		}
	}
	return nil
}

// createReplica formats one replica's disk for a volume that exists. Nothing
// else is written, so the volume may be up and its other replicas in use.
func (g *globalOptions) createReplica(system *doctor.System, args []string, o createOptions) error {
	c, v, err := g.volumeDisks(args)
	if err != nil {
		return err
	}
	r, err := v.Replica(o.replica)
	if err != nil {
		return err
	}
	if r.Address != "" {
		return exit.Errorf(exit.Usage, "replica '%s' of volume '%s' is at node '%s': its disk is formatted there, with 'blockferry create %[2]s'", r.Name, v.Name, r.Peer)
	}
	uuid, areas, err := existing(v)
	if err != nil {
		return err
	}
	disk, findings := system.Disk(v, r.Device, o.purpose())
	findings = append(findings, system.Distinct(c.DiskUses())...)
	if err := findings.Err(); err != nil {
		return err
	}
	options, err := layout.Replica(r, areas, disk.SizeBytes)
	if err != nil {
		return err
	}
	did := "formatted"
	if o.dryRun {
		did = "would be formatted"
	} else {
		f, err := claim(r.Device)
		if err != nil {
			return err
		}
		defer f.Close()
		options.VolumeUUID = uuid
		if err := protocol.FormatReplica(f, options); err != nil {
			return fmt.Errorf("replica '%s': %w", r.Name, err)
		}
	}
	return g.say(map[string]any{
		"volume": v.Name, "uuid": uuid.String(), "dry-run": o.dryRun, "size-bytes": options.SizeBytes, "replica": r.Name,
	}, "%s: %s %s; the agent fills it from the volume", v.Name, r.Device, did)
}

// existing is what is known of a volume that exists; it may be up.
func existing(v *config.Volume) (uuid volume.UUID, a volume.Areas, err error) {
	f, err := blockdev.OpenFile(v.Device, blockdev.OpenOptions{})
	if err != nil {
		return uuid, a, exit.Mark(exit.Prerequisite, err)
	}
	defer f.Close()
	if v.Attach {
		kept, err := attach.ReadState(v.StateFile)
		if err != nil {
			return uuid, a, exit.Errorf(exit.Refused, "%w; a replica can be made only for a volume that exists", err)
		}
		return kept.UUID, volume.Areas{Data: volume.Area{Length: f.Size()}}, nil
	}
	label, err := volume.ReadLabel(f)
	if err != nil {
		return uuid, a, exit.Errorf(exit.Refused, "%w; a replica can be made only for a volume that exists", err)
	}
	return label.UUID, label.Areas, nil
}
