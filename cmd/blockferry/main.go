// Command blockferry keeps a block device copied onto other devices. `agent`
// does the work; the other commands talk to it over its Unix socket.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/term"

	"blockferry/cmd/blockferry/exit"
)

// version is set by the linker of a release.
var version = "0.1.0-dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	code := run(ctx, os.Args[1:], streams{
		out: os.Stdout, err: os.Stderr,
		outTerminal: term.IsTerminal(int(os.Stdout.Fd())),
		errTerminal: term.IsTerminal(int(os.Stderr.Fd())),
	})
	os.Exit(int(code))
}

// streams is where a command writes.
type streams struct {
	out, err                 io.Writer
	outTerminal, errTerminal bool
}

// run executes one command line.
func run(ctx context.Context, args []string, s streams) exit.Code {
	root, global := newRoot(s)
	root.SetArgs(args)
	root.SetOut(s.out)
	root.SetErr(s.err)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exit.OK
	}
	if global.json {
		fmt.Fprintln(s.err, exit.JSON(err))
	} else {
		fmt.Fprintln(s.err, "blockferry:", err)
	}
	return exit.Of(err)
}
