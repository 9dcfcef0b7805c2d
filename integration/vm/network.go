package vm

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// prefix is of the addresses on a Network.
	prefix = "10.88.0."
	// HostAddress is the host's own on each.
	HostAddress = prefix + "254"
)

// MemberAddress is the address of a Set's n-th guest, n from 0, on its network.
func MemberAddress(n int) string { return fmt.Sprint(prefix, n+1) }

// Network joins guests, by taps on a bridge in a network namespace of its own:
// nothing of it is seen outside, and nothing is left of it when the process
// that made it ends, however it ends. The host has HostAddress there. It needs
// root and the package iproute2.
type Network struct{ namespace *os.File }

// newNetwork makes one with a tap for each guest.
func newNetwork(taps ...string) (*Network, error) {
	n := &Network{}
	err := onThread(func() error { return n.make(taps) })
	if err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// onThread runs f on a thread that ends with it, so that f may enter namespaces.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // not unlocked: nobody else gets to run in the namespace
		done <- f()
	}()
	return <-done
}

func (n *Network) make(taps []string) (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("a network namespace: %w", err)
	}
	if n.namespace, err = os.Open("/proc/thread-self/ns/net"); err != nil {
		return err
	}
	commands := []string{"link set lo up", "link add bridge type bridge", "address add " + HostAddress + "/24 dev bridge", "link set bridge up"}
	for _, tap := range taps {
		commands = append(commands, "tuntap add "+tap+" mode tap", "link set "+tap+" "+onBridge+" up")
	}
	for _, command := range commands {
		if err := ip(command); err != nil {
			return err
		}
	}
	return nil
}

func ip(args string) error {
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %s: %w: %s", args, err, out)
	}
	return nil
}

// onBridge is where a tap is for its guest to reach the others. The tap itself stays up
// at all times: a guest's driver gives up for good on one that is not.
const onBridge = "master bridge"

// link changes how a tap is linked.
func (n *Network) link(tap, how string) error {
	return onThread(func() error {
		return errors.Join(n.enter(), ip("link set "+tap+" "+how))
	})
}

// enter moves the calling thread there, for good.
func (n *Network) enter() error {
	if err := unix.Setns(int(n.namespace.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter the guests' network: %w", err)
	}
	return nil
}

// Inside starts a command of the host's on the network, at HostAddress.
func (n *Network) Inside() []string {
	return []string{"nsenter", fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), n.namespace.Fd())}
}

// dial connects the host to a guest.
func (n *Network) dial(ctx context.Context, address string) (connection net.Conn, err error) {
	err = onThread(func() error {
		if err := n.enter(); err != nil {
			return err
		}
		connection, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
		return err
	})
	return connection, err
}

// Close gives it up. Guests that are running keep it until they end.
func (n *Network) Close() error {
	if n.namespace == nil {
		return nil
	}
	return n.namespace.Close()
}

// CardAddress is the hardware address of the card at a tap. It stays when the guest
// is booted again: the others remember it.
func CardAddress(tap string) string {
	sum := crc32.ChecksumIEEE([]byte(tap))
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", byte(sum>>16), byte(sum>>8), byte(sum))
}

// join gives this guest's network card its address.
func join(card, address string) error {
	return errors.Join(ip("address add "+address+"/24 dev "+card), ip("link set "+card+" up"))
}
