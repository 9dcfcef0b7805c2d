package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/uml"
)

// The example units of deploy/services, at a place that a guest has, with an application of ours.
func exampleServices(t *testing.T, server string) (files map[string]string) {
	t.Helper()
	files = map[string]string{}
	if uml.Inside() {
		return files // they are there
	}
	found, err := filepath.Glob("../deploy/services/*")
	if err != nil || len(found) != 3 {
		t.Fatalf("%q, %v", found, err)
	}
	for _, path := range found {
		here := strings.NewReplacer("/srv/data", mountPoint, "srv-data", "mnt-data")
		files["/etc/systemd/system/"+here.Replace(filepath.Base(path))] = here.Replace(mustRead(t, path))
	}
	files["/etc/systemd/system/data-server.service.d/here.conf"] = fmt.Sprintf("[Service]\nExecStart=\nExecStart=%s\nEnvironment=%s=%s/history\nTimeoutStopSec=30\n", server, applicationVar, mountPoint)
	files["/etc/systemd/system/data-address.service.d/here.conf"] = "[Service]\nEnvironment=ADDRESS=192.0.2.10 PREFIX=32 INTERFACE=lo\n"
	files["/usr/lib/blockferry/role"] = mustRead(t, "../deploy/hooks/role")
	return files
}

// serverStop is how long the application has to end when it does not.
const serverStop = 3 * time.Second

// roleUnits are those units, in the order in which they start.
var roleUnits = []string{"mnt-data.mount", "data-server.service", "data-address.service"}

// unitTime is when a unit did something last, in microseconds of the machine's clock.
func unitTime(t *testing.T, unit, what string) int64 {
	t.Helper()
	text := strings.TrimSpace(run(t, "systemctl", "show", "--property="+what+"TimestampMonotonic", "--value", unit))
	at, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// What is bound to a volume's role runs where that is primary: it is started in order once the
// volume is up, and stopped in the reverse before the volume stands down, each step with its
// time in the log. A restart of the agent touches none of it, and a step that hangs is bounded.
func TestRoleTarget(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	files := logs(exampleServices(t, uml.GuestPath(self)))
	inGuest(t, guest{Systemd: true, Files: files, Memory: "1200M", Disks: []disk{{Size: 400 << 20}, {Size: 400 << 20}}, Timeout: 12 * time.Minute}, func(t *testing.T) {
		const hooked = "    hooks: {after-up: [/bin/sh, /usr/lib/blockferry/role], before-demote: [/bin/sh, /usr/lib/blockferry/role], timeout: 3m}\n"
		a, b := installedTwins(t, hooked)
		makeFileSystem(t)

		state := func(unit string) string {
			t.Helper()
			return strings.TrimSpace(run(t, "systemctl", "show", "--property=ActiveState", "--value", unit))
		}
		log := func() string { return mustRead(t, uml.Dir+"/agent.log") }
		// serves waits until all run, and checks the order in which they came.
		serves := func(before int) {
			t.Helper()
			for end := time.Now().Add(3 * time.Minute); !strings.Contains(log()[before:], "data-address.service: started in "); time.Sleep(50 * time.Millisecond) {
				if time.Now().After(end) {
					out, _ := tryRun(t, "systemctl", append([]string{"status", "--no-pager", "blockferry-primary@data.target"}, roleUnits...)...)
					t.Fatalf("the services do not start:\n%s", out)
				}
			}
			last := int64(0)
			for _, unit := range roleUnits {
				if state(unit) != "active" || unitTime(t, unit, "InactiveExit") < last {
					t.Errorf("%s is %s since %d, the one before it since %d", unit, state(unit), unitTime(t, unit, "InactiveExit"), last)
				}
				last = unitTime(t, unit, "ActiveEnter")
				if !strings.Contains(log()[before:], unit+": started in ") {
					t.Errorf("%s: the log does not say how long it took", unit)
				}
			}
			if !strings.Contains(log()[before:], "systemd-fsck@dev-mapper-data.service: started in ") {
				t.Error("the file system was not checked, or nobody says so")
			}
			if !mounted(t, mountPoint) || !strings.Contains(run(t, "ip", "address", "show", "dev", "lo"), "192.0.2.10") {
				t.Error("no file system or no address")
			}
		}
		// ended checks that none runs, and the order in which they went.
		ended := func(before int) {
			t.Helper()
			last := int64(0)
			for i := range roleUnits {
				unit := roleUnits[len(roleUnits)-1-i]
				if s := state(unit); s != "inactive" && s != "failed" || unitTime(t, unit, "ActiveExit") < last {
					t.Errorf("%s is %s since %d, the one before it since %d", unit, s, unitTime(t, unit, "ActiveExit"), last)
				}
				if last = unitTime(t, unit, "InactiveEnter"); last == 0 {
					t.Errorf("%s never ended", unit)
				}
				if !strings.Contains(log()[before:], unit+": stopped in ") {
					t.Errorf("%s: the log does not say how long it took", unit)
				}
			}
			if mounted(t, mountPoint) || strings.Contains(run(t, "ip", "address", "show", "dev", "lo"), "192.0.2.10") {
				t.Error("the file system, or the address, is still there")
			}
		}

		run(t, "systemctl", append([]string{"enable"}, roleUnits...)...)
		a.must(t, "secondary") // nothing ran yet
		a.await(t, "secondary", 3*time.Minute, isSecondary)
		before := len(log())
		a.must(t, "primary")
		serves(before)

		// The agent may be restarted at any time.
		entered := unitTime(t, "data-server.service", "ActiveEnter")
		before = len(log())
		run(t, "systemctl", "restart", "blockferry.service")
		serves(before)
		if again := unitTime(t, "data-server.service", "ActiveEnter"); again != entered {
			t.Error("the restart of the agent restarted the service")
		}

		before = len(log())
		if out := a.must(t, "secondary"); !strings.Contains(out, "nothing is lost") {
			t.Errorf("secondary: %s", out)
		}
		a.await(t, "secondary", 3*time.Minute, isSecondary)
		ended(before)
		// All that the application was told is done is at the other node.
		var acked uint64
		if _, err := fmt.Sscan(mustRead(t, ackedFile), &acked); err != nil || acked < 20 {
			t.Fatalf("the application was stopped too soon, or not in order: %d, %v", acked, err)
		}
		b.must(t, "primary")
		b.await(t, "up", 3*time.Minute, func(v status.Volume) bool { return v.Up })
		other := t.TempDir()
		run(t, "mount", "/dev/mapper/data", other)
		judgeDevice(t, other+"/history", applicationHistory, acked, acked)
		if err := os.Remove(other + "/history"); err != nil {
			t.Fatal(err)
		}
		run(t, "umount", other)
		b.must(t, "secondary")

		before = len(log())
		a.must(t, "primary")
		serves(before)
		// One that does not end is ended, when its time is over.
		if err := os.WriteFile("/etc/systemd/system/data-server.service.d/now-deaf.conf", fmt.Appendf(nil, "[Service]\nKillSignal=SIGWINCH\nTimeoutStopSec=%v\n", serverStop), 0o644); err != nil {
			t.Fatal(err)
		}
		run(t, "systemctl", "daemon-reload")
		before = len(log())
		begun := time.Now()
		a.must(t, "secondary")
		if took := time.Since(begun); took < serverStop {
			t.Errorf("it took %v", took)
		}
		a.await(t, "secondary", 3*time.Minute, isSecondary)
		ended(before)
		if result := strings.TrimSpace(run(t, "systemctl", "show", "--property=Result", "--value", "data-server.service")); result != "timeout" {
			t.Errorf("it ended with %s", result)
		}
		if err := b.stop(t, syscall.SIGTERM); err != nil {
			t.Errorf("the agent ended with %v", err)
		}
	})
}

// installedTwins are two nodes with one volume that either can write: the first, which does, is
// systemd's, and its file has more for the volume.
func installedTwins(t *testing.T, more string) (a, b *cli) {
	t.Helper()
	a = installedCLI(t)
	folders := issue(t, a.binary, "node-a", "node-b")
	file := func(n, other int, role, more string) string {
		node := func(n int) string { return "node-" + string(rune('a'+n)) }
		return twinFile("", node(n), folders[node(n)], fmt.Sprintf("127.0.0.%d", n+1), t.TempDir(), role, ubd(n), 64<<20, "stall-limit: 20s\n    journal: 160MiB\n"+more, node(other), fmt.Sprintf("127.0.0.%d", other+1))
	}
	if err := os.MkdirAll(filepath.Dir(a.config), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.config, []byte(file(0, 1, "primary", more)), 0o600); err != nil {
		t.Fatal(err)
	}
	b = newCLI(t, file(1, 0, "secondary", ""))
	b.must(t, "create")
	b.start(t)
	a.must(t, "create")
	run(t, "systemctl", "start", "blockferry.service")
	a.await(t, "up to date", 5*time.Minute, upToDate)
	return a, b
}
