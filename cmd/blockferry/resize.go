package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"blockferry/blockdev"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
	"blockferry/cmd/blockferry/spill"
	"blockferry/protocol"
)

type resizeOptions struct {
	size   string
	dryRun bool
}

func newResize(g *globalOptions) *cobra.Command {
	var o resizeOptions
	cmd := &cobra.Command{
		Use:   "resize [VOLUME]",
		Short: "Enlarge a volume, and its replicas here, once their disks are larger",
		Long: "With the volume down and the agent stopped. Looks at all disks first: if one is too small\nnothing is written, and the size that it needs is named. What comes to the volume holds\nzeros, here and at its replicas. The size is that of --size, else of the configuration, else\nthe largest that fits. Cut off, it is repeated.\n\n" +
			"A replica at another node is enlarged there first, with --size; without a larger size\nthe command moves what a replica keeps at the end of its disk to the new end.\n\n" +
			"Then: start the agent, and enlarge the file system. Replicas are compared once.",
		Args: atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.resize(cmd.Context(), args, o)
		},
	}
	cmd.Flags().StringVar(&o.size, "size", "", "the volume's size from then on, as 200GiB")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "check and say what would be done; write nothing")
	return cmd
}

func (g *globalOptions) resize(ctx context.Context, args []string, o resizeOptions) error {
	_, v, err := g.volumeDisks(args)
	if err != nil {
		return err
	}
	size := v.SizeBytes
	if o.size != "" {
		if size, err = config.ParseSize(o.size); err != nil || size <= 0 || size%blockdev.BlockSize != 0 {
			return exit.Errorf(exit.Usage, "--size '%s' is no size that is a multiple of %d bytes, as 200GiB", o.size, blockdev.BlockSize)
		}
		if v.SizeBytes > 0 && v.SizeBytes != size {
			return exit.Errorf(exit.Usage, "--size %s, and the configuration has 'size: %s' for volume '%s': change it there", o.size, config.FormatSize(v.SizeBytes), v.Name)
		}
	}
	switch {
	case v.Switches():
		return exit.Errorf(exit.Refused, "volume '%s' can have either role here; such a disk can't grow yet: make it anew on a larger one, and let it be filled by the other node", v.Name)
	case v.Attach:
		return exit.Errorf(exit.Refused, "volume '%s' has 'mode: attach'; it can't grow yet: make its replicas anew for the larger device", v.Name)
	case v.Secondary() && size == 0:
		return exit.Errorf(exit.Usage, "volume '%s' is only a replica here: --size says how large it is to be where it is written", v.Name)
	}
	r := &resizing{globalOptions: g, volume: v, sizes: map[string]int64{}, options: o}
	defer r.close()
	if v.Secondary() {
		return r.secondary(ctx, size)
	}
	return r.primary(ctx, size)
}

// resizing has the disks of a volume for itself.
type resizing struct {
	*globalOptions
	volume  *config.Volume
	options resizeOptions
	opened  []*blockdev.File
	sizes   map[string]int64 // by path
}

func (r *resizing) close() {
	for _, f := range r.opened {
		f.Close()
	}
}

func (r *resizing) open(path string) (*blockdev.File, error) {
	f, err := blockdev.OpenFile(path, blockdev.OpenOptions{Write: true, Exclusive: true})
	if err != nil {
		return nil, exit.Errorf(exit.Refused, "%w; the volume has to be down and the agent stopped", err)
	}
	r.opened = append(r.opened, f)
	r.sizes[path] = f.Size()
	return f, nil
}

// secondary enlarges the copy here of a volume that another node writes.
func (r *resizing) secondary(ctx context.Context, size int64) error {
	disk, err := r.open(r.volume.Device)
	if err != nil {
		return err
	}
	format, err := layout.Secondary(r.volume, size, disk.Size())
	if err != nil {
		return err
	}
	grow := r.growth(r.volume.Copy, format)
	if err := protocol.CheckGrow(disk, grow); err != nil {
		return exit.Mark(exit.Refused, err)
	}
	if !r.options.dryRun {
		if err := protocol.GrowReplica(ctx, disk, grow); err != nil {
			return err
		}
	}
	return r.done(size, "")
}

func (r *resizing) growth(c *config.Replica, format protocol.FormatOptions) protocol.GrowOptions {
	o := protocol.GrowOptions{VolumeUUID: format.VolumeUUID, SizeBytes: format.SizeBytes, ReserveBytes: format.ReserveBytes}
	if c.Spill != "" {
		o.Open.Spill = &spill.File{Path: c.Spill}
	}
	p := r.progress()
	o.Progress = func(done, total int64) { p.Update("zeros for replica '"+c.Name+"'", done, total) }
	return o
}

// primary enlarges the volume and the replicas beside it: these first, as one that is
// larger than its volume is only refused until that is, too.
func (r *resizing) primary(ctx context.Context, size int64) error {
	v := r.volume
	off, err := volume.OpenOffline(v.Device)
	if err != nil {
		return exit.Errorf(exit.Refused, "%w; the volume has to be down and the agent stopped", err)
	}
	defer off.Close()
	label := off.Label()
	if state, err := protocol.DecodeSourceState(label.State); len(label.State) > 0 && (err != nil || state.Restore != nil || state.Secondary) {
		return exit.Errorf(exit.Refused, "%s: its restore has not ended, or it is no primary's: bring the volume up first (%v)", v.Device, err)
	}
	r.sizes[v.Device] = off.DiskBytes()
	for _, path := range []string{v.CowDevice, v.MetadataDevice} {
		if path == "" {
			continue
		}
		if _, err := r.open(path); err != nil {
			return err
		}
	}
	replicas := map[*config.Replica]*blockdev.File{}
	for _, c := range v.Local() {
		if replicas[c], err = r.open(c.Device); err != nil {
			return err
		}
	}
	target := *v
	target.SizeBytes = size
	plan, err := layout.Make(&target, r.sizes)
	if err != nil {
		return err
	}
	if plan.SizeBytes < label.Areas.Data.Length {
		if size > 0 {
			return exit.Errorf(exit.Refused, "volume '%s' has %d bytes (%s), and does not shrink", v.Name, label.Areas.Data.Length, config.FormatSize(label.Areas.Data.Length))
		}
		// Its disks leave no room for more; what their ends keep may have to move all the same.
		target.SizeBytes = label.Areas.Data.Length
		if plan, err = layout.Make(&target, r.sizes); err != nil {
			return err
		}
	}
	// Everything is looked at before anything is written.
	if err := off.CheckGrow(plan.Volume); err != nil && plan.SizeBytes != label.Areas.Data.Length {
		return exit.Mark(exit.Refused, err)
	}
	growth := map[*config.Replica]protocol.GrowOptions{}
	for _, c := range v.Local() {
		format := plan.Replicas[c.Name]
		format.VolumeUUID = label.UUID
		growth[c] = r.growth(c, format)
		if err := protocol.CheckGrow(replicas[c], growth[c]); err != nil {
			return exit.Errorf(exit.Refused, "replica '%s': %w", c.Name, err)
		}
	}
	if r.options.dryRun {
		return r.done(plan.SizeBytes, label.UUID.String())
	}
	for _, c := range v.Local() {
		if err := protocol.GrowReplica(ctx, replicas[c], growth[c]); err != nil {
			return fmt.Errorf("replica '%s': %w; repeat it", c.Name, err)
		}
	}
	p := r.progress()
	err = off.Grow(ctx, plan.Volume, func(done, total int64) { p.Update("zeros for the volume", done, total) })
	p.Done()
	if err != nil {
		return fmt.Errorf("%w; repeat it: until then its replicas are larger, and not fed", err)
	}
	return r.done(plan.SizeBytes, label.UUID.String())
}

func (r *resizing) done(size int64, uuid string) error {
	did, next := "has", "start the agent, then enlarge the file system"
	if r.options.dryRun {
		did, next = "would have", "nothing was written"
	}
	for _, c := range r.volume.Replicas {
		if c.Address != "" {
			next += fmt.Sprintf("; replica '%s' is fed once it has that size, too: at node '%s', with its agent stopped: blockferry resize --size %d %s", c.Name, c.Peer, size, r.volume.Name)
		}
	}
	return r.say(map[string]any{"volume": r.volume.Name, "uuid": uuid, "dry-run": r.options.dryRun, "size-bytes": size},
		"%s: it %s %s (%d bytes); %s", r.volume.Name, did, config.FormatSize(size), size, next)
}
