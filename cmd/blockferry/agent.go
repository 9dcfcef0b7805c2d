package main

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"blockferry/blockdev/deadman"
	"blockferry/cmd/blockferry/agent"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/doctor"
	"blockferry/cmd/blockferry/exit"
)

type agentOptions struct {
	logFormat string
	verbose   bool
	deadMan   string
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
			return g.agent(cmd.Context(), log, deadman.GuardOptions{
				Socket: o.deadMan,
				// A service manager that starts this starts the other, too.
				ServiceExpected: cmd.Flags().Changed("dead-man-socket") || os.Getenv("NOTIFY_SOCKET") != "",
			})
		},
	}
	cmd.Flags().StringVar(&o.logFormat, "log-format", "text", "text or json")
	cmd.Flags().BoolVar(&o.verbose, "verbose", false, "log every epoch")
	cmd.Flags().StringVar(&o.deadMan, "dead-man-socket", defaultDeadManSocket, "where the service that resumes devices in the agent's place answers")
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

func (g *globalOptions) agent(ctx context.Context, log *slog.Logger, deadMan deadman.GuardOptions) error {
	c, err := config.Load(g.config)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if deadMan.Notes, err = notesFolder(deadMan.Socket); err != nil {
		return err
	}
	deadMan.Command = []string{self, "dead-man", "--notes", deadMan.Notes}
	return agent.Run(ctx, agent.Options{
		Config: c, Socket: g.socket, Log: log, Version: version, System: doctor.Live(),
		DeadMan: deadMan, StateDir: config.DefaultStateDir,
	})
}

// notesFolder is the folder of the notes of what is frozen: that of the service's
// socket, or where that would be. It is absolute, as the agent's own dead-man has
// another working folder.
func notesFolder(socket string) (string, error) {
	return filepath.Abs(filepath.Dir(cmp.Or(socket, defaultDeadManSocket)))
}
