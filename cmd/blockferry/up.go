package main

import (
	"github.com/spf13/cobra"

	"blockferry/proto"
)

func newUp(g *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "up [VOLUME]",
		Short: "Bring a volume up: /dev/mapper/VOLUME appears",
		Long:  "Builds the volume's stack and starts replication. The agent does this by itself\nwhen it starts; 'up' is for after a 'down'.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.volumeCall(args, func(c proto.ControlClient, r *proto.VolumeRequest) (*proto.Done, error) {
				return c.Up(cmd.Context(), r)
			}, &proto.VolumeRequest{})
		},
	}
}
