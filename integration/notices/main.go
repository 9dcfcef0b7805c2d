// Command notices writes the licences, and what their holders want said, of all that is
// linked into the binary: the packages carry it. It fails if a module has none.
package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

const program = "./cmd/blockferry"

func main() {
	out := bufio.NewWriter(os.Stdout)
	err := write(out, program)
	if err == nil {
		err = out.Flush()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "notices:", err)
		os.Exit(1)
	}
}

// module is one that a program is linked from. Folders are its own and those that stand
// between it and its linked packages, which may have licences of their own.
type module struct {
	path, version string
	folders       []string
}

// linked are the modules that a program is made of, in the order of their paths; the
// standard library is the last.
func linked(program string) (found []*module, err error) {
	out, err := list("-deps", "-f", "{{with .Module}}{{.Path}}\t{{.Version}}\t{{.Dir}}\t{{$.Dir}}{{end}}", program)
	if err != nil {
		return nil, err
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	slices.Sort(lines)
	for _, line := range slices.Compact(lines) {
		if line == "" {
			continue
		}
		words := strings.Split(line, "\t")
		if len(words) != 4 || words[2] == "" || !strings.HasPrefix(words[3], words[2]) {
			return nil, fmt.Errorf("go list says '%s', want path, version and folder of a module, and that of a package in it", line)
		}
		if len(found) == 0 || found[len(found)-1].path != words[0] {
			found = append(found, &module{path: words[0], version: words[1]})
		}
		m := found[len(found)-1]
		for dir := words[3]; len(dir) >= len(words[2]); dir = filepath.Dir(dir) {
			if !slices.Contains(m.folders, dir) {
				m.folders = append(m.folders, dir)
			}
		}
	}
	for _, m := range found {
		slices.Sort(m.folders) // the module's own is the first
	}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, err
	}
	return append(found, &module{"Go's standard library", runtime.Version(), []string{strings.TrimSpace(string(root))}}), nil
}

func list(args ...string) ([]byte, error) {
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%v: %w: %s", cmd.Args, err, errs.String())
	}
	return out, nil
}

var (
	licence = regexp.MustCompile(`(?i)^(licen[cs]e|copying)([.-].*)?$`)
	notice  = regexp.MustCompile(`(?i)^(notice|patents)([.-].*)?$`)
)

// texts are the files of that kind in a folder, by name.
func texts(dir string, kind *regexp.Regexp) (texts []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		if entry.IsDir() || strings.HasSuffix(entry.Name(), ".go") || !kind.MatchString(entry.Name()) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			return nil, err
		}
		texts = append(texts, strings.Trim(strings.ReplaceAll(string(text), "\r", ""), "\n"))
	}
	return texts, nil
}

// write writes each text once, under the names of all modules that have it.
func write(w io.Writer, program string) error {
	modules, err := linked(program)
	if err != nil {
		return err
	}
	holders := map[string][]string{} // of each text
	var order []string
	for _, m := range modules {
		for i, dir := range m.folders {
			licences, err := texts(dir, licence)
			if err != nil {
				return err
			}
			if i == 0 && len(licences) == 0 {
				return fmt.Errorf("%s %s: no licence in %s", m.path, m.version, dir)
			}
			notices, err := texts(dir, notice)
			if err != nil {
				return err
			}
			holder := strings.TrimSpace(m.path + " " + m.version)
			for _, text := range append(licences, notices...) {
				if holders[text] == nil {
					order = append(order, text)
				}
				if !slices.Contains(holders[text], holder) {
					holders[text] = append(holders[text], holder)
				}
			}
		}
	}
	fmt.Fprintf(w, "The program %s is made of the modules below, under the licences that follow their names.\n", filepath.Base(program))
	for _, text := range order {
		fmt.Fprintf(w, "\n%s\n", strings.Repeat("=", 78))
		for _, holder := range holders[text] {
			fmt.Fprintln(w, holder)
		}
		fmt.Fprintf(w, "%s\n\n%s\n", strings.Repeat("-", 78), text)
	}
	return nil
}
