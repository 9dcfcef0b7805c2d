package qemu

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

const (
	// InitVar and RootVar tell the initramfs' program (folder init) what the
	// guest's first process is, and the root: its 9p tag, a colon and the
	// options of its mount.
	InitVar = "BLOCKFERRY_GUEST_INIT"
	RootVar = "BLOCKFERRY_GUEST_ROOT"
	// modulesDir holds modules, named so that they are loaded in order.
	modulesDir = "modules"
)

// needed are the modules without which there is neither root nor disk.
var needed = []string{"virtio_pci", "9pnet_virtio", "9p", "virtio_blk"}

// makeInitramfs packs a static program and the modules it loads. It takes less
// than a second, so it is done for each Host and can't be out of date.
func makeInitramfs(k kernel, path string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	program := path + ".init"
	defer os.Remove(program)
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./integration/qemu/init")
	build.Dir, build.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", build.Args, err, out)
	}
	modules, err := k.modulesInOrder(needed)
	if err != nil {
		return err
	}
	var archive cpio
	archive.dir(modulesDir)
	if err := archive.copy("init", program, 0o755); err != nil {
		return err
	}
	for i, module := range modules {
		if err := archive.copy(fmt.Sprintf("%s/%03d-%s", modulesDir, i, filepath.Base(module)), module, 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(path, archive.end(), 0o644)
}

// modulesInOrder lists the files of modules and of all that they need, in the
// order in which they are loaded.
func (k kernel) modulesInOrder(names []string) (files []string, err error) {
	out, err := exec.Command("modprobe", append([]string{"-d", k.dir, "-S", k.Release, "-D", "-a"}, names...)...).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("modules %q of kernel %s: %w: %s", names, k.Release, err, out)
	}
	for line := range strings.Lines(string(out)) {
		if words := strings.Fields(line); len(words) >= 2 && words[0] == "insmod" && !slices.Contains(files, words[1]) {
			files = append(files, words[1])
		}
	}
	return files, nil
}

// cpio is an archive in the kernel's format for an initramfs ("newc"): per
// entry 6 characters of magic and 13 numbers of 8 hexadecimal digits, the name
// with a zero, the content; name and content padded to multiples of 4.
type cpio struct {
	bytes.Buffer
	entries int
}

const (
	modeDir  = 0o040000
	modeFile = 0o100000
)

func (c *cpio) entry(name string, mode int, content []byte) {
	c.entries++
	c.WriteString("070701")
	for _, field := range []int{
		c.entries, mode, 0, 0, // inode, mode, owner, group
		1, 0, len(content), // links, time of change, length
		0, 0, 0, 0, // device it is on, device it is
		len(name) + 1, 0, // length of the name, checksum (none in this format)
	} {
		fmt.Fprintf(c, "%08x", field)
	}
	c.WriteString(name + "\x00")
	c.pad()
	c.Write(content)
	c.pad()
}

func (c *cpio) pad() { c.Write(make([]byte, -c.Len()&3)) }

func (c *cpio) dir(name string) { c.entry(name, modeDir|0o755, nil) }

func (c *cpio) copy(name, from string, mode int) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	c.entry(name, modeFile|mode, content)
	return nil
}

func (c *cpio) end() []byte {
	c.entry("TRAILER!!!", 0, nil)
	return c.Bytes()
}
