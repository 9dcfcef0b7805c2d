package main

import (
	"github.com/spf13/cobra"

	"blockferry/proto"
)

func newPause(g *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "pause [VOLUME]",
		Short: "Stop sending a volume's changes; writes go on",
		Long:  "Stops replication. Writes go on, and what changes is marked, so that 'resume'\nsends only that.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.volumeCall(args, func(c proto.ControlClient, r *proto.VolumeRequest) (*proto.Done, error) {
				return c.Pause(cmd.Context(), r)
			}, &proto.VolumeRequest{})
		},
	}
}
