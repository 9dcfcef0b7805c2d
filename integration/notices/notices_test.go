package main

import (
	"bytes"
	"os"
	"strings"
	"testing"
)

// Every module that the program is linked from is named, with the text of its licence; the
// same each time.
func TestNoticesNameEveryModule(t *testing.T) {
	t.Chdir("../..")
	var out, again bytes.Buffer
	if err := write(&out, program); err != nil {
		t.Fatal(err)
	}
	text := out.String()
	deps, err := list("-deps", "-f", "{{with .Module}}{{.Path}}{{end}}", program)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(strings.Fields(string(deps))); n < 20 {
		t.Fatalf("only %d modules", n)
	}
	for path := range strings.FieldsSeq(string(deps)) {
		if !strings.Contains(text, "\n"+path+" ") && !strings.Contains(text, "\n"+path+"\n") {
			t.Errorf("%s is not named", path)
		}
	}
	for _, words := range []string{
		"Copyright 2009 The Go Authors", "Copyright (c) 2017 Nathan Sweet", "Apache License", "go1.",
		"Copyright (c) 2016 Caleb Spare", // of a package within a module
		"Copyright 2018 CoreOS, Inc",     // of a NOTICE
	} {
		if !strings.Contains(text, words) {
			t.Errorf("'%s' is missing", words)
		}
	}
	if err := write(&again, program); err != nil || again.String() != text {
		t.Errorf("it is another text the second time (%v)", err)
	}
}

// A module without a licence must not be in a package.
func TestNoticesWantALicence(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for name, text := range map[string]string{"go.mod": "module bare\n\ngo 1.26.0\n", "main.go": "package main\n\nfunc main() {}\n", "license_test.go": "package main\n"} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := write(&bytes.Buffer{}, "."); err == nil || !strings.Contains(err.Error(), "bare : no licence in ") {
		t.Errorf("%v", err)
	}
}
