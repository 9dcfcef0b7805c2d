package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/cmd/blockferry/certs"
	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
)

func TestNodeFindings(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	ca, dir := filepath.Join(t.TempDir(), "ca"), filepath.Join(t.TempDir(), "node")
	if _, err := certs.Init(ca, "test", now, 1000); err != nil {
		t.Fatal(err)
	}
	a, err := certs.OpenAuthority(ca, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Issue(dir, "node-a", now, 100); err != nil {
		t.Fatal(err)
	}
	day := 24 * time.Hour
	node := func(n config.Node) *config.Config { return &config.Config{Node: &n} }
	good := node(config.Node{Name: "node-a", Certs: dir})
	open := filepath.Join(t.TempDir(), "open")
	for _, f := range []string{certs.NodeFile, certs.CACertFile} {
		content, err := os.ReadFile(filepath.Join(dir, f))
		if err == nil {
			err = os.MkdirAll(open, 0o700)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(open, f), content, 0o644)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(open, certs.CAKeyFile), nil, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		what  string
		c     *config.Config
		now   time.Time
		level Level
		want  string
		code  exit.Code
	}{
		{"none", &config.Config{}, now, Good, "", exit.OK},
		{"good", good, now, Good, "node 'node-a', issued by 'test'", exit.OK},
		{"31 days left", good, now.Add(69 * day), Good, "in 31 days", exit.OK},
		{"29 days left", good, now.Add(71 * day), Note, "in 29 days", exit.OK},
		{"expired", good, now.Add(102 * day), Refuse, "2 days ago", exit.Prerequisite},
		{"another name", node(config.Node{Name: "node-b", Certs: dir}), now, Refuse, "is of node 'node-a', this node is 'node-b'", exit.Prerequisite},
		{"missing", node(config.Node{Name: "node-a", Certs: t.TempDir()}), now, Refuse, "can't be read", exit.Prerequisite},
		{"others may read the key", node(config.Node{Name: "node-a", Certs: open}), now, Refuse, "mode 644", exit.Refused},
		{"the authority's key is here", node(config.Node{Name: "node-a", Certs: open}), now, Note, "holds the authority's key", exit.Refused},
		{"plaintext", node(config.Node{Name: "node-a", Plaintext: true}), now, Note, "nothing is encrypted", exit.OK},
		{"this machine only", node(config.Node{Name: "node-a"}), now, Good, "on this machine only", exit.OK},
	} {
		findings := Node(c.c, c.now)
		found := c.want == ""
		for _, f := range findings {
			found = found || f.Level == c.level && strings.Contains(f.String(), c.want)
			if f.Level != Good && f.Advice == "" {
				t.Errorf("%s: no advice in %v", c.what, f)
			}
		}
		if !found || exit.Of(findings.Err()) != c.code {
			t.Errorf("%s: %v", c.what, findings)
		}
	}
}
