package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/hooks"
	"blockferry/proto"
)

// defaultHoldLimit is for a command that begins a snapshot and does not wait for its end.
const defaultHoldLimit = time.Minute

type snapshotOptions struct {
	limit time.Duration
}

func newSnapshot(g *globalOptions) *cobra.Command {
	var o snapshotOptions
	cmd := &cobra.Command{
		Use:   "snapshot VOLUME REPLICA -- COMMAND [ARGUMENT]...",
		Short: "Run a command that takes a snapshot of a replica's disk, at a known epoch",
		Long: "Holds a replica whose disk is at this node at a point in time that is all in its data area, runs\nthe command, and lets the replica go on. Meanwhile replication goes on into the replica's\njournal: nothing is lost, and nothing waits but, once that is full, this replica.\n\n" +
			"The command's environment says what is held: BLOCKFERRY_VOLUME, _REPLICA, _DEVICE, _OFFSET_BYTES\nand _SIZE_BYTES (where the data is), _GENERATION and _EPOCH (the position), _EPOCH_TIME\n(when it was cut, by the clock of the node that writes).\n\n" +
			"The copy that this node holds of another's volume is called by this node's name.\n\n" +
			"Ends with 0 if the command did and the replica was held until then, with 1 if the command\nended otherwise, with 6 if it took longer than --limit: it is ended then.",
		Example: "  blockferry snapshot data ebs -- aws ec2 create-snapshot --volume-id vol-0123456789abcdef0",
		Args: func(cmd *cobra.Command, args []string) error {
			switch dash := cmd.ArgsLenAtDash(); {
			case dash < 0 && len(args) > 2:
				return exit.Errorf(exit.Usage, "'%s' was not expected: the command comes after '--'; see '%s --help'", args[2], cmd.CommandPath())
			case dash > 2:
				return exit.Errorf(exit.Usage, "'%s' was not expected; see '%s --help'", args[2], cmd.CommandPath())
			case dash < 0 && len(args) < 2, dash >= 0 && dash < 2:
				return exit.Errorf(exit.Usage, "VOLUME or REPLICA is missing; see '%s --help'", cmd.CommandPath())
			case dash < 0 || len(args) == dash:
				return exit.Errorf(exit.Usage, "'-- COMMAND' is missing; see '%s --help'", cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if o.limit < hooks.MinTimeout || o.limit > hooks.MaxTimeout {
				return exit.Errorf(exit.Usage, "--limit %s: want %v to %v", o.limit, hooks.MinTimeout, hooks.MaxTimeout)
			}
			return g.withAgent(func(c proto.ControlClient) error { return g.snapshot(cmd.Context(), c, args, o) })
		},
	}
	cmd.Flags().DurationVar(&o.limit, "limit", defaultHoldLimit, "how long the replica is held at most; the command is ended then")
	return cmd
}

// snapshot holds a replica, runs args[2:] and lets it go; what the command made counts only if the
// agent says that the replica was held until it had ended.
func (g *globalOptions) snapshot(ctx context.Context, c proto.ControlClient, args []string, o snapshotOptions) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream, err := c.Hold(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&proto.HoldRequest{Volume: args[0], Replica: args[1], LimitMillis: uint64(o.limit.Milliseconds())}); err != nil && err != io.EOF {
		return err
	}
	held, err := stream.Recv()
	if err != nil {
		return err
	}
	// What ends the hold ends the command.
	ended := make(chan error, 1)
	go func() {
		m, err := stream.Recv()
		if err == nil && !m.Released {
			err = errors.New("the agent's answer is not understood")
		}
		ended <- err
		if err != nil {
			cancel(err)
		}
	}()
	begun := time.Now()
	failed := g.runHeld(ctx, args[2:], held)
	seconds := time.Since(begun).Seconds()
	lasted := stream.Send(&proto.HoldRequest{Release: true})
	if err := <-ended; err != nil || lasted != nil {
		if err == nil {
			err = lasted
		}
		if err == io.EOF {
			err = exit.Errorf(exit.Failed, "the agent ended the hold; see its log")
		}
		return err
	}
	at := hex.EncodeToString(held.Generation) + "/" + strconv.FormatUint(held.Epoch, 10)
	if failed != nil {
		return exit.Errorf(exit.Failed, "%s: replica '%s' was held at %s; the command %w", held.Volume, held.Replica, at, failed)
	}
	// The output is the command's.
	line := fmt.Sprintf("%s: replica '%s' on %s was held at %s for %.1fs, and goes on", held.Volume, held.Replica, held.Device, at, seconds)
	if g.json {
		b, err := json.Marshal(map[string]any{"volume": held.Volume, "replica": held.Replica, "device": held.Device,
			"generation": hex.EncodeToString(held.Generation), "epoch": held.Epoch, "epoch-time": epochTime(held), "held-seconds": seconds})
		if err != nil {
			return err
		}
		line = string(b)
	}
	_, err = fmt.Fprintln(g.err, line)
	return err
}

// runHeld runs the command with this process's outputs and nothing to read.
func (g *globalOptions) runHeld(ctx context.Context, command []string, held *proto.Held) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the kernel ends the command with its thread, and so with this process
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Env = heldEnvironment(os.Environ(), held)
		cmd.Stdout, cmd.Stderr = g.out, g.err
		cmd.WaitDelay = hooks.Drain
		result <- hooks.RunGroup(ctx, cmd, func() {})
	}()
	return <-result
}

// heldEnvironment is the caller's, but for what is ours in it.
func heldEnvironment(caller []string, held *proto.Held) []string {
	env := slices.DeleteFunc(slices.Clone(caller), func(s string) bool { return strings.HasPrefix(s, "BLOCKFERRY_") })
	for name, value := range map[string]string{
		"VOLUME": held.Volume, "REPLICA": held.Replica, "DEVICE": held.Device,
		"OFFSET_BYTES": strconv.FormatUint(held.Offset, 10), "SIZE_BYTES": strconv.FormatUint(held.SizeBytes, 10),
		"GENERATION": hex.EncodeToString(held.Generation), "EPOCH": strconv.FormatUint(held.Epoch, 10), "EPOCH_TIME": epochTime(held),
	} {
		if value != "" {
			env = append(env, fmt.Sprintf("BLOCKFERRY_%s=%s", name, value))
		}
	}
	return env
}

// epochTime is by the clock of the node that took the cut, "" if it is not known.
func epochTime(held *proto.Held) string {
	if held.CutUnixNanos == 0 {
		return ""
	}
	return time.Unix(0, held.CutUnixNanos).UTC().Format(time.RFC3339Nano)
}
