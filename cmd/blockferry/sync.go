package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"blockferry/cmd/blockferry/exit"
	"blockferry/proto"
)

type syncOptions struct {
	wait    bool
	timeout time.Duration
}

func newSync(g *globalOptions) *cobra.Command {
	var o syncOptions
	cmd := &cobra.Command{
		Use:   "sync [VOLUME]",
		Short: "Fix a point in time now and wait until every replica holds it",
		Long:  "Everything written before this command is on every replica when it ends. What it\nwaits for goes on if the timeout passes first.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.timeout < 0 {
				return exit.Errorf(exit.Usage, "--timeout %s is not a time to wait", o.timeout)
			}
			name, err := g.volumeName(args)
			if err != nil {
				return err
			}
			return g.withAgent(func(c proto.ControlClient) error { return g.sync(cmd.Context(), c, name, o) })
		},
	}
	cmd.Flags().BoolVar(&o.wait, "wait", true, "wait until every replica holds it")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 0, "give up waiting after this long; 0: never")
	return cmd
}

func (g *globalOptions) sync(ctx context.Context, c proto.ControlClient, name string, o syncOptions) error {
	request := &proto.SyncRequest{Volume: name, TimeoutMillis: uint64(o.timeout.Milliseconds())}
	if !o.wait {
		// The agent cuts by itself at each interval: nothing to wait for
		// means only that the request arrived.
		request.TimeoutMillis = 1
	}
	reply, err := c.Sync(ctx, request)
	if !o.wait && exit.Of(err) == exit.Timeout {
		return g.say(map[string]any{"volume": name, "requested": true}, "%s: a cut was asked for", name)
	}
	if err != nil {
		return err
	}
	return g.say(map[string]any{"volume": name, "epoch": reply.Epoch, "committed": reply.Committed},
		"%s", fmt.Sprintf("%s: epoch %d is on %s", name, reply.Epoch, strings.Join(reply.Committed, ", ")))
}
