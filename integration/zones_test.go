package integration

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/lease/etcdtest"
)

// zone is a network namespace of a test's own. It ends with the thread that made
// it and what runs in it, however the test ends.
type zone struct {
	t    *testing.T
	path string // of the namespace
	tid  int
}

func newZone(t *testing.T) *zone {
	t.Helper()
	z := &zone{t: t}
	made, end := make(chan error, 1), make(chan struct{})
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		z.tid = unix.Gettid()
		z.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), z.tid)
		made <- unix.Unshare(unix.CLONE_NEWNET)
		<-end
	}()
	if err := <-made; err != nil {
		t.Fatalf("a network namespace: %v", err)
	}
	t.Cleanup(func() { close(end) })
	z.ip("link set lo up")
	return z
}

// inside starts a command in the zone.
func (z *zone) inside() []string { return []string{"nsenter", "--net=" + z.path} }

func (z *zone) ip(args string) {
	z.t.Helper()
	run(z.t, "nsenter", append([]string{"--net=" + z.path, "ip"}, strings.Fields(args)...)...)
}

// twoZones are joined by one wire: 'wire' at each end, 10.9.0.1 and 10.9.0.2.
func twoZones(t *testing.T) (a, b *zone) {
	t.Helper()
	a, b = newZone(t), newZone(t)
	a.ip(fmt.Sprintf("link add wire type veth peer name wire netns %d", b.tid))
	for n, z := range []*zone{a, b} {
		z.ip(fmt.Sprintf("address add 10.9.0.%d/24 dev wire", n+1))
		z.ip("link set wire up")
	}
	return a, b
}

// netem has the zone's end of the wire delay, lose and hold back what leaves there, in
// the words of tc's netem. The guest needs the module sch_netem.
func (z *zone) netem(words string) {
	z.t.Helper()
	z.tc("qdisc replace dev wire root netem " + words)
}

func (z *zone) tc(args string) string {
	z.t.Helper()
	return run(z.t, "nsenter", append([]string{"--net=" + z.path, "tc"}, strings.Fields(args)...)...)
}

var droppedPackets = regexp.MustCompile(`\(dropped (\d+),`)

// dropped is how many packets netem lost at the zone's end of the wire.
func (z *zone) dropped() int {
	z.t.Helper()
	out := z.tc("-s qdisc show dev wire")
	m := droppedPackets.FindStringSubmatch(out)
	if m == nil {
		z.t.Fatalf("tc does not say what was dropped: %s", out)
	}
	n, err := strconv.Atoi(m[1])
	if err != nil {
		z.t.Fatal(err)
	}
	return n
}

// arrived is how many bytes came out of the wire at the zone's end, headers included.
func (z *zone) arrived() int64 {
	z.t.Helper()
	table := mustRead(z.t, filepath.Join(filepath.Dir(filepath.Dir(z.path)), "net/dev"))
	for line := range strings.Lines(table) {
		if counts, ok := strings.CutPrefix(strings.TrimSpace(line), "wire:"); ok {
			n, err := strconv.ParseInt(strings.Fields(counts)[0], 10, 64)
			if err != nil {
				z.t.Fatal(err)
			}
			return n
		}
	}
	z.t.Fatalf("no wire in %s", table)
	return 0
}

// slowLink passes connections on at a rate, in bytes per second each way, and
// counts what it passed forward.
type slowLink struct {
	listener net.Listener
	to       string
	rate     int

	mu     sync.Mutex
	passed int64
	closed bool
	open   []net.Conn
	wg     sync.WaitGroup
}

func newSlowLink(t *testing.T, to string, rate int) *slowLink {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &slowLink{listener: l, to: to, rate: rate}
	s.wg.Go(s.accept)
	t.Cleanup(s.close)
	return s
}

func (s *slowLink) address() string { return s.listener.Addr().String() }

func (s *slowLink) accept() {
	for {
		in, err := s.listener.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", s.to)
		if err != nil {
			in.Close()
			continue
		}
		// No more is taken in than the link would hold.
		_ = in.(*net.TCPConn).SetReadBuffer(64 << 10)
		s.mu.Lock()
		closed := s.closed
		s.open = append(s.open, in, out)
		s.mu.Unlock()
		if closed {
			in.Close()
			out.Close()
			return
		}
		s.wg.Go(func() { s.pass(out, in, true) })
		s.wg.Go(func() { s.pass(in, out, false) })
	}
}

func (s *slowLink) pass(to, from net.Conn, forward bool) {
	defer to.Close()
	defer from.Close()
	const slice = 50 * time.Millisecond
	buffer := make([]byte, max(1, s.rate*int(slice)/int(time.Second)))
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			time.Sleep(time.Duration(n) * time.Second / time.Duration(s.rate)) // the link's own time
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
			if forward {
				s.mu.Lock()
				s.passed += int64(n)
				s.mu.Unlock()
			}
		}
		if err != nil {
			return
		}
	}
}

func (s *slowLink) bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.passed
}

func (s *slowLink) close() {
	s.mu.Lock()
	s.closed = true
	open := s.open
	s.mu.Unlock()
	s.listener.Close()
	for _, c := range open {
		c.Close()
	}
	s.wg.Wait()
}

var freeAddress = etcdtest.FreeAddress

// issue makes an authority with the built binary, and a folder for each node.
func issue(t *testing.T, binary string, nodes ...string) map[string]string {
	t.Helper()
	ca := t.TempDir() + "/ca"
	run(t, binary, "certs", "init", "--ca", ca)
	folders := map[string]string{}
	for _, n := range nodes {
		run(t, binary, "certs", "issue", n, "--ca", ca)
		folders[n] = ca + "/nodes/" + n
	}
	return folders
}

// sameBytes compares the first bytes of two devices.
func sameBytes(t *testing.T, a, b string, size int64) {
	t.Helper()
	out, err := exec.Command("cmp", "--bytes", fmt.Sprint(size), a, b).CombinedOutput()
	if err != nil {
		t.Errorf("%s and %s differ: %v %s", a, b, err, out)
	}
}
