package udev

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
)

// patience is how long an event may take, on a machine that does much else.
const patience = time.Minute

// listen is a listener whose events are those of its channel, on the machine's own kernel.
func listen(t *testing.T) (*Listener, <-chan heard) {
	t.Helper()
	l, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	events := make(chan heard, 4096)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			e, err := l.Next()
			if errors.Is(err, os.ErrClosed) {
				return
			}
			events <- heard{e, err}
		}
	}()
	t.Cleanup(func() {
		l.Close()
		select {
		case <-ended:
		case <-time.After(patience):
			t.Error("Next does not end with Close")
		}
	})
	return l, events
}

type heard struct {
	Event
	err error
}

// await is the first event that fits.
func await(t *testing.T, events <-chan heard, what string, fits func(heard) bool) heard {
	t.Helper()
	limit := time.After(patience)
	for {
		select {
		case h := <-events:
			if fits(h) {
				return h
			}
		case <-limit:
			t.Fatalf("%s was not heard", what)
		}
	}
}

// say has the kernel send an event of a device.
func say(t *testing.T, device, action string) {
	t.Helper()
	if err := os.WriteFile("/sys/class/block/"+filepath.Base(device)+"/uevent", []byte(action), 0); err != nil {
		t.Fatal(err)
	}
}

// A disk that gets its medium is heard, with its number; what a program says in the
// kernel's place is not.
func TestListen(t *testing.T) {
	_, events := listen(t)
	device := blocktest.Loop(t, 1<<20)
	name := filepath.Base(device)
	id, err := blockdev.Identify(device)
	if err != nil {
		t.Fatal(err)
	}
	h := await(t, events, "a loop device with a file", func(h heard) bool { return h.err == nil && h.Name == name && h.Sequence == id.Sequence })
	if h.Action != "change" || h.Major != id.Major || h.Minor != id.Minor || h.Subsystem != "block" {
		t.Errorf("heard %+v of %+v", h, id)
	}
	forge(t, message("remove@/devices/forged", "ACTION=remove", "DEVPATH=/devices/forged", "SUBSYSTEM=block", "MAJOR=7", "MINOR=0", "DEVNAME=forged", "SEQNUM=1"))
	forge(t, []byte("nonsense"))
	say(t, device, "offline")
	await(t, events, "the kernel's next", func(h heard) bool {
		if h.Name == "forged" || h.err != nil {
			t.Errorf("a program was heard: %+v", h)
		}
		return h.Name == name && h.Action == "offline"
	})
}

// forge sends a message to all who listen to the kernel, as any privileged program may.
func forge(t *testing.T, b []byte) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		t.Fatal(err)
	}
}

// Whoever does not keep up is told so, and hears whatever comes after: all devices are
// looked at then, and what was dropped later would be missed for good.
func TestListenTellsOfLosses(t *testing.T) {
	device := blocktest.Loop(t, 1<<20)
	l, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	stop := time.AfterFunc(patience, func() { l.Close() })
	defer stop.Stop()
	defer l.Close()
	if err := l.raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 4096) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		say(t, device, "change")
	}
	for {
		if _, err := l.Next(); errors.Is(err, ErrLost) {
			break
		} else if err != nil {
			t.Fatalf("no loss was told of: %v", err)
		}
	}
	say(t, device, "online")
	for {
		e, err := l.Next()
		if errors.Is(err, ErrLost) {
			say(t, device, "online") // another device said too much meanwhile
			continue
		}
		if err != nil {
			t.Fatalf("what came after the loss was not heard: %v", err)
		}
		if e.Action == "online" && e.Name == filepath.Base(device) {
			return
		}
	}
}

// A loop device without its file is none; with another file it is another disk.
func TestLookAtLoop(t *testing.T) {
	device := blocktest.Loop(t, 1<<20)
	seen, err := Look(device)
	if err != nil || seen.SizeBytes != 1<<20 || !There(seen) {
		t.Fatalf("%+v, %v", seen, err)
	}
	f, err := Open(device, blockdev.OpenOptions{})
	if err != nil || f.Size() != 1<<20 {
		t.Fatalf("open: %v", err)
	}
	f.Close()
	if seen.Sequence > 0 {
		other := seen
		other.Sequence--
		if There(other) {
			t.Error("an earlier disk of that number is there")
		}
	}
	for n := 0; n < 64; n++ {
		path := filepath.Join("/dev", "loop"+string(rune('0'+n%10)))
		if id, err := blockdev.Identify(path); err == nil && id.SizeBytes == 0 {
			if _, err := Look(path); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s without file: %v", path, err)
			}
			if _, err := Open(path, blockdev.OpenOptions{}); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s without file: %v", path, err)
			}
			return
		}
	}
}
