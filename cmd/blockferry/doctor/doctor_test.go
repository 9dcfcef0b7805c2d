package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
)

// healthy is a machine without a fault; tests spoil single answers.
func healthy() *System {
	return &System{
		Euid:         func() int { return 0 },
		Release:      func() (string, error) { return "6.1.0-28-amd64", nil },
		Targets:      func() ([]string, error) { return []string{"linear", "era", "snapshot", "snapshot-origin"}, nil },
		Modprobe:     func(string) error { return errors.New("no such module") },
		Distribution: func() string { return "debian" },
		Inspect:      func(path string) (Disk, error) { return Disk{Path: path, SizeBytes: 1 << 30}, nil },
		SameDisk:     func(a, b string) (bool, error) { return a == b, nil },
		Exists:       func(string) bool { return true },
		Survives:     func(string, string) error { return nil },
		DiscardsOff:  func(string, int64) string { return "" },
	}
}

func aVolume() *config.Volume {
	return &config.Volume{Name: "data", Device: "/dev/a", Replicas: []*config.Replica{{Name: "ebs", Device: "/dev/b"}}}
}

func TestSpillFileInABadPlaceIsRefused(t *testing.T) {
	s, v := healthy(), aVolume()
	if f := s.Spills(v); len(f) != 0 {
		t.Errorf("without one: %v", f)
	}
	v.Replicas[0].Spill = "/srv/spill"
	if f := s.Spills(v); f.Err() != nil || len(f) != 1 {
		t.Errorf("in a good place: %v", f)
	}
	s.Survives = func(path, disk string) error { return errors.New(path + " is on " + disk) }
	if err := s.Spills(v).Err(); err == nil || !strings.Contains(err.Error(), "/srv/spill is on /dev/a") {
		t.Errorf("on the volume's disk: %v", err)
	}
}

// One file by two names can't be a part of two replicas, also before it is there.
func TestOneSpillFileForTwoReplicas(t *testing.T) {
	dir := t.TempDir()
	link, deep := filepath.Join(dir, "link"), filepath.Join(dir, "deep")
	if err := errors.Join(os.Mkdir(deep, 0o700), os.Symlink("deep/file", link), os.Symlink(deep, filepath.Join(dir, "folder"))); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		a, b string
		same bool
	}{
		{filepath.Join(deep, "file"), filepath.Join(deep, "other"), false},
		{filepath.Join(deep, "file"), link, true},
		{filepath.Join(deep, "file"), filepath.Join(dir, "folder/file"), true},
		{"/hard", "/link", true},
		{"", "", false},
	} {
		s := healthy()
		s.SameDisk = func(a, b string) (bool, error) { return a == "/link" && b == "/hard", nil }
		conf := &config.Config{Volumes: []*config.Volume{
			{Name: "one", Replicas: []*config.Replica{{Name: "x", Spill: c.a}}}, {Name: "two", Replicas: []*config.Replica{{Name: "y", Spill: c.b}}}}}
		err := s.DistinctSpills(conf).Err()
		if (err != nil) != c.same || c.same && !strings.Contains(err.Error(), "replica 'y' of volume 'two' is the same file as "+c.a+", that of replica 'x' of volume 'one'") {
			t.Errorf("%s and %s: %v", c.a, c.b, err)
		}
	}
}

func TestHealthyMachineIsNotRefused(t *testing.T) {
	s := healthy()
	if err := s.Kernel().Err(); err != nil {
		t.Error(err)
	}
	disks, f := s.Disks(aVolume(), Empty)
	if err := f.Err(); err != nil || len(disks) != 2 || len(f) != 2 {
		t.Errorf("%v, %v, %v", err, disks, f)
	}
}

func TestDeadManFindings(t *testing.T) {
	for _, c := range []struct {
		there []string
		want  string
	}{
		{nil, ""},
		{[]string{"/s"}, ""},
		{[]string{"/run/systemd/system", "/s"}, "ok     dead-man: its service runs"},
		{[]string{"/run/systemd/system"}, "systemctl enable --now blockferry-deadman"},
	} {
		s := healthy()
		s.Exists = func(path string) bool { return slices.Contains(c.there, path) }
		f := s.DeadMan("/s")
		text := ""
		for _, one := range f {
			text += one.String()
		}
		if f.Err() != nil || !strings.Contains(text, c.want) || c.want == "" && text != "" {
			t.Errorf("there %v: '%s'", c.there, text)
		}
	}
}

func TestKernelFindings(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(*System)
		want  []string
	}{
		{"not root", func(s *System) { s.Euid = func() int { return 1000 } }, []string{"need root", "sudo"}},
		{"old kernel", func(s *System) { s.Release = func() (string, error) { return "5.10.0-32", nil } }, []string{"5.12", "boot a kernel"}},
		{"no device-mapper", func(s *System) {
			s.Targets = func() ([]string, error) { return nil, errors.New("no /dev/mapper/control") }
		}, []string{"device-mapper: this kernel has none", "modprobe dm-mod"}},
		{"no era on Debian", func(s *System) { s.without("era") }, []string{"dm-era: ", "no device-mapper target 'era'", "linux-image-amd64", "modprobe dm-era"}},
		{"no era on Ubuntu", func(s *System) {
			s.without("era")
			s.Distribution = func() string { return "ubuntu debian" }
		}, []string{"linux-modules-extra-6.1.0-28-amd64"}},
		{"no era on Amazon Linux", func(s *System) {
			s.without("era")
			s.Distribution = func() string { return "amzn fedora" }
		}, []string{"kernel-modules-extra"}},
		{"no snapshot", func(s *System) { s.without("snapshot", "snapshot-origin") }, []string{"dm-snapshot: "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := healthy()
			c.spoil(s)
			err := s.Kernel().Err()
			if exit.Of(err) != exit.Prerequisite {
				t.Fatalf("%v ends with %d", err, exit.Of(err))
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("'%s' is missing in: %v", want, err)
				}
			}
			if lines := strings.Count(err.Error(), "\n"); lines > 0 {
				t.Errorf("one cause, %d lines: %v", lines+1, err)
			}
		})
	}
}

// without takes targets away until their module is loaded.
func (s *System) without(names ...string) {
	have, _ := s.Targets()
	s.Targets = func() ([]string, error) {
		return slices.DeleteFunc(slices.Clone(have), func(n string) bool { return slices.Contains(names, n) }), nil
	}
}

func TestMissingModulesAreLoaded(t *testing.T) {
	s := healthy()
	all, _ := s.Targets()
	s.without("era", "snapshot", "snapshot-origin")
	before := s.Targets
	var loaded []string
	s.Modprobe = func(m string) error { loaded = append(loaded, m); return nil }
	s.Targets = func() ([]string, error) {
		have, _ := before()
		if slices.Contains(loaded, "dm-era") {
			have = append(have, "era")
		}
		if slices.Contains(loaded, "dm-snapshot") {
			have = all
		}
		return have, nil
	}
	if err := s.Kernel().Err(); err != nil || !slices.Equal(loaded, []string{"dm-era", "dm-snapshot"}) {
		t.Errorf("%v, loaded %v", err, loaded)
	}
}

func TestDiskFindings(t *testing.T) {
	for _, c := range []struct {
		name    string
		spoil   func(*System)
		purpose Purpose
		code    exit.Code
		want    []string
	}{
		{"absent", func(s *System) {
			s.Inspect = func(p string) (Disk, error) { return Disk{}, errors.New("no such file") }
		}, AsFound, exit.Prerequisite, []string{"/dev/a: the device of volume 'data' can't be opened", "attach it"}},
		{"mounted", func(s *System) {
			s.Inspect = func(p string) (Disk, error) { return Disk{Users: []User{{Words: "mounted on /srv"}}}, nil }
		}, AsFound, exit.Refused, []string{"in use: mounted on /srv", "unmount"}},
		{"content", func(s *System) {
			s.Inspect = func(p string) (Disk, error) { return Disk{Content: "an XFS file system"}, nil }
		}, Empty, exit.Refused, []string{"holds an XFS file system", "nothing was written", "--force"}},
		{"same disk", func(s *System) {
			s.SameDisk = func(a, b string) (bool, error) { return true, nil }
		}, AsFound, exit.Refused, []string{"/dev/b: replica 'ebs' of volume 'data' is the same disk as /dev/a"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := healthy()
			c.spoil(s)
			_, f := s.Disks(aVolume(), c.purpose)
			f = append(f, s.Distinct(aVolume().DiskUses())...)
			err := f.Err()
			if exit.Of(err) != c.code {
				t.Fatalf("%v ends with %d, want %d", err, exit.Of(err), c.code)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("'%s' is missing in: %v", want, err)
				}
			}
		})
	}
}

// Who and what may be on a disk depends on what it is looked at for.
func TestPurposes(t *testing.T) {
	xfs, ours := Disk{Content: "an XFS file system"}, Disk{Content: "the label of volume 'data'", Ours: true}
	running := Disk{Content: ours.Content, Ours: true, Users: []User{{Words: "held by data-data", Holder: "data-data"}}}
	foreign := Disk{Content: ours.Content, Ours: true, Users: []User{{Words: "held by data2-data", Holder: "data2-data"}}}
	for _, c := range []struct {
		name    string
		disk    Disk
		purpose Purpose
		refused bool
	}{
		{"file system, as found", xfs, AsFound, true},
		{"file system, empty", xfs, Empty, true},
		{"file system, forced", xfs, EmptyForced, false},
		{"label, as found", ours, AsFound, false},
		{"label, empty", ours, Empty, true},
		{"label, forced", ours, EmptyForced, true}, // --force is for what others left
		{"label, discarded", ours, EmptyDiscard, false},
		{"file system, discarded", xfs, EmptyDiscard, false},
		{"running, discarded", running, EmptyDiscard, true},
		{"running, as found", running, AsFound, false},
		{"running, empty", running, Empty, true},
		{"running, forced", running, EmptyForced, true},
		{"another volume's, as found", foreign, AsFound, true},
		{"another volume's, forced", foreign, EmptyForced, true},
		{"blank, as found", Disk{}, AsFound, false},
		{"blank, empty", Disk{}, Empty, false},
	} {
		s := healthy()
		s.Inspect = func(string) (Disk, error) { return c.disk, nil }
		if _, f := s.Disks(aVolume(), c.purpose); (f.Err() != nil) != c.refused {
			t.Errorf("%s: %v", c.name, f.Err())
		}
	}
	s := healthy()
	s.Inspect = func(string) (Disk, error) { return Disk{}, nil }
	if _, f := s.Disks(aVolume(), AsFound); f[0].Level != Note || !strings.Contains(f[0].Advice, "blockferry restore data") {
		t.Errorf("blank, as found: %s", f[0])
	}
}

// Every finding that refuses says what to do.
func TestEveryRefusalHasAdvice(t *testing.T) {
	s := healthy()
	s.without("era", "snapshot", "snapshot-origin", "linear")
	s.Inspect = func(p string) (Disk, error) { return Disk{Users: []User{{Words: "x"}}, Content: "y"}, nil }
	s.SameDisk = func(a, b string) (bool, error) { return true, nil }
	_, f := s.Disks(aVolume(), Empty)
	all := append(append(s.Kernel(), f...), s.Distinct(aVolume().DiskUses())...)
	refused := 0
	for _, one := range all {
		if one.Level != Good && one.Advice == "" {
			t.Errorf("no advice: %s", one)
		}
		if one.Level == Refuse {
			refused++
		}
	}
	if refused < 6 {
		t.Errorf("only %d refusals", refused)
	}
}

// Disks that stand in each other's place are named, with what was expected.
func TestMisplacedDisks(t *testing.T) {
	label := func(v string) Disk {
		return Disk{Content: "a label", Ours: true, Parts: []Part{{Role: "volume", Volume: v}}}
	}
	replica := func(v string) Disk {
		return Disk{Content: "a replica", Ours: true, Parts: []Part{{Role: "replica", Volume: v}}}
	}
	area := func(role, v string) Disk { return Disk{Content: "content", Parts: []Part{{Role: role, Volume: v}}} }
	c := &config.Config{Volumes: []*config.Volume{
		{Name: "one", Device: "/dev/a", CowDevice: "/dev/cow", MetadataDevice: "/dev/meta", Replicas: []*config.Replica{{Name: "x", Device: "/dev/ax"}, {Name: "y", Device: "/dev/ay"}}},
		{Name: "two", Device: "/dev/b", Replicas: []*config.Replica{{Name: "x", Device: "/dev/bx"}}},
	}}
	for _, test := range []struct {
		name   string
		change map[string]Disk
		want   []string // each in one finding that refuses; none: no such finding
	}{
		{"in order", nil, nil},
		{"an SSD and its replica", map[string]Disk{"/dev/b": replica("B"), "/dev/bx": label("B")}, []string{
			"/dev/b: the device of volume 'two' holds a replica of volume B, the label of volume 'two' is expected there; there is one on /dev/bx, replica 'x'",
			"/dev/bx: replica 'x' of volume 'two' holds the label of volume B, a replica of volume 'two' is expected there; there is one on /dev/b, the device"}},
		{"the SSDs of two volumes", map[string]Disk{"/dev/a": label("B"), "/dev/b": label("A")}, []string{
			"/dev/ax: replica 'x' of volume 'one' holds a replica of volume A, a replica of volume B is expected there, which the device of volume 'one', /dev/a, belongs to; there is one on /dev/bx, replica 'x' of volume 'two'",
			"/dev/ay: ", "/dev/cow: ", "/dev/meta: ",
			"/dev/bx: replica 'x' of volume 'two' holds a replica of volume B, a replica of volume A is expected there"}},
		{"the replicas of two volumes", map[string]Disk{"/dev/ax": replica("B"), "/dev/bx": replica("A")}, []string{
			"/dev/ax: replica 'x' of volume 'one' holds a replica of volume B, a replica of volume A", "/dev/bx: replica 'x' of volume 'two' holds a replica of volume A, a replica of volume B"}},
		{"a replica of another volume", map[string]Disk{"/dev/ay": replica("C")}, []string{"/dev/ay: replica 'y' of volume 'one' holds a replica of volume C, a replica of volume A is expected"}},
		{"likewise, the SSD blank", map[string]Disk{"/dev/a": {}, "/dev/cow": {}, "/dev/meta": {}, "/dev/ay": replica("C")}, []string{"/dev/ay: replica 'y' of volume 'one' holds a replica of volume C, a replica of volume A is expected there, which replica 'x'"}},
		{"COW and metadata devices", map[string]Disk{"/dev/cow": area("metadata", "A"), "/dev/meta": area("cow", "A")}, []string{
			"/dev/cow: the cow device of volume 'one' holds the era metadata of volume A, the COW area of volume A is expected", "/dev/meta: the metadata device of volume 'one' holds the COW area"}},
		{"a replica that was a volume's disk before", map[string]Disk{"/dev/ax": {Content: "a replica", Ours: true, Parts: append(label("Z").Parts, replica("A").Parts...)}}, nil},
		{"superblocks of a later version", map[string]Disk{"/dev/ax": replica("")}, nil},
	} {
		s := healthy()
		s.Inspect = func(path string) (Disk, error) {
			d, changed := test.change[path]
			if !changed {
				d = map[string]Disk{"/dev/a": label("A"), "/dev/ax": replica("A"), "/dev/ay": replica("A"), "/dev/cow": area("cow", "A"), "/dev/meta": area("metadata", "A"),
					"/dev/b": label("B"), "/dev/bx": replica("B")}[path]
			}
			d.Path = path
			return d, nil
		}
		var refused []string
		for _, v := range c.Volumes {
			for _, f := range s.Volumes(c)[v] {
				if f.Level == Refuse {
					refused = append(refused, f.Subject+": "+f.Message)
				}
			}
		}
		if len(refused) != len(test.want) {
			t.Errorf("%s: %d refusals, want %d:\n%s", test.name, len(refused), len(test.want), strings.Join(refused, "\n"))
		}
		for _, want := range test.want {
			if !slices.ContainsFunc(refused, func(s string) bool { return strings.HasPrefix(s, want) }) {
				t.Errorf("%s: '%s' is missing in:\n%s", test.name, want, strings.Join(refused, "\n"))
			}
		}
	}
}

// A journal that is not as large as configured is said, and keeps nothing from starting.
func TestJournalOfAnotherSize(t *testing.T) {
	for _, test := range []struct {
		asked, have int64
		differs     bool
	}{
		{0, 16 << 20, false}, {16 << 20, 16 << 20, false}, {16<<20 + 4096, 17 << 20, false}, {16 << 20, 0, false}, {32 << 20, 16 << 20, true}, {16 << 20, 32 << 20, true},
	} {
		s, v := healthy(), aVolume()
		v.Replicas[0].JournalBytes = test.asked
		s.Inspect = func(path string) (Disk, error) {
			if path == "/dev/a" {
				return Disk{Path: path, Content: "a label", Ours: true, Parts: []Part{{Role: "volume", Volume: "A"}}}, nil
			}
			return Disk{Path: path, Content: "a replica", Ours: true, Parts: []Part{{Role: "replica", Volume: "A", JournalBytes: test.have}}}, nil
		}
		_, f := s.Disks(v, AsFound)
		said := f[1].Level == Note && strings.Contains(f[1].Message, "has a journal of "+config.FormatSize(test.have)+", the configuration says "+config.FormatSize(test.asked)) &&
			strings.Contains(f[1].Advice, "create --replica ebs --discard-my-data data")
		if f.Err() != nil || said != test.differs || !test.differs && f[1].Level != Good {
			t.Errorf("asked for %d, has %d: %s", test.asked, test.have, f[1])
		}
	}
}

// Attached volumes need BPF and no device-mapper, and file systems for users.
func TestAttachedVolumes(t *testing.T) {
	attached := aVolume()
	attached.Attach = true
	s := healthy()
	s.Targets = func() ([]string, error) { return nil, errors.New("no device-mapper") }
	if err := s.Kernel(attached).Err(); err != nil {
		t.Errorf("without device-mapper: %v", err)
	}
	if err := s.Kernel(attached, aVolume()).Err(); err == nil {
		t.Error("a volume beside it needs device-mapper")
	}
	s = healthy()
	s.Exists = func(path string) bool { return path != KernelTypes }
	if err := s.Kernel(attached).Err(); err == nil || !strings.Contains(err.Error(), "CONFIG_DEBUG_INFO_BTF") {
		t.Errorf("without types: %v", err)
	}
	if err := s.Kernel(aVolume()).Err(); err != nil {
		t.Errorf("one on a mapper: %v", err)
	}
	for _, c := range []struct {
		users []User
		level Level
	}{
		{nil, Note},
		{[]User{{"mount", "a mounted on /srv", ""}}, Good},
		{[]User{{"mount", "a mounted on /srv", ""}, {"swap", "a1 used as swap", ""}}, Refuse},
		{[]User{{"holder", "a held by holder md0", "md0"}}, Refuse},
	} {
		s := healthy()
		s.Inspect = func(path string) (Disk, error) {
			d := Disk{Path: path, SizeBytes: 1 << 30}
			if path == attached.Device {
				d.Users, d.Content = c.users, "an ext4 file system"
			}
			return d, nil
		}
		_, f := s.Disks(attached, Empty)
		if len(f) != 2 || f[0].Level != c.level || f[1].Level != Good {
			t.Errorf("users %v: %v", c.users, f)
		}
	}
}

// Whether discards pass is said, with the reason why they don't.
func TestDiscardsAreExplained(t *testing.T) {
	s, v := healthy(), aVolume()
	v.EraBlockBytes = 65536
	if f := s.Discards(v); f.Level != Good || f.Advice != "" || !strings.Contains(f.Message, "pass to the disk") || !strings.Contains(f.Message, "frozen view") {
		t.Errorf("%v", f)
	}
	s.DiscardsOff = func(device string, block int64) string { return fmt.Sprint(device, " does not, in ", block) }
	if f := s.Discards(v); f.Level != Note || f.Advice == "" || !strings.Contains(f.Message, "are off: /dev/a does not, in 65536") {
		t.Errorf("%v", f)
	}
	v.Attach = true
	if f := s.Discards(v); f.Level != Good || strings.Contains(f.Message, "frozen view") {
		t.Errorf("attached: %v", f)
	}
}
