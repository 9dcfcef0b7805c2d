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
}

func (o *oneDevice) Info(string) (dm.Info, error) { return o.info, nil }

func (o *oneDevice) Table(string) ([]dm.Target, error) { return []dm.Target{{Type: o.table}}, nil }

func (o *oneDevice) Fail(string) error {
	time.Sleep(o.inFlight)
	o.table = "error"
	return nil
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
		if err := f.fail(o, "data", uuid); err != nil || o.table != "error" {
			t.Errorf("a stack: %s, %v", o.table, err)
		}
		o = &oneDevice{table: "linear"}
		if err := f.fail(o, "data", uuid); err != nil || o.table != "linear" {
			t.Errorf("none: %v", err)
		}
		o = &oneDevice{info: dm.Info{Exists: true, UUID: up.UUID}, table: "linear"}
		if err := f.fail(o, "data", uuid); err != nil || o.table != "linear" {
			t.Errorf("one without a table: %v", err)
		}
		o = &oneDevice{info: up, table: "linear"}
		if err := f.fail(o, "data", volume.UUID{8}); !errors.Is(err, volume.ErrOtherVolume) || o.table != "linear" {
			t.Errorf("another's: %s, %v", o.table, err)
		}
		o = &oneDevice{info: up, table: "linear", inFlight: 5 * time.Second}
		for begun := time.Now(); f.fail(o, "data", uuid) != nil; {
			if time.Since(begun) > o.inFlight {
				t.Fatal("it says that it does not fail, and it does")
			}
		}
		if o.table != "error" {
			t.Error("it says that it fails, and it does not yet")
		}
	})
}
