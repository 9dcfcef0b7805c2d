package main

import (
	"os/exec"
	"strings"
	"testing"
)

// The demo, short, where this machine's own kernel can show it. In a guest it
// takes a minute; there the integration tests show the same.
func TestDemo(t *testing.T) {
	if why := whyNotNative(); why != "" {
		t.Skip(why)
	}
	out, err := exec.Command("go", "run", ".", "-seconds", "4").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "demo: OK") {
		t.Errorf("%v\n%s", err, out)
	}
}
