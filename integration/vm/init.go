package vm

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	planVar      = "BLOCKFERRY_GUEST_PLAN" // the kernel hands it from its command line to init
	insideVar    = "BLOCKFERRY_IN_GUEST"
	bootVar      = "BLOCKFERRY_GUEST_BOOT"
	addressVar   = "BLOCKFERRY_GUEST_ADDRESS"
	guestPathVar = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	endFile      = "end.json"
	hostRoot     = "/run/host"
	modulesRoot  = "/run/modules"
)

// Dir is the folder in a guest whose files the host can read.
const Dir = "/run/guest"

// bootPlan is what init is told by the host.
type bootPlan struct {
	Shared      Mount             `json:"shared"`
	ModulesFrom string            `json:"modules-from"`
	Modules     []string          `json:"modules"`
	Args        []string          `json:"args"`
	Env         []string          `json:"env"`
	Boot        int               `json:"boot"`
	Systemd     bool              `json:"systemd,omitempty"`
	Files       map[string]string `json:"files,omitempty"`
	Links       map[string]string `json:"links,omitempty"`
	GiveUpAfter time.Duration     `json:"give-up-after"`
	Card        string            `json:"card,omitempty"` // "": it has none
	Address     string            `json:"address,omitempty"`
}

// endMark is what init leaves behind. Powering off proves nothing: a guest
// without this mark hung or crashed.
type endMark struct {
	Exit   int  `json:"exit"`
	Stuck  bool `json:"stuck,omitempty"`
	Reboot bool `json:"reboot,omitempty"`
}

// Init must be called first in main or TestMain of a program that uses
// Host.Run. In a guest's first process it sets the guest up, runs the program
// and powers off; everywhere else it returns at once.
func Init() {
	planPath := os.Getenv(planVar)
	start := asInit
	switch {
	case planPath == "":
		return
	case os.Getpid() == 1:
	case os.Getenv(serviceVar) != "":
		start = asService
	default:
		return
	}
	if err := start(planPath); err != nil {
		fmt.Println("guest init:", err)
	}
	powerOff()
}

// powerOff ends the guest without writing anything back: what a program wants
// on its disks it has to flush itself.
func powerOff() {
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

func readPlan(path string) (plan bootPlan, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return plan, err
	}
	if err := json.Unmarshal(text, &plan); err != nil {
		return plan, fmt.Errorf("%s: %w", path, err)
	}
	return plan, nil
}

func asInit(planPath string) error {
	plan, err := readPlan(planPath)
	if err != nil {
		return err
	}
	if err := mountAll(plan); err != nil {
		return err
	}
	if err := openConsole(); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("loopback up: %w", err)
	}
	unix.Sethostname([]byte("guest"))
	os.Setenv("PATH", guestPathVar)
	if err := Modprobe(plan.Modules...); err != nil {
		return err
	}
	if plan.Card != "" {
		if err := join(plan.Card, plan.Address); err != nil {
			return err
		}
	}
	if plan.Systemd {
		return becomeSystemd(plan, planPath)
	}
	ended, err := runProgram(plan)
	if err != nil {
		return err
	}
	return writeEnd(ended)
}

func mountAll(plan bootPlan) error {
	mounts := []struct{ kind, target, from, data string }{
		{"proc", "/proc", "proc", ""},
		{"sysfs", "/sys", "sysfs", ""},
		{"devtmpfs", "/dev", "devtmpfs", ""},
		{"tmpfs", "/run", "tmpfs", ""},
		{"tmpfs", "/mnt", "tmpfs", ""},
		{"tmpfs", "/tmp", "tmpfs", ""},
		{"devpts", "/dev/pts", "devpts", ""},
		{"tmpfs", "/dev/shm", "tmpfs", ""},
		{"", hostRoot, "/", ""}, // the root once more, where nothing hides its files
		{plan.Shared.Kind, Dir, plan.Shared.From, plan.Shared.Data},
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.target, "/run/") || strings.HasPrefix(m.target, "/dev/") {
			if err := os.MkdirAll(m.target, 0o755); err != nil {
				return err
			}
		}
		var flags uintptr
		if m.target == hostRoot {
			flags = unix.MS_BIND
		}
		if err := unix.Mount(m.from, m.target, m.kind, flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.from, m.target, err)
		}
	}
	for _, dir := range []string{modulesRoot + "/lib", "/run/lock", "/run/root"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return os.Symlink(GuestPath(plan.ModulesFrom), modulesRoot+"/lib/modules")
}

func openConsole() error {
	fd, err := unix.Open("/dev/console", unix.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return fmt.Errorf("/dev/console: %w", err)
	}
	for to := 1; to <= 2; to++ {
		if err := unix.Dup3(fd, to, 0); err != nil {
			return err
		}
	}
	return nil
}

func loopbackUp() error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(socket)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, request)
}

// runProgram runs the program and reaps whatever else ends meanwhile.
func runProgram(plan bootPlan) (endMark, error) {
	program := plan.Args[0]
	if filepath.IsAbs(program) {
		program = GuestPath(program)
	}
	env := append([]string{
		"PATH=" + guestPathVar, "HOME=/run/root", "TMPDIR=/tmp", "TERM=dumb",
		insideVar + "=1", fmt.Sprintf("%s=%d", bootVar, plan.Boot), addressVar + "=" + plan.Address,
	}, plan.Env...)
	if !plan.Systemd {
		// No udevd here: libdevmapper makes its nodes itself.
		env = append(env, "DM_DISABLE_UDEV=1")
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return endMark{}, err
	}
	process, err := os.StartProcess(program, append([]string{program}, plan.Args[1:]...), &os.ProcAttr{
		Dir: "/run/root", Env: env, Files: []*os.File{null, os.Stdout, os.Stderr},
	})
	if err != nil {
		return endMark{}, err
	}
	giveUp := time.AfterFunc(plan.GiveUpAfter, func() { reportStuck(process.Pid) })
	defer giveUp.Stop()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return endMark{}, fmt.Errorf("wait: %w", err)
		}
		if pid == process.Pid {
			return endMark{Exit: status.ExitStatus()}, nil
		}
	}
}

// reportStuck ends a guest whose program neither ended nor can be killed,
// most often because a device stayed suspended: that is a finding, so it gets
// an end mark of its own and no second attempt.
func reportStuck(pid int) {
	fmt.Printf("guest init: giving up on process %d; tasks that wait for the kernel:\n", pid)
	os.WriteFile("/proc/sys/kernel/printk", []byte("8\n"), 0)
	os.WriteFile("/proc/sysrq-trigger", []byte("w\n"), 0)
	unix.Kill(pid, unix.SIGKILL)
	time.Sleep(2 * time.Second) // the console is slow
	if err := writeEnd(endMark{Exit: -1, Stuck: true}); err != nil {
		fmt.Println("guest init:", err)
	}
	powerOff()
}

func writeEnd(ended endMark) error {
	text, err := json.Marshal(ended)
	if err != nil {
		return err
	}
	file, err := os.Create(filepath.Join(Dir, endFile))
	if err != nil {
		return err
	}
	if _, err := file.Write(text); err != nil {
		return err
	}
	if err := file.Sync(); err != nil { // out of the guest's page cache
		return err
	}
	return file.Close()
}
