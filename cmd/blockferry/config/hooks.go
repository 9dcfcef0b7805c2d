package config

import (
	"fmt"
	"path/filepath"
	"time"

	"github.com/goccy/go-yaml/ast"

	"blockferry/cmd/blockferry/hooks"
)

// Hooks are the commands that are run when something happens to a volume, those
// said of the volume before those of the node.
type Hooks struct {
	// Commands are of each event the program and its arguments.
	Commands map[hooks.Event][]string
	// Timeout is how long each may run.
	Timeout time.Duration
	// BehindAfter is the lag from which on a replica is behind.
	BehindAfter time.Duration
}

// The lag of which 'behind' tells.
const (
	MinBehindAfter     = time.Second
	MaxBehindAfter     = 24 * time.Hour
	DefaultBehindAfter = time.Minute
)

// hooks reads a mapping of events to commands.
func (r *reader) hooks(into **Hooks, what string) field {
	return field{"hooks", func(n ast.Node) {
		h := &Hooks{Commands: map[hooks.Event][]string{}}
		*into = h
		known := []field{
			r.duration("timeout", &h.Timeout, hooks.MinTimeout, hooks.MaxTimeout),
			r.duration("behind-after", &h.BehindAfter, MinBehindAfter, MaxBehindAfter),
		}
		for _, e := range hooks.Events() {
			known = append(known, field{string(e), func(n ast.Node) { h.Commands[e] = r.command(n, fmt.Sprintf("hook %s of %s", e, what)) }})
		}
		r.fields(n, "'hooks' of "+what, known)
	}}
}

// command reads a program with its arguments: a list, or the program alone.
func (r *reader) command(n ast.Node, what string) []string {
	values := []ast.Node{n}
	if list, ok := n.(*ast.SequenceNode); ok {
		values = list.Values
	}
	var words []string
	for _, one := range values {
		word, ok := scalar(one)
		if !ok {
			r.fail(one, "%s must be a program and its arguments, as in [/usr/local/sbin/fence, --now]", what)
			return nil
		}
		words = append(words, word)
	}
	if len(words) == 0 || !filepath.IsAbs(words[0]) {
		r.fail(n, "%s needs the whole path of a program; for a line of shell: [/bin/sh, -c, \"...\"]", what)
	}
	return words
}

// inherit fills in what the node says, and what nobody does.
func (h *Hooks) inherit(node *Hooks) *Hooks {
	all := &Hooks{Commands: map[hooks.Event][]string{}, Timeout: hooks.DefaultTimeout, BehindAfter: DefaultBehindAfter}
	for _, from := range []*Hooks{node, h} {
		if from == nil {
			continue
		}
		for e, c := range from.Commands {
			all.Commands[e] = c
		}
		if from.Timeout > 0 {
			all.Timeout = from.Timeout
		}
		if from.BehindAfter > 0 {
			all.BehindAfter = from.BehindAfter
		}
	}
	return all
}
