package udev

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// message is one as the kernel sends it.
func message(head string, pairs ...string) []byte {
	return []byte(head + "\x00" + strings.Join(pairs, "\x00") + "\x00")
}

const nvmePath = "/devices/pci0000:00/0000:00:1f.0/nvme/nvme1/nvme1n1"

var added = message("add@"+nvmePath, "ACTION=add", "DEVPATH="+nvmePath, "SUBSYSTEM=block", "MAJOR=259", "MINOR=3", "DEVNAME=nvme1n1", "DEVTYPE=disk", "DISKSEQ=27", "SEQNUM=3512")

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		message []byte
		want    Event
	}{
		"a disk": {added, Event{Action: "add", Path: nvmePath, Subsystem: "block", Number: 3512, Name: "nvme1n1", Major: 259, Minor: 3, Sequence: 27}},
		"resized": {message("change@/devices/virtual/block/loop0", "SEQNUM=9", "RESIZE=1", "ACTION=change", "DEVPATH=/devices/virtual/block/loop0", "SUBSYSTEM=block", "MAJOR=7", "MINOR=0", "DEVNAME=loop0"),
			Event{Action: "change", Path: "/devices/virtual/block/loop0", Subsystem: "block", Number: 9, Name: "loop0", Major: 7, Resized: true}},
		"no block device; values with '=' and without anything": {
			message("add@/bus/x", "ACTION=add", "DEVPATH=/bus/x", "SUBSYSTEM=bus", "A=b=c=", "EMPTY=", "SEQNUM=18446744073709551615"),
			Event{Action: "add", Path: "/bus/x", Subsystem: "bus", Number: 1<<64 - 1}},
		"an at sign in the path": {message("remove@/a@b", "ACTION=remove", "DEVPATH=/a@b", "SUBSYSTEM=x", "SEQNUM=1"), Event{Action: "remove", Path: "/a@b", Subsystem: "x", Number: 1}},
	} {
		if got, err := Parse(c.message); err != nil || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v", name, got, err, c.want)
		}
	}
}

// What is no whole message of the kernel's is refused, and so leads to a look at everything.
func TestParseRefuses(t *testing.T) {
	with := func(old, new string) []byte {
		b := []byte(strings.Replace(string(added), old, new, 1))
		if string(b) == string(added) {
			t.Fatalf("nothing to replace: %q", old)
		}
		return b
	}
	for name, b := range map[string][]byte{
		"nothing":              {},
		"udevd's":              []byte("libudev\x00\xfe\xed\xca\xfe\x28\x00\x00\x00"),
		"cut off":              added[:len(added)-1],
		"cut off in a key":     added[:len(added)-9],
		"no action":            with("add@", "@"),
		"no path":              with("add@"+nvmePath, "add@"),
		"another action":       with("ACTION=add", "ACTION=remove"),
		"another path":         with("DEVPATH="+nvmePath, "DEVPATH=/devices/x"),
		"no subsystem":         with("SUBSYSTEM=block\x00", ""),
		"no number":            with("SEQNUM=3512\x00", ""),
		"a number of letters":  with("MINOR=3", "MINOR=x"),
		"a number of 33 bits":  with("MAJOR=259", "MAJOR=4294967296"),
		"a negative number":    with("DISKSEQ=27", "DISKSEQ=-1"),
		"a disk without minor": with("MINOR=3\x00", ""),
		"a disk without name":  with("DEVNAME=nvme1n1\x00", ""),
		"a key twice":          with("MINOR=3\x00", "MINOR=3\x00MINOR=4\x00"),
		"no key":               with("DEVTYPE=disk", "=disk"),
		"no value":             with("DEVTYPE=disk", "DEVTYPE"),
		"an empty pair":        with("DEVTYPE=disk", ""),
		"too long":             with("DEVTYPE=disk", "X="+strings.Repeat("x", maxMessage)),
	} {
		if e, err := Parse(b); !errors.Is(err, errMessage) {
			t.Errorf("%s: %+v, %v; want it refused", name, e, err)
		}
	}
}

// FuzzParse: whatever comes, an event that is understood says what its message says.
func FuzzParse(f *testing.F) {
	f.Add(added)
	f.Add(message("remove@/devices/virtual/block/loop0", "ACTION=remove", "DEVPATH=/devices/virtual/block/loop0", "SUBSYSTEM=block", "MAJOR=7", "MINOR=0", "DEVNAME=loop0", "SEQNUM=1"))
	f.Add([]byte("add@/\x00"))
	f.Add([]byte("libudev\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		was := string(b)
		e, err := Parse(b)
		if string(b) != was {
			t.Fatal("the message was changed")
		}
		if err != nil {
			if e != (Event{}) {
				t.Fatalf("%+v beside %v", e, err)
			}
			return
		}
		if !strings.HasPrefix(was, e.Action+"@"+e.Path+"\x00") || !strings.Contains(was, "\x00SUBSYSTEM="+e.Subsystem+"\x00") || e.Action == "" || e.Path[0] != '/' {
			t.Fatalf("%q: %+v", was, e)
		}
		if e.Block() && (e.Name == "" || !strings.Contains(was, "\x00DEVNAME="+e.Name+"\x00")) {
			t.Fatalf("%q: %+v", was, e)
		}
	})
}

// What this kernel says of its own devices is understood.
func TestParseOwnDevices(t *testing.T) {
	for _, name := range []string{"loop0", "vda", "sda", "nvme0n1", "zram0"} {
		text, err := os.ReadFile("/sys/class/block/" + name + "/uevent")
		if err != nil {
			continue
		}
		pairs := strings.Split(strings.TrimSpace(string(text)), "\n")
		path := "/devices/x/block/" + name
		e, err := Parse(message("change@"+path, append(pairs, "ACTION=change", "DEVPATH="+path, "SUBSYSTEM=block", "SEQNUM=1")...))
		if err != nil || e.Name != name || e.Major == 0 {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
}
