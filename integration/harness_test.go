package integration

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"blockferry/integration/qemu"
	"blockferry/integration/uml"
)

// guest says what kind of guest a test needs.
type guest struct {
	Memory  string // default 1000M
	Disks   []disk // /dev/ubda, /dev/ubdb, … (ubd); under qemu vd, or NVMe
	Modules []string
	Timeout time.Duration // default 3 minutes
	Env     []string
	// OwnClock: in a set, the guest's clock can stand still in a pause.
	OwnClock bool
	// Systemd boots the guest by systemd and udevd, with blockferry, its units
	// and its rules where a package puts them, and with these files.
	Systemd bool
	Files   map[string]string
	// Bare is such a guest without blockferry.
	Bare bool
}

type disk = uml.Disk

const (
	// guestsAtOnce: a guest has one CPU, which is idle for half of the time, and
	// its host's machine has two. Beside a fourth, on a machine that was busy with
	// other things, too, some tests ran into their limits.
	guestsAtOnce = 3
	// outcomeFile is where a test leaves how it ended. An exit status alone
	// is also 0 when no test ran.
	outcomeFile = "outcome"
	// binaryVar and binaryErrorVar tell a guest where the binary is, or why
	// there is none.
	binaryVar      = "BLOCKFERRY_BINARY"
	binaryErrorVar = "BLOCKFERRY_BINARY_ERROR"
	// requireVar turns 'no guests here' from a skip into a failure.
	requireVar = "BLOCKFERRY_REQUIRE_GUEST"
	consoleVar = "BLOCKFERRY_CONSOLE"
)

// defaultModules are loaded in every guest.
var defaultModules = []string{"dm-mod", "dm-era", "dm-snapshot"}

// host is this test run's guests; nil where there can be none, and then
// errNoHost says why.
var (
	host      *uml.Host
	errNoHost error
)

// emulator is the same for guests under qemu, which count among host's. It is
// made when the first test needs it.
var (
	emulator = sync.OnceValues(func() (*uml.Host, error) {
		h, err := qemu.NewHost(1, host)
		madeEmulator = h
		return h, err
	})
	madeEmulator *uml.Host
)

func umlHost() (*uml.Host, error) { return host, errNoHost }

func TestMain(m *testing.M) {
	uml.Init()
	if path := os.Getenv(applicationVar); path != "" {
		os.Exit(application(path))
	}
	if uml.Inside() {
		os.Exit(m.Run())
	}
	code, err := runWithHost(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "integration:", err)
		code = 1
	}
	os.Exit(code)
}

func runWithHost(m *testing.M) (int, error) {
	var err error
	host, err = uml.NewHost(guestsAtOnce)
	if errors.Is(err, uml.ErrNoGuest) {
		errNoHost = err
		return m.Run(), nil
	}
	if err != nil {
		return 1, err
	}
	defer host.Close()
	// Tests wait for a guest's place or for this kernel, the longest first, and
	// not for one of Go's places, which would go to those that only wait.
	if err := flag.Set("test.parallel", "1000"); err != nil {
		return 1, err
	}
	code := m.Run()
	if madeEmulator != nil {
		err = madeEmulator.Close()
	}
	return code, err
}

// builtBinary builds the real binary, once per run.
var builtBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(host.Dir(), "blockferry")
	// As for packages, so that the two compile everything once.
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", path, "./cmd/blockferry")
	build.Dir = ".."
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %w\n%s", build.Args, err, out)
	}
	return path, nil
})

// inGuest runs fn in a guest of its own, as root, and fails t if fn fails
// there. It must be the first thing a test does. Tests that use it run in
// parallel. Inside fn, t's subtests, cleanups and temporary folders work as
// usual, and what is logged appears in the host's log.
func inGuest(t *testing.T, g guest, fn func(t *testing.T)) {
	t.Helper()
	inGuestOf(t, umlHost, g, fn)
}

// inQemu is inGuest with Debian's own kernel under qemu: two CPUs, preemption,
// BPF tracing; disks are /dev/vda, /dev/vdb and so on (vd). It is slow. Only one
// such guest runs at a time.
func inQemu(t *testing.T, g guest, fn func(t *testing.T)) {
	t.Helper()
	inGuestOf(t, emulator, g, fn)
}

func inGuestOf(t *testing.T, hosts func() (*uml.Host, error), g guest, fn func(t *testing.T)) {
	t.Helper()
	if uml.Inside() {
		// Registered first, so it runs last.
		t.Cleanup(func() { leaveOutcome(t) })
		fn(t)
		return
	}
	of := mustHost(t, hosts)
	t.Parallel()
	spec := guestSpec(t.Name(), g)
	outcome := "none: the test did not run in the guest"
	spec.Collect = func(dir string) error {
		text, err := os.ReadFile(filepath.Join(dir, outcomeFile))
		if err == nil {
			outcome = string(text)
		}
		return nil
	}
	result, err := of.Run(t.Context(), spec)
	if result.Retried {
		t.Logf("RETRIED: the first guest gave no end mark, this is the second guest's outcome")
	}
	t.Logf("guest's console, of %v:\n%s", result.Elapsed.Round(time.Second), strings.TrimSpace(result.Output))
	if err != nil {
		t.Fatal(err)
	}
	if result.Exit != 0 || outcome != "pass" {
		t.Fatalf("in the guest: exit status %d, outcome %s", result.Exit, outcome)
	}
}

// mustHost skips the test, or fails it, where there can be no guests.
func mustHost(t *testing.T, hosts func() (*uml.Host, error)) *uml.Host {
	t.Helper()
	err := errNoHost // without it not even the binary can be built
	var h *uml.Host
	if err == nil {
		h, err = hosts()
	}
	if errors.Is(err, uml.ErrNoGuest) && os.Getenv(requireVar) == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// guestSpec starts this very test binary again, for one test.
func guestSpec(name string, g guest) uml.Spec {
	self, err := os.Executable()
	if err != nil {
		panic(err) // it worked in NewHost
	}
	timeout := g.Timeout
	if timeout == 0 {
		timeout = 3 * time.Minute
	}
	parts := strings.Split(name, "/")
	for i, part := range parts {
		parts[i] = "^" + regexp.QuoteMeta(part) + "$"
	}
	spec := uml.Spec{
		Name: name, Memory: g.Memory, Disks: g.Disks, Timeout: timeout, OwnClock: g.OwnClock,
		Modules: append(append([]string{}, defaultModules...), g.Modules...),
		Args: []string{self, "-test.v", "-test.run", strings.Join(parts, "/"),
			"-test.timeout", timeout.String()},
	}
	switch {
	case g.Systemd && g.Bare:
		spec.Systemd, spec.Files = true, g.Files
	case g.Systemd:
		installed(&spec, g.Files)
	}
	// Only tests that use the binary fail when it does not build.
	if binary, err := builtBinary(); err != nil {
		spec.Env = append(spec.Env, binaryErrorVar+"="+err.Error())
	} else {
		spec.Env = append(spec.Env, binaryVar+"="+uml.GuestPath(binary))
	}
	spec.Env = append(spec.Env, g.Env...)
	for _, name := range []string{powerLossesVar, powerSeedVar, roundsVar} {
		if value := os.Getenv(name); value != "" {
			spec.Env = append(spec.Env, name+"="+value)
		}
	}
	if os.Getenv(consoleVar) != "" {
		spec.Console = &prefixed{prefix: name + ": ", out: os.Stderr}
	}
	return spec
}

func leaveOutcome(t *testing.T) {
	outcome := "pass"
	switch {
	case t.Failed():
		outcome = "fail"
	case t.Skipped():
		outcome = "skip" // the guest has all that a test may need
	}
	file, err := os.Create(filepath.Join(uml.Dir, outcomeFile))
	if err != nil {
		t.Error(err)
		return
	}
	_, err = file.WriteString(outcome)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		t.Error(err)
	}
}

// prefixed writes whole lines, each with a prefix.
type prefixed struct {
	prefix string
	out    io.Writer
	rest   []byte
}

func (p *prefixed) Write(b []byte) (int, error) {
	p.rest = append(p.rest, b...)
	for {
		line, rest, found := bytes.Cut(p.rest, []byte("\n"))
		if !found {
			return len(b), nil
		}
		fmt.Fprintf(p.out, "%s%s\n", p.prefix, bytes.TrimRight(line, "\r"))
		p.rest = rest
	}
}

// blockferry is the built binary's path, in a guest.
func blockferry(t *testing.T) string {
	t.Helper()
	path := os.Getenv(binaryVar)
	if path == "" && !uml.Inside() && host != nil {
		var err error
		if path, err = builtBinary(); err != nil {
			t.Fatal(err)
		}
	}
	if path == "" {
		t.Fatal("there is no blockferry binary: ", os.Getenv(binaryErrorVar))
	}
	return path
}

// run runs a command to its end and returns what it printed, both streams;
// any exit status but 0 fails the test. Starting a process costs a guest 0.1 s.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := tryRun(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// tryRun is run for commands that may fail. The command is killed when the
// test ends.
func tryRun(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	return string(out), err
}
