package main

import (
	"strings"

	"github.com/spf13/cobra"

	"blockferry/blockdev/udev"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
)

// defaultSocket is where the agent answers.
const defaultSocket = "/run/blockferry/blockferry.sock"

// globalOptions are understood by every command.
type globalOptions struct {
	streams
	config string
	socket string
	json   bool
}

func newRoot(s streams) (*cobra.Command, *globalOptions) {
	g := &globalOptions{streams: s}
	root := &cobra.Command{
		Use:           "blockferry",
		Short:         "Keep a busy block device copied onto other devices",
		Long:          "blockferry keeps a busy block device copied onto other devices: each copy always\nholds one complete, mountable point in time. The kernel marks what changes; the\nagent cuts consistent points and sends the changes.\n\nBegin with 'blockferry check', then 'create', then start the agent.",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return exit.Errorf(exit.Usage, "unknown command '%s'%s", args[0], suggestions(cmd, args[0]))
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return exit.Errorf(exit.Usage, "%w; see '%s --help'", err, cmd.CommandPath())
	})
	flags := root.PersistentFlags()
	flags.StringVar(&g.config, "config", config.DefaultPath, "configuration file")
	flags.StringVar(&g.socket, "socket", defaultSocket, "the agent's Unix socket")
	flags.BoolVar(&g.json, "json", false, "output, and the last error, as JSON")
	root.AddCommand(
		newAgent(g), newCheck(g), newCreate(g), newAttach(g), newUp(g), newDown(g), newStatus(g), newEvents(g), newSync(g), newDrain(g),
		newVerify(g), newRestore(g), newRecover(g), newRescue(g), newDiscard(g), newSnapshot(g), newResize(g), newPause(g), newResume(g), newPrimary(g), newSecondary(g), newCerts(g), newVersion(g), newDeadMan(g), newProbe(g), newMan(g),
	)
	return root, g
}

func suggestions(cmd *cobra.Command, word string) string {
	if cmd.SuggestionsMinimumDistance == 0 {
		cmd.SuggestionsMinimumDistance = 2
	}
	if near := cmd.SuggestionsFor(word); len(near) > 0 {
		return "; did you mean '" + strings.Join(near, "' or '") + "'?"
	}
	return "; see 'blockferry --help'"
}

// atMost says how many arguments a command takes, as a usage error.
func atMost(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > n {
			return exit.Errorf(exit.Usage, "'%s' was not expected; see '%s --help'", args[n], cmd.CommandPath())
		}
		return nil
	}
}

func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < n {
			return exit.Errorf(exit.Usage, "%s is missing; see '%s --help'", what, cmd.CommandPath())
		}
		return atMost(n)(cmd, args)
	}
}

// volumeName is the volume argument, or the configuration's only volume. The
// agent checks a given name itself.
func (g *globalOptions) volumeName(args []string) (string, error) {
	if len(args) > 0 {
		return args[0], nil
	}
	c, err := config.Load(g.config)
	if err != nil {
		return "", err
	}
	v, err := c.Volume("")
	if err != nil {
		return "", err
	}
	return v.Name, nil
}

func (g *globalOptions) volume(args []string) (*config.Config, *config.Volume, error) {
	c, err := config.Load(g.config)
	if err != nil {
		return nil, nil, err
	}
	name := ""
	if len(args) > 0 {
		name = args[0]
	}
	v, err := c.Volume(name)
	return c, v, err
}

// volumeDisks is volume for a command that uses disks itself: they are named by their paths.
func (g *globalOptions) volumeDisks(args []string) (*config.Config, *config.Volume, error) {
	c, v, err := g.volume(args)
	if err == nil {
		c.Resolve(udev.Path)
	}
	return c, v, err
}
