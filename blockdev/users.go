package blockdev

import (
	"fmt"
	"strings"
)

// Use is one thing that uses a block device.
type Use struct {
	// Kind is "mount", "swap", "holder" (a device built on it) or "loop".
	Kind string
	// By is the mount point or the name of the device built on it.
	By string
	// Device is the kernel's name of what is used: the device asked for, one
	// of its partitions, or the disk it is a partition of.
	Device string
}

func (u Use) String() string {
	switch u.Kind {
	case "mount":
		return fmt.Sprintf("%s mounted on %s", u.Device, u.By)
	case "swap":
		return u.Device + " used as swap"
	}
	return fmt.Sprintf("%s held by %s %s", u.Device, u.Kind, u.By)
}

// busyError says by what the device at path is used.
func busyError(path string, cause error) error {
	users, err := Users(path)
	switch {
	case err != nil:
		return fmt.Errorf("open device: %s is in use (by what can't be told: %v): %w", path, err, cause)
	case len(users) == 0:
		return fmt.Errorf("open device: %s is in use by a program that has it opened exclusively: %w", path, cause)
	}
	var list []string
	for _, u := range users {
		list = append(list, u.String())
	}
	return fmt.Errorf("open device: %s is in use: %s: %w", path, strings.Join(list, ", "), cause)
}

// Users stub until identity lands.
func Users(path string) ([]Use, error) { return nil, nil }
