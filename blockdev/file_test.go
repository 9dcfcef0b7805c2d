package blockdev_test

import (
	"os"
	"path/filepath"
	"testing"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
)

// image makes a sparse regular file.
func image(t *testing.T, dir string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, "image")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, path string, o blockdev.OpenOptions) *blockdev.File {
	t.Helper()
	d, err := blockdev.OpenFile(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

func TestRegularFileIsDevice(t *testing.T) {
	blocktest.TestDevice(t, func(t *testing.T) blockdev.Device {
		return open(t, image(t, t.TempDir(), 8<<20), blockdev.OpenOptions{Write: true})
	})
}
