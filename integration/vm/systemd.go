package vm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Etc is a folder in a guest with Systemd: what is in it is in /etc from the next boot
// on, with its owners and modes.
const Etc = Dir + "/etc"

const (
	// serviceVar tells the program that systemd started it to supervise.
	serviceVar = "BLOCKFERRY_GUEST_SERVICE"
	systemd    = "/lib/systemd/systemd"
	guestUnits = "/run/systemd/system"
)

// masked are units of the machine that guests do without: each costs time.
var masked = []string{
	"systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket", "systemd-journald-audit.socket",
	"systemd-journal-flush.service", "systemd-hwdb-update.service", "systemd-update-done.service", "systemd-update-utmp.service",
	"systemd-random-seed.service", "systemd-firstboot.service", "systemd-sysusers.service", "systemd-machine-id-commit.service",
	"systemd-binfmt.service", "systemd-timesyncd.service", "systemd-sysctl.service", "systemd-tmpfiles-clean.timer",
	"systemd-tmpfiles-setup.service", "systemd-tmpfiles-setup-dev.service", "systemd-modules-load.service", "systemd-boot-system-token.service",
	"systemd-pcrphase.service", "systemd-pcrphase-sysinit.service", "systemd-repart.service", "systemd-remount-fs.service",
	"systemd-ask-password-console.path", "systemd-ask-password-wall.path", "systemd-udev-settle.service", "getty.target",
	"dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount",
	"sys-fs-fuse-connections.mount", "proc-sys-fs-binfmt_misc.automount", "kmod-static-nodes.service", "modprobe@configfs.service",
	"modprobe@dm_mod.service", "modprobe@drm.service", "modprobe@fuse.service", "modprobe@loop.service", "modprobe@efi_pstore.service",
}

// becomeSystemd makes the guest one that systemd can run, and this process
// systemd. It returns only an error.
func becomeSystemd(plan bootPlan, planPath string) error {
	if err := Modprobe("overlay"); err != nil {
		return err
	}
	// The host's files, with what is written kept in memory.
	for _, dir := range []string{"/etc", "/usr", "/var"} {
		upper, work := "/run/overlay"+dir+"/upper", "/run/overlay"+dir+"/work"
		for _, d := range []string{upper, work} {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount("overlay", dir, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", dir, upper, work)); err != nil {
			return fmt.Errorf("overlay on %s: %w", dir, err)
		}
	}
	// None of what the host starts or mounts.
	if err := unix.Mount("tmpfs", "/etc/systemd/system", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	if err := unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""); err != nil {
		return fmt.Errorf("cgroup2: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	files := map[string]string{
		"/etc/fstab":      "",
		"/etc/machine-id": "0123456789abcdef0123456789abcdef\n",
		"/run/systemd/system.conf.d/guest.conf": "[Manager]\nShowStatus=no\nDefaultStandardOutput=tty\nDefaultStandardError=tty\n" +
			"DefaultTimeoutStopSec=30s\nStatusUnitFormat=name\n",
		// The guest's disks, not its hundreds of terminals.
		guestUnits + "/systemd-udev-trigger.service.d/guest.conf": "[Service]\nExecStart=\nExecStart=udevadm trigger --type=devices --subsystem-match=block --action=add\n",
		guestUnits + "/guest.target":                              "[Unit]\nRequires=guest.service\nWants=local-fs.target remote-fs.target\nAllowIsolate=yes\n",
		guestUnits + "/guest.service": fmt.Sprintf("[Service]\nType=exec\nExecStart=%s\nEnvironment=%s=%s %s=1\nOOMScoreAdjust=-900\n",
			GuestPath(self), planVar, GuestPath(planPath), serviceVar),
	}
	for path, content := range plan.Files {
		files[path] = content
	}
	for path, content := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	if _, err := os.Stat(Etc); err == nil {
		if out, err := exec.Command("cp", "-a", Etc+"/.", "/etc/").CombinedOutput(); err != nil {
			return fmt.Errorf("what the last boot left for /etc: %w: %s", err, out)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	links := map[string]string{}
	for _, unit := range masked {
		links[guestUnits+"/"+unit] = os.DevNull
	}
	for path, target := range plan.Links {
		links[path] = target
	}
	for path, target := range links {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(target, path); err != nil {
			return err
		}
	}
	err = unix.Exec(systemd, []string{systemd, "--unit=guest.target", "--log-target=console", "--log-level=notice", "--show-status=no"},
		[]string{"PATH=" + guestPathVar, "TERM=dumb"})
	return fmt.Errorf("%s: %w (install the package systemd)", systemd, err)
}

// asService runs the program, as init does in other guests.
func asService(planPath string) error {
	plan, err := readPlan(planPath)
	if err != nil {
		return err
	}
	ended, err := runProgram(plan)
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(Dir, endFile)); err == nil {
		select {} // it asked for a reboot, and systemd is about to end all
	}
	return writeEnd(ended)
}

// RebootInOrder has systemd stop everything and power the guest off; then the
// host boots it again, as after Reboot. It returns only an error.
func RebootInOrder() error {
	if err := writeEnd(endMark{Reboot: true}); err != nil {
		return err
	}
	if out, err := exec.Command("systemctl", "--no-block", "poweroff").CombinedOutput(); err != nil {
		return fmt.Errorf("systemctl poweroff: %w: %s", err, out)
	}
	select {}
}
