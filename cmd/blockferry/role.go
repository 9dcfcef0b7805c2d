package main

import (
	"github.com/spf13/cobra"

	"blockferry/proto"
)

type roleOptions struct {
	force  bool
	fenced []string
}

func newPrimary(g *globalOptions) *cobra.Command {
	var o roleOptions
	cmd := &cobra.Command{
		Use:   "primary [VOLUME]",
		Short: "Have this node's copy of a volume take over: it is written here",
		Long:  "The copy becomes the volume: /dev/mapper/VOLUME appears, and its replicas, the former\nprimary among them, are fed from here. Refused while the copy is not whole, while\nanother node is primary, and while it is not known that this copy has all that was\nwritten; the last two may be forced, and it is said what is lost. With --fenced NODE\nwhat only that node has is given up, and all else counts as ever: it is refused while\nthat node or another one is primary, or one holds more. Repeated it does no harm.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.volumeCall(args, func(c proto.ControlClient, r *proto.VolumeRequest) (*proto.Done, error) {
				return c.Primary(cmd.Context(), r)
			}, &proto.VolumeRequest{Force: o.force, Fenced: o.fenced})
		},
	}
	cmd.Flags().StringSliceVar(&o.fenced, "fenced", nil, "nodes that write it no more, such as by their power being cut: they need not answer")
	cmd.Flags().BoolVar(&o.force, "force", false, "also while another primary is alive, or writes are lost")
	return cmd
}

func newSecondary(g *globalOptions) *cobra.Command {
	var o roleOptions
	cmd := &cobra.Command{
		Use:   "secondary [VOLUME]",
		Short: "Have a volume stand down: it is a replica here, and another node may take over",
		Long:  "Takes the volume down, sends what is left and waits until all its replicas have it;\nthen its disk is a replica, and nothing is lost when another node takes over. Refused,\nand the volume stays up, while somebody has it open or a replica can't be brought up to\ndate. With --force it stands down all the same; what no other node has stays on the\ndisk. Repeated it does no harm.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.volumeCall(args, func(c proto.ControlClient, r *proto.VolumeRequest) (*proto.Done, error) {
				return c.Secondary(cmd.Context(), r)
			}, &proto.VolumeRequest{Force: o.force})
		},
	}
	cmd.Flags().BoolVar(&o.force, "force", false, "also when replicas are behind, or it was not shut down cleanly")
	return cmd
}
