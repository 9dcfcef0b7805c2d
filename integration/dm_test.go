package integration

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/dm"
)

// What the package dm says of devices is what the kernel and dmsetup say.
func TestMapperAgreesWithDmsetup(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 64 << 20}}}, func(t *testing.T) {
		ctl := mapper(t)
		if v, err := ctl.Version(); err != nil || v[0] != 4 {
			t.Errorf("version %v, %v", v, err)
		}
		if targets, err := ctl.Targets(); err != nil || targets["linear"][0] == 0 || targets["era"][0] == 0 {
			t.Errorf("targets %v, %v", targets, err)
		}
		if list, err := ctl.List(); err != nil || len(list) != 0 {
			t.Errorf("list %v, %v", list, err)
		}
		number, err := dm.DeviceNumber(ubd(0))
		if err != nil {
			t.Fatal(err)
		}
		// A table longer than the first buffer for an answer.
		var table []dm.Target
		for at := uint64(0); at < 1000; at++ {
			table = append(table, dm.Target{Start: at * 8, Length: 8, Type: "linear", Params: number + " 8"})
		}
		if _, err := ctl.Create("one", "BLOCKFERRY-test-one"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ctl.Remove("one") })
		if _, err := ctl.Create("one", ""); !errors.Is(err, unix.EBUSY) {
			t.Errorf("made twice: %v", err)
		}
		if err := ctl.Load("one", table); err != nil {
			t.Fatal(err)
		}
		if info, err := ctl.Info("one"); err != nil || info.HasActive || !info.HasInactive || info.UUID != "BLOCKFERRY-test-one" {
			t.Errorf("loaded: %+v, %v", info, err)
		}
		if err := ctl.Resume("one"); err != nil {
			t.Fatal(err)
		}
		if got, err := ctl.Table("one"); err != nil || !slices.Equal(got, table) {
			t.Errorf("table of %d targets, %v", len(got), err)
		}
		if theirs := run(t, "dmsetup", "table", "one"); strings.Count(theirs, "\n") != len(table) {
			t.Errorf("dmsetup counts %d targets", strings.Count(theirs, "\n"))
		}
		if list, err := ctl.List(); err != nil || !slices.Equal(list, []string{"one"}) {
			t.Errorf("list %v, %v", list, err)
		}
		if err := ctl.Suspend("one", dm.SuspendOptions{}); err != nil {
			t.Fatal(err)
		}
		if info, err := ctl.Info("one"); err != nil || !info.Suspended || !info.HasActive || info.HasInactive {
			t.Errorf("suspended: %+v, %v", info, err)
		}
		if err := ctl.Resume("one"); err != nil {
			t.Fatal(err)
		}
		if info, err := ctl.Info("none"); err != nil || info.Exists {
			t.Errorf("a device that is not there: %+v, %v", info, err)
		}
		if err := ctl.Load("none", table); !errors.Is(err, dm.ErrNotExist) {
			t.Errorf("load of one that is not there: %v", err)
		}
		if err := ctl.Load("one", []dm.Target{{Length: 8, Type: "nonesuch"}}); err == nil {
			t.Error("a target type that is not there was loaded")
		}

		// Nobody here makes nodes; one left by another device is corrected.
		path := dm.NodePath("one")
		os.Remove(path)
		if err := os.Symlink("../ubda", path); err != nil {
			t.Fatal(err)
		}
		if got, err := ctl.EnsureNode("one"); err != nil || got != path {
			t.Fatalf("node %s, %v", got, err)
		}
		info, err := ctl.Info("one")
		if err != nil {
			t.Fatal(err)
		}
		if at, err := dm.DeviceNumber(path); err != nil || at != info.Dev() {
			t.Errorf("the node leads to %s, %v; want %s", at, err, info.Dev())
		}
		// Removed as soon as whoever looked at it is done.
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(500*time.Millisecond, func() { f.Close() })
		if err := ctl.Remove("one"); err != nil {
			t.Errorf("remove: %v", err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the node is left: %v", err)
		}
		if err := ctl.Remove("one"); !errors.Is(err, dm.ErrNotExist) {
			t.Errorf("removed twice: %v", err)
		}
	})
}
