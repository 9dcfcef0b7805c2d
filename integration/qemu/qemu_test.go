package qemu

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A machine that can't have the kernel is told so, and what is missing.
func TestPrepareFailsClearly(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	cache := t.TempDir()
	if err := prepare(cache); err == nil || !strings.Contains(err.Error(), metaPackage) || !strings.Contains(err.Error(), "apt-cache") {
		t.Errorf("without apt: %v", err)
	}
	if _, err := readKernel(cache); err == nil {
		t.Error("there is a kernel")
	}
	// One that is there goes on to be used.
	if err := os.Mkdir(filepath.Join(cache, kernelDir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cache, kernelDir, stampFile), []byte(`{"package":"p","release":"r"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := prepare(cache); err != nil {
		t.Error(err)
	}
	if k, err := readKernel(cache); err != nil || k.Package != "p" || k.Release != "r" {
		t.Errorf("%+v, %v", k, err)
	}
}

func TestInner(t *testing.T) {
	compress := func(text string) []byte {
		cmd := exec.Command("xz", "--stdout")
		cmd.Stdin = strings.NewReader(text)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	file := func(payload []byte, length int) []byte {
		image := make([]byte, 3*512, 3*512+len(payload)+4)
		image[0x1f1] = 1
		copy(image[0x202:], "HdrS")
		image[0x248], image[0x249] = 0, 2 // 512 after the two sectors
		image[0x24c], image[0x24d] = byte(length), byte(length>>8)
		return append(append(image, payload...), 1, 2, 3, 4)
	}
	elf, text := compress("\x7fELF and more"), compress("text")
	if got, err := inner(file(elf, len(elf)+4)); err != nil || string(got) != "\x7fELF and more" {
		t.Errorf("%q, %v", got, err)
	}
	for what, image := range map[string][]byte{
		"too short": make([]byte, 600), "no header": make([]byte, 2000), "payload beyond its end": file(elf, 60000),
		"cut short": file(elf, len(elf)-10), "no ELF": file(text, len(text)), "not compressed": file(bytes.Repeat([]byte("x"), 100), 100),
	} {
		if got, err := inner(image); err == nil {
			t.Errorf("%s: %q", what, got)
		}
	}
}
