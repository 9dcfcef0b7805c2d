package agent

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"blockferry/blockdev/dm"
	"blockferry/blockdev/volume"
)

// oneDevice is a device-mapper with one device, which fails once what is in flight has ended.
type oneDevice struct {
	info     dm.Info
	table    string
	inFlight time.Duration

	unasked, unread error // what Info and Table say
}

func (o *oneDevice) Info(string) (dm.Info, error) { return o.info, o.unasked }

func (o *oneDevice) Table(string) ([]dm.Target, error) {
	return []dm.Target{{Type: o.table}}, o.unread
}

func (o *oneDevice) Fail(string, func(error)) error {
	time.Sleep(o.inFlight)
	o.table = "error"
	return nil
}

// What can be written is told from what fails; what can't be told may be.
func TestMayBeWritten(t *testing.T) {
	up := dm.Info{Exists: true, HasActive: true}
	for name, c := range map[string]struct {
		device mapper
		want   bool
	}{
		"up":                          {&oneDevice{info: up, table: "linear"}, true},
		"gone":                        {&oneDevice{}, false},
		"without a table":             {&oneDevice{info: dm.Info{Exists: true}}, false},
		"failing":                     {&oneDevice{info: up, table: "error"}, false},
		"failing, another waits":      {&oneDevice{info: dm.Info{Exists: true, HasActive: true, HasInactive: true}, table: "error"}, true},
		"failing, suspended":          {&oneDevice{info: dm.Info{Exists: true, HasActive: true, Suspended: true}, table: "error"}, true},
		"its table can't be read":     {&oneDevice{info: up, table: "error", unread: errors.New("no")}, true},
		"the mapper does not say":     {&oneDevice{unasked: errors.New("no")}, true},
		"one with a table of nothing": {&oneDevice{info: up}, true},
	} {
		if got := mayBeWritten(c.device, "data"); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A volume's stack is made to fail whatever is known of it, once; another volume's is left alone.
func TestFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		uuid := volume.UUID{7}
		up := dm.Info{Exists: true, HasActive: true, UUID: "BLOCKFERRY-" + uuid.String() + "-top"}
		if !volume.IsVolume(up.UUID) {
			t.Fatalf("%s is no volume's", up.UUID)
		}
		var f fails
		o := &oneDevice{info: up, table: "linear"}
		if err := f.fail(o, "data", uuid, quiet()); err != nil || o.table != "error" {
			t.Errorf("a stack: %s, %v", o.table, err)
		}
		o = &oneDevice{table: "linear"}
		if err := f.fail(o, "data", uuid, quiet()); err != nil || o.table != "linear" {
			t.Errorf("none: %v", err)
		}
		o = &oneDevice{info: dm.Info{Exists: true, UUID: up.UUID}, table: "linear"}
		if err := f.fail(o, "data", uuid, quiet()); err != nil || o.table != "linear" {
			t.Errorf("one without a table: %v", err)
		}
		o = &oneDevice{info: up, table: "linear"}
		if err := f.fail(o, "data", volume.UUID{8}, quiet()); !errors.Is(err, volume.ErrOtherVolume) || o.table != "linear" {
			t.Errorf("another's: %s, %v", o.table, err)
		}
		o = &oneDevice{info: up, table: "linear", inFlight: 5 * time.Second}
		for begun := time.Now(); f.fail(o, "data", uuid, quiet()) != nil; {
			if time.Since(begun) > o.inFlight {
				t.Fatal("it says that it does not fail, and it does")
			}
		}
		if o.table != "error" {
			t.Error("it says that it fails, and it does not yet")
		}
	})
}
