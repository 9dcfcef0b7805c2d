package qemu

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	// metaPackage depends on the newest kernel's package.
	metaPackage = "linux-image-amd64"
	kernelDir   = "kernel"
	stampFile   = "stamp.json"
)

// kernel is an unpacked one. Its folder has stampFile, written last, an image
// that qemu boots, and lib/modules.
type kernel struct {
	dir     string
	Package string `json:"package"` // the package's file name, which has its version
	Release string `json:"release"` // as uname -r says it
}

func (k kernel) image() string   { return filepath.Join(k.dir, "vmlinux") }
func (k kernel) modules() string { return filepath.Join(k.dir, "lib/modules") }

func readKernel(cache string) (k kernel, err error) {
	k.dir = filepath.Join(cache, kernelDir)
	path := filepath.Join(k.dir, stampFile)
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return k, fmt.Errorf("no kernel in %s", k.dir)
	}
	if err == nil {
		err = json.Unmarshal(text, &k)
	}
	if err == nil {
		// Guests see a link's target elsewhere.
		k.dir, err = filepath.EvalSymlinks(k.dir)
	}
	if err != nil {
		return k, fmt.Errorf("%s: %w", path, err)
	}
	return k, nil
}

// Prepare downloads the newest kernel's Debian package and unpacks it into the
// module's .cache; nothing is installed. A kernel that is there is kept if it is
// that one, or if no newer one can be had. It says on standard output what it
// does.
func Prepare() error {
	cache, err := cacheDir()
	if err != nil {
		return err
	}
	return prepare(cache)
}

func prepare(cache string) error {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return err
	}
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("%s: %w", lock.Name(), err)
	}
	there, errThere := readKernel(cache)
	err = replace(cache, there.Package)
	if err != nil {
		// A package list that is missing or out of date is the usual reason.
		fmt.Println("kernel for qemu:", err)
		if errUpdate := update(); errUpdate != nil {
			err = errors.Join(err, errUpdate)
		} else {
			err = replace(cache, there.Package)
		}
	}
	if err == nil {
		return nil
	}
	err = fmt.Errorf("the kernel that qemu boots, from Debian's package that %s depends on: %w", metaPackage, err)
	if errThere != nil {
		return err
	}
	fmt.Printf("%v\nkept: %s\n", err, there.Package)
	return nil
}

// replace puts the newest kernel in the place of the one from the package file
// named, unless it is the same.
func replace(cache, there string) error {
	name, file, err := newest()
	if err != nil || file == there {
		return err
	}
	dir, err := os.MkdirTemp(cache, "new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Printf("kernel for qemu: downloading %s\n", file)
	if _, err := output(dir, "apt-get", "-o", "APT::Sandbox::User=root", "download", name); err != nil {
		return err
	}
	k := kernel{dir: dir, Package: file, Release: strings.TrimPrefix(name, "linux-image-")}
	if err := k.unpack(); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	final := filepath.Join(cache, kernelDir)
	if err := os.RemoveAll(final); err != nil {
		return err
	}
	return os.Rename(dir, final)
}

// newest names the newest kernel's package and the file it comes in.
func newest() (name, file string, err error) {
	out, err := output("", "apt-cache", "depends", metaPackage)
	if err != nil {
		return "", "", err
	}
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-"); ok {
			name = "linux-image-" + rest
		}
	}
	if name == "" {
		return "", "", fmt.Errorf("the package %s, which names the newest kernel, is not known here", metaPackage)
	}
	// 'URI' file size digest
	out, err = output("", "apt-get", "download", "--print-uris", name)
	if err != nil {
		return "", "", err
	}
	words := strings.Fields(out)
	if len(words) < 2 {
		return "", "", fmt.Errorf("apt-get says '%s' about the package %s", strings.TrimSpace(out), name)
	}
	return name, words[1], nil
}

func update() error {
	command := []string{"apt-get", "update"}
	if os.Getuid() != 0 {
		command = append([]string{"sudo", "-n"}, command...)
	}
	_, err := output("", command[0], command[1:]...)
	return err
}

// unpack makes the kernel's folder of the one package in it.
func (k kernel) unpack() error {
	packages, err := filepath.Glob(filepath.Join(k.dir, "*.deb"))
	if err != nil || len(packages) != 1 {
		return fmt.Errorf("downloaded %q, want one package: %v", packages, err)
	}
	if _, err := output(k.dir, "dpkg-deb", "-x", packages[0], "."); err != nil {
		return err
	}
	compressed, err := os.ReadFile(filepath.Join(k.dir, "boot/vmlinuz-"+k.Release))
	if err != nil {
		return err
	}
	image, err := inner(compressed)
	if err != nil {
		return err
	}
	if err := os.WriteFile(k.image(), image, 0o644); err != nil {
		return err
	}
	if _, err := output(k.dir, "depmod", "-b", ".", k.Release); err != nil {
		return err
	}
	for _, path := range []string{packages[0], filepath.Join(k.dir, "boot"), filepath.Join(k.dir, "usr")} {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	stamp, err := json.Marshal(k)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(k.dir, stampFile), stamp, 0o644)
}

// inner takes the kernel proper, an ELF file, out of a compressed one: an
// emulator starts it in a second, and would take many to decompress it. Offsets
// are those of the x86 boot protocol.
func inner(compressed []byte) ([]byte, error) {
	const setupSectors, payloadOffset, payloadLength, headerEnd = 0x1f1, 0x248, 0x24c, 0x250
	if len(compressed) < headerEnd || string(compressed[0x202:0x206]) != "HdrS" {
		return nil, errors.New("the kernel's file has no boot header")
	}
	begin := (int(compressed[setupSectors])+1)*512 + int(binary.LittleEndian.Uint32(compressed[payloadOffset:]))
	end := begin + int(binary.LittleEndian.Uint32(compressed[payloadLength:]))
	if begin > end || end > len(compressed) {
		return nil, fmt.Errorf("the kernel's payload, bytes %d to %d, is not in its %d bytes", begin, end, len(compressed))
	}
	// After the stream stands its length, which is not xz's business.
	unpack := exec.Command("xz", "--decompress", "--stdout", "--single-stream")
	var complaint bytes.Buffer
	unpack.Stdin, unpack.Stderr = bytes.NewReader(compressed[begin:end]), &complaint
	image, err := unpack.Output()
	if err != nil {
		return nil, fmt.Errorf("the kernel's payload, xz: %w: %s", err, complaint.String())
	}
	if !bytes.HasPrefix(image, []byte("\x7fELF")) {
		return nil, errors.New("the kernel's payload is no ELF file")
	}
	return image, nil
}

// output runs a command in a folder; its error has what the command said.
func output(dir, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(complaint.String()))
	}
	return string(out), nil
}
