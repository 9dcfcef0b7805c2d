package main

import (
	"github.com/spf13/cobra"

	"blockferry/proto"
)

type restoreOptions struct {
	from  string
	force bool
}

func newRestore(g *globalOptions) *cobra.Command {
	var o restoreOptions
	cmd := &cobra.Command{
		Use:   "restore [VOLUME]",
		Short: "Fill a blank device from a replica and bring the volume up",
		Long:  "Copies a replica's last committed point in time onto the volume's device, compares\nit, and brings the volume up; replication then goes on incrementally. Says which\npoint in time it is, and how much was lost as far as that is known. Refused unless\nthe device is blank, or with --force.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := g.volumeName(args)
			if err != nil {
				return err
			}
			return g.withAgent(func(c proto.ControlClient) error {
				stream, err := c.RestoreVolume(cmd.Context(), &proto.RestoreVolumeRequest{Volume: name, From: o.from, Force: o.force})
				if err != nil {
					return err
				}
				return g.follow(cmd.Context(), name, stream)
			})
		},
	}
	cmd.Flags().StringVar(&o.from, "from", "", "the replica to restore from (default: the one that is furthest)")
	cmd.Flags().BoolVar(&o.force, "force", false, "also onto a device that holds something else, which is lost")
	return cmd
}
