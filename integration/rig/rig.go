// Package rig drives the built blockferry binary from programs that run in a
// guest: the demo and the benchmarks.
package rig

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
)

// stopWait is how long an agent may take to end before it is killed.
const stopWait = 20 * time.Second

// Build builds blockferry into a folder, on the host, and returns its path.
func Build(dir string) (string, error) {
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("go list -m: %w", err)
	}
	path := filepath.Join(dir, "blockferry")
	build := exec.Command("go", "build", "-o", path, "./cmd/blockferry")
	build.Dir = strings.TrimSpace(string(root))
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %w\n%s", build.Args, err, out)
	}
	return path, nil
}

// Rig is one blockferry, with its configuration. Not for several goroutines,
// but for Status.
type Rig struct {
	Binary string
	Config string // path of the configuration file
	// Socket is the agent's; "": the default.
	Socket string
	// Verbose has the agent log in detail, as JSON.
	Verbose bool

	agent *exec.Cmd
	ended chan error
}

// Configure writes the configuration file.
func (r *Rig) Configure(yaml string) error {
	if err := os.MkdirAll(filepath.Dir(r.Config), 0o755); err != nil {
		return err
	}
	return os.WriteFile(r.Config, []byte(yaml), 0o600)
}

// Command prepares a blockferry command.
func (r *Rig) Command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, r.Binary, append(r.flags(), args...)...)
}

func (r *Rig) flags() []string {
	flags := []string{"--config", r.Config}
	if r.Socket != "" {
		flags = append(flags, "--socket", r.Socket)
	}
	return flags
}

// Run runs a blockferry command to its end. The error holds what it printed.
func (r *Rig) Run(ctx context.Context, args ...string) error {
	out, err := r.Command(ctx, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("blockferry %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// StartAgent starts the agent and waits until it answers.
func (r *Rig) StartAgent(ctx context.Context, log io.Writer) error {
	args := append(r.flags(), "agent")
	if r.Verbose {
		args = append(args, "--verbose", "--log-format", "json")
	}
	r.agent = exec.Command(r.Binary, args...)
	r.agent.Stdout, r.agent.Stderr = log, log
	if err := r.agent.Start(); err != nil {
		return err
	}
	r.ended = make(chan error, 1)
	go func(agent *exec.Cmd, ended chan<- error) { ended <- agent.Wait() }(r.agent, r.ended)
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		_, err := r.Status(ctx)
		if err == nil {
			return nil
		}
		select {
		case ended := <-r.ended:
			return fmt.Errorf("the agent ended at once: %w", errors.Join(ended, errors.New("see its log")))
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the agent does not answer: %w", err)
		}
	}
}

// StopAgent asks the agent to end and waits for it.
func (r *Rig) StopAgent() error {
	if r.agent == nil {
		return nil
	}
	defer func() { r.agent = nil }()
	r.agent.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-r.ended:
		return err
	case <-time.After(stopWait):
		r.agent.Process.Kill()
		return errors.Join(fmt.Errorf("the agent did not end within %v of SIGTERM and was killed", stopWait), <-r.ended)
	}
}

// KillAgent ends the agent as a crash does.
func (r *Rig) KillAgent() {
	if r.agent == nil {
		return
	}
	r.agent.Process.Kill()
	<-r.ended
	r.agent = nil
}

// AgentPid is the process id of the agent that runs.
func (r *Rig) AgentPid() int { return r.agent.Process.Pid }

// Status is what `blockferry status` says.
func (r *Rig) Status(ctx context.Context) (status.Document, error) {
	var document status.Document
	cmd := r.Command(ctx, "status", "--json")
	var complaint strings.Builder
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		return document, fmt.Errorf("blockferry status: %w: %s", err, strings.TrimSpace(complaint.String()))
	}
	return document, json.Unmarshal(out, &document)
}

// Await waits until ok says of the agent's only volume that it is as wanted.
func (r *Rig) Await(ctx context.Context, what string, limit time.Duration, ok func(status.Volume) bool) error {
	deadline := time.Now().Add(limit)
	for {
		document, err := r.Status(ctx)
		if err == nil && len(document.Volumes) == 1 && ok(document.Volumes[0]) {
			return nil
		}
		if time.Now().After(deadline) {
			text, _ := json.Marshal(document)
			return fmt.Errorf("not %s within %v (error %v): %s", what, limit, err, text)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// AwaitFile waits until a path exists.
func AwaitFile(path string, limit time.Duration) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s did not appear within %v", path, limit)
		}
	}
}

// Do runs a command of the system to its end. The error holds what it printed.
func Do(name string, args ...string) error {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// SwapTable replaces the table of a mapped device.
func SwapTable(name, table string) error {
	for _, args := range [][]string{
		{"load", name, "--table", table},
		{"suspend", "--noflush", "--nolockfs", name},
		{"resume", name},
	} {
		if err := Do("dmsetup", args...); err != nil {
			return err
		}
	}
	return nil
}

// Zero fills a device with zeros.
func Zero(path string, size int64) error {
	file, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	zeros, err := Buffer(1 << 20)
	if err != nil {
		return err
	}
	for offset := int64(0); offset < size; offset += int64(len(zeros)) {
		if _, err := file.WriteAt(zeros[:min(int64(len(zeros)), size-offset)], offset); err != nil {
			return err
		}
	}
	return file.Sync()
}

// Buffer is memory that O_DIRECT takes, all zero. It is never given back.
func Buffer(size int) ([]byte, error) {
	return unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
}
