package integration

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/uml"
)

// Helpers and tests of guests that systemd and udevd run.

const (
	// applicationVar has this program be an application: it writes a history
	// to the file named, until it is asked to end.
	applicationVar = "BLOCKFERRY_APPLICATION"
	ackedFile      = uml.Dir + "/acked"
	fileSystemID   = "b10cfe11-0000-4000-8000-00000000da7a"
	mountPoint     = "/mnt/data"
)

// installed puts blockferry where a package puts it.
func installed(spec *uml.Spec, files map[string]string) {
	spec.Systemd = true
	spec.Files = map[string]string{}
	for _, place := range [][2]string{{"../deploy/systemd", "/usr/lib/systemd/system"}, {"../deploy/udev", "/usr/lib/udev/rules.d"}} {
		found, err := filepath.Glob(place[0] + "/*")
		if err != nil || len(found) == 0 {
			panic(fmt.Sprintf("nothing in %s: %v", place[0], err))
		}
		for _, path := range found {
			content, err := os.ReadFile(path)
			if err != nil {
				panic(err)
			}
			spec.Files[filepath.Join(place[1], filepath.Base(path))] = string(content)
		}
	}
	for path, content := range files {
		spec.Files[path] = content
	}
	if binary, err := builtBinary(); err == nil {
		spec.Links = map[string]string{"/usr/bin/blockferry": uml.GuestPath(binary)}
	}
}

// installedCLI runs the installed blockferry, whose agent is systemd's.
func installedCLI(t *testing.T) *cli {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			for _, log := range []string{"agent.log", "volume.log"} {
				content, _ := os.ReadFile(filepath.Join(uml.Dir, log))
				t.Logf("%s:\n%s", log, content)
			}
		}
	})
	return &cli{binary: "/usr/bin/blockferry", config: "/etc/blockferry/blockferry.yaml", socket: "/run/blockferry/blockferry.sock"}
}

// logs has the units' output kept where a test finds it after a boot.
func logs(files map[string]string) map[string]string {
	for unit, file := range map[string]string{"blockferry.service": "agent.log", "blockferry-volume@.service": "volume.log"} {
		files["/etc/systemd/system/"+unit+".d/log.conf"] = fmt.Sprintf("[Service]\nStandardOutput=append:%[1]s/%[2]s\nStandardError=append:%[1]s/%[2]s\n", uml.Dir, file)
	}
	return files
}

// The history an application writes to its file.
var applicationHistory = history{Seed: 71, Size: 24 << 20, MaxBytes: 256 << 10}

// application is started by systemd, and is stopped by it before its file
// system is unmounted. The number of its last acknowledged write survives.
func application(path string) int {
	err := func() error {
		file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_DIRECT, 0o600)
		if err != nil {
			return err
		}
		defer file.Close()
		if err := file.Truncate(applicationHistory.Size); err != nil {
			return err
		}
		w := &writer{done: make(chan struct{})}
		end := make(chan os.Signal, 1)
		signal.Notify(end, syscall.SIGTERM)
		go func() { <-end; w.stopping.Store(true) }()
		if err := w.writeAll(file, applicationHistory, 1); err != nil {
			return err
		}
		acked, err := os.Create(ackedFile)
		if err != nil {
			return err
		}
		fmt.Fprintln(acked, w.acked())
		return errors.Join(file.Sync(), acked.Sync(), acked.Close())
	}()
	if err != nil {
		fmt.Println("application:", err)
		return 1
	}
	return 0
}

// mounted says whether something is mounted at a place.
func mounted(t *testing.T, place string) bool {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(table), " "+place+" ")
}

// claimers are the devices that claim a link below /dev, as udevd keeps them.
func claimers(t *testing.T, link string) []string {
	t.Helper()
	entries, err := os.ReadDir("/run/udev/links/" + strings.ReplaceAll(link, "/", `\x2f`))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		number, found := strings.CutPrefix(e.Name(), "b")
		if !found {
			continue // its lock
		}
		uevent, err := os.ReadFile("/sys/dev/block/" + number + "/uevent")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(uevent)) {
			if name, found := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME="); found {
				names = append(names, name)
			}
		}
	}
	return names
}

// onlyTheTop checks that nothing but the volume's top claims its file system.
func onlyTheTop(t *testing.T) {
	t.Helper()
	top, err := filepath.EvalSymlinks("/dev/mapper/data")
	if err != nil {
		t.Fatal(err)
	}
	if got := claimers(t, "disk/by-uuid/"+fileSystemID); len(got) != 1 || "/dev/"+got[0] != top {
		t.Fatalf("the file system's link is claimed by %v, want only %s", got, top)
	}
	if to, err := filepath.EvalSymlinks("/dev/disk/by-uuid/" + fileSystemID); err != nil || to != top {
		t.Fatalf("the file system's link leads to '%s', %v, want %s", to, err, top)
	}
}

// makeFileSystem makes the one with a UUID that is known. udevd watches a device
// for what is written to it only once it has dealt with its arrival.
func makeFileSystem(t *testing.T) {
	t.Helper()
	run(t, "udevadm", "settle", "--timeout=60")
	run(t, "mkfs.ext4", "-q", "-F", "-U", fileSystemID, "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", "/dev/mapper/data")
	// Where cuts keep udevd's queue from being empty its link is all there is to wait for. While
	// udevd looks at the device after a cut it does not watch it, so that it may not see what is
	// written then: it is told.
	link := "/dev/disk/by-uuid/" + fileSystemID
	for end := time.Now().Add(2 * time.Minute); time.Now().Before(end); {
		if out, err := tryRun(t, "udevadm", "settle", "--timeout=30", "--exit-if-exists="+link); err != nil {
			t.Logf("udevd is behind: %v %s", err, out)
		}
		if _, err := os.Stat(link); err == nil {
			return
		}
		run(t, "udevadm", "trigger", "--action=change", "/dev/mapper/data")
		time.Sleep(time.Second)
	}
	t.Fatalf("udevd makes no %s", link)
}

const dataMount = "[Unit]\nRequires=blockferry-volume@data.service\nAfter=blockferry-volume@data.service\n" +
	"[Mount]\nWhat=/dev/disk/by-uuid/" + fileSystemID + "\nWhere=" + mountPoint + "\nType=ext4\n"

// A file system that systemd mounted by its UUID, with udevd at work, stays
// mounted through a thousand cuts; nothing of them is left behind, and no
// other device is ever taken for that file system.
func TestBootThousandCuts(t *testing.T) {
	files := logs(map[string]string{
		"/etc/blockferry/blockferry.yaml":    strings.Replace(oneReplica(ubd(0), ubd(1)), "500ms", "100ms", 1),
		"/etc/systemd/system/mnt-data.mount": dataMount,
		// The device's unit waits as fstab's x-systemd.device-timeout would have it.
		"/etc/systemd/system/dev-disk-by\\x2duuid-" + strings.ReplaceAll(fileSystemID, "-", `\x2d`) + ".device.d/timeout.conf": "[Unit]\nJobRunningTimeoutSec=5min\n",
	})
	inGuest(t, guest{Systemd: true, Files: files, Disks: []disk{{Size: 200 << 20}, {Size: 200 << 20}}, Timeout: 15 * time.Minute}, func(t *testing.T) {
		const cuts = 1000
		c := installedCLI(t)
		c.must(t, "create")
		run(t, "systemctl", "start", "blockferry-volume@data.service")
		makeFileSystem(t)
		run(t, "systemctl", "start", "mnt-data.mount")
		c.must(t, "sync", "--timeout", "60s")
		epoch := func() uint64 {
			return c.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up && v.Position != nil }).Position.Epoch
		}
		began, entered := epoch(), run(t, "systemctl", "show", "-P", "ActiveEnterTimestampMonotonic", "mnt-data.mount")
		file, err := os.Create(mountPoint + "/load")
		if err != nil {
			t.Fatal(err)
		}
		block := make([]byte, 4096)
		looked, rounds := time.Now(), 0
		for i, now := 0, began; now < began+cuts; i++ {
			block[0]++
			if _, err := file.WriteAt(block, int64(i%1000)*4096); err != nil {
				t.Fatal(err)
			}
			if err := file.Sync(); err != nil {
				t.Fatal(err)
			}
			if !mounted(t, mountPoint) {
				t.Fatalf("unmounted after %d cuts", epoch()-began)
			}
			time.Sleep(200 * time.Millisecond)
			if time.Since(looked) > 10*time.Second {
				looked, rounds = time.Now(), rounds+1
				onlyTheTop(t)
				if rounds%3 == 1 { // what a package's upgrade or an administrator does at any time
					run(t, "udevadm", "trigger", "--subsystem-match=block", "--action="+[]string{"add", "change"}[rounds/3%2])
				}
				now = epoch()
				t.Logf("%d cuts", now-began)
			}
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		if again := run(t, "systemctl", "show", "-P", "ActiveEnterTimestampMonotonic", "mnt-data.mount"); again != entered {
			t.Errorf("the mount unit became active at %s, and again at %s", strings.TrimSpace(entered), strings.TrimSpace(again))
		}
		// Not settled: at this pace a guest's udevd is minutes behind its queue.
		onlyTheTop(t)
		links := strings.Fields(run(t, "udevadm", "info", "-q", "symlink", ubd(1)))
		if len(links) == 0 || strings.Contains(strings.Join(links, " "), "by-uuid") {
			t.Errorf("the replica's links: %v, want those by its place and none by its content", links)
		}
		t.Logf("the replica's links: %v", links)
		run(t, "systemctl", "stop", "blockferry-volume@data.service")
		if mounted(t, mountPoint) {
			t.Error("still mounted after its volume was stopped")
		}
		if left := run(t, "dmsetup", "ls"); strings.Contains(left, "data") {
			t.Errorf("left behind: %s", left)
		}
		log, _ := os.ReadFile(uml.Dir + "/agent.log")
		// A cut may be void on a busy machine; udev is no reason for it.
		for _, word := range []string{"busy", "could not be removed", "no such file"} {
			if n := strings.Count(string(log), word); n > 0 {
				t.Errorf("the agent's log says '%s' %d times", word, n)
			}
		}
	})
}

// An EC2 instance that is stopped under load and started again has an empty
// SSD. Through the units alone everything is there again: every write that the
// application had acknowledged, though the only cut is the one that the stop
// takes, since the interval is an hour, and the replica's disk is by then too
// slow for what the agent does by itself when it ends.
func TestBootStopAndStart(t *testing.T) {
	const (
		size      = 200 << 20
		blankMark = uml.Dir + "/blank"
		fstab     = "/dev/mapper/data " + mountPoint + " ext4 _netdev,nofail,x-systemd.requires=blockferry-volume@data.service,x-systemd.device-timeout=infinity 0 2\n"
	)
	slow := func(ms int) string {
		return fmt.Sprintf("0 %d delay %s 0 0 %[2]s 0 %d", size/sector, ubd(1), ms)
	}
	config := strings.Replace(oneReplica(ubd(0), "/dev/mapper/slow"), "500ms", "1h\n    restore: auto", 1)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	files := logs(map[string]string{
		"/etc/blockferry/blockferry.yaml": config,
		"/etc/systemd/system/application.service": fmt.Sprintf("[Unit]\nRequiresMountsFor=%s\n[Service]\nType=exec\nExecStart=%s\nEnvironment=%s=%s/history\n",
			mountPoint, uml.GuestPath(self), applicationVar, mountPoint),
		// The new SSD, before anybody looks at it.
		"/etc/systemd/system/blank.service": "[Unit]\nDefaultDependencies=no\nBefore=blockferry.service\nConditionPathExists=" + blankMark +
			"\n[Service]\nType=oneshot\nExecStart=/bin/sh -c 'cat /dev/zero > " + ubd(0) + " || sync'\n",
		"/etc/systemd/system/slow.service": "[Unit]\nDefaultDependencies=no\nAfter=systemd-udevd.service\nBefore=blockferry.service\n" +
			"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/sbin/dmsetup create slow --table '" + slow(0) + "'\n",
		"/etc/systemd/system/blockferry.service.d/disks.conf": "[Unit]\nWants=blank.service slow.service\n",
	})
	inGuest(t, guest{Systemd: true, Files: files, Disks: []disk{{Size: size}, {Size: size}}, Modules: []string{"dm-delay"}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		c := installedCLI(t)
		if uml.Boot() == 0 {
			run(t, "systemctl", "start", "slow.service")
			c.must(t, "create")
			run(t, "systemctl", "start", "blockferry-volume@data.service")
			makeFileSystem(t)
			if err := os.Mkdir(uml.Etc, 0o755); err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{"/etc", uml.Etc} { // for now and for the next boot
				if err := os.WriteFile(dir+"/fstab", []byte(fstab), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			run(t, "systemctl", "daemon-reload")
			run(t, "systemctl", "start", "mnt-data.mount")
			c.must(t, "sync", "--timeout", "60s")
			run(t, "systemctl", "start", "application.service")
			time.Sleep(5 * time.Second)
			if err := os.WriteFile(blankMark, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			dmSwap(t, "slow", slow(3000))
			t.Fatal(uml.RebootInOrder())
		}
		for deadline := time.Now().Add(90 * time.Second); !mounted(t, mountPoint); time.Sleep(100 * time.Millisecond) {
			if time.Now().After(deadline) {
				out, _ := tryRun(t, "systemctl", "status", "--no-pager", "mnt-data.mount", "blockferry-volume@data.service", "blockferry.service", "blank.service")
				t.Fatalf("not mounted by itself:\n%s", out)
			}
		}
		text, err := os.ReadFile(ackedFile)
		if err != nil {
			t.Fatalf("the application was not stopped in order: %v", err)
		}
		var acked uint64
		if _, err := fmt.Sscan(string(text), &acked); err != nil || acked < 100 {
			t.Fatalf("the application wrote too little: %q, %v", text, err)
		}
		judgeDevice(t, mountPoint+"/history", applicationHistory, acked, acked)
		// The replica, a mapped device here, is told from what it carries, too.
		run(t, "udevadm", "trigger", "--subsystem-match=block")
		run(t, "udevadm", "settle", "--timeout=60")
		onlyTheTop(t)
		log, err := os.ReadFile(uml.Dir + "/volume.log")
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"data: replica 'ebs' is ", "data: drained in ", "data: down, cleanly", "restore ", "data: up as /dev/mapper/data"} {
			if !strings.Contains(string(log), want) {
				t.Errorf("'%s' is missing in what the volume's unit printed", want)
			}
		}
		t.Logf("%d writes acknowledged and there; the volume's unit printed:\n%s", acked, log)
	})
}

// A wrong configuration ends the agent for good, and is seen; whatever else ends it
// does not, a crash of the program least of all.
func TestBootWrongConfiguration(t *testing.T) {
	inGuest(t, guest{Systemd: true, Files: logs(map[string]string{"/etc/blockferry/blockferry.yaml": "volumes:\n  - nonsense: 1\n"}), Disks: []disk{{Size: 64 << 20}, {Size: 64 << 20}}}, func(t *testing.T) {
		const unit = "blockferry.service"
		c := installedCLI(t)
		property := func(name string) string {
			return strings.TrimSpace(run(t, "systemctl", "show", "--property="+name, "--value", unit))
		}
		if out, err := tryRun(t, "systemctl", "start", unit); err == nil {
			t.Errorf("it began:\n%s", out)
		}
		if state, restarts, status := property("ActiveState"), property("NRestarts"), property("ExecMainStatus"); state != "failed" || restarts != "0" || status != "2" {
			t.Errorf("it is '%s', was restarted %s times, ended with %s", state, restarts, status)
		}
		if err := os.WriteFile(c.config, []byte(oneReplica(ubd(0), ubd(1))), 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "systemctl", "start", unit)
		// It ends a Go program as a panic does.
		run(t, "systemctl", "kill", "--kill-whom=main", "--signal=QUIT", unit)
		for deadline := time.Now().Add(60 * time.Second); property("NRestarts") != "1" || property("ActiveState") != "active"; time.Sleep(100 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("it did not come back: it is '%s', was restarted %s times", property("ActiveState"), property("NRestarts"))
			}
		}
		// What its unit leaves the dead-man suffices for what that wants.
		pid, err := strconv.Atoi(strings.TrimSpace(run(t, "systemctl", "show", "--property=MainPID", "--value", "blockferry-deadman.service")))
		if err != nil || pid == 0 {
			t.Fatalf("the dead-man's service does not run: %v", err)
		}
		realTime(t, pid)
	})
}
