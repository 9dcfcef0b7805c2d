package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
)

// link joins this process's network namespace to another one: what is sent at either end is
// a packet that this process reads, keeps for the delay, and hands to the other end. TCP
// over it is the kernel's own. The kernel has no delay of its own on every machine.
//
//	near (this process) -> TUN -> carry, delay each way -> TUN -> far
//
// It ends with the process, which has both namespaces for itself.
type link struct {
	delay time.Duration // one way
	far   chan func()   // run by a thread in the far namespace

	mu   sync.Mutex
	rate int64 // bytes per second each way; 0: as fast as packets can be handed on
}

const (
	linkNear   = "10.78.0.1"
	linkFar    = "10.78.0.2"
	linkPacket = 65000 // the largest, in bytes: cards take as much at once from TCP
	// linkQueue is how many packets are on the way at most.
	linkQueue = 1024
	// linkAhead is for how long at its rate the link takes packets in before the first of
	// them has left: the rest waits in the kernel.
	linkAhead = time.Millisecond
)

// newLink makes one. The process must be in a network namespace of its own (figure.network).
func newLink(delay time.Duration) (*link, error) {
	if err := rig.Do("ip", "link", "set", "lo", "up"); err != nil {
		return nil, err
	}
	near, err := openTun(linkNear)
	if err != nil {
		return nil, err
	}
	l := &link{delay: delay, far: make(chan func())}
	ready := make(chan error, 1)
	var there *os.File
	go func() {
		runtime.LockOSThread() // for ever: the namespace is the thread's
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			there, err = openTun(linkFar)
		}
		ready <- err
		for do := range l.far {
			do()
		}
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("the link's far end: %w", err)
	}
	go l.carry(near, there)
	go l.carry(there, near)
	return l, nil
}

// openTun makes a TUN device in the namespace of the calling thread.
func openTun(address string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/net/tun: %w", err)
	}
	const name = "wire"
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, err
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return nil, fmt.Errorf("a TUN device: %w", err)
	}
	for _, args := range []string{"address add " + address + "/24 dev " + name, fmt.Sprintf("link set dev %s mtu %d up", name, linkPacket)} {
		if err := rig.Do("ip", strings.Fields(args)...); err != nil {
			return nil, err
		}
	}
	return os.NewFile(uintptr(fd), "link at "+address), nil
}

type linkedPacket struct {
	data []byte
	due  time.Time
}

// carry hands packets on, in order, each after the delay.
func (l *link) carry(from, to *os.File) {
	packets, free := make(chan linkedPacket, linkQueue), make(chan []byte, linkQueue)
	go func() {
		for p := range packets {
			time.Sleep(time.Until(p.due))
			if _, err := to.Write(p.data); err != nil && !errors.Is(err, unix.EIO) { // EIO: the other end is not up yet
				fmt.Fprintf(os.Stderr, "%s: %v\n", to.Name(), err)
			}
			select {
			case free <- p.data[:linkPacket]:
			default:
			}
		}
	}()
	var idle time.Time // when all that was taken in has left
	for {
		var b []byte
		select {
		case b = <-free:
		default:
			b = make([]byte, linkPacket)
		}
		n, err := from.Read(b)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", from.Name(), err)
			return
		}
		now := time.Now()
		if idle.Before(now) {
			idle = now
		}
		if rate := l.limit(); rate > 0 {
			idle = idle.Add(time.Duration(int64(n) * int64(time.Second) / rate))
		}
		packets <- linkedPacket{b[:n], idle.Add(l.delay)}
		if ahead := time.Until(idle); ahead > linkAhead {
			time.Sleep(ahead - linkAhead/2)
		}
	}
}

func (l *link) limit() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rate
}

// setRate limits what the link takes each way; 0: not.
func (l *link) setRate(bytesPerSecond int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rate = bytesPerSecond
}

// listen opens a port at the far end.
func (l *link) listen() (net.Listener, error) {
	var listener net.Listener
	opened := make(chan error, 1)
	l.far <- func() {
		var err error
		listener, err = net.Listen("tcp4", linkFar+":0")
		opened <- err
	}
	err := <-opened
	return listener, err
}

// roundTrip is the median time of so many single bytes there and back over one connection.
func (l *link) roundTrip(count int) (time.Duration, error) {
	listener, err := l.listen()
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	go func() {
		there, err := listener.Accept()
		if err != nil {
			return
		}
		defer there.Close()
		b := make([]byte, 1)
		for {
			if _, err := there.Read(b); err != nil {
				return
			}
			if _, err := there.Write(b); err != nil {
				return
			}
		}
	}()
	here, err := net.Dial("tcp4", listener.Addr().String())
	if err != nil {
		return 0, err
	}
	defer here.Close()
	b, took := make([]byte, 1), []float64{}
	for range count {
		began := time.Now()
		if _, err := here.Write(b); err != nil {
			return 0, err
		}
		if _, err := here.Read(b); err != nil {
			return 0, err
		}
		took = append(took, time.Since(began).Seconds())
	}
	return time.Duration(percentile(took, 50) * float64(time.Second)), nil
}
