// Package etcdtest runs a real etcd for tests.
package etcdtest

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	startLimit = time.Minute
	startTries = 3 // another process may take a port in between
)

// Etcd is one member that is a cluster by itself. It ends with the test, and with the
// test's process.
type Etcd struct {
	Endpoint string // http://HOST:PORT
	inside   []string
	address  string // HOST:PORT
	dir      string
	process  *os.Process
	ended    chan struct{}
}

// Start runs etcd on loopback. Without the program the test is skipped, unless
// BLOCKFERRY_REQUIRE_GUEST is set.
func Start(t testing.TB) *Etcd {
	t.Helper()
	return StartAt(t, nil, "127.0.0.1:0")
}

// StartAt runs etcd by a command that leads elsewhere, such as into a network
// namespace, at HOST:PORT there; port 0: any that is free here.
func StartAt(t testing.TB, inside []string, address string) *Etcd {
	t.Helper()
	if _, err := exec.LookPath("etcd"); err != nil {
		if os.Getenv("BLOCKFERRY_REQUIRE_GUEST") != "" {
			t.Fatalf("%v: make uml-deps", err)
		}
		t.Skipf("%v: make uml-deps", err)
	}
	e := &Etcd{inside: inside, dir: t.TempDir(), address: address}
	t.Cleanup(e.kill)
	var err error
	for range startTries {
		if strings.HasSuffix(address, ":0") {
			e.address = FreeAddress(t)
		}
		e.Endpoint = "http://" + e.address
		if err = e.start(); err == nil {
			return e
		}
	}
	t.Fatal(err)
	return nil
}

// FreeAddress is a HOST:PORT on loopback that nobody listens on at this moment.
func FreeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// start returns when etcd answers.
func (e *Etcd) start() error {
	// A cluster of one talks to no peer: port 0 is never connected to.
	const peer = "http://127.0.0.1:0"
	line := append(e.inside[:len(e.inside):len(e.inside)], "etcd", "--name", "one", "--data-dir", e.dir, "--listen-client-urls", e.Endpoint, "--advertise-client-urls", e.Endpoint,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "one="+peer, "--logger", "zap", "--log-outputs", "stderr")
	cmd := exec.Command(line[0], line[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	started, ready := make(chan error), make(chan struct{})
	e.ended = make(chan struct{})
	go func() {
		// Pdeathsig is sent when the thread that started the process ends.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		var last string
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if last = lines.Text(); strings.Contains(last, "serving client traffic") {
				close(ready)
				break
			}
		}
		for lines := bufio.NewReader(out); err == nil; { // it must not wait for a reader
			_, err = lines.ReadString('\n')
		}
		_ = cmd.Wait()
		close(e.ended)
	}()
	if err := <-started; err != nil {
		return err
	}
	e.process = cmd.Process
	select {
	case <-ready:
		return nil
	case <-e.ended:
		return fmt.Errorf("etcd ended: %v", cmd.ProcessState)
	case <-time.After(startLimit):
		e.kill()
		return fmt.Errorf("etcd does not answer after %v", startLimit)
	}
}

// Stop ends etcd as a crash would, with what it holds left on its disk.
func (e *Etcd) Stop() { e.kill() }

// Again starts it after Stop, at the same address.
func (e *Etcd) Again(t testing.TB) {
	t.Helper()
	if err := e.start(); err != nil {
		t.Fatal(err)
	}
}

// Pause has it answer nobody until resume is called.
func (e *Etcd) Pause(t testing.TB) (resume func()) {
	t.Helper()
	err := e.process.Signal(syscall.SIGSTOP)
	if err == nil { // a thread that was busy may answer a while still
		err = ignoringEINTR(func() error { return unix.Waitid(unix.P_PID, e.process.Pid, nil, unix.WSTOPPED, nil) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() { _ = e.process.Signal(syscall.SIGCONT) }
}

func ignoringEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func (e *Etcd) kill() {
	if e.process == nil {
		return
	}
	_ = e.process.Kill()
	<-e.ended
	e.process = nil
}
