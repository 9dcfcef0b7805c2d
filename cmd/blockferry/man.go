package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
)

// manSection is that of commands for the administrator.
const manSection = 8

// newMan writes the manual's pages, for packages; not for people.
func newMan(g *globalOptions) *cobra.Command {
	var date string
	cmd := &cobra.Command{
		Use:    "man FOLDER",
		Short:  "Write the manual's pages: one of the whole, one for each command",
		Hidden: true,
		Args:   exactly(1, "FOLDER"),
		RunE: func(cmd *cobra.Command, args []string) error {
			at, err := time.Parse(time.DateOnly, date)
			if err != nil {
				return exit.Errorf(exit.Usage, "--date '%s' is not a day such as 2026-01-31", date)
			}
			for name, page := range manPages(cmd.Root(), at) {
				path := filepath.Join(args[0], name)
				if err := os.WriteFile(path, []byte(page), 0o644); err != nil {
					return err
				}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&date, "date", "", "the day that the pages name")
	return cmd
}

// manPages are the pages by their files' names, made of what the commands say of
// themselves. The same commands and date give the same pages.
func manPages(root *cobra.Command, at time.Time) map[string]string {
	commands := shown(root)
	pages := map[string]string{}
	for _, c := range append([]*cobra.Command{root}, commands...) {
		p := manPage{}
		p.write(c, at)
		p.section("SEE ALSO")
		var others []string
		for _, other := range append([]*cobra.Command{root}, commands...) {
			if other != c {
				others = append(others, fmt.Sprintf("\\fB%s\\fR(%d)", roff(manName(other)), manSection))
			}
		}
		p.line("%s", strings.Join(others, ",\n"))
		pages[fmt.Sprintf("%s.%d", manName(c), manSection)] = p.String()
	}
	return pages
}

// shown are a command's own commands, but for those that are not for people, and help.
func shown(c *cobra.Command) (found []*cobra.Command) {
	for _, sub := range c.Commands() { // sorted by name
		if !sub.Hidden && sub.Name() != "help" {
			found = append(found, sub)
		}
	}
	return found
}

func manName(c *cobra.Command) string { return strings.ReplaceAll(c.CommandPath(), " ", "-") }

// manPage is one page in the language of man(7).
type manPage struct{ strings.Builder }

func (p *manPage) line(format string, args ...any) { fmt.Fprintf(p, format+"\n", args...) }

func (p *manPage) section(name string) { p.line(".SH %s", name) }

func (p *manPage) write(c *cobra.Command, at time.Time) {
	p.line(`.TH "%s" "%d" "%s" "blockferry %s" "System administration"`, roff(strings.ToUpper(manName(c))), manSection, at.Format(time.DateOnly), roff(version))
	p.section("NAME")
	p.line(`%s \- %s`, roff(manName(c)), roff(lowerFirst(c.Short)))
	p.section("SYNOPSIS")
	subs := shown(c)
	if len(subs) == 0 {
		p.synopsis(c)
	}
	for i, sub := range subs {
		if i > 0 {
			p.line(".br")
		}
		p.synopsis(sub)
	}
	p.section("DESCRIPTION")
	p.text(c)
	switch {
	case !c.HasParent():
		p.section("COMMANDS")
		for _, sub := range subs {
			p.line(".TP\n\\fB%s\\fR(%d)\n%s.", roff(manName(sub)), manSection, roff(sub.Short))
		}
	case len(subs) > 0:
		p.section("COMMANDS")
		for _, sub := range subs {
			p.line(".SS %s", roff(sub.CommandPath()))
			p.text(sub)
			p.flags(sub.LocalNonPersistentFlags())
		}
	}
	p.section("OPTIONS")
	c.InitDefaultHelpFlag()
	p.flags(c.LocalFlags())
	p.flags(c.InheritedFlags())
	p.section("EXIT STATUS")
	for _, row := range exit.Table() {
		p.line(".TP\n.B %d\n%s", row.Code, roff(row.Meaning))
	}
	if !c.HasParent() {
		p.section("FILES")
		for _, file := range [][2]string{
			{config.DefaultPath, "The configuration. /usr/share/doc/blockferry has one with every key, full.yaml."},
			{defaultSocket, "Where the agent answers."},
			{config.DefaultStateDir, "What agents remember of attached volumes, and rescue files. It is no cache: do not remove it."},
		} {
			p.line(".TP\n.I %s\n%s", roff(file[0]), roff(file[1]))
		}
	}
}

func (p *manPage) synopsis(c *cobra.Command) {
	words := strings.TrimPrefix(c.Use, c.Name())
	if c.HasAvailableFlags() || c.HasParent() {
		words += " [options]"
	}
	p.line(".B %s\n%s", roff(c.CommandPath()), roff(strings.TrimSpace(words)))
}

// text is what a command says of itself: lines that are indented stay as they are.
func (p *manPage) text(c *cobra.Command) {
	long := c.Long
	if long == "" {
		long = c.Short + "."
	}
	for i, paragraph := range strings.Split(strings.TrimSpace(long), "\n\n") {
		asIs := strings.HasPrefix(paragraph, "\t") || strings.HasPrefix(paragraph, "  ")
		switch {
		case asIs:
			p.line(".PP\n.RS 4\n.nf")
		case i > 0:
			p.line(".PP")
		}
		for line := range strings.SplitSeq(strings.TrimRight(paragraph, "\n"), "\n") {
			if line = strings.TrimSpace(line); line != "" {
				p.line("%s", roff(line))
			}
		}
		if asIs {
			p.line(".fi\n.RE")
		}
	}
}

func (p *manPage) flags(set *pflag.FlagSet) {
	set.VisitAll(func(f *pflag.Flag) { // sorted by name
		if f.Hidden {
			return
		}
		value, usage := pflag.UnquoteUsage(f)
		name := "\\fB" + roff("--"+f.Name) + "\\fR"
		if f.Shorthand != "" {
			name = "\\fB" + roff("-"+f.Shorthand) + "\\fR, " + name
		}
		if value != "" {
			name += " \\fI" + roff(value) + "\\fR"
		}
		p.line(".TP\n%s\n%s%s", name, roff(usage), roff(defaultOf(f)))
	})
}

// defaultOf says what a flag is without being given, unless that is nothing.
func defaultOf(f *pflag.Flag) string {
	switch f.DefValue {
	case "", "false", "0", "0s", "[]":
		return ""
	}
	return " (default: " + f.DefValue + ")"
}

func lowerFirst(s string) string {
	if s == "" {
		return s
	}
	return strings.ToLower(s[:1]) + s[1:]
}

var roffEscapes = strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`, "\n", " ")

// roff is plain text as man(7) wants it, without a line that is taken for a request.
func roff(text string) string {
	text = roffEscapes.Replace(text)
	if strings.HasPrefix(text, ".") {
		text = `\&` + text
	}
	return text
}
