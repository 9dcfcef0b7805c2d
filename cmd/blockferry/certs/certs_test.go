package certs

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var at = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)

// authority makes one in a folder.
func authority(t *testing.T, name string) (*Authority, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "ca")
	if _, err := Init(dir, name, at, DefaultCADays); err != nil {
		t.Fatal(err)
	}
	a, err := OpenAuthority(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	return a, dir
}

func issued(t *testing.T, a *Authority, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	if _, err := a.Issue(dir, name, at, DefaultNodeDays); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestIssuedCertificateIsGood(t *testing.T) {
	a, ca := authority(t, "test")
	dir := issued(t, a, "node-a")
	n, err := ReadNode(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Check("node-a", at); err != nil {
		t.Error(err)
	}
	for path, want := range map[string]os.FileMode{filepath.Join(ca, CAKeyFile): 0o600, filepath.Join(dir, NodeFile): 0o600,
		filepath.Join(ca, CACertFile): 0o644, filepath.Join(dir, CACertFile): 0o644} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %o, want %o", path, info.Mode().Perm(), want)
		}
	}
	// A node needs no key of the authority, and nothing half written is left.
	for dir, want := range map[string]int{dir: 2, ca: 2} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		if len(entries) != want {
			t.Errorf("%s holds %v", dir, entries)
		}
	}
}

// What can't be shown to others is said before it is tried.
func TestBadCertificatesAreNamed(t *testing.T) {
	a, _ := authority(t, "one")
	b, _ := authority(t, "two")
	good := issued(t, a, "node-a")
	foreign := issued(t, b, "node-a")
	// A certificate of the one, trust in the other.
	content, err := os.ReadFile(filepath.Join(good, CACertFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(foreign, CACertFile), content, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what, dir, name, want string
		now                   time.Time
	}{
		{"good", good, "node-a", "", at},
		{"the last moment", good, "node-a", "", at.Add(DefaultNodeDays*day - time.Second)},
		{"another node's", good, "node-b", "is of node 'node-a', this node is 'node-b'", at},
		{"expired", good, "node-a", "expired on 2031-01-02, 2 days ago", at.Add((DefaultNodeDays + 2) * day)},
		{"not yet valid", good, "node-a", "is not valid before", at.Add(-2 * day)},
		{"another authority's", foreign, "node-a", "is not by an authority in", at},
	} {
		n, err := ReadNode(c.dir)
		if err != nil {
			t.Fatal(err)
		}
		err = n.Check(c.name, c.now)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", c.what, err, c.want)
		}
	}
}

// Whenever the power goes, a file that has its name has its mode.
func TestModesComeBeforeNames(t *testing.T) {
	dir := t.TempDir()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_ATTRIB); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(dir, "test", at, DefaultCADays); err != nil {
		t.Fatal(err)
	}
	a, err := OpenAuthority(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{CACertFile, CAKeyFile} { // room for the node's
		if err := os.Rename(filepath.Join(dir, file), filepath.Join(t.TempDir(), file)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Issue(dir, "node-a", at, DefaultNodeDays); err != nil {
		t.Fatal(err)
	}
	events := make([]byte, 64<<10)
	n, err := unix.Read(fd, events)
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]int{}
	for events = events[:n]; len(events) > 0; {
		mask, length := binary.NativeEndian.Uint32(events[4:]), binary.NativeEndian.Uint32(events[12:])
		name := string(bytes.TrimRight(events[unix.SizeofInotifyEvent:][:length], "\x00"))
		events = events[unix.SizeofInotifyEvent+length:]
		if strings.HasPrefix(name, ".") {
			continue // until it is whole
		}
		named[name]++
		if mask&unix.IN_ATTRIB != 0 {
			t.Errorf("%s was changed when it had its name", name)
		}
	}
	if named[CACertFile] != 2 || named[CAKeyFile] != 1 || named[NodeFile] != 1 {
		t.Errorf("files that got their names: %v", named)
	}
}

func TestNothingIsOverwritten(t *testing.T) {
	a, ca := authority(t, "test")
	dir := issued(t, a, "node-a")
	before := map[string][]byte{}
	for _, path := range []string{filepath.Join(ca, CAKeyFile), filepath.Join(ca, CACertFile), filepath.Join(dir, NodeFile)} {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		before[path] = content
	}
	if _, err := Init(ca, "again", at, 1); !errors.Is(err, ErrExists) {
		t.Errorf("init: %v", err)
	}
	if _, err := a.Issue(dir, "node-b", at, 1); !errors.Is(err, ErrExists) {
		t.Errorf("issue: %v", err)
	}
	// Also where another program was faster.
	if err := writeNew(filepath.Join(dir, NodeFile), []byte("x"), 0o600); !errors.Is(err, ErrExists) {
		t.Errorf("writeNew: %v", err)
	}
	for path, content := range before {
		if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, content) {
			t.Errorf("%s was changed (%v)", path, err)
		}
	}
}

func TestRenew(t *testing.T) {
	a, _ := authority(t, "test")
	other, _ := authority(t, "other")
	dir := issued(t, a, "node-a")
	old, err := ReadNode(dir)
	if err != nil {
		t.Fatal(err)
	}
	later := at.Add((DefaultNodeDays + 10) * day) // expired meanwhile
	if _, _, err := other.Renew(dir, later, DefaultNodeDays); err == nil || !strings.Contains(err.Error(), "does not hold the authority \"other\"") {
		t.Errorf("renewed by an authority that the node does not trust: %v", err)
	}
	was, is, err := a.Renew(dir, later, DefaultNodeDays)
	if err != nil {
		t.Fatal(err)
	}
	if was.Fingerprint != old.Fingerprint || is.Name != "node-a" || is.Fingerprint == was.Fingerprint {
		t.Errorf("was %v, is %v", was, is)
	}
	n, err := ReadNode(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Check("node-a", later); err != nil {
		t.Error(err)
	}
}

// A node's certificate does not outlive its authority's, whatever was asked.
func TestNodeEndsWithItsAuthority(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	info, err := Init(dir, "short", at, 10)
	if err != nil {
		t.Fatal(err)
	}
	a, err := OpenAuthority(dir, at)
	if err != nil {
		t.Fatal(err)
	}
	issued, err := a.Issue(filepath.Join(t.TempDir(), "n"), "n", at, 365)
	if err != nil || !issued.NotAfter.Equal(info.NotAfter) {
		t.Errorf("until %v, its authority's until %v (%v)", issued.NotAfter, info.NotAfter, err)
	}
	if _, err := OpenAuthority(dir, at.Add(11*day)); err == nil || !strings.Contains(err.Error(), "expired on") {
		t.Errorf("an expired authority: %v", err)
	}
}

func TestFoldersThatAreNone(t *testing.T) {
	a, ca := authority(t, "test")
	dir := issued(t, a, "node-a")
	if _, err := ReadNode(ca); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an authority's folder as a node's: %v", err)
	}
	// An authority's key and certificate in a node's place.
	key, _ := os.ReadFile(filepath.Join(ca, CAKeyFile))
	cert, _ := os.ReadFile(filepath.Join(ca, CACertFile))
	for what, c := range map[string]struct {
		content []byte
		want    string
	}{
		"authority": {append(bytes.Clone(cert), key...), "is an authority's certificate"},
		"no key":    {cert, "a certificate and its key"},
		"empty":     {nil, "a certificate and its key"},
		"large":     {make([]byte, maxFileBytes+1), "it is no certificate"},
	} {
		if err := os.WriteFile(filepath.Join(dir, NodeFile), c.content, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadNode(dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, name := range []string{"", "Node", "a.b", "-a", "a-", strings.Repeat("a", 64), "a/b"} {
		if _, err := a.Issue(filepath.Join(t.TempDir(), "x"), name, at, 1); err == nil {
			t.Errorf("name %q was accepted", name)
		}
	}
	if _, err := a.Issue(filepath.Join(t.TempDir(), "x"), "x", at, 0); err == nil {
		t.Error("0 days were accepted")
	}
}

func TestShow(t *testing.T) {
	a, ca := authority(t, "test")
	dir := issued(t, a, "node-a")
	all, err := Show(dir)
	if err != nil || len(all) != 2 || all[0].Name != "node-a" || all[0].Authority || all[1].Name != "test" || !all[1].Authority {
		t.Errorf("%+v, %v", all, err)
	}
	if got := all[0].Expiry(at); got != "expires on 2031-01-02, in 365 days" {
		t.Error(got)
	}
	if got := all[0].Expiry(at.Add(364*day + 20*time.Hour)); got != "expires on 2031-01-02, in 4 hours" {
		t.Error(got)
	}
	if one, err := Show(filepath.Join(ca, CACertFile)); err != nil || len(one) != 1 {
		t.Errorf("%+v, %v", one, err)
	}
	if _, err := Show(t.TempDir()); err == nil {
		t.Error("an empty folder was shown")
	}
	if _, err := Show(filepath.Join(ca, CAKeyFile)); err == nil {
		t.Error("a key was shown")
	}
}

// A certificate that any authority may have signed names a node as nodes are
// named, or none: an empty name would let its holder choose.
func TestNodeNameOfACertificate(t *testing.T) {
	for _, names := range [][]string{nil, {""}, {"Node"}, {"node.b"}, {"*"}, {"node-a", "node-b"}} {
		if name, err := NodeName(&x509.Certificate{DNSNames: names}); err == nil {
			t.Errorf("%q: taken for node '%s'", names, name)
		}
	}
	if name, err := NodeName(&x509.Certificate{DNSNames: []string{"node-a"}}); err != nil || name != "node-a" {
		t.Errorf("'%s', %v", name, err)
	}
}
