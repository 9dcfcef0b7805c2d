package main

import (
	"github.com/spf13/cobra"

	"blockferry/proto"
)

func newResume(g *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "resume [VOLUME]",
		Short: "Go on with replication after a pause",
		Long:  "Goes on with replication after 'pause'.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.volumeCall(args, func(c proto.ControlClient, r *proto.VolumeRequest) (*proto.Done, error) {
				return c.Resume(cmd.Context(), r)
			}, &proto.VolumeRequest{})
		},
	}
}
