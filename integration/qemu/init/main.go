// The first program of a guest under qemu, in its initramfs: it loads the
// modules that the root needs, mounts the host's files as the root and becomes
// the program that is the guest's real first process.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"blockferry/integration/qemu"
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "this is the first process of a guest, and of nothing else")
		os.Exit(1)
	}
	fmt.Println("initramfs:", start())
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// start returns only an error.
func start() error {
	modules, err := filepath.Glob("/modules/*")
	if err != nil {
		return err
	}
	for _, path := range modules {
		if err := load(path); err != nil {
			return fmt.Errorf("module %s: %w", path, err)
		}
	}
	tag, options, _ := strings.Cut(os.Getenv(qemu.RootVar), ":")
	const root = "/root"
	if err := os.MkdirAll(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(tag, root, "9p", unix.MS_RDONLY, options); err != nil {
		return fmt.Errorf("mount 9p '%s' with '%s': %w", tag, options, err)
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	program := os.Getenv(qemu.InitVar)
	return fmt.Errorf("start %s: %w", program, unix.Exec(program, []string{program}, os.Environ()))
}

func load(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	return unix.FinitModule(int(file.Fd()), "", 0)
}
