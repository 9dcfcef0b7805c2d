package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"blockferry/proto"
)

type eventsOptions struct {
	now bool
}

func newEvents(g *globalOptions) *cobra.Command {
	var o eventsOptions
	cmd := &cobra.Command{
		Use:   "events",
		Short: "Show the present state, then each change as it happens",
		Long:  "Prints one line for each thing that is; then a line of kind 'now'; then a line for\neach thing that happens. With --json each line is a JSON document.",
		Args:  atMost(0),
		RunE: func(cmd *cobra.Command, args []string) error {
			return g.withAgent(func(c proto.ControlClient) error {
				stream, err := c.Events(cmd.Context(), &proto.EventsRequest{Follow: !o.now})
				if err != nil {
					return err
				}
				for {
					e, err := stream.Recv()
					switch {
					case err == io.EOF, err != nil && cmd.Context().Err() != nil:
						return nil
					case err != nil:
						return err
					}
					if err := g.showEvent(e); err != nil {
						return err
					}
				}
			})
		},
	}
	cmd.Flags().BoolVar(&o.now, "now", false, "end after the present state")
	return cmd
}

func (g *globalOptions) showEvent(e *proto.Event) error {
	at := time.Unix(0, e.UnixNanos).UTC()
	if g.json {
		document := map[string]any{"time": at.Format(time.RFC3339Nano), "kind": e.Kind}
		for key, value := range map[string]string{"volume": e.Volume, "replica": e.Replica, "message": e.Message} {
			if value != "" {
				document[key] = value
			}
		}
		return g.sayJSON(document)
	}
	line := at.Format("2006-01-02T15:04:05.000Z") + " " + e.Kind
	if e.Volume != "" {
		line += " volume:" + e.Volume
	}
	if e.Replica != "" {
		line += " replica:" + e.Replica
	}
	if e.Message != "" {
		line += " " + e.Message
	}
	_, err := fmt.Fprintln(g.out, line)
	return err
}
