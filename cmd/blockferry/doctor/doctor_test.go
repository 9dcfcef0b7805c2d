package doctor

import (
	"errors"
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
		{"not root", func(s *System) { s.Euid = func() int { return 1000 } }, []string{"needs root", "sudo"}},
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
