package dm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	mapperDir = "/dev/mapper"
	// udevPatience is how long EnsureNode leaves it to udev to make a node.
	udevPatience = time.Second
)

// NodePath is where people and programs find a device.
func NodePath(name string) string { return filepath.Join(mapperDir, name) }

// OwnNode returns the path at which this process opens a device: the kernel's
// own node, which is there for exactly as long as the device. A name in
// /dev/mapper is udev's, which is late: it may remove the name of a device
// that is gone when another bears it already.
func (c *Control) OwnNode(name string) (string, error) {
	info, err := c.Info(name)
	if err != nil {
		return "", err
	}
	if kernel := kernelNode(info); info.Exists && isNode(kernel, unix.Mkdev(info.Major, info.Minor)) {
		return kernel, nil
	}
	return c.EnsureNode(name) // no devtmpfs here
}

func kernelNode(info Info) string { return fmt.Sprintf("/dev/dm-%d", info.Minor) }

// udevBusy says that udev has events left to look at.
func udevBusy() bool {
	_, err := os.Stat("/run/udev/queue")
	return err == nil
}

// EnsureNode returns the path of a device's node, which then stands for that
// device: udev is given a second, where it runs; after that, or without udev,
// the node is made here.
func (c *Control) EnsureNode(name string) (string, error) {
	info, err := c.Info(name)
	if err != nil {
		return "", err
	}
	if !info.Exists {
		return "", fmt.Errorf("device-mapper: node of %s: %w", name, ErrNotExist)
	}
	path, dev := NodePath(name), unix.Mkdev(info.Major, info.Minor)
	if _, err := os.Stat("/run/udev/control"); err == nil {
		for deadline := time.Now().Add(udevPatience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if isNode(path, dev) && !udevBusy() {
				return path, nil
			}
		}
	}
	if isNode(path, dev) {
		return path, nil
	}
	// A node left by a device that is gone would lead to another one's data.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("device-mapper: node of %s: %w", name, err)
	}
	kernel := kernelNode(info)
	if isNode(kernel, dev) {
		err = os.Symlink(".."+strings.TrimPrefix(kernel, "/dev"), path)
	} else {
		err = unix.Mknod(path, unix.S_IFBLK|0o600, int(dev))
	}
	if err != nil && !isNode(path, dev) { // udev may have been faster after all
		return "", fmt.Errorf("device-mapper: node of %s: %w", name, err)
	}
	return path, nil
}

// removeNode removes what EnsureNode may have made; udev's own is gone by
// then or goes soon.
func removeNode(name string) {
	target, err := os.Readlink(NodePath(name))
	if err == nil {
		if _, err := os.Stat(filepath.Join(mapperDir, target)); err == nil {
			return // the number already belongs to another device, and so may the name
		}
	}
	_ = os.Remove(NodePath(name)) // a node that stays is corrected by the next EnsureNode
}

func isNode(path string, dev uint64) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == dev
}

// makeControl makes the control node where nobody else does.
func makeControl() error {
	misc, err := os.ReadFile("/proc/misc")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(misc)) {
		fields := strings.Fields(line)
		if len(fields) != 2 || fields[1] != "device-mapper" {
			continue
		}
		minor, err := strconv.ParseUint(fields[0], 10, 20)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(mapperDir, 0o755); err != nil {
			return err
		}
		return unix.Mknod(controlPath, unix.S_IFCHR|0o600, int(unix.Mkdev(10, uint32(minor))))
	}
	return errors.New("the kernel has no device-mapper")
}
