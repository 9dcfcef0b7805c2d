package integration

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// manual is a page of the manual, where a package puts it, of which a test runs the
// commands: the blocks marked sh.
type manual struct {
	page   string
	blocks []manualBlock
}

type manualBlock struct {
	section string // the heading that it is under
	lines   []string
}

// readManual reads one, with some words replaced as strings.NewReplacer does.
func readManual(t *testing.T, page string, replaced ...string) *manual {
	t.Helper()
	m := &manual{page: page}
	section, inside := "", false
	for line := range strings.Lines(strings.NewReplacer(replaced...).Replace(mustRead(t, "/usr/share/doc/blockferry/"+page))) {
		line = strings.TrimSpace(line)
		switch {
		case inside && line == "```":
			inside = false
		case inside:
			last := &m.blocks[len(m.blocks)-1]
			last.lines = append(last.lines, line)
		case line == "```sh":
			inside = true
			m.blocks = append(m.blocks, manualBlock{section: section})
		case strings.HasPrefix(line, "#"):
			section = strings.TrimSpace(strings.TrimLeft(line, "#"))
		}
	}
	return m
}

// run runs the blocks of a section in their order, each by a shell that ends with the
// first command that fails. Some of its lines are replaced, as here it is
// another machine; each has to be there.
func (m *manual) run(t *testing.T, section string, instead map[string]string) string {
	t.Helper()
	said, found, replaced := "", false, map[string]bool{}
	for _, b := range m.blocks {
		if b.section != section {
			continue
		}
		found = true
		lines := slices.Clone(b.lines)
		for i, line := range lines {
			if other, is := instead[line]; is {
				lines[i], replaced[line] = other, true
			}
		}
		script := strings.Join(lines, "\n")
		out, err := exec.CommandContext(t.Context(), "bash", "-euxo", "pipefail", "-c", script).CombinedOutput()
		t.Logf("%s, %s:\n%s", m.page, section, out)
		if err != nil {
			t.Fatalf("%s, %s: %v:\n%s\n%s", m.page, section, err, script, out)
		}
		said += string(out)
	}
	if !found {
		t.Fatalf("%s has no commands under '%s'", m.page, section)
	}
	for line := range instead {
		if !replaced[line] {
			t.Errorf("%s: '%s' is not among the commands under '%s'", m.page, line, section)
		}
	}
	return said
}

// sections are those that have commands; a test that runs all of them says so.
func (m *manual) sections() (names []string) {
	for _, b := range m.blocks {
		if !slices.Contains(names, b.section) {
			names = append(names, b.section)
		}
	}
	return names
}
