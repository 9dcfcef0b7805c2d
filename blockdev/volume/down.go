package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/dm"
)

// openPatience is how long Down waits for an opener it can't name: after each
// change udev looks at devices for a moment.
const openPatience = 2 * time.Second

// ErrInUse says that something has the volume open.
var ErrInUse = errors.New("the volume is in use")

// Down takes the volume down. It refuses, with nothing done, while something
// has it open, and says what. The Volume is closed in any other case.
func (v *Volume) Down() error {
	if err := refuseOpen(v.ctl, v.options.Name); err != nil {
		return err
	}
	v.goingDown = true
	if err := v.Close(); err != nil {
		v.log.Warn("close before down", "error", err) // what matters is taken down all the same
	}
	return Down(v.ctl, v.options.Name)
}

// Down takes down a volume that no process manages. What is not there is
// passed over, so it may be called again after an error.
func Down(ctl *dm.Control, name string) error {
	fail := func(err error) error { return fmt.Errorf("volume %s: down: %w", name, err) }
	lock, err := lockOf(ctl, name)
	if err != nil {
		return fail(err)
	}
	if lock != nil {
		defer lock.Close()
	}
	if err := refuseOpen(ctl, name); err != nil {
		return err
	}
	if err := Rescue(ctl, name); err != nil {
		return fail(err)
	}
	for _, role := range []string{roleTop, roleEra, roleSnap, roleBase, roleCow, roleMeta, roleData} {
		device := deviceName(name, role)
		info, err := ctl.Info(device)
		if err != nil {
			return fail(err)
		}
		if !info.Exists {
			continue
		}
		if !strings.HasPrefix(info.UUID, uuidPrefix) || !strings.HasSuffix(info.UUID, "-"+role) {
			return fail(fmt.Errorf("%w: %s has the uuid '%s', it is none of ours", ErrOtherVolume, device, info.UUID))
		}
		if err := ctl.Remove(device); err != nil && !errors.Is(err, dm.ErrNotExist) {
			return fail(err)
		}
	}
	return nil
}

// lockOf takes the lock of the disk below a volume; nil if the volume has no
// data device, or its disk is gone.
func lockOf(ctl *dm.Control, name string) (*blockdev.DeviceLock, error) {
	device := deviceName(name, roleData)
	info, err := ctl.Info(device)
	if err != nil || !info.HasActive {
		return nil, err
	}
	table, err := ctl.Table(device)
	if err != nil || len(table) != 1 {
		return nil, err
	}
	number, _, _ := strings.Cut(table[0].Params, " ")
	node, err := blockdev.Node(number)
	if err != nil || node == "" {
		return nil, nil // an unplugged disk has no node to lock either
	}
	return blockdev.Lock(node)
}

func refuseOpen(ctl *dm.Control, name string) error {
	for deadline := time.Now().Add(openPatience); ; time.Sleep(20 * time.Millisecond) {
		info, err := ctl.Info(name)
		if err != nil || info.OpenCount == 0 {
			return err
		}
		if users := users(ctl, name, info); len(users) > 0 || time.Now().After(deadline) {
			if len(users) == 0 {
				users = []string{fmt.Sprintf("%d openers that can't be named", info.OpenCount)}
			}
			return fmt.Errorf("volume %s: %w by %s", name, ErrInUse, strings.Join(users, ", "))
		}
	}
}

// users names what has a device open: what the kernel built on it, and
// processes, udev's excepted.
func users(ctl *dm.Control, name string, info dm.Info) []string {
	var list []string
	if path, err := ctl.OwnNode(name); err == nil {
		if uses, err := blockdev.Users(path); err == nil {
			for _, u := range uses {
				list = append(list, u.String())
			}
		}
	}
	dev := unix.Mkdev(info.Major, info.Minor)
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	seen := map[string]bool{}
	for _, link := range links {
		var st unix.Stat_t
		if unix.Stat(link, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != dev {
			continue
		}
		pid := strings.Split(link, "/")[2]
		comm, _ := os.ReadFile("/proc/" + pid + "/comm")
		who := strings.TrimSpace(string(comm))
		if seen[pid] || strings.Contains(who, "udev") {
			continue
		}
		seen[pid] = true
		list = append(list, fmt.Sprintf("process %s (%s)", pid, who))
	}
	return list
}
