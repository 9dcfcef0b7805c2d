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

// Usage is Users, with all that is known of the mounts apart.
func Usage(path string) (mounts []Mount, others []Use, err error) { return hostKernel.usage(path) }

func (k kernel) users(path string) ([]Use, error) {
	mounts, users, err := k.usage(path)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		users = append(users, Use{"mount", m.Point, m.Device})
	}
	slices.SortFunc(users, func(a, b Use) int {
		return cmp.Or(cmp.Compare(a.Device, b.Device), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.By, b.By))
	})
	return slices.Compact(users), nil
}

func (k kernel) usage(path string) (mounts []Mount, others []Use, err error) {
	fail := func(err error) ([]Mount, []Use, error) { return nil, nil, fmt.Errorf("users of %s: %w", path, err) }
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
	names := map[string]string{} // by number
	for name, dir := range parts {
		own, err := os.ReadFile(filepath.Join(dir, "dev"))
		if err != nil {
			return fail(err)
		}
		names[strings.TrimSpace(string(own))] = name
		holders, err := os.ReadDir(filepath.Join(dir, "holders"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fail(err)
		}
		for _, h := range holders {
			others = append(others, Use{"holder", cmp.Or(firstText(dir, "holders/"+h.Name()+"/dm/name"), h.Name()), name})
		}
	}
	// used is which of them is meant, "" for none.
	used := func(source, number string) string {
		if number == "" || strings.HasPrefix(number, "0:") {
			// btrfs and others show a number that belongs to no device.
			if !strings.HasPrefix(source, "/") {
				return ""
			}
			major, minor, err := k.device(source)
			if err != nil {
				return "" // no device: a file, a network file system
			}
			number = fmt.Sprintf("%d:%d", major, minor)
		}
		return names[number]
	}
	err = k.mounts(func(m mountLine) error {
		if name := used(m.source, m.number); name != "" {
			mounts = append(mounts, Mount{m.point, m.process, name, m.number, m.fileSystem, strings.Split(m.options, ",")})
		}
		return nil
	})
	if err != nil {
		return fail(err)
	}
	err = k.swaps(func(source string) error {
		if name := used(source, ""); name != "" {
			others = append(others, Use{"swap", source, name})
		}
		return nil
	})
	if err != nil {
		return fail(err)
	}
	err = k.loops(func(loop, backing string) error {
		if name := used(backing, ""); name != "" {
			others = append(others, Use{"loop", loop, name})
		}
		return nil
	})
	if err != nil {
		return fail(err)
	}
	return mounts, others, nil
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

// Mount is a mounted file system.
type Mount struct {
	// Point is where, in the mount namespace of Process; 0 stands for this
	// process's own.
	Point   string
	Process int
	// Device is the kernel's name of what is mounted; Number is the file
	// system's own, as "major:minor" and as stat(2) shows it of its files.
	Device, Number string
	// Type is its type, and Options those of the file system itself.
	Type    string
	Options []string
}

// Path leads there from this process's namespace.
func (m Mount) Path() string {
	if m.Process == 0 {
		return m.Point
	}
	return fmt.Sprintf("/proc/%d/root%s", m.Process, m.Point)
}

// mountLine is a mount in some process's namespace; 0 is this one's.
type mountLine struct {
	process                                    int
	point, source, number, fileSystem, options string
}

// mounts calls f for each mount in any mount namespace, each namespace once.
func (k kernel) mounts(f func(mountLine) error) error {
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
			m, err := parseMount(line)
			if err != nil {
				return err
			}
			if !own {
				m.process, _ = strconv.Atoi(filepath.Base(p)) // it consists of digits
			}
			if err := f(m); err != nil {
				return err
			}
		}
	}
	return nil
}

// parseMount parses a line of mountinfo:
//
//	id parent major:minor root mount-point options [optional fields] - type source options
func parseMount(line string) (mountLine, error) {
	head, tail, found := strings.Cut(line, " - ")
	left, right := strings.Fields(head), strings.Fields(tail)
	if !found || len(left) < 6 || len(right) < 2 {
		return mountLine{}, fmt.Errorf("mountinfo: can't read the line %q", line)
	}
	m := mountLine{point: unescape(left[4]), source: unescape(right[1]), number: left[2], fileSystem: right[0]}
	if len(right) > 2 {
		m.options = right[2]
	}
	return m, nil
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

// LoopsOn lists the loop devices that a regular file is behind, by the kernel's names.
func LoopsOn(path string) ([]string, error) { return hostKernel.loopsOn(path) }

func (k kernel) loopsOn(path string) (on []string, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	err = k.loops(func(loop, backing string) error {
		if behind, err := os.Stat(backing); err == nil && os.SameFile(info, behind) {
			on = append(on, loop)
		}
		return nil
	})
	return on, err
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
