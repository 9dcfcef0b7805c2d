package integration

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// The packages are made once: two versions, which differ in nothing else.
const (
	olderPackage = "0.0.1"
	newerPackage = "0.0.2"
	packageEpoch = 1700000000 // 2023-11-14
)

var builtPackages = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(host.Dir(), "packages")
	for _, version := range []string{olderPackage, newerPackage} {
		if err := buildPackages(dir, version); err != nil {
			return "", err
		}
	}
	return dir, nil
})

// buildPackages makes both kinds, as a user does, whatever make this test was started by.
func buildPackages(dir, version string, env ...string) error {
	build := exec.Command("make", "-s", "-C", "..", "packages", "OUT="+dir, "VERSION="+version)
	for _, variable := range os.Environ() {
		if !strings.HasPrefix(variable, "MAKE") && !strings.HasPrefix(variable, "MFLAGS=") {
			build.Env = append(build.Env, variable)
		}
	}
	build.Env = append(append(build.Env, fmt.Sprintf("SOURCE_DATE_EPOCH=%d", packageEpoch)), env...)
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w\n%s", build.Args, err, out)
	}
	return nil
}

// packagesOrSkip is the folder of both versions; the programs are those that the test runs.
func packagesOrSkip(t *testing.T, programs ...string) string {
	t.Helper()
	mustHost(t, umlHost)
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv(requireVar) == "" {
				t.Skipf("%v: make deps", err)
			}
			t.Fatalf("%v: make deps", err)
		}
	}
	dir, err := builtPackages()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func packageFile(dir, kind, version string) string {
	if kind == "rpm" {
		return fmt.Sprintf("%s/blockferry-%s-1.x86_64.rpm", dir, version)
	}
	return fmt.Sprintf("%s/blockferry_%s_amd64.deb", dir, version)
}

// packedFile is a file in a package, by the mode that it gets.
type packedFile struct {
	mode    int64
	content []byte // of a .deb
}

// debFiles are the regular files of a .deb; all of it is root's, and as old as was asked for.
func debFiles(t *testing.T, path, part string) map[string]packedFile {
	t.Helper()
	text, err := exec.Command("dpkg-deb", part, path).Output()
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]packedFile{}
	for archive := tar.NewReader(bytes.NewReader(text)); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.ModTime.Unix() != packageEpoch || header.Uid != 0 || header.Gid != 0 {
			t.Errorf("%s: of %v, owned by %d:%d", header.Name, header.ModTime, header.Uid, header.Gid)
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		files[strings.TrimPrefix(header.Name, ".")] = packedFile{header.Mode & 0o7777, content}
	}
}

// rpmFiles are those of an rpm, and which of them are configuration.
func rpmFiles(t *testing.T, path string) (files map[string]packedFile, config []string) {
	t.Helper()
	files = map[string]packedFile{}
	out := run(t, "rpm", "-qp", "--qf", `[%{FILENAMES}\t%{FILEMODES:octal}\t%{FILEFLAGS:fflags}\t%{FILEUSERNAME}:%{FILEGROUPNAME}\t%{FILEMTIMES}\n]`, path)
	for line := range strings.Lines(out) {
		words := strings.Split(strings.TrimSpace(line), "\t")
		if len(words) != 5 {
			t.Fatalf("rpm says '%s'", line)
		}
		var mode int64
		if _, err := fmt.Sscanf(words[1], "%o", &mode); err != nil {
			t.Fatal(err)
		}
		if words[3] != "root:root" || words[4] != fmt.Sprint(packageEpoch) {
			t.Errorf("%s: of %s, owned by %s", words[0], words[4], words[3])
		}
		if words[2] == "cn" {
			config = append(config, words[0])
		} else if words[2] != "" {
			t.Errorf("%s is '%s'", words[0], words[2])
		}
		files[words[0]] = packedFile{mode: mode & 0o7777}
	}
	return files, config
}

// Both packages hold all there is to install, each file once and with its mode, and nothing
// but the configuration is taken for such.
func TestPackageContents(t *testing.T) {
	dir := packagesOrSkip(t, "rpm", "dpkg-deb")
	const config = "/etc/blockferry/blockferry.yaml"
	want := map[string]int64{
		"/usr/bin/blockferry": 0o755, "/usr/lib/blockferry/maintain": 0o755, config: 0o644,
		"/usr/lib/ocf/resource.d/blockferry/volume": 0o755, "/usr/lib/blockferry/role": 0o755,
		"/usr/lib/blockferry/ec2/address": 0o755, "/usr/lib/blockferry/ec2/fence-peer": 0o755, "/usr/lib/blockferry/ec2/common.sh": 0o644,
		"/usr/share/bash-completion/completions/blockferry": 0o644, "/usr/share/fish/vendor_completions.d/blockferry.fish": 0o644,
		"/usr/share/doc/blockferry/copyright": 0o644, "/usr/share/doc/blockferry/CHANGELOG.md": 0o644,
		"/usr/share/doc/blockferry/examples/ec2/user-data.yaml.tftpl": 0o644,
	}
	for folder, target := range map[string]string{
		"../deploy/systemd": "/usr/lib/systemd/system", "../deploy/udev": "/usr/lib/udev/rules.d", "../docs/config/valid": "/usr/share/doc/blockferry/examples",
		"../deploy/ec2/terraform": "/usr/share/doc/blockferry/examples/ec2/terraform",
		"../deploy/services":      "/usr/share/doc/blockferry/examples/services",
		"../deploy/single":        "/usr/share/doc/blockferry/examples/single",
		"../deploy/postgres":      "/usr/share/doc/blockferry/examples/postgres",
		"../deploy/nfs":           "/usr/share/doc/blockferry/examples/nfs",
	} {
		entries, err := os.ReadDir(folder)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, entry := range entries {
			want[target+"/"+entry.Name()] = 0o644
		}
	}
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		want["/usr/share/doc/blockferry/"+filepath.Base(page)] = 0o644
	}
	deb := debFiles(t, packageFile(dir, "deb", olderPackage), "--fsys-tarfile")
	rpm, rpmConfig := rpmFiles(t, packageFile(dir, "rpm", olderPackage))
	program := filepath.Join(t.TempDir(), "blockferry")
	if err := os.WriteFile(program, deb["/usr/bin/blockferry"].content, 0o700); err != nil {
		t.Fatal(err)
	}
	manual := t.TempDir()
	run(t, program, "man", "--date", "2026-01-31", manual)
	for _, page := range entriesOf(t, manual) {
		want["/usr/share/man/man8/"+page+".gz"] = 0o644
	}
	for kind, files := range map[string]map[string]packedFile{"deb": deb, "rpm": rpm} {
		zsh := map[string]string{"deb": "/usr/share/zsh/vendor-completions/_blockferry", "rpm": "/usr/share/zsh/site-functions/_blockferry"}[kind]
		want[zsh] = 0o644
		for path, mode := range want {
			if file, found := files[path]; !found || file.mode != mode {
				t.Errorf("%s: %s: there: %v, mode %o; want mode %o", kind, path, found, file.mode, mode)
			}
		}
		for path := range files {
			if _, known := want[path]; !known {
				t.Errorf("%s: %s: what is that?", kind, path)
			}
		}
		delete(want, zsh)
	}
	control := debFiles(t, packageFile(dir, "deb", olderPackage), "--ctrl-tarfile")
	if got := string(control["/conffiles"].content); got != config+"\n" || !slices.Equal(rpmConfig, []string{config}) {
		t.Errorf("configuration: %q, %v", got, rpmConfig)
	}
	if out := run(t, "rpm", "-qp", "--qf", "%{BUILDHOST} %{BUILDTIME}", packageFile(dir, "rpm", olderPackage)); out != fmt.Sprintf("localhost %d", packageEpoch) {
		t.Errorf("the rpm names where or when it was made: '%s'", out)
	}
	if out := run(t, program, "version"); !strings.Contains(out, "blockferry "+olderPackage+" ") {
		t.Errorf("it says it is '%s'", out)
	}
	binary, err := elf.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer binary.Close()
	for _, part := range binary.Progs {
		if part.Type == elf.PT_INTERP {
			t.Error("the program is linked dynamically")
		}
	}
	if text := string(deb["/usr/share/doc/blockferry/copyright"].content); !strings.Contains(text, "github.com/cilium/ebpf") || !strings.Contains(text, "The Go Authors") {
		t.Errorf("copyright: %.200s", text)
	}
}

func entriesOf(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// Packages of the same source are the same bytes, whoever makes them, and where, and when.
func TestPackageIsReproducible(t *testing.T) {
	dir := packagesOrSkip(t)
	again := t.TempDir()
	if err := buildPackages(again, olderPackage, "TZ=Asia/Tokyo", "LC_ALL=C.UTF-8", "HOSTNAME=other", "USER=other"); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"deb", "rpm"} {
		first, err := os.ReadFile(packageFile(dir, kind, olderPackage))
		if err != nil {
			t.Fatal(err)
		}
		second, err := os.ReadFile(packageFile(again, kind, olderPackage))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, second) {
			t.Errorf("two %ss of the same source differ", kind)
		}
	}
}

// What is made of the commands for others to read is what those take without complaint.
func TestPackageManualAndCompletions(t *testing.T) {
	dir := packagesOrSkip(t, "dpkg-deb", "mandoc", "man", "bash", "zsh", "fish")
	root := t.TempDir()
	run(t, "dpkg-deb", "--extract", packageFile(dir, "deb", olderPackage), root)
	pages, err := filepath.Glob(root + "/usr/share/man/man8/*")
	if err != nil || len(pages) < 20 {
		t.Fatalf("%d pages, %v", len(pages), err)
	}
	run(t, "gzip", append([]string{"-d"}, pages...)...)
	for i := range pages {
		pages[i] = strings.TrimSuffix(pages[i], ".gz")
	}
	if out := run(t, "mandoc", append([]string{"-T", "lint", "-W", "warning"}, pages...)...); out != "" {
		t.Errorf("mandoc says:\n%s", out)
	}
	for _, page := range pages {
		if out := run(t, "man", "--warnings", "-l", "-E", "UTF-8", page); !strings.Contains(out, "EXIT STATUS") || strings.Contains(out, "warning:") {
			t.Errorf("%s:\n%s", page, out)
		}
	}
	run(t, "bash", "-n", root+"/usr/share/bash-completion/completions/blockferry")
	run(t, "zsh", "-n", root+"/usr/share/zsh/vendor-completions/_blockferry")
	run(t, "fish", "--no-execute", root+"/usr/share/fish/vendor_completions.d/blockferry.fish")
}
