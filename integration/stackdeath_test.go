package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/deadman"
	"blockferry/blockdev/dm"
	"blockferry/blockdev/volume"
)

// cutWithoutEnd is the main of the child that is killed.
func cutWithoutEnd(spec string) error {
	first, limit, _ := strings.Cut(spec, ":")
	number, err := strconv.ParseUint(first, 10, 64)
	if err != nil {
		return err
	}
	o := volume.Options{Name: "vol", Device: "/dev/ubda"}
	if o.StallLimit, err = time.ParseDuration(limit); err != nil {
		return err
	}
	if _, err := os.Stat("/dev/mapper/disk"); err == nil {
		o.Device = "/dev/mapper/disk"
	}
	if o.Guard, err = newGuard(); err != nil {
		return err
	}
	ctl, err := dm.Open()
	if err != nil {
		return err
	}
	v, err := volume.Up(ctl, o)
	if err != nil {
		return err
	}
	for ; ; number++ {
		c, err := v.Cut(neverDone{}, number, true)
		if err != nil {
			fmt.Printf("void %d %v\n", number, err)
			continue
		}
		fmt.Println("cut", number)
		if err := c.Release(); err != nil {
			return err
		}
	}
}

// neverDone is a context that does not end: init has no better one to give.
type neverDone struct{}

func (neverDone) Deadline() (time.Time, bool) { return time.Time{}, false }
func (neverDone) Done() <-chan struct{}       { return nil }
func (neverDone) Err() error                  { return nil }
func (neverDone) Value(any) any               { return nil }

// startCutter starts a child that cuts without end.
func startCutter(t *testing.T, first uint64, limit string) (*exec.Cmd, *syncBuffer) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out := &syncBuffer{}
	child := exec.Command(self)
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%d:%s", cutterVar, first, limit))
	child.Stdout, child.Stderr = out, os.Stderr
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Process.Kill() })
	return child, out
}

func TestStackAdoptsAfterKillAnywhere(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		ctl := mapper(t)
		format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize, CowBytes: 64 << 20})
		o := volume.Options{Device: ubd(0), Guard: guard(t)}
		v := up(t, ctl, o)
		h := history{Seed: 3, Size: testSize, MaxBytes: 64 << 10}
		w := startWriter(t, v.Path(), h, 1)
		w.awaitWrites(t, 20)
		c := mustCut(t, v, 1, true)
		before := imageOf(t, c.View(), testSize)
		mustRelease(t, c)
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		number := uint64(1)
		left := map[string]int{}
		for i := range 12 {
			child, out := startCutter(t, number+1, "10s")
			out.await(t, "cut")
			time.Sleep(time.Duration(i*7%40) * time.Millisecond)
			if err := child.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			child.Wait()
			number += uint64(strings.Count(out.String(), "\n")) + 2
			w.awaitWrites(t, 5) // nothing stays suspended: before anybody adopts it
			for _, role := range []string{"snap", "base"} {
				if table, err := ctl.Table("vol-" + role); err == nil && len(table) == 1 {
					left[role+" "+table[0].Type]++
				}
			}
			v = up(t, ctl, o)
			if info, err := ctl.Info("vol-snap"); err != nil || info.Exists {
				t.Fatalf("left: %+v, %v", info, err)
			}
			if table, err := ctl.Table("vol-base"); err != nil || table[0].Type != "linear" {
				t.Fatalf("left: %v, %v", table, err)
			}
			number++
			atLeast := w.acked()
			c := mustCut(t, v, number, true)
			atMost := w.issued()
			after := imageOf(t, c.View(), testSize)
			if verdict, err := judgeImage(bytes.NewReader(after), h); err != nil || verdict.Latest < atLeast || verdict.K > atMost {
				t.Fatalf("cut %d: %+v, %v; want %d to %d", number, verdict, err, atLeast, atMost)
			}
			mustCover(t, fmt.Sprint("since cut 1 at ", number), mustChanged(t, c, 1), before, after)
			mustRelease(t, c)
			if err := v.Close(); err != nil {
				t.Fatal(err)
			}
		}
		w.stop(t)
		t.Logf("what the kills left: %v", left)
	})
}

// awaitSuspended waits until a device is suspended, or is not, and returns how
// long that took.
func awaitSuspended(t *testing.T, ctl *dm.Control, name string, want bool, within time.Duration) time.Duration {
	t.Helper()
	start := time.Now()
	for {
		info, err := ctl.Info(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Suspended == want {
			return time.Since(start)
		}
		if time.Since(start) > within {
			t.Fatalf("after %s, suspended is not %v", within, want)
		}
		time.Sleep(time.Millisecond)
	}
}

// Promise: an agent that is stopped or killed while the volume is suspended
// never leaves it so, and a cut it was stopped in is void.
func TestStackDeadManFreesWriters(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}, Modules: []string{"dm-delay"}, Timeout: 4 * time.Minute}, func(t *testing.T) {
		ctl := mapper(t)
		reads := newLateReads(t, "disk")
		format(t, volume.FormatOptions{Device: reads.disk, SizeBytes: testSize, CowBytes: 64 << 20})
		o := volume.Options{Device: reads.disk, Guard: guard(t)}
		v := up(t, ctl, o)
		mustWriteBlock(t, v.Path(), 0, 1)
		reads.begin(250, "vol-base")
		defer reads.end() // the base can't be removed while it is read
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		child, out := startCutter(t, 100, "1500ms")
		for range 3 {
			out.await(t, "cut")
			awaitSuspended(t, ctl, "vol", true, 10*time.Second)
			if err := child.Process.Signal(unix.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			took := awaitSuspended(t, ctl, "vol", false, 10*time.Second)
			if took > 2500*time.Millisecond {
				t.Errorf("the dead-man resumed after %s, the limit is 1.5 s", took)
			}
			mustWriteBlock(t, v.Path(), 4096, 2)
			if err := child.Process.Signal(unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
			out.await(t, "void")
			if !strings.Contains(out.String(), deadman.ErrLate.Error()) {
				t.Errorf("the cut was void for another reason:\n%s", out)
			}
			out.Reset()
		}
		child.Process.Kill()
		child.Wait()
		v = up(t, ctl, o)
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		// Killed: long before the limit.
		for i := range 3 {
			child, out := startCutter(t, uint64(10000*(i+1)), "20s")
			out.await(t, "cut")
			awaitSuspended(t, ctl, "vol", true, 10*time.Second)
			child.Process.Kill()
			child.Wait()
			if took := awaitSuspended(t, ctl, "vol", false, 15*time.Second); took > 3*time.Second {
				t.Errorf("resumed %s after the kill", took)
			}
			mustWriteBlock(t, v.Path(), 4096, 3)
		}
	})
}

// A dead-man that was killed in the window: the agent resumes, the cut is
// void, the next has a new dead-man.
func TestStackSurvivesItsDeadMan(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 192 << 20}}, Modules: []string{"dm-delay"}}, func(t *testing.T) {
		ctl := mapper(t)
		reads := newLateReads(t, "disk")
		format(t, volume.FormatOptions{Device: reads.disk, SizeBytes: testSize, CowBytes: 64 << 20})
		g := guard(t)
		v := up(t, ctl, volume.Options{Device: reads.disk, Guard: g})
		reads.begin(250, "vol-base")
		defer reads.end() // the base can't be removed while it is read
		first := g.Pid()
		killed := make(chan error, 1)
		go func() {
			for {
				info, err := ctl.Info("vol")
				if err != nil {
					killed <- err
					return
				}
				if info.Suspended {
					killed <- unix.Kill(first, unix.SIGKILL)
					return
				}
				time.Sleep(time.Millisecond)
			}
		}()
		_, err := v.Cut(t.Context(), 1, true)
		if !errors.Is(err, deadman.ErrLate) {
			t.Fatalf("without a dead-man: %v", err)
		}
		if err := <-killed; err != nil {
			t.Fatal(err)
		}
		mustWriteBlock(t, v.Path(), 0, 1)
		mustRelease(t, mustCut(t, v, 2, true))
		if g.Pid() == first {
			t.Error("the same dead-man")
		}
	})
}
