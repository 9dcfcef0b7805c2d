package integration

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/uml"
	"blockferry/integration/vm"
)

// What a node's guest is asked for.
type (
	begin struct {
		Config    string
		Create    bool // the disk is to be one of the volume
		Installed bool // the agent is systemd's
	}
	shDone struct {
		Out  string
		Code int
	}
	looked struct {
		Volume status.Volume
		Said   string
		Known  bool
	}
	cliDone struct {
		Out, Errs string
		Code      int
	}
	writing struct {
		Path    string
		History history
		From    uint64
		// Records of recordBytes, each made durable, in a file, instead of the history's writes.
		Records, Lock bool
	}
	written struct {
		Acked, Issued uint64
		Done          bool
		// Once it is done: why, and how long ago the first write was begun, and each
		// was acknowledged, by the guest's clock.
		Err   string
		Begun time.Duration
		Ended []time.Duration
	}
	judging struct {
		Path            string
		History         history
		AtLeast, AtMost uint64
	}
)

// farRescue is the folder of a node's rescue files, in its guest.
const farRescue = "/run/rescue"

// nodeTasks are those of a guest that is a node.
func nodeTasks() tasks {
	var c *cli
	var deadMan *syncBuffer // its log
	var w *writer
	state := func(t *testing.T) written {
		if w == nil {
			t.Fatal("nobody writes")
		}
		s := written{Acked: w.acked(), Issued: w.issued()}
		select {
		case <-w.done:
		default:
			return s
		}
		s.Done, s.Acked, s.Issued = true, w.acked(), w.issued()
		if w.err != nil {
			s.Err = w.err.Error()
		}
		now := time.Now()
		s.Begun = now.Sub(w.begun[0])
		for _, ended := range w.ended {
			s.Ended = append(s.Ended, now.Sub(ended))
		}
		return s
	}
	return tasks{
		"begin": task(func(t *testing.T, in begin) none {
			if err := os.MkdirAll(farRescue, 0o700); err != nil {
				t.Fatal(err)
			}
			if in.Installed {
				c = installedCLI(t)
				if err := errors.Join(os.MkdirAll(filepath.Dir(c.config), 0o755), os.WriteFile(c.config, []byte(in.Config), 0o600)); err != nil {
					t.Fatal(err)
				}
				if in.Create {
					c.must(t, "create")
				}
				run(t, "systemctl", "start", "blockferry.service")
				return none{}
			}
			c = newCLI(t, in.Config)
			var socket string
			socket, deadMan = startDeadMan(t, c.binary)
			c.agentFlags = []string{"--dead-man-socket", socket}
			if in.Create {
				c.must(t, "create")
			}
			c.start(t)
			return none{}
		}),
		"blockferry": task(func(t *testing.T, args []string) cliDone {
			out, errs, code := c.try(t, args...)
			return cliDone{out, errs, code}
		}),
		"status": task(func(t *testing.T, _ none) (l looked) {
			l.Volume, l.Said, l.Known = c.look(t)
			return l
		}),
		"sh": task(func(t *testing.T, line string) shDone {
			out, err := tryRun(t, "/bin/sh", "-c", line)
			var ended *exec.ExitError
			if err != nil && !errors.As(err, &ended) {
				t.Fatal(err)
			}
			d := shDone{Out: out}
			if ended != nil {
				d.Code = ended.ExitCode()
			}
			return d
		}),
		"log":       task(func(t *testing.T, _ none) string { return c.logText(t) }),
		"dead-man":  task(func(*testing.T, none) string { return deadMan.String() }),
		"installed": task(func(t *testing.T, _ none) none { c = installedCLI(t); return none{} }),
		"write": task(func(t *testing.T, in writing) none {
			if in.Records {
				w = startNumbered(t, in.Path, in.History, in.Lock)
			} else {
				w = startWriter(t, in.Path, in.History, in.From)
			}
			return none{}
		}),
		"stop": task(func(t *testing.T, _ none) written { w.stop(t); return state(t) }),
		"look": task(func(t *testing.T, _ none) written { return state(t) }),
		"judge": task(func(t *testing.T, in judging) verdict {
			return judgeDevice(t, in.Path, in.History, in.AtLeast, in.AtMost)
		}),
	}
}

// startDeadMan starts a dead-man's service of the test's own, and returns its socket
// and its log.
func startDeadMan(t *testing.T, binary string) (socket string, out *syncBuffer) {
	t.Helper()
	socket, out = filepath.Join(t.TempDir(), "dead-man.sock"), &syncBuffer{}
	s := exec.Command(binary, "dead-man", "--listen", socket)
	s.Stdout, s.Stderr = out, out
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.Process.Kill()
		_ = s.Wait()
		if t.Failed() {
			t.Logf("a dead-man's log:\n%s", out)
		}
	})
	out.await(t, "dead-man serves")
	return socket, out
}

// farNode drives a node in a guest of its own, from the host.
type farNode struct {
	*guests
	name      string // of the guest
	config    string
	installed bool // its agent is systemd's
}

const (
	farDisk   = 200 << 20
	farVolume = 16 << 20
	// farWait is how long a node on a busy machine may take to get anywhere.
	farWait = 2 * time.Minute
)

// farHistories are what the two nodes write: each has its own part of the volume.
var (
	ofA = history{Seed: 61, Size: 4 << 20, MaxBytes: 64 << 10, Pause: 10 * time.Millisecond}
	ofB = history{Seed: 67, Size: 4 << 20, MaxBytes: 64 << 10, Pause: 10 * time.Millisecond, At: 8 << 20}
)

// farMembers are guests for two nodes.
func farMembers() []member {
	g := guest{Memory: "500M", Disks: []disk{{Size: farDisk}}, Timeout: 6 * time.Minute}
	return []member{{"a", g}, {"b", g}}
}

// farTwins are two nodes, each in a guest of its own, with one volume that either can
// write; node-a does. Their files have top at the top level, and more for the volume.
func farTwins(g *guests, top, more string) (a, b *farNode) {
	t := g.t
	t.Helper()
	folders := issue(t, blockferry(t), "node-a", "node-b")
	node := func(n, other int, role string) *farNode {
		name := func(n int) string { return "node-" + string(rune('a'+n)) }
		guest := name(n)
		if _, is := g.members[guest]; !is {
			guest = string(rune('a' + n))
		}
		return &farNode{g, guest, twinFile(top, name(n), uml.GuestPath(folders[name(n)]), vm.MemberAddress(n), farRescue,
			role, ubd(0), farVolume, more, name(other), vm.MemberAddress(other)), g.systemd}
	}
	a, b = node(0, 1, "primary"), node(1, 0, "secondary")
	b.begin(true)
	a.begin(true)
	a.await("up to date", farWait, upToDate)
	return a, b
}

func (n *farNode) begin(create bool) {
	n.t.Helper()
	n.ask(n.name, "begin", begin{n.config, create, n.installed}, nil)
}

// sh runs a line of shell there.
func (n *farNode) sh(line string) (out string, code int) {
	n.t.Helper()
	var d shDone
	n.ask(n.name, "sh", line, &d)
	return d.Out, d.Code
}

// shell is one that has to end with 0.
func (n *farNode) shell(line string) string {
	n.t.Helper()
	out, code := n.sh(line)
	if code != 0 {
		n.t.Fatalf("%s: %s: exit code %d\n%s", n.name, line, code, out)
	}
	return out
}

func (n *farNode) try(args ...string) (done cliDone) {
	n.t.Helper()
	n.ask(n.name, "blockferry", args, &done)
	return done
}

// run is a command that has to end with 0.
func (n *farNode) run(args ...string) string {
	n.t.Helper()
	done := n.try(args...)
	if done.Code != 0 {
		n.t.Fatalf("%s: blockferry %s: exit code %d\n%s%s", n.name, strings.Join(args, " "), done.Code, done.Out, done.Errs)
	}
	n.logf("%s: blockferry %s\n%s%s", n.name, strings.Join(args, " "), done.Out, done.Errs)
	return done.Out
}

// refused is one that has to end with 3 and say something.
func (n *farNode) refused(words []string, args ...string) {
	n.t.Helper()
	done := n.try(args...)
	if done.Code != 3 {
		n.t.Errorf("%s: blockferry %s: exit code %d, want 3\n%s%s", n.name, strings.Join(args, " "), done.Code, done.Out, done.Errs)
	}
	for _, w := range words {
		if !strings.Contains(done.Errs, w) {
			n.t.Errorf("%s: blockferry %s: '%s' is missing in: %s", n.name, strings.Join(args, " "), w, done.Errs)
		}
	}
}

func (n *farNode) look() (v status.Volume, said string, known bool) {
	n.t.Helper()
	var l looked
	n.ask(n.name, "status", none{}, &l)
	return l.Volume, l.Said, l.Known
}

// await asks for the status until it is as wanted.
func (n *farNode) await(what string, limit time.Duration, ok func(status.Volume) bool) status.Volume {
	n.t.Helper()
	last := ""
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		v, said, known := n.look()
		if known && ok(v) {
			n.logf("%s: %s", n.name, what)
			return v
		}
		last = said
	}
	n.t.Fatalf("node %s is not %s within %v:\n%s", n.name, what, limit, last)
	return status.Volume{}
}

// writes begins to write a history, and waits for the first of it.
func (n *farNode) writes(path string, h history) {
	n.t.Helper()
	n.ask(n.name, "write", writing{Path: path, History: h, From: 1}, nil)
	n.acked(20)
}

// acked waits until a write was acknowledged, and returns the last one that was.
func (n *farNode) acked(goal uint64) uint64 {
	n.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		s := n.written()
		if s.Acked >= goal {
			return s.Acked
		}
		if s.Done || time.Now().After(deadline) {
			n.t.Fatalf("node %s: write %d is not acknowledged: %+v", n.name, goal, s)
		}
	}
}

func (n *farNode) written() (s written) {
	n.t.Helper()
	n.ask(n.name, "look", none{}, &s)
	return s
}

// watch looks on while a node writes. It returns the last write that was seen to be
// acknowledged, and the last that a copy has to hold by what status said of it meanwhile.
func (n *farNode) watch(lasting time.Duration) (acked, claimed uint64) {
	n.t.Helper()
	return n.watchWriter(n, lasting)
}

// watchWriter is that where another guest writes.
func (n *farNode) watchWriter(writer *farNode, lasting time.Duration) (acked, claimed uint64) {
	n.t.Helper()
	type sample struct {
		at    time.Time
		acked uint64
	}
	var seen []sample
	for end := time.Now().Add(lasting); time.Now().Before(end); {
		acked = writer.written().Acked
		seen = append(seen, sample{time.Now(), acked})
		asked := time.Now()
		v, _, known := n.look()
		if !known || v.Replicas[0].BehindSeconds == nil || v.Replicas[0].BehindIsMinimum {
			continue
		}
		held := asked.Add(-time.Duration(*v.Replicas[0].BehindSeconds * float64(time.Second)))
		for _, s := range seen {
			if s.at.Before(held) {
				claimed = max(claimed, s.acked)
			}
		}
	}
	return acked, claimed
}

// holds judges a device by what a history has to hold; no limit above: whatever it may be.
func (n *farNode) holds(path string, h history, atLeast, atMost uint64) (v verdict) {
	n.t.Helper()
	n.ask(n.name, "judge", judging{path, h, atLeast, atMost}, &v)
	return v
}

// anyWrite is above the number of every write.
const anyWrite = math.MaxInt64

// after says for each sector which write it is from once those up to k are done; 0: zeros.
func (h history) after(k uint64) []uint64 {
	from := make([]uint64, h.Size/sector)
	for n := uint64(1); n <= k; n++ {
		op, value := h.op(n), n
		if op.Zero {
			value = 0
		}
		for i := op.Offset / sector; i < (op.Offset+op.Length)/sector; i++ {
			from[i] = value
		}
	}
	return from
}

// kept gives up what only a node has, and checks that the writes from one to another are
// in its rescue file, as far as they are seen on the device. It returns how many sectors were.
func (n *farNode) kept(other *farNode, h history, from, to uint64) (sectors int) {
	n.t.Helper()
	t := n.t
	if list := n.run("rescue", "list"); list != "" {
		t.Errorf("rescue files before: %s", list)
	}
	n.run("discard")
	other.await("up to date", farWait, upToDate)
	list := n.run("rescue", "list")
	if strings.Count(list, "\n") != 1 {
		t.Fatalf("rescue files: %s", list)
	}
	file, _, _ := strings.Cut(list, ": ")
	var d struct {
		Extents []struct{ Offset, Length int64 }
	}
	if err := json.Unmarshal([]byte(n.run("rescue", "show", "--check", "--json", file)), &d); err != nil {
		t.Fatal(err)
	}
	covered := func(at int64) bool {
		for _, x := range d.Extents {
			if x.Offset <= at && at < x.Offset+x.Length {
				return true
			}
		}
		return false
	}
	// What was written over since, with zeros where zeros had been, is no difference.
	common, own := h.after(from-1), h.after(to)
	for i, k := range own {
		if k == common[i] {
			continue
		}
		if sectors++; !covered(h.At + int64(i)*sector) {
			t.Fatalf("write %d, which only node %s had at %d, is not saved", k, n.name, h.At+int64(i)*sector)
		}
	}
	n.logf("writes %d to %d, %d sectors, are in %s", from, to, sectors, file)
	return sectors
}
