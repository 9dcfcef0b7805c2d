package spill

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"blockferry/blockdev"
)

// A file is made where a link leads to. A link to nothing, such as to a file
// system that is not mounted, stays, and nothing is made beside it.
func TestCreateBehindALink(t *testing.T) {
	near, far := t.TempDir(), t.TempDir()
	link, file := filepath.Join(near, "link"), filepath.Join(far, "file")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	f := &File{Path: link, LimitBytes: 1 << 20}
	header := make([]byte, blockdev.BlockSize)
	if s, err := f.Create(header, false); err == nil {
		s.Close()
		t.Error("a file was made beside a link to nothing")
	} else if !strings.Contains(err.Error(), file) {
		t.Errorf("refused: %v", err)
	}
	if err := os.WriteFile(file, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Create(header, false); !errors.Is(err, fs.ErrExist) {
		t.Errorf("made where there is one: %v", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "old" {
		t.Errorf("the file that was there was replaced, %d bytes", len(b))
	}
	s, err := f.Create(header, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if to, err := os.Readlink(link); err != nil || to != file {
		t.Errorf("the link: %q, %v", to, err)
	}
	if info, err := os.Stat(file); err != nil || info.Size() != f.size() || s.InPlace() != nil {
		t.Errorf("the file: %v, %v, %v", info, err, s.InPlace())
	}
}
