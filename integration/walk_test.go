package integration

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"blockferry/integration/vm"
)

// A walk is a page of the manual whose commands set machines up: its blocks
//
//	```sh MACHINE...
//
// are run by sh, as root, from the first to the last, on each machine that they name. A
// block of sh that names none is refused, so that no command of the page goes untried.

// block is one of them.
type block struct {
	line     int
	section  string // the heading above it
	machines []string
	script   string
}

// readWalk finds the blocks of a page.
func readWalk(page string) (blocks []block, err error) {
	text, err := os.ReadFile(page)
	if err != nil {
		return nil, err
	}
	section, fenced := "", false
	var open *block // nil in a block of something else
	line := 0
	for text := range strings.Lines(string(text)) {
		line++
		words, isFence := strings.CutPrefix(strings.TrimSpace(text), "```")
		heading, isHeading := strings.CutPrefix(text, "## ")
		switch {
		case isFence && fenced:
			if open != nil {
				blocks = append(blocks, *open)
			}
			open, fenced = nil, false
		case isFence:
			fenced = true
			if w := strings.Fields(words); len(w) > 0 && w[0] == "sh" {
				if len(w) == 1 {
					return nil, fmt.Errorf("%s:%d: commands for no machine", page, line)
				}
				open = &block{line: line, section: section, machines: w[1:]}
			}
		case fenced && open != nil:
			open.script += text
		case !fenced && isHeading:
			section = strings.TrimSpace(heading)
		}
	}
	if fenced || len(blocks) == 0 {
		return nil, fmt.Errorf("%s: a block without an end, or no block at all", page)
	}
	return blocks, nil
}

// In the place of programs that lead out of a guest.
const (
	// A guest reaches no archive: what is named has to be there already, but for blockferry. What
	// the installation of a package starts is started.
	aptGetStandIn = `#!/bin/sh
set -eu
[ "$1" = install ]
shift
for package; do
    case $package in
    -y) ;;
    ./blockferry_*.deb) dpkg --no-triggers --install %s ;;
    *) dpkg-query --show --showformat '${Status}\n' "$package" | grep -q 'ok installed' ;;
    esac
    case $package in
    nfs-kernel-server) systemctl start nfs-server.service ;;
    etcd-server) systemctl start etcd.service ;;
    esac
done
`
	// No guest runs sshd: the test hands over what is sent.
	scpStandIn = `#!/bin/sh
set -eu
[ "$1" = -r ]
to=${3#*:}
mkdir -p /run/sent
{
    echo "mkdir -p $to && base64 -d <<END | tar -x -C $to"
    tar -c -C "$2" . | base64
    echo END
} >>"/run/sent/${3%%:*}"
`
)

// walker runs a walk in a set of guests, which have the names that the page gives its machines.
type walker struct {
	*guests
	page   string
	here   *strings.Replacer // the page's disks and addresses, and those here
	blocks []block           // that were not run yet
}

func newWalker(g *guests, page string, here ...string) *walker {
	g.t.Helper()
	blocks, err := readWalk(page)
	g.must(err)
	w := &walker{g, page, strings.NewReplacer(here...), blocks}
	for name := range g.members {
		w.sh(name, "hostname "+name+" && chmod 755 /usr/local/sbin/apt-get /usr/local/sbin/scp && mount -t tmpfs tmpfs /srv")
	}
	return w
}

// walk runs the blocks up to a section, which has one; "": all there are.
func (w *walker) walk(until string) {
	w.t.Helper()
	if until != "" && !slices.ContainsFunc(w.blocks, func(b block) bool { return b.section == until }) {
		w.t.Fatalf("%s: no block below '## %s' is left to be run", w.page, until)
	}
	for len(w.blocks) > 0 && (until == "" || w.blocks[0].section != until) {
		w.block(w.blocks[0])
		w.blocks = w.blocks[1:]
	}
}

func (w *walker) block(b block) {
	w.t.Helper()
	var on []*vm.Member
	for _, name := range b.machines {
		m, known := w.members[name]
		if !known {
			w.t.Fatalf("%s:%d: there is no machine '%s'", w.page, b.line, name)
		}
		on = append(on, m)
	}
	w.must(vm.Each(on, func(m *vm.Member) error {
		begun := time.Now()
		var d shDone
		err := m.Call(taskLimit, "sh", "set -eu\ncd /run/root\n"+w.here.Replace(b.script), &d)
		w.logf("%s:%d: guest %s, %v, exit code %d:\n%s", w.page, b.line, m.Name, time.Since(begun).Round(10*time.Millisecond), d.Code, d.Out)
		if err == nil && d.Code != 0 {
			err = fmt.Errorf("%s:%d: guest %s: exit code %d", w.page, b.line, m.Name, d.Code)
		}
		return err
	}))
	for _, from := range b.machines {
		for _, to := range strings.Fields(w.sh(from, "mkdir -p /run/sent && ls /run/sent")) {
			w.sh(to, w.sh(from, "cat /run/sent/"+to+" && rm /run/sent/"+to))
		}
	}
}

// sh runs a line of shell in a guest, which has to end with 0.
func (w *walker) sh(guest, line string) string {
	w.t.Helper()
	return (&farNode{guests: w.guests, name: guest}).shell(line)
}

// A page's blocks are found, and commands that are for nobody are not passed over.
func TestWalkIsRead(t *testing.T) {
	page := t.TempDir() + "/page.md"
	write := func(text string) {
		if err := os.WriteFile(page, []byte(strings.ReplaceAll(text, "'''", "```")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("# P\n'''sh a\none\n'''\n## S\n'''\nsays this\n'''\n'''sh a b\ntwo\n## no heading\n'''\n")
	blocks, err := readWalk(page)
	want := []block{{2, "", []string{"a"}, "one\n"}, {9, "S", []string{"a", "b"}, "two\n## no heading\n"}}
	if err != nil || !slices.EqualFunc(blocks, want, func(a, b block) bool { return fmt.Sprint(a) == fmt.Sprint(b) }) {
		t.Errorf("%v, %v", blocks, err)
	}
	for _, bad := range []string{"'''sh\none\n'''\n", "'''sh a\none\n'''\n'''sh a\ntwo\n", "nothing\n"} {
		write(bad)
		if blocks, err := readWalk(page); err == nil {
			t.Errorf("%q: %v", bad, blocks)
		}
	}
}
