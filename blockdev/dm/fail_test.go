package dm

import (
	"slices"
	"testing"
)

// slots are a device's two tables, as the kernel treats them.
type slots struct{ active, inactive []Target }

func (s *slots) Table(string) ([]Target, error)         { return s.active, nil }
func (s *slots) InactiveTable(string) ([]Target, error) { return s.inactive, nil }

func (s *slots) Load(_ string, table []Target) error {
	s.inactive = table
	return nil
}

func (s *slots) Resume(string) error {
	if s.inactive != nil {
		s.active, s.inactive = s.inactive, nil
	}
	return nil
}

// Whatever table is there or waits, the device fails, and is as long as before.
func TestFailReplacesWhatWaits(t *testing.T) {
	linear := []Target{{Length: 8, Type: "linear", Params: "7:0 0"}, {Start: 8, Length: 8, Type: "linear", Params: "7:1 0"}}
	failing := []Target{{Length: 16, Type: errorTarget}}
	for what, s := range map[string]*slots{
		"in use":                      {linear, nil},
		"another waits":               {linear, linear[:1]},
		"it fails":                    {failing, nil},
		"it fails, and another waits": {failing, linear},
		"none in use yet":             {nil, linear},
	} {
		if err := failOnce(s, "vol"); err != nil || !slices.Equal(s.active, failing) || s.inactive != nil {
			t.Errorf("%s: %v, %v and %v", what, err, s.active, s.inactive)
		}
	}
	if err := failOnce(&slots{}, "vol"); err == nil {
		t.Error("a device without any table is said to fail")
	}
}
