package bpf

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Only what an owner has left behind of volumes it does not have any more is ended.
func TestUnpinStale(t *testing.T) {
	root := filepath.Dir(newPin(t))
	d := newFastLoop(t, 16<<20)
	const uuid, other = "00112233-4455-6677-8899-aabbccddeeff", "00112233445566778899aabbccddeeff"
	pins := map[string]string{} // by what the volume is called
	for i, p := range []struct{ name, owner, volume string }{
		{uuid + "-" + uuid, "/etc/mine", "gone"},
		{other + "-" + other, "/etc/mine", "gone too"},
		{uuid + "-11112222-4455-6677-8899-aabbccddeeff", "/etc/mine", "still there"},
		{uuid + "-22222222-4455-6677-8899-aabbccddeeff", "/etc/other", "another's"},
		{uuid + "-33332222-4455-6677-8899-aabbccddeeff", "", "nobody's"},
		{"kept-by-hand", "/etc/mine", "by hand"},
		{uuid + "-44442222-4455-6677-8899-aabbccddeeff", "/etc/mine", "in use"},
	} {
		target := d.target(filepath.Join(root, p.name))
		target.Owner, target.Volume = p.owner, p.volume
		if i == 2 { // a later owner's word counts
			target.Volume = "an earlier name"
			tracker := open(t, target)
			covered(t, tracker, 1)
			if err := tracker.Close(); err != nil {
				t.Fatal(err)
			}
			target.Volume = p.volume
		}
		tracker := open(t, target)
		covered(t, tracker, 100)
		if p.volume != "in use" {
			if err := tracker.Close(); err != nil {
				t.Fatal(err)
			}
		}
		pins[p.volume] = target.Pin
	}
	if err := os.Mkdir(filepath.Join(root, uuid+"-55552222-4455-6677-8899-aabbccddeeff"), 0o700); err != nil {
		t.Fatal(err)
	}
	wanted := func(volume string) bool { return volume == "still there" }
	for _, owner := range []string{"", "/etc/nobody"} {
		if ended, err := UnpinStale(root, owner, wanted); err != nil || len(ended) > 0 {
			t.Errorf("of owner '%s': %q, %v", owner, ended, err)
		}
	}
	ended, err := UnpinStale(root, "/etc/mine", wanted)
	slices.Sort(ended)
	if err != nil || !slices.Equal(ended, []string{"gone", "gone too"}) {
		t.Errorf("ended %q, %v", ended, err)
	}
	for volume, pin := range pins {
		_, err := os.Stat(pin)
		if gone := errors.Is(err, os.ErrNotExist); gone != slices.Contains([]string{"gone", "gone too"}, volume) {
			t.Errorf("%s: gone %v, %v", volume, gone, err)
		}
	}
	target := d.target(pins["still there"])
	if tracker := open(t, target); !tracker.adopted {
		t.Errorf("what was left is not whole: %s", tracker.Fresh())
	}
	if ended, err := UnpinStale(filepath.Join(root, "none"), "/etc/mine", wanted); err != nil || ended != nil {
		t.Errorf("nothing there: %q, %v", ended, err)
	}
}

// What was pinned while the kernel kept no statistics is not gone on with: they tell
// nothing of that time. They are on from then on.
func TestStatisticsWereOff(t *testing.T) {
	d := newFastLoop(t, 64<<20)
	target := d.target(newPin(t))
	tracker := open(t, target)
	cut := covered(t, tracker, 1)
	if err := tracker.Close(); err != nil {
		t.Fatal(err)
	}
	iostats := "/sys/block/" + d.name() + "/queue/iostats"
	put(t, iostats, "0")
	tracker = open(t, target)
	if _, _, ok := tracker.Adopted(); ok || !strings.Contains(tracker.Fresh(), "switched off") || !strings.Contains(tracker.Fresh(), "were switched on") {
		t.Errorf("adopted %v, '%s'", ok, tracker.Fresh())
	}
	if text, err := os.ReadFile(iostats); err != nil || string(text) != "1\n" {
		t.Errorf("statistics: '%s', %v", text, err)
	}
	covered(t, tracker, cut+1)
}
