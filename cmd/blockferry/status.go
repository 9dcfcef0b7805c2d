package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"blockferry/cmd/blockferry/status"
	"blockferry/proto"
)

type statusOptions struct {
	watch    bool
	interval time.Duration
}

func newStatus(g *globalOptions) *cobra.Command {
	var o statusOptions
	cmd := &cobra.Command{
		Use:   "status [VOLUME]",
		Short: "Show where volumes and replicas stand",
		Long:  "Shows each volume and, indented, its replicas: state, position, seconds and bytes\nbehind and, if something is not as it should be, the reason and what to do.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if len(args) > 0 {
				name = args[0]
			}
			return g.withAgent(func(c proto.ControlClient) error {
				if !o.watch {
					return g.showStatus(cmd.Context(), c, name, "")
				}
				return g.watchStatus(cmd.Context(), c, name, o.interval)
			})
		},
	}
	cmd.Flags().BoolVar(&o.watch, "watch", false, "show it again and again, until interrupted")
	cmd.Flags().DurationVar(&o.interval, "interval", time.Second, "with --watch: how often")
	return cmd
}

// clearScreen moves a terminal's cursor home and clears what is below.
const clearScreen = "\x1b[H\x1b[J"

func (g *globalOptions) watchStatus(ctx context.Context, c proto.ControlClient, name string, every time.Duration) error {
	tick := time.NewTicker(max(every, 100*time.Millisecond))
	defer tick.Stop()
	before := ""
	if g.outTerminal && !g.json {
		before = clearScreen
	}
	for {
		if err := g.showStatus(ctx, c, name, before); err != nil {
			if ctx.Err() != nil {
				return nil // interrupted, as it is meant to end
			}
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if !g.outTerminal && !g.json {
			fmt.Fprintln(g.out)
		}
	}
}

func (g *globalOptions) showStatus(ctx context.Context, c proto.ControlClient, name, before string) error {
	reply, err := c.Status(ctx, &proto.StatusRequest{Volume: name})
	if err != nil {
		return err
	}
	if g.json {
		_, err = g.out.Write(append(bytes.TrimSpace(reply.Json), '\n'))
		return err
	}
	d, err := decodeStatus(reply)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	b.WriteString(before)
	if err := status.WriteText(&b, d); err != nil {
		return err
	}
	_, err = g.out.Write(b.Bytes())
	return err
}

func decodeStatus(reply *proto.StatusReply) (*status.Document, error) {
	var d status.Document
	if err := json.Unmarshal(reply.Json, &d); err != nil {
		return nil, fmt.Errorf("the agent's status is not understood (%w); are agent and command of the same version?", err)
	}
	return &d, nil
}

// volumeStatuses asks the agent for one volume, or for all.
func volumeStatuses(ctx context.Context, c proto.ControlClient, name string) ([]status.Volume, error) {
	reply, err := c.Status(ctx, &proto.StatusRequest{Volume: name})
	if err != nil {
		return nil, err
	}
	d, err := decodeStatus(reply)
	if err != nil {
		return nil, err
	}
	return d.Volumes, nil
}
