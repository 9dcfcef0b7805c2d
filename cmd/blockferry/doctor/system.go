package doctor

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/dm"
	"blockferry/blockdev/udev"
	"blockferry/blockdev/volume"
	"blockferry/protocol"
)

// Live asks this machine.
func Live() *System {
	return &System{
		Euid: os.Geteuid,
		Release: func() (string, error) {
			var u unix.Utsname
			if err := unix.Uname(&u); err != nil {
				return "", err
			}
			return unix.ByteSliceToString(u.Release[:]), nil
		},
		Targets: targets,
		Modprobe: func(module string) error {
			out, err := exec.Command("modprobe", module).CombinedOutput()
			if err != nil {
				return fmt.Errorf("modprobe %s: %w: %s", module, err, strings.TrimSpace(string(out)))
			}
			return nil
		},
		Distribution: func() string {
			content, _ := os.ReadFile("/etc/os-release")
			return distribution(string(content))
		},
		Inspect:  inspect,
		SameDisk: blockdev.SameDisk,
		Exists: func(path string) bool {
			_, err := os.Stat(path)
			return err == nil
		},
		Survives:    blockdev.Survives,
		DiscardsOff: volume.DiscardsOff,
	}
}

// distribution is the words of ID and ID_LIKE.
func distribution(osRelease string) string {
	var words []string
	for line := range strings.Lines(osRelease) {
		for _, key := range []string{"ID=", "ID_LIKE="} {
			if value, ok := strings.CutPrefix(strings.TrimSpace(line), key); ok {
				words = append(words, strings.Fields(strings.Trim(value, `"'`))...)
			}
		}
	}
	return strings.Join(words, " ")
}

func inspect(path string) (Disk, error) {
	f, err := udev.Open(path, blockdev.OpenOptions{})
	if err != nil {
		return Disk{}, err
	}
	defer f.Close()
	d := Disk{Path: path, SizeBytes: f.Size()}
	uses, err := blockdev.Users(path)
	if err != nil {
		return Disk{}, err
	}
	for _, u := range uses {
		d.Users = append(d.Users, User{Kind: u.Kind, Words: u.String(), Holder: holderName(u)})
	}
	d.Content, d.Ours = content(f)
	d.Parts = parts(f)
	return d, nil
}

// parts says what a disk is to which volumes. What can't be read is none.
func parts(f *blockdev.File) []Part {
	var all []Part
	if role, uuid, err := volume.Probe(f); err == nil && role != "" {
		all = append(all, Part{Role: string(role), Volume: uuidText(uuid)})
	}
	of, found, err := protocol.ProbeReplica(f)
	if err != nil || !found {
		return all
	}
	if of == protocol.AnyVolume { // it is for whichever comes first
		return append(all, Part{Role: roleReplica})
	}
	p := Part{Role: roleReplica, Volume: uuidText(of)}
	if s, err := protocol.PeekReplica(f); err == nil {
		p.JournalBytes = s.JournalBytes
	}
	return append(all, p)
}

func uuidText(u volume.UUID) string {
	if u.IsZero() {
		return ""
	}
	return u.String()
}

// content says what a disk holds, and whether it is ours. It only reads.
func content(f *blockdev.File) (string, bool) {
	if what, ours := replica(f); ours {
		return what, true
	}
	found, why := volume.Inspect(f)
	switch found {
	case volume.Blank:
		return "", false
	case volume.Labelled:
		return strings.TrimPrefix(why, f.Name()+" holds "), true
	}
	return strings.TrimPrefix(why, f.Name()+" holds "), false
}

// replica says what a disk holds if it is a replica.
func replica(f *blockdev.File) (string, bool) {
	s, err := protocol.PeekReplica(f)
	switch {
	case err == nil:
		return s.Kind(), true
	case errors.Is(err, protocol.ErrResized), errors.Is(err, protocol.ErrNewerFormat):
		return "a replica: " + err.Error(), true
	}
	return "", false
}

// holderName is the device-mapper name of the device built on a disk, if that
// is the use.
func holderName(u blockdev.Use) string {
	if u.Kind != "holder" {
		return ""
	}
	return strings.TrimPrefix(u.By, "/dev/mapper/")
}

func targets() ([]string, error) {
	control, err := dm.Open()
	if err != nil {
		return nil, err
	}
	defer control.Close()
	versions, err := control.Targets()
	if err != nil {
		return nil, err
	}
	var names []string
	for name := range versions {
		names = append(names, name)
	}
	return names, nil
}
