package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"blockferry/cmd/blockferry/exit"
)

// writtenPages are the manual's pages as the command writes them.
func writtenPages(t *testing.T) map[string]string {
	t.Helper()
	dir := t.TempDir()
	if _, errs, code := blockferry(t, "man", "--date", "2026-01-31", dir); code != exit.OK {
		t.Fatalf("code %d: %s", code, errs)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	pages := map[string]string{}
	for _, file := range files {
		text, err := os.ReadFile(filepath.Join(dir, file.Name()))
		if err != nil {
			t.Fatal(err)
		}
		pages[file.Name()] = string(text)
	}
	return pages
}

// Whatever a command and its flags say of themselves is in its page, and those that are not
// for people are in none.
func TestManNamesEverything(t *testing.T) {
	pages := writtenPages(t)
	root, _ := newRoot(streams{})
	root.InitDefaultCompletionCmd()
	commands, flags := 0, 0
	var visit func(c *cobra.Command, page string)
	visit = func(c *cobra.Command, page string) {
		if c.Hidden {
			for name, text := range pages {
				if strings.Contains(text, roff(c.CommandPath())) || strings.Contains(name, manName(c)+".") {
					t.Errorf("%s names '%s', which is hidden", name, c.CommandPath())
				}
			}
			return
		}
		commands++
		if page == "" || c.Parent() == root {
			page = manName(c) + ".8"
		}
		text := pages[page]
		wants := []string{roff(c.CommandPath())}
		for line := range strings.Lines(c.Long) {
			wants = append(wants, roff(strings.TrimSpace(line)))
		}
		for _, set := range []*pflag.FlagSet{c.NonInheritedFlags(), root.PersistentFlags()} {
			set.VisitAll(func(f *pflag.Flag) {
				flags++
				_, usage := pflag.UnquoteUsage(f)
				wants = append(wants, "\\fB"+roff("--"+f.Name)+"\\fR", roff(usage))
			})
		}
		for _, want := range wants {
			if !strings.Contains(text, want) {
				t.Errorf("%s does not say '%s'", page, want)
			}
		}
		for _, sub := range c.Commands() {
			visit(sub, page)
		}
	}
	visit(root, "")
	if commands < 25 || flags < 50 {
		t.Errorf("only %d commands and %d flags were looked at", commands, flags)
	}
	for _, row := range exit.Table() {
		if !strings.Contains(pages["blockferry-up.8"], roff(row.Meaning)) {
			t.Errorf("the exit status %d is missing", row.Code)
		}
	}
}

// The same on every machine and every day.
func TestManIsTheSameAgain(t *testing.T) {
	first, second := writtenPages(t), writtenPages(t)
	if len(first) < 20 {
		t.Fatalf("%d pages", len(first))
	}
	for name, text := range first {
		if second[name] != text {
			t.Errorf("%s differs from one time to the next", name)
		}
		if !strings.HasPrefix(text, ".TH ") || !strings.Contains(text, `"2026\-01\-31"`) && !strings.Contains(text, `"2026-01-31"`) {
			t.Errorf("%s begins with %.80q", name, text)
		}
	}
	if _, errs, code := blockferry(t, "man", t.TempDir()); code != exit.Usage || !strings.Contains(errs, "--date") {
		t.Errorf("without a date: code %d, %q", code, errs)
	}
}

// Text that would be a request, or a character of its own, to the formatter.
func TestRoff(t *testing.T) {
	for text, want := range map[string]string{
		".so /etc/passwd": `\&.so /etc/passwd`,
		"'br":             `\(aqbr`,
		`a\b -x ~/.rc`:    `a\eb \-x \(ti/.rc`,
		"two\nlines":      "two lines",
	} {
		if got := roff(text); got != want {
			t.Errorf("%q becomes %q, want %q", text, got, want)
		}
	}
}
