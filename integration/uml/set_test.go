package uml

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/integration/vm"
)

// serveVar has this test binary serve, in a guest.
const serveVar = "BLOCKFERRY_TEST_SERVE"

// pulse is how often a program in a guest looks at the clock.
const pulse = 20 * time.Millisecond

func bootTime() time.Duration {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		panic(err)
	}
	return time.Duration(now.Nano())
}

// serveTests does what TestSet asks for.
func serveTests() error {
	const inMemory = "/tmp/mark"
	var gap, last atomic.Int64
	last.Store(int64(bootTime()))
	go func() {
		for {
			time.Sleep(pulse)
			now := int64(bootTime())
			gap.Store(max(gap.Load(), now-last.Load()))
			last.Store(now)
		}
	}()
	return vm.Serve(func(name string, in json.RawMessage) (any, error) {
		switch name {
		case "clock":
			return bootTime(), nil
		case "gap":
			// It may be asked before the pulse goes on.
			return time.Duration(max(gap.Swap(0), int64(bootTime())-last.Load())), nil
		case "boot":
			return vm.Boot(), nil
		case "mark":
			f, err := os.OpenFile("/dev/ubda", os.O_WRONLY|unix.O_DSYNC, 0)
			if err != nil {
				return nil, err
			}
			_, err = f.Write(make([]byte, 512))
			if err == nil {
				_, err = f.WriteAt([]byte("marked"), 0)
			}
			return nil, errors.Join(err, f.Close(), os.WriteFile(inMemory, nil, 0o600))
		case "marks":
			text := make([]byte, 6)
			f, err := os.Open("/dev/ubda")
			if err == nil {
				_, err = f.Read(text)
			}
			if err != nil {
				return nil, err
			}
			_, missing := os.Stat(inMemory)
			return fmt.Sprintf("%s %v", text, missing == nil), f.Close()
		case "ask", "reach":
			var other string
			if err := json.Unmarshal(in, &other); err != nil {
				return nil, err
			}
			limit := 20 * time.Second
			if name == "reach" {
				limit = 3 * time.Second
			}
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			line, err := vm.Dial(ctx, other)
			if err != nil {
				return nil, err
			}
			defer line.Close()
			var said string
			return said, line.Call(ctx, "nothing", nil, &said)
		case "hang":
			time.Sleep(time.Hour)
		case "crash":
			return nil, os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
		}
		return nil, errors.New("it does not know how")
	})
}

// A set of guests: each does what it is told, they reach each other, a pause stops one
// and no other, and what a power cut takes from one is its memory.
func TestSet(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a network needs root")
	}
	h := testHost(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	spec := func(name string) vm.Spec {
		return vm.Spec{Name: name, Memory: "256M", OwnClock: name == "a", Args: []string{self}, Env: []string{serveVar + "=1"}, Disks: []vm.Disk{{Size: 1 << 20}}}
	}
	ask := func(m *vm.Member, do string, in, out any) {
		t.Helper()
		if err := m.Call(time.Minute, do, in, out); err != nil {
			t.Fatalf("%s: %v", do, err)
		}
	}
	again, err := h.WithSet(t.Context(), []vm.Spec{spec("a"), spec("b")}, func(ctx context.Context, s *vm.Set) error {
		a, b := s.Members[0], s.Members[1]
		defer func() { t.Logf("consoles:\n%s\n%s", a.Output(), b.Output()) }()
		err := vm.Each(s.Members, func(m *vm.Member) error { m.Boot(); return m.Answers() })
		if err != nil {
			return err
		}
		for from, to := range map[*vm.Member]*vm.Member{a: b, b: a} {
			if err := from.Call(time.Minute, "ask", to.Address, nil); err == nil || err.Error() != "it does not know how" {
				t.Errorf("%s asks %s: %v", from.Name, to.Name, err)
			}
		}
		if err := a.Call(time.Second, "hang", nil, nil); err == nil || errors.Is(err, vm.ErrNoEnd) || !strings.Contains(err.Error(), "hang has not ended within 1s") {
			t.Errorf("a guest that is well, its program is not: %v", err)
		}
		pauses(t, ask, a, b, false)
		pauses(t, ask, a, b, true)
		if err := b.Pause(); err != nil {
			t.Error(err)
		}
		if err := b.ContinueUnaware(); err == nil {
			t.Error("time was hidden from a guest that has the host's clock")
		}
		if err := b.Continue(); err != nil {
			t.Error(err)
		}
		if err := b.Unplug(); err != nil {
			t.Error(err)
		}
		ask(a, "clock", nil, nil)
		if err := a.Call(time.Minute, "reach", b.Address, nil); err == nil || !strings.Contains(err.Error(), "does not answer") {
			t.Errorf("a reaches b, which is unplugged: %v", err)
		}
		if err := b.Plug(); err != nil {
			t.Error(err)
		}

		ask(a, "mark", nil, nil)
		ask(b, "mark", nil, nil)
		if err := a.Pause(); err != nil {
			t.Error(err)
		}
		a.Cut()
		if err := a.Pause(); err == nil {
			t.Error("a guest without power was paused")
		}
		a.Boot()
		if err := a.Answers(); err != nil {
			return err
		}
		for m, want := range map[*vm.Member]struct {
			boot  int
			marks string
		}{a: {1, "marked false"}, b: {0, "marked true"}} {
			var boot int
			var marks string
			ask(m, "boot", nil, &boot)
			if ask(m, "marks", nil, &marks); boot != want.boot || marks != want.marks {
				t.Errorf("%s, a's power cut: boot %d, disk and memory hold '%s', want %d, '%s'", m.Name, boot, marks, want.boot, want.marks)
			}
		}
		if err := b.Call(time.Minute, "ask", a.Address, nil); err == nil || err.Error() != "it does not know how" {
			t.Errorf("b asks a, which was booted again: %v", err)
		}
		if err := b.Call(time.Minute, "crash", nil, nil); !errors.Is(err, vm.ErrNoEnd) {
			t.Errorf("a guest that crashed: %v", err)
		}
		return nil
	})
	if err != nil || again {
		t.Errorf("again %v, %v", again, err)
	}
}

// pauses: a guest of this kind finds after a pause that its clock went on, unless the pause
// is hidden from it. Nothing of it ran meanwhile.
func pauses(t *testing.T, ask func(m *vm.Member, do string, in, out any), a, b *vm.Member, unaware bool) {
	t.Helper()
	const pause = 3 * time.Second
	var was, is, gap time.Duration
	ask(a, "gap", nil, &gap)
	asked := time.Now()
	ask(a, "clock", nil, &was)
	answered := time.Now()
	if err := a.Pause(); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := a.Call(time.Minute, "clock", nil, nil); err == nil {
		t.Error("it was told to do something while it was paused")
	}
	ask(b, "gap", nil, nil)
	ask(b, "clock", nil, nil)
	time.Sleep(pause - time.Since(begun))
	paused, hidden := time.Since(begun), time.Duration(0)
	goOn := a.Continue
	if unaware {
		goOn, hidden = a.ContinueUnaware, paused
	}
	if err := goOn(); err != nil {
		t.Fatal(err)
	}
	before := time.Now()
	ask(a, "clock", nil, &is)
	after := time.Now()
	// The host may have been busy between the looks at its clock.
	least, most := before.Sub(answered)-hidden-time.Second/2, after.Sub(asked)-hidden+time.Second/2
	if passed := is - was; passed < least || passed > most {
		t.Errorf("its clock went on by %v, the host's by %v to %v, of which %v were hidden", passed, least, most, hidden)
	}
	ask(a, "gap", nil, &gap)
	t.Logf("paused for %v, its program stood still for %v; it answered %v after that", paused, gap, after.Sub(before))
	if gap < paused-hidden {
		t.Errorf("it stood still for %v of a pause of %v, of which %v were hidden", gap, paused, hidden)
	}
	if ask(b, "gap", nil, &gap); gap >= paused { // wakePause is what it may lose anyway
		t.Errorf("the other guest stood still for %v", gap)
	}
}
