package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"time"

	"blockferry/integration/qemu"
	"blockferry/integration/uml"
)

// A second guest does what the first one tells it: a command at a time, asked for and answered
// as JSON on a connection that ends with the first guest.
const (
	peerVar     = "BLOCKFERRY_BENCH_PEER"
	ownAddress  = "10.77.0.1"
	peerAddress = "10.77.0.2"
	peerPort    = ":7000"
)

// answer is what a command said, and why it failed.
type answer struct{ Out, Failed string }

// bootPeer boots the second guest, and has spec's on the same network.
func bootPeer(ctx context.Context, host *uml.Host, f figure, spec *uml.Spec) (end func(), err error) {
	network, err := uml.NewNetwork("left", "right")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	second := *spec
	second.Name, second.Disks, second.Collect = f.name+" (peer)", f.peerDisks, nil
	second.Env = append(append([]string{}, spec.Env...), peerVar+"=1")
	if f.debian {
		spec.Modules = append(spec.Modules, qemu.CardModule)
	}
	second.Modules = spec.Modules
	spec.Network, spec.Tap = network, "left"
	second.Network, second.Tap = network, "right"
	ended := make(chan error, 1)
	go func() {
		_, err := host.Run(ctx, second)
		ended <- err
	}()
	return func() {
		cancel()
		<-ended
		network.Close()
	}, nil
}

// card is this guest's network card.
func card() string {
	if onDebian() {
		return qemu.Card
	}
	return uml.Card
}

// servePeer is the second guest's work.
func servePeer() error {
	if err := uml.Address(card(), peerAddress+"/24"); err != nil {
		return err
	}
	listener, err := net.Listen("tcp", peerAddress+peerPort)
	if err != nil {
		return err
	}
	defer listener.Close()
	// One first guest after another, should it have to be started again.
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		err = serveConnection(connection)
		if err := errors.Join(err, connection.Close()); err != nil {
			return err
		}
	}
}

func serveConnection(connection net.Conn) error {
	in, out := json.NewDecoder(connection), json.NewEncoder(connection)
	for {
		var args []string
		if err := in.Decode(&args); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		var a answer
		text, err := here(args...)
		a.Out = text
		if err != nil {
			a.Failed = err.Error()
		}
		if err := out.Encode(a); err != nil {
			return err
		}
	}
}

// runner runs a command, on either guest, and returns what it printed.
type runner func(args ...string) (string, error)

// here runs it in this guest.
func here(args ...string) (string, error) {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// peer reaches the second guest, from the first.
func peer(ctx context.Context) (there runner, leave func() error, err error) {
	if err := uml.Address(card(), ownAddress+"/24"); err != nil {
		return nil, nil, err
	}
	var connection net.Conn
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) {
		dialer := net.Dialer{Timeout: 2 * time.Second}
		if connection, err = dialer.DialContext(ctx, "tcp", peerAddress+peerPort); err == nil {
			break
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return nil, nil, fmt.Errorf("the second guest does not answer: %w", err)
		}
	}
	in, out := json.NewDecoder(connection), json.NewEncoder(connection)
	there = func(args ...string) (string, error) {
		var a answer
		if err := errors.Join(out.Encode(args), in.Decode(&a)); err != nil {
			return "", fmt.Errorf("the second guest: %s: %w", strings.Join(args, " "), err)
		}
		if a.Failed != "" {
			return "", fmt.Errorf("in the second guest: %s", a.Failed)
		}
		return a.Out, nil
	}
	return there, connection.Close, nil
}
