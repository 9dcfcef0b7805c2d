package ocf

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// simulated is a cluster of two nodes, in a file, whose resources Pacemaker's own scheduler moves.
type simulated struct {
	t   *testing.T
	dir string
	cib string
}

func (s *simulated) run(name string, args ...string) string {
	s.t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env = s.dir, append(os.Environ(), "CIB_file="+s.cib)
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func (s *simulated) add(scope, xml string) {
	s.t.Helper()
	s.run("cibadmin", "--modify", "--allow-create", "--scope", scope, "--xml-text", xml)
}

var action = regexp.MustCompile(`(?m)^  \* (?:Resource action: (\S+)\s+(\S+) on (\S+)|(Fencing \S+) .*)$`)

// goesOn has the scheduler do what is to be done, and returns that in order, without what is looked at.
func (s *simulated) goesOn(args ...string) (did []string) {
	s.t.Helper()
	next := s.cib + "+"
	out := s.run("crm_simulate", append([]string{"--xml-file", s.cib, "--simulate", "--quorum", "1", "--save-output", next}, args...)...)
	s.cib = next
	for _, m := range action.FindAllStringSubmatch(out, -1) {
		if m[4] != "" {
			did = append(did, m[4])
		} else if what, _, _ := strings.Cut(m[2], "="); what != "monitor" && what != "cancel" && what != "notify" && m[1] != "fence" {
			did = append(did, strings.Join(m[1:4], " "))
		}
	}
	return did
}

// scores are what the agents would have set.
func (s *simulated) scores(a, b string) {
	s.t.Helper()
	text, err := os.ReadFile(s.cib)
	if err != nil {
		s.t.Fatal(err)
	}
	for node, score := range map[string]string{"node-a": a, "node-b": b} {
		at := regexp.MustCompile(`<node_state [^>]*uname="` + node + `"[^>]*>`).FindIndex(text)
		if at == nil {
			s.t.Fatalf("no state of %s: %s", node, text)
		}
		attribute := `<transient_attributes id="` + node + `"><instance_attributes id="s-` + node + `"><nvpair id="m-` + node + `" name="master-data" value="` + score + `"/></instance_attributes></transient_attributes>`
		text = slices.Insert(text, at[1], []byte(attribute)...)
	}
	if err := os.WriteFile(s.cib, text, 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// Pacemaker's configuration for an NFS server is one that it takes, and has everything started and stopped
// in order, where the volume is promoted: as the scheduler says that runs in a cluster.
func TestPacemakerNFSOrder(t *testing.T) {
	for _, tool := range []string{"cibadmin", "crm_simulate", "crm_resource"} {
		if _, err := exec.LookPath(tool); err != nil && os.Getenv("BLOCKFERRY_REQUIRE_GUEST") == "" {
			t.Skip(err)
		}
	}
	s := &simulated{t: t, dir: t.TempDir()}
	empty := s.run("cibadmin", "--empty")
	s.cib = filepath.Join(s.dir, "cib")
	if err := os.WriteFile(s.cib, []byte(empty), 0o600); err != nil {
		t.Fatal(err)
	}
	path, err := filepath.Abs("../../deploy/nfs/pacemaker.xml")
	if err != nil {
		t.Fatal(err)
	}
	s.run("cibadmin", "--modify", "--allow-create", "--scope", "configuration", "--xml-file", path)
	s.add("resources", `<resources><primitive id="fence" class="stonith" type="fence_host"/></resources>`)
	s.add("nodes", `<nodes><node id="1" uname="node-a"/><node id="2" uname="node-b"/></nodes>`)

	up := func(node string) []string {
		return []string{"data-fs start " + node, "data-server start " + node, "data-address start " + node}
	}
	wants := func(what string, did, want []string) {
		t.Helper()
		if !slices.Equal(did, want) {
			t.Errorf("%s: %q, want %q", what, did, want)
		}
	}
	did := s.goesOn("--node-up", "node-a", "--node-up", "node-b")
	slices.Sort(did)
	wants("nodes that join", did, []string{"data:0 start node-a", "data:1 start node-b"})
	s.scores("1000", "999")
	wants("a promotion", s.goesOn(), append([]string{"data promote node-a"}, up("node-a")...))
	promoted := s.cib

	s.run("crm_resource", "--resource", "data-clone", "--move", "--promoted")
	wants("a planned move", s.goesOn(), append([]string{"data-address stop node-a", "data-server stop node-a", "data-fs stop node-a",
		"data demote node-a", "data promote node-b"}, up("node-b")...))

	s.cib = promoted
	wants("a lost primary", s.goesOn("--node-fail", "node-a"), append([]string{"Fencing node-a", "data promote node-b"}, up("node-b")...))
}
