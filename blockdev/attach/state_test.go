package attach

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/bpf"
)

// Tracking goes on while no agent runs; what was written meanwhile is named.
func TestTrackingGoesOnWithoutAnAgent(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		r := newRig(t, 64<<20)
		a := r.open() // not mounted: the test writes to it
		if a.TrackingLost() == "" || len(a.State()) != 0 {
			t.Errorf("a new one: lost '%s', state %q", a.TrackingLost(), a.State())
		}
		if c, err := r.cut(a, 0); !errors.Is(err, ErrTrackingLost) {
			t.Errorf("before the first base: %v, %v", c, err)
		}
		uuid, base := a.UUID(), r.base(a)
		if err := a.SetState([]byte("epoch 7")); err != nil {
			t.Fatal(err)
		}
		if err := a.SetState(make([]byte, MaxStateBytes+1)); err == nil {
			t.Error("a state that is too large was kept")
		}
		// It ends in the middle of a cut: this is exchanged, and never sealed.
		if err := rawWrite(t, r.device, 32<<20); err != nil {
			t.Fatal(err)
		}
		a.tracker.Exchange()
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		if err := rawWrite(t, r.device, 64<<20); err != nil {
			t.Fatal(err)
		}
		a = r.open()
		if why := a.TrackingLost(); strings.Contains(why, "statistics") || strings.Contains(why, "missed") {
			lostEvents.Add(1)
			t.Skip("begun anew: ", why)
		}
		if a.TrackingLost() != "" || a.UUID() != uuid || string(a.State()) != "epoch 7" {
			t.Fatalf("lost '%s', state %q", a.TrackingLost(), a.State())
		}
		c := r.mustCut(a, base)
		list, err := c.Changed(base)
		for _, end := range []int64{32 << 20, 64 << 20} {
			b := alignedBlock()
			if _, readErr := c.View().ReadAt(b, end-4096); readErr != nil || err != nil || len(blockdev.Intersect(list, []blockdev.Extent{{Offset: end - 4096, Length: 4096}})) != 1 {
				t.Errorf("what was written meanwhile before %d is missing: %v, %v, %v", end, list, err, readErr)
			}
		}
		c.Release()
		if _, err := c.Changed(c.Number() + 1); err == nil {
			t.Error("changes since a later cut")
		}
		a.ForgetCuts("for this test")
		if _, err := r.cut(a, base); !errors.Is(err, ErrTrackingLost) {
			t.Errorf("after the coverage's end: %v", err)
		}
		base = r.base(a)
		r.mustCut(a, base).Release()
		// Gone with its pins.
		if err := a.Remove(); err != nil {
			t.Fatal(err)
		}
		if a = r.open(); a.TrackingLost() == "" || a.UUID() != uuid {
			t.Errorf("after the tracking was removed: lost '%s'", a.TrackingLost())
		}
	})
}

// A cut without an image begins the tracking anew when it was lost, at the first try: it
// answers for what is written from it on, and for nothing before.
func TestLostTrackingBeginsAnewAtOnce(t *testing.T) {
	r := newRig(t, 64<<20)
	a := r.open() // not mounted
	before := r.base(a)
	a.ForgetCuts("for this test")
	r.number++
	c, err := a.Cut(t.Context(), r.number, Want{})
	if err != nil {
		t.Fatal(err)
	}
	if list, err := c.Changed(before); !errors.Is(err, ErrTrackingLost) {
		t.Errorf("what changed before it: %v, %v", list, err)
	}
	if err := rawWrite(t, r.device, 32<<20); err != nil {
		t.Fatal(err)
	}
	next := r.mustCut(a, c.Number())
	list, err := next.Changed(c.Number())
	if want := []blockdev.Extent{{Offset: 32<<20 - 4096, Length: 4096}}; err != nil || blockdev.Intersect(list, want).Total() != 4096 {
		t.Errorf("what changed since: %v, %v", list, err)
	}
}

// The state file says to which device, and to which boot, what is pinned belongs.
func TestStateOfAnotherDevice(t *testing.T) {
	r := newRig(t, 64<<20)
	blocktest.Command(t, "mkfs.ext4", "-q", r.device) // without a serial number this tells it from others
	a := r.open()
	r.base(a)
	a.Close()
	change := func(f func(*state)) {
		t.Helper()
		s, err := readState(r.options.StateFile)
		if err != nil {
			t.Fatal(err)
		}
		f(s)
		if err := writeState(r.options.StateFile, s); err != nil {
			t.Fatal(err)
		}
	}
	for word, f := range map[string]func(*state){
		"started anew":  func(s *state) { s.Boot[3]++ },
		"went and came": func(s *state) { s.Sequence++ },
	} {
		a = r.open()
		if word == "started anew" {
			r.base(a)
		}
		a.Close()
		change(f)
		a = r.open()
		if !strings.Contains(a.TrackingLost(), word) {
			t.Errorf("lost '%s', want '%s'", a.TrackingLost(), word)
		}
		if _, _, ok := a.tracker.Covered(); ok {
			t.Errorf("%s: what is pinned is used all the same", word)
		}
		r.base(a)
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
		a = r.open()
		if a.TrackingLost() != "" {
			t.Errorf("said again: '%s'", a.TrackingLost())
		}
		a.Close()
	}
	before, err := os.ReadFile(r.options.StateFile)
	if err != nil {
		t.Fatal(err)
	}
	for word, f := range map[string]func(*state){
		"serial":      func(s *state) { s.Serial = "another" },
		"WWID":        func(s *state) { s.WWID = "another" },
		"bytes":       func(s *state) { s.DeviceBytes += 4096 },
		"partition":   func(s *state) { s.Partition = 3 },
		"file system": func(s *state) { s.FileSystem[0]++ },
		"of nothing":  func(s *state) { s.FileSystem = [16]byte{}; s.Boot[3]++ },
	} {
		if err := os.WriteFile(r.options.StateFile, before, 0o600); err != nil {
			t.Fatal(err)
		}
		change(f)
		if a, err := Open(r.options); !errors.Is(err, ErrOtherDevice) || !strings.Contains(err.Error(), r.options.StateFile) {
			t.Errorf("another %s: %v, %v", word, a, err)
		}
	}
	// A restore puts another in its place, and what was pinned is not used for it.
	if err := os.WriteFile(r.options.StateFile, before, 0o600); err != nil {
		t.Fatal(err)
	}
	kept, err := ReadState(r.options.StateFile)
	if err != nil {
		t.Fatal(err)
	}
	o, err := CreateOffline(r.device, r.options.StateFile, kept.UUID, nil)
	if err != nil {
		t.Fatal(err)
	}
	o.Close()
	a = r.open()
	if a.TrackingLost() == "" || a.UUID() != kept.UUID {
		t.Errorf("after a restore the tracking goes on: '%s'", a.TrackingLost())
	}
	a.Close()
	if pins, err := filepath.Glob(filepath.Join(r.options.PinDir, hex.EncodeToString(kept.UUID[:])+"*")); err != nil || len(pins) != 1 {
		t.Errorf("pinned: %v, %v", pins, err)
	}
	if _, same, err := ReadStateOf(r.device, r.options.StateFile); err != nil || !same {
		t.Errorf("its own disk: %v, %v", same, err)
	}
	change(func(s *state) { s.Sequence++ })
	if _, same, err := ReadStateOf(r.device, r.options.StateFile); err != nil || same {
		t.Errorf("a disk that may be another: %v, %v", same, err)
	}
	if _, err := OpenOffline(r.device, r.options.StateFile); !errors.Is(err, ErrOtherDevice) {
		t.Errorf("a disk that may be another is filled: %v", err)
	}
}

func TestStateFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state")
	if s, err := readState(path); s != nil || err != nil {
		t.Fatalf("%v, %v", s, err)
	}
	s := &state{Generation: 1, UUID: [16]byte{1, 2}, Boot: [16]byte{3}, Sequence: 9, DeviceBytes: 1 << 40, Partition: 2,
		Serial: "serial", WWID: "eui.1", State: []byte("state")}
	var files [][]byte
	for g := uint64(1); g < 4; g++ {
		s.Generation = g
		if err := writeState(path, s); err != nil {
			t.Fatal(err)
		}
		got, err := readState(path)
		if err != nil || got.Generation != g || string(got.State) != "state" || got.Serial != s.Serial || got.WWID != s.WWID ||
			got.UUID != s.UUID || got.Boot != s.Boot || got.Sequence != 9 || got.DeviceBytes != 1<<40 || got.Partition != 2 {
			t.Fatalf("%+v, %v", got, err)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, text)
		if old, err := os.ReadFile(path + ".old"); g > 1 && (err != nil || !bytes.Equal(old, files[g-2])) {
			t.Errorf("the generation before %d is not kept: %v", g, err)
		}
	}
	if names, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*")); err != nil || len(names) != 2 {
		t.Errorf("%v, %v", names, err)
	}
	// Any damage is noticed, and nothing else is taken in its place.
	good := files[2]
	for at := range good {
		bad := bytes.Clone(good)
		bad[at] ^= 0x10
		if got, err := decodeState(bad); err == nil {
			t.Fatalf("byte %d damaged: %+v", at, got)
		}
	}
	for n := range good {
		if _, err := decodeState(good[:n]); err == nil {
			t.Fatalf("cut off at %d", n)
		}
	}
	if err := os.WriteFile(path, good[:len(good)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := readState(path); err == nil || !strings.Contains(err.Error(), path+".old") {
		t.Errorf("%+v, %v", got, err)
	}
}

func FuzzState(f *testing.F) {
	for _, s := range []*state{{DeviceBytes: 4096}, {Generation: 5, DeviceBytes: 1 << 30, Serial: "s", WWID: "w", State: []byte("x")}} {
		b, err := s.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeState(b)
		if err != nil {
			return
		}
		again, err := s.encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%+v is written as something else: %v", s, err)
		}
	})
}

// The thaw's own write is no change: an idle file system is not cut for ever.
func TestIdleStaysUnchanged(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		for _, kind := range []string{"ext4", "xfs"} {
			t.Run(kind, func(t *testing.T) {
				r := newRig(t, 320<<20)
				dir := blocktest.FileSystem(t, kind, r.device)
				a := r.open()
				base := r.base(a)
				for try := 0; ; try++ { // a new file system goes on writing for a while
					c := r.mustCut(a, base)
					c.Release()
					time.Sleep(200 * time.Millisecond)
					now, err := a.WrittenBytes()
					if err != nil {
						t.Fatal(err)
					}
					if now == c.WrittenBytes() {
						break
					}
					if try == 20 {
						t.Fatalf("%d bytes since the cut, though nobody writes", now-c.WrittenBytes())
					}
				}
				c := r.mustCut(a, base)
				c.Release()
				<-write(t, dir)
				blocktest.Command(t, "sync", "-f", dir)
				if now, err := a.WrittenBytes(); err != nil || now == c.WrittenBytes() {
					t.Errorf("a write is not counted: %d, %v", now, err)
				}
			})
		}
	})
}

// A tracker that can't be opened is none, and nobody closes it.
func TestTrackerThatFailsIsNone(t *testing.T) {
	if tracker, err := openTracker(bpf.Target{}); err == nil || tracker != nil {
		t.Errorf("%v, %v", tracker, err)
	}
}
