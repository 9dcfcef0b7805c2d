package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/goccy/go-yaml"

	"blockferry/cmd/blockferry/config"
)

// The scripts of deploy/ec2 against a stub of the AWS CLI and of the instance's metadata. The
// stub keeps what there is in files, changes it as the calls say, and records each. None
// of this was run on EC2.

// stubAWS answers as the real one does to the scripts' own queries: text, a tab between
// columns. A file fail-OPERATION holds how many calls of it fail; hang-OPERATION has it hang;
// lose-OPERATION has it answer as done and do nothing.
const stubAWS = `#!/bin/bash
cd "$STUB" || exit 9
all="$*"
while [ "${1-}" != ec2 ]; do shift; done
op=$2; shift 2
echo "$op $*" >>calls
[[ $all == *"--region eu-central-1 "*"--output text "* ]] || { echo "no region, or not text: $all" >&2; exit 252; }
[ -z "$HOME" ] || { echo "a hook has no HOME" >&2; exit 9; }
if [ -e "hang-$op" ]; then exec sleep 600; fi
if [ -e "fail-$op" ]; then
  n=$(cat "fail-$op")
  if [ "$n" -gt 0 ]; then echo $((n - 1)) >"fail-$op"; echo "An error occurred (RequestLimitExceeded) when calling $op" >&2; exit 254; fi
fi
value() { local want=$1; shift; while [ $# -gt 0 ]; do if [ "$1" = "$want" ]; then echo "$2"; return; fi; shift; done; }
case $op in
describe-instances)
  [[ "$*" == *"Name=tag:blockferry-cluster,Values="*"Name=tag:blockferry-node,Values="* ]] || exit 252
  cluster=${all#*blockferry-cluster,Values=}; cluster=${cluster%% *}
  node=${all#*blockferry-node,Values=}; node=${node%% *}
  if [ -e ignore-filters ]; then awk '{print $1 "\t" $2 "\t" $3 "\t" $4}' instances; else
  awk -v c="$cluster" -v n="$node" '$3 == c && $4 == n {print $1 "\t" $2 "\t" $3 "\t" $4}' instances; fi
  # What is stopping has stopped some looks later.
  if [ -e stops-after ]; then
    n=$(cat stops-after)
    if [ "$n" = 0 ]; then sed -i 's/ stopping / stopped /; s/ shutting-down / terminated /' instances; elif grep -Eq ' (stopping|shutting-down) ' instances; then echo $((n - 1)) >stops-after; fi
  fi ;;
stop-instances)
  [[ "$*" == *--force* ]] || exit 252
  id=$(value --instance-ids "$@")
  [ -e "lose-$op" ] || sed -i "s/^$id running /$id stopping /" instances
  echo "$id	stopping" ;;
describe-route-tables)
  table=$(value --route-table-ids "$@"); query=$(value --query "$@"); cidr=${query#*==\'}; cidr=${cidr%%\'*}
  awk -v t="$table" -v c="$cidr" '$1 == t && $2 == c {print $3 "\t" $4}' routes ;;
create-route | replace-route)
  table=$(value --route-table-id "$@"); cidr=$(value --destination-cidr-block "$@"); eni=$(value --network-interface-id "$@")
  has=$(awk -v t="$table" -v c="$cidr" '$1 == t && $2 == c' routes)
  if [ $op = create-route ] && [ -n "$has" ]; then echo RouteAlreadyExists >&2; exit 254; fi
  if [ $op = replace-route ] && [ -z "$has" ]; then echo InvalidParameterValue >&2; exit 254; fi
  [ -e "lose-$op" ] || { awk -v t="$table" -v c="$cidr" '!($1 == t && $2 == c)' routes >routes.new; echo "$table $cidr $eni active" >>routes.new; mv routes.new routes; }
  echo True ;;
describe-addresses) awk -v a="$(value --allocation-ids "$@")" '$1 == a {print $2}' addresses ;;
associate-address)
  [[ "$*" == *--allow-reassociation* ]] || exit 252
  [ -e "lose-$op" ] || echo "$(value --allocation-id "$@") $(value --network-interface-id "$@")" >addresses
  echo eipassoc-1 ;;
*) echo "unknown operation $op" >&2; exit 252 ;;
esac
`

// stubCurl is the metadata service, which wants a token (IMDSv2).
const stubCurl = `#!/bin/bash
case "$*" in
*"-X PUT"*"X-aws-ec2-metadata-token-ttl-seconds: "*/latest/api/token) echo token-1 ;;
*"X-aws-ec2-metadata-token: token-1"*/meta-data/instance-id) echo "${STUB_INSTANCE-i-b}" ;;
*"X-aws-ec2-metadata-token: token-1"*/meta-data/placement/region) echo eu-central-1 ;;
*"X-aws-ec2-metadata-token: token-1"*/meta-data/mac) echo 0a:00:00:00:00:01 ;;
*"X-aws-ec2-metadata-token: token-1"*/meta-data/network/interfaces/macs/0a:00:00:00:00:01/interface-id) echo eni-b ;;
*) exit 22 ;;
esac
`

// ec2Stub is a region with one cluster's nodes in it, as the scripts see it at node-b, i-b.
type ec2Stub struct {
	t   *testing.T
	dir string
}

func newEC2(t *testing.T, files map[string]string) *ec2Stub {
	t.Helper()
	s := &ec2Stub{t, t.TempDir()}
	for name, text := range map[string]string{"bin/aws": stubAWS, "bin/curl": stubCurl, "calls": "", "addresses": "eipalloc-1 eni-a\n",
		"instances": "i-a running prod node-a\ni-b running prod node-b\ni-x running test node-a\n",
		"routes":    "rtb-1 10.99.0.10/32 eni-a active\nrtb-2 10.99.0.10/32 eni-a active\nrtb-1 10.99.0.11/32 eni-a active\n"} {
		s.write(name, text)
	}
	for name, text := range files {
		s.write(name, text)
	}
	return s
}

func (s *ec2Stub) write(name, text string) {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		s.t.Fatal(err)
	}
}

func (s *ec2Stub) read(name string) string {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, name))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(text)
}

// calls are the operations called that are not only questions.
func (s *ec2Stub) calls() (changing []string) {
	s.t.Helper()
	for line := range strings.Lines(s.read("calls")) {
		if op, _, _ := strings.Cut(line, " "); !strings.HasPrefix(op, "describe-") {
			changing = append(changing, strings.TrimSpace(line))
		}
	}
	return changing
}

// run runs a script as the agent runs a hook: with that environment and no more.
func (s *ec2Stub) run(env []string, args ...string) (said string, code int) {
	s.t.Helper()
	script, err := filepath.Abs("../deploy/ec2/" + args[0])
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command(script, args[1:]...)
	cmd.Dir = "/"
	cmd.Env = append([]string{"PATH=" + s.dir + "/bin:/usr/bin:/bin", "LC_ALL=C.UTF-8", "STUB=" + s.dir, "FENCE_SECONDS=60", "ADDRESS_SECONDS=60", "FENCE_EVERY=0.05", "ADDRESS_EVERY=0.05"}, env...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// ec2Short is for what does not succeed: long enough for the metadata and some calls on a busy machine.
var ec2Short = []string{"FENCE_SECONDS=15", "ADDRESS_SECONDS=15", "FENCE_EVERY=1", "ADDRESS_EVERY=1"}

func TestEC2FencePeer(t *testing.T) {
	const forA = "BLOCKFERRY_PEER=node-a"
	stop := []string{"stop-instances --force --instance-ids i-a"}
	for _, c := range []struct {
		name  string
		files map[string]string
		env   []string
		args  []string // of fence-peer; nil: prod
		code  int
		says  string
		// stops: only i-a was, if anything; never: nothing may have been stopped.
		stops, never bool
		state        string // of i-a then
	}{
		{name: "runs", files: map[string]string{"stops-after": "3"}, says: "i-a, 'node-a', is stopped", stops: true, state: "stopped"},
		{name: "stopped already", files: map[string]string{"instances": "i-a stopped prod node-a\n"}, says: "is stopped", never: true, state: "stopped"},
		{name: "terminated", files: map[string]string{"instances": "i-a terminated prod node-a\n"}, says: "is terminated", never: true, state: "terminated"},
		{name: "shutting down", files: map[string]string{"instances": "i-a shutting-down prod node-a\n", "stops-after": "2"}, says: "is terminated", never: true, state: "terminated"},
		{name: "stopping in order", files: map[string]string{"instances": "i-a stopping prod node-a\n", "stops-after": "2"}, says: "is stopped", stops: true, state: "stopped"},
		{name: "replaced", files: map[string]string{"instances": "i-a running prod node-a\ni-old terminated prod node-a\n", "stops-after": "1"}, says: "i-a, 'node-a', is stopped", stops: true, state: "stopped"},
		{name: "errors at first", files: map[string]string{"stops-after": "1", "fail-describe-instances": "2", "fail-stop-instances": "2"}, says: "is stopped", stops: true, state: "stopped"},
		{name: "errors for good", files: map[string]string{"fail-stop-instances": "9999"}, env: ec2Short, code: 1, says: "was not seen stopped in time; the last state seen is 'running'", stops: true, state: "running"},
		{name: "no answer to the question", files: map[string]string{"hang-describe-instances": ""}, env: ec2Short, code: 1, says: "(not found) was not seen stopped in time; the last state seen is 'none'", never: true, state: "running"},
		{name: "no answer to the stop", files: map[string]string{"hang-stop-instances": ""}, env: ec2Short, code: 1, says: "was not seen stopped in time", stops: true, state: "running"},
		{name: "said to stop and does not", files: map[string]string{"lose-stop-instances": ""}, env: ec2Short, code: 1, says: "the last state seen is 'running'", stops: true, state: "running"},
		{name: "stops too slowly", env: ec2Short, code: 1, says: "the last state seen is 'stopping'", stops: true, state: "stopping"},
		{name: "two of that name", files: map[string]string{"instances": "i-a running prod node-a\ni-c running prod node-a\n"}, code: 1, says: "several instances", never: true, state: "running"},
		{name: "none of that name", files: map[string]string{"instances": "i-x running test node-a\ni-b running prod node-b\n"}, code: 1, says: "no instance is tagged", never: true},
		{name: "this instance", files: map[string]string{"instances": "i-b running prod node-a\n"}, code: 1, says: "this instance, i-b, is itself tagged as 'node-a'", never: true},
		{name: "another was shown", files: map[string]string{"ignore-filters": "", "instances": "i-x running test node-a\n"}, code: 1, says: "nothing was stopped", never: true},
		{name: "no metadata", env: []string{"STUB_INSTANCE="}, code: 1, says: "metadata service says instance ''", never: true, state: "running"},
		{name: "no peer", env: []string{"BLOCKFERRY_PEER="}, code: 2, says: "BLOCKFERRY_PEER", never: true, state: "running"},
		{name: "no cluster", args: []string{}, code: 2, says: "usage: fence-peer CLUSTER", never: true, state: "running"},
		{name: "a limit that is none", env: []string{"FENCE_SECONDS=soon"}, code: 1, says: "a limit of 'soon' seconds", never: true, state: "running"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newEC2(t, c.files)
			args := append([]string{"fence-peer"}, c.args...)
			if c.args == nil {
				args = append(args, "prod")
			}
			began := time.Now()
			said, code := s.run(append([]string{forA}, c.env...), args...)
			if code != c.code || !strings.Contains(said, c.says) {
				t.Errorf("exit status %d, want %d with '%s':\n%s", code, c.code, c.says, said)
			}
			calls := slices.Compact(s.calls())
			if c.never && len(calls) > 0 || c.stops && !slices.Equal(calls, stop) {
				t.Errorf("called: %q", calls)
			}
			if c.state != "" && !strings.Contains(s.read("instances"), "i-a "+c.state+" prod") || c.name != "none of that name" && strings.Contains(s.read("instances"), "i-x stop") {
				t.Errorf("in the end: %s", s.read("instances"))
			}
			if took := time.Since(began); took > 90*time.Second {
				t.Errorf("it took %v", took)
			}
			if code == 0 { // once more it finds it done
				before := len(s.calls())
				if said, code := s.run([]string{forA}, args...); code != 0 || len(s.calls()) != before {
					t.Errorf("again: exit status %d, %d calls more: %s", code, len(s.calls())-before, said)
				}
			}
		})
	}
}

func TestEC2Address(t *testing.T) {
	route := []string{"route", "10.99.0.10/32", "rtb-1", "rtb-2"}
	const here = "rtb-1 10.99.0.10/32 eni-b active\nrtb-2 10.99.0.10/32 eni-b active\n"
	for _, c := range []struct {
		name  string
		args  []string
		files map[string]string
		env   []string
		code  int
		says  string
		calls []string // their operations, repetitions left out
		ends  string   // in routes or addresses
	}{
		{name: "route elsewhere", args: route, says: "10.99.0.10/32 is at eni-b", calls: []string{"replace-route"}, ends: "rtb-2 10.99.0.10/32 eni-b active"},
		{name: "route here already", args: route, files: map[string]string{"routes": here}, says: "is at eni-b", ends: here},
		{name: "no route yet", args: route, files: map[string]string{"routes": ""}, says: "is at eni-b", calls: []string{"create-route"}, ends: here},
		{name: "route in one table", args: route, files: map[string]string{"routes": "rtb-1 10.99.0.10/32 eni-b active\n"}, says: "is at eni-b", calls: []string{"create-route"}, ends: here},
		{name: "route to what is gone", args: route[:3], files: map[string]string{"routes": "rtb-1 10.99.0.10/32 eni-b blackhole\n"}, says: "is at eni-b", calls: []string{"replace-route"}, ends: "eni-b active"},
		{name: "errors at first", args: route, files: map[string]string{"fail-describe-route-tables": "3", "fail-replace-route": "3"}, says: "is at eni-b", calls: []string{"replace-route"}, ends: "rtb-2 10.99.0.10/32 eni-b active"},
		{name: "errors for good", args: route, files: map[string]string{"fail-replace-route": "9999"}, env: ec2Short, code: 1, says: "was not seen at eni-b in time by rtb-1 rtb-2", calls: []string{"replace-route"}, ends: "rtb-1 10.99.0.10/32 eni-a active"},
		{name: "no answer", args: route, files: map[string]string{"hang-replace-route": ""}, env: ec2Short, code: 1, says: "was not seen at eni-b in time", calls: []string{"replace-route"}, ends: "rtb-1 10.99.0.10/32 eni-a active"},
		{name: "not known where it is", args: route, files: map[string]string{"fail-describe-route-tables": "9999"}, env: ec2Short, code: 1, says: "was not seen at eni-b in time", ends: "rtb-1 10.99.0.10/32 eni-a active"},
		{name: "said to be done and is not", args: route, files: map[string]string{"lose-replace-route": ""}, env: ec2Short, code: 1, says: "was not seen", calls: []string{"replace-route"}, ends: "rtb-1 10.99.0.10/32 eni-a active"},
		{name: "elastic elsewhere", args: []string{"eip", "eipalloc-1"}, says: "eipalloc-1 is at eni-b", calls: []string{"associate-address"}, ends: "eipalloc-1 eni-b"},
		{name: "elastic here already", args: []string{"eip", "eipalloc-1"}, files: map[string]string{"addresses": "eipalloc-1 eni-b\n"}, says: "is at eni-b", ends: "eipalloc-1 eni-b"},
		{name: "elastic nowhere", args: []string{"eip", "eipalloc-1"}, files: map[string]string{"addresses": "eipalloc-1 \n"}, says: "is at eni-b", calls: []string{"associate-address"}, ends: "eipalloc-1 eni-b"},
		{name: "elastic with errors", args: []string{"eip", "eipalloc-1"}, files: map[string]string{"fail-associate-address": "9999"}, env: ec2Short, code: 1, says: "was not seen", calls: []string{"associate-address"}, ends: "eipalloc-1 eni-a"},
		{name: "no table", args: route[:2], code: 2, says: "usage: address route CIDR"},
		{name: "no range", args: []string{"route", "10.99.0.10", "rtb-1"}, code: 2, says: "'10.99.0.10' is no CIDR"},
		{name: "nothing", args: nil, code: 2, says: "usage: "},
		{name: "no metadata", args: route, env: []string{"STUB_INSTANCE=none"}, code: 1, says: "metadata service says"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := newEC2(t, c.files)
			args := append([]string{"address"}, c.args...)
			began := time.Now()
			said, code := s.run(c.env, args...)
			if code != c.code || !strings.Contains(said, c.says) {
				t.Errorf("exit status %d, want %d with '%s':\n%s", code, c.code, c.says, said)
			}
			var operations []string
			for _, call := range s.calls() {
				op, _, _ := strings.Cut(call, " ")
				operations = append(operations, op)
			}
			if got := slices.Compact(operations); !slices.Equal(got, c.calls) {
				t.Errorf("called: %q, want %q", s.calls(), c.calls)
			}
			ends := s.read("routes") + s.read("addresses")
			if !strings.Contains(ends, c.ends) {
				t.Errorf("in the end: %s", ends)
			}
			if routes, had := s.read("routes"), c.files["routes"]; had == "" && c.name != "no route yet" && !strings.Contains(routes, "rtb-1 10.99.0.11/32 eni-a active") {
				t.Errorf("another address's route was changed: %s", routes)
			}
			if took := time.Since(began); took > 90*time.Second {
				t.Errorf("it took %v", took)
			}
			if code == 0 {
				before := len(s.calls())
				if said, code := s.run(nil, args...); code != 0 || len(s.calls()) != before {
					t.Errorf("again: exit status %d, %d calls more: %s", code, len(s.calls())-before, said)
				}
			}
		})
	}
}

// The nodes' user-data, filled in: configurations that are taken, of two nodes that name each
// other, and commands that a shell reads.
func TestEC2UserData(t *testing.T) {
	text, err := os.ReadFile("../deploy/ec2/user-data.yaml.tftpl")
	if err != nil {
		t.Fatal(err)
	}
	for _, role := range []string{"primary", "secondary"} {
		filled := strings.NewReplacer("${node}", "node-a", "${role}", role, "${peer}", "node-b", "${peer_address}", "10.0.2.7", "${cluster}", "prod",
			"${address}", "10.99.0.10", `${join(", ", route_tables)}`, "rtb-1, rtb-2", `${replace(ebs, "-", "")}`, "vol0123456789abcdef0",
			"${package}", "https://packages.example/blockferry.deb", "${package_sha256}", strings.Repeat("0", 64)).Replace(string(text))
		if at := strings.Index(filled, "${"); at >= 0 {
			t.Fatalf("not filled in: %.60s", filled[at:])
		}
		var data struct {
			WriteFiles []struct{ Path, Content string } `yaml:"write_files"`
			RunCmd     []string                         `yaml:"runcmd"`
		}
		if err := yaml.Unmarshal([]byte(filled), &data); err != nil {
			t.Fatal(err)
		}
		seen := false
		for _, file := range data.WriteFiles {
			if file.Path != "/etc/blockferry/blockferry.yaml" {
				continue
			}
			seen = true
			path := filepath.Join(t.TempDir(), "blockferry.yaml")
			if err := os.WriteFile(path, []byte(file.Content), 0o600); err != nil {
				t.Fatal(err)
			}
			c, err := config.Load(path)
			if err != nil {
				t.Fatal(err)
			}
			if v := c.Volumes[0]; !v.Switches() || v.BeginsSecondary != (role == "secondary") || c.Node.Name != "node-a" || v.Peers[0] != "node-b" || v.Hooks == nil {
				t.Errorf("%+v", v)
			}
		}
		if !seen || len(data.RunCmd) < 3 {
			t.Errorf("configuration: %v, commands: %q", seen, data.RunCmd)
		}
		for _, line := range data.RunCmd {
			if strings.Contains(line, "create") || strings.Contains(line, "blockferry agent") || strings.Contains(line, "enable --now blockferry.service") {
				t.Errorf("it prepares disks or starts an agent: %s", line)
			}
			run(t, "sh", "-n", "-c", line)
		}
	}
}

// The role of the instances may do what the scripts do, and nothing else; what changes
// something, only to what is the cluster's.
func TestEC2Policy(t *testing.T) {
	text, err := os.ReadFile("../deploy/ec2/terraform/policy.json.tftpl")
	if err != nil {
		t.Fatal(err)
	}
	var policy struct {
		Version   string
		Statement []struct {
			Effect    string
			Action    []string
			Resource  any
			Condition map[string]map[string]string
		}
	}
	filled := regexp.MustCompile(`\$\{jsonencode\([^}]*\)\}`).ReplaceAllString(string(text), `["arn:aws:ec2:r:1:route-table/rtb-1"]`)
	if err := json.Unmarshal([]byte(regexp.MustCompile(`\$\{[^}]*\}`).ReplaceAllString(filled, "x")), &policy); err != nil {
		t.Fatalf("%v in\n%s", err, filled)
	}
	wanted := map[string]bool{}
	operation := regexp.MustCompile(`\bec2 ((?:[a-z]+-)+[a-z]+)`)
	for _, script := range []string{"fence-peer", "address"} {
		source, err := os.ReadFile("../deploy/ec2/" + script)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range operation.FindAllStringSubmatch(string(source), -1) {
			action := "ec2:"
			for _, word := range strings.Split(match[1], "-") {
				action += strings.ToUpper(word[:1]) + word[1:]
			}
			wanted[action] = true
		}
	}
	if len(wanted) != 7 {
		t.Fatalf("the scripts call %v", wanted)
	}
	for _, s := range policy.Statement {
		for _, action := range s.Action {
			if !wanted[action] {
				t.Errorf("%s is allowed, and no script needs it", action)
			}
			delete(wanted, action)
			if strings.HasPrefix(action, "ec2:Describe") {
				continue
			}
			if resource := fmt.Sprint(s.Resource); resource == "*" || strings.HasSuffix(resource, ":*]") {
				t.Errorf("%s of %s", action, resource)
			}
			if strings.Contains(fmt.Sprint(s.Resource), "/*") && s.Condition["StringEquals"]["aws:ResourceTag/blockferry-cluster"] == "" {
				t.Errorf("%s of whatever is in the account: %v", action, s.Resource)
			}
		}
	}
	if len(wanted) > 0 {
		t.Errorf("not allowed: %v", wanted)
	}
}
