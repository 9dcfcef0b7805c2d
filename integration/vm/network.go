package vm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Network joins guests, by taps on a bridge in a network namespace of its own:
// nothing of it is seen outside, and nothing is left of it when the process
// that made it ends, however it ends. It needs root and the package iproute2.
type Network struct{ namespace *os.File }

// NewNetwork makes one with a tap for each guest.
func NewNetwork(taps ...string) (*Network, error) {
	n := &Network{}
	made := make(chan error)
	go func() {
		// Not unlocked: the thread ends with the goroutine, and nobody else gets
		// to run in the namespace.
		runtime.LockOSThread()
		made <- n.make(taps)
	}()
	if err := <-made; err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Network) make(taps []string) (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("a network namespace: %w", err)
	}
	if n.namespace, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return err
	}
	commands := []string{"link add bridge type bridge", "link set bridge up"}
	for _, tap := range taps {
		commands = append(commands, "tuntap add "+tap+" mode tap", "link set "+tap+" master bridge up")
	}
	for _, command := range commands {
		if out, err := exec.Command("ip", strings.Fields(command)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", command, err, out)
		}
	}
	return nil
}

// enter moves the calling thread there, for good.
func (n *Network) enter() error {
	if err := unix.Setns(int(n.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the guests' network: %w", err)
	}
	return nil
}

// Address gives a guest's network card an address, as in 10.0.0.1/24. It is
// called in the guest.
func Address(card, address string) error {
	for _, args := range [][]string{{"address", "add", address, "dev", card}, {"link", "set", card, "up"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// Close gives it up. Guests that are running keep it until they end.
func (n *Network) Close() error {
	if n.namespace == nil {
		return nil
	}
	return n.namespace.Close()
}
