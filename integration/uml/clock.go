package uml

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"blockferry/integration/vm"
)

//go:embed clock/clock.c
var clockSource []byte

var building sync.Mutex

// ownClock builds, once in a folder, the library that gives a guest a clock that the host
// can stop.
func ownClock(dir string) (library string, err error) {
	building.Lock()
	defer building.Unlock()
	library, source := filepath.Join(dir, "clock.so"), filepath.Join(dir, "clock.c")
	if _, err := os.Stat(library); err == nil {
		return library, nil
	}
	if _, err := exec.LookPath("clang"); err != nil {
		return "", fmt.Errorf("%w: install the package clang (make deps)", vm.ErrNoGuest)
	}
	if err := os.WriteFile(source, clockSource, 0o600); err != nil {
		return "", err
	}
	build := exec.Command("clang", "-O2", "-Wall", "-Werror", "-fPIC", "-shared", "-nostdlib", "-o", library, source)
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%v: %w\n%s", build.Args, err, out)
	}
	return library, nil
}
