package main

import (
	"context"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"blockferry/cmd/blockferry/agent"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
)

type agentOptions struct {
	logFormat string
	verbose   bool
}

func newAgent(g *globalOptions) *cobra.Command {
	var o agentOptions
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Run the agent: bring volumes up and keep replicas up to date",
		Long:  "Runs in the foreground until it is ended (SIGTERM). Volumes then stay up, since the\napplication may be using them: 'blockferry down' takes one down. The next agent\ngoes on where this one stopped.",
		Args:  atMost(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			log, err := g.logger(o)
			if err != nil {
				return err
			}
			return g.agent(cmd.Context(), log)
		},
	}
	cmd.Flags().StringVar(&o.logFormat, "log-format", "text", "text or json")
	cmd.Flags().BoolVar(&o.verbose, "verbose", false, "log every epoch")
	return cmd
}

func (g *globalOptions) logger(o agentOptions) (*slog.Logger, error) {
	options := &slog.HandlerOptions{Level: slog.LevelInfo}
	if o.verbose {
		options.Level = slog.LevelDebug
	}
	switch o.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(g.streams.err, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(g.streams.err, options)), nil
	}
	return nil, exit.Errorf(exit.Usage, "--log-format '%s' is not one of text, json", o.logFormat)
}

func (g *globalOptions) agent(ctx context.Context, log *slog.Logger) error {
	c, err := config.Load(g.config)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return agent.Run(ctx, agent.Options{
		Config: c, Socket: g.socket, Log: log, Version: version, System: doctor.Live(),
		DeadMan: []string{self, "dead-man"},
	})
}
