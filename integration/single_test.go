package integration

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/uml"
)

const (
	singleSSD  = 240 // MiB
	guestModel = "FastStore"
	singleDir  = "/srv/data"
)

// examples puts pages of the manual, folders of deploy and the configuration where a package puts them.
func examples(t *testing.T, files map[string]string, pages, folders []string) map[string]string {
	t.Helper()
	if uml.Inside() {
		return files // they are there
	}
	files["/etc/blockferry/blockferry.yaml"] = mustRead(t, "../deploy/package/blockferry.yaml")
	for _, page := range pages {
		files["/usr/share/doc/blockferry/"+page] = mustRead(t, "../docs/"+page)
	}
	for _, folder := range folders {
		found, err := filepath.Glob("../deploy/" + folder + "/*")
		if err != nil || len(found) == 0 {
			t.Fatalf("nothing in deploy/%s: %v", folder, err)
		}
		for _, path := range found {
			files["/usr/share/doc/blockferry/examples/"+folder+"/"+filepath.Base(path)] = mustRead(t, path)
		}
	}
	return files
}

// A machine as docs/single.md has it. Its SSD is a disk in memory, which is another one, and
// blank, after each boot. What the page has put into /etc is there again then.
func singleMachine(t *testing.T) guest {
	t.Helper()
	files := logs(map[string]string{
		"/etc/systemd/system/machine.service": "[Unit]\nDefaultDependencies=no\nAfter=systemd-udevd.service\nBefore=blockferry.service\n[Service]\nType=oneshot\nRemainAfterExit=yes\n" +
			"ExecStart=/sbin/modprobe -d /run/modules sd_mod\nExecStart=/sbin/modprobe -d /run/modules scsi_debug per_host_store=1 delay=0 dev_size_mb=240 inq_product=" + guestModel + "\n",
		"/etc/systemd/system/blockferry.service.d/machine.conf":  "[Unit]\nWants=machine.service\n",
		"/etc/systemd/system/srv.mount":                          "[Mount]\nWhat=none\nWhere=/srv\nType=tmpfs\n",
		"/etc/systemd/system/postgresql@.service.d/machine.conf": "[Service]\nExecStartPre=systemd-tmpfiles --create --prefix=/run/postgresql\n",
	})
	files = examples(t, files, []string{"single.md", "postgres.md"}, []string{"single", "postgres"})
	const rules = "/usr/share/doc/blockferry/examples/single/56-blockferry-ssd.rules"
	files[rules] = strings.Replace(files[rules], "Amazon EC2 NVMe Instance Storage", guestModel, 1)
	return guest{Systemd: true, Files: files, Memory: "1400M", Disks: []disk{{Size: singleSSD << 20}}, Timeout: 10 * time.Minute}
}

// keepEtc has what the page installs be there at the next boot.
func keepEtc(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		to := filepath.Join(uml.Etc, filepath.Dir(name))
		if err := os.MkdirAll(to, 0o755); err != nil {
			t.Fatal(err)
		}
		run(t, "cp", "-a", "/etc/"+name, to+"/")
	}
	outlast(t)
}

// outlast has what is in the guest's folder be there at the next boot.
func outlast(t *testing.T) {
	t.Helper()
	dir, err := os.Open(uml.Dir)
	if err == nil {
		err = errors.Join(unix.Syncfs(int(dir.Fd())), dir.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The single machine of the manual, and PostgreSQL on it, by the commands and the files of
// their pages. The power goes under load, and the SSD comes back blank: the machine comes up by
// itself, the server runs, with all that was durable before the last cut. At a stop of the volume what
// stands on it ends first.
func TestSingle(t *testing.T) {
	if !uml.Inside() && os.Geteuid() != 0 {
		t.Skip("files of several owners are kept for the next boot: needs root")
	}
	version := filepath.Base(filepath.Dir(pgPrograms(t)))
	unit := "postgresql@" + version + "-main.service"
	inGuest(t, singleMachine(t), func(t *testing.T) {
		begun := time.Now()
		passed := func(what string) {
			t.Helper()
			t.Logf("MEASURED %5.1f s: %s", time.Since(begun).Seconds(), what)
		}
		c := installedCLI(t)
		page := readManual(t, "single.md")
		database := readManual(t, "postgres.md", "postgresql/15/", "postgresql/"+version+"/", "@15-", "@"+version+"-", "pg_createcluster 15", "pg_createcluster "+version)
		server := newPg(t, "/run/postgresql")
		if uml.Boot() == 0 {
			for m, all := range map[*manual][]string{page: {"Setting up", "What is lost", "The SSD fails while the machine runs"}, database: {"Setting up", "Where the volume is primary", "After a restore or a failover"}} {
				if got := m.sections(); !slices.Equal(got, all) {
					t.Errorf("%s has other commands than are run here: %q", m.page, got)
				}
			}
			run(t, "systemctl", "start", "machine.service", "srv.mount")
			page.run(t, "Setting up", map[string]string{
				"apt install ./blockferry_VERSION_amd64.deb":                                "", // it is there
				"sed -i s/vol-0123456789abcdef0/vol-YOURS/ /etc/blockferry/blockferry.yaml": "sed -i s,serial:vol-0123456789abcdef0," + ubd(0) + ", /etc/blockferry/blockferry.yaml",
			})
			c.await(t, "up to date", 3*time.Minute, upToDate)
			database.run(t, "Setting up", map[string]string{
				// What this machine has is no cluster of the guest's; the package enables its unit.
				"apt install postgresql":                                  "rm -rf /etc/postgresql/*; ln -s /lib/systemd/system/postgresql.service /etc/systemd/system/multi-user.target.wants/",
				"systemctl start " + strings.TrimSuffix(unit, ".service"): "systemctl start " + unit + "; systemctl is-active " + unit,
			})
			// A boot of the guest starts what is enabled here, and no more.
			run(t, "mv", "/etc/systemd/system/multi-user.target.wants", "/etc/systemd/system/guest.target.wants")
			keepEtc(t, "blockferry", "udev/rules.d", "fstab", "systemd/system", "postgresql", "postgresql-common")
			passed("set up")
			server.prepare(t)
			singleLoad(t, c, page, server)
			passed("the power goes")
			if t.Failed() {
				return
			}
			t.Fatal(uml.Reboot())
		}
		awaitState(t, unit, "active", "postgresql.service", "srv-data.mount", "blockferry-volume@data.service", "blockferry.service", "machine.service")
		passed("the server runs again")
		singleCameBack(t, c, database, server)
		passed("looked at")
		singleFollows(t, database, unit)
		passed("followed its role")
		run(t, "systemctl", "stop", "blockferry-volume@data.service")
		if mounted(t, singleDir) || server.runs(t) {
			t.Error("still mounted, or in use, after its volume was stopped")
		}
		if stopped, unmounted := unitTime(t, unit, "InactiveEnter"), unitTime(t, "srv-data.mount", "ActiveExit"); stopped > unmounted {
			t.Errorf("the server ended at %d, the file system was unmounted from %d on", stopped, unmounted)
		}
		if log := mustRead(t, uml.Dir+"/volume.log"); !strings.Contains(log, "data: down, cleanly") {
			t.Errorf("the volume's unit says:\n%s", log)
		}
		passed("stopped")
		run(t, "systemctl", "start", "srv-data.mount")
		c.await(t, "up again", 3*time.Minute, upToDate)
		ssd, err := filepath.EvalSymlinks("/dev/disk/by-id/blockferry-ssd")
		if err != nil {
			t.Fatal(err)
		}
		unplug(t, ssd)
		c.says(t, 2*time.Minute, "is gone since", "blockferry down --force")
		page.run(t, "The SSD fails while the machine runs", nil)
		c.await(t, "down", time.Minute, func(v status.Volume) bool { return !v.Up })
	})
}

// singleLoad writes until the very last, and notes what it was told.
func singleLoad(t *testing.T, c *cli, page *manual, server *pg) {
	t.Helper()
	records := startRecords(singleDir + "/records")
	bench := server.load(t, "-t", "400")
	bench.await(t, 300)
	if said := page.run(t, "What is lost", nil); !strings.Contains(said, "ebs") {
		t.Errorf("status names no replica: %s", said)
	}
	transactions := bench.result(t)
	noted, err := records()
	if err != nil {
		t.Error(err)
	}
	noted.save(t, uml.Dir+"/records.json")
	transactions.save(t, uml.Dir+"/transactions.json")
	outlast(t)
}

// singleCameBack judges what is there after a boot.
func singleCameBack(t *testing.T, c *cli, page *manual, server *pg) {
	t.Helper()
	cut := cutSaid(t, mustRead(t, uml.Dir+"/agent.log"))
	loadTold(t, uml.Dir+"/records.json").judge(t, "records", map[int]int{0: recordsIn(t, singleDir+"/records")}, cut)
	server.judge(t, "transactions", loadTold(t, uml.Dir+"/transactions.json"), cut)
	page.run(t, "After a restore or a failover", nil)
	c.await(t, "up to date", 3*time.Minute, upToDate)
}

// awaitState waits until a unit is in a state; when it is not, it and others are shown.
func awaitState(t *testing.T, unit, want string, others ...string) {
	t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(500 * time.Millisecond) { // to ask costs CPU
		state := strings.TrimSpace(run(t, "systemctl", "show", "--property=ActiveState", "--value", unit))
		if state == want {
			return
		}
		if time.Now().After(deadline) {
			out, _ := tryRun(t, "systemctl", append([]string{"status", "--no-pager", unit}, others...)...)
			t.Fatalf("%s is %s, want %s:\n%s", unit, state, want, out)
		}
	}
}

// singleFollows has the server follow the volume's role, as with several nodes.
func singleFollows(t *testing.T, page *manual, unit string) {
	t.Helper()
	const target = "blockferry-primary@data.target"
	page.run(t, "Where the volume is primary", nil)
	run(t, "systemctl", "start", target) // it runs
	run(t, "systemctl", "stop", target)
	awaitState(t, unit, "inactive", target)
	if !mounted(t, singleDir) {
		t.Error("the mount, which is fstab's, is gone")
	}
	run(t, "systemctl", "start", target)
	awaitState(t, unit, "active", target)
}

// The SSD's name is given in the same way wherever it is given.
func TestSingleName(t *testing.T) {
	if uml.Inside() {
		return
	}
	name := regexp.MustCompile(`(?m)^ *(SUBSYSTEM==.*blockferry-ssd")$`)
	here := name.FindStringSubmatch(mustRead(t, "../deploy/single/56-blockferry-ssd.rules"))
	there := name.FindStringSubmatch(mustRead(t, "../deploy/ec2/user-data.yaml.tftpl"))
	if here == nil || there == nil || here[1] != there[1] {
		t.Errorf("%q and %q", here, there)
	}
}
