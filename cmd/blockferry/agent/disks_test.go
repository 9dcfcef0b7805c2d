package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
	"blockferry/blockdev/udev"
	"blockferry/cmd/blockferry/config"
	"blockferry/protocol"
)

// fakeMachine has disks by name, and counts what it is told.
type fakeMachine struct {
	mu    sync.Mutex
	disks map[string]blockdev.Identity
	told  []string
	woken map[string]int
	at    time.Time
}

func (f *fakeMachine) look(name string) (blockdev.Identity, error) {
	id, ok := f.disks[name]
	if !ok {
		return id, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return id, nil
}

func (f *fakeMachine) there(seen blockdev.Identity) bool {
	for _, id := range f.disks {
		if udev.Same(id, seen) {
			return true
		}
	}
	return false
}

// watch is a watch on them for the names, each one's own owner.
func (f *fakeMachine) watch(names ...string) *disks {
	d := &disks{log: quiet(), look: f.look, there: f.there, now: func() time.Time { return f.at }, events: make(chan struct{}, 1),
		publish: func(volume, replica, kind, message string) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.told = append(f.told, volume+replica+" "+kind+" "+message)
		}}
	for i, name := range names {
		d.add(name, diskOwner{"v", fmt.Sprint(i), func() { f.woken[name]++ }})
	}
	return d
}

func newFakeMachine() *fakeMachine {
	return &fakeMachine{disks: map[string]blockdev.Identity{}, woken: map[string]int{}, at: time.Date(2026, 11, 27, 22, 0, 0, 0, time.UTC)}
}

func (f *fakeMachine) take() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	told := f.told
	f.told = nil
	return told
}

// A disk that comes, goes, grows or is exchanged is told of once, and its owner woken; what
// stays as it is wakes nobody.
func TestDisksAreNoted(t *testing.T) {
	const ssd, ebs = "model:Amazon EC2 NVMe Instance Storage", "serial:vol0123"
	f := newFakeMachine()
	first := blockdev.Identity{Path: "/dev/nvme1n1", Disk: "nvme1n1", Major: 259, Minor: 1, Sequence: 5, SizeBytes: 8 << 30}
	f.disks[ssd] = first
	d := f.watch(ssd, ebs)
	step := func(what string, missing bool, woken int, told ...string) {
		t.Helper()
		f.at = f.at.Add(time.Minute)
		before := f.woken[ssd] + f.woken[ebs]
		if got := d.lookAtAll(); got != missing {
			t.Errorf("%s: missing %v", what, got)
		}
		got := f.take()
		if len(got) != len(told) {
			t.Fatalf("%s: told %q, want %q", what, got, told)
		}
		for i := range told {
			if !strings.Contains(got[i], told[i]) {
				t.Errorf("%s: told %q, want %q", what, got[i], told[i])
			}
		}
		if n := f.woken[ssd] + f.woken[ebs] - before; n != woken {
			t.Errorf("%s: %d woken, want %d", what, n, woken)
		}
	}
	d.add(ssd, diskOwner{"v", "0", func() { f.woken["twice"]++ }}) // told of once, both woken
	step("at first", true, 0)
	if _, ok := d.goneSince(ebs); ok {
		t.Error("what never was there is gone")
	}
	step("unchanged", true, 0)
	f.disks[ebs] = blockdev.Identity{Path: "/dev/nvme2n1", Disk: "nvme2n1", Major: 259, Minor: 2, Sequence: 6, SizeBytes: 8 << 30}
	step("attached", false, 1, "v1 disk-appeared serial:vol0123 (/dev/nvme2n1) is there, with 8589934592 bytes")
	step("unchanged", false, 0)
	delete(f.disks, ebs)
	step("detached", true, 1, "v1 disk-gone serial:vol0123 (/dev/nvme2n1) is gone")
	if since, ok := d.goneSince(ebs); !ok || !since.Equal(f.at) {
		t.Errorf("gone since %v, %v; want %v", since, ok, f.at)
	}
	if err := d.absent(ebs, fs.ErrNotExist); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "serial:vol0123 is gone since 2026-11-27T22:05:00Z") {
		t.Errorf("absent: %v", err)
	}
	step("unchanged", true, 0)

	// Grown, and back.
	grown := first
	grown.SizeBytes *= 2
	f.disks[ssd] = grown
	step("grown", true, 1, "v0 disk-resized "+ssd+" (/dev/nvme1n1) has 17179869184 bytes, before 8589934592")
	if words, advice := d.resizedWords(ssd, "data"); !strings.Contains(words, "has grown from 8GiB to 16GiB") || !strings.Contains(advice, "blockferry resize data") {
		t.Errorf("grown: %s; %s", words, advice)
	}
	grown.SizeBytes *= 2
	f.disks[ssd] = grown
	step("grown again", true, 1, "v0 disk-resized")
	if words, _ := d.resizedWords(ssd, "data"); !strings.Contains(words, "from 8GiB to 32GiB") {
		t.Errorf("grown again: %s", words)
	}
	d.settle(ssd)
	if words, _ := d.resizedWords(ssd, "data"); words != "" {
		t.Errorf("it is known, and said all the same: %s", words)
	}
	f.disks[ssd] = first
	step("shrunk", true, 1, "v0 disk-resized")
	if words, _ := d.resizedWords(ssd, "data"); !strings.Contains(words, "shrunk from 32GiB to 8GiB") {
		t.Errorf("shrunk: %s", words)
	}

	// Another disk under the same name and number, between two looks.
	other := first
	other.Sequence = 9
	f.disks[ssd] = other
	step("exchanged", true, 1, "v0 disk-gone", "v0 disk-appeared")
	if words, _ := d.resizedWords(ssd, "data"); words != "" {
		t.Errorf("another disk: %s", words)
	}
	if f.woken["twice"] != f.woken[ssd] {
		t.Errorf("of two that are one owner one was woken %d times, the other %d", f.woken[ssd], f.woken["twice"])
	}
	// Its name is another's, too, or its link is lost: the disk is still there.
	delete(f.disks, ssd)
	f.disks["elsewhere"] = other
	step("without its name", true, 0)
	if !d.find(ssd).is {
		t.Error("a disk that is there is missing")
	}
}

// While one disk is looked at, and does not answer, what is known of the others can be had.
func TestDisksBesideOneThatHangs(t *testing.T) {
	f := newFakeMachine()
	f.disks["serial:x"] = blockdev.Identity{Path: "/dev/vda", Disk: "vda", Major: 254, Sequence: 1, SizeBytes: 1}
	d := f.watch("serial:x", "serial:y")
	d.lookAtAll()
	delete(f.disks, "serial:x") // its name is lost
	asked, answer, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
	d.there = func(blockdev.Identity) bool {
		close(asked)
		<-answer
		return true
	}
	var both sync.WaitGroup
	both.Go(func() { d.lookAtAll() })
	<-asked
	both.Go(func() { d.goneSince("serial:y"); d.settle("serial:x"); close(done) })
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Error("all wait for a disk that hangs")
	}
	close(answer)
	both.Wait()
	if !d.find("serial:x").is {
		t.Error("it is there, and missing")
	}
}

// Who looks at its disk finds it by the name of which the kernel tells, or now and then.
func TestDisksPatience(t *testing.T) {
	d := newFakeMachine().watch("serial:x", "/dev/sda", "/srv/file")
	for _, hears := range []bool{false, true} {
		d.hears = hears
		for name, want := range map[string]time.Duration{"serial:x": lookAnyway, "/dev/sda": lookAnyway, "/srv/file": retryEvery} {
			if !hears {
				want = retryEvery
			}
			if got := d.patience(name); got != want {
				t.Errorf("%s, hears %v: %v, want %v", name, hears, got, want)
			}
		}
	}
	if !strings.Contains(d.whenThere("serial:x"), "as soon as") || !strings.Contains(d.whenThere("/srv/file"), "every 5s") {
		t.Errorf("%s; %s", d.whenThere("serial:x"), d.whenThere("/srv/file"))
	}
	var none *disks
	if none.patience("/dev/sda") != retryEvery || none.absent("/dev/sda", fs.ErrNotExist) == nil {
		t.Error("without a watch")
	}
}

// The volume's own mapped devices, of which each cut makes some, are no reason to look, but
// where a disk may be a mapped device.
func TestDisksIgnoreCuts(t *testing.T) {
	f := newFakeMachine()
	f.disks["/dev/sda"] = blockdev.Identity{Path: "/dev/sda", Disk: "sda", Major: 8, SizeBytes: 1}
	ours, disk := udev.Event{Name: "dm-3"}, udev.Event{Name: "sdb"}
	d := f.watch("/dev/sda", "serial:x")
	d.lookAtAll()
	if !d.ours(ours) || d.ours(disk) {
		t.Error("disks alone: a mapped device is a reason to look, or a disk is none")
	}
	d = f.watch("/dev/sda", "/dev/vg/late")
	d.lookAtAll()
	if d.ours(ours) {
		t.Error("a link that is not there may be to a mapped device")
	}
	f.disks["/dev/vg/late"] = blockdev.Identity{Path: "/dev/vg/late", Disk: "dm-7", Major: 253, SizeBytes: 1}
	d.lookAtAll()
	if d.ours(ours) {
		t.Error("a disk is a mapped device")
	}
}

// awaitEvent is the first event of a kind.
func awaitEvent(t *testing.T, told func() []string, kind string) string {
	t.Helper()
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); time.Sleep(10 * time.Millisecond) {
		for _, words := range told() {
			if strings.Contains(words, kind) {
				return words
			}
		}
	}
	t.Fatalf("no %s within a minute", kind)
	return ""
}

// On the machine's own kernel: a disk whose link comes late is there without anybody looking
// for it again, and gone when its medium is.
func TestDisksHearTheKernel(t *testing.T) {
	device := blocktest.Loop(t, 1<<20) // else it is skipped
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	late := blocktest.Command(t, "losetup", "--find", "--show", file)
	hold, err := os.Open(late)
	blocktest.Command(t, "losetup", "--detach", late) // when hold is closed
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	// In a folder of which the kernel tells, as far as the agent knows.
	dir, err := os.MkdirTemp("/dev/shm", "blockferry-test-*")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	link := filepath.Join(dir, "link")
	f := newFakeMachine()
	d := f.watch(device, link)
	looks := make(chan struct{}, 1000)
	d.look = func(name string) (blockdev.Identity, error) {
		if name == link {
			looks <- struct{}{}
		}
		return udev.Look(name)
	}
	d.there = udev.There
	done := make(chan struct{})
	ctx, stop := context.WithCancel(t.Context())
	go func() { defer close(done); d.run(ctx) }()
	defer func() { stop(); <-done }()
	<-looks
	<-looks // it hears by then, or will
	began := time.Now()
	if err := os.WriteFile("/sys/class/block/"+filepath.Base(late)+"/uevent", []byte("add"), 0); err != nil {
		t.Fatal(err)
	}
	<-looks
	<-looks
	if err := os.Symlink(late, link); err != nil {
		t.Fatal(err)
	}
	words := awaitEvent(t, f.take, "disk-appeared")
	if took := time.Since(began); took > lookAnyway/2 || !strings.Contains(words, "v1") {
		t.Errorf("a late link was found after %v: %s", took, words)
	}
	if err := os.Truncate(file, 2<<20); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	blocktest.Command(t, "losetup", "--set-capacity", late)
	words = awaitEvent(t, f.take, "disk-resized")
	if took := time.Since(began); took > lookAnyway/2 || !strings.Contains(words, "has 2097152 bytes, before 1048576") {
		t.Errorf("a disk that grew was noticed after %v: %s", took, words)
	}
	began = time.Now()
	hold.Close()
	words = awaitEvent(t, f.take, "disk-gone")
	if took := time.Since(began); took > lookAnyway/2 || !strings.Contains(words, "v1") || !strings.Contains(words, link) {
		t.Errorf("a disk without its medium was missed after %v: %s", took, words)
	}
}

// A replica's disk that comes is served when its owner is woken, long before it would be
// looked for; woken for nothing it stays open.
func TestReplicaFollowsItsDisk(t *testing.T) {
	device := blocktest.Loop(t, 48<<20)
	dir, err := os.MkdirTemp("/dev/shm", "blockferry-test-*")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "replica")
	a := &Agent{log: quiet(), hub: newHub(), options: Options{Config: &config.Config{RescueDir: t.TempDir()}},
		receiver: protocol.NewReceiver(protocol.ReceiverConfig{WindowBytes: protocol.LocalWindowBytes})}
	defer a.receiver.Close()
	f := newFakeMachine()
	a.disks = f.watch(path)
	a.disks.hears = true
	v := &config.Volume{Name: "data", Hooks: &config.Hooks{}, Replicas: []*config.Replica{{Name: "ebs", Device: path}}}
	l := newLocalReplica(a, v, v.Replicas[0])
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); l.run(ctx) }()
	defer func() { stop(); <-done }()
	await := func(what string, ok func(open bool, reason, advice string) bool) {
		t.Helper()
		for limit := time.Now().Add(lookAnyway / 2); ; time.Sleep(5 * time.Millisecond) {
			_, open, reason, advice := l.status()
			if ok(open, reason, advice) {
				return
			}
			if time.Now().After(limit) {
				t.Fatalf("%s: open %v, %s, %s", what, open, reason, advice)
			}
		}
	}
	await("absent", func(open bool, reason, advice string) bool {
		return !open && strings.Contains(reason, "no such file") && strings.Contains(advice, "as soon as it is there")
	})
	disk, err := blockdev.OpenFile(device, blockdev.OpenOptions{Write: true})
	if err == nil {
		err = protocol.FormatReplica(disk, protocol.FormatOptions{VolumeUUID: [16]byte{1}, SizeBytes: 1 << 20, JournalBytes: protocol.MinJournalBytes})
		err = errors.Join(err, disk.Close())
	}
	if err == nil {
		err = os.Symlink(device, path)
	}
	if err != nil {
		t.Fatal(err)
	}
	l.wake()
	await("there", func(open bool, _, _ string) bool { return open })
	_, _, _, change := l.look()
	l.wake() // without a reason
	select {
	case <-change:
		t.Error("woken without a reason it does not stay open")
	case <-time.After(50 * time.Millisecond):
	}
}

// What a volume's SSD is replaced by is looked at, not written to, and status says what to
// do with it.
func TestLostDiskIsSaid(t *testing.T) {
	gone := blockdev.Identity{Path: "/dev/nvme1n1", Disk: "nvme1n1", Major: 4095, Minor: 1, Sequence: 3, SizeBytes: 8 << 30}
	dir := t.TempDir()
	path := filepath.Join(dir, "ssd")
	m := aManaged(&config.Volume{Name: "data", Device: path})
	f := newFakeMachine()
	m.agent.disks = f.watch(path)
	m.agent.disks.find(path).since = f.at
	m.stage, m.on = stageUp, gone
	events, end := m.agent.hub.listen()
	defer end()
	say := func(what string, published int, words ...string) {
		t.Helper()
		for range 2 { // the second is no news
			m.lookAtDisk()
		}
		for _, w := range words {
			if !strings.Contains(m.lostWords+" | "+m.lostAdvice, w) {
				t.Errorf("%s: %s | %s; want %s", what, m.lostWords, m.lostAdvice, w)
			}
		}
		for n := 0; ; n++ {
			select {
			case e := <-events:
				if e.Kind != "volume-disk-lost" {
					t.Errorf("%s: %v", what, e)
				}
				continue
			default:
			}
			if n != published {
				t.Errorf("%s: %d events, want %d", what, n, published)
			}
			break
		}
	}
	say("gone", 1, path+" (/dev/nvme1n1) is gone since 2026-11-27T22:00:00Z", "attach it again", "blockferry down --force data", "blockferry up data")
	if err := os.WriteFile(path, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	say("blank", 1, "in its place is "+path+", a blank disk", "nothing is written to it by itself", "blockferry down --force data, blockferry restore data")
	if b, err := os.ReadFile(path); err != nil || slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) {
		t.Errorf("the blank disk was written to, or is lost: %v", err)
	}
	if err := os.WriteFile(path, append([]byte("something"), make([]byte, 16<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	say("foreign", 1, "in its place is "+path, "attach the right disk")
	m.on = blockdev.Identity{}
	say("there again", 0)
	if m.lostWords != "" {
		t.Errorf("there again: %s", m.lostWords)
	}
}
