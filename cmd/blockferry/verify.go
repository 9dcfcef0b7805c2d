package main

import (
	"github.com/spf13/cobra"

	"blockferry/proto"
)

type verifyOptions struct {
	replica string
}

func newVerify(g *globalOptions) *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "verify [VOLUME]",
		Short: "Compare replicas with the volume, block by block",
		Long:  "Compares the checksums of one point in time on both sides; writes go on meanwhile.\nChanges nothing. Ends with 4 if blocks differ, and names the first: that disk, or its\nmachine, can't be trusted. To fill a replica anew: stop the agent,\nblockferry create --replica NAME --discard-my-data, start the agent.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := g.volumeName(args)
			if err != nil {
				return err
			}
			return g.withAgent(func(c proto.ControlClient) error {
				stream, err := c.Verify(cmd.Context(), &proto.VolumeRequest{Volume: name, Replica: o.replica})
				if err != nil {
					return err
				}
				return g.follow(cmd.Context(), name, stream)
			})
		},
	}
	cmd.Flags().StringVar(&o.replica, "replica", "", "only this replica")
	return cmd
}
