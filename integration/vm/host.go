// Package vm runs a program as root inside a guest with a kernel of its own.
// What kind of guest a Machine says: packages uml and qemu have one each.
//
// The guest's root is the host's file system, read-only. The program that
// calls Host.Run is itself the guest's first process (see Init), and then the
// program that runs there, so a Go test can start itself again inside.
package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	defaultMemory  = "1000M"
	defaultTimeout = 3 * time.Minute
	// stuckGrace is what the program gets after its timeout to end by itself
	// (a Go test prints its goroutines) before the guest's init gives it up.
	stuckGrace = 15 * time.Second
	// bootGrace is what a guest gets on top: boot, report and power-off, on a
	// machine that is busy with other guests.
	bootGrace = 45 * time.Second
	// maxBoots ends a guest that would reboot for ever.
	maxBoots = 10

	dirPrefix = "blockferry-guests-"
	lockName  = "lock"
)

// Disk is one of the guest's disks, /dev/ubda or /dev/vda, and so on. It is a
// sparse file that reads as zeros and is gone when the run ends. It survives
// Reboot: what the guest had written to the disk is there, what it still held
// in its page cache is not.
type Disk struct {
	Size int64 // bytes, a multiple of 512
	// NVMe makes it the next of /dev/nvme0n1, /dev/nvme1n1 and so on, in the order in which
	// the module nvme finds them; such a disk takes no letter of the others'.
	NVMe bool
}

// Spec says what to run in a guest.
type Spec struct {
	Name    string // for messages
	Memory  string // as the kernel's mem= and as qemu's -m, default 1000M
	Disks   []Disk
	Modules []string // loaded before the program starts
	// Args is the command line; a first word that is an absolute path is the
	// host's. The program runs as root with /run/guest (Dir) as its way to
	// hand files out, and its standard output is the guest's console.
	Args []string
	Env  []string
	// Timeout is how long the program may take; the guest as a whole gets a
	// minute more. Default 3 minutes.
	Timeout time.Duration
	// Systemd makes the machine's own systemd the guest's first process, with
	// udevd; the program is one of its services, and all that it starts with
	// is what Files and Links say. /etc, /usr and /var can be written there.
	Systemd bool
	// Files (path to content) and Links (path to target) are made in such a
	// guest before systemd starts.
	Files, Links map[string]string
	// Console, if set, gets the guest's console as it is written.
	Console io.Writer
	// KernelSilent keeps the kernel's own messages off the console.
	KernelSilent bool
	// OwnClock has a Set's guest have a clock that can stand still (ContinueUnaware).
	OwnClock bool
	// Collect, if set, is called before the guest's files are removed, with
	// the host's path of what the program sees as Dir.
	Collect func(dir string) error
}

// Result is how a guest ended.
type Result struct {
	Exit    int // the program's exit status; -1 when a signal ended it
	Output  string
	Retried bool // the first guest hung or never booted, this is the second
	Elapsed time.Duration
}

// ErrNoGuest says that this program can't start guests on this machine.
var ErrNoGuest = errors.New("no guest kernel")

// Machine is a kind of guest.
type Machine struct {
	// Command is the command that boots one: the program and its arguments.
	Command func(Guest) []string
	// NVMe says that a guest's disks may be of that kind.
	NVMe bool
	// OneCPU says that a guest has one CPU. All that it is made of is then kept on
	// one of this machine's: it takes turns, and to hand over to another CPU takes
	// longer than most of what is done in a turn.
	OneCPU bool
	// Card is the guest's network card, which Command puts at the tap of a
	// guest that has one; CardModules are loaded for it. "": such guests join
	// no network.
	Card        string
	CardModules []string
	// OwnClock makes, in a folder, a library which, preloaded into a guest's kernel, has
	// its clock go behind the host's by as many nanoseconds as stand in its file 3.
	OwnClock func(dir string) (library string, err error)
	// Shared is what the guest mounts on Dir: the folder that Guest names so.
	Shared func(Guest) Mount
	// Modules is the host's folder that holds what a machine has in /lib/modules.
	Modules string
	// Meanwhile, if set, runs beside each guest until it ends or ctx does.
	Meanwhile func(ctx context.Context, guest *os.Process)
	// Noise, if set, is left out of what is kept of the console.
	Noise *regexp.Regexp
}

// Guest is one boot of a guest; all paths are the host's.
type Guest struct {
	Spec   *Spec
	Dir    string   // for whatever the machine needs
	Shared string   // what the guest sees as Dir
	Disks  []string // files
	Tap    string   // at which its network card is; "": it has none
	Init   string   // the guest's first process; wants the environment Env
	Env    []string
}

// Mount is what to hand to mount(2).
type Mount struct {
	Kind string `json:"kind"`
	From string `json:"from"`
	Data string `json:"data"`
}

// Host starts guests, a limited number at a time. It may be used from several
// goroutines.
type Host struct {
	machine Machine
	dir     string
	lock    *os.File // says that dir is in use
	self    string
	places  []*places // a guest takes one of each, in this order
}

// NewHost makes a Host that runs at most limit guests at once; with another
// Host beside it, each of its guests also counts as one of that one's. A Set
// larger than that runs when nothing else does. Close removes what it keeps.
func NewHost(machine Machine, limit int, beside *Host) (*Host, error) {
	if builtForRace() {
		return nil, fmt.Errorf("%w: programs built with -race do not run in one (their address space is too large)", ErrNoGuest)
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	place := memoryDir()
	sweep(place)
	dir, err := os.MkdirTemp(place, dirPrefix)
	if err != nil {
		return nil, err
	}
	// Locked before it has the name that a sweep looks for: another Host that
	// begins at this moment would take it for one left behind.
	lock, err := lockFile(filepath.Join(dir, lockName+".new"), os.O_CREATE)
	if err == nil {
		err = os.Rename(lock.Name(), filepath.Join(dir, lockName))
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	all := []*places{newPlaces(limit)}
	if beside != nil {
		all = append(all, beside.places...)
	}
	return &Host{machine: machine, dir: dir, lock: lock, self: self, places: all}, nil
}

// sweep removes what Hosts left whose process was killed. Their files are
// large, and the memory they may stand in is everybody's.
func sweep(place string) {
	left, _ := filepath.Glob(filepath.Join(place, dirPrefix+"*", lockName))
	for _, path := range left {
		if lock, err := lockFile(path, 0); err == nil {
			os.RemoveAll(filepath.Dir(path))
			lock.Close()
		}
	}
}

// lockFile opens a file and locks it for as long as it is open; an error says
// that it is not there or that somebody else holds it.
func lockFile(path string, flags int) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|flags, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

func builtForRace() bool {
	info, _ := debug.ReadBuildInfo()
	return info != nil && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// memoryDir is where guests' memory and disks are kept: in memory where there
// is such a place, since their host's disk would only slow them down.
func memoryDir() string {
	if probe, err := os.MkdirTemp("/dev/shm", "blockferry-probe-"); err == nil {
		os.Remove(probe)
		return "/dev/shm"
	}
	return os.TempDir()
}

// longest is how long a guest's program may take.
func longest(spec Spec) time.Duration {
	if spec.Timeout == 0 {
		return defaultTimeout
	}
	return spec.Timeout
}

// take waits until n guests may run at once that may take as long as that: for all
// places, if there are not as many.
func (h *Host) take(ctx context.Context, longest time.Duration, n int) (give func(), err error) {
	var given []func()
	give = func() {
		for _, one := range given {
			one()
		}
	}
	for _, p := range h.places {
		taken := min(n, p.all)
		if err := p.take(ctx, longest, taken); err != nil {
			give()
			return nil, err
		}
		given = append(given, func() { p.give(taken) })
	}
	return give, nil
}

// Dir is a folder that lives as long as the Host, for files that guests read
// (GuestPath says where they see it).
func (h *Host) Dir() string { return h.dir }

// Close removes everything the Host made. No guest may be running.
func (h *Host) Close() error { return errors.Join(os.RemoveAll(h.dir), h.lock.Close()) }

// Run waits for its turn (of those that wait the one with the longest Timeout is
// next), boots a guest, runs the program there and waits for the guest's end. A
// guest that hung or never booted is tried once more; a program that ended,
// however it ended, is not. The error is about the guest, Result.Exit about
// the program; Result.Output is there in either case.
func (h *Host) Run(ctx context.Context, spec Spec) (Result, error) {
	release, err := h.take(ctx, longest(spec), 1)
	if err != nil {
		return Result{}, err
	}
	defer release()
	first, err := h.attempt(ctx, spec)
	if !errors.Is(err, ErrNoEnd) || ctx.Err() != nil {
		return first, err
	}
	second, err := h.attempt(ctx, spec)
	second.Retried = true
	second.Output = fmt.Sprintf("%s\n--- guest %s gave no end mark after %v and was started once more ---\n%s",
		first.Output, spec.Name, first.Elapsed.Round(time.Second), second.Output)
	return second, err
}

// ErrNoEnd is the one reason for a second attempt.
var ErrNoEnd = errors.New("guest hung or never booted: no end mark")

// attempt runs the program in one guest, over as many boots as it asks for.
func (h *Host) attempt(ctx context.Context, spec Spec) (result Result, err error) {
	b, err := h.newBody(spec)
	if err != nil {
		return Result{}, err
	}
	defer b.remove()
	started := time.Now()
	exit, err := b.live(ctx)
	return Result{Exit: exit, Output: b.console.String(), Elapsed: time.Since(started)}, err
}

// body is what of a guest outlives its boots: its disks, and what it said. One
// boot at a time.
type body struct {
	host         *Host
	spec         Spec
	tap, address string // on network; the guest's own address
	network      *Network
	dir, shared  string
	disks        []string
	console      *console
	clock        *os.File // says what is hidden of the time; nil: it has the host's
	boots        int

	mu      sync.Mutex
	process *os.Process // nil: it does not run
}

func (h *Host) newBody(spec Spec) (b *body, err error) {
	if spec.Memory == "" {
		spec.Memory = defaultMemory
	}
	spec.Timeout = longest(spec)
	b = &body{host: h, spec: spec, console: &console{live: spec.Console, noise: h.machine.Noise}}
	if b.dir, err = os.MkdirTemp(h.dir, "guest-"); err != nil {
		return nil, err
	}
	b.shared = filepath.Join(b.dir, "shared")
	err = os.Mkdir(b.shared, 0o755)
	for i, disk := range spec.Disks {
		path := filepath.Join(b.dir, fmt.Sprintf("disk%c", 'a'+i))
		b.disks = append(b.disks, path)
		err = errors.Join(err, makeSparse(path, disk.Size))
		if disk.NVMe && !h.machine.NVMe {
			err = errors.Join(err, fmt.Errorf("guest %s: guests of this kind have no NVMe disks", spec.Name))
		}
	}
	if err != nil {
		b.remove()
		return nil, err
	}
	return b, nil
}

func (b *body) remove() {
	if b.clock != nil {
		b.clock.Close()
	}
	os.RemoveAll(b.dir)
}

// live boots the guest, over as many boots as it asks for, and waits until its
// program has ended; exit is its status.
func (b *body) live(ctx context.Context) (exit int, err error) {
	for range maxBoots {
		ended, err := b.boot(ctx)
		if err != nil {
			showLogs(b.console, b.shared)
			return 0, err
		}
		if ended.Reboot {
			continue
		}
		if ended.Stuck {
			return ended.Exit, fmt.Errorf("guest %s: the program did not end within %v and could not be killed", b.spec.Name, b.spec.Timeout)
		}
		if b.spec.Collect != nil {
			err = b.spec.Collect(b.shared)
		}
		return ended.Exit, err
	}
	return 0, fmt.Errorf("guest %s rebooted %d times", b.spec.Name, maxBoots)
}

// showLogs adds the logs that a guest left which came to no end.
func showLogs(out io.Writer, shared string) {
	logs, _ := filepath.Glob(filepath.Join(shared, "*.log"))
	for _, path := range logs {
		text, _ := os.ReadFile(path)
		fmt.Fprintf(out, "\n%s:\n%s", filepath.Base(path), text)
	}
}

// boot runs the guest to its end.
func (b *body) boot(ctx context.Context) (endMark, error) {
	h, spec, boot := b.host, &b.spec, b.boots
	b.boots++
	mark := filepath.Join(b.shared, endFile)
	os.Remove(mark)
	planPath := filepath.Join(b.dir, "plan.json")
	g := Guest{
		Spec: spec, Dir: b.dir, Shared: b.shared, Disks: b.disks, Tap: b.tap, Init: h.self,
		Env: []string{"PATH=" + guestPathVar, planVar + "=" + planPath},
	}
	made := bootPlan{
		Shared: h.machine.Shared(g), ModulesFrom: h.machine.Modules, Modules: spec.Modules,
		Args: spec.Args, Env: spec.Env, Boot: boot, GiveUpAfter: spec.Timeout + stuckGrace,
		Systemd: spec.Systemd, Files: spec.Files, Links: spec.Links,
	}
	if b.network != nil {
		made.Modules = append(slices.Clone(spec.Modules), h.machine.CardModules...)
		made.Card, made.Address = h.machine.Card, b.address
	}
	plan, err := json.Marshal(made)
	if err != nil {
		return endMark{}, err
	}
	if err := os.WriteFile(planPath, plan, 0o644); err != nil {
		return endMark{}, err
	}
	command := h.machine.Command(g)
	ctx, cancel := context.WithTimeout(ctx, spec.Timeout+stuckGrace+bootGrace)
	defer cancel()
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Env = []string{"TMPDIR=" + b.dir, "HOME=" + b.dir, "PATH=" + os.Getenv("PATH")}
	if spec.OwnClock {
		library, err := b.ownClock()
		if err != nil {
			return endMark{}, err
		}
		cmd.Env, cmd.ExtraFiles = append(cmd.Env, "LD_PRELOAD="+library), []*os.File{b.clock}
	}
	cmd.Stdout, cmd.Stderr = b.console, b.console
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	waitErr := runOnThread(cmd, h.machine.OneCPU, b.network, func() {
		b.runs(cmd.Process)
		if h.machine.Meanwhile != nil {
			go h.machine.Meanwhile(ctx, cmd.Process)
		}
	})
	b.runs(nil)

	text, err := os.ReadFile(mark)
	if err != nil {
		return endMark{}, fmt.Errorf("%w (guest %s, boot %d: %v)", ErrNoEnd, spec.Name, boot, waitErr)
	}
	var ended endMark
	if err := json.Unmarshal(text, &ended); err != nil {
		return endMark{}, fmt.Errorf("%w (guest %s: end mark %q: %v)", ErrNoEnd, spec.Name, text, err)
	}
	if ended.Reboot && ctx.Err() != nil {
		return endMark{}, fmt.Errorf("guest %s, boot %d: it was to power off in order, and did not within %v", spec.Name, boot, spec.Timeout+stuckGrace+bootGrace)
	}
	return ended, nil
}

func (b *body) runs(process *os.Process) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.process = process
}

// runOnThread runs a command on a thread that lives as long as the command and
// then ends: Pdeathsig is sent when the thread that started the child ends, and
// nothing else may run on one that entered namespaces or is kept on one CPU. started is
// called once the command runs.
func runOnThread(cmd *exec.Cmd, oneCPU bool, network *Network, started func()) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			if network != nil {
				if err := network.enter(); err != nil {
					return err
				}
			}
			if oneCPU {
				leave, err := keepOnOneCPU()
				if err != nil {
					return err
				}
				defer leave()
			}
			end, err := together(cmd)
			if err != nil {
				return err
			}
			defer end()
			if err := cmd.Start(); err != nil {
				return err
			}
			started()
			return cmd.Wait()
		}()
	}()
	return <-done
}

// together has the processes that a command is made of end when this process does,
// and at end. Pdeathsig does it for the first of them; as root they are in a PID
// namespace, whose other first process takes all along. It is none of the
// command's: that could not end itself by a signal.
func together(cmd *exec.Cmd) (end func(), err error) {
	attr := syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr = &attr
		return func() {}, nil
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	attr.Cloneflags = syscall.CLONE_NEWPID
	first := exec.Command("sleep", "infinity")
	first.SysProcAttr = &attr
	if err := first.Start(); err != nil {
		return nil, fmt.Errorf("a PID namespace for a guest: %w", err)
	}
	end = func() {
		_ = first.Process.Kill()
		_ = first.Wait() // until all have ended
	}
	space, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", first.Process.Pid))
	if err == nil {
		err = errors.Join(unix.Setns(int(space.Fd()), unix.CLONE_NEWPID), space.Close())
	}
	if err != nil {
		end()
		return nil, fmt.Errorf("a PID namespace for a guest: %w", err)
	}
	return end, nil
}

func makeSparse(path string, size int64) error {
	if size <= 0 || size%512 != 0 {
		return fmt.Errorf("disk %s: size %d is not a positive multiple of 512", path, size)
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(file.Truncate(size), file.Close())
}
