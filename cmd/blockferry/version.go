package main

import (
	"runtime"

	"github.com/spf13/cobra"
)

func newVersion(g *globalOptions) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  atMost(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.say(map[string]any{"version": version, "go": runtime.Version()}, "blockferry %s (%s)", version, runtime.Version())
		},
	}
}
