// Package ocf holds the tests of the OCF resource agent (deploy/ocf/volume) beside stand-ins
// for blockferry and Pacemaker's tools. TestPacemakerNFS, in package integration, has the real ones.
package ocf

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/status"
)

const (
	agent = "../../deploy/ocf/volume"
	// functions is where the package resource-agents has what every agent includes.
	functions = "/usr/lib/ocf/lib/heartbeat"

	// The standard's exit codes.
	success, failed, unimplemented, notInstalled, notConfigured, notRunning, promoted, failedPromoted = 0, 1, 3, 5, 6, 7, 8, 9
)

// stage is a place to run the agent at: with commands that are asked what to do, and a mark
// of its own.
type stage struct {
	t   *testing.T
	dir string
	env []string
}

// answers are what the commands do: a command line, and the shell's words for it.
type answers map[string]string

func newStage(t *testing.T, what answers) *stage {
	t.Helper()
	from := functions
	if _, err := os.Stat(from + "/ocf-shellfuncs"); errors.Is(err, fs.ErrNotExist) {
		if from = os.Getenv("OCF_FUNCTIONS_DIR"); from == "" {
			if os.Getenv("BLOCKFERRY_REQUIRE_GUEST") != "" {
				t.Fatal(err)
			}
			t.Skip("the package resource-agents is not installed")
		}
	}
	s := &stage{t: t, dir: t.TempDir()}
	for _, sub := range []string{"bin", "do", "run", "sys"} {
		if err := os.Mkdir(filepath.Join(s.dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A command line that is not foreseen fails, as every real one might.
	const stand = "#!/bin/sh\nline=\"${0##*/} $*\"\necho \"$line\" >>\"$STAGE/calls\"\ndo=$STAGE/do/$(echo \"$line\" | tr ' /' '_+')\n[ -e \"$do\" ] || { echo \"$line: not now\" >&2; exit 3; }\n. \"$do\"\n"
	for _, name := range []string{"blockferry", "crm_attribute", "crm_mon", "crm_node"} {
		s.write("bin/"+name, stand, 0o755)
	}
	// Nobody is waited for here, but the clock goes on.
	s.write("bin/sleep", "#!/bin/sh\nread -r up _ <\"$STAGE/proc/uptime\"\necho \"$((${up%%.*} + ${1%%.*})).00 0.00\" >\"$STAGE/proc/uptime\"\n", 0o755)
	s.write("proc/uptime", "1000.00 0.00\n", 0o644)
	for line, do := range map[string]string{lastWas: "echo -\n", lastIs: ""} { // nothing is recorded, but can be
		s.write("do/"+strings.NewReplacer(" ", "_", "/", "+").Replace(line), do, 0o644)
	}
	for line, do := range what {
		s.write("do/"+strings.NewReplacer(" ", "_", "/", "+").Replace(line), do, 0o644)
	}
	s.env = []string{"PATH=" + s.dir + "/bin:/usr/sbin:/usr/bin:/sbin:/bin", "STAGE=" + s.dir, "OCF_ROOT=/usr/lib/ocf", "OCF_FUNCTIONS_DIR=" + from, "HA_RSCTMP=" + s.dir + "/run",
		"SYSFS_PATH=" + s.dir + "/sys", "PROC_PATH=" + s.dir + "/proc", "OCF_RESOURCE_INSTANCE=vol", "OCF_RESKEY_volume=data", "OCF_RESKEY_CRM_meta_on_node=node-a"}
	return s
}

// What is recorded of the node that was promoted last.
const (
	lastWas = "crm_attribute --type=crm_config --name=blockferry-data --query --quiet --default=-"
	lastIs  = "crm_attribute --type=crm_config --name=blockferry-data --quiet --update=node-a"
)

func (s *stage) write(name, text string, mode os.FileMode) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		s.t.Fatal(err)
	}
}

// is says what the agent's status is from now on, or has a command say so.
func (s *stage) is(v *status.Volume) {
	s.t.Helper()
	s.write("do/blockferry_status_--json_data", becomes(s.t, v), 0o644)
}

// becomes is what prints a status.
func becomes(t *testing.T, v *status.Volume) string {
	t.Helper()
	if v == nil {
		return "exit 5\n"
	}
	text, err := json.Marshal(status.Document{Version: "test", Volumes: []status.Volume{*v}})
	if err != nil {
		t.Fatal(err)
	}
	return "cat <<'END'\n" + string(text) + "\nEND\n"
}

// then is what a command does that changes the status.
func then(t *testing.T, v *status.Volume) string {
	t.Helper()
	return "cat >\"$STAGE/do/blockferry_status_--json_data\" <<'EOF'\n" + becomes(t, v) + "EOF\necho done\n"
}

func (s *stage) started(yes bool) {
	s.t.Helper()
	if yes {
		s.write("run/blockferry-data.started", "", 0o644)
	}
}

func (s *stage) isStarted() bool {
	_, err := os.Stat(filepath.Join(s.dir, "run/blockferry-data.started"))
	return err == nil
}

// run has the agent do something, and returns its exit code and what it called, but for
// questions about the status, and what it said.
func (s *stage) run(action string, env ...string) (code int, calls []string, said string) {
	s.t.Helper()
	os.Remove(filepath.Join(s.dir, "calls"))
	cmd := exec.Command("/bin/sh", agent, action)
	cmd.Env = append(slices.Clone(s.env), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(s.dir, "calls"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); !strings.HasPrefix(line, "blockferry status") && line != lastWas {
			calls = append(calls, line)
		}
	}
	return cmd.ProcessState.ExitCode(), calls, out.String()
}

const scoring = "crm_attribute --promotion --lifetime=reboot --quiet "

func scored(n int) string { return fmt.Sprintf("%s--update=%d", scoring, n) }

const unscored = scoring + "--delete"

func up() *status.Volume {
	return &status.Volume{Name: "data", Device: "/dev/x", Path: "/dev/mapper/data", Role: "Primary", Disk: "UpToDate", Up: true, BothRoles: true, Stage: "up",
		Replicas: []status.Replica{{Name: "other", Peer: "node-b", Disk: "UpToDate"}}}
}

// diskless is up, and its disk went.
func diskless() *status.Volume {
	v := up()
	v.Disk = "Diskless"
	return v
}

// behind is a primary with a replica that is not whole.
func behind() *status.Volume {
	v := up()
	v.Replicas[0].Disk = "Diskless"
	return v
}

func at(stage string) *status.Volume {
	v := up()
	v.Role, v.Disk, v.Up, v.Path, v.Stage = "Secondary", "Consistent", false, "", stage
	// Words may hold anything.
	v.Reason = `say "stage":"up", "up":true, "take-over":{"possible":true, "missing-cuts":0} and 'so on'`
	return v
}

// secondary is a copy; missing is how many cuts it lacks, below 0: nobody knows.
func secondary(missing int) *status.Volume {
	v := at("secondary")
	v.Peers, v.Replicas, v.TakeOver = []string{"node-b", "node-c"}, []status.Replica{}, &status.TakeOver{Possible: true}
	if n := uint64(max(0, missing)); missing >= 0 {
		v.TakeOver.MissingCuts = &n
	}
	return v
}

func useless() *status.Volume {
	v := secondary(0)
	v.TakeOver = &status.TakeOver{Reason: "it strayed"}
	return v
}

func leased() *status.Volume {
	v := secondary(0)
	v.Lease = &status.Lease{Holder: "node-b"}
	return v
}

func oneRole() *status.Volume {
	v := secondary(0)
	v.BothRoles, v.TakeOver = false, nil
	return v
}

// The score of a copy says how good it is: one that is not whole has none, the primary the
// highest, and the more is missing the less.
func TestScores(t *testing.T) {
	for name, c := range map[string]struct {
		v    *status.Volume
		want []string
	}{
		"primary":                {up(), []string{lastIs, scored(10000)}},
		"down":                   {at("down"), []string{scored(5000)}},
		"other nodes are silent": {at("waiting"), []string{scored(5000)}},
		"level":                  {secondary(0), []string{scored(1000)}},
		"what is on its way":     {secondary(2), []string{scored(1000)}},
		"behind":                 {secondary(3), []string{scored(490)}},
		"further behind":         {secondary(1000), []string{scored(410)}},
		"very far behind":        {secondary(1 << 62), []string{scored(10)}},
		"nobody was heard":       {secondary(-1), []string{scored(5)}},
		"strayed or not whole":   {useless(), []string{unscored}},
		"refused":                {at("refused"), []string{unscored}},
		"its disk is away":       {at("absent"), []string{unscored}},
		"for a moment":           {at("busy"), nil},
		"its disk went":          {diskless(), []string{unscored}},
		"a replica's did":        {behind(), []string{lastIs, scored(10000)}},
	} {
		s := newStage(t, nil)
		s.is(c.v)
		s.started(true)
		code, calls, said := s.run("monitor")
		want := success
		if c.v.Disk == "Diskless" {
			want = failedPromoted
		} else if c.v.Up {
			want = promoted
		}
		if code != want || !slices.Equal(calls, c.want) {
			t.Errorf("%s: %d, %q\n%s", name, code, calls, said)
		}
	}
}

// A monitor tells where the volume is, whoever brought it there.
func TestMonitor(t *testing.T) {
	for name, c := range map[string]struct {
		v               *status.Volume // nil: the agent does not answer
		started, device bool
		want            int
		words           string
	}{
		"a secondary":                            {v: secondary(0), started: true, want: success},
		"one that was not started":               {v: secondary(0), want: notRunning},
		"a primary":                              {v: up(), started: true, device: true, want: promoted},
		"one that came up by itself":             {v: up(), device: true, want: promoted},
		"down":                                   {v: at("down"), started: true, want: success},
		"the device is there, and not served":    {v: at("refused"), started: true, device: true, want: failedPromoted, words: "is not served"},
		"the same before a start":                {v: at("refused"), device: true, want: failedPromoted, words: "is not served"},
		"no agent":                               {started: true, want: failed, words: "systemctl start blockferry"},
		"no agent, before a start":               {want: notRunning},
		"no agent, and the device is there":      {started: true, device: true, want: failedPromoted, words: "no agent serves it"},
		"no agent before a start, but a device":  {device: true, want: failedPromoted, words: "no agent serves it"},
		"another volume's device is no concern":  {v: secondary(0), started: true, want: success},
		"up, and its disk is gone":               {v: diskless(), started: true, device: true, want: failedPromoted, words: "its disk is gone"},
		"a volume that is not in the file there": {want: notInstalled, words: "not in this node's blockferry configuration"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, nil)
			if s.is(c.v); c.want == notInstalled {
				s.write("do/blockferry_status_--json_data", "exit 2\n", 0o644)
			}
			s.started(c.started)
			s.write("sys/class/block/dm-0/dm/name", "data-era\n", 0o644)
			if c.device {
				s.write("sys/class/block/dm-1/dm/name", "data\n", 0o644)
			}
			code, _, said := s.run("monitor")
			if code != c.want || !strings.Contains(said, c.words) {
				t.Errorf("%d: %s", code, said)
			}
			if c.words == "" && strings.Contains(said, "ocf-exit-reason") {
				t.Errorf("a reason for nothing: %s", said)
			}
		})
	}
}

// An agent that is being restarted, or looks at its disks, is waited for.
func TestMonitorWaitsForTheAgent(t *testing.T) {
	for name, first := range map[string]*status.Volume{"restarted": nil, "starting": at("starting")} {
		s := newStage(t, nil)
		s.write("later", becomes(t, up()), 0o644)
		s.write("do/blockferry_status_--json_data", "cp \"$STAGE/later\" \"$STAGE/do/blockferry_status_--json_data\"\n"+becomes(t, first), 0o644)
		if code, _, said := s.run("monitor"); code != promoted {
			t.Errorf("%s: %d: %s", name, code, said)
		}
	}
}

// How long, is told by the clock: each try may take its time.
func TestPatience(t *testing.T) {
	for name, c := range map[string]struct{ each, tries int }{"it refuses at once": {0, 21}, "it hangs": {9, 3}} {
		s := newStage(t, nil)
		s.write("do/blockferry_status_--json_data", fmt.Sprintf("sleep %d\necho >>\"$STAGE/tries\"\nexit 5\n", c.each), 0o644)
		s.started(true)
		code, _, said := s.run("monitor")
		tries, err := os.ReadFile(filepath.Join(s.dir, "tries"))
		if err != nil || len(tries) != c.tries || code != failed {
			t.Errorf("%s: %d after %d tries: %v %s", name, code, len(tries), err, said)
		}
	}
}

// Whatever is wrong with the configuration, what counts to a stop and a monitor is what is there.
func TestStopWithoutAProgram(t *testing.T) {
	for name, c := range map[string]struct {
		env           string
		device        bool
		stop, monitor int
	}{
		"no blockferry":               {"PATH=/usr/bin:/bin", false, success, notRunning},
		"no blockferry, and a device": {"PATH=/usr/bin:/bin", true, failed, failedPromoted},
		"a wrong word":                {"OCF_RESKEY_failover=always", false, success, success},
		"a wrong word, and a device":  {"OCF_RESKEY_failover=always", true, failed, failedPromoted},
		"no volume is named":          {"OCF_RESKEY_volume=", true, success, notConfigured},
	} {
		for action, want := range map[string]int{"stop": c.stop, "monitor": c.monitor} {
			s := newStage(t, nil)
			s.is(secondary(0))
			s.started(true)
			if c.device {
				s.write("sys/class/block/dm-1/dm/name", "data\n", 0o644)
			}
			if code, _, said := s.run(action, c.env); code != want {
				t.Errorf("%s: %s: %d: %s", name, action, code, said)
			}
		}
	}
}

func TestStart(t *testing.T) {
	for name, c := range map[string]struct {
		v              *status.Volume
		other, planned string // is promoted, or about to be
		do             func(*testing.T) answers
		want           int
		calls          []string
		words          string
	}{
		"a secondary":   {v: secondary(1), calls: []string{scored(1000)}},
		"a useless one": {v: useless(), calls: []string{unscored}},
		"a lease's":     {v: leased(), want: notConfigured, words: "promote: auto"},
		"of one role":   {v: oneRole(), want: notConfigured, words: "'peers' and 'replicas'"},
		"without agent": {want: failed, words: "systemctl start blockferry"},
		"a disk that is a primary's, and may be all there is": {v: at("down"), calls: []string{scored(5000)}},
		"a primary, which stands down": {v: up(), do: func(t *testing.T) answers { return answers{"blockferry secondary data": then(t, secondary(0))} },
			calls: []string{"blockferry secondary data", scored(1000)}},
		"a primary whose replicas are away": {v: up(), do: func(t *testing.T) answers { return answers{"blockferry down --force data": then(t, at("down"))} },
			calls: []string{"blockferry secondary data", "blockferry down --force data", scored(5000)}},
		"a primary that is in use": {v: up(), want: failed, words: "can't be taken down", calls: []string{"blockferry secondary data", "blockferry down --force data"}},
		"a primary beside another": {v: up(), other: "node-b", do: func(t *testing.T) answers { return answers{"blockferry secondary --force data": then(t, useless())} },
			calls: []string{"blockferry secondary data", "blockferry secondary --force data", unscored}},
		"in use beside another": {v: up(), other: "node-b", want: failed, words: "does not stand down", calls: []string{"blockferry secondary data", "blockferry secondary --force data"}},
		"one that another left behind": {v: at("refused"), other: "node-b", do: func(t *testing.T) answers { return answers{"blockferry secondary --force data": then(t, useless())} },
			calls: []string{"blockferry secondary data", "blockferry secondary --force data", unscored}},
		"one that can't follow yet": {v: at("absent"), other: "node-b", do: func(t *testing.T) answers { return answers{"blockferry down --force data": "echo down\n"} },
			calls: []string{"blockferry secondary data", "blockferry secondary --force data", "blockferry down --force data", unscored}},
		"one that might come up beside another": {v: at("absent"), other: "node-b", want: failed, words: "may come up by itself",
			calls: []string{"blockferry secondary data", "blockferry secondary --force data", "blockferry down --force data"}},
		"one that comes up once others answer": {v: at("waiting"), do: func(t *testing.T) answers { return answers{"blockferry down --force data": then(t, at("down"))} },
			calls: []string{"blockferry down --force data", scored(5000)}},
		"one that does so whatever is said": {v: at("waiting"), want: failed, words: "may come up by itself", calls: []string{"blockferry down --force data"}},
		"another is only to be":             {v: at("refused"), planned: "node-b", calls: []string{unscored}},
	} {
		var do answers
		if c.do != nil {
			do = c.do(t)
		}
		s := newStage(t, do)
		s.is(c.v)
		code, calls, said := s.run("start", "OCF_RESKEY_CRM_meta_notify_promoted_uname="+c.other, "OCF_RESKEY_CRM_meta_notify_promote_uname="+c.planned)
		if code != c.want || !slices.Equal(calls, c.calls) || s.isStarted() != (c.want == success) || !strings.Contains(said, c.words) {
			t.Errorf("%s: %d, %q, started %v: %s", name, code, calls, s.isStarted(), said)
		}
	}
}

// A stop leaves nothing that can be written, or fails, so that the node is fenced.
func TestStopAndDemote(t *testing.T) {
	stands := func(line string) func(t *testing.T) answers {
		return func(t *testing.T) answers {
			return answers{line: "rm -rf \"$STAGE/sys/class\"\n" + then(t, secondary(0))}
		}
	}
	for name, c := range map[string]struct {
		v            *status.Volume
		device       bool
		do           func(*testing.T) answers
		stop, demote int
		calls        []string // of a demote, before its score
	}{
		"a secondary":                        {v: secondary(0)},
		"down":                               {v: at("down"), calls: []string{"blockferry secondary data"}},
		"a primary":                          {v: up(), device: true, do: stands("blockferry secondary data"), calls: []string{"blockferry secondary data"}},
		"a primary whose replicas are away":  {v: up(), device: true, do: stands("blockferry secondary --force data"), calls: []string{"blockferry secondary data", "blockferry secondary --force data"}},
		"a primary that is in use":           {v: up(), device: true, stop: failed, demote: failed, calls: []string{"blockferry secondary data", "blockferry secondary --force data"}},
		"a device that is not served":        {v: at("refused"), device: true, do: stands("blockferry secondary --force data"), calls: []string{"blockferry secondary data", "blockferry secondary --force data"}},
		"one that is not served, and in use": {v: at("refused"), device: true, stop: failed, demote: failed, calls: []string{"blockferry secondary data", "blockferry secondary --force data"}},
		"no agent":                           {demote: failed},
		"no agent, and a device":             {device: true, stop: failed, demote: failed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, action := range []string{"stop", "demote"} {
				var do answers
				if c.do != nil {
					do = c.do(t)
				}
				s := newStage(t, do)
				s.is(c.v)
				s.started(action == "stop") // what came up by itself is demoted without a start
				if c.device {
					s.write("sys/class/block/dm-1/dm/name", "data\n", 0o644)
				}
				code, calls, said := s.run(action)
				want := map[string]int{"stop": c.stop, "demote": c.demote}[action]
				if code != want || s.isStarted() != ((want == success) == (action == "demote")) {
					t.Errorf("%s: %d, started %v: %s", action, code, s.isStarted(), said)
				}
				if want == failed && !strings.Contains(said, "ocf-exit-reason:volume 'data'") {
					t.Errorf("%s: no reason: %s", action, said)
				}
				if calls = slices.DeleteFunc(calls, func(c string) bool { return strings.HasPrefix(c, scoring) }); !slices.Equal(calls, c.calls) && (action == "demote" || c.device) {
					t.Errorf("%s: %q", action, calls)
				}
				if again, _, said := s.run("monitor"); want == success && action == "stop" && again != notRunning || want == success && action == "demote" && again != success {
					t.Errorf("a monitor after %s: %d: %s", action, again, said)
				}
			}
		})
	}
}

// A stop, and a demotion, leave nothing that the agent brings up by itself a moment later.
func TestStayDown(t *testing.T) {
	const s, sf, d = "blockferry secondary data", "blockferry secondary --force data", "blockferry down --force data"
	for name, c := range map[string]struct {
		action string
		v      *status.Volume
		after  *status.Volume // of a secondary --force, which fails
		down   bool           // succeeds
		want   int
		calls  []string
	}{
		"starting":                       {"stop", at("starting"), nil, true, success, []string{d}},
		"its disk is away":               {"stop", at("absent"), nil, true, success, []string{d}},
		"busy":                           {"stop", at("busy"), nil, true, success, []string{d}},
		"refused":                        {"stop", at("refused"), nil, true, success, []string{d}},
		"it can't be told":               {"stop", at("busy"), nil, false, failed, []string{d}},
		"a secondary":                    {"stop", secondary(0), nil, false, success, nil},
		"down":                           {"stop", at("down"), nil, false, success, nil},
		"a demotion while it starts":     {"demote", at("starting"), nil, true, success, []string{s, d}},
		"one that can't be told":         {"demote", at("starting"), nil, false, failed, []string{s, d}},
		"one that fails halfway":         {"demote", up(), at("starting"), true, success, []string{s, sf, d}},
		"that fails halfway, and a stop": {"stop", up(), at("starting"), true, success, []string{s, sf, d}},
		"one that stays up":              {"demote", up(), up(), true, failed, []string{s, sf}},
	} {
		st := newStage(t, nil)
		st.is(c.v)
		st.started(true)
		if c.after != nil {
			st.write("do/blockferry_secondary_--force_data", then(t, c.after)+"exit 6\n", 0o644)
		}
		if c.down {
			st.write("do/blockferry_down_--force_data", then(t, at("down")), 0o644)
		}
		code, calls, said := st.run(c.action)
		calls = slices.DeleteFunc(calls, func(c string) bool { return strings.HasPrefix(c, scoring) })
		if code != c.want || !slices.Equal(calls, c.calls) {
			t.Errorf("%s: %d, %q: %s", name, code, calls, said)
		}
	}
}

// The disk of a primary that comes back is of before another one was promoted: that one's writes
// are what counts. Where the last promotion was, the cluster knows.
func TestOldPrimary(t *testing.T) {
	const plain = "blockferry primary data"
	for name, c := range map[string]struct {
		v        *status.Volume
		last     string // what the cluster says
		full     bool   // it records nothing
		monitor  []string
		promote  int
		promotes []string
	}{
		"it was here":               {v: at("down"), last: "echo node-a\n", monitor: []string{scored(5000)}, promotes: []string{plain, scored(10000)}},
		"nothing is recorded":       {v: at("down"), last: "echo -\n", monitor: []string{scored(5000)}, promotes: []string{plain, lastIs, scored(10000)}},
		"it was elsewhere":          {v: at("down"), last: "echo node-b\n", monitor: []string{unscored}, promote: failed},
		"nobody can tell":           {v: at("down"), last: "exit 1\n", monitor: []string{unscored}, promote: failed},
		"it starts, and is old":     {v: at("starting"), last: "echo node-b\n", promote: failed},
		"a copy, which asks":        {v: secondary(0), last: "echo node-b\n", monitor: []string{scored(1000)}, promotes: []string{plain, lastIs, scored(10000)}},
		"a copy, if nobody can say": {v: secondary(0), last: "exit 1\n", monitor: []string{scored(1000)}, promotes: []string{plain, scored(10000)}},
		"it can't be recorded":      {v: secondary(0), last: "echo node-b\n", full: true, monitor: []string{scored(1000)}, promote: failed, promotes: []string{plain, lastIs}},
		"up, as an operator wanted": {v: up(), last: "echo node-b\n", monitor: []string{lastIs, scored(10000)}, promotes: []string{lastIs, scored(10000)}},
		"up, and recorded":          {v: up(), last: "echo node-a\n", monitor: []string{scored(10000)}, promotes: []string{scored(10000)}},
	} {
		s := newStage(t, answers{lastWas: c.last, plain: then(t, up())})
		if c.full {
			s.write("do/"+strings.ReplaceAll(lastIs, " ", "_"), "exit 1\n", 0o644)
		}
		s.is(c.v)
		s.started(true)
		if _, calls, said := s.run("monitor"); !slices.Equal(calls, c.monitor) {
			t.Errorf("%s: a monitor: %q: %s", name, calls, said)
		}
		if code, calls, said := s.run("promote"); code != c.promote || !slices.Equal(calls, c.promotes) {
			t.Errorf("%s: %d, %q: %s", name, code, calls, said)
		}
	}
}

// fence is an event of crm_mon's.
func fence(action, target, ended, completed string) string {
	if completed != "" {
		completed = ` completed="` + completed + `"`
	}
	return fmt.Sprintf("    <fence_event status=\"%s\" action=\"%s\" target=\"%s\" client=\"x\" origin=\"node-a\" delegate=\"node-a\"%s/>\n", ended, action, target, completed)
}

// clusterOf has node-b in some state, with a history.
func clusterOf(online, unclean bool, events ...string) string {
	return fmt.Sprintf("cat <<'END'\n<pacemaker-result>\n  <nodes>\n    <node name=\"node-a\" id=\"1\" online=\"true\" unclean=\"false\" type=\"member\"/>\n    <node name=\"node-b\" id=\"2\" online=\"%v\" standby=\"false\" pending=\"false\" unclean=\"%v\" type=\"member\"/>\n  </nodes>\n  <fence_history status=\"0\">\n%s  </fence_history>\n</pacemaker-result>\nEND\n",
		online, unclean, strings.Join(events, ""))
}

// A node was fenced if that was the last that was heard of it: not on Monday, if it was with
// the cluster on Wednesday and then left in order.
func TestFenced(t *testing.T) {
	const crmMon = "do/crm_mon_--one-shot_--output-as=xml"
	monday := fence("reboot", "node-b", "success", "2026-11-23 10:00:00.5 +01:00")
	wednesday := func(action, ended string) string {
		return fence(action, "node-b", ended, "2026-11-25 10:00:00.123456Z")
	}
	seen := clusterOf(true, false, monday)
	for name, c := range map[string]struct {
		before  string // "": it was never seen
		between func(*stage)
		now     string
		want    bool
	}{
		"it was":                         {before: seen, now: clusterOf(false, false, wednesday("reboot", "success"), monday), want: true},
		"for the first time":             {before: clusterOf(true, false), now: clusterOf(false, false, wednesday("off", "success")), want: true},
		"listed in another order":        {before: seen, now: clusterOf(false, false, monday, wednesday("reboot", "success")), want: true},
		"of old, and then it left":       {before: seen, now: clusterOf(false, false, monday)},
		"never, and then it left":        {before: clusterOf(true, false), now: clusterOf(false, false)},
		"it was never seen":              {now: clusterOf(false, false, wednesday("reboot", "success"))},
		"seen as unclean only":           {before: clusterOf(true, true, monday), now: clusterOf(false, false, wednesday("reboot", "success"))},
		"what came last is no fence":     {before: seen, now: clusterOf(false, false, wednesday("on", "success"), monday)},
		"what came last failed":          {before: seen, now: clusterOf(false, false, fence("off", "node-b", "failed", "2026-11-25 10:00:01Z"), wednesday("reboot", "success"))},
		"it failed first":                {before: seen, now: clusterOf(false, false, wednesday("reboot", "success"), fence("off", "node-b", "failed", "2026-11-25 09:00:00Z")), want: true},
		"it is under way":                {before: seen, now: clusterOf(false, false, fence("reboot", "node-b", "pending", ""), monday)},
		"another one was":                {before: seen, now: clusterOf(false, false, fence("reboot", "node-bb", "success", "2026-11-25 10:00:00Z"), monday)},
		"an hour less, at another place": {before: seen, now: clusterOf(false, false, fence("reboot", "node-b", "success", "2026-11-23 09:30:00Z")), want: true},
		"an hour more, and before that":  {before: seen, now: clusterOf(false, false, fence("reboot", "node-b", "success", "2026-11-23 11:30:00 +03:00"))},
		"a time nobody can read":         {before: seen, now: clusterOf(false, false, fence("reboot", "node-b", "success", "soon"))},
		"seen before a stop": {before: seen, between: func(s *stage) { s.run("stop", "OCF_RESKEY_failover=fenced") },
			now: clusterOf(false, false, wednesday("reboot", "success"))},
		"seen before a pause": {before: seen, between: func(s *stage) {
			old := time.Now().Add(-time.Hour)
			if err := os.Chtimes(filepath.Join(s.dir, "run/blockferry-data.seen"), old, old); err != nil {
				t.Error(err)
			}
		}, now: clusterOf(false, false, wednesday("reboot", "success"))},
	} {
		for _, looks := range []string{"monitor", "start"} {
			if looks != "monitor" && name != "it was" {
				continue
			}
			s := newStage(t, cluster("true"))
			s.is(secondary(0))
			s.started(true)
			s.write("do/blockferry_primary_--fenced_node-b_data", then(t, up()), 0o644)
			s.write("do/blockferry_primary_data", then(t, up()), 0o644)
			if c.before != "" {
				s.write(crmMon, c.before, 0o644)
				s.run(looks, "OCF_RESKEY_failover=fenced")
			}
			if c.between != nil {
				c.between(s)
			}
			s.write(crmMon, c.now, 0o644)
			if code, calls, said := s.run("promote", "OCF_RESKEY_failover=fenced"); code != success || slices.Contains(calls, "blockferry primary --fenced node-b data") != c.want {
				t.Errorf("%s, seen by %s: %d, %q: %s", name, looks, code, calls, said)
			}
		}
	}
}

// cluster is what a cluster says of nodes: how it saw node-b and node-c last.
func cluster(stonith string, nodes ...string) answers {
	var b strings.Builder
	b.WriteString("cat <<'END'\n<pacemaker-result>\n  <nodes>\n    <node name=\"node-a\" id=\"1\" online=\"true\" unclean=\"false\" type=\"member\"/>\n")
	for _, n := range nodes {
		name, how, _ := strings.Cut(n, " ")
		online, unclean := how == "online", how == "unclean"
		fmt.Fprintf(&b, "    <node name=\"%s\" id=\"2\" online=\"%v\" standby=\"false\" pending=\"false\" unclean=\"%v\" shutdown=\"false\" type=\"member\"/>\n", name, online, unclean)
	}
	b.WriteString("  </nodes>\n  <fence_history status=\"0\">\n")
	for _, n := range nodes {
		switch name, how, _ := strings.Cut(n, " "); how {
		case "fenced", "online", "unclean": // of those that are not off it is an old one
			fmt.Fprintf(&b, "    <fence_event action=\"reboot\" target=\"%s\" client=\"x\" origin=\"node-a\" status=\"success\" delegate=\"node-a\" completed=\"now\"/>\n", name)
		case "failed":
			fmt.Fprintf(&b, "    <fence_event action=\"reboot\" target=\"%s\" client=\"x\" origin=\"node-a\" status=\"failed\" delegate=\"node-a\" completed=\"now\"/>\n", name)
		}
	}
	b.WriteString("  </fence_history>\n</pacemaker-result>\nEND\n")
	return answers{"crm_mon --one-shot --output-as=xml": b.String(), "crm_attribute --type=crm_config --name=stonith-enabled --query --quiet --default=true": "echo " + stonith + "\n"}
}

// A promotion that might lose writes is refused. It gives up what a node has only if it is told
// that it may, and the cluster has fenced that node; it never forces.
func TestPromote(t *testing.T) {
	takes := func(line string, more answers) func(*testing.T) answers {
		return func(t *testing.T) answers {
			a := answers{line: then(t, up())}
			for k, v := range more {
				a[k] = v
			}
			return a
		}
	}
	const plain, b, both = "blockferry primary data", "blockferry primary --fenced node-b data", "blockferry primary --fenced node-b,node-c data"
	for name, c := range map[string]struct {
		v        *status.Volume
		failover string // "": not set
		do       func(*testing.T) answers
		want     int
		tried    []string
	}{
		"nothing is lost":                 {v: secondary(0), do: takes(plain, nil), tried: []string{plain}},
		"it is primary":                   {v: up()},
		"one that is down":                {v: at("down"), do: takes(plain, nil), tried: []string{plain}},
		"refused":                         {v: secondary(0), do: takes(b, cluster("true", "node-b fenced")), want: failed, tried: []string{plain}},
		"refused, as said":                {v: secondary(0), failover: "never", do: takes(b, cluster("true", "node-b fenced")), want: failed, tried: []string{plain}},
		"the other one was fenced":        {v: secondary(0), failover: "fenced", do: takes(b, cluster("true", "node-b fenced")), tried: []string{b}},
		"and refused all the same":        {v: secondary(0), failover: "fenced", do: takes("blockferry primary --force data", cluster("true", "node-b fenced")), want: failed, tried: []string{b}},
		"both others were fenced":         {v: secondary(0), failover: "fenced", do: takes(both, cluster("true", "node-b fenced", "node-c fenced")), tried: []string{both}},
		"one of the others was":           {v: secondary(0), failover: "fenced", do: takes(b, cluster("true", "node-b fenced", "node-c online")), tried: []string{b}},
		"it is on again":                  {v: secondary(0), failover: "fenced", do: takes(b, cluster("true", "node-b online")), want: failed, tried: []string{plain}},
		"it is not known to be off":       {v: secondary(0), failover: "fenced", do: takes(b, cluster("true", "node-b unclean")), want: failed, tried: []string{plain}},
		"it left in order":                {v: secondary(0), failover: "fenced", do: takes(b, cluster("true", "node-b left")), want: failed, tried: []string{plain}},
		"its fence failed":                {v: secondary(0), failover: "fenced", do: takes(b, cluster("true", "node-b failed")), want: failed, tried: []string{plain}},
		"a cluster that does not fence":   {v: secondary(0), failover: "fenced", do: takes(b, cluster("false", "node-b fenced")), want: failed, tried: []string{plain}},
		"a cluster that says nothing":     {v: secondary(0), failover: "fenced", do: takes(b, nil), want: failed, tried: []string{plain}},
		"a disk that another left behind": {v: at("refused"), failover: "fenced", do: takes(b, cluster("true", "node-b fenced")), want: failed, tried: []string{plain}},
		"the cluster fences another node": {v: secondary(0), failover: "fenced", do: takes(b, cluster("true", "node-bb fenced")), want: failed, tried: []string{plain}},
		"the agent does not answer":       {want: failed},
		"its disk is gone":                {v: diskless(), want: failedPromoted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var do answers
			if c.do != nil {
				do = c.do(t)
			}
			s := newStage(t, do)
			s.is(c.v)
			s.started(true)
			for _, name := range []string{"", ".node-b", ".node-c", ".node-bb"} {
				s.write("run/blockferry-data.seen"+name, "0\n", 0o644)
			}
			env := []string{}
			if c.failover != "" {
				env = append(env, "OCF_RESKEY_failover="+c.failover)
			}
			code, calls, said := s.run("promote", env...)
			tried := slices.DeleteFunc(slices.Clone(calls), func(c string) bool { return !strings.HasPrefix(c, "blockferry") })
			if code != c.want || !slices.Equal(tried, c.tried) || (c.want == success) != slices.Contains(calls, scored(10000)) {
				t.Errorf("%d, %q: %s", code, calls, said)
			}
			if c.want != success && !strings.Contains(said, "ocf-exit-reason:volume 'data'") {
				t.Errorf("no reason: %s", said)
			}
		})
	}
}

// What Pacemaker tells has the other nodes make room, and follow.
func TestNotify(t *testing.T) {
	for name, c := range map[string]struct {
		v     *status.Volume
		env   []string
		calls []string
		asks  bool // blockferry, which takes its time
	}{
		"a secondary":                 {secondary(0), []string{"type=post", "operation=promote", "promoted_uname=node-b"}, nil, true},
		"one left behind":             {at("refused"), []string{"type=post", "operation=promote", "promote_uname=node-b"}, []string{"blockferry secondary data", "blockferry secondary --force data", "blockferry down --force data", unscored}, true},
		"its own promotion":           {at("refused"), []string{"type=post", "operation=promote", "promote_uname=node-a"}, nil, false},
		"the primary":                 {up(), []string{"type=post", "operation=promote", "promote_uname=node-a"}, nil, false},
		"a primary, told of another":  {up(), []string{"type=post", "operation=promote", "promote_uname=node-b"}, nil, true},
		"another is to be":            {at("down"), []string{"type=pre", "operation=promote", "promote_uname=node-b"}, []string{"blockferry secondary data", scored(5000)}, true},
		"another, and this one waits": {at("waiting"), []string{"type=pre", "operation=promote", "promote_uname=node-b"}, []string{"blockferry secondary data", scored(5000)}, true},
		"another, and it can't be":    {at("down"), []string{"type=pre", "operation=promote", "promote_uname=node-b"}, []string{"blockferry secondary data"}, true},
		"another, beside a copy":      {secondary(5), []string{"type=pre", "operation=promote", "promote_uname=node-b"}, nil, true},
		"this one is to be":           {at("down"), []string{"type=pre", "operation=promote", "promote_uname=node-a"}, nil, false},
		"another thing's news":        {at("refused"), []string{"type=post", "operation=start", "promoted_uname=node-b"}, nil, false},
		"a demotion elsewhere":        {secondary(5), []string{"type=post", "operation=demote", "demote_uname=node-b"}, []string{scored(490)}, true},
		"before one":                  {secondary(5), []string{"type=pre", "operation=demote", "demote_uname=node-b"}, nil, false},
	} {
		s := newStage(t, nil)
		s.is(c.v)
		s.started(true)
		if slices.Contains(c.calls, scored(5000)) {
			s.write("do/blockferry_secondary_data", "echo done\n", 0o644)
		}
		env := []string{"OCF_RESKEY_failover=fenced"}
		for _, e := range c.env {
			env = append(env, "OCF_RESKEY_CRM_meta_notify_"+e)
		}
		code, calls, said := s.run("notify", env...)
		if code != success || !slices.Equal(calls, c.calls) {
			t.Errorf("%s: %d, %q: %s", name, code, calls, said)
		}
		if all, err := os.ReadFile(filepath.Join(s.dir, "calls")); !c.asks && err == nil {
			t.Errorf("%s: a failover waits for: %s", name, all)
		}
	}
}

func TestValidate(t *testing.T) {
	for name, c := range map[string]struct {
		v     *status.Volume
		env   []string
		want  int
		words string
	}{
		"right":               {v: secondary(0)},
		"a primary":           {v: up()},
		"a lease's":           {v: leased(), want: notConfigured, words: "'promote: auto'"},
		"of one role":         {v: oneRole(), want: notConfigured, words: "has one role"},
		"the agent is away":   {},
		"no volume is named":  {v: up(), env: []string{"OCF_RESKEY_volume="}, want: notConfigured, words: "'volume' is missing"},
		"a wrong word":        {v: up(), env: []string{"OCF_RESKEY_failover=always"}, want: notConfigured, words: "not 'always'"},
		"no blockferry there": {v: up(), env: []string{"PATH=/usr/bin:/bin"}, want: notInstalled, words: "no blockferry"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t, nil)
			s.is(c.v)
			if code, _, said := s.run("validate-all", c.env...); code != c.want || !strings.Contains(said, c.words) {
				t.Errorf("%d: %s", code, said)
			}
		})
	}
	s := newStage(t, nil)
	s.is(up())
	if code, _, _ := s.run("reload"); code != unimplemented {
		t.Errorf("an action that there is not: %d", code)
	}
}

// The agent's description names what it can do, and only that.
func TestMetaData(t *testing.T) {
	s := newStage(t, nil)
	code, _, said := s.run("meta-data", "OCF_RESKEY_volume=")
	var d struct {
		Name       string `xml:"name,attr"`
		Parameters []struct {
			Name     string `xml:"name,attr"`
			Required string `xml:"required,attr"`
		} `xml:"parameters>parameter"`
		Actions []struct {
			Name    string `xml:"name,attr"`
			Role    string `xml:"role,attr"`
			Timeout string `xml:"timeout,attr"`
		} `xml:"actions>action"`
	}
	if err := xml.Unmarshal([]byte(said), &d); err != nil || code != success {
		t.Fatalf("%d, %v: %s", code, err, said)
	}
	var got []string
	for _, a := range d.Actions {
		got = append(got, strings.TrimSpace(a.Name+" "+a.Role))
		if a.Timeout == "" {
			t.Errorf("%s has no timeout", a.Name)
		}
	}
	want := []string{"start", "stop", "monitor Promoted", "monitor Unpromoted", "promote", "demote", "notify", "meta-data", "validate-all"}
	if !slices.Equal(got, want) || d.Name != "volume" || len(d.Parameters) != 2 || d.Parameters[0].Name != "volume" || d.Parameters[0].Required != "1" {
		t.Errorf("%+v", d)
	}
}
