package layout

import (
	"strings"
	"testing"

	"blockferry/cmd/blockferry/config"
	"blockferry/cmd/blockferry/exit"
	"blockferry/protocol"
)

const (
	mib = config.MiB
	gib = config.GiB
)

func vol(size int64) *config.Volume {
	return &config.Volume{Name: "data", Device: "/dev/a", SizeBytes: size, EraBlockBytes: 64 * config.KiB,
		Replicas: []*config.Replica{{Name: "ebs", Device: "/dev/b"}, {Name: "two", Device: "/dev/c", JournalBytes: 64 * mib}}}
}

// With no size given the volume is as large as fits: one MiB more does not.
func TestLargestSize(t *testing.T) {
	for _, disks := range []map[string]int64{
		{"/dev/a": 2 * gib, "/dev/b": 2 * gib, "/dev/c": 2 * gib},
		{"/dev/a": 20 * gib, "/dev/b": 2 * gib, "/dev/c": 20 * gib},
		{"/dev/a": 2 * gib, "/dev/b": 20 * gib, "/dev/c": 1 * gib},
		{"/dev/a": 900 * gib, "/dev/b": 1000 * gib, "/dev/c": 1000 * gib},
	} {
		p, err := Make(vol(0), disks)
		if err != nil {
			t.Fatal(err)
		}
		smallest := min(disks["/dev/a"], disks["/dev/b"], disks["/dev/c"])
		if p.SizeBytes < smallest/2 || p.SizeBytes > smallest {
			t.Errorf("%v: %d", disks, p.SizeBytes)
		}
		if _, err := Make(vol(p.SizeBytes), disks); err != nil {
			t.Errorf("the size chosen does not fit: %v", err)
		}
		if _, err := Make(vol(p.SizeBytes+mib), disks); err == nil {
			t.Errorf("%v: %d is not the largest", disks, p.SizeBytes)
		}
	}
}

// Every disk keeps what it would need in the other role.
func TestEitherRoleFits(t *testing.T) {
	disks := map[string]int64{"/dev/a": 4 * gib, "/dev/b": 4 * gib, "/dev/c": 4 * gib}
	p, err := Make(vol(gib), disks)
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range p.Replicas {
		if o.ReserveBytes < p.Areas.Cow.Length+p.Areas.Meta.Length {
			t.Errorf("replica %s reserves %d", name, o.ReserveBytes)
		}
		alone := o
		alone.ReserveBytes = 0
		if tail := alone.NeededBytes() - o.SizeBytes; p.Areas.TailBytes < tail-mib {
			t.Errorf("the volume's disk keeps %d bytes for a tail, replica %s has %d", p.Areas.TailBytes, name, tail)
		}
	}
}

func TestTooSmallSaysWhichAndHowMuch(t *testing.T) {
	for path, want := range map[string]string{"/dev/a": "/dev/a: a volume of", "/dev/b": "/dev/b: replica 'ebs'"} {
		disks := map[string]int64{"/dev/a": 4 * gib, "/dev/b": 4 * gib, "/dev/c": 4 * gib}
		disks[path] = gib
		_, err := Make(vol(gib), disks)
		if exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "1073741824") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := Make(vol(0), map[string]int64{"/dev/a": 20 * mib, "/dev/b": 4 * gib, "/dev/c": 4 * gib}); exit.Of(err) != exit.Refused {
		t.Errorf("a tiny disk: %v", err)
	}
}

// A volume whose copies are all at other nodes keeps room for the other role,
// too, and a copy there is divided as one beside the volume is.
func TestReplicasElsewhere(t *testing.T) {
	near := vol(gib)
	near.Replicas = near.Replicas[:1]
	far := vol(gib)
	far.Replicas = []*config.Replica{{Name: "far", Address: "10.0.0.2:7070", Peer: "node-b"}}
	disks := map[string]int64{"/dev/a": 4 * gib, "/dev/b": 4 * gib}
	a, err := Make(near, disks)
	if err != nil {
		t.Fatal(err)
	}
	b, err := Make(far, disks)
	if err != nil {
		t.Fatal(err)
	}
	if a.Areas != b.Areas || len(b.Replicas) != 0 {
		t.Errorf("near %+v, far %+v", a, b)
	}
	there := &config.Volume{Name: "data", Device: "/dev/b", EraBlockBytes: 64 * config.KiB, Copy: &config.Replica{Name: "data", Device: "/dev/b"}}
	o, err := Secondary(there, gib, 4*gib)
	if err != nil || o != a.Replicas["ebs"] {
		t.Errorf("%+v, %v; beside the volume %+v", o, err, a.Replicas["ebs"])
	}
	if room := a.Areas.Cow.Length + a.Areas.Meta.Length; o.ReserveBytes != room || room == 0 {
		t.Errorf("the copy keeps %d bytes for areas that take %d", o.ReserveBytes, room)
	}
	if got, want := Switching(there, gib).TailBytes, protocol.TailBytes(gib, o.JournalBytes); got != want {
		t.Errorf("a copy that can take over has a tail of %d bytes, one that can't %d", got, want)
	}
	if _, err := Secondary(there, gib, gib); exit.Of(err) != exit.Refused || !strings.Contains(err.Error(), "/dev/b") {
		t.Errorf("a disk that is too small: %v", err)
	}
	if _, err := Undecided(gib); err != nil {
		t.Error(err)
	}
	if _, err := Undecided(16 * mib); exit.Of(err) != exit.Refused {
		t.Errorf("a disk that is too small for any: %v", err)
	}
}
