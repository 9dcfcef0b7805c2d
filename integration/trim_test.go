package integration

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev/dm"
	"blockferry/cmd/blockferry/status"
)

// trimmed is a volume on thin disks, with a file system on it at work.
type trimmed struct {
	*cli
	ssdFile, ebs, ebsFile string
	path, dir, kind       string
	size                  int64

	stop    chan struct{}
	stopped chan error
}

// newTrimmed begins to replicate one of size bytes, several times a second; options are
// lines of the volume's configuration.
func newTrimmed(t *testing.T, kind string, size int64, options string) *trimmed {
	t.Helper()
	m := &trimmed{kind: kind, size: size, stop: make(chan struct{}), stopped: make(chan error, 1)}
	var ssd string
	ssd, m.ssdFile = thinDisk(t, 3*size+140<<20)
	m.ebs, m.ebsFile = thinDisk(t, 3*size+140<<20)
	m.cli = newCLI(t, strings.Replace(onlyOnSync(ssd, m.ebs, size), "interval: 1h\n", "interval: 100ms\n"+options, 1))
	m.must(t, "create")
	m.start(t)
	m.path = m.await(t, "up", time.Minute, func(v status.Volume) bool { return v.Up }).Path
	mkfs(t, kind, m.path)
	m.dir = mustMount(t, kind, m.path, "")
	go func() { m.stopped <- churn(m.dir, m.stop, writerPause) }()
	return m
}

// trimMiB is how large the files are that are removed and trimmed, all together.
const trimMiB = 100

// freed is what the volume takes less of on each side, in MiB, after files were
// removed and trimmed.
func (m *trimmed) freed(t *testing.T, trim func()) (ssdMiB, ebsMiB int64) {
	t.Helper()
	const each = 25
	content := filled(each << 20)
	var files []string
	for i := range trimMiB / each {
		files = append(files, fmt.Sprint(m.dir, "/large", i))
		if err := os.WriteFile(files[i], content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	unix.Sync()
	m.syncAndSettle(t, m.ebs)
	taken := func() [2]int64 {
		return [2]int64{allocatedWithin(t, m.ssdFile, dataOffset, m.size), allocatedWithin(t, m.ebsFile, 0, m.size)}
	}
	full := taken()
	for _, file := range files {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
	unix.Sync()
	trim()
	m.syncAndSettle(t, m.ebs)
	left := taken()
	return (full[0] - left[0]) >> 20, (full[1] - left[1]) >> 20
}

func (m *trimmed) trim(t *testing.T) {
	t.Helper()
	t.Log(strings.TrimSpace(run(t, "fstrim", "-v", m.dir)))
}

// idle ends the load, and finds both sides the same.
func (m *trimmed) idle(t *testing.T) {
	t.Helper()
	close(m.stop)
	if err := <-m.stopped; err != nil {
		t.Error(err)
	}
	mustUnmount(t, m.dir)
	m.syncAndSettle(t, m.ebs)
	same(t, m.path, m.ebs, m.size)
}

// What a file system gives back under load is free on both sides. What it gives back
// while an epoch is read from a frozen view the kernel drops: that stays taken on both
// sides, and replication is to be paused for it.
func TestTrimFreesBothSides(t *testing.T) {
	t.Parallel()
	const size = 320 << 20 // as small as xfs may be
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			inGuest(t, guest{Memory: "2000M", Disks: []disk{{Size: 16 << 20}}, Modules: []string{"loop"}, Timeout: 8 * time.Minute}, func(t *testing.T) {
				m := newTrimmed(t, kind, size, "")
				one, other := m.freed(t, func() { m.inAView(t, func() { m.trim(t) }) })
				t.Logf("in a view: of %d MiB the SSD gave back %d, the replica %d", trimMiB, one, other)
				if one > 20 || other > 20 {
					t.Errorf("in a view: of %d MiB the SSD gave back %d, the replica %d; want none, as docs/promises.md says", trimMiB, one, other)
				}
				one, other = m.freed(t, func() {
					m.must(t, "pause")
					awaitNoView(t)
					m.trim(t)
					m.must(t, "resume")
				})
				t.Logf("paused: of %d MiB the SSD gave back %d, the replica %d", trimMiB, one, other)
				if one < 80 || other < 80 {
					t.Errorf("paused: of %d MiB the SSD gave back %d, the replica %d", trimMiB, one, other)
				}
				m.idle(t)
				if out, err := checkCopy(t, kind, m.ebs, size); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
				// A discard alone is a change: nobody asks for an epoch here.
				awaitNoView(t)
				discardRange(t, m.path, 0, 1<<20)
				replica := openBoth(t, m.ebs)
				defer replica.Close()
				image := alignedBuffer(1 << 20)
				for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
					if _, err := replica.ReadAt(image, 0); err != nil {
						t.Fatal(err)
					}
					if allZero(image) {
						break
					}
					if time.Now().After(deadline) {
						t.Fatal("what was discarded on an idle volume is not zeros on the replica after a minute")
					}
				}
				m.must(t, "verify")
				m.must(t, "down")
			})
		})
	}
}

// checkTrimWhileReplicated: with pre-copy and fine tracking discards pass while it is
// replicated, under load, too, and free the space on both sides. Once a minute a cut
// has a frozen view all the same, for its era: then once more.
func checkTrimWhileReplicated(t *testing.T) {
	const tries = 5
	m := newTrimmed(t, "ext4", 160<<20, "    image: pre-copy\n    when-busy: stall\n")
	for try := 1; ; try++ {
		var viewed bool
		from := 0
		one, other := m.freed(t, func() {
			from = len(m.logText(t))
			viewed = watchViews(t, func() { m.trim(t) })
		})
		cuts := strings.Count(m.logText(t)[from:], `msg="read into memory"`)
		t.Logf("of %d MiB the SSD gave back %d, the replica %d, in a view: %v; %d cuts", trimMiB, one, other, viewed, cuts)
		if viewed && (one < 80 || other < 80) && try < tries {
			continue
		}
		if one < 80 || other < 80 || cuts == 0 {
			t.Errorf("while it is replicated, in %d cuts read into memory: of %d MiB the SSD gave back %d, the replica %d (in a view: %v)", cuts, trimMiB, one, other, viewed)
		}
		break
	}
	m.idle(t)
	m.must(t, "verify")
	m.must(t, "down")
}

// inAView does something while a frozen view is held, from before until after: by an
// agent that is stopped meanwhile.
func (m *trimmed) inAView(t *testing.T, do func()) {
	t.Helper()
	ctl := mapper(t)
	// Nothing is suspended: else the dead-man would go on with what the agent was at.
	held := func() bool {
		for _, name := range []string{"data", "data-base"} {
			if info, err := ctl.Info(name); err != nil || info.Suspended {
				return false
			}
		}
		return viewHeld(t, ctl)
	}
	for deadline := time.Now().Add(2 * time.Minute); ; {
		for !viewHeld(t, ctl) {
			if time.Now().After(deadline) {
				t.Fatal("no frozen view is held for two minutes")
			}
			time.Sleep(time.Millisecond)
		}
		m.pauseAgent(t)
		if held() {
			break
		}
		m.signal(t, unix.SIGCONT)
	}
	defer m.signal(t, unix.SIGCONT)
	do()
	if !held() {
		t.Error("the view was not held to the end, though the agent was stopped")
	}
}

// pauseAgent stops the agent, and waits until none of its threads runs.
func (m *trimmed) pauseAgent(t *testing.T) {
	t.Helper()
	m.signal(t, unix.SIGSTOP)
	threads := fmt.Sprintf("/proc/%d/task/*/status", m.agent.Process.Pid)
	runs := func() bool {
		for _, path := range glob(t, threads) {
			if text, err := os.ReadFile(path); err == nil && !strings.Contains(string(text), "\nState:\tT") {
				return true
			}
		}
		return false
	}
	for deadline := time.Now().Add(30 * time.Second); runs(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			m.signal(t, unix.SIGCONT)
			t.Fatal("the agent was told to stop and goes on for 30 s")
		}
	}
}

func (m *trimmed) signal(t *testing.T, signal unix.Signal) {
	t.Helper()
	if err := m.agent.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
}

// viewHeld says whether discards are dropped: what the volume stands on is a
// snapshot-origin.
func viewHeld(t *testing.T, ctl *dm.Control) bool {
	t.Helper()
	table, err := ctl.Table("data-base")
	if err != nil {
		t.Error(err)
		return false
	}
	return len(table) == 1 && table[0].Type == "snapshot-origin"
}

// watchViews does something and says whether a frozen view was held meanwhile. One
// for less than some milliseconds may be missed, in which little is discarded.
func watchViews(t *testing.T, do func()) (viewed bool) {
	t.Helper()
	ctl := mapper(t)
	var stop atomic.Bool
	looked := make(chan bool, 1)
	go func() {
		seen := false
		for !stop.Load() {
			seen = viewHeld(t, ctl) || seen
			time.Sleep(2 * time.Millisecond)
		}
		looked <- seen
	}()
	defer func() {
		stop.Store(true)
		viewed = <-looked
	}()
	do()
	return false
}

// dataOffset is where the volume begins on its SSD.
const dataOffset = 1 << 20

// allocatedWithin is how much of a range of a sparse file takes room.
func allocatedWithin(t *testing.T, path string, offset, length int64) (bytes int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at, end := offset, offset+length; at < end; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // a hole up to the end
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			t.Fatal(err)
		}
		bytes += max(0, min(hole, end)-data)
		at = hole
	}
	return bytes
}

// filled is content without a zero.
func filled(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i%251 + 1)
	}
	return b
}
