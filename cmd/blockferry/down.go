package main

import (
	"github.com/spf13/cobra"

	"blockferry/proto"
)

type downOptions struct {
	force bool
}

func newDown(g *globalOptions) *cobra.Command {
	var o downOptions
	cmd := &cobra.Command{
		Use:   "down [VOLUME]",
		Short: "Take a volume down cleanly; its last changes are sent first",
		Long:  "Sends what is left, closes the epoch and removes /dev/mapper/VOLUME. Refused while\nsomebody has it open, or while a replica could not be brought up to date (then\n--force takes it down all the same; the changes stay marked). With --force also a\nvolume goes down whose disk is lost.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.volumeCall(args, func(c proto.ControlClient, r *proto.VolumeRequest) (*proto.Done, error) {
				return c.Down(cmd.Context(), r)
			}, &proto.VolumeRequest{Force: o.force})
		},
	}
	cmd.Flags().BoolVar(&o.force, "force", false, "also when replicas are behind, or the disk is lost")
	return cmd
}
