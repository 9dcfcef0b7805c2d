// Package rules holds the tests that keep the house in order: which room may
// know which, where unsafe code may stand, how long a file may grow.
package rules

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const (
	module = "blockferry"
	root   = "../.."
	// maxLines is where a file wants to become two.
	maxLines = 700
)

// unsafeAllowed lists the only files that may import unsafe: those that hand
// structures to the kernel.
var unsafeAllowed = []string{
	"blockdev/dm/ioctl.go",
	"blockdev/ioctl.go",
	"blockdev/buffer.go",     // an address, to see whether it is aligned
	"blockdev/bpf/memory.go", // memory shared with the kernel, as words
}

// layer is one room and whom it may know. Of several that fit, the longest
// prefix rules.
type layer struct {
	prefix  string   // of packages, below the module
	may     []string // prefixes of packages it may import, itself included
	never   []string // exceptions from may
	inTests []string // what its tests may import on top
}

var layers = []layer{
	{prefix: "proto", may: []string{"proto"}},
	{prefix: "protocol", may: []string{"protocol", "proto"}, inTests: []string{"blockdev/blocktest"}},
	{prefix: "blockdev", may: []string{"blockdev"}},
	// era reads metadata over an io.ReaderAt and knows no live device.
	{prefix: "blockdev/era", may: []string{"blockdev"}, never: []string{"blockdev/dm", "blockdev/bpf", "blockdev/volume"}},
	// The rooms below volume do not know the house that volume builds of them.
	{prefix: "blockdev/dm", may: []string{"blockdev"}, never: []string{"blockdev/volume", "blockdev/era", "blockdev/bpf", "blockdev/attach"}},
	{prefix: "blockdev/bpf", may: []string{"blockdev"}, never: []string{"blockdev/dm", "blockdev/volume", "blockdev/era", "blockdev/attach"}},
	// Which disk is meant does not depend on what is made of it.
	{prefix: "blockdev/udev", may: []string{"blockdev"}, never: []string{"blockdev/dm", "blockdev/bpf", "blockdev/volume", "blockdev/era", "blockdev/attach", "blockdev/deadman", "blockdev/precopy"}},
	// The dead-man serves whoever stops writers.
	{prefix: "blockdev/deadman", may: []string{"blockdev"}, never: []string{"blockdev/volume", "blockdev/attach", "blockdev/precopy"}},
	// The engine knows nothing of how writers are stopped, nor of who marks.
	{prefix: "blockdev/precopy", may: []string{"blockdev"}, never: []string{"blockdev/volume", "blockdev/attach", "blockdev/bpf", "blockdev/dm"}},
	// No mapper under what is attached.
	{prefix: "blockdev/attach", may: []string{"blockdev"}, never: []string{"blockdev/dm", "blockdev/volume", "blockdev/era"}},
	{prefix: "cmd", may: []string{"cmd", "protocol", "proto", "blockdev"}, never: []string{"blockdev/blocktest"},
		inTests: []string{"blockdev/blocktest"}},
	{prefix: "integration", may: []string{""}},
}

// below says whether a package is prefix or stands below it; every package is
// below "".
func below(pkg, prefix string) bool {
	return prefix == "" || pkg == prefix || strings.HasPrefix(pkg, prefix+"/")
}

// violation says why a package (named from the module's root) may not import
// another, or "".
func violation(from, to string, test bool) string {
	var rule *layer
	for i := range layers {
		if below(from, layers[i].prefix) && (rule == nil || len(layers[i].prefix) > len(rule.prefix)) {
			rule = &layers[i]
		}
	}
	if rule == nil {
		return "stands in no known room"
	}
	fits := func(prefixes []string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return below(to, p) })
	}
	if from == to || test && fits(rule.inTests) {
		return ""
	}
	if fits(rule.never) || !fits(rule.may) {
		return fmt.Sprintf("may know %q without %q", rule.may, rule.never)
	}
	return ""
}

type goPackage struct {
	ImportPath                         string
	Imports, TestImports, XTestImports []string
}

func TestLayers(t *testing.T) {
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	seen := 0
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var p goPackage
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		from := strings.TrimPrefix(p.ImportPath, module+"/")
		check := func(imports []string, test bool) {
			for _, path := range imports {
				to, ours := strings.CutPrefix(path, module+"/")
				if !ours {
					continue
				}
				seen++
				if why := violation(from, to, test); why != "" {
					t.Errorf("%s imports %s (test: %v): it %s", from, to, test, why)
				}
			}
		}
		check(p.Imports, false)
		check(append(p.TestImports, p.XTestImports...), true)
	}
	if seen == 0 {
		t.Error("no imports seen: this test checks nothing")
	}
}

func TestLayersObject(t *testing.T) {
	for _, c := range []struct {
		from, to string
		test, ok bool
	}{
		{"protocol", "proto", false, true},
		{"protocol", "blockdev", false, false},
		{"protocol", "blockdev", true, false},
		{"protocol", "blockdev/blocktest", true, true},
		{"protocol", "blockdev/blocktest", false, false},
		{"blockdev/volume", "blockdev/dm", false, true},
		{"blockdev/volume", "protocol", false, false},
		{"blockdev/volume", "proto", true, false},
		{"blockdev/era", "blockdev", false, true},
		{"blockdev/era", "blockdev/dm", false, false},
		{"blockdev/bpf", "blockdev", false, true},
		{"blockdev/bpf", "blockdev/dm", false, false},
		{"blockdev/volume", "blockdev/bpf", false, true},
		{"cmd/blockferry", "blockdev/volume", false, true},
		{"cmd/blockferry", "integration/uml", false, false},
		{"proto", "protocol", false, false},
		{"integration/uml", "blockdev/dm", false, true},
		{"protocols", "proto", false, false},
	} {
		if why := violation(c.from, c.to, c.test); (why == "") != c.ok {
			t.Errorf("%s -> %s (test: %v): %q", c.from, c.to, c.test, why)
		}
	}
}

// eachGoFile visits the module's own source.
func eachGoFile(t *testing.T, visit func(path string, text []byte)) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := entry.Name()
		if entry.IsDir() && path != root && (strings.HasPrefix(name, ".") || name == "testdata" || name == "bin") {
			return fs.SkipDir
		}
		if entry.IsDir() || !strings.HasSuffix(name, ".go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		seen++
		visit(filepath.ToSlash(relative), text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen == 0 {
		t.Fatal("no source seen: this test checks nothing")
	}
}

func generated(path string, text []byte) bool {
	file, err := parser.ParseFile(token.NewFileSet(), path, text, parser.PackageClauseOnly|parser.ParseComments)
	return err == nil && ast.IsGenerated(file)
}

func TestUnsafeStandsInFewFiles(t *testing.T) {
	eachGoFile(t, func(path string, text []byte) {
		file, err := parser.ParseFile(token.NewFileSet(), path, text, parser.ImportsOnly)
		if err != nil {
			t.Error(err)
			return
		}
		for _, imported := range file.Imports {
			switch imported.Path.Value {
			case `"unsafe"`:
				if !slices.Contains(unsafeAllowed, path) && !generated(path, text) {
					t.Errorf("%s imports unsafe; only %v may", path, unsafeAllowed)
				}
			case `"C"`:
				t.Errorf("%s uses cgo; the binary is built without it", path)
			}
		}
	})
}

func TestFilesStayReadable(t *testing.T) {
	eachGoFile(t, func(path string, text []byte) {
		if strings.HasSuffix(path, "_test.go") || generated(path, text) {
			return
		}
		if lines := bytes.Count(text, []byte("\n")); lines > maxLines {
			t.Errorf("%s has %d lines, more than %d: split it where two ideas meet", path, lines, maxLines)
		}
	})
}

// The folders and files at the top are the map of the house.
func TestTopLevel(t *testing.T) {
	known := []string{"cmd", "blockdev", "protocol", "proto", "integration", "docs", "deploy",
		"go.mod", "go.sum", "Makefile", "README.md", "ARCHITECTURE.md", "CHANGELOG.md", "LICENSE"}
	cmd := exec.Command("git", "ls-files")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		t.Skipf("not a git work tree: %v", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(out))
	for lines.Scan() {
		top, _, _ := strings.Cut(lines.Text(), "/")
		if !strings.HasPrefix(top, ".") && !slices.Contains(known, top) {
			t.Errorf("%s: the top holds only %v and dotfiles", lines.Text(), known)
		}
	}
}

// Links between the pages, and the files they name, must exist.
func TestPagesNameWhatExists(t *testing.T) {
	named := regexp.MustCompile("\\]\\(([^)#:]+)(?:#[^)]*)?\\)|`((?:cmd|blockdev|protocol|proto|integration)/[A-Za-z0-9_/.-]+)`")
	pages, err := filepath.Glob(root + "/docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	top, err := filepath.Glob(root + "/*.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, page := range append(pages, top...) {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range named.FindAllStringSubmatch(string(text), -1) {
			path := filepath.Join(root, match[2])
			if match[1] != "" {
				path = filepath.Join(filepath.Dir(page), match[1])
			}
			seen++
			if _, err := os.Stat(path); err != nil {
				t.Errorf("%s names %s: %v", page, match[0], err)
			}
		}
	}
	if seen == 0 {
		t.Error("no links seen: this test checks nothing")
	}
}

// The tests that the promises and the page of faults name must exist: a renamed
// one takes its line along. A name that ends in … stands for all that begin so.
func TestPromisesNameTests(t *testing.T) {
	var source strings.Builder
	eachGoFile(t, func(path string, text []byte) {
		if strings.HasSuffix(path, "_test.go") {
			source.Write(text)
		}
	})
	for _, page := range []string{"docs/promises.md", "docs/faults.md"} {
		text, err := os.ReadFile(root + "/" + page)
		if err != nil {
			t.Fatal(err)
		}
		names := regexp.MustCompile("`(Test[A-Za-z0-9]+)(…?)`").FindAllStringSubmatch(string(text), -1)
		for _, name := range names {
			want := "\nfunc " + name[1]
			if name[2] == "" {
				want += "("
			}
			if !strings.Contains(source.String(), want) {
				t.Errorf("%s names %s, which does not exist", page, name[0])
			}
		}
		if len(names) == 0 {
			t.Errorf("%s names no test: this test checks nothing of it", page)
		}
	}
}
