package main

import (
	"github.com/spf13/cobra"

	"blockferry/proto"
)

func newDiscard(g *globalOptions) *cobra.Command {
	var replica string
	cmd := &cobra.Command{
		Use:   "discard [VOLUME]",
		Short: "Give up what the copy of a volume here has on its own",
		Long:  "For a copy that was written on its own and is not to count (split brain): it may then\nfollow the node that writes the volume. Blocks that only this copy has are saved in a\nrescue file before they are overwritten. A copy that did not go its own way loses\nnothing by it. At the node that writes the volume --replica says which of its copies.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.volumeCall(args, func(c proto.ControlClient, r *proto.VolumeRequest) (*proto.Done, error) {
				return c.GiveUp(cmd.Context(), r)
			}, &proto.VolumeRequest{Replica: replica})
		},
	}
	cmd.Flags().StringVar(&replica, "replica", "", "the replica of a volume that is written here")
	return cmd
}
