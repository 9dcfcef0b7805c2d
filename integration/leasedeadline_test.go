package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/deadman"
	"blockferry/blockdev/dm"
	"blockferry/blockdev/volume"
)

// holderVar makes this test binary a process that takes a lease and then does
// nothing; the value is the socket, the device, its uuid and the lease's length.
const holderVar = "BLOCKFERRY_TEST_HOLDER"

func init() {
	words := strings.Fields(os.Getenv(holderVar))
	if len(words) != 4 {
		return
	}
	ttl, err := time.ParseDuration(words[3])
	until := deadman.BootTime() + ttl
	if err == nil {
		_, err = deadman.HoldLease(deadman.GuardOptions{Socket: words[0]}, words[1], words[2], until)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "holder:", err)
		os.Exit(1)
	}
	fmt.Println("until", until.Nanoseconds())
	_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends
	os.Exit(0)
}

// leaseTTL is long enough for a guest to begin what is to happen before its end: on a
// busy machine guests stood still for four seconds.
const leaseTTL = 10 * time.Second

// leaseSlack is how long after a deadline a guest, which has one CPU and does not
// preempt, may take to make a device fail, beside all else that its machine runs. How
// long it took is logged.
const leaseSlack = 30 * time.Second

type leaseTest struct {
	t       *testing.T
	ctl     *dm.Control
	socket  string
	service *exec.Cmd
	log     *syncBuffer
}

func (l *leaseTest) startService() {
	l.t.Helper()
	l.service = exec.Command(blockferry(l.t), "dead-man", "--listen", l.socket)
	l.service.Stdout, l.service.Stderr = l.log, l.log
	l.log.Reset()
	if err := l.service.Start(); err != nil {
		l.t.Fatal(err)
	}
	s := l.service
	l.t.Cleanup(func() { _ = s.Process.Kill(); _ = s.Wait() })
	l.log.await(l.t, "dead-man serves")
}

// hold has a process take the lease, which is then stopped for good.
func (l *leaseTest) hold(device string, ttl time.Duration) (until time.Duration) {
	l.t.Helper()
	info, err := l.ctl.Info(device)
	if err != nil {
		l.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	out := &syncBuffer{}
	c := exec.Command(self)
	c.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s %s %s", holderVar, l.socket, device, info.UUID, ttl))
	c.Stdout, c.Stderr = out, out
	stdin, err := c.StdinPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { stdin.Close(); _ = c.Process.Kill(); _ = c.Wait() })
	out.await(l.t, "\n")
	ns, err := strconv.ParseInt(strings.TrimSpace(strings.TrimPrefix(out.String(), "until ")), 10, 64)
	if err = errors.Join(err, c.Process.Signal(unix.SIGSTOP)); err != nil {
		l.t.Fatalf("%v: %s", err, out)
	}
	return time.Duration(ns)
}

// mustFail fails the test unless all that is done to a device fails.
func (l *leaseTest) mustFail(device string) {
	l.t.Helper()
	path := dm.NodePath(device)
	if err := writeBlock(path, 0, 0xee); !errors.Is(err, unix.EIO) {
		l.t.Errorf("a write of %s: %v, want EIO", device, err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.ReadAt(alignedBuffer(4096), 0); !errors.Is(err, unix.EIO) {
		l.t.Errorf("a read of %s: %v, want EIO", device, err)
	}
}

// mapped makes a device with an uuid.
func (l *leaseTest) mapped(name string, table dm.Target) {
	l.t.Helper()
	_, err := l.ctl.Create(name, "TEST-"+name)
	l.t.Cleanup(func() { _ = l.ctl.Remove(name) })
	if err = errors.Join(err, l.ctl.Load(name, []dm.Target{table}), l.ctl.Resume(name)); err == nil {
		_, err = l.ctl.EnsureNode(name)
	}
	if err != nil {
		l.t.Fatal(err)
	}
}

// Promise: a node whose lease has ended writes no more, whatever became of its
// agent, also where writers were stopped just then, where something in flight
// hangs, and where the dead-man itself was killed.
func TestLeaseDeadline(t *testing.T) {
	inGuest(t, guest{Disks: []disk{{Size: 128 << 20}, {Size: 16 << 20}}, Modules: []string{"dm-delay", "nbd"}, Timeout: 6 * time.Minute}, func(t *testing.T) {
		l := &leaseTest{t: t, ctl: mapper(t), socket: filepath.Join(t.TempDir(), "dead-man.sock"), log: &syncBuffer{}}
		l.startService()
		l.volume()
		l.stopped()
		l.inFlight()
		l.flushed()
		t.Logf("the dead-man's log:\n%s", l.log)
		l.killed()
	})
}

// volume: a volume's lease ends while it is written, its agent stopped. Then it
// is taken down and up again.
func (l *leaseTest) volume() {
	t := l.t
	label := format(t, volume.FormatOptions{Device: ubd(0), SizeBytes: testSize})
	options := volume.Options{Name: "vol", Device: ubd(0)}
	v := up(t, l.ctl, options)
	mustRelease(t, mustCut(t, v, 1, false))
	f, err := os.OpenFile(v.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := alignedBuffer(4096)
	until := l.hold("vol", leaseTTL)
	// Each block holds its number; they go round.
	const blocks = 1024
	written, begun, done := 0, time.Duration(0), time.Duration(0)
	for {
		copy(b, fmt.Appendf(nil, "%20d", written))
		at := deadman.BootTime()
		if _, err = f.WriteAt(b, int64(written%blocks)*4096); err != nil {
			break
		}
		begun, done = at, deadman.BootTime()
		written++
		if done > until+leaseSlack {
			t.Fatalf("written %s after the deadline; log: %s", done-until, l.log)
		}
	}
	failed := deadman.BootTime()
	t.Logf("%d writes; the last began %s after the deadline and was acknowledged after %s, the first failed after %s",
		written, begun-until, done-until, failed-until)
	if !errors.Is(err, unix.EIO) || failed < until || written == 0 {
		t.Errorf("%v, %s after the deadline, after %d writes", err, failed-until, written)
	}

	data := make([]byte, blocks*4096)
	raw, err := os.OpenFile(ubd(0), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	read := func() []byte {
		buffer := alignedBuffer(len(data))
		if _, err := raw.ReadAt(buffer, label.Areas.Data.Offset); err != nil {
			t.Fatal(err)
		}
		return buffer
	}
	first := read()
	for i := range 20 {
		if _, err := f.WriteAt(b, int64(i)*4096); !errors.Is(err, unix.EIO) {
			t.Errorf("a write after it: %v", err)
		}
	}
	l.mustFail("vol")
	t.Logf("a flush after it: %v", f.Sync())
	if !bytes.Equal(first, read()) {
		t.Error("the disk beneath changes after the deadline")
	}
	for n := max(0, written-blocks); n < written; n++ {
		if got := string(first[n%blocks*4096:][:20]); got != fmt.Sprintf("%20d", n) {
			t.Fatalf("block %d holds '%s' though %d was acknowledged", n%blocks, got, n)
		}
	}

	// What was written is known, and what became of the volume is said.
	c := mustCut(t, v, 2, false)
	changed := mustChanged(t, c, 1)
	for n := range min(written, blocks) {
		if !names(changed, int64(n)*4096) {
			t.Fatalf("block %d was written, and is not named", n)
		}
	}
	mustRelease(t, c)
	o := deadman.GuardOptions{Socket: l.socket}
	info, err := l.ctl.Info("vol")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := deadman.HoldLease(o, "vol", info.UUID, deadman.BootTime()+time.Hour); !errors.Is(err, deadman.ErrLeaseEnded) {
		t.Errorf("held anew: %v", err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := tryUp(t, l.ctl, options); !errors.Is(err, volume.ErrFenced) {
		t.Errorf("adopted: %v", err)
	}
	if err := errors.Join(f.Close(), volume.Down(l.ctl, "vol")); err != nil {
		t.Fatal(err)
	}
	// Nothing can be written before the deadline is held.
	var lease *deadman.Lease
	refused := errors.New("refused on purpose")
	options.Hold = func() error { return refused }
	if _, err := tryUp(t, l.ctl, options); !errors.Is(err, refused) {
		t.Errorf("up without its deadline: %v", err)
	}
	options.Hold = func() (err error) {
		if now, err := l.ctl.Info("vol"); err != nil || !now.Exists || now.HasActive {
			t.Errorf("it can be written before its deadline is held: %+v, %v", now, err)
		}
		lease, err = deadman.HoldLease(o, "vol", info.UUID, deadman.BootTime()+time.Hour)
		return err
	}
	v = up(t, l.ctl, options)
	mustWriteBlock(t, v.Path(), 0, 1)
	if err := errors.Join(lease.Extend(deadman.BootTime()+2*time.Hour), lease.Release()); err != nil {
		t.Error(err)
	}
	if why := v.TrackingLost(); why != "" {
		t.Errorf("tracking is lost: %s", why)
	}
	// A new agent comes when the dead-man has loaded its table and no more.
	err = errors.Join(l.ctl.Load("vol", []dm.Target{{Length: uint64(v.Size() / 512), Type: "error"}}),
		l.ctl.Suspend("vol", dm.SuspendOptions{}), volume.Rescue(l.ctl, "vol"))
	if err != nil {
		t.Fatal(err)
	}
	l.mustFail("vol")
	if err := v.Down(); err != nil {
		t.Error(err)
	}
}

// stopped: the deadline comes while the device is suspended. What waits is not
// written, and whoever resumes later changes nothing.
func (l *leaseTest) stopped() {
	t := l.t
	l.mapped("suspended", dm.Target{Length: 8 << 11, Type: "linear", Params: ubd(1) + " 0"})
	mustWriteBlock(t, dm.NodePath("suspended"), 0, 1)
	if err := l.ctl.Suspend("suspended", dm.SuspendOptions{}); err != nil {
		t.Fatal(err)
	}
	l.hold("suspended", leaseTTL)
	if err := writeBlock(dm.NodePath("suspended"), 0, 2); !errors.Is(err, unix.EIO) {
		t.Errorf("a write that waited for the end of a suspend: %v", err)
	}
	if err := l.ctl.Resume("suspended"); err != nil {
		t.Error(err)
	}
	l.mustFail("suspended")
	l.mustHold("suspended", 0, 1)
}

// mustHold looks beneath a device of the second disk.
func (l *leaseTest) mustHold(device string, offset int64, want byte) {
	l.t.Helper()
	raw, err := os.OpenFile(ubd(1), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		l.t.Fatal(err)
	}
	defer raw.Close()
	b := alignedBuffer(4096)
	if _, err := raw.ReadAt(b, offset); err != nil || b[0] != want || b[4095] != want {
		l.t.Errorf("beneath %s stands %d, want %d: %v", device, b[0], want, err)
	}
}

// inFlight: what is in flight at the deadline ends late; what comes meanwhile
// waits, whatever signals the dead-man gets, and fails.
func (l *leaseTest) inFlight() {
	t := l.t
	const interrupt = unix.Signal(50) // ends a suspend in package dm
	// A write takes longer than the dead-man may be late, a flush less than it waits for.
	const at, delay, flush = 8 << 20, leaseTTL + 15*time.Second, 2 * time.Second
	part := fmt.Sprint(ubd(1), " ", at/512)
	l.mapped("slow", dm.Target{Length: 4 << 11, Type: "delay", Params: fmt.Sprintf("%s 0 %s %d %s %d", part, part, delay.Milliseconds(), part, flush.Milliseconds())})
	l.mapped("hangs", dm.Target{Length: 4 << 11, Type: "linear", Params: dm.NodePath("slow") + " 0"})
	t.Logf("the dead-man's log until then:\n%s", l.log)
	l.log.Reset() // slow flushes of the tests before are told alike
	until := l.hold("hangs", leaseTTL)
	flight, held := make(chan error, 1), make(chan error, 1)
	begun := deadman.BootTime()
	go func() { flight <- writeBlock(dm.NodePath("hangs"), 0, 3) }()
	l.log.await(t, "in flight")
	late := deadman.BootTime()
	if begun > until {
		t.Fatalf("this guest is too slow: nothing is in flight, %s after the deadline", begun-until)
	}
	go func() { held <- writeBlock(dm.NodePath("hangs"), 4096, 4) }()
	pid := l.service.Process.Pid
	for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, thread := range threads {
			if tid, err := strconv.Atoi(thread.Name()); err == nil {
				_ = unix.Tgkill(pid, tid, unix.SIGURG) // as its own runtime does
				_ = unix.Tgkill(pid, tid, interrupt)
			}
		}
	}
	if err := <-flight; err != nil {
		t.Errorf("in flight at the deadline: %v", err)
	}
	if err := <-held; !errors.Is(err, unix.EIO) {
		t.Errorf("written %s after the deadline: %v", late-until, err)
	}
	l.mustFail("hangs")
	l.mustHold("hangs", at, 3)
	l.mustHold("hangs", at+4096, 0)
}

// flushed: a flush after the end is answered as done, and what it would have made durable
// is, though the disk loses what was not flushed.
func (l *leaseTest) flushed() {
	t := l.t
	const blocks = 64
	power := newMains(1)
	disk := power.disk(t, 0, 1<<20)
	l.mapped("beneath", dm.Target{Length: 1 << 11, Type: "linear", Params: disk.path + " 0"})
	l.mapped("cached", dm.Target{Length: 1 << 11, Type: "linear", Params: dm.NodePath("beneath") + " 0"})
	f, err := os.OpenFile(dm.NodePath("cached"), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range int64(blocks) {
		mustWriteBlock(t, dm.NodePath("cached"), i*4096, byte(i+1))
	}
	if n := disk.pendingBytes(); n < blocks*4096 {
		t.Fatalf("%d bytes are in the disk's cache", n)
	}
	l.hold("cached", leaseTTL)
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		table, err := l.ctl.Table("cached")
		if err == nil && dm.Failing(table) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it does not fail: %v; log: %s", err, l.log)
		}
	}
	err = f.Sync()
	power.cut(disk)
	t.Logf("a flush after the end: %v", err)
	lost := 0
	content := make([]byte, blocks*4096)
	disk.durable.read(content, 0)
	for i := range blocks {
		if b := content[i*4096:][:4096]; b[0] != byte(i+1) || b[4095] != byte(i+1) {
			lost++
		}
	}
	if err == nil && lost > 0 {
		t.Errorf("%d of %d blocks are lost that were written, and flushed after the lease's end without an error", lost, blocks)
	}
	l.mustFail("cached")
}

// killed: nobody is there at the deadline. The next service makes up for it.
func (l *leaseTest) killed() {
	t := l.t
	l.mapped("again", dm.Target{Length: 2 << 11, Type: "linear", Params: fmt.Sprint(ubd(1), " ", 12<<11)})
	until := l.hold("again", leaseTTL)
	if err := l.service.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = l.service.Wait()
	time.Sleep(until - deadman.BootTime())
	mustWriteBlock(t, dm.NodePath("again"), 0, 5) // as is said in the manual
	l.startService()
	l.log.await(t, "everything on it fails")
	l.mustFail("again")
	l.mustHold("again", 12<<20, 5)
}
