package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"blockferry/integration/uml"
	"blockferry/integration/vm"
)

// peerVar is set in a figure's second guest, which runs the commands that the first
// one has for it.
const peerVar = "BLOCKFERRY_BENCH_PEER"

var ownAddress, peerAddress = vm.MemberAddress(0), vm.MemberAddress(1)

// runBeside runs spec's program in a guest beside a second one.
func (f figure) runBeside(ctx context.Context, host *uml.Host, spec uml.Spec) (exit int, err error) {
	second := spec
	second.Name, second.Disks, second.Collect = f.name+" (peer)", f.peerDisks, nil
	second.Env = append(append([]string{}, spec.Env...), peerVar+"=1")
	_, err = host.WithSet(ctx, []uml.Spec{spec, second}, func(_ context.Context, s *uml.Set) error {
		first, peer := s.Members[0], s.Members[1]
		peer.Boot()
		if err := peer.Answers(); err != nil {
			return err
		}
		first.Boot()
		exit, err = first.Wait()
		return err
	})
	return exit, err
}

// servePeer is the second guest's work.
func servePeer() error {
	return vm.Serve(func(_ string, in json.RawMessage) (any, error) {
		var args []string
		if err := json.Unmarshal(in, &args); err != nil {
			return nil, err
		}
		return here(args...)
	})
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
	dialing, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	line, err := vm.Dial(dialing, peerAddress)
	if err != nil {
		return nil, nil, err
	}
	there = func(args ...string) (out string, err error) {
		if err := line.Call(ctx, "run", args, &out); err != nil {
			return "", fmt.Errorf("in the second guest: %w", err)
		}
		return out, nil
	}
	return there, line.Close, nil
}
