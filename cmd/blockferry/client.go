package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"blockferry/cmd/blockferry/exit"
	"blockferry/cmd/blockferry/progress"
	"blockferry/proto"
)

// withAgent calls fn with a client of the agent's control service. Errors of
// fn come back with the exit code and the words that the agent gave.
func (g *globalOptions) withAgent(fn func(proto.ControlClient) error) error {
	if _, err := os.Stat(g.socket); err != nil {
		if errors.Is(err, os.ErrPermission) {
			return exit.Errorf(exit.Prerequisite, "%s: only root may talk to the agent; run it with sudo", g.socket)
		}
		return unreachable(g.socket)
	}
	// The kernel's permissions on the socket are the authentication.
	conn, err := grpc.NewClient("unix://"+g.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return unreachable(g.socket)
	}
	defer conn.Close()
	err = fn(proto.NewControlClient(conn))
	if err == nil {
		return nil
	}
	err = exit.FromWire(err)
	if exit.Of(err) == exit.Unreachable {
		return exit.Errorf(exit.Unreachable, "%w (%v)", unreachable(g.socket), err)
	}
	return err
}

func unreachable(socket string) error {
	return exit.Errorf(exit.Unreachable, "the agent does not answer on %s; start it: systemctl start blockferry, or 'blockferry agent'", socket)
}

// volumeCall runs one of the calls that answer with a line.
func (g *globalOptions) volumeCall(args []string, call func(proto.ControlClient, *proto.VolumeRequest) (*proto.Done, error), request *proto.VolumeRequest) error {
	name, err := g.volumeName(args)
	if err != nil {
		return err
	}
	request.Volume = name
	return g.withAgent(func(c proto.ControlClient) error {
		done, err := call(c, request)
		if err != nil {
			return err
		}
		return g.say(map[string]any{"volume": name, "message": done.Message}, "%s", done.Message)
	})
}

// progressStream is what verify and restore read from the agent.
type progressStream interface {
	Recv() (*proto.Progress, error)
}

// follow shows a stream's progress until its outcome.
func (g *globalOptions) follow(ctx context.Context, volume string, stream progressStream) error {
	p := g.progress()
	defer p.Done()
	for {
		m, err := stream.Recv()
		if err == io.EOF {
			return exit.Errorf(exit.Failed, "the agent ended without an outcome; see its log")
		}
		if err != nil {
			return err
		}
		if !m.Finished && m.Message != "" {
			p.Done()
			if err := g.say(map[string]any{"volume": volume, "message": m.Message}, "%s", m.Message); err != nil {
				return err
			}
			continue
		}
		if !m.Finished {
			if g.json {
				g.sayJSON(map[string]any{"volume": volume, "phase": m.Phase, "done-bytes": m.DoneBytes, "total-bytes": m.TotalBytes})
			} else {
				p.Update(m.Phase, int64(m.DoneBytes), int64(m.TotalBytes))
			}
			continue
		}
		p.Done()
		if m.Failed {
			return exit.Errorf(exit.Differs, "%s", m.Message)
		}
		return g.say(map[string]any{"volume": volume, "finished": true, "message": m.Message}, "%s", m.Message)
	}
}

func (g *globalOptions) progress() *progress.Printer {
	return &progress.Printer{Out: g.streams.err, Terminal: g.errTerminal, Now: now}
}

// say prints a line for people, or the document for programs.
func (g *globalOptions) say(document map[string]any, format string, args ...any) error {
	if g.json {
		return g.sayJSON(document)
	}
	_, err := fmt.Fprintf(g.out, format+"\n", args...)
	return err
}
