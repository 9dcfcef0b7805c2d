package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// stubSystemctl keeps a list of units that are active and one of those enabled, and records
// what changes them. A file UNIT.PROPERTY holds what 'show --value' says.
const stubSystemctl = `#!/bin/sh
cd "$STUB" || exit 9
[ "$1" != --quiet ] || shift
what=$1
shift
case $what in
is-active) grep -qx "$1" active ;;
is-enabled) grep -qx "$1" enabled ;;
show)
    case $1 in *,*) exit 0 ;; esac # of many, nothing is known
    cat "$3.${1#--property=}" 2>/dev/null
    exit 0 ;;
*)
    echo "$what $*" >>calls
    case $what in
    start) echo "$1" >>active ;;
    stop) grep -vx "$1" active >rest; mv rest active ;;
    enable) echo "$1" >>enabled ;;
    disable) grep -vx "$1" enabled >rest; mv rest enabled ;;
    esac
    exit 0 ;;
esac
`

// withSystemctl runs a script beside that stub, and returns what it said, and its calls.
func withSystemctl(t *testing.T, dir string, env []string, script string, args ...string) (said string, calls []string) {
	t.Helper()
	for name, text := range map[string]string{"bin/systemctl": stubSystemctl, "bin/udevadm": "#!/bin/sh\n"} {
		if err := os.MkdirAll(dir+"/bin", 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(dir+"/calls", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", append([]string{script}, args...)...)
	cmd.Env = append([]string{"PATH=" + dir + "/bin:/usr/bin:/bin", "STUB=" + dir}, env...)
	out, _ := cmd.CombinedOutput()
	return string(out), strings.Split(strings.TrimSpace(mustRead(t, dir+"/calls")), "\n")
}

// A unit that somebody has stopped stays so when the agent is restarted. The target is started
// when it is not active, and when the volume was away since.
func TestRoleLeavesWhatRuns(t *testing.T) {
	const target, device = "blockferry-primary@data.target", "dev-mapper-data.device"
	script, err := filepath.Abs("../deploy/hooks/role")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := exec.LookPath("systemd-escape"); err != nil {
		t.Skip(err)
	}
	for name, c := range map[string]struct {
		active, since, appeared string
		starts                  bool
	}{
		"not active":                    {"", "20", "10", true},
		"active all the time":           {target, "20", "10", false},
		"the device came again":         {target, "20", "30", true},
		"of the device nothing is said": {target, "20", "", true},
	} {
		dir := t.TempDir()
		for name, text := range map[string]string{"active": c.active + "\n", "enabled": "", target + ".Wants": "one.service\n",
			target + ".ActiveEnterTimestampMonotonic": c.since + "\n", device + ".ActiveEnterTimestampMonotonic": c.appeared + "\n"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		said, calls := withSystemctl(t, dir, []string{"BLOCKFERRY_EVENT=after-up", "BLOCKFERRY_VOLUME=data", "BLOCKFERRY_DEVICE=/dev/mapper/data"}, roleScript(t, script, dir))
		if started := slices.Contains(calls, "start "+target); started != c.starts || strings.Contains(said, "left as they are") == c.starts {
			t.Errorf("%s: %q; it says: %s", name, calls, said)
		}
	}
}

// roleScript is the script for a device that is there.
func roleScript(t *testing.T, script, dir string) string {
	t.Helper()
	const there = `[ -e "$BLOCKFERRY_DEVICE" ]`
	text := mustRead(t, script)
	if !strings.Contains(text, there) {
		t.Fatal("the script does not ask whether the device is there")
	}
	path := filepath.Join(dir, "role")
	if err := os.WriteFile(path, []byte(strings.Replace(text, there, "true", 1)), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// A removal that is broken off leaves what it had ended as it was; what was not enabled, or did not
// run, does neither then. One that is refused has nothing to bring back.
func TestPackageRemovalBrokenOff(t *testing.T) {
	dir := t.TempDir()
	text := mustRead(t, "../deploy/package/maintain")
	for was, now := range map[string]string{"/run/systemd/system": dir, "/etc/systemd/system": dir + "/units", "/run/blockferry-": dir + "/blockferry-", "/sys/block": dir + "/block"} {
		if !strings.Contains(text, was) {
			t.Fatalf("the script has no %s", was)
		}
		text = strings.ReplaceAll(text, was, now)
	}
	script := dir + "/maintain"
	link := dir + "/units/multi-user.target.wants/blockferry-volume@data.service"
	if err := os.MkdirAll(filepath.Dir(link), 0o700); err != nil {
		t.Fatal(err)
	}
	const template = "/usr/lib/systemd/system/blockferry-volume@.service"
	if err := os.Symlink(template, link); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"maintain": text, "active": agentUnit + "\n" + deadManUnit + "\n", "enabled": deadManUnit + "\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	lists := func() string {
		active, enabled := strings.Fields(mustRead(t, dir+"/active")), strings.Fields(mustRead(t, dir+"/enabled"))
		slices.Sort(active)
		return strings.Join(active, " ") + " | " + strings.Join(enabled, " ")
	}
	before := lists()
	said, calls := withSystemctl(t, dir, nil, script, "remove")
	if _, err := os.Lstat(link); lists() != " | " || !os.IsNotExist(err) {
		t.Fatalf("removed: %s, %v, %q: %s", lists(), err, calls, said)
	}
	said, calls = withSystemctl(t, dir, nil, script, "restore")
	if at, err := os.Readlink(link); lists() != before || at != template {
		t.Errorf("broken off: %s, want %s; %s, %v, %q: %s", lists(), before, at, err, calls, said)
	}
	if i, j := slices.Index(calls, "start "+deadManUnit), slices.Index(calls, "start "+agentUnit); i < 0 || j < i {
		t.Errorf("the agent is started before the dead-man: %q", calls)
	}
	if err := os.MkdirAll(dir+"/blockferry-deadman", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/blockferry-deadman/lease-data", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"remove", "restore"} {
		if said, calls := withSystemctl(t, dir, nil, script, what); lists() != before || calls[0] != "" {
			t.Errorf("%s under a lease: %s, %q: %s", what, lists(), calls, said)
		}
	}
	if !strings.Contains(mustRead(t, "../deploy/package/deb-postinst"), "abort-remove) /usr/lib/blockferry/maintain restore ;;") {
		t.Error("dpkg does not call it")
	}
}
