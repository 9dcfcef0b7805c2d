package main

import (
	"path/filepath"
	"testing"
)

// Whatever dead-man an agent has, notes are written where the next one and the
// agent look.
func TestNotesFolder(t *testing.T) {
	here := t.TempDir()
	t.Chdir(here)
	for socket, want := range map[string]string{
		"":                      "/run/blockferry-deadman", // no service
		defaultDeadManSocket:    "/run/blockferry-deadman",
		"/run/x/dead-man.sock":  "/run/x",
		"dead-man.sock":         here,
		"there/./dead-man.sock": filepath.Join(here, "there"),
	} {
		if got, err := notesFolder(socket); err != nil || got != want {
			t.Errorf("socket '%s': notes in %s, %v; want %s", socket, got, err, want)
		}
	}
}
