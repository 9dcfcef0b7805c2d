package config

import (
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"
)

const (
	maxFileBytes = 1 << 20
	maxErrors    = 20
)

// Load reads and checks a file. A mistake in it is an Errors; a file that
// can't be read is what the system says.
func Load(path string) (*Config, error) {
	info, err := os.Stat(path)
	if err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil, &Error{File: path, Message: "no such file; write one (samples are in docs/config/valid) or name another with --config"}
		}
		return nil, &Error{File: path, Message: err.Error()}
	}
	if info.Size() > maxFileBytes {
		return nil, &Error{File: path, Message: fmt.Sprintf("%d bytes are no configuration; the limit is %d", info.Size(), maxFileBytes)}
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, &Error{File: path, Message: err.Error()}
	}
	return Parse(path, content)
}

// Parse checks the content of a file; path is for messages only.
func Parse(path string, content []byte) (*Config, error) {
	r := &reader{file: path, config: &Config{Path: path}, disks: map[string]string{}}
	file, err := parser.ParseBytes(content, 0)
	if err != nil {
		return nil, r.syntax(err)
	}
	switch {
	case len(file.Docs) == 0 || file.Docs[0].Body == nil:
		r.errors = Errors{{File: path, Line: 1, Column: 1, Message: "the file is empty; it needs 'volumes:'"}}
	case len(file.Docs) > 1:
		r.fail(file.Docs[1].Body, "a second document; everything belongs into the first")
	default:
		r.root(file.Docs[0].Body)
	}
	if len(r.errors) > 0 {
		sort.SliceStable(r.errors, func(i, j int) bool {
			a, b := r.errors[i], r.errors[j]
			return a.Line < b.Line || (a.Line == b.Line && a.Column < b.Column)
		})
		return nil, r.errors
	}
	r.config.sort()
	return r.config, nil
}

// reader walks the parsed file; it goes on after a mistake to report all.
type reader struct {
	file   string
	config *Config
	errors Errors
	disks  map[string]string // cleaned path -> where it was used first
	afar   []afar            // what is about other nodes
	auto   []autoVolume      // volumes with 'promote: auto'
}

func (r *reader) syntax(err error) error {
	var at yaml.Error
	if errors.As(err, &at) && at.GetToken() != nil {
		return Errors{r.at(at.GetToken(), "%s", at.GetMessage())}
	}
	return Errors{{File: r.file, Message: err.Error()}}
}

func (r *reader) at(t *token.Token, format string, args ...any) *Error {
	e := &Error{File: r.file, Message: fmt.Sprintf(format, args...)}
	if t != nil && t.Position != nil {
		e.Line, e.Column = t.Position.Line, t.Position.Column
	}
	return e
}

func (r *reader) fail(n ast.Node, format string, args ...any) {
	if len(r.errors) == maxErrors {
		return
	}
	var t *token.Token
	if n != nil {
		t = n.GetToken()
	}
	// The token of a mapping is its first colon; its first key is where a
	// reader looks.
	if m, ok := n.(*ast.MappingNode); ok && len(m.Values) > 0 {
		t = m.Values[0].Key.GetToken()
	}
	r.errors = append(r.errors, r.at(t, format, args...))
}

// field is a key that a mapping may hold.
type field struct {
	key string
	set func(ast.Node)
}

// mapping calls the setter of each key of a mapping, and each with a
// key that is not known.
func (r *reader) mapping(n ast.Node, what string, each func(key *ast.MappingValueNode, name string) bool) {
	m, ok := n.(*ast.MappingNode)
	if !ok {
		r.fail(n, "%s must be a list of 'key: value' lines", what)
		return
	}
	seen := map[string]bool{}
	for _, pair := range m.Values {
		name, ok := scalar(pair.Key)
		if !ok {
			r.fail(pair.Key, "a plain word was expected as a key of %s", what)
			continue
		}
		if seen[name] {
			r.fail(pair.Key, "'%s' stands twice in %s", name, what)
			continue
		}
		seen[name] = true
		if !each(pair, name) {
			return
		}
	}
}

// fields reads a mapping with fixed keys.
func (r *reader) fields(n ast.Node, what string, known []field) map[string]ast.Node {
	present := map[string]ast.Node{}
	r.mapping(n, what, func(pair *ast.MappingValueNode, name string) bool {
		var keys []string
		for _, f := range known {
			if f.key == name {
				present[name] = pair.Key
				f.set(pair.Value)
				return true
			}
			keys = append(keys, f.key)
		}
		r.fail(pair.Key, "unknown key '%s' in %s%s", name, what, didYouMean(name, keys))
		return true
	})
	return present
}

// scalar is the text of a plain value. Anchors, aliases, tags, lists and
// mappings are not plain.
func scalar(n ast.Node) (string, bool) {
	switch v := n.(type) {
	case *ast.StringNode:
		return v.Value, true
	case *ast.LiteralNode:
		return v.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return strings.TrimSpace(n.GetToken().Value), true
	}
	return "", false
}

// text reads a plain value and hands it on; accept's error becomes ours.
func (r *reader) text(key string, accept func(string) error) field {
	return field{key, func(n ast.Node) {
		s, ok := scalar(n)
		if !ok || s == "" {
			r.fail(n, "'%s' needs a plain value", key)
			return
		}
		if err := accept(s); err != nil {
			r.fail(n, "%s: %s", key, err)
		}
	}}
}

func (r *reader) choice(key string, set func(string), words ...string) field {
	return r.text(key, func(s string) error {
		for _, w := range words {
			if s == w {
				set(s)
				return nil
			}
		}
		return fmt.Errorf("'%s' is not one of %s%s", s, strings.Join(words, ", "), onlyNearest(s, words))
	})
}

func onlyNearest(s string, words []string) string {
	if best := nearest(s, words); best != "" {
		return "; did you mean '" + best + "'?"
	}
	return ""
}

func (r *reader) duration(key string, into *time.Duration, low, high time.Duration) field {
	return r.text(key, func(s string) error {
		d, err := parseDuration(s)
		if err == nil && (d < low || d > high) {
			err = fmt.Errorf("%s is not between %s and %s", s, shortDuration(low), shortDuration(high))
		}
		*into = d
		return err
	})
}

func (r *reader) size(key string, into *int64, low, high, multiple int64) field {
	return r.text(key, func(s string) error {
		n, err := ParseSize(s)
		switch {
		case err != nil:
			return err
		case n < low || n > high:
			return fmt.Errorf("%s is not between %s and %s", s, FormatSize(low), FormatSize(high))
		case n%multiple != 0:
			return fmt.Errorf("%s is not a multiple of %s", s, FormatSize(multiple))
		}
		*into = n
		return nil
	})
}
