package main

import (
	"os"

	"github.com/spf13/cobra"

	"blockferry/blockdev/volume"
)

// newDeadMan is the process that the agent starts to resume its devices; see
// volume.RunDeadMan. Not for people.
func newDeadMan(*globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:    "dead-man",
		Short:  "Resume devices that the agent left suspended (started by the agent)",
		Hidden: true,
		Args:   atMost(0),
		RunE:   func(*cobra.Command, []string) error { return volume.RunDeadMan(os.Stdin, os.Stdout) },
	}
}
