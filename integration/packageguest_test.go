package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/cmd/blockferry/status"
	"blockferry/integration/uml"
)

// packagesVar tells a guest where the packages are.
const packagesVar = "BLOCKFERRY_PACKAGES"

// packageManager is how a package is installed and removed.
type packageManager struct {
	kind            string
	install, remove []string
}

// Triggers would make the index of all the machine's manuals, which has nothing to do with
// it; what the rpm needs is there under Debian's names. The scripts run as they do anywhere.
var packageManagers = map[string]packageManager{
	"deb": {"deb", []string{"dpkg", "--no-triggers", "--install"}, []string{"dpkg", "--no-triggers", "--remove", "blockferry"}},
	"rpm": {"rpm", []string{"rpm", "--force-debian", "--nodeps", "--upgrade", "--oldpackage"}, []string{"rpm", "--force-debian", "--nodeps", "--erase", "blockferry"}},
}

const (
	agentUnit   = "blockferry.service"
	deadManUnit = "blockferry-deadman.service"
	volumeUnit  = "blockferry-volume@data.service"
)

// packaged is a machine on which packages come and go under load.
type packaged struct {
	*cli
	t       *testing.T
	manager packageManager
	writer  *writer
	suspend *suspendWatch
}

// suspendLimit is how long the volume may be suspended, of the time that the guest was run for. A cut
// takes milliseconds; at the default stall-limit, which is this, the dead-man ends one that lasts.
const suspendLimit = time.Second

var packageHistory = history{Seed: 53, Size: 24 << 20, MaxBytes: 64 << 10, Pause: 10 * time.Millisecond}

// packageGuest runs fn in a guest under systemd that has no blockferry yet.
func packageGuest(t *testing.T, kind string, fn func(p *packaged)) {
	t.Helper()
	var env []string
	if !uml.Inside() {
		env = []string{packagesVar + "=" + uml.GuestPath(packagesOrSkip(t, packageManagers[kind].install[0]))}
	}
	inGuest(t, guest{Systemd: true, Bare: true, Files: logs(map[string]string{}), Env: env, Disks: []disk{{Size: 200 << 20}, {Size: 200 << 20}}, Timeout: 8 * time.Minute}, func(t *testing.T) {
		fn(&packaged{cli: installedCLI(t), t: t, manager: packageManagers[kind]})
	})
}

func (p *packaged) install(version string) (said string) {
	p.t.Helper()
	began := time.Now()
	command := append(append([]string{}, p.manager.install...), packageFile(os.Getenv(packagesVar), p.manager.kind, version))
	said = run(p.t, command[0], command[1:]...)
	p.t.Logf("MEASURED %s of %s in %.1fs:\n%s", p.manager.kind, version, time.Since(began).Seconds(), said)
	if out := run(p.t, p.binary, "version"); !strings.Contains(out, "blockferry "+version+" ") {
		p.t.Fatalf("installed is '%s'", out)
	}
	return said
}

func (p *packaged) remove() (said string, err error) {
	p.t.Helper()
	said, err = tryRun(p.t, p.manager.remove[0], p.manager.remove[1:]...)
	p.t.Logf("removal: %v\n%s", err, said)
	return said, err
}

func (p *packaged) property(unit, name string) string {
	p.t.Helper()
	return strings.TrimSpace(run(p.t, "systemctl", "show", "--property="+name, "--value", unit))
}

func (p *packaged) wantState(unit, want string) {
	p.t.Helper()
	if got := p.property(unit, "ActiveState"); got != want {
		p.t.Errorf("%s is %s, want it %s", unit, got, want)
	}
}

// activeSince is when a unit became active, in microseconds of this boot.
func (p *packaged) activeSince(unit string) int64 {
	p.t.Helper()
	n, err := strconv.ParseInt(p.property(unit, "ActiveEnterTimestampMonotonic"), 10, 64)
	if err != nil || n == 0 {
		p.t.Fatalf("%s became active at %d, %v", unit, n, err)
	}
	return n
}

// enabled says whether systemd would start a unit at the next boot.
func (p *packaged) enabled(unit string) bool {
	p.t.Helper()
	found, err := filepath.Glob("/etc/systemd/system/*.wants/" + unit)
	if err != nil {
		p.t.Fatal(err)
	}
	return len(found) > 0
}

func (p *packaged) agentLog() string {
	p.t.Helper()
	text, err := os.ReadFile(uml.Dir + "/agent.log")
	if err != nil {
		p.t.Fatal(err)
	}
	return string(text)
}

// begin makes one volume and its replica, and has it written to.
func (p *packaged) begin() {
	p.t.Helper()
	p.configure(oneReplica(ubd(0), ubd(1)))
	p.must(p.t, "create")
	run(p.t, "systemctl", "enable", "--now", deadManUnit, agentUnit)
	run(p.t, "systemctl", "enable", "--now", volumeUnit)
	p.await(p.t, "up to date", time.Minute, upToDate)
	p.suspend = watchSuspends(p.t, "data", "data-base")
	p.writer = startWriter(p.t, "/dev/mapper/data", packageHistory, 1)
	p.writer.awaitWrites(p.t, 50)
	p.must(p.t, "sync", "--timeout", "60s", "data")
	p.writer.takeSlowest()
}

func (p *packaged) configure(text string) {
	p.t.Helper()
	if err := os.WriteFile(p.config, []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

// goesOn checks that writers and replication do, and that nothing was copied or compared in
// full since the agent's log had so many bytes.
func (p *packaged) goesOn(what string, since int) {
	p.t.Helper()
	p.writer.awaitWrites(p.t, 50)
	acked := p.writer.acked()
	p.must(p.t, "sync", "--timeout", "60s", "data")
	p.await(p.t, "up to date", time.Minute, upToDate)
	log := p.agentLog()[since:]
	if strings.Contains(log, `"plan":"full`) || strings.Contains(log, `"plan":"compare`) || !strings.Contains(log, `"plan":"incremental`) {
		p.t.Errorf("%s: replication did not go on where it was:\n%s", what, log)
	}
	p.t.Logf("MEASURED %s: write %d, the slowest took %v", what, acked, p.noStall(what).Round(time.Millisecond))
}

// noStall is how long the slowest write since the last look took. What the guest was not run for,
// and what its disks took on a busy machine, is in it: how long the volume was suspended,
// the watch says. So it fails only for what no load explains.
func (p *packaged) noStall(what string) time.Duration {
	p.t.Helper()
	slowest := p.writer.takeSlowest()
	if slowest > 30*time.Second {
		p.t.Errorf("%s: a write took %v", what, slowest)
	}
	return slowest
}

// TestPackageDeb and TestPackageRpm: an installation starts nothing; an upgrade under load
// replaces the dead-man and the agent, in this order, and nothing else; writers and
// replication go on.
func TestPackageDeb(t *testing.T) { packageGuest(t, "deb", upgradePackage) }
func TestPackageRpm(t *testing.T) { packageGuest(t, "rpm", upgradePackage) }

func upgradePackage(p *packaged) {
	t := p.t
	before := headAndTail(t, ubd(0))
	p.install(olderPackage)
	for _, unit := range []string{agentUnit, deadManUnit} {
		p.wantState(unit, "inactive")
		if p.enabled(unit) {
			t.Errorf("%s was enabled by the installation", unit)
		}
	}
	// Nor does the configuration that comes with it name a disk.
	if out, err := tryRun(t, "systemctl", "start", agentUnit); err == nil {
		t.Errorf("the agent began with the packages' configuration: %s", out)
	}
	if !bytes.Equal(headAndTail(t, ubd(0)), before) || strings.Contains(run(t, "dmsetup", "ls"), "data") {
		t.Error("the installation touched a disk")
	}
	run(t, "systemctl", "reset-failed", agentUnit)
	p.begin()

	pids := map[string]string{}
	for _, unit := range []string{agentUnit, deadManUnit} {
		pids[unit] = p.property(unit, "MainPID")
	}
	volumeSince, deadManSince, logged := p.activeSince(volumeUnit), p.activeSince(deadManUnit), len(p.agentLog())
	epoch := p.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Position != nil }).Position
	p.install(newerPackage)
	for unit, was := range pids {
		p.wantState(unit, "active")
		now := p.property(unit, "MainPID")
		exe, err := os.Readlink("/proc/" + now + "/exe")
		if now == was || err != nil || exe != p.binary {
			t.Errorf("%s is process %s, was %s; it runs '%s' (%v)", unit, now, was, exe, err)
		}
	}
	if out := p.must(t, "status", "--json"); !strings.Contains(out, `"version":"`+newerPackage+`"`) {
		t.Errorf("the agent is another one: %.200s", out)
	}
	deadMan, agent := p.activeSince(deadManUnit), p.activeSince(agentUnit)
	if deadMan == deadManSince || agent < deadMan {
		t.Errorf("the dead-man began at %d µs, now at %d, and the agent at %d: want it before the agent", deadManSince, deadMan, agent)
	}
	if now := p.activeSince(volumeUnit); now != volumeSince {
		t.Errorf("the volume's unit became active at %d µs, and again at %d", volumeSince, now)
	}
	p.goesOn("upgrade", logged)
	if now := p.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Position != nil }).Position; now.Epoch <= epoch.Epoch {
		t.Errorf("position %v before, %v now", epoch, now)
	}
	acked := p.writer.stop(t)
	p.suspend.end(t, suspendLimit)
	p.syncAndSettle(t, ubd(1))
	judgeDevice(t, ubd(1), packageHistory, acked, acked)
}

// headAndTail is where everything of blockferry's stands on a disk.
func headAndTail(t *testing.T, device string) []byte {
	t.Helper()
	const mib = 1 << 20
	file, err := os.OpenFile(device, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	size := sectors(t, device) * 512
	both := alignedBuffer(2 * mib)
	for i, at := range []int64{0, size - mib} {
		if _, err := file.ReadAt(both[i*mib:(i+1)*mib], at); err != nil {
			t.Fatal(err)
		}
	}
	return both
}

// TestPackageDebRemoved and TestPackageRpmRemoved: while a lease is held here nothing is
// removed; otherwise the programs go, and the volume stays up, with all that is on it, for
// the next installation to go on with.
func TestPackageDebRemoved(t *testing.T) { packageGuest(t, "deb", removePackage) }
func TestPackageRpmRemoved(t *testing.T) { packageGuest(t, "rpm", removePackage) }

func removePackage(p *packaged) {
	t := p.t
	p.install(olderPackage)
	p.begin()
	agent, deadMan := p.property(agentUnit, "MainPID"), p.property(deadManUnit, "MainPID")
	unchanged := func(what string) {
		t.Helper()
		if a, d := p.property(agentUnit, "MainPID"), p.property(deadManUnit, "MainPID"); a != agent || d != deadMan {
			t.Errorf("%s: agent and dead-man are processes %s and %s, were %s and %s", what, a, d, agent, deadMan)
		}
	}
	// A note of a volume that does not exist: the dead-man does not look at it before its next start.
	note := "/run/blockferry-deadman/lease-other"
	if err := os.WriteFile(note, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if said, err := p.remove(); err == nil || !strings.Contains(said, "blockferry secondary NAME") || !strings.Contains(said, "other") {
		t.Errorf("removed under a lease: %v", err)
	}
	unchanged("refused removal")
	if err := os.Remove(note); err != nil {
		t.Fatal(err)
	}
	saved := "/var/lib/blockferry/rescue/saved"
	if err := os.MkdirAll(filepath.Dir(saved), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(saved, []byte("all that one copy had"), 0o600); err != nil {
		t.Fatal(err)
	}
	said, err := p.remove()
	if err != nil || !strings.Contains(said, "volume 'data' stays up") {
		t.Errorf("not removed, or not told of: %v", err)
	}
	if _, err := os.Stat(p.binary); !os.IsNotExist(err) {
		t.Errorf("%s: %v", p.binary, err)
	}
	for _, unit := range []string{agentUnit, deadManUnit, volumeUnit} {
		if unit != volumeUnit {
			p.wantState(unit, "inactive")
		}
		if p.enabled(unit) {
			t.Errorf("%s is enabled still", unit)
		}
	}
	p.writer.awaitWrites(t, 50)
	t.Logf("MEASURED removal: the slowest write took %v", p.noStall("removal").Round(time.Millisecond))
	acked := p.writer.stop(t)
	p.suspend.end(t, suspendLimit)
	judgeDevice(t, "/dev/mapper/data", packageHistory, acked, acked)

	disks := append(headAndTail(t, ubd(0)), headAndTail(t, ubd(1))...)
	if p.manager.kind == "deb" {
		t.Logf("purge: %s", run(t, "dpkg", "--no-triggers", "--purge", "blockferry"))
	}
	if _, err := os.Stat(p.config); !os.IsNotExist(err) {
		t.Errorf("the configuration is there still: %v", err)
	}
	if _, err := os.Stat(saved); err != nil {
		t.Errorf("what was saved is gone: %v", err)
	}
	if !bytes.Equal(disks, append(headAndTail(t, ubd(0)), headAndTail(t, ubd(1))...)) {
		t.Error("the purge changed what is on the disks")
	}

	// As if nothing had been.
	logged := len(p.agentLog())
	p.install(newerPackage)
	if p.enabled(agentUnit) || p.enabled(deadManUnit) {
		t.Error("the second installation enabled what the first removal had disabled")
	}
	p.configure(oneReplica(ubd(0), ubd(1)))
	run(t, "systemctl", "start", deadManUnit, agentUnit)
	p.await(t, "up to date", time.Minute, upToDate)
	if log := p.agentLog()[logged:]; strings.Contains(log, `"plan":"full`) || strings.Contains(log, `"plan":"compare`) || !strings.Contains(log, `"plan":"incremental`) {
		t.Errorf("after the second installation replication did not go on where it was:\n%s", log)
	}
	p.syncAndSettle(t, ubd(1))
	judgeDevice(t, ubd(1), packageHistory, acked, acked)
	if p.manager.kind != "deb" {
		return // the rpm's is the same script
	}

	// An agent that would refuse the configuration is not put in the place of one that runs.
	agent, deadMan = p.property(agentUnit, "MainPID"), p.property(deadManUnit, "MainPID")
	p.configure("volumes:\n  - nonsense: 1\n")
	if said := p.install(olderPackage); !strings.Contains(said, "was left running") || !strings.Contains(said, "systemctl restart blockferry") {
		t.Error("it is not said that the agent is the one from before")
	}
	if now := p.property(deadManUnit, "MainPID"); now == deadMan {
		t.Error("the dead-man is the one from before")
	} else {
		deadMan = now
	}
	unchanged("configuration that is refused")
	p.must(t, "sync", "--timeout", "60s", "data")
}
