package dm

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"
)

// slots are a device's two tables, as the kernel treats them, and a disk beneath with a
// volatile cache.
type slots struct {
	active, inactive []Target

	suspended, interrupted bool
	dirty                  bool          // something is in the cache
	broken                 error         // what a flush says
	hang                   chan struct{} // a flush waits for its end; may be nil
}

func (s *slots) Table(string) ([]Target, error)         { return s.active, nil }
func (s *slots) InactiveTable(string) ([]Target, error) { return s.inactive, nil }

func (s *slots) Load(_ string, table []Target) error {
	s.inactive = table
	return nil
}

func (s *slots) Suspend(string, SuspendOptions) error {
	if s.interrupted {
		return errors.New("interrupted")
	}
	s.suspended = true
	return nil
}

func (s *slots) Resume(string) error {
	if s.inactive != nil {
		s.active, s.inactive = s.inactive, nil
	}
	s.suspended = false
	return nil
}

// flushBeneath makes nothing durable that is written later.
func (s *slots) flushBeneath(string) error {
	if s.hang != nil {
		<-s.hang
		return nil
	}
	if s.broken == nil && s.suspended {
		s.dirty = false
	}
	return s.broken
}

var linear = []Target{{Length: 8, Type: "linear", Params: "7:0 0"}, {Start: 8, Length: 8, Type: "linear", Params: "7:1 0"}}

// Whatever table is there or waits, the device fails, and is as long as before.
func TestFailReplacesWhatWaits(t *testing.T) {
	failing := []Target{{Length: 16, Type: errorTarget}}
	for what, s := range map[string]*slots{
		"in use":                      {active: linear, dirty: true},
		"another waits":               {active: linear, inactive: linear[:1], dirty: true},
		"it fails":                    {active: failing},
		"it fails, and another waits": {active: failing, inactive: linear},
		"none in use yet":             {inactive: linear},
	} {
		err := failOnce(s, "vol", time.Minute, func(err error) { t.Errorf("%s: %v", what, err) })
		if err != nil || !slices.Equal(s.active, failing) || s.inactive != nil || s.suspended {
			t.Errorf("%s: %v, %v and %v, suspended %v", what, err, s.active, s.inactive, s.suspended)
		}
		if s.dirty {
			t.Errorf("%s: what was written is not flushed", what)
		}
	}
	if err := failOnce(&slots{}, "vol", time.Minute, nil); err == nil {
		t.Error("a device without any table is said to fail")
	}
}

// A flush that fails, or does not end, keeps no device from failing, and is told.
func TestFailWithoutAFlush(t *testing.T) {
	hang := make(chan struct{})
	for want, s := range map[string]*slots{
		"it is broken":              {active: linear, broken: errors.New("it is broken")},
		"has not ended after 100ms": {active: linear, hang: hang},
	} {
		told, patience := "", time.Minute
		if s.hang != nil {
			patience = 100 * time.Millisecond
		}
		err := failOnce(s, "vol", patience, func(err error) { told = err.Error() })
		if err != nil || !Failing(s.active) || s.suspended || !strings.Contains(told, want) {
			t.Errorf("%s: %v, %v, suspended %v; told is '%s'", want, err, s.active, s.suspended, told)
		}
	}
	close(hang)
}

// An interrupted suspend leaves the table that fails waiting.
func TestFailInterrupted(t *testing.T) {
	s := &slots{active: linear, interrupted: true}
	if err := failOnce(s, "vol", time.Minute, nil); err == nil || !Failing(s.inactive) {
		t.Errorf("%v, %v waits", err, s.inactive)
	}
}
