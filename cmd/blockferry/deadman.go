package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"blockferry/blockdev/deadman"
	"blockferry/blockdev/volume"
	"blockferry/cmd/blockferry/agent"
)

// defaultDeadManSocket is where the dead-man's unit answers.
const defaultDeadManSocket = "/run/blockferry-deadman/dead-man.sock"

// newDeadMan is the process that resumes an agent's devices; not for people.
// Its unit starts it with --listen, an agent that finds none without.
func newDeadMan(g *globalOptions) *cobra.Command {
	var socket, notes string
	cmd := &cobra.Command{
		Use:    "dead-man",
		Short:  "Resume devices that an agent left suspended (started by its unit, or by the agent)",
		Hidden: true,
		Args:   atMost(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("listen") {
				return deadman.Run(os.Stdin, notes)
			}
			log, err := g.logger(agentOptions{logFormat: "text"})
			if err != nil {
				return err
			}
			return serveDeadMan(cmd.Context(), socket, log)
		},
	}
	cmd.Flags().StringVar(&socket, "listen", "", "serve agents on this Unix socket, until SIGTERM; without it: one, on standard input and output")
	cmd.Flags().StringVar(&notes, "notes", filepath.Dir(defaultDeadManSocket), "folder of the notes of what is frozen; with --listen it is the socket's")
	return cmd
}

func serveDeadMan(ctx context.Context, socket string, log *slog.Logger) error {
	l, closeListener, err := agent.Listen(socket, "dead-man", "--listen")
	if err != nil {
		return err
	}
	defer closeListener()
	return deadman.Serve(ctx, l, volume.IsVolume, log, func() {
		log.Info("dead-man serves", "socket", socket, "pid", os.Getpid())
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			log.Warn("the service manager was not told", "error", err)
		}
	})
}
