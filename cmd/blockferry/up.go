package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/progress"
	"blockferry/cmd/blockferry/status"
	"blockferry/proto"
)

const (
	upEvery = 200 * time.Millisecond
	// agentPatience is how long 'up --wait' takes an agent that does not answer
	// for one that is being restarted.
	agentPatience = 10 * time.Second
	// busyPatience is how long 'up --wait' without a limit of its own waits for
	// a disk that somebody else has: udev and blkid do for a moment.
	busyPatience = time.Minute
)

type upOptions struct {
	wait    bool
	timeout time.Duration
}

func newUp(g *globalOptions) *cobra.Command {
	var o upOptions
	cmd := &cobra.Command{
		Use:   "up [VOLUME]",
		Short: "Bring a volume up: /dev/mapper/VOLUME appears",
		Long:  "Builds the volume's stack and starts replication. The agent does this by itself\nwhen it starts; 'up' is for after a 'down'. With --wait it ends when the volume is\nup: it waits for a disk that is not there yet and for a restore that the agent does\nby itself (restore: auto), and shows its progress; for a disk that somebody else\nhas until the limit, or a minute if there is none. A blank disk that waits for the\noperator (restore: manual) and one that is refused end it at once.",
		Args:  atMost(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case o.timeout < 0:
				return exit.Errorf(exit.Usage, "--timeout %s is not a time to wait", o.timeout)
			case o.timeout > 0 && !o.wait:
				return exit.Errorf(exit.Usage, "--timeout is for --wait")
			case !o.wait:
				return g.volumeCall(args, func(c proto.ControlClient, r *proto.VolumeRequest) (*proto.Done, error) {
					return c.Up(cmd.Context(), r)
				}, &proto.VolumeRequest{})
			}
			name, err := g.volumeName(args)
			if err != nil {
				return err
			}
			return g.upWait(cmd.Context(), name, o.timeout)
		},
	}
	cmd.Flags().BoolVar(&o.wait, "wait", false, "wait until it is up, an automatic restore included")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 0, "with --wait: give up waiting after this long; 0: never")
	return cmd
}

// upWait returns when the volume is up, or can't come up without the operator.
func (g *globalOptions) upWait(ctx context.Context, name string, timeout time.Duration) error {
	if timeout > 0 {
		limited, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		ctx = limited
	}
	p := g.progress()
	defer p.Done()
	var v status.Volume
	var refused error // what the agent answered to 'up'
	answered, asked := now(), false
	free := now() // when its disk was last not found in use
	look := func(c proto.ControlClient) error {
		found, err := volumeStatuses(ctx, c, name)
		if err != nil {
			return err
		}
		v = found[0]
		if v.Stage == "down" && !asked {
			// The outcome is seen in the next state, unless that is the same.
			asked = true
			_, refused = c.Up(ctx, &proto.VolumeRequest{Volume: name})
			v.Stage = "starting"
		}
		return nil
	}
	for {
		err := g.withAgent(look)
		switch {
		case err == nil:
			answered = now()
			if v.Stage != "busy" {
				free = answered
			}
			if timeout == 0 && answered.Sub(free) > busyPatience {
				return exit.Errorf(exit.Refused, "volume '%s' is busy: %s; %s", name, v.Reason, v.Advice)
			}
			if done, err := g.upState(p, &v, refused); done || err != nil {
				return err
			}
		case ctx.Err() == nil && (exit.Of(err) != exit.Unreachable || now().Sub(answered) > agentPatience):
			return err
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return exit.Errorf(exit.Timeout, "volume '%s' is not up within %s: %s: %s; %s", name, timeout, v.Stage, v.Reason, v.Advice)
			}
			return ctx.Err()
		case <-time.After(upEvery):
		}
	}
}

// upState shows where the volume is on its way up; an error says that it will
// not get there by itself.
func (g *globalOptions) upState(p *progress.Printer, v *status.Volume, refused error) (done bool, err error) {
	switch {
	case v.Up:
		p.Done()
		return true, g.say(map[string]any{"volume": v.Name, "up": true, "path": v.Path}, "%s: up as %s", v.Name, v.Path)
	case v.Stage == "restoring" && v.RestoreTotalBytes != nil && g.json:
		return false, g.sayJSON(map[string]any{"volume": v.Name, "phase": "restore", "done-bytes": *v.RestoreDoneBytes, "total-bytes": *v.RestoreTotalBytes})
	case v.Stage == "restoring" && v.RestoreTotalBytes != nil:
		p.Update("restore", int64(*v.RestoreDoneBytes), int64(*v.RestoreTotalBytes))
	case v.Stage == "secondary":
		return false, exit.Errorf(exit.Refused, "volume '%s' is secondary, only a replica here: it does not come up", v.Name)
	case v.Stage == "refused", v.Stage == "blank" && v.Restore != "auto":
		return false, exit.Errorf(exit.Refused, "volume '%s' is %s: %s; %s", v.Name, v.Stage, v.Reason, v.Advice)
	case v.Stage == "down" && refused != nil:
		return false, exit.FromWire(refused)
	case v.Reason != "" && !g.json:
		p.Line(v.Name + ": " + v.Stage + ": " + v.Reason)
	}
	return false, nil
}
