package attach

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"blockferry/blockdev"
	"blockferry/blockdev/blocktest"
)

func discard(device string, offset, length int64) error {
	d, err := blockdev.OpenFile(device, blockdev.OpenOptions{Write: true})
	if err != nil {
		return err
	}
	return errors.Join(d.Discard(offset, length), d.Close())
}

// Every user of a device that is no file system that can be frozen stands in the
// way; nothing is changed then.
func TestRefusedUsers(t *testing.T) {
	t.Run("swap", func(t *testing.T) {
		r := newRig(t, 64<<20)
		blocktest.Command(t, "mkswap", r.device)
		blocktest.Command(t, "swapon", r.device)
		defer blocktest.Command(t, "swapoff", r.device)
		r.refused(ErrUser, r.device, "swap")
	})
	t.Run("second loop device", func(t *testing.T) {
		r := newRig(t, 64<<20)
		blocktest.FileSystem(t, "ext4", r.device)
		second := blocktest.LoopOver(t, r.device)
		r.refused(ErrUser, r.device, filepath.Base(second))
		// The other way round: it is what the mounted one stands on.
		r.device, r.options.Device = second, second
		r.open().Close()
	})
	t.Run("root", func(t *testing.T) {
		r := newRig(t, 64<<20)
		b, err := blockdev.BackingOf("/")
		if err != nil {
			t.Fatal(err)
		}
		if len(b.Devices) > 0 && b.MountPoint == "/" {
			r.options.Device = "/dev/" + b.Devices[0]
			r.options.StateFile = "/dev/shm/blockferry-test-state"
			r.refused(ErrUser) // this program stands on it, too
		}
		r.options.Device = r.device
		r.usage(t, []blockdev.Mount{{Point: "/", Device: "x", Number: "8:1", Type: "ext4"}}, nil)
		r.refused(ErrUser, "root file system")
	})
	t.Run("holder", func(t *testing.T) {
		r := newRig(t, 64<<20)
		r.usage(t, nil, []blockdev.Use{{Kind: "holder", By: "md0", Device: "x"}})
		r.refused(ErrUser, "md0")
	})
	t.Run("a type that can't be frozen", func(t *testing.T) {
		r := newRig(t, 64<<20)
		r.usage(t, []blockdev.Mount{{Point: "/a", Device: "x", Number: "8:1", Type: "ext4"}, {Point: "/b", Device: "y", Number: "8:2", Type: "vfat"}}, nil)
		r.refused(ErrUser, "/b", "vfat")
	})
	t.Run("log elsewhere", func(t *testing.T) {
		r := newRig(t, 64<<20)
		r.usage(t, []blockdev.Mount{{Point: "/a", Device: "x", Number: "8:1", Type: "xfs", Options: []string{"rw", "logdev=/dev/z"}}}, nil)
		r.refused(ErrUser, "/a", "/dev/z")
	})
	t.Run("journal elsewhere", func(t *testing.T) {
		r := newRig(t, 64<<20)
		journal := blocktest.Loop(t, 32<<20)
		blocktest.Command(t, "mke2fs", "-q", "-b", "4096", "-O", "journal_dev", journal)
		blocktest.Command(t, "mkfs.ext4", "-q", "-b", "4096", "-J", "device="+journal, r.device)
		blocktest.Mount(t, "ext4", r.device, 0)
		r.refused(ErrUser, "journal")
		r.options.Device = journal
		r.refused(ErrUser, "claimed")
	})
	t.Run("claimed by a program", func(t *testing.T) {
		r := newRig(t, 64<<20)
		f, err := os.OpenFile(r.device, os.O_RDONLY|unix.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r.refused(ErrUser, "claimed")
	})
	t.Run("what the agent needs", func(t *testing.T) {
		r := newRig(t, 64<<20)
		dir := blocktest.FileSystem(t, "ext4", r.device)
		elsewhere := r.options.StateFile
		r.options.StateFile = filepath.Join(dir, "new", "state")
		r.refused(ErrUser, dir)
		r.options.StateFile = elsewhere
		r.options.Keep = []string{t.TempDir(), filepath.Join(dir, "spill")}
		r.refused(ErrUser, "spill")
	})
	t.Run("another agent", func(t *testing.T) {
		r := newRig(t, 64<<20)
		blocktest.FileSystem(t, "ext4", r.device)
		a := r.open()
		if b, err := Open(r.options); !errors.Is(err, unix.EBUSY) {
			t.Errorf("attached twice: %v, %v", b, err)
		}
		a.Close()
		r.open()
	})
}

// usage has the device's users be others for the length of a test.
func (r *rig) usage(t *testing.T, mounts []blockdev.Mount, others []blockdev.Use) {
	was := usage
	usage = func(string) ([]blockdev.Mount, []blockdev.Use, error) { return mounts, others, nil }
	t.Cleanup(func() { usage = was })
}

// A user that comes while the device is attached stands in the way of the next
// cut, not of what was attached.
func TestUserThatComesLater(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		r := newRig(t, 64<<20)
		blocktest.FileSystem(t, "ext4", r.device)
		a := r.open()
		base := r.base(a)
		t.Run("comes", func(t *testing.T) {
			blocktest.LoopOver(t, r.device)
			if _, err := r.cut(a, base); !errors.Is(err, ErrUser) {
				t.Errorf("with a second loop device: %v", err)
			}
		})
		r.mustCut(a, base).Release()
		// One that comes between the look and the freeze.
		was := usage
		defer func() { usage = was }()
		calls := 0
		usage = func(device string) ([]blockdev.Mount, []blockdev.Use, error) {
			mounts, others, err := was(device)
			if calls++; calls > 1 {
				mounts = append(mounts, blockdev.Mount{Point: "/late", Device: filepath.Base(r.device), Number: "7:99", Type: "xfs"})
			}
			return mounts, others, err
		}
		if _, err := r.cut(a, base); !errors.Is(err, errMounts) {
			t.Errorf("a file system that came meanwhile: %v", err)
		}
		// Another stands at its place by the time it is opened.
		usage = was
		list, err := fileSystems(r.device)
		if err != nil {
			t.Fatal(err)
		}
		blocktest.MountOn(t, list[0].points[0], "ext4", blocktest.Loop(t, 64<<20))
		if f, err := list[0].open(); !errors.Is(err, errMounts) {
			t.Errorf("opened another file system in its place: %v, %v", f, err)
		}
	})
}

// What is mounted may change while the device is attached.
func TestMountsChange(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		r := newRig(t, 64<<20)
		dir := blocktest.FileSystem(t, "ext4", r.device)
		a := r.open()
		i := r.newImage(a)
		put := func(dir, name string) {
			t.Helper()
			if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		// cut takes one and looks for the files that should be there.
		cut := func(frozen int, names ...string) {
			t.Helper()
			i.apply(r.mustCut(a, i.at))
			if s := a.Stats(); len(s.Frozen) != frozen {
				t.Errorf("froze %v, want %d file systems", s.Frozen, frozen)
			}
			i.mounted("ext4", func(dir string) {
				for _, name := range names {
					if text, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(text) != name {
						t.Errorf("%s: '%s', %v", name, text, err)
					}
				}
			})
		}
		put(dir, "one")
		cut(1, "one")
		again := blocktest.Mount(t, "ext4", r.device, 0) // the same file system, at a second place
		put(again, "two")
		cut(1, "one", "two")
		// Mount namespaces that begin meanwhile, of whoever else is on this machine,
		// have a copy of each mount.
		unmount := func(dirs ...string) {
			t.Helper()
			for _, d := range dirs {
				if err := unix.Unmount(d, 0); err != nil {
					t.Fatal(err)
				}
			}
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
				if points, err := a.Mounts(); err == nil && len(points) == 0 {
					return
				} else if time.Now().After(deadline) {
					t.Fatalf("still mounted: %v, %v", points, err)
				}
			}
		}
		unmount(dir, again)
		cut(0, "one", "two")
		dir = blocktest.Mount(t, "ext4", r.device, 0)
		put(dir, "three")
		blocktest.Command(t, "mount", "-o", "remount,ro", dir)
		cut(1, "one", "two", "three")
		unmount(dir)

		// Seen only in another mount namespace.
		other := t.TempDir()
		holder := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c",
			`mount "$0" "$1" && echo four > "$1/x" && printf four > "$1/four" && echo mounted && read l`, r.device, other)
		holder.Stderr = os.Stderr
		stdin, err := holder.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		stdout, err := holder.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := holder.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = holder.Process.Kill(); _ = holder.Wait() }()
		line := make([]byte, 64)
		if n, err := stdout.Read(line); !strings.HasPrefix(string(line[:n]), "mounted") {
			t.Fatalf("'%s', %v", line[:n], err)
		}
		cut(1, "one", "two", "three", "four")
		stdin.Close()
		_ = holder.Wait()
		unmount()
		cut(0, "four")
	})
}

// A device that is not mounted has a cut only if nobody writes meanwhile.
func TestNotMounted(t *testing.T) {
	unlessLost(t, func(t *testing.T) {
		r := newRig(t, 64<<20)
		a := r.open()
		base := r.base(a)
		if err := rawWrite(t, r.device, a.Size()); err != nil {
			t.Fatal(err)
		}
		c := r.mustCut(a, base)
		if list, err := c.Changed(base); err != nil || blockdev.Total(list) != 4096 || c.Stalled() != 0 {
			t.Errorf("%v, %v, stalled %s", list, err, c.Stalled())
		}
		c.Release()
		f := r.stopper(a)
		if _, err := f.Stop(t.Context(), 0, func() error { return rawWrite(t, r.device, a.Size()) }); !errors.Is(err, ErrWritten) {
			t.Errorf("written to while it was read: %v", err)
		}
	})
}
