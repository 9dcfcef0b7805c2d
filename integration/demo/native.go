package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
)

// native is this machine's own kernel: the SSD is a loop device over a file in
// memory, mounted and in use before blockferry is attached to it.
type native struct {
	dir      string
	ssd, ebs string
}

// nativeSSDBytes is the size of the volume, too.
const nativeSSDBytes = 640 << 20

// nativeTypes is what blockferry needs of a kernel to follow a device in use.
const nativeTypes = "/sys/kernel/btf/vmlinux"

// whyNotNative says what this machine lacks for the demo, "" if nothing.
func whyNotNative() string {
	if os.Geteuid() != 0 {
		return "only root may attach to a device"
	}
	for _, path := range []string{nativeTypes, "/dev/loop-control"} {
		if _, err := os.Stat(path); err != nil {
			return path + " is not there"
		}
	}
	return ""
}

// nativeVar marks the process that has a mount namespace of its own.
const nativeVar = "BLOCKFERRY_DEMO_NATIVE"

// onThisMachine starts this program again with mounts of its own, which end
// with it. Its loop devices go with the last who has them open. So nothing is left.
func onThisMachine() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Env = append(os.Environ(), nativeVar+"=1")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	signal.Ignore(os.Interrupt) // the other one ends by it, in order
	runtime.LockOSThread()      // Pdeathsig is this thread's
	err = cmd.Run()
	var ended *exec.ExitError
	if errors.As(err, &ended) {
		os.Exit(ended.ExitCode()) // it has said why
	}
	return err
}

// withOwnMounts is the demo in that process.
func withOwnMounts(seconds int) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount a bpffs: %w", err)
	}
	n := &native{}
	if n.dir, err = os.MkdirTemp("/dev/shm", "blockferry-demo-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(n.dir)) }()
	binary, err := rig.Build(n.dir)
	if err != nil {
		return err
	}
	var release func()
	if n.ssd, release, err = loopDevice(n.dir, nativeSSDBytes); err != nil {
		return err
	}
	defer release()
	if n.ebs, release, err = loopDevice(n.dir, diskBytes); err != nil {
		return err
	}
	defer release()
	defer func() { _ = unix.Unmount(n.folder(), unix.MNT_DETACH) }()
	fmt.Println("On this machine's own kernel: loop devices over files in memory.")
	return show(ctx, n, rig.Rig{Binary: binary, Config: filepath.Join(n.dir, "demo.yaml"), Socket: filepath.Join(n.dir, "agent.sock")}, seconds)
}

// loopDevice makes one that ends when it is released.
func loopDevice(dir string, size int64) (path string, release func(), err error) {
	file, err := os.CreateTemp(dir, "disk")
	if err != nil {
		return "", nil, err
	}
	if err := errors.Join(file.Truncate(size), file.Close()); err != nil {
		return "", nil, err
	}
	out, err := exec.Command("losetup", "--find", "--show", file.Name()).Output()
	if err != nil {
		return "", nil, fmt.Errorf("losetup: %w", err)
	}
	path = strings.TrimSpace(string(out))
	held, err := os.Open(path)
	if err = errors.Join(err, rig.Do("losetup", "--detach", path)); err != nil {
		return "", nil, err
	}
	return path, func() { held.Close() }, nil
}

func (n *native) configuration() string {
	return `volumes:
  data:
    device: ` + n.ssd + `
    mode: attach
    state-file: ` + filepath.Join(n.dir, "state") + `
    interval: 1s
    replicas:
      ebs:
        device: ` + n.ebs + `
        journal: 256MiB
        compression: s2
`
}

func (n *native) device() string { return n.ssd }
func (n *native) folder() string { return filepath.Join(n.dir, "data") }

func (n *native) raise(ctx context.Context, d *demo) error {
	if err := makeFileSystem(n.ssd); err != nil {
		return err
	}
	if err := d.mount(); err != nil {
		return err
	}
	if err := d.rig.Run(ctx, "attach", "data"); err != nil {
		return err
	}
	return d.rig.StartAgent(ctx, &d.log)
}

// lose shuts the file system down, which from then on writes nothing more, and
// ends the agent, as the machine would end: what it saw next would be a disk
// that somebody zeroes.
func (n *native) lose(d *demo, lost func()) error {
	dir, err := os.Open(n.folder())
	if err != nil {
		return err
	}
	defer dir.Close()
	const shutdown, keepLog = 0x8004587d, 2 // EXT4_IOC_SHUTDOWN, EXT4_GOING_FLAGS_NOLOGFLUSH
	if err := unix.IoctlSetPointerInt(int(dir.Fd()), shutdown, keepLog); err != nil {
		return fmt.Errorf("shut %s down: %w", n.folder(), err)
	}
	lost()
	d.rig.KillAgent()
	return rig.Zero(n.ssd, nativeSSDBytes)
}

// replace has nothing to take down: the kernel's marks would be gone after a
// restart.
func (n *native) replace(*demo) error { return os.RemoveAll("/sys/fs/bpf/blockferry") }
