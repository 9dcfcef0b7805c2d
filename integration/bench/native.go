package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/rig"
	"blockferry/integration/uml"
)

// roomVar names the folder in which a native figure leaves its result.
const roomVar = "BLOCKFERRY_BENCH_ROOM"

// runNative measures on this machine's own kernel, with loop devices over files in
// memory. It is done by a process of its own, the first one of its namespaces:
// whatever way that ends, with it end all that it started, its mounts go, the
// loop devices that nothing has open any more are detached, and the files
// behind them, which have no names, are freed.
func runNative(ctx context.Context, f figure, quick bool) (r result, err error) {
	if os.Geteuid() != 0 {
		return r, errors.New("a figure on this machine's kernel needs root, for loop devices and mounts")
	}
	room, err := os.MkdirTemp("", "blockferry-bench-")
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(room)) }()
	binary, err := rig.Build(room)
	if err != nil {
		return r, err
	}
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	ctx, cancel := context.WithTimeout(ctx, f.limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, self, f.args(quick)...)
	cmd.Env = append(os.Environ(), roomVar+"="+room, binaryVar+"="+binary)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if f.network {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWNET
	}
	// Pdeathsig is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		return r, fmt.Errorf("on this machine's kernel: %w", err)
	}
	text, err := os.ReadFile(filepath.Join(room, resultFile))
	if err != nil {
		return r, err
	}
	return r, json.Unmarshal(text, &r)
}

// enterRoom makes the namespaces of this process fit to measure in, and returns
// the folder for its result.
func enterRoom() (string, error) {
	for _, mount := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{"proc", "/proc", "proc", 0},
		{"tmpfs", "/run", "tmpfs", 0},
		{"tmpfs", "/mnt", "tmpfs", 0},
		{"bpf", "/sys/fs/bpf", "bpf", 0}, // what is pinned there ends with it
	} {
		if err := unix.Mount(mount.source, mount.target, mount.kind, mount.flags, ""); err != nil {
			return "", fmt.Errorf("mount on %s: %w", mount.target, err)
		}
	}
	return os.Getenv(roomVar), nil
}

// openLoops makes a loop device for each disk. They are there as long as they are
// open.
func (s *stand) openLoops(disks []uml.Disk) error {
	for _, disk := range disks {
		device, err := loop(disk.Size)
		if err != nil {
			return err
		}
		s.loops, s.disks = append(s.loops, device), append(s.disks, device.Name())
	}
	return nil
}

func loop(size int64) (*os.File, error) {
	dir := "/dev/shm"
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("a file without a name in %s: %w", dir, err)
	}
	defer unix.Close(fd) // the device keeps it
	if err := unix.Ftruncate(fd, size); err != nil {
		return nil, err
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range 20 { // somebody else may take the same one
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("a free loop device: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", number)
		if err := makeNode(path, number); err != nil {
			return nil, err
		}
		device, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		config := unix.LoopConfig{Fd: uint32(fd), Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR}}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &config)
		if err == nil {
			return device, nil
		}
		device.Close()
		if err != unix.EBUSY {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, errors.New("every free loop device was taken by somebody else meanwhile")
}

// makeNode makes a loop device's node where no udevd does.
func makeNode(path string, number int) error {
	const loopMajor = 7
	err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(loopMajor, uint32(number))))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
