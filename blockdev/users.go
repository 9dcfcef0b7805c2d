package blockdev

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
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
		return fmt.Errorf("open device: %s is in use by %s: %w", path, hostKernel.openedBy(path), cause)
	}
	var list []string
	for _, u := range users {
		list = append(list, u.String())
	}
	return fmt.Errorf("open device: %s is in use: %s: %w", path, strings.Join(list, ", "), cause)
}

// openedBy names the other programs that have a device open, as far as /proc
// shows them; which of them has it exclusively it does not show.
func (k kernel) openedBy(path string) string {
	const unknown = "a program that has it opened exclusively"
	major, minor, err := k.device(path)
	if err != nil {
		return unknown
	}
	files, err := filepath.Glob(filepath.Join(k.proc, "[0-9]*/fd/*"))
	if err != nil {
		return unknown
	}
	var programs []string
	for _, file := range files {
		// A look at the link's text first: a stat may wait for a dead network file system.
		if to, err := os.Readlink(file); err != nil || !strings.HasPrefix(to, "/dev/") {
			continue
		}
		if a, b, err := k.device(file); err != nil || a != major || b != minor {
			continue
		}
		process := filepath.Dir(filepath.Dir(file))
		if filepath.Base(process) == strconv.Itoa(os.Getpid()) {
			continue
		}
		program := fmt.Sprintf("process %s (%s)", filepath.Base(process), firstText(process, "comm"))
		if !slices.Contains(programs, program) {
			programs = append(programs, program)
		}
	}
	if len(programs) == 0 {
		return unknown
	}
	return strings.Join(programs, ", ")
}

// Users lists what uses the block device at path, its partitions, or the disk
// it is a partition of: mounts in any namespace that is visible here, swaps,
// devices built on it, and loop devices on it. Programs that merely have it
// open are not found.
func Users(path string) ([]Use, error) { return hostKernel.users(path) }

func (k kernel) users(path string) ([]Use, error) {
	fail := func(err error) ([]Use, error) { return nil, fmt.Errorf("users of %s: %w", path, err) }
	major, minor, err := k.device(path)
	if err != nil {
		return fail(err)
	}
	n, err := k.node(major, minor)
	if err != nil {
		return fail(err)
	}
	parts, err := k.overlapping(n)
	if err != nil {
		return fail(err)
	}
	var users []Use
	for name, dir := range parts {
		holders, err := os.ReadDir(filepath.Join(dir, "holders"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fail(err)
		}
		for _, h := range holders {
			users = append(users, Use{"holder", cmp.Or(firstText(dir, "holders/"+h.Name()+"/dm/name"), h.Name()), name})
		}
	}
	uses := func(kind, by, source, number string) error {
		if number == "" || strings.HasPrefix(number, "0:") {
			// btrfs and others show a number that belongs to no device.
			if !strings.HasPrefix(source, "/") {
				return nil
			}
			major, minor, err := k.device(source)
			if err != nil {
				return nil // no device: a file, a network file system
			}
			number = fmt.Sprintf("%d:%d", major, minor)
		}
		for name, dir := range parts {
			own, err := os.ReadFile(filepath.Join(dir, "dev"))
			if err != nil {
				return err
			}
			if strings.TrimSpace(string(own)) == number {
				users = append(users, Use{kind, by, name})
			}
		}
		return nil
	}
	if err := k.mounts(func(by, source, number string) error { return uses("mount", by, source, number) }); err != nil {
		return fail(err)
	}
	if err := k.swaps(func(source string) error { return uses("swap", source, source, "") }); err != nil {
		return fail(err)
	}
	if err := k.loops(func(loop, backing string) error { return uses("loop", loop, backing, "") }); err != nil {
		return fail(err)
	}
	slices.SortFunc(users, func(a, b Use) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.By, b.By))
	})
	return slices.Compact(users), nil
}

// overlapping is the folders of the devices whose use is use of this one, by
// name.
func (k kernel) overlapping(n sysNode) (map[string]string, error) {
	dirs := map[string]string{n.name(): n.dir}
	if n.dir != n.disk {
		dirs[filepath.Base(n.disk)] = n.disk
		return dirs, nil
	}
	partitions, err := filepath.Glob(filepath.Join(n.dir, "*/partition"))
	if err != nil {
		return nil, err
	}
	for _, p := range partitions {
		dirs[filepath.Base(filepath.Dir(p))] = filepath.Dir(p)
	}
	return dirs, nil
}

// mounts calls f for each mount in any mount namespace, each namespace once.
func (k kernel) mounts(f func(mountPoint, source, number string) error) error {
	seen := map[string]bool{}
	processes, err := filepath.Glob(filepath.Join(k.proc, "[0-9]*"))
	if err != nil {
		return err
	}
	for _, p := range append([]string{filepath.Join(k.proc, "self")}, processes...) {
		own := filepath.Base(p) == "self"
		space, err := os.Readlink(filepath.Join(p, "ns/mnt"))
		if !own && (err != nil || seen[space]) {
			continue // ended, or not ours to see
		}
		seen[space] = true
		text, err := os.ReadFile(filepath.Join(p, "mountinfo"))
		if err != nil {
			if own {
				return err
			}
			continue
		}
		for line := range strings.Lines(string(text)) {
			point, source, number, err := parseMount(line)
			if err != nil {
				return err
			}
			if err := f(point, source, number); err != nil {
				return err
			}
		}
	}
	return nil
}

// parseMount parses a line of mountinfo:
//
//	id parent major:minor root mount-point options [optional fields] - type source options
func parseMount(line string) (point, source, number string, err error) {
	head, tail, found := strings.Cut(line, " - ")
	left, right := strings.Fields(head), strings.Fields(tail)
	if !found || len(left) < 6 || len(right) < 2 {
		return "", "", "", fmt.Errorf("mountinfo: can't read the line %q", line)
	}
	return unescape(left[4]), unescape(right[1]), left[2], nil
}

// unescape undoes the kernel's octal escapes of blanks and backslashes.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#").Replace(s)
}

func (k kernel) swaps(f func(source string) error) error {
	text, err := os.ReadFile(filepath.Join(k.proc, "swaps"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a kernel without swap
	}
	if err != nil {
		return err
	}
	first := true
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if !first && len(fields) > 0 {
			if err := f(unescape(fields[0])); err != nil {
				return err
			}
		}
		first = false
	}
	return nil
}

// loops calls f for each loop device and what is behind it.
func (k kernel) loops(f func(loop, backing string) error) error {
	files, err := filepath.Glob(filepath.Join(k.sys, "block/loop*/loop/backing_file"))
	if err != nil {
		return err
	}
	for _, file := range files {
		dir := filepath.Dir(filepath.Dir(file))
		if backing := firstText(dir, "loop/backing_file"); backing != "" {
			if err := f(filepath.Base(dir), backing); err != nil {
				return err
			}
		}
	}
	return nil
}
