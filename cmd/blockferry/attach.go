package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"blockferry/blockdev/attach"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/layout"
	"blockferry/proto"
	"blockferry/protocol"
)

func newAttach(g *globalOptions) *cobra.Command {
	var o createOptions
	cmd := &cobra.Command{
		Use:   "attach [VOLUME]",
		Short: "Replicate a device that is mounted and in use, as it is",
		Long:  "For a volume with 'mode: attach': checks the device and its users, formats the\nvolume's replicas, and begins. The device is neither unmounted nor written to, and\nits users notice nothing. If anything refuses, nothing is written.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.attach(cmd.Context(), doctor.Live(), args, o)
		},
	}
	cmd.Flags().BoolVar(&o.force, "force", false, "also with replicas' disks that hold something, which is lost")
	cmd.Flags().BoolVar(&o.discard, "discard-my-data", false, "also with disks that hold replicas of blockferry, which are lost")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "check and say what would be done; write nothing")
	return cmd
}

func (g *globalOptions) attach(ctx context.Context, system *doctor.System, args []string, o createOptions) error {
	c, v, err := g.volumeDisks(args)
	if err != nil {
		return err
	}
	if !v.Attach {
		return exit.Errorf(exit.Usage, "volume '%s' has 'mode: mapper': blockferry create %s; or give it 'mode: attach'", v.Name, v.Name)
	}
	formats, size, err := checkAttach(system, c, v, o.purpose())
	if err != nil {
		return err
	}
	did := "attached"
	uuid := volume.NewUUID()
	switch {
	case o.dryRun:
		did = "would be attached"
	default:
		if err := writeAttached(v, formats, uuid); err != nil {
			return err
		}
		err := g.withAgent(func(c proto.ControlClient) error {
			_, err := c.Up(ctx, &proto.VolumeRequest{Volume: v.Name})
			return err
		})
		if exit.Of(err) == exit.Unreachable {
			did = "attached; start the agent to begin"
		} else if err != nil {
			return fmt.Errorf("%s is prepared, but: %w", v.Name, err)
		}
	}
	replicas := make([]string, 0, len(v.Replicas))
	for _, r := range v.Replicas {
		replicas = append(replicas, r.Name)
	}
	return g.say(map[string]any{"volume": v.Name, "uuid": uuid.String(), "dry-run": o.dryRun, "size-bytes": size, "replicas": replicas},
		"%s: %s, %s, %s, replicas: %v", v.Name, did, v.Device, config.FormatSize(size), replicas)
}

// checkAttach looks at everything and writes nothing. It says how each replica's
// disk is to be divided, by name, and how large the volume is, in bytes.
func checkAttach(system *doctor.System, c *config.Config, v *config.Volume, purpose doctor.Purpose) (map[string]protocol.FormatOptions, int64, error) {
	if err := system.Kernel(v).Err(); err != nil {
		return nil, 0, err
	}
	switch _, err := attach.ReadState(v.StateFile); {
	case err == nil:
		return nil, 0, exit.Errorf(exit.Refused, "%s says that volume '%s' was attached before; to go on: blockferry up %s; to begin anew, with replicas filled anew: move it away first", v.StateFile, v.Name, v.Name)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, 0, err
	}
	disks, findings := system.Disks(v, purpose)
	findings = append(findings, system.Distinct(c.DiskUses())...)
	if err := findings.Err(); err != nil {
		return nil, 0, err
	}
	if err := attach.Check(v.Device, v.StateFile, []string{c.Path}); err != nil {
		return nil, 0, exit.Mark(exit.Refused, err)
	}
	size := disks[v.Device].SizeBytes
	formats := map[string]protocol.FormatOptions{}
	for _, r := range v.Local() {
		o, err := layout.Replica(r, volume.Areas{Data: volume.Area{Length: size}}, disks[r.Device].SizeBytes)
		if err != nil {
			return nil, 0, err
		}
		formats[r.Name] = o
	}
	return formats, size, nil
}

// writeAttached formats the replicas and, last, writes the state file: until it
// is there nothing of this counts. The first write comes after every disk could
// be claimed.
func writeAttached(v *config.Volume, formats map[string]protocol.FormatOptions, uuid volume.UUID) error {
	replicas, release, err := claimReplicas(v)
	if err != nil {
		return err
	}
	defer release()
	if err := os.MkdirAll(filepath.Dir(v.StateFile), 0o700); err != nil {
		return err
	}
	if err := formatReplicas(v, replicas, formats, uuid); err != nil {
		return err
	}
	return attach.Create(v.Device, v.StateFile, uuid)
}
