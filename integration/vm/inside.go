package vm

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
)

// Inside says whether this process runs in a guest, started by Host.Run.
func Inside() bool { return os.Getenv(insideVar) != "" }

// GuestPath is where a guest sees a file of the host. It is right for every
// path, also for those that the guest's own /tmp, /run or /dev hides.
func GuestPath(host string) string { return hostRoot + host }

// Boot is how often this guest was rebooted before: 0 at first.
func Boot() int {
	boot, _ := strconv.Atoi(os.Getenv(bootVar))
	return boot
}

// Reboot ends the guest at once and has the host boot it again with the same
// disks and the same program; Boot tells the two apart. Nothing is written
// back, but what reached a disk stays: this is a crash of the kernel, not a
// power cut. Files in Dir survive, other file systems in memory do not.
func Reboot() error {
	if err := writeEnd(endMark{Reboot: true}); err != nil {
		return err
	}
	powerOff()
	return nil
}

// Modprobe loads kernel modules, by name.
func Modprobe(names ...string) error {
	if len(names) == 0 {
		return nil
	}
	return modprobe(append([]string{"-a"}, names...)...)
}

// ModprobeWith loads one kernel module with parameters (name=value).
func ModprobeWith(name string, parameters ...string) error {
	return modprobe(append([]string{name}, parameters...)...)
}

func modprobe(args ...string) error {
	out, err := exec.Command("modprobe", append([]string{"-d", modulesRoot}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("modprobe %q: %w: %s", args, err, out)
	}
	return nil
}
