package main

import (
	"github.com/spf13/cobra"

	"blockferry/proto"
)

type verifyOptions struct {
	replica string
	repair  bool
}

func newVerify(g *globalOptions) *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "verify [VOLUME]",
		Short: "Compare replicas with the volume, block by block",
		Long: `Compares the checksums of one point in time on both sides; writes go on meanwhile.
Changes nothing without --repair. Ends with 4 if blocks differ, and names the first: that
disk, or the volume's, or a machine, can't be trusted.

With --repair a replica gets the volume's content wherever it differs. THE VOLUME IS THE TRUTH:
if its own disk is the bad one, a good copy is overwritten. So look first, without --repair,
at what differs. Nothing is sent before the places are printed. What is sent goes through the
replica's journal, with the next epoch; then all of it is compared once more. Ends with 0 if
that found no difference, with 4 if it did, or if the repair came to nothing.

To fill a replica anew: stop the agent, blockferry create --replica NAME --discard-my-data,
start the agent.`,
		Args: atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := g.volumeName(args)
			if err != nil {
				return err
			}
			return g.withAgent(func(c proto.ControlClient) error {
				stream, err := c.Verify(cmd.Context(), &proto.VerifyRequest{Volume: name, Replica: o.replica, Repair: o.repair})
				if err != nil {
					return err
				}
				return g.follow(cmd.Context(), name, stream)
			})
		},
	}
	cmd.Flags().StringVar(&o.replica, "replica", "", "only this replica")
	cmd.Flags().BoolVar(&o.repair, "repair", false, "write the volume's content over what differs at a replica, and compare once more")
	return cmd
}
