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

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
)

// native is this machine's own kernel: the SSD is a loop device over a file in
// memory, mounted and in use before blockferry is attached to it.
type native struct {
	dir      string
	ssd, ebs string
}

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

// onThisMachine is the demo here. Its mounts are in a namespace of its own, and
// its loop devices go with the last who has them open, so nothing is left.
func onThisMachine(seconds int) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	runtime.LockOSThread() // the namespace is the thread's, and its children's
	if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
		return fmt.Errorf("a mount namespace: %w", err)
	}
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
	for _, disk := range []*string{&n.ssd, &n.ebs} {
		if *disk, release, err = loopDevice(n.dir); err != nil {
			return err
		}
		defer release()
	}
	defer func() { _ = unix.Unmount(n.folder(), unix.MNT_DETACH) }()
	fmt.Println("On this machine's own kernel: loop devices over files in memory.")
	return show(ctx, n, rig.Rig{Binary: binary, Config: filepath.Join(n.dir, "demo.yaml"), Socket: filepath.Join(n.dir, "agent.sock")}, seconds)
}

// loopDevice makes one that ends when it is released.
func loopDevice(dir string) (path string, release func(), err error) {
	file, err := os.CreateTemp(dir, "disk")
	if err != nil {
		return "", nil, err
	}
	if err := errors.Join(file.Truncate(diskBytes), file.Close()); err != nil {
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
	return rig.Zero(n.ssd, diskBytes)
}

// replace has nothing to take down: the kernel's marks would be gone after a
// restart.
func (n *native) replace(*demo) error { return os.RemoveAll("/sys/fs/bpf/blockferry") }
